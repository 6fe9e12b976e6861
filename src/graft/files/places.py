# SPDX-License-Identifier: Apache-2.0
"""Where in a checkpoint the parameters of its model stand: under their names, other names, or in other pieces.

Names are looked up as they are; then as transformers would rename them as it loads the checkpoint; then with a prefix
that all names lack, or have too much.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graft import BaseModelMismatchError, CheckpointError, LossError
from graft.core.errors import join_some

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Spot:
    """A tensor of a checkpoint that holds a parameter, or a piece of one.

    Attributes:
        expert: which matrix of a stack the tensor is; None: all of the parameter's first dimension.
        rows: the first and the number of rows of that matrix that it holds; None: all.
    """

    key: str
    expert: int | None = None
    rows: tuple[int, int] | None = None


class CheckpointPlaces:
    """The map from a model's parameters to the tensors of its checkpoint.

    Args:
        shapes: the checkpoint's names and shapes.
        model: returns the model on the meta device, by which transformers tells what it renames; None if there is none.
    """

    def __init__(self, shapes: Mapping[str, Shape], model: Callable[[], PreTrainedModel | None]):
        self.shapes, self.model = shapes, model
        self.shift = ("", "")  # prefix that names have, and in its stead the checkpoint
        self.computed: dict[str, ComputedParameters] = {}

    @cached_property
    def by_transformers(self) -> dict[str, list[Spot]]:
        model = self.model()
        return {} if model is None else find_spots(model, self.shapes, self.computed)

    def locate_all(self, names: Collection[str], adapter: str) -> dict[str, list[Spot]]:
        """Return the spots of each of these parameters, in one way for all that do not stand under their own names.

        Raises:
            BaseModelMismatchError: the checkpoint does not hold some of them.
            LossError: transformers computes some of other tensors.
        """
        direct_spots = {name: [Spot(name)] for name in names if name in self.shapes}
        left = [name for name in names if name not in direct_spots]
        if not left:
            return direct_spots
        renamed_spots = {name: self.by_transformers[name] for name in left if name in self.by_transformers}
        if not renamed_spots and not direct_spots:
            self.shift = find_prefix_shift({*left}, self.shapes.keys())
            renamed_spots = {name: spots for name in left if (spots := self.find(name)) is not None}
        missing = [name for name in left if name not in renamed_spots]
        if missing and self.computed:
            raise LossError(
                f"transformers computes {join_some(missing, 4)} of other tensors of the base's checkpoint, which "
                "files of a "
                f"merged model would have to hold: merge '{adapter}' in memory, by merge_and_unload(), and save that."
            )
        if missing:
            raise BaseModelMismatchError(
                f"The base's checkpoint does not hold {len(missing)} of the {len(names)} tensors that adapter "
                f"'{adapter}' changes: {join_some(missing, 4)}. It is of another model, or its names need the "
                "installed "
                "transformers to know the model."
            )
        return direct_spots | renamed_spots

    def find(self, name: str) -> list[Spot] | None:
        """Return the spots of one parameter, in the way of `locate_all`; None if the checkpoint has none."""
        if name in self.shapes:
            return [Spot(name)]
        if name in self.by_transformers:
            return self.by_transformers[name]
        name_prefix, key_prefix = self.shift
        key = key_prefix + name.removeprefix(name_prefix)
        return [Spot(key)] if name.startswith(name_prefix) and key in self.shapes else None


def find_prefix_shift(wanted: Set[str], names: Set[str]) -> tuple[str, str]:
    """Return the prefix of wanted names and the one in its stead by which most of them are among `names`.

    One of the two is empty; both are if nothing makes any of them a name, or several prefixes do equally.
    """
    counts = Counter(("", prefix) for name in names for prefix, tail in split_at_dots(name) if tail in wanted)
    counts += Counter((prefix, "") for name in wanted for prefix, tail in split_at_dots(name) if tail in names)
    (best, n), *runners_up = counts.most_common(2) or [(("", ""), 0)]
    return ("", "") if runners_up and runners_up[0][1] == n else best


def split_at_dots(name: str) -> Iterator[tuple[str, str]]:
    """Yield the ways to cut a dotted name in two, with the dot in the first part."""
    return ((name[: i + 1], name[i + 1 :]) for i, c in enumerate(name) if c == ".")


@dataclass
class ComputedParameters:
    """Parameters that transformers computes from tensors of a checkpoint, in another way than one below another.

    Attributes:
        first: the first of them; the others follow from the conversion.
        keys: the checkpoint's names, each with the pattern of the conversion that it fits.
    """

    first: str
    conversion: Any
    model: PreTrainedModel
    keys: list[tuple[str, str]] = field(default_factory=list)

    def values(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the parameters by name, made of these tensors of the checkpoint, which may be without memory."""
        conversion = copy.deepcopy(self.conversion)
        for key, pattern in self.keys:
            conversion.add_tensor(self.first, key, pattern, tensors[key])
        try:
            parameters = conversion.convert(self.first, model=self.model, config=self.model.config)
        except (ValueError, KeyError, IndexError, TypeError, RuntimeError, AttributeError) as e:
            names = join_some([key for key, _ in self.keys], 3)
            raise CheckpointError(f"transformers cannot make '{self.first}' of {names} in the checkpoint: {e}") from e
        return {name: value[0] if isinstance(value, list) else value for name, value in parameters.items()}


