# SPDX-License-Identifier: Apache-2.0
"""Bottlenecks of AdapterHub's adapters: their keys name modules of their own, which stand at places of the base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields as fields_of
from typing import Any

from graft.core.errors import CheckpointError, some
from graft.files.errors import BaseNeededError
from graft.files.formats import Base
from graft.files.neutral import AdapterFile, Other
from graft.files.tensors import Tensor
from graft.methods.bottleneck import PLACES, BottleneckConfig, embedded, of_block
from graft.methods.places import Block, blocks_in

KEY = re.compile(r"(?P<place>.+?)\.adapters\.(?P<name>[^.]+)\.(?P<leaf>.+)")
INVERTIBLE = re.compile(
    r"(?:(?P<place>.+)\.)?invertible_adapters\.(?P<name>[^.]+)\.(?P<net>[FG])\.(?P<i>[02])\.(?P<leaf>.+)"
)
RULE = re.compile(r"(?:.+\.)?shared_parameters\.(?P<name>[^.]+)\.phm_rule")
SUBLAYER = re.compile(r"\.block\.\d+\.layer\.(\d)$")  # T5's
# their fields that graft's config lacks, and the values that it stands for
ONLY: dict[str, tuple[Any, ...]] = {
    "ln_after": (False,), "adapter_residual_before_ln": (False,), "factorized_phm_W": (True, None),
    "shared_W_phm": (False, None), "shared_phm_rule": (True, None), "factorized_phm_rule": (False, None),
    "phm_rank": (1, None), "phm_bias": (True, None),
}  # fmt: skip
NORMS = {"original_ln_before": False, "original_ln_after": True, "residual_before_ln": True}  # and their defaults
KNOWN = ((True, True, True), (False, True, True), (True, False, False))  # Pfeiffer, Houlsby, AdapterPlus


def read(path: str, fields: dict[str, Any], held: Mapping[str, Tensor], base: Base | None) -> AdapterFile:
    """Read a bottleneck.

    Raises:
        BaseNeededError: the base is not there, whose names tell where it stands.
        CheckpointError: the config says what graft has not, or the base has no such places.
    """
    if base is None:
        raise BaseNeededError(f"{path} names places, and not modules: give the base model (--base).")
    cfg = config_of(path, fields["config"])
    out = AdapterFile("adapterhub", path, "BOTTLENECK", base=fields.get("model_name") or None)
    linears = {
        key.removesuffix(".weight"): (shape[0], shape[1])
        for key, shape in base.shapes.items()
        if key.endswith(".weight") and len(shape) == 2
    }
    blocks = blocks_in(linears, list(base.modules))
    modules: dict[str, dict[str, Tensor]] = {}
    for key, values in held.items():
        where = placed(key, cfg, blocks, base)
        if where is None:
            out.unread.append(key)
        elif where[1] == "":
            out.shared[where[0]] = values
        elif where[1] != SAME:
            modules.setdefault(where[0], {})[where[1]] = values
    if cfg.phm_layer and not out.shared:
        raise CheckpointError(
            f"{path} lacks what its Compacter layers share (phm_rule), which adapters 1.3.0 does not save: the file "
            "alone is not the adapter."
        )
    out.modules = {module: Other("BOTTLENECK", tensors) for module, tensors in modules.items()}
    out.selected = frozenset(out.modules)
    own = {f.name: getattr(cfg, f.name) for f in fields_of(BottleneckConfig) if f.name in fields["config"]}
    out.config = {"peft_type": "BOTTLENECK", "target_modules": PLACES, "inference_mode": True, **own}
    return out


def config_of(path: str, theirs: dict[str, Any]) -> BottleneckConfig:
    strange = [f"{name}={theirs[name]!r}" for name, good in ONLY.items() if theirs.get(name, good[0]) not in good]
    norms = {name: theirs.get(name, default) for name, default in NORMS.items()}
    if not theirs.get("is_parallel") and tuple(norms.values()) not in KNOWN:
        strange += [f"{name}={value}" for name, value in norms.items()]
    if strange:
        raise CheckpointError(f"{path} is a bottleneck of a kind that graft has not: {some(strange)}.")
    known = {f.name for f in fields_of(BottleneckConfig)} - {"peft_type", "task_type"}
    given = {name: value for name, value in theirs.items() if name in known and value is not None}
    return BottleneckConfig(**given)


SAME = "same"  # a tensor that stands under another key, too


def placed(key: str, cfg: BottleneckConfig, blocks: list[Block], base: Base) -> tuple[str, str] | None:
    """Return the module and the name of a tensor there; the name is "" for one of the whole model."""
    if RULE.fullmatch(key):
        return "bottleneck_rule", ""
    if match := INVERTIBLE.fullmatch(key):
        return embedding(base), f"bottleneck_inv.{match['net']}.{int(match['i']) // 2}.{match['leaf']}"
    match = KEY.fullmatch(key)
    number = None if match is None else re.search(r"\d+", match["place"])
    if match is None or number is None:
        return None
    leaf = leaf_of(match["leaf"], cfg)
    place = match["place"]
    parts = [b for b in blocks if ("decoder" in b.path) == ("decoder" in place)] or blocks
    if leaf is None or int(number[0]) >= len(parts):
        return None
    block = parts[int(number[0])]
    return site_of(place, block, cfg, base), leaf


def site_of(place: str, block: Block, cfg: BottleneckConfig, base: Base) -> str:
    """Return the module of a block at which a module of theirs stands."""
    sublayer = SUBLAYER.search(f".{place}")
    if sublayer:
        last = 2 if block.crosses else 1
        kind = {0: "attention", last: "mlp"}.get(int(sublayer[1]), "cross")
    else:
        kind = "cross" if "cross" in place else "attention" if "attention" in place else "mlp"
    if kind != "mlp":
        return (block.crosses if kind == "cross" else block.attentions)[0]
    norm = block.norm_after_mlp(str(base.config.get("model_type")))
    places = of_block(cfg, 0, block, norm)
    ends = {*block.attentions, *block.crosses}
    return next(path for path, found in places.items() if found.role != "tap" and path not in ends)


def leaf_of(leaf: str, cfg: BottleneckConfig) -> str | None:
    """Return graft's name of a tensor of a bottleneck."""
    if leaf == "scaling":
        return "bottleneck_scale"
    head, _, rest = leaf.partition(".")
    if head == "adapter_down":
        i, _, rest = rest.partition(".")
        if cfg.ln_before and i == "0":
            return SAME
        return f"bottleneck_down.{rest}"
    names = {"adapter_up": "bottleneck_up", "gate": "bottleneck_gate", "adapter_norm_before": "bottleneck_norm"}
    return f"{names[head]}.{rest}" if head in names else None


def embedding(base: Base) -> str:
    """Return the module whose output is the embedding of the input."""
    ends = ("word_embeddings", "embed_tokens", "wte")
    found = [m for m in base.modules if m.rpartition(".")[2] in ends]
    place = embedded(found, set(base.modules))
    if place is None:
        raise CheckpointError(f"{base.path} has no embedding for an invertible adapter: none of {', '.join(ends)}.")
    return place
