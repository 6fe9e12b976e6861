# SPDX-License-Identifier: Apache-2.0
"""PEFT's folders, which are graft's: adapter_config.json with adapter_model.safetensors or .bin."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace as replaced
from typing import Any

from graft import CheckpointError, LossError, PeftType, PeftWarning
from graft.config import pair
from graft.config.pair import LAYOUT_FIELD, StackLayout
from graft.config.reading import Json, compile_ending, compile_pattern, read_object
from graft.core.errors import join_some, shorten_text, warn
from graft.files import pickles
from graft.files.base import BaseDescription as Base
from graft.files.bases import COMPONENTS
from graft.files.errors import BaseNeededError
from graft.files.names import find_pipeline_parts, join_pipeline, split_pipeline
from graft.files.neutral import AdapterFile, Kind, LostModule, LowRank, OtherMethod
from graft.files.tensors import Tensor, list_sources, make_int64_tensor, make_tensor, read_header

NAME = "peft"
_FILES = (pair.SAFETENSORS, pair.TORCH), (pair.CONFIG_NAME, "README.md")
FOLDER = tuple((*names, *(f"{part}*/{name}" for part in COMPONENTS for name in names)) for names in _FILES)
WRAPPED, PROMPT_WRAPPED = "base_model.model.", "base_model."  # how the names of tensors begin
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE")
OTHER_PREFIXES = {"ADALORA": "lora_", "LOHA": "hada_", "ADAPTION_PROMPT": "adaption_", "ADAPTER_FUSION": "fusion_"}
# of the names of a method's tensors on a module
PREFIXES: dict[str, str] = {t.value: f"{t.value.lower()}_" for t in PeftType if t.value not in PROMPTS} | OTHER_PREFIXES
ANY = tuple(PREFIXES.values())
OF_PROMPT = ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")
NONE = "dummy-target-modules"  # as target_modules: the adapter has no LoRA, only whole tensors or rows
BESIDE = re.compile(r"\.(modules_to_save|original_module)(?=\.)")  # some files repeat a head under these names
TOKENS = "token_adapter"  # a module of PEFT around an embedding with trained rows
# variants of LoRA with another meaning of A and B
VARIANTS: dict[str, str] = {"kasa_config": "KASA", "use_bdlora": "BDLORA", "use_qalora": "QALORA"}
BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")  # values of init_lora_weights, or their beginning
SCALED = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}  # methods of the scale alpha / r → its field
FIRST = ("gate_up_proj", "w1", "w13", "up_proj", "down_proj", "w2", "w3")  # parameters of experts as modules hold them
TRANSPOSED = ("gpt_oss",)  # types of models with matrices of experts stored (in, out)
UNMARKED = ("llama4", "llama4_text")  # types that store them so without a mark on the module
RANK = 8  # where a config does not say r or alpha
LISTS = ("target_parameters", "modules_to_save")  # lists of text in a config
KINDS: dict[str, type] = {"peft_type": str, "base_model_name_or_path": str, "use_bdlora": dict}  # of other fields


# reading


def recognises(path: str) -> bool:
    """Return True for PEFT's folder or one of its files: adapter_config.json has `peft_type`, or the weights hold
    graft's note of the config. The weights need not be there in the first case. Other paths give False.

    If the config is damaged, it is True if weights are there, so that `read` raises the error. A folder of a pipeline's
    parts needs every part to be one.
    """
    if parts := list_parts(path):
        return all(recognises(os.path.join(path, part)) for part in parts)
    folder = folder_of(path)
    if folder is None:
        return False
    config = os.path.join(folder, pair.CONFIG_NAME)
    try:
        fields = read_object(config) if os.path.isfile(config) else {}
    except CheckpointError:
        return pair.find_weights(folder) is not None  # then `read` raises the error
    return "peft_type" in fields or getattr(pair.find_weights(folder), "config", None) is not None


def list_parts(path: str) -> list[str]:
    """Return the names of sub-folders with adapters of a pipeline's parts, sorted.

    [] for other paths, and for a folder with adapter_config.json. Folders that begin with "." are left out.
    """
    if not os.path.isdir(path) or os.path.exists(os.path.join(path, pair.CONFIG_NAME)):
        return []
    folders = [entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(find_pipeline_parts(folders))


def folder_of(path: str) -> str | None:
    """Return the folder of an adapter: `path` itself if it is a folder, or the parent of a path with the file name of
    its config or weights.

    "." for such a name without a folder; None for other paths. The file need not be there.
    """
    if os.path.isdir(path):
        return path
    if os.path.basename(path) in (pair.CONFIG_NAME, pair.SAFETENSORS, pair.TORCH):
        return os.path.dirname(path) or "."
    return None


def read(path: str, base: Base | None = None) -> AdapterFile:
    """Read an adapter; for a pipeline, all its parts together.

    Converts layouts of servers and names of tinker, and exchanges A and B of stacks that an old PEFT wrote exchanged.
    Warns with PeftWarning if the layout of experts is a guess. Modules with only their bias in the file are added
    without tensors. `changed_base` is set if the initialisation changed the base and the file does not hold that
    change. `selected` is set to the modules, or to None if tensors were renamed. graft's mark of the experts' layout is
    taken out of the config.

    Args:
        path: the folder, or one of the two files in it.
        base: tells which parameters of experts the factors belong to, where the config leaves that open.

    Raises:
        CheckpointError: a file is missing or damaged, the method is unknown, or config and tensors contradict each
            other.
        BaseNeededError: the experts are in the layout of servers, and there is no base.
    """
    if parts := list_parts(path):
        return join_pipeline({part: read(os.path.join(path, part)) for part in parts}, path)
    folder = folder_of(path) or path
    config_file = pair.ConfigFile(folder, None)
    tensors, metadata, noted = weights_in(folder)
    config = dict(config_file.choose_fields(noted))
    check_kinds(config, config_file.path)
    layout = StackLayout.from_config(config)
    config.pop(LAYOUT_FIELD, None)  # B is held as PEFT has it
    method = config.get("peft_type")
    if method not in PREFIXES and method not in PROMPTS:
        raise CheckpointError(f"{config_file.path} has peft_type {method!r}, which graft does not know. Update graft.")
    names = set(tensors)
    stacks = [key for key, t in tensors.items() if len(t.shape) == 3 and OF_SERVERS.fullmatch(key)]
    served = method == "LORA" and bool(stacks)  # factors of experts as servers hold them
    if method == "LORA":
        tensors = rename_from_tinker(tensors, base)
    if served:
        tensors, config = convert_served(tensors, config, base, folder)
    out = AdapterFile(NAME, folder, method, config=config, metadata=metadata, is_server_layout=served)
    out.base = config.get("base_model_name_or_path")
    by_module = split_tensors(out, tensors)
    for raw, of_module in by_module.items():
        if method == "LORA":
            take_lora(out, raw, of_module, by_module, base, layout)
        else:
            take_other(out, clean_path(raw), method, of_module)
    for name in tensors if method in PREFIXES else ():  # modules with only their bias in the file
        path, has_base, leaf = name.partition(".base_layer.")
        if has_base and leaf in ("weight", "bias") and not path.endswith(f".{TOKENS}"):
            out.modules.setdefault(path.removeprefix(WRAPPED), OtherMethod(method, {}))
    exchange_old_factors(out, layout, base)
    if not any(m.shift for m in out.low_rank.values()):
        out.changed_base = find_base_change(config)
    out.selected = frozenset(out.modules) if served or names == set(tensors) else None
    return out


def check_kinds(config: Json, path: str) -> None:
    """Raise CheckpointError if `target_parameters` or `modules_to_save` of a config is no list of texts, if `peft_type`
    or `base_model_name_or_path` is no text, or `use_bdlora` no dict.

    Missing and empty values pass.
    """
    for name in LISTS:
        value = config.get(name) or []
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise CheckpointError(f"{path}: {name} is {value!r}, and no list of names. Correct the config.")
    for name, kind in KINDS.items():
        if (value := config.get(name)) and not isinstance(value, kind):
            raise CheckpointError(
                f"{path}: {name} is {value!r}, and no {'text' if kind is str else 'dict'}. Correct the config."
            )


def list_unnamed(adapter: AdapterFile) -> list[str]:
    """Return the whole tensors of a PEFT file that its config does not name.

    Named are tensors in modules of `modules_to_save`, embed_tokens or lm_head, at any depth. Biases are named if the
    config trains some, and all tensors of adapted modules. [] for prompts, and for a config without `peft_type`.
    """
    config = adapter.config
    if "peft_type" not in config or adapter.method in PROMPTS:
        return []
    saved = [*(config.get("modules_to_save") or ()), "embed_tokens", "lm_head"]
    return [
        name for name in adapter.full
        if not any(f".{name}".find(f".{s}.") >= 0 for s in saved)
        and not (name.endswith(".bias") and config.get("bias", "none") != "none")
        and name.rpartition(".")[0] not in adapter.modules
    ]  # fmt: skip


def weights_in(folder: str) -> tuple[dict[str, Tensor], dict[str, str], Any]:
    """Return the tensors of an adapter's folder, the file's metadata, and graft's notes in it.

    safetensors comes before torch.

    Raises:
        CheckpointError: no file of weights, a damaged one, or tensors that differ from graft's digest in it.
    """
    weights = pair.find_weights(folder)
    if weights is None:
        raise CheckpointError(
            f"Can't find weights in {folder}: neither {pair.SAFETENSORS} nor {pair.TORCH} is there"
            f"{pair.describe_whole_model(folder)}."
        )
    if weights.path.endswith(pair.SAFETENSORS):
        tensors, metadata = read_header(weights.path)
    else:
        tensors, metadata = pickles.convert_tensors(pickles.read_torch(weights.path), weights.path), weights.texts
    pair.check_sealed(metadata, list_sources(tensors), weights.path)
    return tensors, metadata, weights


def split_tensors(out: AdapterFile, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of adapted modules: module as the file names it → name → tensor.

    All others go to `out`:
    - `shared`: a prompt's tensors, and names that begin with "base_model." but not "base_model.model.".
    - `rows`: trained rows of embeddings. `full`: whole tensors, with the base's resized embedding around such rows.
    - `unknown_keys`: tensors of other methods, second ones of the same whole tensor, and rows without known indices.

    Second copies of a head (`modules_to_save`, `original_module`) are skipped.
    """
    by_module: dict[str, dict[str, Tensor]] = {}
    of_prompt = out.method in PROMPTS
    prefix = PREFIXES.get(out.method, " ")
    for key, t in tensors.items():
        if of_prompt and key in OF_PROMPT:
            out.shared[key] = t
            continue
        if (stem := BESIDE.sub("", key)) != key and stem in tensors:
            continue
        if key.startswith(PROMPT_WRAPPED) and not key.startswith(WRAPPED) and not of_prompt:
            out.shared[key.removeprefix(PROMPT_WRAPPED)] = t
            continue
        name = key.removeprefix(PROMPT_WRAPPED if of_prompt else WRAPPED)
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.startswith(prefix) or part == TOKENS), None)
        leaf = None if at is None else ".".join(parts[at:])
        path = ".".join(parts[:at])
        if leaf in (f"{TOKENS}.trainable_tokens_delta", "trainable_tokens_delta"):
            take_rows(out, clean_path(path), key, t)
        elif leaf == f"{TOKENS}.base_layer.weight":  # the base's, where its vocabulary was resized
            out.full[f"{clean_path(path)}.weight"] = t
        elif leaf is not None and path and parts[at] != TOKENS:  # type: ignore[index]
            by_module.setdefault(path, {})[leaf] = t
        elif leaf is not None or any(part.startswith(ANY) for part in parts) or clean_path(name) in out.full:
            out.unknown_keys.append(key)
        else:
            out.full[clean_path(name)] = t
    return by_module


