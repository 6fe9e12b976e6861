# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""A survey of a model in one walk: modules by path, carriers of adapters, and the use of a layer's weight by modules
around it.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from graft.core import merging
from graft.core.carrier import carrier_of, layer_in
from graft.core.errors import shorten_text
from graft.core.layer import AdapterLayer
from graft.core.ops import Op, Opaque, find_op
from graft.core.site import Site
from graft.core.wrappers import find_inner_attribute, find_inner_module
from graft.inject.beside import ModulesToSaveWrapper, RowsLayer
from graft.storage import codes
from graft.storage.experts import ExpertBlock
from graft.storage.find import find_store, find_store_of_tensor, find_tensor_store, innermost
from graft.storage.shared_work import find_piece

Path = tuple[str, ...]  # of attributes, from a module on; ITEM for one of a list

ITEM = "[]"
TENSORS = {"weight", "bias"}
FACTS = {
    "dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_meta", "is_cuda", "is_quantized",
    "element_size", "layout", "itemsize", "get_device", "is_floating_point", "grad",
}  # fmt: skip
TAKES_FACTS = {"isinstance", "hasattr", "to", "type_as", "id"}  # functions that use no value of a tensor
SETS_UP = re.compile(r"__init__|_*(init|reset|tie|untie|resize|set|load|save|prune|convert|smart)(_|ialize|$)")


class Use(NamedTuple):
    """The use of an inner module by the class around it."""

    reads: bool = False  # computes with its weight or bias
    calls: bool = False  # calls it, or passes it to a function that may


class SourceUses(ast.NodeVisitor):
    """A reader of a function's syntax tree: it collects the paths of modules that the function reads or calls, from
    `self` on.
    """

    def __init__(self, me: str):
        """Begin with no path. `me` is the name of the function's first parameter, usually `self`."""
        self.known: dict[str, Path] = {me: ()}  # by the name of a variable
        self.reads: set[Path] = set()
        self.calls: set[Path] = set()
        self.hands_on = False  # passes `self` to a function that may call any inner module

    def path(self, node: ast.AST) -> Path | None:
        """Return the path of attributes from `self` for an expression; None if it does not begin there.

        A name gives its path in `known`: `self`, or a variable that a path was assigned to. An attribute adds its name,
        an index adds "[]", a slice adds nothing. Any other expression gives None.
        """
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            inner = self.path(node.value)
            return None if inner is None else (*inner, node.attr)
        if isinstance(node, ast.Subscript):
            inner = self.path(node.value)
            if inner is None or isinstance(node.slice, ast.Slice):
                return inner
            return (*inner, ITEM)
        return None

    def visit(self, node: ast.AST) -> None:
        """Record the use of an expression with a path from `self`, as a write unless it is loaded.

        Then visit the indices in its brackets.

        Other nodes are visited by the superclass.
        """
        path = self.path(node)
        if path is None:
            super().visit(node)
            return
        self.add_use(path, writes=not isinstance(getattr(node, "ctx", None), ast.Load))
        while not isinstance(node, ast.Name):  # the index in brackets
            if isinstance(node, ast.Subscript):
                self.visit(node.slice)
            node = node.value  # type: ignore[attr-defined]

    def add_use(self, path: Path, writes: bool = False) -> None:
        """Record a path of attributes.

        Without "weight" or "bias" after its first part, it counts as called (`calls`).

        Else it is a read (in `reads`) of the module that has the tensor. Writes are not recorded, nor are facts such as
        `.dtype` or `.shape`; `.data` is passed over.
        """
        at = next((i for i, part in enumerate(path) if i and part in TENSORS), None)
        if at is None:
            self.calls.add(path)
            return
        attributes = [part for part in path[at + 1 :] if part != "data"]
        if not writes and not (attributes and attributes[0] in FACTS):
            self.reads.add(path[:at])

    def visit_Call(self, node: ast.Call) -> None:
        """Record the function and arguments of a call.

        A function on a path of `self` counts as a use of that path, and its object as called. In-place methods (the
        name ends, and does not begin, with "_") such as `weight.copy_()` count as neither. Passing `self` itself sets
        `hands_on`, since the function may call anything. `isinstance`, `hasattr`, `id`, `to` and `type_as` use no
        values: paths in their arguments are not visited. Other arguments are.
        """
        path, name = self.path(node.func), getattr(node.func, "id", getattr(node.func, "attr", ""))
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        if path is None:
            self.visit(node.func)
        elif not name.endswith("_") or name.startswith("_"):  # else it writes to the tensor
            self.add_use(path)
            self.calls.add(path[:-1])
        for value in values:
            self.hands_on |= self.path(value) == () and name not in TAKES_FACTS
            if not (name in TAKES_FACTS and self.path(value)):
                self.visit(value)

    def visit_Compare(self, node: ast.Compare) -> None:
        """Visit a comparison, unless its first operator is `is` or `is not`, which use no value."""
        if not isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Remember in `known` the path that is assigned to a variable, unless it contains a weight or bias.

        A path that is remembered does not count as used.

        Any other assignment is visited as usual. Of several targets only the first counts.
        """
        path, target = self.path(node.value), node.targets[0]
        if path is None or TENSORS & set(path) or not isinstance(target, ast.Name):
            self.generic_visit(node)
        else:
            self.known[target.id] = path

    def visit_For(self, node: ast.For) -> None:
        """Remember the variable of a loop over a path below `self` in `known` as the path of one of its items, if it is
        a single name.

        Visit the iterated expression, the body and the `else` part.
        """
        path = self.path(node.iter)
        if path and isinstance(node.target, ast.Name):
            self.known[node.target.id] = (*path, ITEM)
        for part in (node.iter, *node.body, *node.orelse):
            self.visit(part)


def list_names(code: CodeType) -> Iterator[str]:
    """Yield the names of attributes and globals that a function uses, those of functions within it included."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from list_names(inner)


