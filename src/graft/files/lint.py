# SPDX-License-Identifier: Apache-2.0
"""Faults of an adapter file, found by rules with remedies; and the parts that its config names and it lacks."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np

from graft import BaseModelMismatchError, CheckpointError, ConfigError
from graft.config.reading import Json, compile_pattern, parse_json
from graft.core.errors import join_some
from graft.files import algebra
from graft.files.base import BaseDescription
from graft.files.bases import choose_names
from graft.files.errors import BaseNeededError
from graft.files.formats.peft import list_unnamed
from graft.files.inspect import find_weight_name, is_stored_by_expert, list_floating_tensors, read_base_weight
from graft.files.names import mask_layer_number
from graft.files.neutral import AdapterFile, LowRank
from graft.files.sources import BASE_ID, CARD
from graft.inject.match import Matcher

Severity = Literal["error", "warning", "note"]
OUTLIER = 6  # median absolute deviations above the median
TOP, INTRUDER = 10, 0.5  # the number of singular vectors compared; the cosine below which one is an intruder
MIRROR = re.compile(r"^unsloth/|-(bnb-)?(4|8)bit\b|-(gptq|awq|gguf|fp8)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """A fault that a rule found."""

    rule: str
    severity: Severity
    text: str
    remedy: str
    where: tuple[str, ...] = ()


@dataclass
class LintSubject:
    """An adapter and its base (with the adapter's names), with values that several rules share.

    Each is computed once.
    """

    adapter: AdapterFile
    base: BaseDescription | None = None

    @cached_property
    def finite_loras(self) -> dict[str, LowRank]:
        """The LoRA modules (AdaLoRA as LoRA) by path, without those that have NaN or infinite numbers in any floating
        tensor. Reads all these tensors at the first access, and keeps the result.
        """
        loras = {path: algebra.as_low_rank(lora) for path, lora in self.adapter.modules.items()}
        tensors = list_floating_tensors(self.adapter)
        bad = {path for path, values in tensors if not np.isfinite(values.read()).all()}
        return {path: lora for path, lora in loras.items() if lora is not None and path not in bad}

    @cached_property
    def norms(self) -> dict[str, float]:
        """‖ΔW‖ by path of each LoRA module with finite numbers, the Frobenius norm, of a stack over all experts.

        Computed once.
        """
        products = ((p, algebra.list_delta_products(h)) for p, h in self.finite_loras.items())
        return {p: float(np.sqrt(sum(algebra.frobenius_norm(x) ** 2 for x in xs))) for p, xs in products}

    def read_weight(self, path: str) -> np.ndarray | None:
        """Return the base's weight of a LoRA module; None if the base lacks it, has another shape, or has no values.

        A path without finite LoRA raises KeyError. There must be a base.
        """
        assert self.base is not None
        try:
            return read_base_weight(path, self.adapter, self.base, self.finite_loras[path])
        except (BaseModelMismatchError, BaseNeededError):
            return None


def lint_adapter(adapter: AdapterFile, base: BaseDescription | None = None) -> list[Finding]:
    """Return the faults of an adapter, errors first, then warnings, then notes; within each in the order of RULES.

    Args:
        base: by its names that fit the adapter's modules best; adds the rules that compare with the base, including the
            slow search for intruder dimensions.
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


Faults = Iterator[tuple[str, list[str]]]  # pairs of a text and the names that it is about


def find_numbers(is_bad: Callable[[np.ndarray], np.ndarray], kind: str, look: LintSubject) -> Faults:
    """Yield one fault with the sorted names of the floating tensors that have a number of the kind `is_bad`, if there
    are any.

    kind: the name of these numbers, which begins the text.
    """
    if bad := sorted({name for name, t in list_floating_tensors(look.adapter) if is_bad(t.read()).any()}):
        yield f"{kind} in {join_some(bad, 3)}", bad


def find_zero_b(look: LintSubject) -> Faults:
    """Yield one fault with the LoRA modules with ΔW = 0, if there are any.

    Modules with NaN or infinite numbers do not count.
    """
    zero = [path for path, size in look.norms.items() if size == 0]
    if zero:
        which = "all modules" if len(zero) == len(look.norms) else f"{len(zero)} of {len(look.norms)} modules"
        yield f"{which} change nothing: {join_some(zero, 3)}", zero


def find_outliers(look: LintSubject) -> Faults:
    """Yield one fault with the modules that have an unusually large ‖ΔW‖/‖W‖, if there are any.

    It is more than 6 median absolute deviations (`OUTLIER`) above the median. Only modules with a base weight other
    than 0 count; with fewer than four of them, or without a spread, nothing is yielded.
    """
    wholes = {path: float(np.linalg.norm(W)) for path in look.norms if (W := look.read_weight(path)) is not None}
    sizes = {path: look.norms[path] / whole for path, whole in wholes.items() if whole > 0}
    if len(sizes) < 4:
        return
    middle = float(np.median([*sizes.values()]))
    spread = float(np.median([abs(s - middle) for s in sizes.values()]))
    if outliers := [path for path, s in sizes.items() if spread > 0 and s > middle + OUTLIER * spread]:
        worst = max(outliers, key=sizes.__getitem__)
        text = f"‖ΔW‖/‖W‖ is {sizes[worst]:.3g} in {worst}, {middle:.3g} in the median: {join_some(outliers, 3)}"
        yield text, outliers


def find_unused_targets(look: LintSubject) -> Faults:
    """Yield a fault for target_modules, and one for target_parameters, if entries match no module of the file.

    A text is a regular expression that has to match a whole path; an invalid one matches nothing. An entry of a list
    matches a path that ends with it, without ".weight". Any other type is a fault. None, "all-linear" and files without
    modules and rows are skipped. The fault's text names up to 5 entries.
    """
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
            yield f"{name} names modules without a tensor in the file: {join_some(sorted(unused), 5)}", unused


def find_unknown_keys(look: LintSubject) -> Faults:
    """Yield a fault for keys without a meaning, and one for whole tensors that modules_to_save does not name."""
    adapter = look.adapter
    if adapter.unknown_keys:
        yield f"keys without a meaning: {join_some(adapter.unknown_keys, 3)}", adapter.unknown_keys
    if lone := list_unnamed(adapter):
        yield f"whole tensors that modules_to_save does not name: {join_some(lone, 3)}", lone


def find_gaps(look: LintSubject) -> Faults:
    """Yield one fault if the file lacks parts that its config names (`list_gaps`): a text with the first three, and the
    list of all.
    """
    if lost := list_gaps(look.adapter, look.base):
        yield f"the file lacks {join_some(lost, 3)}, which its config names", lost


def find_base_mismatch(look: LintSubject) -> Faults:
    """Yield one fault with the modules that do not fit the base's shapes, with the text of the first.

    Without any, yield one if the shapes in the file's fingerprint (`graft_base` of the metadata) differ from the
    base's.

    LoRA with values that are not finite is skipped, modules for a base without values, and experts for a base with
    single experts. Modules that the base lacks do not fit. There must be a base. In the fingerprint transposed shapes
    count as equal, and modules that the base lacks are skipped.
    """
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
    # weights may be stored (in, out)
    mismatches = [p for p, s in base_shapes.items() if tuple(shapes[p]) not in (s, (*s[:-2], *s[:-3:-1]))]
    if mismatches and not wrong:
        yield f"the file's fingerprint is of other shapes: {join_some(mismatches, 3)}", mismatches


def check_base_name(look: LintSubject) -> Faults:
    """Yield a fault if the file names no base, a local path, or a quantized copy of a model: one at most, the first of
    these. A local path is a name that begins with "." or has another form than names of the hub.
    """
    name = look.adapter.base
    if not name:
        yield "the file does not name its base", []
    elif name.startswith(".") or BASE_ID.fullmatch(name) is None:
        yield f"the base is a path of one machine: {name}", [name]
    elif MIRROR.search(name):
        yield f"the base is a quantized copy of a model: {name}", [name]


def find_missing_card(look: LintSubject) -> Faults:
    """Yield a fault if the adapter is a folder without README.md."""
    if os.path.isdir(look.adapter.path) and not os.path.isfile(os.path.join(look.adapter.path, CARD)):
        yield f"there is no {CARD}", []


def find_pickles(look: LintSubject) -> Faults:
    """Yield one fault with the sorted names of pickles in the adapter's folder, or of the file itself, if there are
    any.

    Names count that end with .bin, .pt, .pth, .ckpt or .pkl; nothing is opened.
    """
    folder = look.adapter.path
    names = os.listdir(folder) if os.path.isdir(folder) else [os.path.basename(folder)]
    if pickles := sorted(n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))):
        yield f"a pickle, which may run code where others load it: {join_some(pickles, 3)}", pickles


