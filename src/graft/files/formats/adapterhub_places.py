# SPDX-License-Identifier: Apache-2.0
"""Bottlenecks, ReFT and fusion of AdapterHub's adapters: their keys name AdapterHub's modules, at places of a base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields as fields_of
from typing import Any

import torch

from graft import BottleneckConfig, CheckpointError, ReftConfig
from graft.config.reading import Json
from graft.core.errors import join_some
from graft.files.bases import view_by_model_names
from graft.files.errors import BaseNeededError, make_damage_error, make_misfit_error
from graft.files.formats import Base
from graft.files.neutral import AdapterFile, OtherMethod
from graft.files.pickles import from_torch, to_torch
from graft.files.tensors import Tensor
from graft.methods.places import Block, blocks_in, find_embedding_output, walk

KEY = re.compile(r"(?P<place>.+?)\.adapters\.(?P<name>[^.]+)\.(?P<leaf>.+)")
INVERTIBLE = re.compile(
    r"(?:(?P<place>.+)\.)?invertible_adapters\.(?P<name>[^.]+)\.(?P<net>[FG])\.(?P<i>[02])\.(?P<leaf>.+)"
)
REFT = re.compile(r"(?P<place>.+)\.reft_layer\.refts\.[^.]+\.units\.(?P<unit>[01])\.(?P<leaf>.+)")
FUSED = re.compile(r"(?P<place>.+?)\.adapter_fusion_layer\.[^.]+\.(?P<leaf>(query|key|value)\.(weight|bias))")
RULE = re.compile(r"(?:.+\.)?shared_parameters\.(?P<name>[^.]+)\.phm_rule")
SUBLAYER = re.compile(r"\.block\.\d+\.layer\.(\d)$")  # T5's
# their fields that graft's config lacks → values that mean graft's behaviour; the first is their default
ONLY: dict[str, tuple[object, ...]] = {
    "ln_after": (False,), "adapter_residual_before_ln": (False,), "factorized_phm_W": (True, None),
    "shared_W_phm": (False, None), "shared_phm_rule": (True, None), "factorized_phm_rule": (False, None),
    "phm_rank": (1, None), "phm_bias": (True, None),
}  # fmt: skip
FUSION: dict[str, tuple[object, ...]] = {
    "query": (True,), "key": (True,), "query_before_ln": (False,), "residual_before": (False,), "temperature": (False,),
}  # fmt: skip
# by type of model that tests compare: field values that AdapterHub's library puts at another place than graft
COMPARED: dict[str, dict[str, object]] = {
    "albert": {"mh_adapter": True}, "bart": {}, "beit": {"original_ln_before": False}, "bert": {},
    "bert-generation": {}, "clip_text_model": {}, "clip_vision_model": {}, "deberta-v2": {}, "distilbert": {},
    "electra": {}, "gemma2": {"original_ln_before": True}, "gemma3_text": {"original_ln_before": True}, "gpt2": {},
    "gptj": {"is_parallel": True}, "llama": {}, "mbart": {}, "mistral": {}, "mt5": {},
    "phi": {"original_ln_before": True, "is_parallel": True}, "plbart": {}, "qwen2": {}, "qwen3": {}, "roberta": {},
    "t5": {}, "vit": {}, "whisper": {}, "xlm-roberta": {},
}  # fmt: skip
TURNED = "parametrizations.weight"  # torch's, of a weight that it keeps orthonormal
NORMS = {"original_ln_before": False, "original_ln_after": True, "residual_before_ln": True}  # and their defaults
KNOWN = ((True, True, True), (False, True, True), (True, False, False))  # Pfeiffer, Houlsby, AdapterPlus


def read(path: str, fields: Json, by_name: Mapping[str, Tensor], base: Base | None) -> AdapterFile:
    """Read a bottleneck, or ReFT.

    The config has the fields that the file has. Keys without a place go to `unknown_keys`; the tensors that all phm
    layers share go to `shared`.

    Raises:
        BaseNeededError: there is no base to tell the adapter's places, or no library makes a model of it.
        BaseModelMismatchError: the base's model lacks blocks of its files.
        CheckpointError: the config has a value that graft lacks, tests do not compare the base's type with AdapterHub's
            library, or shared tensors are missing.
    """
    blocks, base = find_base_blocks(path, base)
    if fields["config"].get("architecture") == "reft":
        check_compared(path, base, None)
        return read_reft(path, fields, by_name, blocks)
    cfg = make_bottleneck_config(path, fields["config"])
    check_compared(path, base, cfg)
    blocks = follow_blocks(path, blocks, base)
    out = AdapterFile("adapterhub", path, "BOTTLENECK", base=fields.get("model_name") or None)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, values in by_name.items():
        where = place_tensor(key, cfg, blocks, base)
        if where is None:
            out.unknown_keys.append(key)
        elif where[1] == "":
            out.shared[where[0]] = values
        elif where[1] != SAME:
            modules.setdefault(where[0], {})[where[1]] = values
    if cfg.phm_layer and not out.shared:
        raise CheckpointError(
            f"{path} lacks the shared phm_rule of Compacter layers, which adapters 1.3.0 does not save. Train it anew."
        )
    options_of_file = {f.name: getattr(cfg, f.name) for f in fields_of(BottleneckConfig) if f.name in fields["config"]}
    return set_modules(out, modules, options_of_file)


def check_compared(path: str, base: Base, cfg: BottleneckConfig | None) -> None:
    """Raise CheckpointError if tests do not compare the adapter with AdapterHub's library on a model of the base's
    type: its `model_type` is not in `COMPARED`.

    Also if the config has a field's value from `COMPARED`, which puts it at another place there. ReFT of an encoder and
    a decoder is refused, too.

    Args:
        cfg: None for ReFT.
    """
    kind = str(base.config.get("model_type"))
    if kind not in COMPARED:
        raise CheckpointError(
            f"{path} is for a model of type {kind!r}: no test compares graft's places there with AdapterHub's. "
            "Train it anew, or take one of the types in docs/reference/formats.md."
        )
    if cfg is None and base.config.get("is_encoder_decoder"):
        raise CheckpointError(
            f"{path} is ReFT of an encoder and a decoder: AdapterHub's library applies the encoder's positions to "
            "both. Train it anew: graft.ReftConfig."
        )
    wrong = [f"{name}={value}" for name, value in COMPARED[kind].items() if cfg and getattr(cfg, name) == value]
    if wrong:
        raise CheckpointError(
            f"{path} has {' and '.join(wrong)}: AdapterHub's library acts at another place than graft in a model of "
            f"type {kind!r}. Train it anew: graft.BottleneckConfig."
        )


def set_modules(out: AdapterFile, modules: Mapping[str, dict[str, Tensor]], options: Json) -> AdapterFile:
    """Set the modules of `out`, as its method, `selected` to all of them, and its config; return `out`.

    The config is new: `peft_type`, targets "places", `inference_mode` True, then `options`, which override these.
    """
    out.modules = {module: OtherMethod(out.method, tensors) for module, tensors in modules.items()}
    out.selected = frozenset(out.modules)
    out.config = {"peft_type": out.method, "target_modules": "places", "inference_mode": True, **options}
    return out


def find_base_blocks(path: str, base: Base | None) -> tuple[list[Block], Base]:
    """Return the base's blocks, found by its 2-D weights and module names, [] if there are none, and the base
    unchanged.

    Raises:
        BaseNeededError: `base` is None.
    """
    if base is None:
        raise BaseNeededError(f"{path} is for blocks that only a base names. Give the base model (--base).")
    matrices = {key: shape for key, shape in base.shapes.items() if key.endswith(".weight") and len(shape) == 2}
    linears = {key.removesuffix(".weight"): (shape[0], shape[1]) for key, shape in matrices.items()}
    return blocks_in(linears, list(base.modules), base.config), base


def follow_blocks(path: str, blocks: list[Block], base: Base) -> list[Block]:
    """Return copies of the blocks with facts from the code of the base's model: a loaded model's, or else one that is
    built from the base's config.

    Raises:
        BaseNeededError: no library makes a model of the base.
        BaseModelMismatchError: the model lacks some of the blocks.
    """
    view: Any = base if base.model is not None else view_by_model_names(base)
    if view is None or view.model is None:
        raise BaseNeededError(
            f"{path} depends on the code of its base, and no installed library makes a model of {base.path}. Load the "
            "model, and the adapter onto it: graft.load_adapter(model, path)."
        )
    modules = dict(walk(view.model))
    if missing := [block.path for block in blocks if block.path not in modules]:
        raise make_misfit_error(f"{base.path} has blocks {join_some(missing)} in its files that its model lacks")
    return [block.follow(modules[block.path]) for block in blocks]


def read_reft(path: str, fields: Json, by_name: Mapping[str, Tensor], blocks: list[Block]) -> AdapterFile:
    """Return the ReFT adapter of a file, with graft's names of tensors in the base's blocks.

    An orthonormal R is computed from torch's parametrization if there is no plain R. Unit "1" acts on the suffix, all
    others on the prefix. Units for positions that the config leaves out have no effect and are dropped; with
    `tied_weights`, the prefix's stays. Keys without a block go to `unknown_keys`.

    Raises:
        CheckpointError: a tensor of a unit is missing.
    """
    out = AdapterFile("adapterhub", path, "REFT", base=fields.get("model_name") or None)
    known = {f.name for f in fields_of(ReftConfig)} - {"peft_type", "task_type"}
    options = {name: value for name, value in fields["config"].items() if name in known and value is not None}
    cfg = ReftConfig(**options)
    units: dict[tuple[str, str], dict[str, Tensor]] = {}
    modules: dict[str, dict[str, Tensor]] = {}
    for key, values in by_name.items():
        match = REFT.fullmatch(key)
        block = None if match is None else block_of(match["place"], blocks)
        if match is None or block is None:
            out.unknown_keys.append(key)
        else:
            units.setdefault((block.path, match["unit"]), {})[match["leaf"]] = values
    for (module, unit), leaves in units.items():
        if not (cfg.suffix_positions if unit == "1" else cfg.prefix_positions or cfg.tied_weights):
            continue  # it has no effect
        end = "_suffix" if unit == "1" else ""
        try:
            named = {f"reft_A{end}.{leaf}": leaves[f"learned_source.{leaf}"] for leaf in ("weight", "bias")}
            if (R := leaves.get("projection.weight")) is None:
                R = from_torch(compute_orthonormal_weight(leaves, "projection"), "reft_R")
            named[f"reft_R{end}"] = R
        except KeyError as e:
            raise make_damage_error(f"{path} lacks {e} of '{module}': it is cut off, or was written wrong") from None
        modules.setdefault(module, {}).update(named)
    return set_modules(out, modules, options)


def read_fusion(path: str, fields: Json, by_name: Mapping[str, Tensor], base: Base | None) -> AdapterFile:
    """Read a fusion of bottlenecks that the model has.

    The names are those of `adapter_names`, else of `name`, split at commas.

    Tensors in blocks that all bottlenecks leave out have no effect and are dropped; keys without a block go to
    `unknown_keys`. Sites are those of the first bottleneck. Missing fields are taken as value True and no
    regularization. A falsy `dropout_prob` becomes the base's attention dropout, else 0.

    Raises:
        CheckpointError: the config has a value that graft lacks, which is checked first; or, last, `check_compared`
            refuses a bottleneck.
        BaseNeededError: there is no base, or no library makes a model of it, or it lacks one of the bottlenecks.
        BaseModelMismatchError: the base's model lacks blocks of its files.
    """
    their_config, names = fields["config"], list(fields.get("adapter_names") or str(fields.get("name")).split(","))
    strange = [
        f"{name}={their_config[name]!r}" for name, good in FUSION.items() if their_config.get(name, good[0]) not in good
    ]
    if strange:
        raise CheckpointError(
            f"{path} is a fusion of a kind that graft has not: {join_some(strange)}. Use AdapterHub's library."
        )
    blocks, base = find_base_blocks(path, base)
    known: Mapping[str, Any] = base.adapters
    missing = [name for name in names if not isinstance(known.get(name), BottleneckConfig)]
    if missing:
        raise BaseNeededError(
            f"{path} fuses adapters {names}, which say where it stands, and the model lacks {missing}. Load them by "
            "these names before, into a PeftMixedModel."
        )
    for name in names:
        check_compared(path, base, known[name])
    blocks = follow_blocks(path, blocks, base)
    out = AdapterFile("adapterhub", path, "ADAPTER_FUSION", base=fields.get("model_name") or None)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, values in by_name.items():
        match = FUSED.fullmatch(key)
        block = None if match is None else block_of(match["place"], blocks)
        if match is None or block is None:
            out.unknown_keys.append(key)
        elif not all(blocks.index(block) in known[name].leave_out for name in names):  # there it does nothing
            site = find_site(match["place"], block, known[names[0]])
            modules.setdefault(site, {})[f"fusion_{match['leaf']}"] = values
    value, regularization = bool(their_config.get("value", True)), bool(their_config.get("regularization"))
    settings = dict(adapters=names, value=value, regularization=regularization)
    settings["dropout"] = their_config.get("dropout_prob") or base.config.get("attention_probs_dropout_prob") or 0.0
    return set_modules(out, modules, settings)


def compute_orthonormal_weight(state: Mapping[str, Tensor], layer: str) -> torch.Tensor:
    """Return the weight of a layer that torch's parametrization keeps orthonormal, from its two saved tensors,
    detached.

    Raises KeyError if one of them is missing.
    """
    parts = {name: to_torch(state[f"{layer}.{TURNED}.{name}"]) for name in ("original", "0.base")}
    module = make_parametrized(*parts["original"].shape)
    module.load_state_dict({f"{TURNED}.{name}": t for name, t in parts.items()})
    return module.weight.detach()


def make_parametrized(*shape: int) -> torch.nn.Module:
    """Return a module with an orthonormal weight of this shape, random, and torch's parametrization on it."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.nn.init.orthogonal_(torch.empty(shape)))
    return torch.nn.utils.parametrizations.orthogonal(module)