def clean_path(path: str) -> str:
    """Return a module's path without the parts "base_layer" and "modules_to_save", which PEFT's wrappers add."""
    return ".".join(part for part in path.split(".") if part not in ("base_layer", "modules_to_save"))


def take_rows(out: AdapterFile, path: str, key: str, values: Tensor) -> None:
    """Add trained rows of the embedding at `path` to `out.rows`, with the token indices of the config as int64.

    They are the field `token_indices` for TRAINABLE_TOKENS, else `trainable_token_indices`. A dict of indices is
    searched for the first name that is the path or its end after a dot.

    If the config has none for it, or another number than `values` has rows, the key goes to `unknown_keys`. That the
    indices are valid is checked first.

    Raises:
        CheckpointError: the indices are no list of ints from 0 on.
    """
    which = out.config.get("token_indices" if out.method == "TRAINABLE_TOKENS" else "trainable_token_indices")
    if isinstance(which, dict):
        which = next((rows for name, rows in which.items() if f".{path}".endswith(f".{name}")), None)
    if which is not None and not (isinstance(which, list) and all(type(i) is int and i >= 0 for i in which)):
        raise CheckpointError(
            f"adapter_config.json: the token indices of '{path}' are {which!r}: they are whole numbers from 0 on. "
            "Correct the config."
        )
    if which is None or len(which) != values.shape[0]:
        out.unknown_keys.append(key)
    else:
        out.rows[f"{path}.weight"] = make_int64_tensor(which), values


