# SPDX-License-Identifier: Apache-2.0
"""Old names of experts, one module each, in configs and files for models that hold all experts of a block as one stack.

transformers 5 fuses them: of each expert, the matrices that act on the same input stand in one, below each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from graft.core.errors import ConfigError
from graft.inject.match import Names
from graft.inject.survey import Tree
from graft.inject.targets import all_linear, model_type
from graft.storage import innermost


class Fused(NamedTuple):
    """A stack of matrices of a module, and the names that its parts had in each expert, from above."""

    parameter: str
    parts: tuple[str, ...]


FAMILIES: dict[str, tuple[Fused, ...]] = {
    "mixtral": (Fused("gate_up_proj", ("w1", "w3")), Fused("down_proj", ("w2",))),
    "qwen2_moe": (Fused("gate_up_proj", ("gate_proj", "up_proj")), Fused("down_proj", ("down_proj",))),
}
FIRST_TYPES = ("mixtral", "minimax", "minimax_m2")  # of the first family, by model_type
ROUTER, ROUTER_WEIGHT = "gate", "gate.weight"  # of the first family; it was a linear layer
OLD_BLOCK, BLOCK = ".block_sparse_moe.", ".mlp."  # names of the module around the experts
OF_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>\w+)\.lora_[AB]\.weight")


def stacks(tree: Tree) -> dict[str, Any]:
    """Return the modules that hold fused experts, by path."""
    found = {}
    for path, module in tree.modules.items():
        own = innermost(module)._parameters
        down = own.get("down_proj")
        if down is not None and "gate_up_proj" in own and down.dim() == 3:
            found[path] = module
    return found


def current(path: str) -> str:
    """Return a path with the name that the block has today."""
    return path.replace(OLD_BLOCK, BLOCK)


def convert(cfg: Any, model: Any, tree: Tree, keys: Iterable[str]) -> None:
    """Rewrite a config that names experts by their old names, so that it names the stacks.

    The stacks get the rank of all parts together, as a file's matrices of the parts are put side by side.

    Args:
        keys: of the file from which values will come. Those of the second family count only if the file has them, as
            other modules of today's models have the same names.

    Raises:
        ConfigError: of matrices that are fused the config names only some.
    """
    targets, in_file = cfg.target_modules, parts_in(keys)
    by_regex = isinstance(targets, str)
    named = set() if targets is None or by_regex else set(targets)
    first, second = (parts_of(family) for family in FAMILIES.values())
    if not (by_regex or named & first or in_file):
        return
    found = stacks(tree)
    if not found:
        return
    if by_regex:
        named = leaves(targets, found, model, cfg, tree)
    if (named | in_file) & first:
        rewrite(cfg, FAMILIES["mixtral"], (named | in_file) & first)
        cfg.target_modules = named - first - {ROUTER}
        if ROUTER in named:
            cfg.target_parameters |= {ROUTER_WEIGHT}
    elif in_file & second:
        rewrite(cfg, FAMILIES["qwen2_moe"], in_file & second)


def parts_of(family: tuple[Fused, ...]) -> set[str]:
    return {part for fused in family for part in fused.parts}


def leaves(targets: str, found: dict[str, Any], model: Any, cfg: Any, tree: Tree) -> set[str]:
    """Return the last names of the modules that a regex, or "all-linear", would have chosen in the old model."""
    old: dict[str, str] = {}
    for path, module in found.items():
        count = len(innermost(module)._parameters["down_proj"])  # type: ignore[arg-type]
        block = path.removesuffix(".experts").replace(BLOCK.rstrip("."), OLD_BLOCK.rstrip("."))
        old |= {f"{block}.experts.{e}.{n}": n for e in range(count) for n in ("w1", "w2", "w3")}
        old[f"{block}.{ROUTER}"] = ROUTER
    if targets.lower() == "all-linear":
        if model_type(model) not in FIRST_TYPES:
            return set()
        return {path.rpartition(".")[2] for path in all_linear(cfg, model, tree.modules)} | set(old.values())
    chosen = Names(targets)
    hit = {name for path, name in old.items() if chosen.find(path) is not None}
    if not hit & {"w1", "w2", "w3"}:
        return set()
    return hit | {path.rpartition(".")[2] for path in tree.modules if chosen.find(path) is not None}


def parts_in(keys: Iterable[str]) -> set[str]:
    """Return the old names of experts' matrices that a file's keys hold."""
    return {match["part"] for key in keys if (match := OF_EXPERT.fullmatch(key)) is not None}


def rewrite(cfg: Any, family: tuple[Fused, ...], named: set[str]) -> None:
    """Put the stacks of which the config names all parts into `target_parameters`, with ranks and alphas."""
    parameters = set(cfg.target_parameters or ())
    ranks, alphas = dict(cfg.rank_pattern), dict(cfg.alpha_pattern)
    for fused in family:
        have = [part for part in fused.parts if part in named]
        missing = [part for part in fused.parts if part not in named]
        if not have:
            continue
        if missing:
            raise ConfigError(
                f"Cannot convert PEFT target(s) {', '.join(have)} without also targeting {', '.join(missing)} because "
                f"they are fused into {fused.parameter}."
            )
        parameters.add(f"experts.{fused.parameter}" if fused.parameter in named else fused.parameter)
        n = len(fused.parts)
        if n > 1:
            pattern = rf".*\.{fused.parameter}"
            ranks.setdefault(pattern, cfg.r * n)
            alphas.setdefault(pattern, cfg.lora_alpha * n)
    cfg.target_parameters, cfg.rank_pattern, cfg.alpha_pattern = parameters, ranks, alphas
