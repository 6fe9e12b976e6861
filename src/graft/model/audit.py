# SPDX-License-Identifier: Apache-2.0
"""Audit: which active adapters of a model got gradients and moved, and which parameters train, are saved, are
optimized.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from graft.config.base import PeftConfig
from graft.core.carrier import Carrier, iter_carried
from graft.core.errors import PeftWarning, join_some, warn
from graft.core.finite import is_dense_float, max_magnitudes
from graft.core.method import Tuner, WeightUse
from graft.core.rows import find_tensors
from graft.inject.beside import ModulesToSaveWrapper
from graft.inject.parts import AdapterCarriers, check_no_foreign_adapters, find_carriers, get_registry, unwrap_model
from graft.inject.report import star_indices
from graft.inject.survey import survey_model
from graft.io.entries import list_entries
from graft.io.save import collect_base_tensors
from graft.kernels.eager import autocast_dtype
from graft.model.rates import class_name_of, find_known_range
from graft.storage.parallel import is_sharded, layout_of

# states of the gradients of a part; those that are faults are named as their lists in AuditReport
NONE, ZERO, BROKEN, FINE = "no_gradient", "zero_gradient", "not_finite", "fine"

TINY = 1e-5  # share of its weight below which an update changes nothing that one could see
HUGE = 10.0  # share above which nothing is left of the weight
FAR = 10.0  # times below or above the range of good learning rates


def declare_fault(title: str, remedy: str) -> Any:
    """Return a field of AuditReport for the entries of one fault, a list; its metadata hold the fault and remedy."""
    return field(default_factory=list, metadata={"fault": (title, remedy)})


@dataclass
class AuditReport:
    """The findings of an audit. An empty list found nothing; `str` shows the others, each with its remedy.

    Entries of the lists up to `nothing_trains` are adapters on their layers, as "layers.0.q_proj ('default')". Entries
    of the other lists are parameters.
    """

    never_called: list[str] = declare_fault(  # known if the audit ran the model itself
        "the forward pass never called",
        "The model uses these modules' weights past them, or not at all: leave them out with exclude_modules.",
    )
    no_gradient: list[str] = declare_fault(
        "active, but no gradient came there",
        "The forward pass did not call these modules, or what they return does not reach the loss: no_grad() or "
        "detach() on the way, adapters disabled or merged, or gradient checkpointing of inputs without gradients "
        "(call model.enable_input_require_grads()). Leave out with exclude_modules what the model does not call.",
    )
    zero_gradient: list[str] = declare_fault(
        "active, but all gradients are zero",
        "Their scaling is 0, all their factors are 0 (re-initialise the adapter), or the loss does not depend on them.",
    )
    not_finite: list[str] = declare_fault(
        "gradients that are not finite",
        "The loss or an activation overflows: look at inputs and loss, lower the learning rate, or train in bfloat16.",
    )
    broken: list[str] = declare_fault(
        "values that are not finite",
        "Training has gone on past an overflow: start again from an earlier checkpoint, with a lower learning rate.",
    )
    exploded: list[str] = declare_fault(
        f"updates more than {HUGE:.0f} times as large as the weights that they change",
        "Start again with a lower learning rate (for LoRA, 1e-4 to 1e-3 is usual), or clip gradients.",
    )
    not_moved: list[str] = declare_fault(  # after steps of an optimizer
        f"updates that are less than {TINY:.0e} of the weights that they change, after steps of the optimizer",
        "The adapters are as good as untrained: raise the learning rate (for LoRA, 1e-4 to 1e-3 is usual), see that "
        "the optimizer holds them and the schedule has not ended at 0, or train longer.",
    )
    nothing_trains: list[str] = declare_fault(  # active adapters, if no parameter of the model trains
        "a backward pass ran, and no parameter of the model requires gradients; active are",
        "Load with is_trainable=True, or call set_adapter(name).",
    )
    not_trained: list[str] = declare_fault(  # of active adapters: would be saved, and are frozen
        "would be saved, but are frozen",
        "If they should train, call model.set_requires_grad(name), or load with is_trainable=True.",
    )
    not_saved: list[str] = declare_fault(
        "train, but save_pretrained() writes no file with them",
        "Name their modules in modules_to_save (or set bias), save them yourself, or freeze them.",
    )
    not_optimized: list[str] = declare_fault(
        "train, but are not in the optimizer",
        "Make the optimizer after the adapters were added and activated, or add_param_group() them.",
    )
    far_rates: list[str] = declare_fault(  # learning rates, by adapter; known for Adam and its like
        f"learning rates more than {FAR:.0f} times outside what is known to be good",
        "print(graft.suggest_lr(config, model)) says what was tested, and what the method's source has.",
    )
    after: str = ""  # which backward passes left the gradients; empty: there was none
    updates: dict[str, float] = field(default_factory=dict)  # norm of each update, as a share of its weight's
    stepped: bool = False  # an optimizer has changed the adapters, as far as one can tell

    @property
    def ok(self) -> bool:
        """Whether all lists are empty."""
        return not any(getattr(self, name) for name in SECTIONS)

    def count_findings(self) -> dict[str, int]:
        """Return fault → number of its entries, for the lists that are not empty."""
        return {fault: len(getattr(self, name)) for name, (fault, _) in SECTIONS.items() if getattr(self, name)}

    def __str__(self) -> str:
        """Return the report as text: a line that says after which backward pass, if any, and whether nothing is wrong.

        If an optimizer stepped and updates were measured, a line with the range of updates follows. Each list that is
        not empty gives a line with its fault, its number of entries, the entries, and the remedy. Entries that differ
        in layer numbers only are counted together; of many only some are shown.
        """
        when = f"After {self.after}" if self.after else "Before any backward pass, so without a look at gradients"
        verdict = "nothing is wrong with the adapters." if self.ok else "not all adapters train as set up."
        lines = [f"{when}: {verdict}"]
        if self.stepped and self.updates:
            lines.append(f"Their updates are {self.range_of_updates()} of the weights.")
        for name, (title, remedy) in SECTIONS.items():
            entries = getattr(self, name)
            if entries:
                alike = Counter(star_indices(entry) for entry in entries)
                shown = [entry if n == 1 else f"{entry} × {n}" for entry, n in alike.items()]
                lines.append(f"- {title} ({len(entries)}): {join_some(shown)}. {remedy}")
        return "\n".join(lines)

    def range_of_updates(self) -> str:
        """Return the smallest and the largest share in `updates` as text, "1.0e-03 to 2.0e-02", or the one value if
        they are equal.
        """
        least, most = min(self.updates.values()), max(self.updates.values())
        return f"{least:.1e}" if least == most else f"{least:.1e} to {most:.1e}"


SECTIONS: dict[str, tuple[str, str]] = {f.name: f.metadata["fault"] for f in fields(AuditReport) if f.metadata}


class Part(NamedTuple):
    """An active adapter on one of its carriers (layer, head, shared tensors), and its parameters that require
    gradients.
    """

    carrier: Carrier
    adapter: str
    parameters: list[nn.Parameter]

    @property
    def label(self) -> str:
        """The text "layers.0.q_proj ('default')" with ", disabled" and ", merged" inside the brackets where that is so.

        Disabled counts for the carrier or in this thread's calls.

        A carrier without a key is named "shared by layers".
        """
        state = self.carrier.state  # a backward pass may run it outside of any call
        off = state.disabled or (state.call is not None and bool(state.call.thread_state.off))
        why = ", disabled" if off else ""
        why += ", merged" if self.adapter in self.carrier.merged_adapters else ""
        return f"{self.carrier.key or 'shared by layers'} ('{self.adapter}'{why})"


def audit(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, loss: Callable[[], Tensor] | None = None
) -> AuditReport:
    """Return a report of the active adapters: which do not train or move, are frozen, have exploded, are not saved, or
    not optimized.

    Call it between `backward()` and `zero_grad()`, or pass `loss`. Without gradients it judges values alone: whether
    training has changed the adapters, and how large their updates are. It waits for the device only a few times, but
    reads each weight: call it now and then, not in every step.

    A model in training runs a part of the audit once without a call, and warns (`Watch`). `graft.train.Watch` audits in
    a Trainer.

    Args:
        model: with adapters; a PeftModel, a module that carries adapters, or a wrapper (DDP, torch.compile) of one.
        optimizer: which must hold all parameters that train; its learning rates are compared with known ones.
        loss: runs the model and returns its loss, such as `lambda: model(**batch).loss`. The audit runs it and a
            backward pass, notes which modules are called, and puts back the gradients of before.

    Example:
        >>> print(graft.audit(model, optimizer, loss=lambda: model(**batch).loss))
    """
    model = unwrap_model(model)
    registry = get_registry(model)
    if registry is None:
        check_no_foreign_adapters(model)
        tree = survey_model(model)
        carriers: list[Carrier] = [*tree.layers.values(), *tree.wrappers.values()]
        names = list(dict.fromkeys(name for carrier in carriers for name in carrier.adapters))
    else:
        carriers, names = list(registry.carriers()), list(registry.peft_config)
    report, parts = AuditReport(), find_active_parts(carriers)
    report_updates(parts, report, was_stepped(model, registry, optimizer))
    if loss is None:
        report_gradients(parts, report)
        report.after = "a backward pass" if any(p.grad is not None for p in model.parameters()) else ""
    else:
        with run_trial(model, registry, carriers, loss) as called:
            report_gradients(parts, report, called)
        report.after = "a backward pass of its own"
    if not report.after:
        report.no_gradient.clear()
        if was_trained(registry):
            report.after = "training, whose gradients are gone"
    report.not_trained = find_frozen(carriers)
    adapters = {name: find_carriers(model, name) for name in names}
    report.not_saved = find_unsaved(model, adapters)
    if optimizer is not None:
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        report.not_optimized = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
        report.far_rates = find_far_rates(parts, {name: config for name, (*_, config) in adapters.items()}, optimizer)
    return report


def find_active_parts(carriers: Iterable[Carrier]) -> list[Part]:
    """Return the active adapters on their carriers, each with its parameters that have requires_grad, and so should get
    gradients. Those without such a parameter are left out.
    """
    parts = ((c, name, [p for p in c.parameters_of(name) if p.requires_grad]) for c, name in iter_carried(carriers))
    return [Part(*part) for part in parts if part[2]]


def gradient_states(parts: Iterable[Part]) -> list[str]:
    """Return the state of the gradients of each part, over all its parameters: NONE, ZERO, BROKEN (not finite) or FINE.

    NONE is a part where no parameter has a gradient; parameters without one are ignored otherwise. BROKEN needs one
    number that is not finite. A part is ZERO only if all of its gradients are: those of LoRA's A begin with 0. All
    numbers are read with a few waits for the device.
    """
    gradients = [[p.grad for p in part.parameters if p.grad is not None] for part in parts]
    sizes = iter(max_magnitudes([g for grads in gradients for g in grads]))
    out = []
    for grads in gradients:
        most = [next(sizes) for _ in grads]
        if not most:
            out.append(NONE)
        elif not math.isfinite(sum(most)):  # one after the other: max() would pass nan by
            out.append(BROKEN)
        else:
            out.append(FINE if any(most) else ZERO)
    return out


def report_gradients(parts: list[Part], report: AuditReport, called: set[int] | None = None) -> None:
    """Add the label of each part without proper gradients to its list in the report: `no_gradient`, `zero_gradient` or
    `not_finite`.

    A part without a gradient is added to `never_called` instead if its layer is not in `called`; prompts and shared
    tensors never are.

    Args:
        called: ids of the modules that ran; None: not known.
    """
    for part, state in zip(parts, gradient_states(parts)):
        if state == NONE and called is not None and part.carrier.replaces and id(part.carrier) not in called:
            report.never_called.append(part.label)
        elif state != FINE:
            getattr(report, state).append(part.label)


def was_stepped(model: nn.Module, registry: object, optimizer: torch.optim.Optimizer | None) -> bool:
    """Return True if an optimizer seems to have changed the adapters.

    Signs: the state of `optimizer` has a parameter of the model that requires gradients; or the active adapters had a
    backward pass, and no such parameter has a gradient left. The second sign counts without an optimizer, too.
    """
    training = [p for p in model.parameters() if p.requires_grad]
    if optimizer is not None and any(p in optimizer.state for p in training):
        return True
    return was_trained(registry) and all(p.grad is None for p in training)


def was_trained(registry: Any) -> bool:
    """Return True if there are active adapters and all of them were active in a backward pass.

    False without a registry.
    """
    active = () if registry is None else registry.active_adapters
    return bool(active) and registry.trained.issuperset(active)


def report_updates(parts: list[Part], report: AuditReport, stepped: bool) -> None:
    """Set `stepped` and `updates` of the report, and add parts to `broken` (values not finite), `exploded` and
    `not_moved`.

    The update is judged as a share of its weight, where that is known. Above 10 it has exploded, unless the adapter
    starts with a part of the weight. Below 1e-5 it has not moved, if an optimizer has stepped.
    """
    report.stepped = stepped
    for part, (finite, share) in zip(parts, measure_updates(parts)):
        if not finite:
            report.broken.append(part.label)
        elif not math.isnan(share):
            report.updates[part.label] = share
            if share > HUGE and not starts_large(part):
                report.exploded.append(part.label)
            elif stepped and share < TINY:
                report.not_moved.append(part.label)


def starts_large(part: Part) -> bool:
    """Return True if the adapter took a part of the weight out of the base at its start (PiSSA), so that its update is
    large. False for a carrier that is no layer, or lacks the adapter.
    """
    layer = part.carrier.adapter_layer
    method = None if layer is None else layer.methods.get(part.adapter)
    return method is not None and WeightUse.CHANGES in method.uses_weight()


@contextmanager
def run_trial(
    model: nn.Module, registry: Any, carriers: Iterable[Carrier], loss: Callable[[], Tensor]
) -> Iterator[set[int]]:
    """Run forward and backward with all gradients None; yield the ids of the carriers that ran.

    Gradients are enabled. After the block, also after an error, the old gradients are back and the hooks on the
    carriers gone. The registry's watch, if there is a registry, is off meanwhile: this is no training. No backward pass
    runs if the loss has no gradient.
    """
    before = [(p, p.grad) for p in model.parameters()]
    called: set[int] = set()

    def note(module: nn.Module, _: object) -> None:
        """Record that a carrier's module ran."""
        called.add(id(module))

    with ExitStack() as undo:
        if registry is not None:
            undo.callback(setattr, registry, "watch", registry.watch)
            registry.watch = None
        for p, grad in before:
            undo.callback(setattr, p, "grad", grad)
            p.grad = None
        for c in carriers:
            if isinstance(c, nn.Module):
                undo.enter_context(c.register_forward_pre_hook(note))
        with torch.enable_grad():
            value = loss()
        if value.requires_grad:  # else no parameter gets a gradient, and the report says so
            value.backward()
        yield called