def parse_function(function: FunctionType) -> SourceUses | None:
    """Return the modules that a function reads and calls, from its source; None if it has no source that can be read
    and parsed. Its first argument counts as `self`.
    """
    try:
        lines = inspect.getsourcelines(function)[0]
        tree = ast.parse("".join(["if 1:\n", *lines] if lines[0][:1].isspace() else lines))
    except (OSError, TypeError, SyntaxError):
        return None
    source = SourceUses(function.__code__.co_varnames[0])
    source.visit(tree)
    return source


SEEN: WeakKeyDictionary[FunctionType, SourceUses | None] = WeakKeyDictionary()
SOURCES: WeakKeyDictionary[type, dict[Path, Use]] = WeakKeyDictionary()


def parse_functions(functions: Iterable[FunctionType]) -> list[SourceUses]:
    """Return the uses of each function that has a source. Each function is parsed once and kept in `SEEN`."""
    for function in functions:
        if function not in SEEN:
            SEEN[function] = parse_function(function)
    return [seen for function in functions if (seen := SEEN[function]) is not None]


def find_inner_uses(kind: type) -> dict[Path, Use]:
    """Return {path: use} for the modules within instances of a class; {} if it reads the weight of none.

    The source of the methods along the class's MRO is parsed, of equal names the first. Torch's classes and methods
    that set up, load or save are left out. All are parsed only if one that names a tensor reads a weight. If a method
    passes `self` to other code, all paths count as called. The result is kept in `SOURCES` per class.
    """
    if kind in SOURCES:
        return SOURCES[kind]
    functions: dict[str, FunctionType] = {}
    for cls in kind.__mro__:
        if not f"{cls.__module__}.".startswith("torch."):  # for torch's see `list_read_children`, and `attach`
            for name, value in vars(cls).items():
                # of a property its getter; decorators that keep `__wrapped__` are taken off
                written: Any = value.fget if isinstance(value, property) else value
                function = inspect.unwrap(written)
                if isinstance(function, FunctionType) and function.__code__.co_argcount and not SETS_UP.match(name):
                    functions.setdefault(name, function)
    # few functions; to parse all would take 0.25 s
    naming = [f for f in functions.values() if TENSORS & set(list_names(f.__code__))]
    uses: dict[Path, Use] = {}
    if any(seen.reads for seen in parse_functions(naming)):
        sources = parse_functions(functions.values())
        reads, calls = {p for s in sources for p in s.reads}, {p for s in sources for p in s.calls}
        handed = any(s.hands_on for s in sources)
        uses = {path: Use(path in reads, handed or path in calls) for path in reads | calls}
    SOURCES[kind] = uses
    return uses


Wrapper = ModulesToSaveWrapper | RowsLayer
Place = tuple[nn.Module, str]  # (parent, attribute)


