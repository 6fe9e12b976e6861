# SPDX-License-Identifier: Apache-2.0
"""Megatron's column and row parallel linear layers: plain tensors that are pieces of a weight, without a mark of it.

`input_size` and `output_size` of the module are those of the whole weight. Its forward returns (output, bias): with
`skip_bias_add` the caller adds the bias.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graft.core.errors import UnsupportedLayerError
from graft.core.ops import Op, TypeTable
from graft.core.pieces import LayerPiece
from graft.kernels.cuts import Cut, gather_whole, join_pieces, take_piece
from graft.storage.dense import Dense

LAYERS = "megatron.core.tensor_parallel.layers"
KINDS: TypeTable[str] = TypeTable({f"{LAYERS}.{k}": k for k in ("ColumnParallelLinear", "RowParallelLinear")})


def find_megatron_group(m: nn.Module) -> dist.ProcessGroup | None:
    """Return the process group of a module: its `tp_group`, else that of Megatron's parallel state if it is
    initialised.

    None if there is neither: the process is alone.
    """
    group = getattr(m, "tp_group", None)
    state = sys.modules.get("megatron.core.parallel_state")
    if group is None and state is not None and state.model_parallel_is_initialized():
        group = state.get_tensor_model_parallel_group()
    return group


def find_cut(m: nn.Module) -> Cut | None:
    """Return the cut of a column parallel layer's outputs, or of a row parallel layer's inputs; None if nothing is cut.

    Something is cut if the module's size differs from its weight's. The cut has the whole size and this process's rank.

    Raises:
        UnsupportedLayerError: the weight is a piece, and no process group is known.
    """
    size, part = m.output_size, m.weight.shape[0]
    if KINDS.find(type(m)) == "RowParallelLinear":
        size, part = m.input_size, m.weight.shape[1]
    if size == part:
        return None
    group = find_megatron_group(m)
    if group is None:
        raise UnsupportedLayerError(
            f"A {type(m).__name__} has {part} of {size} features, and no process group is known that has the others. "
            "Set its tp_group, or initialise Megatron's parallel state."
        )
    return Cut(group, dist.get_rank(group), dist.get_world_size(group), size)


def list_returned_bias(m: nn.Module) -> tuple[Tensor | None]:
    """Return a tuple with one item, which follows the output of a module: its bias with `skip_bias_add`, else None."""
    return ((m.bias if m.skip_bias_add else None),)


def find_megatron_piece(m: nn.Module, op: Op) -> LayerPiece | None:
    """Return the piece of the layer that this process computes, with its group and the function for the bias that its
    forward returns.

    Outputs are cut in a column parallel layer that does not gather them; inputs in a row parallel layer that takes them
    in pieces. None for a module that is not Megatron's, or one with a reason in `why_no_megatron_adapter`. A whole
    weight gives a piece without cuts. Raises UnsupportedLayerError if the weight is a piece without a known group.
    """
    kind = KINDS.find(type(m))
    if kind is None or why_no_megatron_adapter(m) is not None:
        return None
    cut, column = find_cut(m), kind == "ColumnParallelLinear"
    outputs = cut if column and not m.gather_output else None
    inputs = None if column or not m.input_is_parallel else cut
    return LayerPiece(kind, find_megatron_group(m), inputs, outputs, list_returned_bias)


def why_no_megatron_adapter(m: nn.Module) -> str | None:
    """Return why no adapter can act on a layer of Megatron; None if one can, or the module is not Megatron's.

    The first of three reasons: it is `sequence_parallel`; it is an expert's (`is_expert` or `explicit_expert_comm`), so
    that other modules sum its outputs; it has no weight parameter.
    """
    if KINDS.find(type(m)) is None:
        return None
    if getattr(m, "sequence_parallel", False):
        return "it is sequence parallel, so that a process has only some of the tokens"
    if getattr(m, "explicit_expert_comm", False) or getattr(m, "is_expert", False):
        return "it is an expert's, whose outputs other modules sum over processes"
    return "it has no weight parameter" if m._parameters.get("weight") is None else None


class Megatron(Dense):
    """The store of Megatron's pieces of dense weights.

    All processes of the group have to take part in reads, writes and restores.
    """

    name, live, exact = "megatron", False, True

    def read(self, m: nn.Module, name: str = "weight") -> Tensor:
        """Return the whole tensor, joined from the pieces of all processes, with gradients; the tensor itself if it is
        not cut.
        """
        t, place = getattr(m, name), self.place(m, name)
        return t if place is None else join_pieces(t, *place)

    @torch.no_grad()
    def write(self, m: nn.Module, name: str, W: Tensor, shared: bool = False) -> None:
        """Write this process's piece of the whole W into the tensor in place, past autograd.

        A tensor that is not cut gets all of W. If the weight is tied (`shared`), the module gets a new parameter with
        the piece instead.
        """
        place = self.place(m, name)
        super().write(m, name, W if place is None else take_piece(W, *place), shared)

    def snapshot_values(self, m: nn.Module, name: str, state: Tensor) -> Tensor:
        """Return the whole tensor of a snapshot, gathered from all processes; the snapshot itself if it is not cut."""
        place = self.place(m, name)
        return state if place is None else gather_whole(state, *place)

    def protect(self, y: Tensor) -> Tensor:
        """Raise UnsupportedLayerError: the layers return tuples, which cannot take rows of several adapters."""
        raise UnsupportedLayerError(
            "Megatron's layers return tuples, which cannot take the rows of different adapters in a batch. Run one "
            "adapter at a time."
        )

    def piece(self, m: nn.Module, op: Op) -> tuple[Tensor, Cut | None, Cut | None]:
        """Return this process's piece of the weight (canonical), and the cuts of its rows and columns.

        At most one of the cuts is set; both are None if the weight is whole.
        """
        place = self.place(m, "weight")
        rows, columns = (place[0] if place is not None and place[1] == dim else None for dim in (0, 1))
        return m.weight, rows, columns

    @staticmethod
    def place(m: nn.Module, name: str) -> tuple[Cut, int] | None:
        """Return the cut of a tensor and its dimension: 0 in a column parallel layer, 1 in a row parallel one.

        None if nothing is cut, or for the bias of a row parallel layer, which is whole.
        """
        cut, column = find_cut(m), KINDS.find(type(m)) == "ColumnParallelLinear"
        if cut is None or (name == "bias" and not column):
            return None
        return cut, 0 if column else 1
