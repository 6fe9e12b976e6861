# SPDX-License-Identifier: Apache-2.0
"""Checks that a model in training makes by itself: warnings of adapters that do not train.

A model audits itself once, when a backward pass ends, and gives one warning. The first pass is enough for four faults:

- No adapter on a layer got a gradient, and other parameters did.
- Gradients are not finite in a model without float16.
- Base parameters train and are not saved.
- No parameter of the model trains.

 A single layer without gradients may be an expert that got no token, a head of another task, or a layer that was
     dropped. Such layers are suspects: the warning comes only if `PASSES` backward passes have left no gradient there.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from graft.config.base import PeftConfig
from graft.core.carrier import Carrier
from graft.core.errors import PeftWarning, warn
from graft.core.method import Tuner
from graft.core.rows import find_tensors
from graft.inject.beside import ModulesToSaveWrapper
from graft.kernels.eager import autocast_dtype
from graft.model.audit import BROKEN, NONE, ZERO, AuditReport, Part, find_active_parts, find_unsaved, gradient_states
from graft.storage.parallel import is_sharded


def active_dropouts(config: PeftConfig) -> list[str]:
    """Return "<field>=<value>" for each field of a config with "dropout" in its name and a number that is not 0."""
    shares = [(f.name, getattr(config, f.name)) for f in fields(config) if "dropout" in f.name]
    return [f"{name}={value}" for name, value in shares if value and not isinstance(value, bool)]


def warn_eval_mode_dropout(parts: list[Part], configs: dict[str, PeftConfig]) -> None:
    """Warn of each adapter with dropout that does not act: its config has one that is not 0, and all modules that carry
    it are in eval mode.
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

        If the loss has no gradient because a model in training mode is frozen, warn at once and end the watch. Records
        whether the call ran in float16 and whether inputs have gradients.
        """
        first = True
        loss, registry = getattr(output, "loss", None), self.registry
        if isinstance(loss, Tensor) and not loss.requires_grad and self._is_frozen(registry.model):
            registry.watch = None
            warn(
                f"The loss of {registry.active_adapters} has no gradient, as from_pretrained() loads adapters frozen. "
                "Pass is_trainable=True to train them, or call model.eval() to evaluate.",
                PeftWarning,
            )
        for t in find_tensors(output):
            if t.grad_fn is None:
                continue
            t.register_hook(self._on_begin)
            if first:
                first = False
                self.half |= autocast_dtype(t.device) == torch.float16
                self.moving |= any([isinstance(x, Tensor) and x.requires_grad for x in inputs])

    @unserializable_hook  # type: ignore[untyped-decorator]
    def _on_begin(self, _grad: Tensor) -> None:
        """Hook of an output's gradient: once per backward pass, have autograd call `_on_end` after it."""
        task = torch._C._current_graph_task_id()
        if task != self.task:
            self.task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._on_end)

    def _on_end(self) -> None:
        """Check the gradients after a backward pass, warn if a report is not ok, and end the watch if there is a report
        or `LOOKS` passes have run.

        Adds the active adapters to the registry's `trained`; after the first pass it warns of dropout in eval mode.
        Does nothing if the registry has another watch.
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

        Without active parts that require gradients: a report that nothing trains; None if inputs of the call had
        gradients, or the model is not in training mode or has other parameters that train. None if no other parameter
        got a gradient, and the parts got none or zeros. Else the report lists base parameters that train and are not
        saved, and, without float16, gradients that are not finite.

        Missing gradients are ignored if a library may have taken them. If all layers lack a gradient, the report lists
        them. Otherwise parts without a gradient (or with zeros, except for token rows) become suspects. Then None is
        returned if there are suspects and no fault so far, else the report.
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
        half = self.half or any([p.dtype == torch.float16 for p in model.parameters()])
        if BROKEN in [state for _, state in part_states] and not half:
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
        """Return a report on the suspects that still have no gradient, or zeros, after `PASSES` passes; an ok report as
        soon as all have gradients; None to continue.

        A pass without a gradient on any other part does not count.
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
        return AuditReport(
            after=f"{self.passes} backward passes",
            no_gradient=[part.label for part, state in still_without if state == NONE],
            zero_gradient=[part.label for part, state in still_without if state == ZERO],
        )

    @staticmethod
    def _is_frozen(model: nn.Module) -> bool:
        """Return True if a model is in training mode, and none of its parameters requires gradients."""
        return model.training and not any(p.requires_grad for p in model.parameters())

    def _find_unsaved(self, others: list[nn.Parameter]) -> list[str]:
        """Return the names of those of these base parameters that no adapter's file would hold."""
        if not others:
            return []
        registry = self.registry
        adapters = [(n, registry.parts_of(n), registry.model, c) for n, c in registry.peft_config.items()]
        got = {id(p) for p in others}
        parameters = dict(registry.model.named_parameters())
        return [name for name in find_unsaved(registry.model, adapters) if id(parameters[name]) in got]


def iterate_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of a model; shared ones repeatedly. Faster than `parameters()` on deep models."""
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
    sharded: FSDP, DeepSpeed, Megatron, or an optimizer that steps within the backward pass.
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
