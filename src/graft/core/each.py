# SPDX-License-Identifier: Apache-2.0
"""Methods on stacks of matrices, such as expert weights.

Any method that changes the weight of a linear layer acts on each matrix of a stack as on such a layer. Its tensors have
the stack's first dimension in front.

`find` makes such a method for a stack. It builds the method once for each matrix, and joins the tensors. The method on
one matrix has a layer with views of these. The effect also says how single matrices change: where graft runs the
experts, the change of each matrix in use is computed, and again in the backward pass with the same random numbers.
Merging into a packed stack folds one matrix after the other. So ΔW of all experts exists only if a module of unknown
kind, or a compiler, asks for the whole weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from inspect import get_annotations
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graft.core.containers import Slot, Transient
from graft.core.effect import Effect, Pieces, Rewrite, Update
from graft.core.errors import UnsupportedLayerError
from graft.core.folding import compute_delta, drop_inputs_of_A, fold_effect, why_not_in_weight
from graft.core.method import Layer, Method, Tensors, WeightUse, build_placeholders
from graft.core.ops import META, Op, Opaque
from graft.core.random import read_generator_states, restore_generator_states
from graft.core.site import Site
from graft.kernels.experts import Form


class Matrix(Op):
    """The op of one matrix of a stack, used as the weight of a linear layer."""

    linear = True

    def __init__(self, out_features: int, in_features: int):
        self.size = out_features, in_features

    def dims(self, m: nn.Module) -> tuple[int, int]:
        """Return (out_features, in_features) of the matrix; the module is ignored."""
        return self.size


class MatrixLayer:
    """The layer of a stack, as a method on one of its matrices sees it: with the method's tensors for that matrix.

    W: the matrix without any adapter; None: it is read at each access.
    """

    def __init__(
        self, layer: Layer, site: Site, adapter: str, expert: int, values: Mapping[str, object], W: Tensor | None
    ):
        """Copy the layer's attributes, with another site and its op, and hide its containers of `values` by dicts with
        this adapter's value. Assignments here do not reach the layer.
        """
        self.__dict__.update(layer.__dict__, site=site, op=site.op)
        self.__dict__.update({container: {adapter: value} for container, value in values.items()})
        self.__dict__["_stack"] = layer, expert, W

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the layer of the whole stack."""
        return getattr(self.__dict__["_stack"][0], name)

    @property
    def W0(self) -> Tensor:
        """The matrix (out, in) without any adapter: the one given, or read from the layer's stack.

        A matrix of a packed stack is unpacked, with adapters that are merged left out.
        """
        layer, expert, W = self._stack
        if W is None and layer.op.packed_shape is None:
            return layer.W0[expert]  # type: ignore[no-any-return]
        if W is None:  # unpack one matrix of the packed stack
            stack = read_base_stack(layer)
            W = stack.in_rows().matrix(expert, stack.dtype or torch.float32)
        return W  # type: ignore[no-any-return]

    @property
    def local_W0(self) -> tuple[Tensor, None, None]:
        """The matrix without any adapter, and None for both cuts: no process holds only a part."""
        return self.W0, None, None


def read_base_stack(layer: Layer) -> Any:
    """Return a layer's packed stack without any adapter: the state from before the first merge that kept one, on the
    present device of the weight; else a copy of the present state.
    """
    first = next((state for _, state, _ in layer.state.undo if state is not None), None)
    return layer.base_weight.snapshot() if first is None else first.to(layer.base_weight.where()[0])


