# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""Names of experts from the time when each was a module, in configs and files, for models that hold all experts of a
block as one stack.

transformers 5 fuses experts: one parameter holds the matrices of all experts, with matrices on the same input below
each other. transformers' own table of conversions says where each matrix is.
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
from graft.inject.match import Matcher, minimize_names
from graft.inject.survey import ModuleTree, survey_model
from graft.inject.targets import ALL_LINEAR, list_linear_layers
from graft.storage.experts import ExpertBlock
from graft.storage.find import DENSE, find_store, innermost

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform

OF_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>\w+)\.lora_[AB]\.weight")
PREFIX = "base_model.model."  # of a file's keys
BY_PEFT = ("mixtral", "qwen2_moe")  # PEFT converts configs for Mixtral, and for models with conversions of these two
ROUTER = "gate"  # a sibling of the experts; it was a linear layer


class PartPlace(NamedTuple):
    """The place of one part of an expert, such as `w1`, in the stack of all experts."""

    stack: str  # path of the parameter
    row: int  # index among the parts, from above
    parts: tuple[str, ...]  # the old names of all parts of the stack


class ExpertStacks:
    """The expert stacks of a model, and transformers' conversions of old expert names into these.

    Without transformers 5 or a config with a `model_type` the conversions are empty.

    Args:
        tree: a survey of the model; None: a new one.
    """

    def __init__(self, model: Any, tree: ModuleTree | None = None):
        """Read transformers' conversion mapping for the model into `renamings` and `converters` (those that merge
        modules).

        `names` gets the old part names of the converters and the router's, "gate"; `by_peft` whether PEFT rewrites
        configs of this model. All stay empty and False if transformers is not imported or is older than 5, or the
        model's config has no `model_type`. Surveys the model unless `tree` is passed.
        """
        self.model, self.tree = model, survey_model(model) if tree is None else tree
        self.renamings: list[WeightRenaming] = []
        self.converters: list[WeightConverter] = []
        self.by_peft = is_rewritten_by_peft(model)
        self.names: set[str] = set()  # old names of the parts, and of the router
        if "transformers" not in sys.modules or not hasattr(getattr(model, "config", None), "model_type"):
            return
        try:
            from transformers import conversion_mapping as mapping_module
            from transformers.core_model_loading import WeightRenaming
        except ImportError:  # before 5, where experts are modules
            return
        if hasattr(model, "base_model_prefix"):
            conversions = mapping_module.get_model_conversion_mapping(model, add_legacy=False)
        else:
            conversions = mapping_module.get_checkpoint_conversion_mapping(model_type(model)) or []
        self.renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self.converters = [c for c in conversions if is_merge_of_modules(c)]
        self.names = {read_part_name(p) for c in self.converters for p in c.source_patterns} | {ROUTER}

    @cached_property
    def stacks(self) -> list[ExpertStack]:
        """All expert stacks of the model, with the old names of their parts. Computed once."""
        return [*list_stacks(self.tree, self)]

    def find_place(self, experts: str, part: str, old: bool = True) -> PartPlace | None:
        """Return where the matrices `<experts>.<number>.<part>` are now: the stack, the row within it, and all parts of
        the stack. The first conversion that fits decides; None if none fits, or if it lacks `part`.

        Args:
            old: also apply transformers' renamings, so that `experts` may be an old path.
        """
        name = f"{experts}.0.{part}.weight"
        for renaming in self.renamings if old else ():
            name, _ = renaming.rename_source_key(name)
        for converter in self.converters:
            stack, source = converter.rename_source_key(name)
            if source is not None:
                parts = tuple(read_part_name(pattern) for pattern in converter.source_patterns)
                return PartPlace(stack, parts.index(part), parts) if part in parts else None
        return None

    def list_part_names(self, path: str, name: str) -> tuple[str, ...]:
        """Return the old names of the parts of the parameter `name` of the module at `path`, in the order of their
        rows. The first conversion that makes that parameter decides; returns () if none does.
        """
        for converter in self.converters:
            part = read_part_name(converter.source_patterns[0])
            place = self.find_place(path, part, old=False)
            if place is not None and place.stack == f"{path}.{name}":
                return place.parts
        return ()

    def find_old_path(self, path: str) -> str:
        """Return the path that a module had before transformers' renamings, undone in reverse order; the same path if
        none applies.
        """
        name = f"{path}.weight"
        for renaming in reversed(self.renamings):
            name, _ = renaming.reverse_transform().rename_source_key(name)
        return name.removesuffix(".weight")


