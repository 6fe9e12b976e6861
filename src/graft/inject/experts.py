# SPDX-License-Identifier: Apache-2.0
"""Old names of experts, one module each, in configs and files for models that hold all experts of a block as one stack.

transformers 5 fuses them: of each expert, the matrices that act on the same input stand in one, below each other. Its
own table of conversions says which.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from torch import nn

from graft.config.base import PeftConfig
from graft.core.base_config import model_type
from graft.core.carrier import carrier_of
from graft.core.errors import ConfigError
from graft.core.ops import find_op
from graft.inject.match import Matcher, minimal_names
from graft.inject.survey import Tree, survey
from graft.inject.targets import ALL_LINEAR, all_linear
from graft.storage import DENSE, ExpertBlock, find_store, innermost

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform

OF_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>\w+)\.lora_[AB]\.weight")
PREFIX = "base_model.model."  # of a file's keys
BY_PEFT = ("mixtral", "qwen2_moe")  # whose conversions PEFT applies to configs: Mixtral itself, and who borrows them
ROUTER = "gate"  # beside the experts; it was a linear layer


class Place(NamedTuple):
    """The place of a matrix of experts in their stack."""

    stack: str  # path of the parameter
    row: int  # from above
    parts: tuple[str, ...]  # the names of all that stand there


class Experts:
    """The experts of a model: their stacks, and how transformers puts weights of older checkpoints into these.

    Args:
        tree: the survey of the model; None: a new one.
    """

    def __init__(self, model: Any, tree: Tree | None = None):
        self.model, self.tree = model, survey(model) if tree is None else tree
        self.renamings: list[WeightRenaming] = []
        self.converters: list[WeightConverter] = []
        self.by_peft = False  # PEFT rewrites configs by them
        self.names: set[str] = set()  # old names of what they put together, and of what stands beside it
        if "transformers" not in sys.modules or not hasattr(getattr(model, "config", None), "model_type"):
            return
        try:
            from transformers import conversion_mapping as theirs
            from transformers.core_model_loading import WeightRenaming
        except ImportError:  # before 5, where experts are modules
            return
        if hasattr(model, "base_model_prefix"):
            found = theirs.get_model_conversion_mapping(model, add_legacy=False)
        else:
            found = theirs.get_checkpoint_conversion_mapping(model_type(model)) or []
        self.renamings = [c for c in found if isinstance(c, WeightRenaming)]
        self.converters = [c for c in found if merges(c)]
        self.by_peft = is_by_peft(model)
        self.names = {part_of(p) for c in self.converters for p in c.source_patterns} | {ROUTER}

    @cached_property
    def stacks(self) -> list[Stack]:
        """The stacks of the model, with the old names of their parts."""
        return [*stacks(self.tree, self)]

    def place(self, experts: str, part: str, old: bool = True) -> Place | None:
        """Return where the matrices `<experts>.<number>.<part>` stand now; None if nowhere.

        Args:
            old: `experts` may be an old path, too.
        """
        name = f"{experts}.0.{part}.weight"
        for renaming in self.renamings if old else ():
            name, _ = renaming.rename_source_key(name)
        for converter in self.converters:
            stack, source = converter.rename_source_key(name)
            if source is not None:
                parts = tuple(part_of(pattern) for pattern in converter.source_patterns)
                return Place(stack, parts.index(part), parts) if part in parts else None
        return None

    def parts(self, path: str, name: str) -> tuple[str, ...]:
        """Return the names that the parts of a stack had in each expert, from above; () if it was none."""
        for converter in self.converters:
            part = part_of(converter.source_patterns[0])
            place = self.place(path, part, old=False)
            if place is not None and place.stack == f"{path}.{name}":
                return place.parts
        return ()

    def before(self, path: str) -> str:
        """Return the name that a module had."""
        name = f"{path}.weight"
        for renaming in reversed(self.renamings):
            name, _ = renaming.reverse_transform().rename_source_key(name)
        return name.removesuffix(".weight")


def is_by_peft(model: object) -> bool:
    """Return True if PEFT rewrites configs for a model that name experts by their old names."""
    theirs = sys.modules.get("transformers.conversion_mapping")  # with transformers 5 and later, by each of its models
    kind = getattr(getattr(model, "config", None), "model_type", None)
    families = getattr(theirs, "_MODEL_TO_CONVERSION_PATTERN", {})
    return theirs is not None and (kind == BY_PEFT[0] or families.get(kind) in BY_PEFT)


def merges(conversion: WeightTransform) -> TypeGuard[WeightConverter]:
    """Return True if a conversion puts the weights of many modules together into one tensor."""
    operations = getattr(conversion, "operations", ())
    return len(conversion.target_patterns) == 1 and any(type(o).__name__ == "MergeModulelist" for o in operations)


def part_of(pattern: str) -> str:
    """Return the last name of the modules that a pattern such as `.experts.*.w1.weight` means."""
    return pattern.replace("\\", "").removesuffix(".weight").rpartition(".")[2]


class Stack(NamedTuple):
    """A stack of matrices, one of each expert, that is a parameter of a module."""

    module: str  # its path
    parameter: str
    size: int
    parts: tuple[str, ...]  # old names of what stands in it, () if transformers' table has none

    @property
    def path(self) -> str:
        return f"{self.module}.{self.parameter}"

    @property
    def names(self) -> set[str]:
        """The names by which a config may mean it: `gate_up_proj` is `gate_proj` and `up_proj`."""
        *parts, kind = self.parameter.split("_")
        return {*self.parts, self.parameter, *(f"{part}_{kind}" for part in parts)}


def stacks(tree: Tree, experts: Experts | None = None) -> Iterator[Stack]:
    """Yield the stacks of a model."""
    for path, module in tree.modules.items():
        if not path.rpartition(".")[2].endswith("experts"):
            continue
        base = innermost(module)
        block = ExpertBlock(base)
        packed = {name: shape[0] for name in block.packed if (shape := block.packed_shape(name)) is not None}
        dense = {} if packed else {n: len(p) for n, p in base._parameters.items() if p is not None and p.dim() == 3}
        for name, size in (packed | dense).items():
            if name != "weight":
                yield Stack(path, name, size, () if experts is None else experts.parts(path, name))


@dataclass
class LeftOut:
    """What a config names and does not reach: experts, and layers that files could not hold for PEFT."""

    stacks: list[Stack] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)  # paths
    names: set[str] = field(default_factory=set)  # entries of target_modules that mean experts

    @property
    def of_experts(self) -> str:
        """The text for a warning, or an error; '' if none is left out."""
        if not self.stacks:
            return ""
        wanted = sorted({f"{s.module.rpartition('.')[2]}.{s.parameter}" for s in self.stacks})
        return (
            f"target_modules={sorted(self.names)} leaves the experts out, which are no modules here but parameters: "
            f"target_parameters={wanted} adapts them."
        )

    @property
    def of_layers(self) -> str:
        if not self.layers:
            return ""
        wanted = [f"{path}.weight" for path in self.layers]
        return (
            f"Experts are adapted, and {', '.join(self.layers[:3])}{', …' * (len(self.layers) > 3)} left out, as PEFT "
            "does: it would not load them from a file. To adapt them as well, name them in target_parameters, such as "
            f"'{wanted[0]}'."
        )


def convert(cfg: Any, model: nn.Module, tree: Tree, keys: Collection[str] | None) -> LeftOut:
    """Rewrite a config that names experts by their old names, so that it names the stacks; return what is left out.

    The stacks get the rank of all parts together, as a file's matrices of the parts are put side by side. PEFT drops
    the other modules of these names (dense layers, shared experts); here they become targets by their weights, of
    which files have the same names.

    Args:
        keys: of the file from which values will come, which say what is adapted; None: a new adapter.

    Raises:
        ConfigError: of matrices that are fused the config names only some.
    """
    left = LeftOut()
    if cfg.peft_type != "LORA" or cfg.target_modules is None or not (is_by_peft(model) or any(stacks(tree))):
        return left
    experts = Experts(model, tree)
    every, chosen = experts.stacks, Chosen(cfg, experts)
    if keys is None:
        parts_by_stack = {stack: chosen.parts(stack) for stack in every}
        moved = chosen.modules()
        named = {part for parts in parts_by_stack.values() for part in parts}
        alone = named.isdisjoint(path.rpartition(".")[2] for path in moved)  # so that the names mean experts
        alone = alone and bool(named) and chosen.linear is None
        if not (named or moved) or not (experts.by_peft or alone):
            left.stacks = [stack for stack in every if chosen.means(stack)]
            left.names = chosen.entries({name for stack in left.stacks for name in stack.names})
            return left
    else:
        parts_by_stack = stacks_in(keys, experts)
        moved = chosen.modules() if parts_by_stack else []
    parts_by_stack = {stack: parts for stack, parts in parts_by_stack.items() if parts}
    if not parts_by_stack and not moved:
        return left
    for stack, parts in parts_by_stack.items():
        if missing := [part for part in stack.parts if part not in parts]:
            raise ConfigError(
                f"Cannot convert PEFT target(s) {', '.join(parts)} without also targeting {', '.join(missing)} because "
                f"they are fused into {stack.parameter}."
            )
    weights = [path for path in moved if has_plain_weight(tree.modules[path], path, tree)]
    left.layers = [path for path in moved if path not in weights]
    rename_patterns(cfg, parts_by_stack, weights, tree)
    rest = chosen.rest(moved)
    if keys is not None:  # the file has them
        rest |= shortest(left.layers, [*tree.modules])
        left.layers = []
    cfg.target_parameters = {
        *(cfg.target_parameters or ()),
        *shortest([stack.path for stack in parts_by_stack], [stack.path for stack in every]),
        *shortest([f"{path}.weight" for path in weights], [f"{path}.weight" for path in tree.modules]),
    }
    cfg.target_modules = rest
    return left


class Chosen:
    """What the `target_modules` of a config mean in a model, and in the one that it was."""

    def __init__(self, cfg: Any, experts: Experts):
        self.cfg, self.experts, self.tree = cfg, experts, experts.tree
        self.matcher = Matcher(cfg)
        self.regex = isinstance(cfg.target_modules, str)
        self.linear: set[str] | None = None
        if self.regex and cfg.target_modules.lower() == ALL_LINEAR:
            self.linear = all_linear(cfg, experts.model, self.tree.modules)

    def finds(self, path: str) -> bool:
        return path in self.linear if self.linear is not None else self.matcher(path).outcome == "matched"

    def parts(self, stack: Stack) -> list[str]:
        """Return the parts of a stack that are chosen in some expert."""
        if self.linear is not None:
            return [*stack.parts]
        return [part for part in stack.parts if any(map(self.finds, self._paths(stack, part)))]

    def means(self, stack: Stack) -> bool:
        """Return True if a stack is meant, and not named in `target_parameters`."""
        if self.linear is not None or Matcher(self.cfg, parameters=True)(stack.path).outcome == "matched":
            return False
        return any(self.finds(path) for name in stack.names for path in self._paths(stack, name))

    def entries(self, names: set[str]) -> set[str]:
        """Return the entries that end with one of these names; a regex as it is."""
        if self.regex:
            return {self.cfg.target_modules}
        return {entry for entry in self.cfg.target_modules if entry.rpartition(".")[2] in names}

    def modules(self) -> list[str]:
        """Return the paths of the chosen modules that have an old name of experts or routers."""
        named = [path for path in self.tree.modules if path.rpartition(".")[2] in self.experts.names]
        if self.linear is None:
            return [path for path in named if self.finds(path)]
        routers = {f"{stack.module.rpartition('.')[0]}.{ROUTER}" for stack in self.experts.stacks}
        return [path for path in named if self.finds(path) or path in routers]

    def rest(self, moved: list[str]) -> set[str]:
        """Return the targets without those names; of a regex, and "all-linear", the names of the modules that it chose,
        without `moved`."""
        if not self.regex:
            return {entry for entry in self.cfg.target_modules if entry.rpartition(".")[2] not in self.experts.names}
        gone = set(moved)
        paths = [path for path in self.tree.modules if self.finds(path) and path not in gone]
        return shortest(paths, [*self.tree.modules])

    def _paths(self, stack: Stack, name: str) -> Iterator[str]:
        """Yield the paths that the experts' modules of a name had, or would have today."""
        numbers: Iterable[int] = range(stack.size)
        if not self.regex and not any(part.isdigit() for t in self.cfg.target_modules for part in t.split(".")):
            numbers = (0,)
        blocks = dict.fromkeys((stack.module, self.experts.before(stack.module)))
        for block in blocks:
            yield f"{block}.{name}"
            for number in numbers:
                yield f"{block}.{number}.{name}"


