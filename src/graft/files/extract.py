# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter from two checkpoints of one model, of which one was fine-tuned whole: the largest part of the
difference, matrix by matrix.

The SVD of a large matrix is randomized (Halko, Martinsson, Tropp 2011, arXiv 0909.4061), and checked: ‖Δ‖² - Σ σ² is
what it leaves out, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from graft import BaseModelMismatchError, CheckpointError, LossError, NonFiniteError
from graft.core.errors import join_some
from graft.files import algebra
from graft.files.algebra import Svd
from graft.files.base import BaseFiles
from graft.files.errors import OptionError
from graft.files.layers import CheckpointPair, are_equal, module_path
from graft.files.neutral import AdapterFile, LowRank
from graft.files.resize import check_resize_options, resize_adapter
from graft.files.tensors import Bytes, Tensor, rearrange_tensor

if TYPE_CHECKING:
    from graft.files.neutral import Kind

LARGE = 2048  # rows and columns: above, the SVD is randomized
OVERSAMPLING, ROUNDS = 10, 2
RANK = 32  # if no option limits ranks
WIDEST = 256  # of which `max_mb` chooses
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class ExtractedTensor:
    """What became of one tensor."""

    name: str
    how: Literal["lora", "full"]
    size: float  # ‖Δ‖
    relative: float  # ‖Δ‖ / ‖W‖
    rank: int = 0
    energy: float = 1.0  # the part of ‖Δ‖² that the adapter has


@dataclass
class Extraction:
    adapter: AdapterFile
    rows: list[ExtractedTensor] = field(default_factory=list)
    same: int = 0  # tensors that training left alone


def extract_adapter(
    tuned: BaseFiles,
    base: BaseFiles,
    rank: int | None = None,
    energy: float | None = None,
    max_mb: float | None = None,
    include: str | None = None,
    exclude: str | None = None,
    embed: str = "full",
    progress: Callable[[str], object] = lambda name: None,
) -> Extraction:
    """Return an adapter that makes a fine-tuned model of its base, as nearly as its ranks allow.

    Matrices, convolutions and stacks of experts become LoRA; norms, biases and what has another size are kept whole.
    Names are those of the base's model, if a library here knows it. One matrix and its difference are in memory at a
    time, of a stack of experts also the stack as the files have it.

    Args:
        rank: at most, of all modules; 32 if nothing else is given.
        energy: the part of ‖Δ‖² that each module keeps, of 1.
        max_mb: megabytes of the file; the ranks are those that lose least.
        include: a pattern of names as shells have them (`*.self_attn.*`): what else differs is left out.
        exclude: the same for what is left out.
        embed: how embeddings and heads are kept if their size is the same: "lora" or "full".
        progress: takes the name of each tensor before it is read.

    Raises:
        BaseModelMismatchError: the checkpoints are not of one architecture, or one is quantized.
        CheckpointError: they are the same.
        LossError: a parameter changed for which PEFT's files have no place.
        NonFiniteError: what differs holds NaN or infinite numbers.
        OptionError: several of rank, energy and max_mb, or a value out of range.
    """
    if embed not in ("lora", "full"):
        raise OptionError(f"embed={embed!r} is neither 'lora' nor 'full'.")
    if rank is energy is max_mb is None:
        rank = RANK
    check_resize_options(dict(rank=rank, energy=energy, max_mb=max_mb), None)
    if max_mb is not None:
        rank = WIDEST
    layers = CheckpointPair(tuned, base)
    check_same_architecture(layers, tuned.path, base.path)
    extraction = Extraction(AdapterFile("peft", tuned.path, base=base.path))
    for name in sorted(layers.new):
        if name not in layers.twins and is_included(name, include, exclude):
            progress(name)
            add_tensor_change(extraction, name, layers, rank, energy, embed)
    if not extraction.rows:
        raise CheckpointError(f"{tuned.path} and {base.path} do not differ where include and exclude let them.")
    extraction.adapter.config["ensure_weight_tying"] = copy_to_tied_names(extraction.adapter, layers)
    add_companion_tensors(extraction.adapter, layers)
    linear = (path for path, lora in extraction.adapter.low_rank.items() if lora.kind == "linear")
    extraction.adapter.by_parameter = frozenset(filter(layers.is_called_as_experts, linear))
    extraction.adapter.config["fan_in_fan_out"] = any(map(layers.is_conv1d, layers.old))
    if max_mb is not None and extraction.adapter.modules:
        extraction.adapter, cut = resize_adapter(extraction.adapter, max_mb=max_mb)
        left = {f"{row.module}.weight": row for row in cut} | {row.module: row for row in cut}
        for i, row in enumerate(extraction.rows):
            if (now := left.get(row.name)) is not None:
                extraction.rows[i] = replace(row, rank=now.after, energy=row.energy * now.energy)
    return extraction