# parameters that train and are saved


def find_frozen(carriers: Iterable[Carrier]) -> list[str]:
    """Return "<layer>.<tensor> ('<adapter>')" for each tensor of an active adapter that files hold and training would
    change, but that does not require gradients.
    """
    return [
        f"{carrier.key}.{slot.container} ('{name}')"
        for carrier, name in iter_carried(carriers)
        for slot in carrier.slots(name)
        if slot.trains and slot.saved and not slot.tensor.requires_grad
    ]


def find_unsaved(model: nn.Module, adapters: Mapping[str, tuple[AdapterCarriers, str, nn.Module, Any]]) -> list[str]:
    """Return the names of the model's parameters that require gradients and that no adapter's file holds, in the
    model's order.

    Parameters that compute a prompt count as saved: the file holds the prompt. So do weights of the base that a save
    with `save_embedding_layers="auto"` would add. Its warnings are suppressed.

    Args:
        adapters: by name, as `find_carriers` returns them; the prefix is not read.
    """
    training = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved: set[int] = set()
    for adapter, (parts, _, base, config) in adapters.items():
        saved |= {id(entry.tensor) for entry in list_entries(parts, adapter, "")}
        if parts.prompt is not None:  # the file holds the prompt that they compute
            saved |= {id(p) for p in parts.prompt.parameters()}
        ids = {name: id(p) for name, p in base.named_parameters(remove_duplicate=False)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # saving will say it
            saved |= {ids[name] for name in collect_base_tensors(base, parts, config, "auto") if name in ids}
    return [name for name, p in training.items() if id(p) not in saved]


def find_far_rates(
    parts: Iterable[Part], configs: dict[str, PeftConfig], optimizer: torch.optim.Optimizer
) -> list[str]:
    """Return "<rate> for '<adapter>' (<method>: <low> to <high>)" for each adapter with a learning rate more than 10
    times outside the known range.

    Each parameter group gives one text for each adapter in it. Heads are left out, and so are groups without `betas`
    (not Adam-like), rates of 0, and methods without known rates. Of a scheduled rate, its initial value (`initial_lr`)
    counts.
    """
    owners = {
        id(p): part.adapter for part in parts if not isinstance(part.carrier, ModulesToSaveWrapper) for p in part[2]
    }
    rates = []
    for group in optimizer.param_groups:
        rate = float(group.get("initial_lr", group["lr"]))  # of the schedule, before it begins
        for name in dict.fromkeys(owners[id(p)] for p in group["params"] if id(p) in owners):
            known = find_known_range(configs[name])
            if "betas" in group and rate > 0 and known and not known[0] / FAR <= rate <= known[1] * FAR:
                rates.append(f"{rate:g} for '{name}' ({class_name_of(configs[name])}: {known[0]:g} to {known[1]:g})")
    return rates


# how large updates are


@torch.no_grad()
def measure_updates(parts: Sequence[Part]) -> list[tuple[bool, float]]:
    """Return for each part whether its values are finite, and the norm of its update as a share of the weight's norm.

    The share is NaN if the norm of the weight is unknown, zero or not finite. Parts with a sharded, empty, or not dense
    floating tensor are not read: they count as finite, with share NaN. It waits a few times for each device.
    """
    read: list[tuple[list[nn.Parameter], tuple[Tensor, ...]]] = []
    for part in parts:
        is_here = all([is_dense_float(p) and p.numel() and layout_of(p) is None for p in part.parameters])
        read.append((part.parameters, update_norms(part.carrier, part.adapter)) if is_here else ([], ()))
    numbers = iter(max_magnitudes([t for values, pair in read for t in (*values, *pair)]))
    shares = []
    for values, pair in read:
        finite = math.isfinite(sum([next(numbers) for _ in values]))
        update, weight = [next(numbers) for _ in pair] or (0.0, 0.0)
        shares.append((finite, update / weight if weight and math.isfinite(weight) else math.nan))
    return shares


def update_norms(carrier: Carrier, adapter: str) -> tuple[Tensor, ...]:
    """Return the norms of an adapter's update on a carrier, and of the weight without adapters, in float32; () if
    unknown.

    Unknown: the adapter is not on the carrier; prompts and shared tensors; effects that take the whole module, have no
    weight or cannot be merged; unreadable, sharded or tensor-parallel weights. The update's norm includes that of its
    bias. For a copied head it is the difference from the base's module.
    """
    if isinstance(carrier, ModulesToSaveWrapper):
        return module_norms(carrier.modules_to_save[adapter], carrier.original_module)
    layer = carrier.adapter_layer
    if layer is None or adapter not in layer.methods:
        return ()
    effect = layer.methods[adapter].effect
    if effect.whole or effect.weightless or effect.why_unmergeable or layer.base_weight.why_unreadable():
        return ()
    if layer.site.piece is not None or any([layout_of(t) is not None for t in layer.base_layer.parameters()]):
        return ()  # processes would have to read it together
    A, B, shift = layer.compute_change(adapter)
    update = (A if B is None else B @ A).norm()
    if shift is not None:
        update = torch.hypot(update, shift.float().norm())
    return update, layer.W0.float().norm()


def module_norms(module: nn.Module, original: nn.Module) -> tuple[Tensor, ...]:
    """Return the norms of the difference between a copied module and its original, and of the original, over all
    parameters, as two float32 scalars.

    Parameters are paired in their order, and those beyond the shorter list ignored. Return () if there are no
    parameters, if shapes or devices of a pair differ, or if one is sharded, empty or not a dense floating tensor.
    """
    pairs = list(zip(module.parameters(), original.parameters()))
    if not pairs or not all([is_dense_float(t) and t.numel() and layout_of(t) is None for pair in pairs for t in pair]):
        return ()
    if any([p.shape != q.shape or p.device != q.device for p, q in pairs]):
        return ()
    apart = torch.stack([(p.float() - q.float()).norm() for p, q in pairs]).norm()
    return apart, torch.stack([q.float().norm() for _, q in pairs]).norm()


# checks that a model makes in training

# A model audits itself once, when a backward pass ends, and gives one warning. The first pass shows four faults:
# no adapter on a layer got a gradient, and other parameters did; gradients are not finite in a model without float16;
# base parameters train and are not saved; no parameter of the model trains. A single layer without gradients may be an
# expert that got no token, a head of another task, or a layer that was dropped. Such layers are suspects: the warning
# comes only if `PASSES` backward passes have left no gradient there.


def active_dropouts(config: PeftConfig) -> list[str]:
    """Return "<field>=<value>" for each field of a config with "dropout" in its name and a value that is not 0, empty,
    or a bool.
    """
    shares = [(f.name, getattr(config, f.name)) for f in fields(config) if "dropout" in f.name]
    return [f"{name}={value}" for name, value in shares if value and not isinstance(value, bool)]


def warn_eval_mode_dropout(parts: list[Part], configs: dict[str, PeftConfig]) -> None:
    """Give a PeftWarning for each adapter with dropout that does not act.

    Its config has one that is not 0, and all of `parts` with a mode are in eval mode for it. Adapters without a config
    in `configs` are skipped.
    """
    modes: dict[str, list[bool]] = defaultdict(list)
    for part in parts:
        if hasattr(part.carrier, "training") and part.adapter in configs:
            modes[part.adapter].append(part.carrier.training)
    for name, training in modes.items():
        if dropped := [] if any(training) else active_dropouts(configs[name]):
            warn(
                f"Adapter '{name}' trains without its {', '.join(dropped)}: its {len(training)} modules are in eval "
                "mode, as from_pretrained() leaves a model. Call model.train() before training.",
                PeftWarning,
            )


def warn_at_first_gradient(carriers: Iterable[Carrier], configs: dict[str, PeftConfig], adapter: str) -> None:
    """Register a hook on a parameter of `adapter` that warns once, at its first gradient, if its dropout does not act.

    For a model without a PeftModel, where no calls are followed. Nothing for adapters without dropout, or inactive.
    """
    parts = [part for part in find_active_parts(carriers) if part.adapter == adapter]
    if not parts or not active_dropouts(configs[adapter]):
        return

    def warn_once(_grad: Tensor) -> None:
        """Remove the hook, and warn of dropout in eval mode."""
        handle.remove()
        warn_eval_mode_dropout(parts, configs)

    handle = parts[0].parameters[0].register_hook(warn_once)


PASSES = 8  # backward passes after which a layer without gradients is no coincidence
LOOKS = 64  # backward passes after which to give up where none of them left gradients
KEPT_ELSEWHERE = ("ds_id", "_hp_mapping", "main_grad")  # attributes that DeepSpeed and Megatron set on parameters
SHARDED = ("FSDP", "FullyShardedDataParallel")  # beginnings of class names


class Watch:
    """Waits for the first backward passes of a model and checks their gradients.

    It removes itself from the registry when it has its result, or after `LOOKS` passes.

    A plain object without hooks on modules or parameters: hooks on the outputs of calls tell it that a backward pass
    begins.
    """

    def __init__(self, registry: Tuner) -> None:
        """Watch the model of a registry. Nothing happens until `follow`."""
        self.registry = registry
        self.passes = self.looks = 0
        self.task: int | None = None  # the backward pass under way
        self.half = False  # a call ran in float16: gradients may overflow, and a scaler skips the step
        self.moving = False  # a call had inputs with gradients, so that a backward pass may serve them
        self.suspects: list[tuple[Carrier, str]] | None = None  # (carrier, adapter); None: no pass was looked at yet

    def follow(self, output: object, inputs: Iterable[object]) -> None:
        """Hook the tensors of a call's output, so that the gradients are checked when its backward pass ends.

        Tensors without a gradient function are skipped.

        If the output's loss has no gradient because a model in training mode is frozen, warn at once and end the watch.
        With a hook, also records whether the call ran in float16 (`half`) and whether inputs have gradients (`moving`);
        both stay True for later calls.
        """
        loss, registry = getattr(output, "loss", None), self.registry
        if isinstance(loss, Tensor) and not loss.requires_grad and self._is_frozen(registry.model):
            registry.watch = None
            warn(
                f"The loss of {registry.active_adapters} has no gradient, as from_pretrained() loads adapters frozen. "
                "Pass is_trainable=True to train them, or call model.eval() to evaluate.",
                PeftWarning,
            )
        tensors = [t for t in find_tensors(output) if t.grad_fn is not None]
        for t in tensors:
            t.register_hook(self._on_begin)
        if tensors:
            self.half |= autocast_dtype(tensors[0].device) == torch.float16
            self.moving |= any([isinstance(x, Tensor) and x.requires_grad for x in inputs])

    @unserializable_hook  # type: ignore[untyped-decorator]
    def _on_begin(self, _grad: Tensor) -> None:
        """Hook of an output's gradient: once per backward pass, have autograd call `_on_end` after it.

        The pass is noted in `task`; the gradient stays.
        """
        task = torch._C._current_graph_task_id()
        if task != self.task:
            self.task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._on_end)

    def _on_end(self) -> None:
        """Check the gradients after a backward pass, give a PeftWarning if a report is not ok, and end the watch if
        there is a report or 64 passes have run.

        Counts the pass, and adds the active adapters to the registry's `trained`; after the first pass it warns of
        dropout in eval mode. The watch ends by `registry.watch = None`. Does nothing but clear `task` if the registry
        has another watch.
        """
        self.task = None
        if self.registry.watch is not self:
            return
        self.looks += 1
        self.registry.trained.update(self.registry.active_adapters)
        if self.looks == 1:
            warn_eval_mode_dropout(find_active_parts(self.registry.carriers()), self.registry.peft_config)
        report = self._report_first_pass() if self.suspects is None else self._report_later_pass()
        if report is not None or self.looks >= LOOKS:
            self.registry.watch = None
        if report is not None and not report.ok:
            warn(f"{report}\nThis is said once; graft.audit(model) says it again.", PeftWarning)

    def _report_first_pass(self) -> AuditReport | None:
        """Return the report if the watch is over after this pass; None to continue.

        Without active parts that require gradients, the report says that nothing trains. There it is None if inputs of
        the call had gradients, or the model is not in training mode or has other parameters that train.

        With parts, None if no other parameter got a gradient and the parts got none or zeros. Else the report lists
        base parameters that train and are not saved and, without float16, gradients that are not finite.

        Parts without a gradient become suspects, as do parts with zeros, except for token rows. If one has no gradient
        and a library may have taken them, the report is returned without suspects. If all parts but `modules_to_save`
        lack a gradient, the report lists the suspects. Otherwise `passes` becomes 1 and the suspects are stored. Then
        None is returned if there are suspects and no fault so far, else the report.
        """
        registry, model = self.registry, self.registry.model
        parts = find_active_parts(registry.carriers())
        if not parts:
            if self.moving or not self._is_frozen(model):  # a parameter or an input of the call was to get a gradient
                return None
            names = [repr(name) for name in registry.active_adapters]
            return AuditReport(after="the first backward pass", nothing_trains=names)
        part_states = list(zip(parts, gradient_states(parts)))
        ids = {id(p) for part in parts for p in part.parameters}
        outside = [p for p in iterate_parameters(model) if p.requires_grad and p.grad is not None and id(p) not in ids]
        if not outside and all([state in (NONE, ZERO) for _, state in part_states]):
            return None  # the loss was constant, or another library took the gradients
        report = AuditReport(after="the first backward pass", not_saved=self._find_unsaved(outside))
        if not (self.half or any([p.dtype == torch.float16 for p in model.parameters()])):
            report.not_finite = [part.label for part, state in part_states if state == BROKEN]
        suspects = [(p, state) for p, state in part_states if state == NONE or (state == ZERO and not trains_rows(p))]
        if any([state == NONE for _, state in suspects]) and gradients_elsewhere(model, registry.carriers()):
            return report
        if all([state == NONE for part, state in part_states if not isinstance(part.carrier, ModulesToSaveWrapper)]):
            report.no_gradient = [part.label for part, _ in suspects]
            return report
        self.passes, self.suspects = 1, [(part.carrier, part.adapter) for part, _ in suspects]
        return None if suspects and report.ok else report

    def _report_later_pass(self) -> AuditReport | None:
        """Return a report once all suspects have gradients, or after 8 passes that count; None to continue.

        The report lists suspects that still have no gradient or zeros; it is ok if there are none. Each pass that
        counts raises `passes` by 1 and drops suspects that got gradients. A pass without a gradient on any other active
        part does not count.
        """
        parts = find_active_parts(self.registry.carriers())
        suspected = {(id(carrier), adapter) for carrier, adapter in self.suspects or ()}
        left = [part for part in parts if (id(part.carrier), part.adapter) in suspected]
        unsuspected = [part for part in parts if (id(part.carrier), part.adapter) not in suspected]
        if not any(p.grad is not None for part in unsuspected for p in part.parameters):
            return None
        self.passes += 1
        still_without = [(part, state) for part, state in zip(left, gradient_states(left)) if state in (NONE, ZERO)]
        self.suspects = [(part.carrier, part.adapter) for part, _ in still_without]
        if still_without and self.passes < PASSES:
            return None
        report = AuditReport(after=f"{self.passes} backward passes")
        for part, state in still_without:
            getattr(report, state).append(part.label)
        return report

    @staticmethod
    def _is_frozen(model: nn.Module) -> bool:
        """Return True if a model is in training mode, and none of its parameters requires gradients."""
        return model.training and not any(p.requires_grad for p in model.parameters())

    def _find_unsaved(self, others: list[nn.Parameter]) -> list[str]:
        """Return the names of the parameters in `others` that no adapter's file would hold; [] without any.

        Names are those in the registry's model; only parameters that require gradients count.
        """
        if not others:
            return []
        registry = self.registry
        adapters = {n: (registry.parts_of(n), "", registry.model, c) for n, c in registry.peft_config.items()}
        got = {id(p) for p in others}
        parameters = dict(registry.model.named_parameters())
        return [name for name in find_unsaved(registry.model, adapters) if id(parameters[name]) in got]