def find_intruders(look: LintSubject) -> Faults:
    """Yield one fault with the modules that have intruder dimensions, if there are any.

    Needs two SVDs for each weight.

    An intruder is one of the first 10 left singular vectors of W + ΔW with an absolute cosine below 0.5 to all of W.
    Experts, modules with ΔW = 0 and modules without a base weight are skipped.
    """
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
        yield f"strong directions (singular vectors) that the base does not have: {join_some(texts, 3)}", paths


def add_delta(lora: LowRank, W: np.ndarray) -> np.ndarray:
    """Return W + ΔW of a module, for DoRA its magnitude included, in float64."""
    if lora.magnitude is not None:
        return W + algebra.compute_dora_delta(lora, W)
    ((B, A),) = algebra.list_delta_products(lora)
    return W + B @ A


class Rule(NamedTuple):
    """One rule of `lint`."""

    name: str
    severity: Severity
    check: Callable[[LintSubject], Faults]
    remedy: str
    needs_base: bool = False


RULES = (
    Rule("nan", "error", partial(find_numbers, np.isnan, "NaN"),
         "Train again from a checkpoint before it, with a smaller learning rate."),
    Rule("inf", "error", partial(find_numbers, np.isinf, "an infinite number"),
         "Train again, or save in float32 or bfloat16."),
    Rule("zero-B", "warning", find_zero_b, "They were never trained. Find out why, or leave them out."),
    Rule("outlier", "warning", find_outliers, "Check whether training diverged there. Lower its weight.",
         True),
    Rule("unused-target", "warning", find_unused_targets,
         "Remove it from the config, or find out why it was not adapted."),
    Rule("not-whole", "error", find_gaps, "Save or download it again, or remove those entries from its config."),
    Rule("orphan-key", "error", find_unknown_keys, "Other libraries refuse them. Save it again where it was trained."),
    Rule("base-mismatch", "error", find_base_mismatch, "Give the base that the adapter was trained on.", True),
    Rule("base-name", "note", check_base_name, "Write the hub id of the original model into base_model_name_or_path."),
    Rule("no-card", "note", find_missing_card, "Write one, with the training data, the purpose and the licence."),
    Rule("pickle", "warning", find_pickles,
         "Delete training_args.bin and other files of a training run. graft convert writes weights as safetensors."),
    Rule("intruder", "note", find_intruders,
         "The model may have forgotten what the base knew. graft.reduce_intruder_dimension weakens these directions.",
         True),
)  # fmt: skip