def take_other(out: AdapterFile, path: str, method: str, tensors: dict[str, Tensor]) -> None:
    """Add a module of a method other than LoRA to `out`, with alpha / r as scale for LoHa and LoKr.

    AdaLoRA's scale is lora_alpha / (init_r + 1e-5), with init_r for an alpha of 0 or less; missing ones are 12 and 8.
    Others have None.
    """
    scale = None
    if method in SCALED:
        r, alpha = find_rank_and_alpha(out.config, path, SCALED[method])
        scale = alpha / r
    elif method == "ADALORA":
        r, alpha = out.config.get("init_r") or 12, out.config.get("lora_alpha", RANK)
        scale = (alpha if alpha > 0 else r) / (r + 1e-5)
    out.modules[path] = OtherMethod(method, tensors, scale)


def take_lora(
    out: AdapterFile,
    raw: str,
    parts: dict[str, Tensor],
    every: Mapping[str, object],
    base: Base | None,
    layout: StackLayout,
) -> None:
    """Add one module of LoRA to `out.modules`: factors with scale, magnitude (flattened), bias, and other tensors as
    `extra`.

    Factors of embeddings are taken if there are no others. The path gets the parameter's name if the factors belong to
    one other than "weight"; a stack's factors are split by expert. The scale is alpha / r, or alpha / √r with
    `use_rslora`. KaSA, BD-LoRA (on its blocks) and QA-LoRA become `OtherMethod`. Without two factors of the same number
    of dimensions, at least 2, all keys go to `unknown_keys`.

    Args:
        raw: the module as the file names it.
        parts: its tensors; the factors, magnitude and bias are removed from it, and the rest becomes `extra`.
        every: all modules of the file.

    Raises:
        CheckpointError: the shapes are not of the config's rank, or the parameter is unclear.
    """
    config, path = out.config, clean_path(raw)
    A, B = parts.pop("lora_A.weight", None), parts.pop("lora_B.weight", None)
    embedded = A is None and B is None
    if embedded:
        A, B = parts.pop("lora_embedding_A", None), parts.pop("lora_embedding_B", None)
    if A is None or B is None or len(A.shape) < 2 or len(A.shape) != len(B.shape):
        unread = {"lora_A.weight": A, "lora_B.weight": B} | parts
        out.unknown_keys += [f"{WRAPPED}{raw}.{name}" for name, t in unread.items() if t is not None]
        return
    stack = None if embedded else find_parameter(config, raw, every, A, B, base)
    if stack is not None:
        path = f"{path}.{stack}" if stack != "weight" else path
    r, alpha = find_rank_and_alpha(config, f"{path}.weight" if stack == "weight" else path, SCALED["LORA"])
    scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    variant = next((name for field, name in VARIANTS.items() if config.get(field)), None)
    if variant == "BDLORA" and not any(part in path for part in list_bdlora_blocks(config)):
        variant = None
    if variant is not None:
        pair_of = {"lora_A.weight": A, "lora_B.weight": B}
        out.modules[path] = OtherMethod(variant, pair_of | parts, scale)
        return
    n = A.shape[0] // r if stack is not None else 1
    if A.shape[0] != n * r or B.shape[1] != (A.shape[0] if len(A.shape) == 2 else B.shape[1]):
        raise CheckpointError(
            f"{out.path}: '{raw}' has factors of shapes {A.shape} and {B.shape}, but adapter_config.json says rank {r} "
            "there: the two files belong to different adapters, or one was edited."
        )
    kind: Kind = "embedding" if embedded else "conv" if len(A.shape) > 2 else "linear"
    if n > 1 or (stack is not None and stack != "weight"):
        kind, A, B = "experts", *split_by_expert(A, B, n, bool(layout.by_expert))
    module = LowRank(A, B, scale, kind)
    if (m := parts.pop("lora_magnitude_vector", None)) is not None:
        module.magnitude = m.reshape(math.prod(m.shape))
    module.bias = parts.pop("lora_B.bias", None)
    module.extra = parts
    out.modules[path] = module