def block_of(place: str, blocks: list[Block]) -> Block | None:
    """Return the block with the number that a path of AdapterHub's has first; None without a number, or for too high a
    one.

    If paths contain "decoder", only blocks on the same side (encoder or decoder) count, unless there are none.
    """
    number = re.search(r"\d{1,9}", place)
    parts = [b for b in blocks if ("decoder" in b.path) == ("decoder" in place)] or blocks
    return None if number is None or int(number[0]) >= len(parts) else parts[int(number[0])]


def make_bottleneck_config(path: str, theirs: Json) -> BottleneckConfig:
    """Return graft's config of a bottleneck, with AdapterHub's fields that both have and that are not None, except
    `peft_type` and `task_type`.

    Missing fields that are checked count as AdapterHub's default.

    Raises:
        CheckpointError: a field that graft lacks has another value than graft's behaviour, or the three fields of norms
            have an unknown combination (allowed if is_parallel). All such fields are listed.
    """
    strange = [f"{name}={theirs[name]!r}" for name, good in ONLY.items() if theirs.get(name, good[0]) not in good]
    norms = {name: theirs.get(name, default) for name, default in NORMS.items()}
    if not theirs.get("is_parallel") and tuple(norms.values()) not in KNOWN:
        strange += [f"{name}={value}" for name, value in norms.items()]
    if strange:
        raise CheckpointError(
            f"{path} is a bottleneck of a kind that graft has not: {join_some(strange)}. Use AdapterHub's library."
        )
    known = {f.name for f in fields_of(BottleneckConfig)} - {"peft_type", "task_type"}
    options = {name: value for name, value in theirs.items() if name in known and value is not None}
    return BottleneckConfig(**options)


