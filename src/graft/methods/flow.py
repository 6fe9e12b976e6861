# SPDX-License-Identifier: Apache-2.0
"""Follow the values through a block of a transformer: which sums they enter, and which norms act on these sums."""

from __future__ import annotations

import dis
import inspect
import operator
import sys
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.fx import Graph, Node
from torch.fx.proxy import Attribute, GraphAppendingTracer, Proxy

from graft.core.carrier import carrier_of
from graft.core.errors import UnsupportedLayerError, shorten_text
from graft.core.ops import find_op
from graft.core.wrappers import find_inner_attribute

# names of functions and methods, by the inputs that their results continue: all of them, or the first
SUMS = frozenset({"add", "iadd", "add_"})
FACTORS = frozenset({"mul", "imul", "mul_"})
CASTS = frozenset({"to", "float", "type_as"})
PASSES = CASTS | {"sub", "truediv", "div", "clamp", "dropout", "getitem", "view", "reshape"}
ENCODER = "encoder_hidden_states"  # the argument of a block for the states of an encoder


class UnfollowedError(UnsupportedLayerError):
    """The code of a block cannot run on values that do not exist."""


class Flow(NamedTuple):
    """The sum of a block's MLP and its residual, by paths in the block.

    Attributes:
        norm: the norm of this sum, if its output is the block's output.
        residual: the module that gets the residual as its input; None if no module does.
        crosses: the attentions to the states of an encoder.
    """

    norm: str | None
    residual: str | None
    crosses: frozenset[str]


class Items:
    """A value that does not exist, as a sequence: of as many items as the unpacking code expects, or of two."""

    def __len__(self) -> int:
        """Return 2."""
        return 2

    def __getitem__(self, i: Any) -> Any:
        """Return item `i` as a recorded value; an integer index gives the same node each time."""
        of: Any = self
        proxy = of.tracer.create_proxy("call_function", operator.getitem, (self, i), {})
        return of.tracer.proxy(of.tracer.items.setdefault((of.node, i), proxy.node)) if isinstance(i, int) else proxy

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator over as many items as the caller's bytecode unpacks at this place, else over two."""
        caller, n = sys._getframe(1), 2  # without a frame that holds itself, as torch's own way leaves
        for step in dis.get_instructions(caller.f_code):
            if step.offset == caller.f_lasti and step.opname == "UNPACK_SEQUENCE":
                n = step.argval
        value: Any = self
        return iter([value[i] for i in range(n)])


class Field(Items, Attribute):
    """An attribute of a value, such as its shape."""


class Value(Items, Proxy):
    """A value that does not exist."""

    def __getattr__(self, name: str) -> Attribute:
        """Return the attribute `name` of the value as a `Field`, which does not exist either."""
        return Field(self, name)