class StackMethod(Method):
    """A method on a stack: `kind` acts on each matrix. Subclasses are made by `stack_method_class`."""

    kind: ClassVar[type[Method]] = Method

    def __init__(self, site: Site, cfg: object, name: str):
        """Make the method of `kind` on one matrix: a site with a `Matrix` op, of the stack's module and parameter.

        There is no layer yet.
        """
        self.site, self.name, self.layer = site, name, None
        matrix = Site(site.key, site.module, Matrix(*site.shape[1:]), site.store, site.parameter, path=site.path)
        self._matrix_method = self.kind(matrix, cfg, name)

    @property
    def matrix_method(self) -> Method:
        """The method on one matrix, without a layer, which answers questions about the kind."""
        return self._matrix_method

    @property
    def cfg(self) -> object:
        """The config of the method on one matrix."""
        return self.matrix_method.cfg

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        """Return a pickle that names `kind`, since the class is made at run time."""
        return new_stack_method, (self.kind,), self.__dict__

    def method_on_matrix(
        self, expert: int, tensors: Sequence[Tensor] | None = None, W: Tensor | None = None, trains: bool | None = None
    ) -> Method:
        """Return a new method on one matrix, with a `MatrixLayer` as its layer.

        Args:
            tensors: the matrix's tensors, in the order of `slots`; None: parts of those on the layer.
            W: the matrix without any adapter; None: it is read if needed.
            trains: the training mode; None: as the layer's.
        """
        m = self.kind(self.matrix_method.site, self.cfg, self.name)
        slots = self.slots
        tensors = [slot.tensor[expert] for slot in slots] if tensors is None else tensors
        containers = make_containers(self.layer, slots, tensors, self.name)
        m.layer = MatrixLayer(self.layer, m.site, self.name, expert, containers, W)
        if trains is not None:
            m.layer.__dict__["training"] = trains
        return m

    @property
    def slots(self) -> list[Slot]:
        """The slots of all tensors of the adapter. Each tensor has the stack's first dimension in front."""
        slots: list[Slot] = self.layer.slots(self.name)
        return slots

    # declare

    def check(self) -> str | None:
        """Return why the method cannot act on this stack, or None.

        The first reason counts: it changes the weight at the start; one matrix fails the check of `kind`;
        `why_not_on_stack` has a reason.
        """
        name = self.kind.__name__
        if WeightUse.CHANGES in self.uses_weight():
            return f"{name} would begin with a change of the weight, which is for layers: choose another start"
        return self.matrix_method.check() or why_not_on_stack(self.matrix_method)

    def build(self, shared: dict[str, object], device: torch.device | None = None) -> dict[str, object]:
        """Return the values of `kind.build_declared` and `kind.build` for all matrices, stacked.

        On meta, placeholders of one matrix are repeated.

        Raises:
            UnsupportedLayerError: a tensor has another shape for each matrix.
        """
        count = self.site.shape[0]
        if device == META:
            m = self.matrix_method
            return stack_build_values([m.build_declared() | build_placeholders(m, shared)] * count)
        built_values = []
        for expert in range(count):
            m = self.kind(self.matrix_method.site, self.cfg, self.name)
            m.layer = MatrixLayer(self.layer, m.site, self.name, expert, {}, None)
            built_values.append(m.build_declared() | m.build(shared))
        try:
            return stack_build_values(built_values)
        except ShapesDiffer as e:
            raise UnsupportedLayerError(
                f"Adapter '{self.name}' cannot target parameter {self.site.key} ({self.site.type_name}): '{e}' of "
                f"{self.kind.__name__} has another shape for each matrix. Name other target_parameters."
            ) from None

    def build_declared(self) -> dict[str, object]:
        """Return {}: `build` gives those of the matrices."""
        return {}

    @torch.no_grad()
    def init_values(self) -> None:
        """Initialize the tensors of each matrix by `kind.init_values`, without gradients."""
        self.run_on_all(self.kind.init_values)

    @torch.no_grad()
    def finish_load(self) -> None:
        """Run `kind.finish_load` on each matrix, without gradients."""
        self.run_on_all(self.kind.finish_load)

    def run_on_all(self, run: Callable[[Method], None]) -> None:
        """Call `run` with the method on each matrix, in order.

        Tensors that it overwrites in place change the stacked ones. Tensors that it replaces are stacked, detached, and
        replace the adapter's tensors in their slots; a parameter keeps its `requires_grad`. If it replaces a tensor, it
        must do so for all matrices.
        """
        slots, experts = self.slots, range(self.site.shape[0])
        new: dict[int, list[Tensor]] = {}
        for expert in experts:
            matrix_tensors = [slot.tensor[expert] for slot in slots]
            m = self.method_on_matrix(expert, matrix_tensors)
            run(m)
            for i, (slot, before) in enumerate(zip(slots, matrix_tensors)):
                value = m.layer.__dict__[slot.container][self.name]
                for name in slot.path.split(".") if slot.path else ():
                    value = getattr(value, name)
                if value is not before:
                    new.setdefault(i, []).append(value)
        for i, values in new.items():
            slot, t = slots[i], torch.stack([v.detach() for v in values])
            slot.where[slot.attribute] = nn.Parameter(t, slot.tensor.requires_grad) if slot.is_parameter else t

    def uses_weight(self) -> WeightUse:
        """Return how the method uses the weight, as on one matrix."""
        return self.matrix_method.uses_weight()

    def why_incompatible(self, other: object) -> str | None:
        """Return why the method cannot be on a layer with another adapter, as on one matrix; None if it can."""
        return self.matrix_method.why_incompatible(other)

    def to_file_tensors(self, values: Tensors, cfg: object) -> Tensors:
        """Return the tensors for a file: `values` itself if the kind stores them so (`is_stored_unchanged`).

        Else each matrix is converted by the kind and the results are stacked; tensors of another stack are returned
        unchanged.
        """
        if self.is_stored_unchanged:
            return values
        return self.map_matrices(values, lambda m, tensors: m.to_file_tensors(tensors, cfg))

    @property
    def is_stored_unchanged(self) -> bool:
        """True if a file has the tensors as in memory, as on one matrix."""
        return self.matrix_method.is_stored_unchanged

    def from_file_tensors(self, tensors: Tensors, cfg: object) -> Tensors:
        """Return the tensors of a file for memory: unchanged if the kind does not convert, else each matrix converted
        and the results stacked.
        """
        same = self.kind.from_file_tensors is Method.from_file_tensors
        return tensors if same else self.map_matrices(tensors, lambda m, values: m.from_file_tensors(values, cfg))

    def map_matrices(self, values: Tensors, change: Callable[[Method, Tensors], Tensors]) -> Tensors:
        """Apply `change` to the method and the tensors of each matrix, and return the stacked results.

        Returns the tensors unchanged if one lacks the stack's first dimension: they are not this adapter's, and the
        load compares shapes later.
        """
        count = self.site.shape[0]
        if any(t.shape[:1] != (count,) for t in values.values()):  # another adapter's: shapes are compared later
            return values
        experts = range(count)
        results = [change(self.method_on_matrix(e), {key: t[e] for key, t in values.items()}) for e in experts]
        return {key: torch.stack([result[key] for result in results]) for key in results[0]}

    # act

    def describe(self) -> Effect:
        """Return the effect on the whole stack: an `Update` for an additive effect on one matrix, else a `Rewrite`.

        Both are computed matrix by matrix, with pieces for single ones, and keep `of_weight`; an Update keeps `draws`,
        a Rewrite `inward`. If the kind cannot act on a stack, return its effect on one matrix.
        """
        effect = self.matrix_method.effect
        if why_not_on_stack(self.matrix_method) is not None:
            return effect
        if not effect.additive:
            return Rewrite(self.fold_stack, inward=effect.inward, of_weight=effect.of_weight, pieces=self.pieces)
        draws = getattr(effect, "draws", False)
        return Update(self.stack_delta, of_weight=effect.of_weight, draws=draws, pieces=self.pieces)

    def pieces(self) -> Pieces:
        """Return the changes of single matrices: from the adapter's tensors, and the trainable parameters of containers
        that the layer shares with the model. They need the matrix if the effect depends on W₀ or does more than add.
        """
        layer, effect = self.layer, self.matrix_method.effect
        modules = (layer._modules[key] for key in layer.attached)
        common_parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        tensors = [slot.tensor for slot in self.slots]
        return Pieces(tensors, self.change_matrix, common_parameters, effect.of_weight or not effect.additive)

    def change_matrix(
        self, expert: int, tensors: Sequence[Tensor], W0: Tensor | None, W: Tensor | None, trains: bool
    ) -> tuple[Tensor, ...]:
        """Return the change of one matrix: A (r, in) and B (out, r) if the effect is only a product, else (ΔW,), with
        ΔW (out, in).

        Dropout drops the same inputs for all rows. A `Rewrite` gives the rewritten matrix minus W, or minus W₀ if W is
        None, in the adapter's dtype.

        Args:
            tensors: those of the matrix, in the order of `slots`.
            W0: the matrix without any adapter; None: it is read if needed.
            W: the matrix with earlier adapters in it.
            trains: the training mode.
        """
        m = self.method_on_matrix(expert, tensors, W0, trains)
        effect = m.effect
        if effect.product is not None:
            return drop_inputs_of_A(effect.product()).matrices()
        if effect.additive:
            return (compute_delta(m.layer, effect, drops=True),)
        W = (m.layer.W0 if W is None else W).to(m.dtype)
        return (fold_effect(m.layer, m, effect, W, None, drops=True)[0] - W,)

    def stack_delta(self, W0: Tensor | None = None) -> Tensor:
        """Return ΔW of all matrices, (n, out, in).

        In training, dropout drops the same inputs for all rows of a matrix.

        W0: the stack without any adapter; None: it is read if needed.
        """
        methods = (self.method_on_matrix(e, W=None if W0 is None else W0[e]) for e in range(self.site.shape[0]))
        return torch.stack([compute_delta(m.layer, m.effect, drops=True) for m in methods])

    def fold_stack(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the stack W with the method's change in each matrix, and the bias b unchanged.

        Each matrix is folded by a call of `fold_effect` with `drops=True`, so that dropout drops the same inputs for
        all rows of one matrix. It draws anew for each matrix, and no random state is kept or set.
        """
        methods = (self.method_on_matrix(e) for e in range(len(W)))
        return torch.stack([fold_effect(m.layer, m, m.effect, w, None, drops=True)[0] for m, w in zip(methods, W)]), b


def matrix_methods(method: Method) -> list[Any]:
    """Return the methods on all matrices of a stack. For any other method, return a list with the method itself."""
    if not isinstance(method, StackMethod):
        return [method]
    return [method.method_on_matrix(e) for e in range(method.site.shape[0])]


def pieces_of(layer: Layer, effect: Effect) -> Pieces | None:
    """Return the changes of single matrices of a stack by an effect.

    An effect that is only a product gives parts of its factors, with dropout on A's columns. Returns None if the effect
    has no pieces.
    """
    if effect.product is None:
        return None if effect.pieces is None else effect.pieces()
    A, B = Opaque.split_matrices(*drop_inputs_of_A(effect.product()).matrices(), layer.site.shape[0])
    return Pieces([A, B], lambda expert, tensors, *_: tuple(tensors))


class MatrixUpdate(Form):
    """The update of single matrices by several adapters, each on the matrix that the ones before it changed: a `Form`
    of `kernels/experts.py`.

    In training, a second call for a matrix, in the backward pass, draws the same random numbers as the first.
    """

    def __init__(self, pieces: Sequence[Pieces], trains: bool):
        """Keep the pieces of a stack's adapters, and collect their tensors (in order) and common parameters (each
        once).

        `reads` is True with several pieces, or if one reads the weight. No matrix has drawn numbers yet (`drawn`).

        trains: the update is computed for training.
        """
        self.pieces, self.trains = pieces, trains
        self.reads = len(pieces) > 1 or any(p.reads for p in pieces)
        self.drawn: dict[int, list[Tensor]] = {}
        self.tensors = [t for p in pieces for t in p.tensors]
        self.common_parameters = list({id(t): t for p in pieces for t in p.common_parameters}.values())

    def __call__(self, expert: int, tensors: Sequence[Tensor], W: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the update of one matrix, as `compute_update`.

        In training, the first call for a matrix notes the states of the random generators. A later call sets these
        states, and afterwards restores the present ones.
        """
        if not self.trains:
            return self.compute_update(expert, tensors, W)
        now = read_generator_states()
        before = self.drawn.setdefault(expert, now)
        restore_generator_states(before)
        try:
            return self.compute_update(expert, tensors, W)
        finally:
            if before is not now:
                restore_generator_states(now)

    def compute_update(self, expert: int, tensors: Sequence[Tensor], W0: Tensor | None) -> tuple[Tensor, ...]:
        """Return the update of one matrix: the change of the only piece (ΔW, or A and B), in its dtype.

        Several pieces in turn give (ΔW,) in float32 at least, and need W0.
        """
        if len(self.pieces) == 1:
            return self.pieces[0].change(expert, tensors, W0, W0, self.trains)
        assert W0 is not None
        W = W0.to(torch.promote_types(W0.dtype, torch.float32))
        return (self.apply_pieces(expert, tensors, W0, W) - W,)

    def apply_pieces(self, expert: int, tensors: Sequence[Tensor], W0: Tensor, W: Tensor) -> Tensor:
        """Return the matrix W (out, in) with the changes of all pieces, in order, in W's dtype.

        Args:
            tensors: those of all pieces for this matrix, in the order of `self.tensors`.
            W0: the matrix without any adapter.
        """
        remaining = iter(tensors)
        for p in self.pieces:
            piece_tensors = [next(remaining) for _ in p.tensors]
            change = [t.to(W.dtype) for t in p.change(expert, piece_tensors, W0, W, self.trains)]
            W = W + (change[0] if len(change) == 1 else change[1] @ change[0])
        return W