@dataclass
class ModuleTree:
    """The result of one walk of a model."""

    root: nn.Module = field(default_factory=nn.Module)  # the model, without wrappers around it
    modules: dict[str, nn.Module] = field(default_factory=dict)  # by path; layers and wrappers are leaves, blocks not
    places: dict[str, Place] = field(default_factory=dict)
    again: dict[str, list[Place]] = field(default_factory=dict)  # further places of the module at a path
    layers: dict[str, AdapterLayer] = field(default_factory=dict)
    wrappers: dict[str, Wrapper] = field(default_factory=dict)
    owners: dict[nn.Parameter, int] = field(default_factory=dict)  # number of the base's modules that hold a parameter
    vacant: dict[str, nn.Module] = field(default_factory=dict)  # bases of carriers that have no adapter left
    # layers of parameters of one module, by its path
    nests: dict[str, list[AdapterLayer]] = field(default_factory=dict)
    ops: dict[type, Op] = field(default_factory=dict)  # of types of modules that only this injection knows
    parameters: int = 0
    absent: dict[str, str] = field(default_factory=dict)  # path of a module of another pipeline stage → of its parent
    checkpointing: bool = False  # some module has gradient checkpointing switched on

    def attach(self, path: str, module: nn.Module) -> None:
        """Put `module` into each place of the module at a path, without `setattr`: several places if one object has
        several names, as a T5's embedding.

        A parent with torch's fast path of TransformerEncoderLayer gets that switched off, since it would not call the
        module.
        """
        for parent, name in (self.places[path], *self.again.get(path, ())):
            if "activation_relu_or_gelu" in parent.__dict__:
                parent.activation_relu_or_gelu = 0  # torch's fast path would not call the layer
            parent._modules[name] = module  # setattr would only look the old one up again

    @property
    def is_quantized(self) -> bool:
        """True if the model is marked as quantized, or a module of it has a packed weight."""
        return codes.is_quantized(self.root)

    def find_castable_parameters(self, keep_fixed: bool = False) -> list[nn.Parameter]:
        """Return the parameters that may get another dtype: numbers of 16 to 64 bits that are no part of a packed
        weight.

        With `keep_fixed` there are none if the model's quantization method fixes the dtype of its other weights.
        """
        is_fixed = keep_fixed and codes.dtype_is_fixed(self.root)
        return [] if is_fixed else codes.find_castable_parameters(self.root)

    @cached_property
    def paths(self) -> dict[nn.Module, str]:
        """The path of each module. Computed once."""
        return {module: path for path, module in self.modules.items()}

    @cached_property
    def readers(self) -> dict[str, dict[Path, Use]]:
        """{path: {inner path: use}} of the modules that read the weight of a module within them.

        The model itself has the path "". Few models have any. Computed once.
        """
        kinds: dict[type, list[str]] = {}
        for path, m in [("", self.root), *self.modules.items()]:
            kinds.setdefault(type(innermost(m)), []).append(path)
        return {path: uses for kind, paths in kinds.items() if (uses := find_inner_uses(kind)) for path in paths}


def check_model(model: object) -> None:
    """Raise TypeError if `model` is no module; for a class, the text names another remedy."""
    if isinstance(model, type):
        raise TypeError(f"A model has to be a torch.nn.Module, got the class {model.__name__}. Make an object of it.")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"A model has to be a torch.nn.Module, got {shorten_text(repr(model))}. Load it first, as "
            "AutoModelForCausalLM.from_pretrained() does."
        )


