# SPDX-License-Identifier: Apache-2.0
"""Blocks of experts that share their tokens between processes: transformers' dispatch (`ep_size`).

Each process has some experts whole. The block's forward sends each token to the processes of its experts, runs the
block's class there on the arrived tokens, and brings the results back. Adapters are whole on each process. So a process
takes the part of its experts out of them, and its gradients are those of its experts alone: their sum over all
processes is the gradient of the sum of all losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from graft.core.errors import UnsupportedLayerError
from graft.kernels.cuts import Cut, sum_gradient
from graft.kernels.experts import Form, LowRankUpdate, StackUpdate
from graft.storage.parallel import is_sharded
from graft.storage.tensor_parallel import OF_EXPERTS, style_of

RUNS = "experts_forward"  # attribute of transformers' implementations: the forward that gets a process's tokens


@dataclass(frozen=True)
class Dispatch:
    """How the tokens of one block of experts reach the processes of their experts.

    Args:
        implementation: transformers' object that sends the tokens.
        first: the index of this process's first expert.
        count: the number of its experts.
    """

    implementation: Any
    first: int
    count: int

    @property
    def places(self) -> Iterator[dict[str, Any]]:
        """Yield `__dict__` of the implementation, and of each object among its attributes, that has `experts_forward`
        in it. These call the block's forward on a process's tokens.
        """
        for it in (self.implementation, *self.implementation.__dict__.values()):
            if RUNS in getattr(it, "__dict__", {}):
                yield it.__dict__

    def cut_update(self, update: StackUpdate, key: str) -> StackUpdate:
        """Return the part of an update of all experts that changes this process's experts.

        Of a low-rank update, A and B are cut; any other keeps its form for these experts with its tensors cut. Under
        tensor parallelism the backward pass sums the gradients of the whole tensors over processes of one batch.

        Raises:
            UnsupportedLayerError: an update under tensor parallelism has trainable tensors that all experts share.
        """
        if isinstance(update, LowRankUpdate):
            return update._replace(A=self.cut(update.A), B=self.cut(update.B))
        form = update.form
        if form.common_parameters and self.implementation.tp_mesh.size() > 1:
            raise UnsupportedLayerError(
                f"An adapter of layer '{key}' trains a tensor that all experts share, which graft does not sum over "
                "processes of one batch. Load the model without tp_size, or use a low-rank method."
            )
        return update._replace(form=FormOfOwnExperts(form, self.first, [self.cut(t) for t in form.tensors]))

    def cut(self, t: Tensor) -> Tensor:
        """Return a view of the rows of this process's experts.

        If several processes share one batch (`tp_mesh`) and `t` requires a gradient, the backward pass sums it over
        them.
        """
        mesh = self.implementation.tp_mesh
        if mesh.size() > 1 and t.requires_grad:
            t = sum_gradient(t, Cut(mesh.get_group(), mesh.get_local_rank(), mesh.size(), len(t)))
        return t[self.first : self.first + self.count]


class FormOfOwnExperts(Form):
    """A form of the updates of all experts, called with the indices of this process's experts."""

    def __init__(self, form: Form, first: int, tensors: Sequence[Tensor]):
        """Wrap the form of all experts. first: the index of this process's first one; tensors: cut to its experts."""
        self.form, self.first, self.tensors = form, first, tensors
        self.reads, self.common_parameters = form.reads, form.common_parameters

    def __call__(self, expert: int, tensors: Sequence[Tensor], W: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the update of this process's expert number `expert`, as the form of all experts returns it."""
        return self.form(self.first + expert, tensors, W)


def find_dispatch(module: nn.Module) -> Dispatch | None:
    """Return how a block's tokens are dispatched: the implementation, and first index and number of this process's
    experts.

    None for a module that transformers does not dispatch, or an implementation without `experts_forward`. Also None if
    it has a `megamoe`: the kernel of Mega MoE takes no updates of its weights. The number is `num_local_experts`; times
    the rank in `ep_mesh` it gives the first index. The implementation is read from the closure of the module's replaced
    forward.
    """
    style = style_of(module)
    if style is None or style.home != OF_EXPERTS:
        return None
    forward: Any = module.__dict__["forward"]
    closure = dict(zip(forward.__code__.co_freevars, (cell.cell_contents for cell in forward.__closure__ or ())))
    implementation: Any = closure.get("implementation")
    if not hasattr(implementation, RUNS) or getattr(implementation, "megamoe", None) is not None:
        return None
    count = implementation.num_local_experts
    return Dispatch(implementation, implementation.ep_mesh.get_local_rank() * count, count)


def is_dispatched_stack(module: nn.Module, name: str) -> bool:
    """Return True if a parameter is a sharded stack with three dimensions, and tokens of its block are dispatched."""
    p = module._parameters.get(name)
    return p is not None and p.dim() == 3 and is_sharded(p) and find_dispatch(module) is not None