def stacks_in(keys: Iterable[str], experts: Experts) -> dict[Stack, list[str]]:
    """Return the stacks of which a file has parts, by experts, and which."""
    by_path = {stack.path: stack for stack in experts.stacks}
    out: dict[Stack, list[str]] = {}
    matches = (OF_EXPERT.fullmatch(key.removeprefix(PREFIX)) for key in keys)
    for block, part in dict.fromkeys((m["experts"], m["part"]) for m in matches if m is not None):
        place = experts.place(block, part)
        if place is not None and place.stack in by_path:
            out.setdefault(by_path[place.stack], []).append(part)
    return out


def has_plain_weight(module: nn.Module, path: str, tree: Tree) -> bool:
    """Return True if PEFT could adapt the weight of a module by its name."""
    base = innermost(module)
    weight, op = base._parameters.get("weight"), find_op(base)
    if type(weight) is not nn.Parameter or weight.dim() != 2 or not weight.is_floating_point():
        return False
    if op.transposed or (op.linear and find_store(base) is not DENSE):  # PEFT would exchange axes, or adapt codes
        return False
    return carrier_of(module) is None or path in tree.nests


def shortest(paths: list[str], every: list[str]) -> set[str]:
    """Return the fewest names that mean these paths, and none of the others."""
    return minimal_names(paths, set(every) - set(paths)) if paths else set()