def copy_to_tied_names(adapter: AdapterFile, layers: CheckpointPair) -> bool:
    """Give the further names of tied tensors the change of the first, since files hold all.

    Return True if the base's model ties some that have changed.
    """
    changed = False
    for name, first in layers.twins.items():
        lora = adapter.low_rank.get(module_path(first)) if first.endswith(".weight") else None
        changed = changed or first in adapter.full or lora is not None
        if first in adapter.full:
            adapter.full[name] = adapter.full[first]
        elif lora is not None:
            if lora.kind == "embedding" and not layers.is_embedding(name):
                A, B = (rearrange_tensor(t, lambda v: v.T, *t.shape[::-1]) for t in (lora.B, lora.A))
                lora = LowRank(A, B, lora.scale)
            adapter.modules[module_path(name)] = lora
    return changed and layers.is_tied


def add_companion_tensors(adapter: AdapterFile, layers: CheckpointPair) -> None:
    """Add what stands beside tensors that are kept whole: files hold modules whole, and the biases of all targets.

    Raises:
        LossError: a parameter of a module that holds others changed, for which PEFT's files have no place.
    """
    adapted = {module_path(path) for path, lora in adapter.low_rank.items() if lora.kind == "experts"}
    bare = [name for name in adapter.full if layers.is_container(name) or module_path(name) in adapted]
    if bare:
        raise LossError(
            f"PEFT's files have no place for parameters of their own: {join_some(sorted(bare))}. Leave them out by "
            "exclude."
        )
    biases = {f"{path}.bias" for path in adapter.modules} & layers.new.keys()
    modules = {module_path(name) for name in adapter.full} - {*adapter.modules}
    beside = {name for name in layers.new if module_path(name) in modules}
    for name in beside | (biases if biases & {*adapter.full} else set()):
        adapter.full[name] = layers.new[name]


def is_included(name: str, include: str | None, exclude: str | None) -> bool:
    return (include is None or fnmatchcase(name, include)) and not (exclude is not None and fnmatchcase(name, exclude))


def check_same_architecture(layers: CheckpointPair, tuned: str, base: str) -> None:
    """Raise BaseModelMismatchError if two checkpoints, of these paths, are not of one architecture."""
    new, old = layers.new, layers.old
    new_names, old_names = ({n for n, t in m.items() if t.dtype in FLOATS} for m in (new, old))
    missing, added = sorted(old_names - new_names), sorted(new_names - old_names)
    packed = [n for m in (new, old) for n, t in m.items() if t.dtype not in FLOATS and n in new_names | old_names]
    packed += layers.quantized
    misfits = [
        n
        for n in new_names & old_names
        if new[n].shape != old[n].shape and not is_resized_embedding(new[n].shape, old[n].shape)
    ]
    if missing or added or misfits or packed or not new_names & old_names:
        raise BaseModelMismatchError(
            f"{tuned} is no fine-tuned {base}: "
            + "; ".join(
                f"{what} {join_some(names, 3)}"
                for what, names in (
                    ("it lacks", missing), ("the base lacks", added), ("other shapes of", misfits),
                    ("quantized", packed),
                )
                if names
            )
            + "."
        )  # fmt: skip