def list_bdlora_blocks(config: Json) -> list[str]:
    """Return the parts of paths that BD-LoRA's options name: those with a block-diagonal A, then those with
    such a B.
    """
    options = config["use_bdlora"]
    return [*(options.get("target_modules_bd_a") or ()), *(options.get("target_modules_bd_b") or ())]


def find_rank_and_alpha(config: Json, path: str, name: str) -> tuple[int, float]:
    """Return rank and alpha of the module at `path`, as in the config: for each the first pattern that matches the
    path's end, else the config's field, else 8.

    Args:
        name: the config's field of alpha.

    Raises:
        CheckpointError: one is no number or a bool, the rank is below 1, or the patterns are no dict.
    """
    numbers: list[Any] = []
    for field, patterns in (("r", "rank_pattern"), (name, "alpha_pattern")):
        value = config.get(field)
        by_pattern = config.get(patterns) or {}
        if not isinstance(by_pattern, dict):
            raise CheckpointError(
                f"adapter_config.json: {patterns} is {by_pattern!r}, and no dict of patterns. Correct the config."
            )
        for key, pattern_value in by_pattern.items():
            if compile_ending(key, patterns).match(path):
                value = pattern_value
                break
        value = RANK if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (field == "r" and value < 1):
            raise CheckpointError(
                f"adapter_config.json: {field} of '{path}' is {shorten_text(repr(value))}, which is no number for it. "
                "Correct the config."
            )
        numbers.append(value)
    return numbers[0], numbers[1]


# experts: factors of parameters; a module may have several


def find_parameter(config: Json, raw: str, every: Iterable[str], A: Tensor, B: Tensor, base: Base | None) -> str | None:
    """Return the name of the parameter that the factors at `raw` belong to; None if they belong to the module.

    They belong to the module if no entry of `target_parameters` is in it, or if `target_modules` selects it and an
    entry has no module. Several parameters of a module are nested by `base_layer`, the innermost first in the module's
    order. If the numbers of names and nested layers differ, the base's shapes choose names.

    Raises:
        CheckpointError: `target_parameters` names several, and neither the file nor the base tells which it is.
    """
    path = clean_path(raw)
    targets = config.get("target_parameters") or ()
    names = [t.rpartition(".")[2] for t in targets if f".{path}".endswith(f".{t.rpartition('.')[0]}".rstrip("."))]
    names = list(dict.fromkeys(names))
    if not names or (any("." not in t for t in targets) and is_target(config, path)):
        return None
    nest = sorted((e for e in every if clean_path(e) == path), key=len, reverse=True)  # the innermost first
    if base is not None and len(names) != len(nest):
        names = [n for n in names if is_stack_shape(base.shapes.get(f"{path}.{n}"), A, B)] or names
    if len(names) == 1 and len(nest) == 1:
        return names[0]
    if len(names) != len(nest):
        raise CheckpointError(
            f"'{raw}' holds factors of one of the parameters {join_some(names)}, and the file does not tell which. "
            "Give the base model (--base)."
        )
    return in_module_order(names)[nest.index(raw)] if len(nest) > 1 else names[0]


def in_module_order(names: list[str]) -> list[str]:
    """Return a module's parameter names in the order gate_up_proj, w1, w13, up_proj, down_proj, w2, w3, if they are all
    among these; else `names` itself.
    """
    known = set(names) <= set(FIRST)
    return sorted(names, key=FIRST.index) if known else names


def is_target(config: Json, path: str) -> bool:
    """Return True if `target_modules` selects the path: "all-linear" selects all, another text is a regular expression
    for the whole path, and a list has whole paths or their ends after a dot. Without targets it is False. An invalid
    expression raises ConfigError.
    """
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return targets == "all-linear" or compile_pattern(targets, "target_modules").fullmatch(path) is not None
    return any(f".{path}".endswith(f".{t}") for t in targets or ())