def why_not_on_stack(m: Method) -> str | None:
    """Return why a method cannot act on the matrices of a stack; None if it can. The first reason counts:

    - It has no form in the weight (`why_not_in_weight`): it needs a call of the layer or has no merged form.
    - It replaces the layer or looks up rows.
    - It changes only the bias, or has a bias.
    """
    effect, name = m.effect, type(m).__name__
    why = why_not_in_weight(m)
    if why is None and (effect.whole or getattr(effect, "looks_up", False)):
        why = f"The weight is used without a call of the layer, so that {name} would have no effect"
    if why is None and (effect.keeps_weight or getattr(effect, "bias", None) is not None):
        why = f"{name} shifts the bias, and a matrix of a stack has none"
    return why


@cache
def stack_method_class(kind: type[Method]) -> type[StackMethod]:
    """Return the subclass of `StackMethod` for methods of class `kind`, with its name and module.

    It gets the class attributes that `Method` declares as ClassVar from `kind`, but always takes a device. It is
    cached.
    """
    stack_class: type[StackMethod] = type(kind.__name__, (StackMethod,), {"kind": kind, "__module__": kind.__module__})
    for name, annotation in get_annotations(Method).items():
        if str(annotation).startswith("ClassVar") and name != "takes_device":
            setattr(stack_class, name, getattr(kind, name, None))
    stack_class.takes_device = True
    return stack_class


