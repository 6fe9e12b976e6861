# SPDX-License-Identifier: Apache-2.0
"""Faults of an adapter file: a rule is a function, and says what to do; and whether the file has all that it names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np

from graft import BaseModelMismatchError, CheckpointError, ConfigError
from graft.config.hub import looks_like_repository
from graft.config.reading import Json, compile_pattern, parse_json
from graft.core.errors import join_some
from graft.files import algebra
from graft.files.base import BaseDescription
from graft.files.bases import choose_names
from graft.files.errors import BaseNeededError
from graft.files.formats.peft import list_unnamed
from graft.files.inspect import find_weight_name, is_stored_by_expert, list_module_tensors, read_base_weight
from graft.files.names import mask_layer_number
from graft.files.neutral import AdapterFile, LowRank
from graft.files.sources import CARD
from graft.files.tensors import FLOATS, Tensor
from graft.inject.match import Matcher

Severity = Literal["error", "warning", "note"]
OUTLIER = 6  # median absolute deviations above the median
TOP, INTRUDER = 10, 0.5  # singular vectors that are looked at; the cosine below which one is an intruder
MIRROR = re.compile(r"^unsloth/|-(bnb-)?(4|8)bit\b|-(gptq|awq|gguf|fp8)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """Something that a rule found."""

    rule: str
    severity: Severity
    text: str
    remedy: str
    where: tuple[str, ...] = ()


@dataclass
class LintSubject:
    """An adapter, and what several rules ask of it."""

    adapter: AdapterFile
    base: BaseDescription | None = None

    @cached_property
    def finite_loras(self) -> dict[str, LowRank]:
        """The modules of low rank whose numbers are finite."""
        loras = {path: algebra.as_low_rank(lora) for path, lora in self.adapter.modules.items()}
        bad = {path for path, values in self.floating_tensors if not np.isfinite(values.read()).all()}
        return {path: lora for path, lora in loras.items() if lora is not None and path not in bad}

    @cached_property
    def floating_tensors(self) -> list[tuple[str, Tensor]]:
        """All floating tensors, by the module or name that they belong to."""
        tensors = [(path, t) for path, h in self.adapter.modules.items() for t in list_module_tensors(h)]
        return [(name, t) for name, t in (*tensors, *self.adapter.loose_tensors) if t.dtype in FLOATS]

    @cached_property
    def norms(self) -> dict[str, float]:
        return {
            p: float(np.sqrt(sum(algebra.frobenius_norm(x) ** 2 for x in algebra.list_delta_products(h))))
            for p, h in self.finite_loras.items()
        }

    def read_weight(self, path: str) -> np.ndarray | None:
        """Return the base's weight of a module; None if none fits, of which another rule tells, or it has no values."""
        assert self.base is not None
        try:
            return read_base_weight(path, self.adapter, self.base, self.finite_loras[path])
        except (BaseModelMismatchError, BaseNeededError):
            return None


def lint_adapter(adapter: AdapterFile, base: BaseDescription | None = None) -> list[Finding]:
    """Return what looks wrong in an adapter, the worst first.

    Args:
        base: lets the rules look that compare with it, the slow one for intruder dimensions among them.
    """
    look = LintSubject(adapter, None if base is None else choose_names(base, adapter.modules))
    order = ("error", "warning", "note")
    findings = [
        Finding(rule.name, rule.severity, text, rule.remedy, tuple(where))
        for rule in RULES
        if base is not None or not rule.needs_base
        for text, where in rule.check(look)
    ]
    return sorted(findings, key=lambda f: order.index(f.severity))


Faults = Iterator[tuple[str, list[str]]]  # a text, and the names that it is about


def find_nan(look: LintSubject) -> Faults:
    bad = {name for name, t in look.floating_tensors if np.isnan(t.read()).any()}
    if bad:
        yield f"NaN in {join_some(sorted(bad), 3)}", sorted(bad)


