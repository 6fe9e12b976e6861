# SPDX-License-Identifier: Apache-2.0
"""The changes that the parts of an adapter file make to the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch

from graft import BaseModelMismatchError, LossError, method_of
from graft.config.reading import Json
from graft.files.algebra import delta_shape
from graft.files.errors import OptionError
from graft.files.formats.peft import list_unnamed
from graft.files.holding import FIELDS, PARTS
from graft.files.merging.weights import to_wide
from graft.files.names import is_stored_in_out
from graft.files.neutral import AdapterFile, LowRank
from graft.files.places import CheckpointPlaces, Spot
from graft.files.tensors import Tensor

Read = Callable[[], torch.Tensor]  # returns the checkpoint's own value, in new memory


@dataclass
class TensorChange:
    """The change of one adapter to one tensor of a checkpoint.

    Attributes:
        key: the tensor's name in the checkpoint.
        param: the parameter that the adapter changes, by its name in the model.
        fold: function of the current value, in at least float32, and a function that returns the checkpoint's value
            without earlier adapters. Returns the new value. May overwrite the current value, but only after it has
                called that function.
        shape: of the new value.
        of: the values that the change is computed from: tensors and scales. Changes with equal ones are equal.
        new: the checkpoint has no such tensor; `fold` gets an empty one.
        replaces: the new value does not depend on the old one.
        rows: the rows of an embedding that it replaces.
        alone: no other adapter may change the tensor.
    """

    key: str
    param: str
    fold: Callable[[torch.Tensor, Read], torch.Tensor]
    shape: tuple[int, ...]
    of: tuple[object, ...] = ()
    new: bool = False
    replaces: bool = False
    rows: frozenset[int] = frozenset()
    alone: bool = False


@dataclass
class MergeJob:
    """One adapter that is merged into a checkpoint, with the data that merging needs."""

    adapter: AdapterFile
    weight: float
    places: CheckpointPlaces
    config: Json  # config.json of the base
    stacked: Callable[[str], bool]  # path of a parameter → its matrices are stored (in, out)
    kinds: Mapping[str, torch.dtype]  # dtypes of the checkpoint's floating tensors
    read: Callable[[str], torch.Tensor]  # the checkpoint's own value, in new memory

    @property
    def name(self) -> str:
        """The path of the adapter file, for errors."""
        return self.adapter.path

    def misfit(self, path: str, why: str) -> BaseModelMismatchError:
        """Return (do not raise) a BaseModelMismatchError: the adapter does not fit the base at `path`, with the reason
        `why`.
        """
        return BaseModelMismatchError(f"Adapter '{self.name}' does not fit the base at '{path}': {why}.")


def list_changes(job: MergeJob) -> list[TensorChange]:
    """Return the changes of an adapter to a checkpoint: whole tensors, then low-rank parts with their biases, then
    rows.

    Parts that are not low rank (`OtherMethod`) are left out.

    Raises:
        BaseModelMismatchError: a tensor has no place in the checkpoint, or another shape there.
        LossError: the config has a field that no weight can hold, or the start changed the base and the file does not
            say how.
    """
    result = list[TensorChange]()
    if named := [PARTS[name] for name in FIELDS if job.adapter.config.get(name)]:
        raise LossError(
            f"Adapter '{job.name}' has {named[0]}, which no weight of the base can take over. Keep it unmerged, on a "
            "model in memory."
        )
    if job.adapter.changed_base is not None:
        raise LossError(
            f"Adapter '{job.name}' was trained on a base that init_lora_weights='{job.adapter.changed_base}' changed, "
            "and its file does not say how. Load it with graft, and save it again, or as plain LoRA (save_as_lora)."
        )
    low = job.adapter.low_rank
    spots = job.places.locate_all(
        [get_weight_name(path, lora) for path, lora in low.items()] + list(job.adapter.rows), job.name
    )
    for name, value in job.adapter.full.items():  # first, since factors may add to a tensor of the same file
        result += replace_whole(job, name, value)
    for path, lora in low.items():
        for spot in spots[get_weight_name(path, lora)]:
            result.append(fold_low_rank(job, path, lora, spot))
        if lora.bias is not None:
            result.append(change_bias(job, path, lora))
    for name, (indices, values) in job.adapter.rows.items():
        result.append(replace_rows(job, name, indices, values, spots[name]))
    return result


def get_weight_name(path: str, lora: LowRank) -> str:
    """Return the name of the tensor that a low-rank part changes: `path` for a stack of experts, else `path`.weight."""
    return path if lora.kind == "experts" else f"{path}.weight"


# low rank


def fold_low_rank(job: MergeJob, path: str, lora: LowRank, spot: Spot) -> TensorChange:
    """Return the change of one low-rank part to the tensor at `spot`.

    Nothing is computed until its function is called.

    The tensor is the file's own whole tensor of that name, if it has one, else the checkpoint's. Without magnitude and
    shift the scale is multiplied by `job.weight`; with them the change interpolates by that weight.

    Raises:
        BaseModelMismatchError: factors do not fit the shape, or the magnitude has another size than the matrix has
            rows.
    """
    replacement = job.adapter.full.get(get_weight_name(path, lora))
    shape = job.places.shapes[spot.key] if replacement is None else replacement.shape
    view = find_orientation(job, path, lora, spot, shape)
    if lora.magnitude is not None and prod(lora.magnitude.shape) != get_matrix_sizes(lora, spot)[0]:
        raise job.misfit(path, f"its magnitude is {lora.magnitude.shape}, of {get_matrix_sizes(lora, spot)[0]} rows")
    adds = lora.magnitude is None and lora.shift is None
    scale = lora.scale * job.weight if adds else lora.scale

    def fold(W: torch.Tensor, read_value: Read) -> torch.Tensor:
        """Return W with the adapter merged into each of its matrices.

        W may be overwritten. A, B and the magnitude are cast to its dtype; B is multiplied by the scale after that.

        Without magnitude and shift: W + weight · scale · B A. Else the shift moves the matrix first, scale · B A is
        added, and each row is multiplied by magnitude / norm. Norms and shifts are those of the value that `read_value`
        returns, without earlier merges; if the file has a whole tensor of that name, of that one. Then W goes the part
        `weight` of the way to that result.
        """
        read_value = read_value if replacement is None else lambda: to_wide(replacement)
        folded = W if adds or job.weight == 1 else W.clone()
        for matrix, before, A, B in list_matrices(lora, spot, view, folded, read_value):
            A, B = A.to(matrix.dtype), B.to(matrix.dtype) * scale
            gain = None
            if not adds:  # norms and shifts are of the checkpoint's own weight, whatever has been merged before
                unchanged = before()
                start = unchanged if lora.shift is None else subtract_shift(job, lora, spot.key, unchanged)
                if lora.magnitude is not None:
                    gain = to_wide(lora.magnitude).flatten().to(matrix.dtype) / method_of("LORA").row_norms(start, A, B)
                if start is not unchanged:
                    matrix.copy_(matrix - unchanged + start)
            matrix.addmm_(B, A)
            if gain is not None:
                matrix.mul_(gain[:, None])
        return folded if folded is W else W.lerp_(folded, job.weight)

    of = (scale, lora.A, lora.B, lora.magnitude, lora.mid, *(lora.shift or ()))
    return TensorChange(spot.key, get_weight_name(path, lora), fold, shape, of)


def subtract_shift(job: MergeJob, lora: LowRank, key: str, W: torch.Tensor) -> torch.Tensor:
    """Return W minus the product B A that an initialisation subtracted before training, in new memory; W itself if the
    base has been changed already. `lora.shift` must not be None.

    The base has been changed if W's sample is close to the file's sample after the change, and closer than to the one
    before. Without samples the product is always subtracted. For LoftQ the result is rounded to its bits, 4 unless the
    config says another number. It is then rounded to the dtype of the checkpoint's tensor `key`, if that is floating,
    and has the dtype of W.
    """
    assert lora.shift is not None
    config, sample = job.adapter.config, lora.extra.get("lora_shift.sample")
    bits = (config.get("loftq_config") or {}).get("loftq_bits", 4)
    bits = bits if config.get("init_lora_weights") == "loftq" else None
    parts = [None if t is None else to_wide(t) for t in (*lora.shift, sample)]
    shifted: torch.Tensor = method_of("LORA").subtract_start(W, *parts, bits)
    kind = job.kinds.get(key)  # of the weight in training
    return shifted if kind is None or shifted is W else shifted.to(kind).to(W.dtype)


def find_orientation(
    job: MergeJob, path: str, lora: LowRank, spot: Spot, shape: tuple[int, ...]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function that views a stored weight, or a matrix of a stack, as the matrix (out, fan_in) that B A adds
    to.

    The view is flattened to two dimensions, or transposed where the weight is stored (in, out). For a square matrix
    `square_is_turned` decides; embeddings are always transposed.

    Raises:
        BaseModelMismatchError: the shape fits neither, or a stack has another number of experts.
    """
    out, fan_in = get_matrix_sizes(lora, spot)
    matrix_shape = shape[1:] if lora.kind == "experts" and spot.expert is None else shape
    straight, turned = (*matrix_shape[:1], prod(matrix_shape[1:])) == (out, fan_in), matrix_shape == (fan_in, out)
    if lora.kind == "embedding" or (straight and turned and square_is_turned(job, path, lora, spot)):
        straight = False
    if lora.kind == "experts" and spot.expert is None and shape[0] != lora.A.shape[0]:
        straight = turned = False
    if straight:
        return lambda W: W.flatten(1)
    if turned:
        return lambda W: W.T
    raise job.misfit(
        path, f"B A is {(out, fan_in)}, '{spot.key}' {shape}" + describe_groups(lora, matrix_shape, out, fan_in)
    )