def new_stack_method(kind: Any) -> StackMethod:
    """Return a `StackMethod` of a kind without calling `__init__`, for copies and pickles."""
    stack_class = stack_method_class(kind)
    return stack_class.__new__(stack_class)


class ShapesDiffer(Exception):
    """A tensor, by name, has another shape for each matrix of a stack."""


def stack_build_values(built_values: Sequence[dict[str, object]]) -> dict[str, object]:
    """Return the values of a stack, by name, from the values that `build` returned for each matrix.

    The names are those of the first matrix. Raises ShapesDiffer as `stack_values`.
    """
    return {name: stack_values([values[name] for values in built_values], name) for name in built_values[0]}


def stack_values(values: Sequence[Any], name: str) -> Any:
    """Return one value for a stack from the values for each matrix, under `name` in errors.

    The first value's type decides.

    Tensors are detached and stacked along a new first dimension; a parameter stays one with its `requires_grad`, and a
    `Transient` stays one, too. A module is copied, with its parameters, buffers and submodules stacked; entries of None
    stay. Of any other value the first is returned.

    Raises:
        ShapesDiffer: a tensor has another shape for each matrix.
    """
    first = values[0]
    if isinstance(first, Transient):
        return type(first)(stack_values([v.tensor for v in values], name))
    if isinstance(first, Tensor):
        if any(v.shape != first.shape for v in values):
            raise ShapesDiffer(name)
        t = torch.stack([v.detach() for v in values])
        return nn.Parameter(t, first.requires_grad) if isinstance(first, nn.Parameter) else t
    if isinstance(first, nn.Module):
        out = copy.copy(first)
        for kind in ("_parameters", "_buffers", "_modules"):
            parts = [getattr(v, kind) for v in values]
            out.__dict__[kind] = {
                k: None if t is None else stack_values([h[k] for h in parts], name) for k, t in parts[0].items()
            }
        return out
    return first