def find_infinite(look: LintSubject) -> Faults:
    bad = {name for name, t in look.floating_tensors if np.isinf(t.read()).any()}
    if bad:
        yield f"an infinite number in {join_some(sorted(bad), 3)}", sorted(bad)


def find_zero_b(look: LintSubject) -> Faults:
    zero = [path for path, size in look.norms.items() if size == 0]
    if zero:
        which = "all modules" if len(zero) == len(look.norms) else f"{len(zero)} of {len(look.norms)} modules"
        yield f"{which} change nothing: {join_some(zero, 3)}", zero


def find_outliers(look: LintSubject) -> Faults:
    wholes = {path: float(np.linalg.norm(W)) for path in look.norms if (W := look.read_weight(path)) is not None}
    sizes = {path: look.norms[path] / whole for path, whole in wholes.items() if whole > 0}
    if len(sizes) < 4:
        return
    middle = float(np.median([*sizes.values()]))
    spread = float(np.median([abs(s - middle) for s in sizes.values()]))
    if outliers := [path for path, s in sizes.items() if spread > 0 and s > middle + OUTLIER * spread]:
        worst = max(outliers, key=sizes.__getitem__)
        yield (
            f"‖ΔW‖/‖W‖ is {sizes[worst]:.3g} in {worst}, {middle:.3g} in the median: {join_some(outliers, 3)}",
            outliers,
        )


def find_unused_targets(look: LintSubject) -> Faults:
    config, paths = look.adapter.config, [*look.adapter.modules, *(n.rpartition(".")[0] for n in look.adapter.rows)]
    for name in ("target_modules", "target_parameters"):
        targets = config.get(name)
        if targets is None or not paths or targets == "all-linear":
            continue
        if isinstance(targets, str):
            try:
                used = any(compile_pattern(targets, name).fullmatch(p) for p in paths)
            except ConfigError:
                used = False
            unused = [] if used else [targets]
        elif isinstance(targets, list) and all(isinstance(t, str) for t in targets):
            unused = [t for t in targets if not any(f".{p}".endswith(f".{t}".removesuffix(".weight")) for p in paths)]
        else:
            unused = [repr(targets)]
        if unused:
            yield f"{name} names what the file has no tensor for: {join_some(sorted(unused), 5)}", unused


def find_unknown_keys(look: LintSubject) -> Faults:
    adapter = look.adapter
    if adapter.unknown_keys:
        yield f"keys without a meaning: {join_some(adapter.unknown_keys, 3)}", adapter.unknown_keys
    if lone := list_unnamed(adapter):
        yield f"whole tensors that modules_to_save does not name: {join_some(lone, 3)}", lone


def find_gaps(look: LintSubject) -> Faults:
    if lost := list_gaps(look.adapter, look.base):
        yield f"the file lacks {join_some(lost, 3)}, which its config names", lost


def find_base_mismatch(look: LintSubject) -> Faults:
    assert look.base is not None
    wrong, texts = [], []
    for path, lora in look.finite_loras.items():
        if is_stored_by_expert(path, lora, look.base):
            continue
        try:
            read_base_weight(path, look.adapter, look.base, lora)
        except BaseNeededError:
            continue
        except BaseModelMismatchError as e:
            wrong.append(path)
            texts.append(str(e))
    if wrong:
        yield f"{len(wrong)} of {len(look.finite_loras)} modules do not fit: {texts[0]}", wrong
    note = look.adapter.metadata.get("graft_base")
    shapes = (parse_json(note, "the fingerprint") or {}).get("weights", {}) if note else {}
    base_shapes = {p: look.base.shapes[name] for p in shapes if (name := find_weight_name(p, look.base)) is not None}
    # stored (in, out)
    mismatches = [p for p, s in base_shapes.items() if tuple(shapes[p]) not in (s, (*s[:-2], *s[:-3:-1]))]
    if mismatches and not wrong:
        yield f"the file's fingerprint is of other shapes: {join_some(mismatches, 3)}", mismatches