def survey_model(model: nn.Module) -> ModuleTree:
    """Walk `model` once and return its modules, places, carriers and parameter counts. The model is not changed.

    - A carrier with adapters is a leaf: an entry in `layers` or `wrappers`, and its base's parameters are counted. The
      walk enters only a layer around a block, and the base of layers of parameters (`nests`).
    - A carrier without adapters goes into `vacant`, and the walk continues in its base. Beside layers of other
      parameters that have adapters it is left out.
    - A wrapper around the whole model: `root` is the module in it.
    - A module met again gets another place (`again`), no second entry. Entries of None are skipped.

    `parameters` counts each parameter once; `owners` counts the modules that have it, and a merged layer as an owner of
    the weight that it was tied to. `checkpointing` notes whether gradient checkpointing is on in a module.

    Raises:
        TypeError: `model` is a class or no module.
    """
    check_model(model)
    tree = ModuleTree(root=model)
    seen: dict[nn.Module, str] = {}

    modules, places, owners = tree.modules, tree.places, tree.owners
    numbers = 0

    def visit_children(module: nn.Module, path: str) -> None:
        """Record each child of a module with its path and place, count its parameters, and look into it.

        Children of None are skipped.

        The module recorded at a path is that within wrappers around the whole module. A child that was seen before only
        gets one more place (`tree.again`), unless a wrapper is between; it is not entered again.
        """
        for name, child in module._modules.items():
            if child is None:
                continue
            parent, attribute = module, name
            inner: Any = child
            while (inside := find_inner_attribute(inner)) is not None:
                parent, attribute, inner = inner, inside, inner._modules[inside]
            place = parent, attribute
            if child in seen:
                if inner is child:  # else its wrapper has it in all places
                    tree.again.setdefault(seen[child], []).append(place)
                continue
            key = f"{path}.{name}" if path else name
            count_parameters(child)
            seen[child] = key
            modules[key] = inner
            places[key] = place
            look_into(inner, key)

    def count_parameters(module: nn.Module) -> None:
        """Count the parameters that a module holds itself, without children.

        Each adds one owner to its count in `owners`, also when the module holds it under two names. A parameter without
        an owner before adds `codes.count_numbers` to the total.

        Sets `tree.checkpointing` if `gradient_checkpointing` is true in the instance's `__dict__`; an attribute of the
        class does not count.
        """
        nonlocal numbers
        if module.__dict__.get("gradient_checkpointing"):
            tree.checkpointing = True
        for p in module._parameters.values():
            if p is not None:
                n = owners[p] = owners.get(p, 0) + 1
                if n == 1:
                    numbers += codes.count_numbers(p)

    def look_into(module: nn.Module, path: str) -> None:
        """Continue the walk below a module: through its carrier, through a wrapper around the whole model, which makes
        the inner module the tree's root, or to its children.
        """
        if (carrier := carrier_of(module)) is not None:
            if live := [layer for layer in list_nested_layers(carrier) if layer.adapters]:
                add_nest(innermost(live[0]), live, path)
            else:
                add_carrier(carrier, path)
        elif (inner := find_inner_module(module)) is not None:  # the model itself is in a wrapper
            tree.root = inner
            count_parameters(inner)
            look_into(inner, path)
        elif module._modules:
            visit_children(module, path)

    def count_tied_weight(layer: AdapterLayer) -> None:
        """Count one more owner of the weight that a merged layer was tied to before its merge.

        For a layer without merges, or one that was not tied, does nothing.
        """
        if layer.state.undo and (tied := merging.find_tied_weight(layer)) is not None:
            owners[tied] = owners.get(tied, 0) + 1

    def add_nest(base: nn.Module, live: list[AdapterLayer], path: str) -> None:
        """Record the layers with adapters of a module's parameters in `tree.nests` and, by their keys, in
        `tree.layers`.

        The module's parameters and the weights that merged layers were tied to are counted. Its children are visited.
        """
        tree.nests[path] = live
        tree.layers.update({layer.site.key: layer for layer in live})
        seen[base] = path
        count_parameters(base)
        for layer in live:
            count_tied_weight(layer)
        visit_children(base, path)

    def add_carrier(host: Any, path: str) -> None:
        """Record a layer (in `layers`) or wrapper (in `wrappers`) at its path.

        One without adapters is recorded as `vacant` and its base as the module; the walk continues in its base. For the
        model itself without adapters nothing is recorded. A layer around a block is walked. Of any other the parameters
        of all modules in the base are counted, and the weight that a merged layer was tied to.
        """
        base = host.base_module
        if not host.adapters:
            if not path:  # the model itself
                return
            tree.vacant[path] = base
            seen[base] = path
            modules[path] = base
            count_parameters(base)
            look_into(base, path)
            return
        (tree.wrappers if host.beside else tree.layers)[path] = host
        if is_block(host):
            seen[base] = path
            count_parameters(base)
            visit_children(base, path)
            return
        for part in base.modules() if base._modules else (base,):
            count_parameters(part)
        count_tied_weight(host)

    count_parameters(model)
    look_into(model, "")
    tree.parameters = numbers
    return tree


def skip_empty_carriers(module: nn.Module | None) -> nn.Module | None:
    """Return the module beneath carriers without adapters; the module itself if it is none.

    A carrier with adapters is returned, and None for None.
    """
    while (carrier := carrier_of(module)) is not None and not carrier.adapters:
        module = carrier.base_module
    return module


def is_block(carrier: object) -> bool:
    """Return True for a layer around a module that has no known op, so that modules within it may take adapters as
    well. False for a layer of token rows and all other objects.
    """
    return isinstance(carrier, AdapterLayer) and not (carrier.beside or carrier.op.known)


def list_nested_layers(carrier: object) -> list[AdapterLayer]:
    """Return the layers of parameters around a module, the innermost first; [] for any other carrier."""
    nest: list[AdapterLayer] = []
    while isinstance(carrier, AdapterLayer) and carrier.op.opaque:
        nest.append(carrier)
        carrier = carrier.base_layer
    return nest[::-1]