def is_stack_shape(shape: tuple[int, ...] | None, A: Tensor, B: Tensor) -> bool:
    """Return True if the last two sizes of `shape` are A's inputs and B's outputs, in any order; False for None or
    fewer than two sizes.
    """
    return shape is not None and len(shape) > 1 and {shape[-1], shape[-2]} == {A.shape[1], B.shape[0]}


def split_by_expert(A: Tensor, B: Tensor, n: int, grouped: bool) -> tuple[Tensor, Tensor]:
    """Return the factors (n, r, in) and (n, out, r) of a stack of n experts, from A (n r, in) and B (out, n r).

    Args:
        grouped: each expert's r columns of B are next to each other, as Unsloth had them; else the experts alternate.
    """
    (rows, fan_in), out = A.shape, B.shape[0]
    r = rows // n
    sizes, axes = ((out, n, r), (1, 0, 2)) if grouped else ((out, r, n), (2, 0, 1))
    return A.reshape(n, r, fan_in), B.rearrange(lambda v: v.reshape(sizes).transpose(axes), n, out, r)


def exchange_old_factors(out: AdapterFile, layout: StackLayout, base: Base | None) -> None:
    """Exchange A and B of stacks of experts that a PEFT before 0.19.1 wrote exchanged, in place; if one is, set
    `peft_version` in the config to today's. Nothing happens without stacks.

    The base's shapes decide, else the sizes of gate, up and down, else the version. Warns with PeftWarning of doubts:
    the order of A and B, and whether ranks are ordered by expert. Without a base, warns also with the names of stacks
    that were exchanged by version.
    """
    stacks = {path: lora for path, lora in out.low_rank.items() if lora.kind == "experts"}
    if not stacks:
        return
    doubts = set[str]()
    if layout.by_expert is None and any(min(lora.A.shape[:2]) > 1 for lora in stacks.values()):
        doubts.add("by_expert")
    kind = "" if base is None else str(base.config.get("model_type"))
    shapes = {path: (are_exchanged_by_shape(path, stacks, base, kind), kind in TRANSPOSED) for path in stacks}
    verdicts = layout.find_exchanges(shapes, doubts)
    for path, lora in stacks.items():
        if verdicts[path][0]:
            (n, r, fan_in), outs = lora.A.shape, lora.B.shape[1]
            A = lora.B.rearrange(lambda v: v.swapaxes(1, 2), n, r, outs)
            B = lora.A.rearrange(lambda v: v.swapaxes(1, 2), n, fan_in, r)
            out.modules[path] = replaced(lora, A=A, B=B)
            out.config["peft_version"] = StackLayout().version
    layout.warn_of_doubts(doubts, out.path)
    if base is None and (guessed := [path for path, verdict in verdicts.items() if all(verdict)]):
        warn(
            f"{out.path} is of PEFT {layout.version}, which had A and B of most stacks of experts in each other's "
            f"place: {join_some(guessed)} were read so. Give the base model for its shapes (--base).",
            PeftWarning,
        )


def are_exchanged_by_shape(path: str, stacks: Mapping[str, LowRank], base: Base | None, kind: str) -> bool | None:
    """Return True if A and B of a stack are exchanged, False if not; None if the sizes do not tell.

    By the base's 3-D shape, if its two sides differ; it is (in, out) for the model type "gpt_oss". Else by gate_up_proj
    and down_proj of the same module: the input of one is the output of down, and the output of gate and up twice the
    input of down. For "llama4" and "llama4_text" that verdict is turned. Without both stacks the result is None.
    """
    module = path.rpartition(".")[0]
    first, last = stacks.get(f"{module}.gate_up_proj"), stacks.get(f"{module}.down_proj")
    shape = None if base is None else base.shapes.get(path)
    if shape is not None and len(shape) == 3 and shape[1] != shape[2]:
        fan_in = shape[1 if kind in TRANSPOSED else 2]
        return stacks[path].A.shape[2] != fan_in
    if first is None or last is None:
        return None
    (a, b), (c, d) = (first.A.shape[2], first.B.shape[1]), (last.A.shape[2], last.B.shape[1])
    straight, turned = (a, b) == (d, 2 * c), (b, a) == (c, 2 * d)
    return None if straight == turned else turned != (kind in UNMARKED)


# writing


def write(adapter: AdapterFile, path: str, base: Base | None = None, lossy: bool = False) -> list[str]:
    """Write an adapter as a folder that PEFT and graft load; for a pipeline, one folder for each part.

    Return descriptions of the losses, for a pipeline with the part before each.

    An older folder is replaced whole. Nothing is written if an error is raised, except earlier parts of a pipeline.
    graft's fingerprint of the base (`graft_base`) is kept if `selected` equals the modules; other metadata is not.

    Args:
        base: its modules' names let `target_modules` be short; it is not used for the parts of a pipeline.

    Raises:
        LossError: PEFT's files have no place for something, and `lossy` is False.
        BaseNeededError: the adapter's names are no paths of modules.
        CheckpointError: there is nothing to write.
    """
    if adapter.has_flat_names:
        raise make_names_error(adapter)
    if parts := split_pipeline(adapter):
        lost = []
        for part, of_part in parts.items():
            lost += [type(line)(f"{part}: {line}") for line in write(of_part, os.path.join(path, part), None, lossy)]
        return lost
    lost = [f"{key} (unread)" for key in adapter.unknown_keys]
    tensors = name_tensors(adapter, lost)
    config = complete_config(adapter, base)
    if lost and not lossy:
        raise LossError(f"PEFT's files have no place for {join_some(lost)} of {adapter.path}. --lossy writes the rest.")
    if not tensors:
        raise CheckpointError(f"Nothing is left of {adapter.path} that could be written to {path}.")
    text = json.dumps(config, indent=2, sort_keys=True)
    unchanged = adapter.selected == frozenset(adapter.modules)
    noted = {"graft_base": adapter.metadata["graft_base"]} if unchanged and "graft_base" in adapter.metadata else {}
    pair.save_sealed(path, list_sources(tensors), text, noted)
    return lost