def check_base_name(look: LintSubject) -> Faults:
    name = look.adapter.base
    if not name:
        yield "the file does not name its base", []
    elif "\\" in name or not looks_like_repository(name):
        yield f"the base is a path of one machine: {name}", [name]
    elif MIRROR.search(name):
        yield f"the base is a quantized copy of a model: {name}", [name]


def find_missing_card(look: LintSubject) -> Faults:
    if os.path.isdir(look.adapter.path) and not os.path.isfile(os.path.join(look.adapter.path, CARD)):
        yield f"there is no {CARD}", []


def find_pickles(look: LintSubject) -> Faults:
    folder = look.adapter.path
    names = os.listdir(folder) if os.path.isdir(folder) else [os.path.basename(folder)]
    if pickles := sorted(n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))):
        yield f"a pickle, which may run code where others load it: {join_some(pickles, 3)}", pickles


def find_intruders(look: LintSubject) -> Faults:
    paths, texts = [], []
    for path, lora in look.finite_loras.items():
        if lora.kind == "experts" or look.norms[path] == 0 or (W := look.read_weight(path)) is None:
            continue
        W = W.astype("f8")
        new = add_delta(lora, W)
        U = np.linalg.svd(new, full_matrices=False)[0][:, :TOP]
        like = np.abs(U.T @ np.linalg.svd(W, full_matrices=False)[0]).max(1)
        if n := int((like < INTRUDER).sum()):
            paths.append(path)
            texts.append(f"{path} {n}")
    if paths:
        yield f"singular vectors of W + ΔW that are like none of W's: {join_some(texts, 3)}", paths


def add_delta(lora: LowRank, W: np.ndarray) -> np.ndarray:
    if lora.magnitude is not None:
        return W + algebra.compute_dora_delta(lora, W)
    ((B, A),) = algebra.list_delta_products(lora)
    return W + B @ A


class Rule(NamedTuple):
    name: str
    severity: Severity
    check: Callable[[LintSubject], Faults]
    remedy: str
    needs_base: bool = False


RULES = (
    Rule("nan", "error", find_nan, "Train again from a checkpoint before it, with a smaller learning rate."),
    Rule("inf", "error", find_infinite, "Train again, or save in float32 or bfloat16."),
    Rule("zero-B", "warning", find_zero_b, "They were never trained: look for what froze them, or leave them out."),
    Rule("outlier", "warning", find_outliers, "See whether training diverged there, and give it a smaller weight.",
         True),
    Rule("unused-target", "warning", find_unused_targets,
         "Take it out of the config, or find out why it was not adapted."),
    Rule("not-whole", "error", find_gaps, "Save or download it again, or take what it lacks out of its config."),
    Rule("orphan-key", "error", find_unknown_keys, "Others drop or refuse them: save it again where it was made."),
    Rule("base-mismatch", "error", find_base_mismatch, "Give the base that the adapter was trained on.", True),
    Rule("base-name", "note", check_base_name, "Write the hub id of the original model into base_model_name_or_path."),
    Rule("no-card", "note", find_missing_card, "Write one: what it was trained on, for what, and the licence."),
    Rule("pickle", "warning", find_pickles,
         "Leave files of a training out; graft convert --to peft writes safetensors."),
    Rule("intruder", "note", find_intruders, "They cost knowledge of the base: see graft.reduce_intruder_dimension.",
         True),
)  # fmt: skip


HEADS = {"classifier", "score", "qa_outputs"}  # which PEFT adds to modules_to_save, of which a model has some


def check_whole(adapter: AdapterFile, base: BaseDescription | None = None) -> None:
    """Raise CheckpointError if an adapter lacks something, see `list_gaps`."""
    if lost := list_gaps(adapter, base):
        raise CheckpointError(
            f"{adapter.path} is not whole: it lacks {join_some(lost, 3)}. Save or download it again, or take what it "
            "lacks "
            "out of its adapter_config.json."
        )