def rename_patterns(cfg: PeftConfig, parts_by_stack: dict[Stack, list[str]], weights: list[str], tree: Tree) -> None:
    """Have `rank_pattern` and `alpha_pattern` give stacks the sum over their parts, weights what their layers have."""
    sums: dict[str, dict[str, float]] = {}
    for name, of in cfg.patterns.items():
        own, default = dict(getattr(cfg, name) or {}), getattr(cfg, of)
        exact: dict[str, float] = {}
        old: list[str] = []
        for stack in parts_by_stack if own else ():
            if any(cfg.reaches(pattern, stack.path, name) for pattern in own):
                continue
            paths = [f"{stack.module}.0.{part}" for part in stack.parts]
            old += paths
            total = sum(getattr(cfg.at(path), of) for path in paths)
            if total != default * len(paths):
                exact[re.escape(stack.path)] = total
        for path in weights if own else ():
            old.append(path)
            value = getattr(cfg.at(path), of)
            if value != default:
                exact[re.escape(f"{path}.weight")] = value
        gone = set(old)
        still = [*(path for path in tree.modules if path not in gone), *(stack.path for stack in parts_by_stack)]
        used = {p for p in own if any(cfg.reaches(p, path, name) for path in old)}
        others = {p: v for p, v in own.items() if p not in used or any(cfg.reaches(p, path, name) for path in still)}
        whole = {rf".*\.{re.escape(s.parameter)}": default * len(s.parts) for s in parts_by_stack if len(s.parts) > 1}
        sums[name] = exact | others | {p: v for p, v in whole.items() if p not in others}
    for name, patterns in sums.items():
        setattr(cfg, name, patterns)