def make_names_error(adapter: AdapterFile) -> BaseNeededError:
    """Return (do not raise) the error for an adapter with flat names of its format: a base is needed."""
    return BaseNeededError(
        f"{adapter.path} names modules as its format does ({join_some([*adapter.modules], 2)}). Give the base model "
        "with their paths (--base)."
    )


def name_tensors(adapter: AdapterFile, lost: list[str]) -> dict[str, Tensor]:
    """Return an adapter's tensors by PEFT's names: modules, whole tensors, rows, shared ones, in this order.

    Modules of another method than the adapter's are left out, and added to `lost`; LoRA's variants count as LoRA. A
    whole tensor of an adapted module, or one with trained rows, is named as of its `base_layer`. Only the rows' values
    are written, without their indices.
    """
    out: dict[str, Tensor] = {}
    of_prompt = adapter.method in PROMPTS
    wrapped, wrapper = PROMPT_WRAPPED if of_prompt else WRAPPED, f"{TOKENS}." * (adapter.method != "TRAINABLE_TOKENS")
    alike = {adapter.method, *(VARIANTS.values() if adapter.method == "LORA" else ())}
    for path, of_module in adapter.modules.items():
        stem = f"{wrapped}{find_peft_path(path, adapter)}"
        if isinstance(of_module, LowRank):
            if adapter.method != "LORA":
                lost.append(LostModule(f"{path} (LoRA beside {adapter.method})"))
            else:
                out |= {f"{stem}.{name}": t for name, t in name_lora_tensors(of_module).items()}
        elif of_module.method not in alike or adapter.method not in PREFIXES:
            lost.append(LostModule(f"{path} ({of_module.method})"))
        else:
            out |= {f"{stem}.{name}": t for name, t in of_module.tensors.items()}
    for name, t in adapter.full.items():
        module, _, leaf = name.rpartition(".")
        target_path = f"{module}.base_layer" if module in adapter.modules else module
        if name in adapter.rows:
            target_path = f"{module}.{wrapper}base_layer"
        out[f"{wrapped}{add_base_layers(target_path, adapter)}.{leaf}"] = t
    for name, (_, values) in adapter.rows.items():
        out[f"{wrapped}{add_base_layers(name.removesuffix('.weight'), adapter)}.{wrapper}trainable_tokens_delta"] = (
            values
        )
    for name, t in adapter.shared.items():
        out[name if of_prompt else f"{PROMPT_WRAPPED}{name}"] = t
    return out


def name_lora_tensors(lora: LowRank) -> dict[str, Tensor]:
    """Return a LoRA module's tensors by PEFT's names without the path.

    A Tucker core is multiplied into A. A stack's factors become A (n r, in) and B (out, r n), the experts alternating.
    A convolution's magnitude gets the dimensions of its weight. `extra` is added.
    """
    A, B = lora.A, lora.B
    if lora.kind == "embedding":
        out = {"lora_embedding_A": A, "lora_embedding_B": B}
    else:
        if lora.mid is not None:
            from graft.files.algebra import contract_tucker_core

            A = make_tensor(contract_tucker_core(lora), A.dtype)
        if lora.kind == "experts":
            n, r, fan_in = A.shape
            out_features = B.shape[1]
            A = A.reshape(n * r, fan_in)
            B = B.rearrange(lambda v: v.transpose(1, 2, 0), out_features, r * n)
        out = {"lora_A.weight": A, "lora_B.weight": B}
    if lora.bias is not None:
        out["lora_B.bias"] = lora.bias
    if lora.magnitude is not None:
        ones = (1,) * (len(A.shape) - 2)
        m = lora.magnitude
        out["lora_magnitude_vector"] = m.reshape(1, *m.shape, *ones) if lora.kind == "conv" else m
    return out | lora.extra


def add_base_layers(path: str, adapter: AdapterFile) -> str:
    """Return a path with `base_layer` after each parent module that is adapted, too, unless it is there already."""
    out, above = [], ""
    for part in path.split("."):
        out += ["base_layer"] * (part != "base_layer" and above in adapter.modules)
        out.append(part)
        above = f"{above}.{part}" if above else part
    return ".".join(out)