def iterate_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of a model; those that modules share come once for each module.

    A module comes once. The order is not that of `parameters()`, which is slower on deep models.
    """
    left, seen = [model], set()
    while left:
        module = left.pop()
        if module not in seen:
            seen.add(module)
            yield from [p for p in module._parameters.values() if p is not None]
            left += [child for child in module._modules.values() if child is not None]


def trains_rows(part: Part) -> bool:
    """Return True if a part may train rows of a table, such as embeddings: a batch uses only some, so gradients of 0
    are normal.
    """
    layer = part.carrier.adapter_layer
    return part.carrier.takes_rows or (layer is not None and layer.op.takes_ids)


def gradients_elsewhere(model: nn.Module, carriers: Iterable[Carrier]) -> bool:
    """Return True if a library may have taken gradients away from active parameters of these carriers, or holds them
    sharded.

    Signs are: a parameter that is empty, sharded, has a hook after the accumulation of gradients, or an attribute of
    DeepSpeed or Megatron (`ds_id`, `_hp_mapping`, `main_grad`). Or the class name of any module of the model begins
    with "FSDP" or "FullyShardedDataParallel".
    """
    parameters = [p for part in find_active_parts(carriers) for p in part.parameters]
    return any(
        not p.numel() or is_sharded(p) or p._post_accumulate_grad_hooks or any(hasattr(p, a) for a in KEPT_ELSEWHERE)
        for p in parameters
    ) or any(type(m).__name__.startswith(SHARDED) for m in model.modules())


_said = False


def warn_trainer_unaware(model_class: type) -> None:
    """Warn, once in a process, if transformers' Trainer is loaded and does not recognise models of this class as
    PeftModels.
    """
    global _said
    trainer = sys.modules.get("transformers.trainer")
    if trainer is None or _said or issubclass(model_class, getattr(trainer, "PeftModel", ())):
        return
    _said = True
    warn(
        "transformers' Trainer is loaded and does not know graft's models: it would save whole models, and TRL's "
        "trainers would fail. Call graft.compat.peft.install() before you train with one; other loops need nothing.",
        PeftWarning,
    )