def find_spots(
    model: PreTrainedModel, shapes: Mapping[str, Shape], computed: dict[str, ComputedParameters] | None = None
) -> dict[str, list[Spot]]:
    """Return the spots of a transformers model's parameters, as transformers loads them.

    Args:
        computed: gets the parameters that have no spots, by the first of each conversion.
    """
    parameter_names = model.state_dict()
    try:
        from transformers import conversion_mapping
        from transformers.core_model_loading import (
            WeightRenaming,
            apply_renamings,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:  # before 5
        return find_spots_by_patterns(getattr(type(model), "_checkpoint_conversion_mapping", None) or {}, shapes)
    conversions = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters: list[Any] = [c for c in conversions if not isinstance(c, WeightRenaming)]
    spots_by_name: dict[str, list[Spot]] = {}
    stacks: dict[str, dict[str, list[str]]] = {}  # parameter → pattern of a part → its keys
    orders: dict[str, list[str]] = {}
    for key in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, parameter_names)
        if target not in parameter_names and key in parameter_names:
            target, pattern = rename_source_key(key, [], [], model.base_model_prefix, parameter_names)
        if pattern is None:
            spots_by_name.setdefault(target, []).append(Spot(key))
            continue
        name = apply_renamings(key, renamings)
        converter = next(c for c in converters if c.rename_source_key(name)[1] == pattern)
        if operation_names(converter) in (("MergeModulelist",), ("MergeModulelist", "Concatenate")):
            stacks.setdefault(target, {}).setdefault(pattern, []).append(key)
            orders[target] = list(converter.source_patterns)
        elif computed is not None:
            computed.setdefault(target, ComputedParameters(target, converter, model)).keys.append((key, pattern))
    for target, parts in stacks.items():
        start, spots = 0, list[Spot]()
        for pattern in orders[target]:
            keys = parts.get(pattern, [])
            for expert, key in enumerate(keys):
                spots.append(Spot(key, expert, (start, shapes[key][0])))
            start += shapes[keys[0]][0] if keys else 0
        spots_by_name[target] = spots
    return spots_by_name


def operation_names(converter: Any) -> tuple[str, ...]:
    return tuple(type(o).__name__ for o in converter.operations)


def find_spots_by_patterns(patterns: Mapping[str, str], shapes: Mapping[str, Shape]) -> dict[str, list[Spot]]:
    """Return the spots by a class's `_checkpoint_conversion_mapping`: the first pattern that fits renames a key."""
    spots: dict[str, list[Spot]] = {}
    for key in shapes:
        names = (re.subn(pattern, put, key) for pattern, put in patterns.items())
        spots.setdefault(next((name for name, n in names if n), key), []).append(Spot(key))
    return spots