def is_rewritten_by_peft(model: object) -> bool:
    """Return True if PEFT rewrites expert names in configs for this model: its model_type is "mixtral", or one with
    Mixtral's or Qwen2-MoE's conversions in transformers' `_MODEL_TO_CONVERSION_PATTERN`. Returns False if transformers'
    conversion module is not imported.
    """
    # every model of transformers 5 and later imports it
    conversion_mapping = sys.modules.get("transformers.conversion_mapping")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    families = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return conversion_mapping is not None and (kind == BY_PEFT[0] or families.get(kind) in BY_PEFT)


def is_merge_of_modules(conversion: WeightTransform) -> TypeGuard[WeightConverter]:
    """Return True if a conversion puts the weights of many modules together into one tensor, by transformers'
    `MergeModulelist`: it has that operation, and exactly one target pattern.
    """
    operations = getattr(conversion, "operations", ())
    return len(conversion.target_patterns) == 1 and any(type(o).__name__ == "MergeModulelist" for o in operations)


def read_part_name(pattern: str) -> str:
    """Return the last part of a pattern, after a ".weight" at its end: `w1` for `.experts.*.w1.weight`.

    Backslashes are dropped first. All other signs and ends stay, such as `$` or ".bias".
    """
    return pattern.replace("\\", "").removesuffix(".weight").rpartition(".")[2]


class ExpertStack(NamedTuple):
    """A parameter that holds one matrix of each expert of a module."""

    module: str  # the path of the module
    parameter: str
    size: int
    parts: tuple[str, ...]  # old names of the parts, () if transformers' table has none

    @property
    def path(self) -> str:
        """The parameter's path."""
        return f"{self.module}.{self.parameter}"

    @property
    def names(self) -> set[str]:
        """The names that a config may use for the stack: its old parts, the parameter, and the pieces of a fused name.

        For `gate_up_proj` the pieces are `gate_proj` and `up_proj`.
        """
        *parts, kind = self.parameter.split("_")
        return {*self.parts, self.parameter, *(f"{part}_{kind}" for part in parts)}


def list_stacks(tree: ModuleTree, experts: ExpertStacks | None = None) -> Iterator[ExpertStack]:
    """Yield the expert stacks of a model, in its order.

    These are parameters of modules with a name that ends with "experts": packed ones if there are any, else those with
    three dimensions. A parameter called `weight` is none. `experts` gives the old names of the parts; without it they
    are ().
    """
    for path, module in tree.modules.items():
        if not path.rpartition(".")[2].endswith("experts"):
            continue
        for name, size in ExpertBlock(innermost(module)).sizes.items():
            yield ExpertStack(path, name, size, () if experts is None else experts.list_part_names(path, name))


@dataclass
class UnreachedTargets:
    """The targets of a config that an injection leaves out: expert stacks, and layers that PEFT could not load from a
    file.
    """

    stacks: list[ExpertStack] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)  # paths
    names: set[str] = field(default_factory=set)  # entries of target_modules that mean experts
    whole_text: str = ""  # a warning about stacks that are adapted whole, though the config names some experts

    @property
    def experts_text(self) -> str:
        """The sentence for a warning or error that says how to adapt the stacks: by `target_parameters`.

        '' if no stack is left out.
        """
        if not self.stacks:
            return ""
        wanted = sorted({f"{s.module.rpartition('.')[2]}.{s.parameter}" for s in self.stacks})
        return (
            f"target_modules={sorted(self.names)} leaves the experts out, which are no modules here but parameters: "
            f"target_parameters={wanted} adapts them."
        )

    @property
    def layers_text(self) -> str:
        """The sentences for a warning that name up to three layers left out, and the remedy.

        '' if no layer is left out.
        """
        if not self.layers:
            return ""
        return (
            f"Experts are adapted, and {', '.join(self.layers[:3])}{', …' * (len(self.layers) > 3)} left out, as PEFT "
            "does: it would not load them from a file. To adapt them as well, name them in target_parameters, such as "
            f"'{self.layers[0]}.weight'."
        )