SAME = "same"  # a tensor that is in the file under another key, too


def place_tensor(key: str, cfg: BottleneckConfig, blocks: list[Block], base: Base) -> tuple[str, str] | None:
    """Return the base's module and the tensor's name in it for a key of AdapterHub's file.

    None for a key of another form, in no block, or with an unknown last part.

    The name is SAME for a copy of another tensor. The rule that the whole model shares has the module "bottleneck_rule"
    and the name "". Tensors of an invertible adapter belong to the module of the embedding's output.

    Raises:
        CheckpointError: an invertible adapter, and a base without a single such embedding.
    """
    if RULE.fullmatch(key):
        return "bottleneck_rule", ""
    if match := INVERTIBLE.fullmatch(key):
        return find_embedding(base), f"bottleneck_inv.{match['net']}.{int(match['i']) // 2}.{match['leaf']}"
    match = KEY.fullmatch(key)
    block = None if match is None else block_of(match["place"], blocks)
    leaf = None if match is None else rename_leaf(match["leaf"], cfg)
    if match is None or block is None or leaf is None:
        return None
    return find_site(match["place"], block, cfg), leaf


def find_site(place: str, block: Block, cfg: BottleneckConfig) -> str:
    """Return the path in the base where AdapterHub's bottleneck at `place` acts.

    The part of the block is attention, cross attention or MLP: by those words in `place`, or for T5 by the number of
    its sub-layer (0, between, last). Attention's is the module at that part's end. The MLP's is the config's first
    place in the block that is no such end, taps excepted; StopIteration if there is none.
    """
    sublayer = SUBLAYER.search(f".{place}")
    if sublayer:
        last = len(block.ends)
        kind = {0: "attention", last: "mlp"}.get(int(sublayer[1]), "cross")
    else:
        kind = "cross" if "cross" in place else "attention" if "attention" in place else "mlp"
    if kind != "mlp":
        return block.ends_of(kind == "cross")[0]
    places = cfg.places_in_block(0, block)
    return next(path for path, spot in places.items() if spot.role != "tap" and path not in block.ends.values())