def list_read_children(module: nn.Module) -> tuple[str, ...]:
    """Return the names of children that a module reads without a call, next to an adapted parameter: `out_proj` of an
    attention.
    """
    return ("out_proj",) if isinstance(module, nn.MultiheadAttention) else ()


def why_not_attention(m: nn.MultiheadAttention) -> str | None:
    """Return why a MultiheadAttention cannot be adapted: separate q, k and v weights (no `in_proj_weight`), or an
    `out_proj` that is not Linear, beneath a layer on it. None if it can.
    """
    if m.in_proj_weight is None:
        return "Only same embed for query/key/value is supported as of now for MultiheadAttention"
    out = getattr(m.out_proj, "base_layer", m.out_proj)
    if not isinstance(out, nn.Linear):
        return f"out_proj must be an instance of nn.Linear for MultiheadAttention, and it is a {type(out).__name__}"
    return None


def get_site(key: str, module: nn.Module, tree: ModuleTree) -> Site:
    """Return the site of the module at path `key`: the one of its layer if it has one there, else a new one.

    A layer of a parameter does not count as the module's. A supported attention gets the site of its `in_proj_weight`.
    An op in `tree.ops` for the module's type replaces the known one, with the store of the weight tensor alone. The new
    site notes whether several modules share the weight (`shared`), and whether modules around it read or call it
    (`is_read`, `is_called`).
    """
    layer = layer_in(module)
    if layer is not None and layer.site.key == layer.site.path:
        return layer.site  # type: ignore[no-any-return]
    if key in tree.nests:
        module = innermost(module)
    if isinstance(module, nn.MultiheadAttention) and why_not_attention(module) is None:
        return make_parameter_site(key, module, "in_proj_weight", tree, key)
    weight = module._parameters.get("weight")
    shared = weight is not None and tree.owners.get(weight, 0) > 1
    is_read, is_called = find_weight_uses(key, tree)
    custom_op = tree.ops.get(type(module))
    op = find_op(module) if custom_op is None else custom_op
    store = find_store(module) if custom_op is None else find_store_of_tensor(module, "weight")
    piece = find_piece(module, op)
    return Site(key, module, op, store, shared=shared, is_read=is_read, is_called=is_called, piece=piece)


def find_weight_uses(key: str, tree: ModuleTree) -> tuple[bool, bool]:
    """Return (is_read, is_called): whether modules around the one at `key` read its weight, and whether they call it.

    The uses in `tree.readers` count of each module around it, by the path from there with "[]" for a number. A module
    that nobody reads counts as called. `out_proj` of an attention is read and not called.
    """
    parent, _, name = key.rpartition(".")
    if parent in tree.modules and name in list_read_children(innermost(tree.modules[parent])):
        return True, False
    parts = key.split(".") if tree.readers else []
    inside = tuple(ITEM if part.isdigit() else part for part in parts)
    uses = [
        use
        for i in range(len(parts))
        if (uses_there := tree.readers.get(".".join(parts[:i]))) and (use := uses_there.get(inside[i:])) is not None
    ]
    is_read = any(use.reads for use in uses)
    return is_read, not is_read or any(use.calls for use in uses)


def make_parameter_site(path: str, module: nn.Module, name: str, tree: ModuleTree, key: str | None = None) -> Site:
    """Return a new site for one parameter of a module, with an `Opaque` op.

    A stack has the shape (n, out, in), or (n, in, out) if the module says `is_transposed`. A parameter with fewer than
    three dimensions, unless it is packed, is no stack. `experts` is set for a stack if graft can run its module,
    `shared` if several modules have the parameter.

    Args:
        key: the site's key; None: `path.name`.
    """
    weight: Any = module._parameters.get(name)
    shared = weight is not None and tree.owners.get(weight, 0) > 1
    block = ExpertBlock(module)
    packed = block.packed_shape(name)
    flat = packed is None and weight.dim() < 3
    op, store = Opaque(name, not flat and block.is_transposed, packed), find_tensor_store(module, name)
    experts = block if not flat and block.can_run else None
    return Site(key or f"{path}.{name}", module, op, store, name, shared, path, experts=experts)


def get_type_name(module: nn.Module) -> str:
    """Return the class name of a module; for a layer that of its base module."""
    return str(module.site.type_name) if isinstance(module, AdapterLayer) else type(module).__name__


def is_linear(module: nn.Module) -> bool:
    """Return True for a linear layer, also beneath an adapter layer."""
    layer = layer_in(module)
    return find_op(module).linear if layer is None else layer.op.linear
