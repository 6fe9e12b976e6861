# SPDX-License-Identifier: Apache-2.0
"""Maps from a model's parameters to the tensors of its checkpoint, which may have other names or hold pieces.

A name is looked up unchanged, then as transformers renames it on loading, then with one prefix added or removed.
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
    """A checkpoint tensor that holds a parameter or a piece of one.

    Attributes:
        key: its name in the checkpoint.
        expert: index of the matrix in a stack; None: the whole parameter.
        rows: (first row, number of rows) of that matrix that it holds; None: all.
    """

    key: str
    expert: int | None = None
    rows: tuple[int, int] | None = None


class CheckpointPlaces:
    """The map from a model's parameters to the tensors of its checkpoint.

    Args:
        shapes: name → shape in the checkpoint.
        model: returns the model on the meta device, for transformers' renaming; or None if no library knows it.
    """

    def __init__(self, shapes: Mapping[str, Shape], model: Callable[[], PreTrainedModel | None]):
        """Store the arguments. The model is not built yet."""
        self.shapes, self.model = shapes, model
        self.shift = ("", "")  # (prefix of parameter names, the checkpoint's prefix)
        self.computed: dict[str, ComputedParameters] = {}

    @cached_property
    def by_transformers(self) -> dict[str, list[Spot]]:
        """The spots of parameters by transformers' renaming, {} without a model.

        Builds the model once, and fills `computed`.
        """
        model = self.model()
        return {} if model is None else find_spots(model, self.shapes, self.computed)

    def locate_all(self, names: Collection[str], adapter: str) -> dict[str, list[Spot]]:
        """Return the spots of each of these parameters. Names that are in the checkpoint are taken as they are.

        All others are found in one way: by transformers' renaming. If it has none of them and no name is in the
        checkpoint, one prefix is looked for, and stored in `shift`.

        Raises:
            LossError: some are missing, and transformers computes parameters from other tensors (`computed` is not
                empty).
            BaseModelMismatchError: some are missing, and it computes none.
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
                f"transformers computes {join_some(missing, 4)} from other tensors of the base's checkpoint, so files "
                f"cannot be merged. Merge '{adapter}' in memory with merge_and_unload(), and save the model."
            )
        if missing:
            raise BaseModelMismatchError(
                f"The base's checkpoint does not hold {len(missing)} of the {len(names)} tensors that adapter "
                f"'{adapter}' changes: {join_some(missing, 4)}. Give the adapter's base, or install a transformers "
                "version with its model."
            )
        return direct_spots | renamed_spots

    def find(self, name: str) -> list[Spot] | None:
        """Return the spots of one parameter: by its name, by transformers' renaming, or by the prefix that `locate_all`
        stored, in this order; None if all fail.
        """
        if name in self.shapes:
            return [Spot(name)]
        if name in self.by_transformers:
            return self.by_transformers[name]
        name_prefix, key_prefix = self.shift
        key = key_prefix + name.removeprefix(name_prefix)
        return [Spot(key)] if name.startswith(name_prefix) and key in self.shapes else None


def find_prefix_shift(wanted: Set[str], names: Set[str]) -> tuple[str, str]:
    """Return (old prefix, new prefix), the replacement that turns the most wanted names into ones of `names`.

    One of the two is empty. Both are empty if no prefix helps, or if two are equally good.
    """
    counts = Counter(("", prefix) for name in names for prefix, tail in split_at_dots(name) if tail in wanted)
    counts += Counter((prefix, "") for name in wanted for prefix, tail in split_at_dots(name) if tail in names)
    (best, n), *runners_up = counts.most_common(2) or [(("", ""), 0)]
    return ("", "") if runners_up and runners_up[0][1] == n else best


def split_at_dots(name: str) -> Iterator[tuple[str, str]]:
    """Yield all splits of a dotted name into (prefix with its dot, rest)."""
    return ((name[: i + 1], name[i + 1 :]) for i, c in enumerate(name) if c == ".")


@dataclass
class ComputedParameters:
    """Parameters that transformers computes from checkpoint tensors, other than by concatenation.

    Attributes:
        first: the first parameter; the conversion gives the others.
        conversion: transformers' converter, which is copied before use.
        model: on the meta device.
        keys: pairs of checkpoint name and the conversion's pattern that it matches.
    """

    first: str
    conversion: Any
    model: PreTrainedModel
    keys: list[tuple[str, str]] = field(default_factory=list)

    def values(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the parameters by name, computed by transformers' conversion from these checkpoint tensors, which may
        be meta tensors. Works on a copy of the conversion; of a list of values the first is taken.

        Raises:
            CheckpointError: transformers fails with ValueError, TypeError, KeyError, IndexError, AttributeError or
                RuntimeError.
        """
        conversion = copy.deepcopy(self.conversion)
        for key, pattern in self.keys:
            conversion.add_tensor(self.first, key, pattern, tensors[key])
        try:
            parameters = conversion.convert(self.first, model=self.model, config=self.model.config)
        except (ValueError, KeyError, IndexError, TypeError, RuntimeError, AttributeError) as e:
            names = join_some([key for key, _ in self.keys], 3)
            raise CheckpointError(f"transformers cannot compute '{self.first}' from the tensors {names}: {e}") from e
        return {name: value[0] if isinstance(value, list) else value for name, value in parameters.items()}


def find_spots(
    model: PreTrainedModel, shapes: Mapping[str, Shape], computed: dict[str, ComputedParameters] | None = None
) -> dict[str, list[Spot]]:
    """Return the spots of a transformers model's parameters by name, as transformers renames and stacks checkpoint
    tensors.

    Keys are taken in natural order, so that experts are numbered by it. For a stack, each spot has the expert's index,
    its first row and its number of rows. If a key's new name is no parameter and the key is one, the key stays. Before
    transformers 5, only the class's patterns count. Parameters computed in other ways have no spots.

    Args:
        computed: filled with these other parameters, by the first of each conversion; None: they are ignored.
    """
    parameter_names = model.state_dict()
    try:
        from transformers import conversion_mapping
        from transformers.core_model_loading import WeightRenaming, apply_renamings, dot_natural_key, rename_source_key
    except ImportError:  # before transformers 5
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
        operations = [type(operation).__name__ for operation in converter.operations]
        if operations in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
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


def find_spots_by_patterns(patterns: Mapping[str, str], shapes: Mapping[str, Shape]) -> dict[str, list[Spot]]:
    """Return the spots by a class's `_checkpoint_conversion_mapping`.

    The first pattern that matches renames a key; others stay.
    """
    spots: dict[str, list[Spot]] = {}
    for key in shapes:
        names = (re.subn(pattern, put, key) for pattern, put in patterns.items())
        spots.setdefault(next((name for name, n in names if n), key), []).append(Spot(key))
    return spots