def describe_groups(lora: LowRank, own: tuple[int, ...], out: int, fan_in: int) -> str:
    """Return " (a convolution with groups …)" as an ending for an error, or "".

    It is for a convolution with rows `out`, at least three dimensions, and a `fan_in` that is a multiple of the stored
    one.
    """
    grouped = lora.kind == "conv" and own and own[0] == out and len(own) > 2 and fan_in % max(1, prod(own[1:])) == 0
    return " (a convolution with groups has no weight that says what the adapter does)" if grouped else ""


def square_is_turned(job: MergeJob, path: str, lora: LowRank, spot: Spot) -> bool:
    """Return True if a square weight is stored (in, out).

    A stack of experts: by `job.stacked`; a single expert's matrix and a convolution: never; others: by config of
    adapter and base.
    """
    if lora.kind == "experts":
        return spot.expert is None and job.stacked(path)
    if lora.kind == "conv":
        return False
    return is_stored_in_out(job.adapter, job.config)


def get_matrix_sizes(lora: LowRank, spot: Spot) -> tuple[int, int]:
    """Return (out, fan_in) of the matrix that B A adds to.

    For experts, only the rows at `spot` count. For a convolution, fan_in includes the kernel: that of `mid` if it has
    one, else of A.
    """
    out, fan_in = delta_shape(lora)
    return (out if spot.rows is None or lora.kind != "experts" else spot.rows[1]), fan_in