def convert_expert_targets(
    cfg: Any, model: nn.Module, tree: ModuleTree, keys: Collection[str] | None
) -> UnreachedTargets:
    """Rewrite a LoRA config with old expert names in place, and return the targets that stay out of reach.

    Expert names move from `target_modules` to `target_parameters`; `rank_pattern` and `alpha_pattern` follow. A stack
    gets the ranks of all its parts together. Dense layers and shared experts of these names become targets by their
    weights, with plain weights only. Others are returned as `layers`; with `keys` they stay in `target_modules`.

    The config stays as it is for other methods, without `target_modules`, for models without stacks, and where it has
    no old expert name. It also stays if such names mean other modules as well, or it is "all-linear", unless PEFT
    converts the model. In the last two cases stacks that `target_modules` alone chooses, by any name, are returned as
    out of reach, with those entries.

    Args:
        keys: those of the file that gives the values, which say which experts are adapted; None: a new adapter.

    Raises:
        ConfigError: the config names only some of the parts that are fused into one stack.
    """
    unreached = UnreachedTargets()
    is_lora = cfg.peft_type == "LORA" and cfg.target_modules is not None
    if not is_lora or not (is_rewritten_by_peft(model) or any(list_stacks(tree))):
        return unreached
    experts = ExpertStacks(model, tree)
    all_stacks, chosen = experts.stacks, ExpertTargets(cfg, experts)
    if keys is None:
        parts_by_stack = {stack: chosen.list_parts(stack) for stack in all_stacks}
        moved = chosen.list_modules()
        chosen_parts = {part for parts in parts_by_stack.values() for part in parts}
        # then the names can only mean experts
        alone = chosen_parts.isdisjoint(path.rpartition(".")[2] for path in moved)
        alone = alone and bool(chosen_parts) and chosen.linear is None
        if not (chosen_parts or moved) or not (experts.by_peft or alone):
            unreached.stacks = [stack for stack in all_stacks if chosen.is_unnamed(stack)]
            unreached.names = chosen.list_entries({name for stack in unreached.stacks for name in stack.names})
            return unreached
    else:
        parts_by_stack = find_stack_parts(keys, experts)
        moved = chosen.list_modules() if parts_by_stack else []
    parts_by_stack = {stack: parts for stack, parts in parts_by_stack.items() if parts}
    if not parts_by_stack and not moved:
        return unreached
    for stack, parts in parts_by_stack.items():
        if missing := [part for part in stack.parts if part not in parts]:
            raise ConfigError(
                f"Cannot convert PEFT target(s) {', '.join(parts)} without also targeting {', '.join(missing)} because "
                f"they are fused into {stack.parameter}."
            )
    whole = [s.path for s, parts in parts_by_stack.items() if any(chosen.is_numbered(s, part) for part in parts)]
    if whole and keys is None:
        unreached.whole_text = f"All experts of {', '.join(whole)} are adapted, not only the numbers in target_modules."
    weights = [path for path in moved if is_weight_plain(tree.modules[path], path, tree)]
    unreached.layers = [path for path in moved if path not in weights]
    convert_patterns(cfg, parts_by_stack, weights, tree)
    module_targets = chosen.list_other_targets(moved)
    if keys is not None:  # the file has tensors for these layers
        module_targets |= shorten_paths(unreached.layers, [*tree.modules])
        unreached.layers = []
    cfg.target_parameters = {
        *(cfg.target_parameters or ()),
        *shorten_paths([stack.path for stack in parts_by_stack], [stack.path for stack in all_stacks]),
        *shorten_paths([f"{path}.weight" for path in weights], [f"{path}.weight" for path in tree.modules]),
    }
    cfg.target_modules = module_targets
    return unreached