def is_resized_embedding(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Return True if two shapes are those of one embedding with vocabularies of two sizes."""
    return len(a) == len(b) and len(a) in (1, 2) and a[1:] == b[1:]


def add_tensor_change(
    extraction: Extraction, name: str, layers: CheckpointPair, rank: int | None, energy: float | None, embed: str
) -> None:
    """Add what one tensor has become to an adapter."""
    new, old = layers.new[name], layers.old[name]
    if old.shape != new.shape:
        extraction.adapter.full[name] = new
        extraction.rows.append(ExtractedTensor(name, "full", finite_norm(name, new.read().astype("f8")), 1.0))
        return
    if are_equal(new, old):
        extraction.same += 1
        return
    kind, path = layers.lora_kind(name, embed), module_path(name) if name.endswith(".weight") else name
    turned = (kind == "linear" and layers.is_conv1d(name)) or (kind == "experts" and layers.is_transposed(name))
    size = weight_norm = energy_sum = 0.0
    triplets = []
    for after, before in zip(*(split_into_matrices(t, kind) for t in (new, old)), strict=True):
        W = before.read()
        delta = np.subtract(after.read(), W, dtype=np.promote_types(W.dtype, "f4"))
        weight_norm, size = np.hypot(weight_norm, np.linalg.norm(W)), np.hypot(size, finite_norm(name, delta))
        if kind is not None:
            triplets.append(largest_triplets(delta.T if turned else delta.reshape(len(delta), -1), rank, energy))
            energy_sum += float((triplets[-1].s.astype("f8") ** 2).sum())
    if size == 0:
        extraction.same += 1
        return
    relative = float(size / weight_norm) if weight_norm else float("inf")
    if kind is None:
        extraction.adapter.full[name] = new
        extraction.rows.append(ExtractedTensor(name, "full", float(size), relative))
        return
    k = max(len(svd.s) for svd in triplets)
    extraction.adapter.modules[path] = algebra.replace_factors(make_empty_factors(kind, new.shape, turned), triplets, k)
    extraction.rows.append(
        ExtractedTensor(name, "lora", float(size), relative, k, min(energy_sum / float(size) ** 2, 1.0))
    )


def split_into_matrices(t: Tensor, kind: Kind | None) -> list[Tensor]:
    """Return the matrices of a stack, or the tensor itself if it is none."""
    if kind != "experts":
        return [t]
    data, n = t.load(), t.nbytes // t.shape[0]

    def load(i: int) -> Bytes:
        return memoryview(data)[n * i : n * (i + 1)]

    return [Tensor(t.shape[1:], t.dtype, partial(load, i)) for i in range(t.shape[0])]


def finite_norm(name: str, values: np.ndarray) -> float:
    """Return the norm of values; raise NonFiniteError if some are NaN or infinite."""
    if not np.isfinite(values).all():
        raise NonFiniteError(
            f"'{name}' holds NaN or infinite numbers in one of the checkpoints: no adapter makes the one of the other. "
            "Leave it out by exclude."
        )
    return float(np.linalg.norm(values))


def make_empty_factors(kind: Kind, shape: tuple[int, ...], turned: bool) -> LowRank:
    """Return empty factors whose shapes say how those of a change of this shape shall stand."""

    def empty(*sizes: int) -> Tensor:
        return Tensor(sizes, "F32", bytes)

    if turned:
        shape = (*shape[:-2], *shape[:-3:-1])
    if kind == "experts":
        return LowRank(empty(shape[0], 1, shape[2]), empty(shape[0], shape[1], 1), 1.0, kind)
    if kind == "embedding":
        return LowRank(empty(1, shape[0]), empty(shape[1], 1), 1.0, kind)
    return LowRank(empty(1, *shape[1:]), empty(shape[0], 1), 1.0, kind)


# the largest singular triplets


def largest_triplets(W: np.ndarray, rank: int | None, energy: float | None) -> Svd:
    """Return the triplets of a matrix that are kept: the first `rank`, or those that hold `energy`; all if neither."""
    most = min(W.shape)
    if most <= LARGE:
        U, s, Vt = np.linalg.svd(W, full_matrices=False)
        return cut_triplets(Svd(U, s, Vt), W, rank, energy)
    whole = float(np.linalg.norm(W)) ** 2
    k = rank or 64
    while True:
        triplets = approximate_svd(W, k)
        enough = energy is None or float((triplets.s.astype("f8") ** 2).sum()) >= energy * whole or k >= most
        if enough:
            return cut_triplets(triplets, W, rank, energy, whole)
        k = min(2 * k, most)


def cut_triplets(
    triplets: Svd, W: np.ndarray, rank: int | None, energy: float | None, whole: float | None = None
) -> Svd:
    """Return the triplets that are kept, without those that rounding alone made."""
    squares = np.cumsum(triplets.s.astype("f8") ** 2)
    real = int((triplets.s > triplets.s[0] * max(W.shape) * np.finfo("f4").eps).sum()) or 1
    k = min(real, rank or real)
    if energy is not None:
        k = min(k, int(np.searchsorted(squares, energy * (whole or squares[-1]) * (1 - 1e-9)) + 1))
    return Svd(triplets.U[:, :k], triplets.s[:k], triplets.Vt[:k])


def approximate_svd(W: np.ndarray, k: int) -> Svd:
    """Return nearly the `k` largest triplets of a matrix, by two rounds of subspace iteration."""
    random = np.random.default_rng(0)
    width = min(k + OVERSAMPLING, *W.shape)
    Q, _ = np.linalg.qr(W @ random.standard_normal((W.shape[1], width)).astype(W.dtype))
    for _ in range(ROUNDS):
        Q, _ = np.linalg.qr(W.T @ Q)
        Q, _ = np.linalg.qr(W @ Q)
    U, s, Vt = np.linalg.svd(Q.T @ W, full_matrices=False)
    return Svd(Q @ U[:, :k], s[:k], Vt[:k])