class Recorder(GraphAppendingTracer):
    """Records the calls of a block on values that do not exist. A condition on such a value is False.

    Args:
        attentions: by path.
        norms: by path.
        mlp: the module that ends the MLP, by path.
        around: run the code of modules around attentions and that end alone; those next to them record that they are
            called.
        tuples: attentions return a tuple of one item.
    """

    def __init__(self, attentions: Collection[str], norms: Collection[str], mlp: str, around: bool, tuples: bool):
        """Start an empty graph.

        Attentions and `mlp` are the ends, modules with outputs that are no sum with their input.

        around: only the code of modules around the ends runs. tuples: attentions return a tuple of one item.
        """
        super().__init__(Graph())
        self.attentions, self.norms = frozenset(attentions), frozenset(norms)
        self.ends = {*attentions, mlp}  # modules without a residual in their output; linear layers are added
        self.inner = tuple(self.ends) if around else None
        self.tuples = tuples
        self.items: dict[tuple[Node, int], Node] = {}

    def proxy(self, node: Node) -> Proxy:
        """Return a `Value` for a node."""
        return Value(node, self)

    def to_bool(self, obj: Proxy) -> bool:
        """Return False for each condition on a value that does not exist."""
        return False

    def create_arg(self, a: Any) -> Any:
        """Return the graph's form of an argument; None for an object that torch.fx cannot hold."""
        try:
            return super().create_arg(a)
        except NotImplementedError:  # an object that holds no value of the block
            return None

    def value(self, name: str) -> Proxy:
        """Return a value that does not exist, as a new argument `name` of the graph."""
        return self.create_proxy("placeholder", name, (), {})

    def copy(self, module: nn.Module, path: str = "") -> nn.Module:
        """Return a copy of a module without adapters, hooks and wrappers, in eval mode; its tensors are shared with the
        original. A `forward` that was set on the module itself is dropped.

        Instead of a wrapper, its inner module is copied; the name of the wrapper's attribute is added to the path.
        Ends, norms and modules of torch without children get a forward that only records the call (`note`). The code of
        others runs, with copies of their children; with `around`, only that of modules around ends. The top module
        (path "") always runs. Linear layers are added to `ends`, which makes them record, too.
        """
        while (carrier := carrier_of(module)) is not None or find_inner_attribute(module) is not None:
            if carrier is None:
                path = f"{path}.{find_inner_attribute(module)}".lstrip(".")
            module = next(module.children()) if carrier is None else carrier.base_module
        children = {name: child for name, child in module._modules.items() if child is not None}
        copy = object.__new__(type(module))
        copy.__dict__.update(module.__dict__, training=False)
        copy.__dict__.pop("forward", None)  # of a library that moves weights before each call
        copy.__dict__.update({name: {} for name in module.__dict__ if name.endswith("_hooks")})
        if path and find_op(module).linear:
            self.ends.add(path)
        runs = bool(children) or not type(module).__module__.startswith("torch.")
        if self.inner is not None:
            runs = any(p.startswith(f"{path}.") for p in self.inner)
        if path and (not runs or path in self.ends or path in self.norms):
            copy.__dict__["forward"] = partial(self.note, path)
        else:
            inside = {name: self.copy(child, f"{path}.{name}".lstrip(".")) for name, child in children.items()}
            copy.__dict__["_modules"] = {**module._modules, **inside}
        return copy

    def note(self, path: str, /, *args: Any, **kwargs: Any) -> Any:
        """Record a call of the module at `path` and return its value; as a tuple of one for an attention with
        `tuples`.
        """
        proxy = self.create_proxy("call_module", path, args, kwargs)
        return (proxy,) if self.tuples and path in self.attentions else proxy

    def run(self, block: nn.Module, optional: Callable[[inspect.Parameter], bool]) -> tuple[Node, Any]:
        """Run the forward of a block's copy on values that do not exist.

        Return the node of its first input, and its output.

        optional: returns True for an argument with a default that the block gets, too.
        """
        forward: Any = type(block).forward
        _, first, *parameters = inspect.signature(forward).parameters.values()
        x = self.value(first.name)
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        needed = [p.name for p in named if p.default is p.empty or optional(p)]
        return x.node, self.create_arg(forward(block, x, **{name: self.value(name) for name in needed}))

    def parts(self, value: Node, names: Collection[str] = SUMS | FACTORS, normed: bool = False) -> list[Node]:
        """Return the inputs that a value continues as they are, scaled or added up; [] if it continues none.

        A called module continues its inputs, except ends and, without `normed`, norms. Functions in `names` continue
        all inputs. Casts, views, subtractions, divisions, clamps and dropout (PASSES) continue the first. All others
        continue none.

        Args:
            names: the functions that continue all inputs.
            normed: norms continue theirs, too.
        """
        name, inputs = node_name(value), value.all_input_nodes
        if value.op == "call_module":
            return [] if name in self.ends or (name in self.norms and not normed) else inputs
        return inputs if name in names else inputs[:1] if name in PASSES else []

    def terms(self, total: Node, names: Collection[str] = SUMS | FACTORS, normed: bool = False) -> set[Node]:
        """Return the node `total` and all nodes that it continues, directly or through others: `parts`, followed to the
        end.
        """
        return find_reachable(total, lambda node: self.parts(node, names, normed))