def list_matrices(
    lora: LowRank, spot: Spot, view: Callable[[torch.Tensor], torch.Tensor], W: torch.Tensor, own: Read
) -> Iterator[tuple[torch.Tensor, Callable[..., torch.Tensor], torch.Tensor, torch.Tensor]]:
    """Yield for each matrix of a weight: its view in W, a function that returns the checkpoint's matrix, and its
    factors A and B.

    One matrix, except for a whole stack of experts, which has one for each. A spot of one expert gets that expert's
    factors, B cut to the spot's rows. A Tucker core is multiplied into A. Factors are in float32 or float64, with two
    dimensions.
    """
    A, B = to_wide(lora.A), to_wide(lora.B)
    if lora.kind != "experts":
        if lora.mid is not None:
            core = to_wide(lora.mid)
            A = torch.einsum("ij...,jn->in...", core, A.flatten(1))
        yield view(W), lambda: view(own()), A.flatten(1), B.flatten(1)
    elif spot.expert is not None:
        start, n = spot.rows or (0, B.shape[1])
        yield view(W), lambda: view(own()), A[spot.expert], B[spot.expert][start : start + n]
    else:
        for e in range(len(A)):
            yield view(W[e]), lambda e=e: view(own()[e]), A[e], B[e]


def change_bias(job: MergeJob, path: str, lora: LowRank) -> TensorChange:
    """Return the change that adds the bias of the second factor, times scale and weight, to the layer's bias in its
    first place.

    Raises:
        BaseModelMismatchError: the layer has no bias, or one of another shape.
    """
    assert lora.bias is not None
    spot = job.places.find(f"{path}.bias")
    if not spot:
        raise job.misfit(path, "it shifts the bias, and the layer has none: merged, there is no place for that")
    shape, value = job.places.shapes[spot[0].key], lora.bias
    if shape != tuple(value.shape):
        raise job.misfit(path, f"its bias is {tuple(value.shape)}, '{spot[0].key}' {shape}")

    def fold(b: torch.Tensor, own: Read) -> torch.Tensor:
        """Add weight · scale · bias, cast to the dtype of `b`, to `b` in place, and return it."""
        return b.add_(to_wide(value).to(b.dtype), alpha=lora.scale * job.weight)

    return TensorChange(spot[0].key, f"{path}.bias", fold, shape, (value, lora.scale))