def make_containers(layer: Any, slots: Sequence[Slot], tensors: Sequence[Tensor], adapter: str) -> dict[str, object]:
    """Return the containers of a method, by name, with these tensors for its slots: the tensor itself, or a copy of the
    layer's module that holds it.
    """
    out: dict[str, object] = {}
    inside: dict[str, dict[str, Tensor]] = {}
    for slot, t in zip(slots, tensors):
        if slot.path:
            inside.setdefault(slot.container, {})[slot.path] = t
        else:
            out[slot.container] = t
    for container, by_path in inside.items():
        out[container] = copy_with_tensors(layer._modules[container][adapter], by_path)
    return out


def copy_with_tensors(module: nn.Module, by_path: Mapping[str, Tensor], path: str = "") -> nn.Module:
    """Return a shallow copy of a module, and of its submodules, with other tensors at the paths of `by_path`.

    Its other tensors are shared. The tensors of `by_path` need not be parameters. The module itself is not changed.

    path: the path of `module` itself, with a dot at the end, or "".
    """
    out = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        tensors = getattr(module, kind)
        out.__dict__[kind] = {k: by_path.get(f"{path}{k}", t) for k, t in tensors.items()}
    out.__dict__["_modules"] = {
        k: None if m is None else copy_with_tensors(m, by_path, f"{path}{k}.") for k, m in module._modules.items()
    }
    return out