def rename_leaf(leaf: str, cfg: BottleneckConfig) -> str | None:
    """Return graft's name of a bottleneck's tensor for AdapterHub's `leaf`: scaling, adapter_down, adapter_up, gate and
    adapter_norm_before; None for others.

    Indices within `adapter_down` are left out.

    SAME for the layer norm at index 0 of `adapter_down` if the config has `ln_before`: the file holds it under another
    key, too.
    """
    if leaf == "scaling":
        return "bottleneck_scale"
    head, _, tail = leaf.partition(".")
    if head == "adapter_down":
        i, _, tail = tail.partition(".")
        if cfg.ln_before and i == "0":
            return SAME
        return f"bottleneck_down.{tail}"
    names = {"adapter_up": "bottleneck_up", "gate": "bottleneck_gate", "adapter_norm_before": "bottleneck_norm"}
    return f"{names[head]}.{tail}" if head in names else None


def find_embedding(base: Base) -> str:
    """Return the path of the module that outputs the embedding of the input, among modules named word_embeddings,
    embed_tokens or wte.

    Raises:
        CheckpointError: there is none, or the encoder shares it with the decoder.
    """
    ends = ("word_embeddings", "embed_tokens", "wte")
    matches = [m for m in base.modules if m.rpartition(".")[2] in ends]
    place = find_embedding_output(matches, set(base.modules), bool(base.config.get("is_encoder_decoder")))
    if place is None and any(f".{module}".endswith(".shared") for module in base.modules):
        raise CheckpointError(
            f"The encoder and the decoder of {base.path} have one module for their embeddings, and the invertible "
            "adapter of the file is only for the encoder's. Use transformers 5, where each has its own."
        )
    if place is None:
        raise CheckpointError(f"{base.path} has no embedding for an invertible adapter: none of {', '.join(ends)}.")
    return place