class ExpertTargets:
    """The meaning of a config's `target_modules` in a model with expert stacks, by today's paths and by old ones."""

    def __init__(self, cfg: Any, experts: ExpertStacks):
        """Compile the config's targets.

        For "all-linear" `linear` becomes the set of all linear layers' paths, else it is None.
        """
        self.cfg, self.experts, self.tree = cfg, experts, experts.tree
        self.matcher = Matcher(cfg)
        self.regex = isinstance(cfg.target_modules, str)
        is_all = self.regex and cfg.target_modules.lower() == ALL_LINEAR
        self.linear = list_linear_layers(cfg, experts.model, self.tree.modules) if is_all else None

    def is_chosen(self, path: str) -> bool:
        """Return True if the config targets a path; for "all-linear", if it is that of a linear layer."""
        return path in self.linear if self.linear is not None else self.matcher(path).outcome == "matched"

    def list_parts(self, stack: ExpertStack) -> list[str]:
        """Return the parts of a stack that the config targets in at least one expert, by old or present paths, in the
        stack's order. "all-linear" targets all.
        """
        if self.linear is not None:
            return [*stack.parts]
        return [part for part in stack.parts if any(map(self.is_chosen, self._list_paths(stack, part)))]

    def is_numbered(self, stack: ExpertStack, part: str) -> bool:
        """Return True if the config targets a part by the numbers of some experts of a stack, not of all."""
        parents = {path.split(".")[-2] for path in self._list_paths(stack, part) if self.is_chosen(path)}
        return self.linear is None and parents < {*map(str, range(stack.size))}

    def is_unnamed(self, stack: ExpertStack) -> bool:
        """Return True if `target_modules` chooses a part of a stack, by an old or present path, and `target_parameters`
        does not name the stack.

        Always False for "all-linear".
        """
        if self.linear is not None or Matcher(self.cfg, parameters=True)(stack.path).outcome == "matched":
            return False
        return any(self.is_chosen(path) for name in stack.names for path in self._list_paths(stack, name))

    def list_entries(self, names: set[str]) -> set[str]:
        """Return the entries of `target_modules` with a last part in `names`.

        A regex or "all-linear" is returned as a set of one, whether it means them or not.
        """
        if self.regex:
            return {self.cfg.target_modules}
        return {entry for entry in self.cfg.target_modules if entry.rpartition(".")[2] in names}

    def list_modules(self) -> list[str]:
        """Return the paths of chosen modules that end with an old name of experts or routers, in the tree's order.

        For "all-linear" the routers next to expert stacks (named "gate") count as chosen, too.
        """
        named = [path for path in self.tree.modules if path.rpartition(".")[2] in self.experts.names]
        if self.linear is None:
            return [path for path in named if self.is_chosen(path)]
        routers = {f"{stack.module.rpartition('.')[0]}.{ROUTER}" for stack in self.experts.stacks}
        return [path for path in named if self.is_chosen(path) or path in routers]

    def list_other_targets(self, moved: list[str]) -> set[str]:
        """Return the new `target_modules`, as a set: the entries without an old expert name as their last part.

        A regex or "all-linear" becomes the shortest names of all modules that it chooses, except those in `moved`.
        """
        if not self.regex:
            return {entry for entry in self.cfg.target_modules if entry.rpartition(".")[2] not in self.experts.names}
        gone = set(moved)
        paths = [path for path in self.tree.modules if self.is_chosen(path) and path not in gone]
        return shorten_paths(paths, [*self.tree.modules])

    def _list_paths(self, stack: ExpertStack, name: str) -> Iterator[str]:
        """Yield the paths that modules called `name` have or had in the experts: below the module of the stack, and
        below each expert's number. Paths of today come first, then those before renamings, if they differ. Only expert
        0 is tried, unless the config is a regex or has a number in an entry.
        """
        numbers: Iterable[int] = range(stack.size)
        if not self.regex and not any(part.isdigit() for t in self.cfg.target_modules for part in t.split(".")):
            numbers = (0,)
        for block in dict.fromkeys((stack.module, self.experts.find_old_path(stack.module))):
            yield f"{block}.{name}"
            for number in numbers:
                yield f"{block}.{number}.{name}"