def find_peft_path(path: str, adapter: AdapterFile) -> str:
    """Return the module's path as PEFT names it. A parameter's name is dropped.

    PEFT nests layers of several parameters of one module: the last in the module's order is outermost, and each earlier
    one gets one ".base_layer" more.
    """
    of_module = adapter.modules[path]
    if of_module.kind != "experts":
        return add_base_layers(path, adapter)
    module, _, name = path.rpartition(".")
    stacks = (p.rpartition(".") for p, h in adapter.modules.items() if h.kind == "experts")
    names = in_module_order([parameter for around, _, parameter in stacks if around == module])
    depth = len(names) - 1 - names.index(name)
    return add_base_layers(module, adapter) + ".base_layer" * depth


# the config


def complete_config(adapter: AdapterFile, base: Base | None) -> Json:
    """Return the fields of adapter_config.json in a new dict: those of the source, or new ones for another method,
    corrected.

    If the modules have changed, targets are set anew (a dummy target without modules), for LoRA also
    `target_parameters`, and the fields that exclude modules or layers become None. Rank and alpha follow the modules,
    for methods that have both. An initialisation that changes the base becomes True if the file no longer needs it.
    With experts, `peft_version` is today's, since readers learn the order of A and B from it.
    """
    config = dict(adapter.config) if adapter.config.get("peft_type") == adapter.method else new_config(adapter)
    if adapter.selected != frozenset(adapter.modules):
        parameters = {p: as_target(p, adapter) for p, h in adapter.modules.items() if h.kind == "experts"}
        parameters |= {p: as_target(p, adapter) for p in adapter.modules if p in adapter.by_parameter}
        paths = [p for p in adapter.modules if p not in parameters]
        config["target_modules"] = choose_targets(paths, base) if adapter.modules else NONE
        config |= dict.fromkeys({"exclude_modules", "layers_to_transform", "layers_pattern"} & config.keys())
        if adapter.method == "LORA":
            config["target_parameters"] = [*parameters.values()] or None
    if adapter.method in SCALED:
        set_numbers(config, adapter)
    needs_change = adapter.changed_base is not None or any(h.shift for h in adapter.low_rank.values())
    if find_base_change(config) and not needs_change:
        config["init_lora_weights"] = True
    if any(lora.kind == "experts" for lora in adapter.low_rank.values()):
        config["peft_version"] = StackLayout().version  # it tells readers the order of A and B
    return config


def find_base_change(config: Mapping[str, object]) -> str | None:
    """Return init_lora_weights in lower case if it begins with pissa, olora, corda, lora_ga or loftq, which change the
    base's weights; else None.
    """
    init = str(config.get("init_lora_weights")).lower()
    return init if init.startswith(BASE_CHANGING) else None


def new_config(adapter: AdapterFile) -> Json:
    """Return a new config, without targets and ranks, for an adapter without a source config of its method.

    All methods get type, task, base, `inference_mode` True and `modules_to_save`, the modules of whole tensors that
    have no adapter. LoRA also gets dropout 0, `init_lora_weights` True and no `use_rslora`. Its `bias` is "all" if the
    file has biases of other modules than the adapted ones, "lora_only" for biases of these only, else "none". DoRA,
    lora_bias and rows follow the parts there are; aLoRA's tokens are taken over. fan_in_fan_out and ensure_weight_tying
    come from a config of PEFT, else are False.
    """
    biases = {n for n in adapter.full if n.endswith(".bias") and f"{n.removesuffix('bias')}weight" not in adapter.full}
    of_targets = {n for n in biases if n.removesuffix(".bias") in adapter.modules}
    whole = {n.rpartition(".")[0] for n in adapter.full if n not in biases}
    config: Json = {
        "peft_type": adapter.method, "task_type": adapter.config.get("task_type"), "inference_mode": True,
        "base_model_name_or_path": adapter.base, "modules_to_save": sorted(whole - set(adapter.modules)) or None,
    }  # fmt: skip
    if adapter.method == "LORA":
        old_config = adapter.config if adapter.format == NAME else {}
        low_rank = adapter.low_rank.values()
        config |= {
            "lora_dropout": 0.0, "fan_in_fan_out": old_config.get("fan_in_fan_out", False),
            "ensure_weight_tying": old_config.get("ensure_weight_tying", False), "use_rslora": False,
            "init_lora_weights": True,
            "bias": "all" if biases > of_targets else "lora_only" if biases else "none",
            "use_dora": any(h.magnitude is not None for h in low_rank),
            "lora_bias": any(h.bias is not None for h in low_rank),
            "alora_invocation_tokens": adapter.config.get("alora_invocation_tokens"),
        }  # fmt: skip
        if adapter.rows:
            rows = {name.removesuffix(".weight"): which.read().tolist() for name, (which, _) in adapter.rows.items()}
            config["trainable_token_indices"] = rows
    return config


def choose_targets(paths: list[str], base: Base | None) -> list[str]:
    """Return `target_modules`, sorted, that select these modules and no other.

    With a base, each last name once, if the base's modules with one of these last names are exactly `paths`. Otherwise
    the whole paths, with any duplicates: without a base, if another module has such a name, or if a path is no module
    of the base.
    """
    if base is not None:
        known = set(base.modules)
        leaves = {p.rpartition(".")[2] for p in paths}
        if {m for m in known if m.rpartition(".")[2] in leaves} == set(paths):
            return sorted(leaves)
    return sorted(paths)


def as_target(path: str, adapter: AdapterFile) -> str:
    """Return a config's name for a module: its path, with ".weight" for one that is adapted as a parameter."""
    return f"{path}.weight" if path in adapter.by_parameter else path