def flow_of(block: nn.Module, attentions: Collection[str], norms: Collection[str], mlp: str) -> Flow:
    """Return the norm, the residual and the cross attentions of a block (`Flow`).

    The block's code runs, without values. The norm is the one that the first output passes last, after the sum with the
    MLP; None if there is none. Cross attentions are those with an input that comes from an encoder's states and not
    from the block's first input.

    Args:
        attentions: paths in the block.
        norms: paths in the block.
        mlp: the path of the layer that ends the MLP, or of the MLP.

    Raises:
        UnsupportedLayerError: the block's first output is no sum with the MLP, or continues another input than the
            first.
        UnfollowedError: the code needs values.
    """
    recorder, x, returned = record(block, attentions, norms, mlp)
    last = out = first_output(returned)
    while len(parts := recorder.parts(last)) == 1:
        last = parts[0]
    norm = node_name(last) if last.op == "call_module" and last.target in norms else None
    total = out if norm is None else last.all_input_nodes[0]
    summands, normed = recorder.terms(total), recorder.terms(out, normed=True)
    calls = [node for node in out.graph.nodes if node.op == "call_module"]
    end = next((node for node in reversed(calls) if node.target == mlp and node in normed), None)
    if end is None or not any(node_name(node) in SUMS for node in summands):
        raise UnsupportedLayerError(f"its first output is no sum with the output of '{mlp}'")
    streams = {node_name(node) for node in recorder.terms(total, SUMS | {"cat"}) if node.op == "placeholder"}
    if streams - {x.target}:
        raise UnsupportedLayerError(f"its first output is one of several streams, {' and '.join(sorted(streams))}")
    crosses = frozenset(node_name(node) for node in calls if node.target in attentions and is_cross(node, x))
    return Flow(norm, residual_of(end, summands), crosses)


def record(
    block: nn.Module, attentions: Collection[str], norms: Collection[str], mlp: str
) -> tuple[Recorder, Node, Any]:
    """Return the recorder of a block's run, the node of its first input, and its output.

    Tries four ways in turn: with `encoder_hidden_states` as input (if there are several attentions), with all arguments
    annotated as tensors, only around the attentions, with attentions that return tuples. Any exception of the block's
    code leads to the next way.

    Raises:
        UnfollowedError: all four fail; it tells the first error.
    """
    attempts: list[tuple[bool, bool, Callable[[inspect.Parameter], bool]]] = [
        (False, False, lambda p: p.name == ENCODER and len(attentions) > 1),
        (False, False, lambda p: "Tensor" in str(p.annotation)),
        (True, False, lambda p: False),
        (False, True, lambda p: False),
    ]
    said = ""
    for around, tuples, optional in attempts:
        recorder = Recorder(attentions, norms, mlp, around, tuples)
        try:
            return recorder, *recorder.run(recorder.copy(block), optional)
        except Exception as e:  # any that the code of a model raises without values
            said = said or f"{type(e).__name__}: {shorten_text(str(e))}"
    raise UnfollowedError(f"its code cannot be followed: {said}")


def node_name(node: Node) -> str:
    """Return the target of a node: the path of a called module, the name of a method or argument, or a function's
    `__name__`; "" for a function without one.
    """
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def first_output(out: Any) -> Node:
    """Return the node of the first value of an output: itself, or the first in a tuple or list, also in a sum of
    tuples.

    Raises:
        UnsupportedLayerError: the output holds no value.
    """
    while not isinstance(out, Node) or (node_name(out) in SUMS and isinstance(out.args[0], (tuple, list))):
        out = out.args[0] if isinstance(out, Node) else out[0] if isinstance(out, (tuple, list)) and out else None
        if out is None:
            raise UnsupportedLayerError("its first output is no sum: it returns none")
    return out


def residual_of(end: Node, summands: Collection[Node]) -> str | None:
    """Return the path of the module that gets a summand, maybe cast (to, float, type_as), as its first input, on the
    way back from the end of the MLP.

    The way follows the first input of each node. Return None if a function gets the summand, or no summand is on the
    way.
    """
    while inputs := end.all_input_nodes:
        value = inputs[0]
        while value not in summands and node_name(value) in CASTS:
            value = value.all_input_nodes[0]
        if value in summands:
            return node_name(end) if end.op == "call_module" else None
        end = value
    return None


def is_cross(attention: Node, x: Node) -> bool:
    """Return True if an input of an attention is computed from the argument `encoder_hidden_states`, and not from the
    block's input `x`.
    """
    for value in attention.all_input_nodes:
        sources = {node.target for node in find_reachable(value, lambda node: node.all_input_nodes)}
        if ENCODER in sources and x.target not in sources:
            return True
    return False


def find_reachable(start: Node, neighbours: Callable[[Node], Collection[Node]]) -> set[Node]:
    """Return a node and all nodes that lead from it, by one step of `neighbours` or several."""
    left, seen = [start], {start}
    while left:
        more = [node for node in neighbours(left.pop()) if node not in seen]
        left += more
        seen.update(more)
    return seen