def find_stack_parts(keys: Iterable[str], experts: ExpertStacks) -> dict[ExpertStack, list[str]]:
    """Return the stacks with matrices of single experts in a file, each with its parts in the file's order.

    Such a key is `<path>.experts.<number>.<part>.lora_A.weight`, or with `lora_B`; "base_model.model." before it is
    dropped. Other keys, and those of stacks that the model lacks, are left out.
    """
    by_path = {stack.path: stack for stack in experts.stacks}
    out: dict[ExpertStack, list[str]] = {}
    matches = (OF_EXPERT.fullmatch(key.removeprefix(PREFIX)) for key in keys)
    for block, part in dict.fromkeys((m["experts"], m["part"]) for m in matches if m is not None):
        place = experts.find_place(block, part)
        if place is not None and place.stack in by_path:
            out.setdefault(by_path[place.stack], []).append(part)
    return out


def is_weight_plain(module: nn.Module, path: str, tree: ModuleTree) -> bool:
    """Return True if PEFT could adapt the module's weight by its name.

    It must be exactly an `nn.Parameter`, floating, with two dimensions, not of a Conv1D, nor of a linear layer with
    another storage than `DENSE` (quantized). False also for a module with adapters around it, unless these adapt
    parameters.
    """
    base = innermost(module)
    weight, op = base._parameters.get("weight"), find_op(base)
    if type(weight) is not nn.Parameter or weight.dim() != 2 or not weight.is_floating_point():
        return False
    if op.transposed or (op.linear and find_store(base) is not DENSE):  # PEFT would exchange axes, or adapt codes
        return False
    return carrier_of(module) is None or path in tree.nests


def shorten_paths(paths: Collection[str], every: Collection[str], least: int = 1) -> set[str]:
    """Return few, short suffixes, of at least `least` parts, that match all `paths` and no other one of `every`.

    Returns an empty set for no paths.
    """
    return minimize_names(paths, set(every) - set(paths), least) if paths else set()


def convert_patterns(
    cfg: PeftConfig, parts_by_stack: dict[ExpertStack, list[str]], weights: list[str], tree: ModuleTree
) -> None:
    """Rewrite each pattern field of a config (`rank_pattern`, `alpha_pattern`) in place, for parts fused into stacks.

    A stack gets the sum over the parts of expert 0; a weight gets the value of its layer; both by the escaped path.
    Sums and values equal to the default get no entry. A stack that a pattern reaches already keeps that one. Patterns
    that only reached moved modules are dropped. A stack of n > 1 parts has the default n times, by a last pattern for
    its parameter name, unless the config has that pattern. A field without patterns gets only such ones. Exact ones
    come first.
    """
    sums: dict[str, dict[str, float]] = {}
    for name, of in cfg.patterns.items():
        patterns_of_field, default = dict(getattr(cfg, name) or {}), getattr(cfg, of)
        exact: dict[str, float] = {}
        old: list[str] = []
        for stack in parts_by_stack if patterns_of_field else ():
            if any(cfg.reaches(pattern, stack.path, name) for pattern in patterns_of_field):
                continue
            paths = [f"{stack.module}.0.{part}" for part in stack.parts]
            old += paths
            total = sum(getattr(cfg.at(path), of) for path in paths)
            if total != default * len(paths):
                exact[re.escape(stack.path)] = total
        for path in weights if patterns_of_field else ():
            old.append(path)
            value = getattr(cfg.at(path), of)
            if value != default:
                exact[re.escape(f"{path}.weight")] = value
        gone = set(old)
        still = [*(path for path in tree.modules if path not in gone), *(stack.path for stack in parts_by_stack)]
        used = {p for p in patterns_of_field if any(cfg.reaches(p, path, name) for path in old)}
        unused = {p for p in used if not any(cfg.reaches(p, path, name) for path in still)}
        remaining_patterns = {p: v for p, v in patterns_of_field.items() if p not in unused}
        whole = {rf".*\.{re.escape(s.parameter)}": default * len(s.parts) for s in parts_by_stack if len(s.parts) > 1}
        sums[name] = exact | remaining_patterns | {p: v for p, v in whole.items() if p not in remaining_patterns}
    for name, patterns in sums.items():
        setattr(cfg, name, patterns)