# whole tensors and rows


def replace_whole(job: MergeJob, name: str, value: Tensor) -> list[TensorChange]:
    """Return the changes that replace a base tensor by a trained one, one for each place.

    A tensor that the base lacks is one change that adds it. The job's weight does not matter for that.

    Raises:
        BaseModelMismatchError: the shape differs beyond the first dimension, or a new tensor is not in
            `modules_to_save`.
    """
    spots = job.places.find(name)
    if spots is None and name in list_unnamed(job.adapter):
        raise job.misfit(name, "it is a tensor that neither the base has nor the adapter's modules_to_save names")
    if spots is None:
        return [TensorChange(name, name, lambda _, own: to_wide(value), tuple(value.shape), (value,), new=True)]
    return [replace_part(job, name, value, spot) for spot in spots]


def replace_part(job: MergeJob, name: str, value: Tensor, spot: Spot) -> TensorChange:
    """Return the change that replaces the tensor at `spot` by its part of a trained one: all, one expert, or rows of an
    expert. With `job.weight` other than 1 it interpolates, and is not marked as one that replaces.

    Raises:
        BaseModelMismatchError: the shapes differ; another number of rows is allowed outside of experts.
    """
    shape = job.places.shapes[spot.key]
    cut = value.shape
    if spot.expert is not None:
        cut = cut[1:] if spot.rows is None else (spot.rows[1], *cut[2:])
    resized = cut != shape
    if resized and (spot.expert is not None or cut[1:] != shape[1:]):
        raise job.misfit(name, f"it brings a tensor {tuple(value.shape)}, '{spot.key}' is {shape}")

    def fold(W: torch.Tensor, own: Read) -> torch.Tensor:
        """Return the trained values for weight 1: all, those of the spot's expert, or its rows of that expert.

        W is then ignored, and the trained tensor's dtype stays (at least float32). For another weight, cast them to W's
        dtype, move W the part `weight` of the way to them, in place, and return it.

        Raises:
            OptionError: the weight is not 1 and the sizes differ.
        """
        new = to_wide(value)
        if spot.expert is not None:
            new = new[spot.expert]
            new = new if spot.rows is None else new[spot.rows[0] : sum(spot.rows)]
        if job.weight == 1:
            return new
        if resized:
            raise OptionError(
                f"Adapter '{job.name}' brings '{name}' with other sizes than the base's, which weight {job.weight} "
                "cannot mix. Give it weight 1."
            )
        return W.lerp_(new.to(W.dtype), job.weight)

    return TensorChange(spot.key, name, fold, tuple(cut), (value,), replaces=job.weight == 1)


def replace_rows(job: MergeJob, name: str, indices: Tensor, values: Tensor, spots: list[Spot]) -> TensorChange:
    """Return the change that replaces rows of an embedding by trained ones; it names these rows.

    Nothing is computed until it is called.

    The file's own whole embedding, if it has one, gives the shape. Several rows for one token are replaced by their
    mean.

    Raises:
        BaseModelMismatchError: the width differs, the embedding is no matrix, or an index is beyond its rows.
    """
    (spot,) = spots
    replacement = job.adapter.full.get(name)
    shape = job.places.shapes[spot.key] if replacement is None else replacement.shape
    at = torch.from_numpy(indices.read().copy()).long()
    distinct, place = at.unique(return_inverse=True)
    last = max(at.tolist(), default=-1)
    if len(shape) != 2 or values.shape[1] != shape[1] or last >= shape[0]:
        raise job.misfit(name, f"it brings rows {tuple(values.shape)} up to number {last}, of {shape}")

    def fold(W: torch.Tensor, own: Read) -> torch.Tensor:
        """Overwrite the rows of W in place, for another weight than 1 move them part of the way, and return W.

        The rows are cast to W's dtype.

        A token that is named several times gets the mean of its rows, computed in that dtype.
        """
        new = to_wide(values).to(W.dtype)
        if len(distinct) < len(at):  # a token that is named several times has the mean of its rows
            new = torch.zeros(len(distinct), new.shape[1], dtype=new.dtype).index_add_(0, place, new)
            new = (new / place.bincount()[:, None])[place]
        W[at] = new if job.weight == 1 else W[at].lerp(new, job.weight)
        return W

    return TensorChange(spot.key, name, fold, shape, ("rows", indices, values), rows=frozenset(distinct.tolist()))