def list_gaps(adapter: AdapterFile, base: BaseDescription | None = None) -> list[str]:
    """Return in words what an adapter lacks of what its config says; [] if it is whole, as far as can be seen.

    Args:
        base: tells which modules the config's targets select.
    """
    if not adapter.modules and not adapter.loose_tensors:
        return [] if adapter.unknown_keys else ["every tensor"]
    if "peft_type" not in adapter.config:
        return []
    known = None if base is None else choose_names(base, adapter.modules)
    return [
        *list_factor_gaps(adapter),
        *list_tensor_gaps(adapter, known),
        *([] if known is None else list_layer_gaps(adapter, known)),
    ]


def list_factor_gaps(adapter: AdapterFile) -> Iterator[str]:
    """Yield what modules lack beside A and B."""
    factors = {path: lora for path, lora in adapter.low_rank.items() if lora.kind != "experts"}
    if adapter.config.get("use_dora"):
        yield from (f"the magnitude of {path}" for path, lora in factors.items() if lora.magnitude is None)
    if adapter.config.get("lora_bias"):
        yield from (
            f"the bias of {path}" for path, lora in factors.items() if lora.bias is None and lora.kind != "embedding"
        )


def list_tensor_gaps(adapter: AdapterFile, base: BaseDescription | None) -> Iterator[str]:
    """Yield the modules that were trained whole, the biases and the rows of embeddings that are not there."""
    config = adapter.config
    prefixes = [f"{name}." for name in (*adapter.full, *adapter.modules)]
    saved = {name: any(f"{name}." in prefix for prefix in prefixes) for name in config.get("modules_to_save") or ()}
    has_head = any(saved.get(name) for name in HEADS)
    for name in (name for name, is_saved in saved.items() if not is_saved):
        if base is None:
            is_there = not (name in HEADS and has_head)
        else:
            is_there = any(module.endswith(name) for module in base.modules)
        if is_there:
            yield f"the module {name} of modules_to_save"
    if config.get("trainable_token_indices") and not adapter.rows:
        yield "the rows of trainable_token_indices"
    which = str(config.get("bias") or "none")
    if base is not None and which != "none":
        modules = base.modules if which == "all" else adapter.modules
        yield from (n for m in modules if (n := f"{m}.bias") in base.shapes and n not in adapter.full)


def list_layer_gaps(adapter: AdapterFile, base: BaseDescription) -> Iterator[str]:
    """Yield the modules that targets select, like those that have factors or in the same blocks, and that have none."""
    adapted_kinds = {mask_layer_number(path) for path in adapter.modules}
    blocks = {kind.partition("#")[0] for kind in adapted_kinds if "#" in kind}
    modules = [module for module in base.modules if f"{module}.weight" in base.shapes]
    for field, names in (("target_modules", modules), ("target_parameters", [*base.shapes])):
        selected = select_targets(adapter, field, names)
        used = {selected[path] for path in adapter.modules if path in selected}
        for path, entry in selected.items():
            start, number, _ = mask_layer_number(path).partition("#")
            if path not in adapter.modules and (
                mask_layer_number(path) in adapted_kinds or (number and start in blocks and entry not in used)
            ):
                yield path


def select_targets(adapter: AdapterFile, field: str, names: list[str]) -> dict[str, str | None]:
    """Return the names that a field of targets selects, with the entry that does."""
    config, targets = adapter.config, adapter.config.get(field)
    if "adapter_layers" in config or not (isinstance(targets, str) or (isinstance(targets, list) and targets)):
        return {}
    filters = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    fields: Json = {name: config.get(name) for name in filters}
    fields |= {"target_modules": None, "target_parameters": None, field: ".*" if targets == "all-linear" else targets}
    try:
        matcher = Matcher(SimpleNamespace(**fields), field == "target_parameters")
    except (ConfigError, TypeError):  # of which another error tells
        return {}
    verdicts = {name.removesuffix(".weight"): matcher(name) for name in names}
    return {name: verdict.entry for name, verdict in verdicts.items() if verdict.outcome == "matched"}
