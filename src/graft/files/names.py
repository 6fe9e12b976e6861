# SPDX-License-Identifier: Apache-2.0
"""Module names: a file's names looked up in a base model, paths by layer, and paths by the part of a pipeline."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from graft import BaseModelMismatchError, CheckpointError
from graft.config.reading import Json
from graft.core.errors import join_some
from graft.files.base import BaseDescription as Base
from graft.files.bases import COMPONENTS, choose_names, view_by_model_names
from graft.files.errors import BaseNeededError, make_misfit_error
from graft.files.neutral import AdapterFile, LowRank

CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}  # model types with weights (in, out)


class FlatNames:
    """A base's modules by their paths with "_" for ".".

    Names are only looked up as a whole, since "_" may be part of a name.
    """

    def __init__(self, base: Base):
        """Note the base's path, and in `by_key` for each flat name the list of all modules that have it, in their
        order.
        """
        self.path = base.path
        self.by_key: dict[str, list[str]] = {}
        for module in base.modules:
            self.by_key.setdefault(module.replace(".", "_"), []).append(module)

    def find(self, name: str, components: Iterable[str] = ("",)) -> str | None:
        """Return the path of the module with a flat name in one of `components`, the first that has it; None if none
        has. The flat name is the path below the component, "_" for "."; the component "" is the whole base.

        Raises:
            CheckpointError: two modules of a component have this flat name.
        """
        for component in components:
            matches = self.by_key.get(f"{component}_{name}" if component else name, [])
            matches = [path for path in matches if not component or path.startswith(f"{component}.")]
            if len(matches) > 1:
                raise CheckpointError(
                    f"The name '{name}' fits two modules of {self.path}: {' and '.join(matches[:2])}. Convert the file "
                    "with the library that wrote it."
                )
            if matches:
                return matches[0]
        return None


def flatten_paths(paths: Iterable[str]) -> dict[str, str]:
    """Return path → path with "_" for ".". Raises CheckpointError if two paths get the same name."""
    names = {path: path.replace(".", "_") for path in paths}
    index_by_name(
        names, lambda name, a, b: f"{a} and {b} would both be named '{name}'. Choose a format with dotted names: peft."
    )
    return names


def index_by_name(names: Mapping[str, str], describe: Callable[[str, str, str], str]) -> dict[str, str]:
    """Return the inverse of a dict: name → its key.

    Raises CheckpointError with the text `describe(name, first key, second key)` if two keys have one name.
    """
    keys: dict[str, str] = {}
    for key, name in names.items():
        if (first := keys.setdefault(name, key)) != key:
            raise CheckpointError(describe(name, first, key))
    return keys


def make_missing_error(adapter: AdapterFile, names: Iterable[str], base: Base) -> BaseModelMismatchError:
    """Return (not raise) the error for names that a base model lacks; the text has the first four of them."""
    return make_misfit_error(f"{base.path} has no modules for {join_some([*names], 4)} of {adapter.path}")


def check_modules(adapter: AdapterFile, base: Base) -> Base:
    """Return the base under the adapter's names, after a check that its modules and the shapes of LoRA factors fit.

    Stacks of experts may be missing from the base.

    Raises:
        BaseModelMismatchError: a module is missing, or its weight has another shape.
    """
    known = choose_names(base, adapter.modules)
    modules = set(known.modules)
    # for experts, some bases have a parameter, and others a module per expert
    absent = [path for path, module in adapter.modules.items() if path not in modules and module.kind != "experts"]
    if absent:
        raise make_missing_error(adapter, absent, base)
    check_shapes(adapter.low_rank, adapter, known)
    return known


def to_model_names(adapter: AdapterFile, base: Base) -> tuple[AdapterFile, Base]:
    """Return the adapter and the base under the parameter names of the base's model, if the adapter has the names of
    the base's files.

    Both are unchanged if no library knows the model, or the model has all of the adapter's modules.
    """
    view = view_by_model_names(base)
    if view is None or set(view.modules).issuperset(adapter.modules):
        return adapter, base
    names = {id(tensor): name for name, tensor in view.tensors.items()}
    pairs = ((key, names[id(tensor)]) for key, tensor in base.tensors.items() if id(tensor) in names)
    return rename_modules(adapter, {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in pairs}), view


def rename_modules(adapter: AdapterFile, new: Mapping[str, str]) -> AdapterFile:
    """Return a copy of an adapter with other module paths, also in the names of whole tensors and token rows.

    Args:
        new: old path → new path; modules that are not in it keep their paths.
    """

    modules = {new.get(path, rename_tensor(path, new)): module for path, module in adapter.modules.items()}
    full = {rename_tensor(name, new): value for name, value in adapter.full.items()}
    rows = {rename_tensor(name, new): value for name, value in adapter.rows.items()}
    return replace(adapter, modules=modules, full=full, rows=rows)


def rename_tensor(name: str, modules: Mapping[str, str]) -> str:
    """Return a tensor's name with its module renamed by `modules` (old path → new path); the name itself if `modules`
    lacks it.
    """
    module, _, leaf = name.rpartition(".")
    return f"{modules[module]}.{leaf}" if module in modules else name


def check_shapes(loras: Mapping[str, LowRank], adapter: AdapterFile, base: Base) -> None:
    """Raise BaseModelMismatchError if LoRA factors have no shape for an update of the base's weight; up to 4 are named.

    Experts, modules that the base lacks, and bases with a quantization config are skipped. Weights (in, out) are
    accepted for model types in CONV1D.

    Args:
        loras: by the base's module paths.
    """
    if "quantization_config" in base.config:
        return
    turned = base.config.get("model_type") in CONV1D
    shapes = {path: base.shapes.get(f"{path}.weight") for path, module in loras.items() if module.kind != "experts"}
    wrong = [
        f"{path}: A {loras[path].A.shape} and B {loras[path].B.shape} for a weight {shape}"
        for path, shape in shapes.items()
        if shape is not None and not is_update_of(loras[path], shape, turned)
    ]
    if wrong:
        raise make_misfit_error(f"{adapter.path} is of other shapes than {base.path}: {join_some(wrong, 4)}")


def is_stored_in_out(adapter: AdapterFile, base_config: Json) -> bool:
    """Return True if linear weights are stored (in, out): by the adapter's fan_in_fan_out, or without that field for
    the base's model types in CONV1D, such as "gpt2".
    """
    flag = adapter.config.get("fan_in_fan_out")
    return base_config.get("model_type") in CONV1D if flag is None else bool(flag)


def is_update_of(lora: LowRank, shape: tuple[int, ...], transposed: bool = False) -> bool:
    """Return True if the factors of a module give an update of a weight of this shape; False if A and B have different
    ranks or fewer than two dimensions.

    Experts fit the shape (E, out, in), and any shape below three dimensions, since a base may store each expert by
    itself. An embedding fits (vocabulary, dim). All others fit (out, in, kernel…), and a kernel of 1 × 1 for any of
    them. Linear factors have to be matrices. `transposed` also accepts the reversed shape.
    """
    A, B = lora.A.shape, lora.B.shape
    if lora.kind == "experts":
        return len(shape) < 3 or (len(A) == len(B) == 3 and shape == (B[0], B[1], A[2]))
    if len(A) < 2 or len(B) < 2 or A[0] != B[1] or (lora.kind == "linear" and len(A) + len(B) != 4):
        return False
    if lora.kind == "embedding":
        return shape == (A[1], B[0])
    of_update = (B[0], *(lora.mid.shape[2:] if lora.mid else A[2:]))
    update_shape = (of_update[0], A[1], *of_update[1:])
    return (
        shape == update_shape
        or (transposed and shape == update_shape[::-1])
        or (shape[:2] == update_shape[:2] and set(shape[2:]) == {1})
    )


# layers


def group_layers_by_kind(paths: Iterable[str]) -> dict[str, set[str]]:
    """Return path with "#" for the layer number → the layer numbers (as texts) that have it.

    Paths without a number are skipped.
    """
    out: dict[str, set[str]] = {}
    for path in paths:
        if numbered := split_layer_number(path):
            out.setdefault(numbered[0], set()).add(numbered[1])
    return out


def split_layer_number(path: str) -> tuple[str, str] | None:
    """Return a path with "#" in place of its first number between dots, and that number as a text; None if it
    has none.
    """
    match = re.search(r"\.(\d+)\.", path)
    return (f"{path[: match.start(1)]}#{path[match.end(1) :]}", match[1]) if match else None


def mask_layer_number(path: str) -> str:
    """Return a path with "#" in place of its first number between dots; without a number, the path itself."""
    numbered = split_layer_number(path)
    return numbered[0] if numbered else path


def last_name(path: str) -> str:
    """Return the last part of a dotted path."""
    return path.rpartition(".")[2]


T = TypeVar("T")


def find_pipeline_parts(paths: Iterable[str]) -> set[str]:
    """Return the pipeline parts that the paths begin with: unet, transformer or text_encoder, also with a number such
    as "text_encoder_2".

    Empty if any path begins with another name.
    """
    first = {path.partition(".")[0] for path in paths}
    parts = {part for part in first if part.rstrip("_0123456789") in COMPONENTS}
    return parts if parts == first else set()


def is_pipeline(base: Base | None) -> bool:
    """Return True if the base's config has a `_class_name` that ends with "Pipeline"; False for None.

    Names alone are not enough: GPT-2 has a "transformer", too.
    """
    return base is not None and str(base.config.get("_class_name", "")).endswith("Pipeline")


def split_pipeline(adapter: AdapterFile) -> dict[str, AdapterFile]:
    """Return part → adapter of that part, with paths without the part's name; {} if the adapter is for a single model.

    Parts are sorted, their configs empty, `selected` None and `is_pipeline` False. Each has the common method of its
    modules, else the adapter's. Unknown keys go to the first part.
    """
    paths = [*adapter.modules, *adapter.full, *adapter.rows] if adapter.is_pipeline else []
    out: dict[str, AdapterFile] = {}
    for part in sorted(find_pipeline_parts(paths)):
        start = f"{part}."

        def take_part(by_path: dict[str, T], start: str = start) -> dict[str, T]:
            """Return the entries with a path that begins with `start`, the part's name and a dot, without it."""
            return {path.removeprefix(start): value for path, value in by_path.items() if path.startswith(start)}

        out[part] = replace(
            adapter, modules=take_part(adapter.modules), full=take_part(adapter.full), rows=take_part(adapter.rows),
            unknown_keys=[] if out else adapter.unknown_keys, config={}, selected=None, is_pipeline=False,
        )  # fmt: skip
        out[part].method = find_common_method(out[part], adapter.method)
    return out