HEADS = {"classifier", "score", "qa_outputs"}  # PEFT adds these to modules_to_save; a model has only some


def check_whole(adapter: AdapterFile, base: BaseDescription | None = None) -> None:
    """Raise CheckpointError if an adapter lacks a part that its config names, see `list_gaps`."""
    if lost := list_gaps(adapter, base):
        raise CheckpointError(
            f"{adapter.path} is not whole: it lacks {join_some(lost, 3)}. Save or download it again, or remove those "
            "entries from its adapter_config.json."
        )


def list_gaps(adapter: AdapterFile, base: BaseDescription | None = None) -> list[str]:
    """Return descriptions of the parts that an adapter's config names and the adapter lacks; [] for a complete one.

    The rules in their order: an adapter without any tensors gives ["every tensor"], or [] if it has unknown keys. A
    file without PEFT's config gives []. Else, as the config names them: magnitudes and biases of factors, whole
    modules, token rows, the base's biases, then modules without factors.

    Args:
        base: decides which whole modules count, and adds its biases and the modules without factors.
    """
    if not adapter.modules and not adapter.loose_tensors:
        return [] if adapter.unknown_keys else ["every tensor"]
    if "peft_type" not in adapter.config:
        return []
    known = None if base is None else choose_names(base, adapter.modules)
    layer_gaps = [] if known is None else list_layer_gaps(adapter, known)
    return [*list_factor_gaps(adapter), *list_tensor_gaps(adapter, known), *layer_gaps]