def set_numbers(config: dict[str, object], adapter: AdapterFile) -> None:
    """Set rank, alpha and their patterns in the config to those of the modules, in place.

    Nothing changes if they are right already, scales to a relative 1e-12, or if no module has a rank.

    The most frequent rank and alpha become `r` and alpha; other modules get patterns, which replace all earlier ones.
    Alpha is scale · r, or scale · √r with `use_rslora`, rounded. Modules of another method than the adapter's or
    without a rank are ignored, except LoRA's.
    """
    name, divisor = SCALED[adapter.method], math.sqrt if config.get("use_rslora") else float
    wanted = {
        as_target(p, adapter): (h.rank, h.scale) for p, h in adapter.modules.items()
        if isinstance(h, LowRank) or (h.method == adapter.method and h.rank and h.scale is not None)
    }  # fmt: skip
    if not wanted:
        return

    def is_right(path: str, rank: int, scale: Any) -> bool:
        """Return True if the config gives the module at `path` this rank and, to a relative 1e-12, this scale."""
        r, alpha = find_rank_and_alpha(config, path, name)
        return r == rank and math.isclose(alpha / divisor(r), scale, rel_tol=1e-12)

    if "r" in config and all(is_right(p, *numbers) for p, numbers in wanted.items()):
        return
    r = Counter(r for r, _ in wanted.values()).most_common(1)[0][0]
    alphas = {p: round_alpha((s or 0.0) * divisor(k)) for p, (k, s) in wanted.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config |= {
        "r": r, name: alpha,
        "rank_pattern": {key_of(p, wanted): k for p, (k, _) in wanted.items() if k != r},
        "alpha_pattern": {key_of(p, wanted): a for p, a in alphas.items() if a != alpha},
    }  # fmt: skip


def round_alpha(value: float) -> float:
    """Return alpha without the noise of a division: a whole number as int if it is one to 10 decimals.

    Else rounded to 10 decimals if that differs by less than a relative 1e-12, else unchanged.
    """
    near = round(value, 10)
    return int(near) if near == int(near) else near if math.isclose(near, value, rel_tol=1e-12) else value


def key_of(path: str, paths: Iterable[str]) -> str:
    """Return the pattern of one module: its path, escaped except for "_", or "^path", not escaped, if another path ends
    with ".path".
    """
    twice = any(p != path and p.endswith(f".{path}") for p in paths)
    return re.escape(path).replace(r"\_", "_") if not twice else f"^{path}"


# stacks of experts in files of servers, and of tinker: 3-D factors under names of parameters or of parts of them

OF_SERVERS = re.compile(r".*\bexperts\.(gate_up_proj|gate_proj|up_proj|down_proj|w[123])\.lora_[AB]\.weight")


UNEMBED = re.compile(r"(?:model\.)?unembed_tokens(?=\.lora_)")  # tinker's name of the head


def rename_from_tinker(tensors: Mapping[str, Tensor], base: Base | None) -> dict[str, Tensor]:
    """Return a new dict of tensors by the model's names: tinker has other names for the head and gpt-oss's attention.

    Unchanged if the base has a module `unembed_tokens`, or no name is tinker's or a server's. Else the head becomes
    `lm_head`. `.attn.` becomes `.self_attn.` only if modules of the base are in a `self_attn` and none in an `attn`.
    """
    renames_head = base is not None and any(m.rpartition(".")[2] == "unembed_tokens" for m in base.modules)
    if renames_head or not any(UNEMBED.search(key) or OF_SERVERS.fullmatch(key) for key in tensors):
        return dict(tensors)
    known = set() if base is None else {m.rpartition(".")[0].rpartition(".")[2] for m in base.modules}
    out = {}
    for key, t in tensors.items():
        name = UNEMBED.sub("lm_head", key)
        if "self_attn" in known and "attn" not in known:
            name = name.replace(".attn.", ".self_attn.")
        out[name] = t
    return out


def convert_served(
    tensors: Mapping[str, Tensor], config: Json, base: Base | None, what: str
) -> tuple[dict[str, Tensor], Json]:
    """Return tensors and config of a file in a server's layout, as PEFT has them.

    The base's model is the loaded one, else it is built on the meta device. The config is that of a LoraConfig with the
    conversion's changes.

    Args:
        what: the file, for errors.

    Raises:
        BaseNeededError: there is no base, and its class is needed to tell rows of gate from rows of up.
        CheckpointError: transformers does not know the base.
    """
    if base is None:
        raise BaseNeededError(
            f"{what} has experts as servers hold them, and only the base tells their rows apart. Give it (--base)."
        )
    from graft import PeftConfig
    from graft.files.pickles import from_torch, to_torch
    from graft.files.skeleton import build_meta_model
    from graft.io.servers import convert_server_layout

    model = base.model or build_meta_model(base.path)
    if model is None:
        raise CheckpointError(
            f"{what} has experts as servers hold them, and transformers does not know {base.path}. Update transformers."
        )
    lora_config: Any = PeftConfig.resolve("LORA")(**{k: v for k, v in config.items() if k != "peft_type"})
    state = convert_server_layout({key: to_torch(t) for key, t in tensors.items()}, lora_config, model)
    return {key: from_torch(t, f"'{key}' in {what}") for key, t in state.items()}, lora_config.to_file_dict()