def select_pipeline_part(adapter: AdapterFile, base: Base) -> AdapterFile:
    """Return the part of a pipeline's adapter that fits one model; or the whole adapter if not exactly one part fits.

    A part fits if all its module names are the model's as they are, and the shapes of LoRA factors are right. The whole
    adapter is also returned if it is for a single model.
    """
    known, fitting = set(base.modules), []
    for part in split_pipeline(adapter).values():
        with suppress(BaseModelMismatchError):
            check_shapes(part.low_rank, part, base)
            fitting += [part] if known.issuperset(part.modules) else []
    return fitting[0] if len(fitting) == 1 else adapter


def find_common_method(adapter: AdapterFile, otherwise: str) -> str:
    """Return the method of all modules if there is only one, and `otherwise` if there are none or several."""
    methods = {module.method for module in adapter.modules.values()}
    return methods.pop() if len(methods) == 1 else otherwise


def join_pipeline(parts: dict[str, AdapterFile], path: str) -> AdapterFile:
    """Return the adapters of a pipeline's parts as one adapter: paths become "part.path", unknown keys "part: key".

    The config is empty, `selected` None and `is_pipeline` True; method, format, base, metadata and all other fields are
    those of the first part.
    """
    out = replace(next(iter(parts.values())), path=path, modules={}, full={}, rows={}, shared={}, unknown_keys=[],
                  config={}, selected=None, is_pipeline=True)  # fmt: skip
    for part, of_part in parts.items():
        for name in ("modules", "full", "rows", "shared"):
            getattr(out, name).update({f"{part}.{key}": value for key, value in getattr(of_part, name).items()})
        out.unknown_keys += [f"{part}: {key}" for key in of_part.unknown_keys]
    return out


def count_heads(base: Base, keys: bool) -> int:
    """Return the number of query heads of a base by its config, or with `keys` of key heads (query heads if it names
    none).

    Raises BaseNeededError if the config has no valid number.
    """
    heads = base.config.get("num_attention_heads")
    heads = base.config.get("num_key_value_heads") or heads if keys else heads
    if not isinstance(heads, int) or heads < 1:
        raise BaseNeededError(f"The config of {base.path} has no number of heads. Add num_attention_heads.")
    return heads