def list_factor_gaps(adapter: AdapterFile) -> Iterator[str]:
    """Yield the missing magnitudes (if the config has `use_dora`), then the missing biases (if it has `lora_bias`) of
    modules that have factors. Experts are skipped, and embeddings for biases.
    """
    factors = {path: lora for path, lora in adapter.low_rank.items() if lora.kind != "experts"}
    if adapter.config.get("use_dora"):
        yield from (f"the magnitude of {path}" for path, lora in factors.items() if lora.magnitude is None)
    if adapter.config.get("lora_bias"):
        yield from (
            f"the bias of {path}" for path, lora in factors.items() if lora.bias is None and lora.kind != "embedding"
        )


def list_tensor_gaps(adapter: AdapterFile, base: BaseDescription | None) -> Iterator[str]:
    """Yield descriptions of tensors that the config promises and the file lacks: modules of modules_to_save, then rows
    of trainable_token_indices, then biases.

    A name of modules_to_save is there if "<name>." is anywhere in the paths of whole tensors or adapted modules. With a
    base, a missing one only counts if a module of the base ends with it, also inside a part. Without a base, each
    missing one counts, except that one saved head is enough for all of classifier, score and qa_outputs. Rows count as
    missing only if there are none at all. Biases that the base has are checked, none without a base; "all" means those
    of all its modules, any other value except "none" those of the adapted modules.
    """
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
    """Yield the modules of the base, first those of `target_modules` and then of `target_parameters`, that the targets
    select and that have no factors.

    Two kinds count: modules that have factors in another layer; and modules in a stack of layers with adapted ones,
    selected by a config entry that selects no adapted module. Of `target_modules` only modules with a `weight` are
    looked at.
    """
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
    """Return name (without ".weight") → entry of the field, for the names that `target_modules` or `target_parameters`
    selects by the config's rules. The other of the two fields is ignored, and "all-linear" selects all names.

    Returns {} for an empty or invalid field, and for configs with `adapter_layers`. The entry is None where the rule
    names none.
    """
    config, targets = adapter.config, adapter.config.get(field)
    if "adapter_layers" in config or not (isinstance(targets, str) or (isinstance(targets, list) and targets)):
        return {}
    filters = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    fields: Json = {name: config.get(name) for name in filters}
    fields |= {"target_modules": None, "target_parameters": None, field: ".*" if targets == "all-linear" else targets}
    try:
        matcher = Matcher(SimpleNamespace(**fields), field == "target_parameters")
    except (ConfigError, TypeError):  # another rule reports the invalid field
        return {}
    verdicts = {name.removesuffix(".weight"): matcher(name) for name in names}
    return {name: verdict.entry for name, verdict in verdicts.items() if verdict.outcome == "matched"}
