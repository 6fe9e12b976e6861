# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter from a fine-tuned checkpoint and its base: each matrix of the difference is cut to its largest
singular triplets.

The SVD of a large matrix is randomized (Halko, Martinsson, Tropp 2011, arXiv 0909.4061) and checked: its error is
exactly ‖Δ‖² - Σ σ².
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal

import numpy as np

from graft import BaseModelMismatchError, CheckpointError, LossError, NonFiniteError
from graft.core.errors import join_some
from graft.files import algebra
from graft.files.algebra import Svd
from graft.files.base import BaseDescription
from graft.files.errors import OptionError
from graft.files.layers import CheckpointPair, module_path
from graft.files.neutral import AdapterFile, Kind, LowRank
from graft.files.resize import check_resize_options, resize_adapter
from graft.files.tensors import Bytes, Tensor, are_equal, make_tensor

LARGE = 2048  # above that many rows and columns the SVD is randomized
OVERSAMPLING, ROUNDS = 10, 2
RANK = 32  # the default rank if no option limits ranks
WIDEST = 256  # the largest rank before `max_mb` chooses among them
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class ExtractedTensor:
    """The account of one changed tensor."""

    name: str
    how: Literal["lora", "full"]
    size: float  # ‖Δ‖
    relative: float  # ‖Δ‖ / ‖W‖
    rank: int = 0
    energy: float = 1.0  # the share of ‖Δ‖² in the adapter


@dataclass
class Extraction:
    """An extracted adapter with its account."""

    adapter: AdapterFile
    rows: list[ExtractedTensor] = field(default_factory=list)
    same: int = 0  # the number of unchanged tensors


def extract_adapter(
    tuned: BaseDescription,
    base: BaseDescription,
    rank: int | None = None,
    energy: float | None = None,
    max_mb: float | None = None,
    include: str | None = None,
    exclude: str | None = None,
    embed: str = "full",
    progress: Callable[[str], object] = lambda name: None,
) -> Extraction:
    """Return an adapter that turns a base into its fine-tuned model, as closely as its ranks allow.

    Changed matrices, convolutions and stacks of experts become LoRA. Norms, biases and resized tensors are stored
    whole. Names are those of the base's model if an installed library knows it. Tensors are taken in sorted order of
    their names. Only one matrix and its difference are in memory, plus the stack that it comes from. Nothing is
    written.

    Args:
        rank: the most of each module; 32 if none of rank, energy and max_mb is given.
        energy: the share of ‖Δ‖² that each module keeps, in (0, 1].
        max_mb: megabytes (10⁶ bytes) of the file; the ranks then lose the least, and are 256 at most.
        include: a shell pattern of tensor names (`*.self_attn.*`); other changes are ignored.
        exclude: a shell pattern of tensor names to ignore.
        embed: "lora" or "full" for embeddings and heads of unchanged size.
        progress: called with the name of each tensor before it is read.

    Raises:
        BaseModelMismatchError: the architectures differ, or a checkpoint is quantized.
        CheckpointError: no tensor that `include` and `exclude` select differs.
        LossError: PEFT's files cannot hold a changed parameter.
        NonFiniteError: a changed tensor has NaN or infinite numbers.
        OptionError: more than one of rank, energy and max_mb, or a value out of range.
    """
    if embed not in ("lora", "full"):
        raise OptionError(f"embed={embed!r} is unknown. Choose 'lora' or 'full'.")
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
        raise CheckpointError(
            f"{tuned.path} and {base.path} have no difference that include and exclude select. Check the two folders "
            "and the patterns."
        )
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
    """Copy the change of each tied tensor to its other names in `adapter`, in place, since files hold all names.

    The LoRA of an embedding is transposed for a head. Return True if a tied tensor changed and the base's model ties
    tensors.
    """
    changed = False
    for name, first in layers.twins.items():
        lora = adapter.low_rank.get(module_path(first)) if first.endswith(".weight") else None
        changed = changed or first in adapter.full or lora is not None
        if first in adapter.full:
            adapter.full[name] = adapter.full[first]
        elif lora is not None:
            if lora.kind == "embedding" and not layers.is_embedding(name):
                lora = LowRank(lora.B.transpose(), lora.A.transpose(), lora.scale)
            adapter.modules[module_path(name)] = lora
    return changed and layers.is_tied


def add_companion_tensors(adapter: AdapterFile, layers: CheckpointPair) -> None:
    """Add unchanged tensors to `adapter.full`, in place: the other tensors of each module that is stored whole, unless
    it has an adapter; and all biases of adapted modules, if one of these biases changed.

    Raises LossError if a whole tensor belongs to a module with sub-modules or adapted experts. PEFT's files have no
    place for it.
    """
    adapted = {module_path(path) for path, lora in adapter.low_rank.items() if lora.kind == "experts"}
    bare = [name for name in adapter.full if layers.is_container(name) or module_path(name) in adapted]
    if bare:
        raise LossError(f"PEFT's files cannot hold {join_some(sorted(bare))}. Leave them out with exclude.")
    biases = {f"{path}.bias" for path in adapter.modules} & layers.new.keys()
    modules = {module_path(name) for name in adapter.full} - {*adapter.modules}
    beside = {name for name in layers.new if module_path(name) in modules}
    for name in beside | (biases if biases & {*adapter.full} else set()):
        adapter.full[name] = layers.new[name]


def is_included(name: str, include: str | None, exclude: str | None) -> bool:
    """Return True if a name matches the pattern `include` and not the pattern `exclude`.

    None as a pattern has no effect.
    """
    return (include is None or fnmatchcase(name, include)) and not (exclude is not None and fnmatchcase(name, exclude))


def check_same_architecture(layers: CheckpointPair, tuned: str, base: str) -> None:
    """Raise BaseModelMismatchError if two checkpoints have other names of floating tensors, none in common, other
    shapes, or are quantized. The text lists up to 3 names for each fault.

    A vocabulary of another size is allowed. A tensor that is floating in one and not in the other counts as quantized.
    `tuned` and `base` are paths for the text.
    """
    new, old = layers.new, layers.old
    new_names, old_names = ({n for n, t in m.items() if t.dtype in FLOATS} for m in (new, old))
    packed = [n for m in (new, old) for n, t in m.items() if t.dtype not in FLOATS and n in new_names | old_names]
    packed += layers.quantized
    shapes = {n: (new[n].shape, old[n].shape) for n in new_names & old_names}
    # another vocabulary changes the first of one or two dimensions
    misfits = [n for n, (a, b) in shapes.items() if a[1:] != b[1:] or (a != b and not len(a) == len(b) <= 2)]
    faults = {
        "it lacks": sorted(old_names - new_names), "the base lacks": sorted(new_names - old_names),
        "other shapes of": misfits, "quantized": packed,
    }  # fmt: skip
    texts = [f"{what} {join_some(names, 3)}" for what, names in faults.items() if names]
    if texts or not new_names & old_names:
        raise BaseModelMismatchError(
            f"{tuned} is not a fine-tuned {base}: {'; '.join(texts)}. Give the base that it was tuned from."
        )


def add_tensor_change(
    extraction: Extraction, name: str, layers: CheckpointPair, rank: int | None, energy: float | None, embed: str
) -> None:
    """Record the change of one tensor in `extraction.adapter`, and its account in `extraction.rows`.

    An equal tensor, or a difference of 0, only raises the count `same`. A tensor of another shape, or one that no LoRA
    fits, is stored whole. Every other tensor is stored as factors from its SVD, for a stack one SVD per expert with the
    largest rank for all. The account has the norm of the change, the norm relative to the old weight's, and for factors
    the rank and the share of energy. The relative norm is 1 for another shape, and infinite for a weight of 0.

    Args:
        rank, energy: as of `largest_triplets`, which cuts the SVD.
        embed: "lora" or "full", see `CheckpointPair.lora_kind`.

    Raises:
        NonFiniteError: NaN or infinite numbers.
    """
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
    A, B = algebra.join_triplets(triplets, k, kind, new.shape[2:])
    extraction.adapter.modules[path] = LowRank(make_tensor(A, "F32"), make_tensor(B, "F32"), 1.0, kind)
    extraction.rows.append(
        ExtractedTensor(name, "lora", float(size), relative, k, min(energy_sum / float(size) ** 2, 1.0))
    )


def split_into_matrices(t: Tensor, kind: Kind | None) -> list[Tensor]:
    """Return the matrices of a stack of experts as tensors, or [t] for every other kind.

    A stack's bytes are loaded at once.
    """
    if kind != "experts":
        return [t]
    data, n = t.load(), t.nbytes // t.shape[0]

    def load(i: int) -> Bytes:
        """Return the bytes of matrix `i`."""
        return memoryview(data)[n * i : n * (i + 1)]

    return [Tensor(t.shape[1:], t.dtype, partial(load, i)) for i in range(t.shape[0])]


def finite_norm(name: str, values: np.ndarray) -> float:
    """Return the norm of an array. Raises NonFiniteError, naming the tensor, if a value is NaN or infinite."""
    if not np.isfinite(values).all():
        raise NonFiniteError(f"'{name}' has NaN or infinite numbers in a checkpoint. Leave it out with exclude.")
    return float(np.linalg.norm(values))


# the largest singular triplets


def largest_triplets(W: np.ndarray, rank: int | None, energy: float | None) -> Svd:
    """Return the singular triplets of a matrix to keep: at most `rank`, and as few as hold the share `energy` of its
    norm²; all if both are None.

    Matrices with at most 2048 rows or columns get an exact SVD. Larger ones get a randomized SVD of `rank`, or of 64
    without it; the rank doubles until the energy is reached.
    """
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
    """Return the first triplets of an SVD, as few as the limits allow.

    No more than `rank` are returned, as few as hold the share `energy` of `whole` (to a relative 1e-9). Those with σ up
    to σ₁ · the larger side · float32's epsilon are left out. None sets no limit. At least one stays. `whole` is ‖W‖²;
    without it, the sum of all σ² counts.
    """
    squares = np.cumsum(triplets.s.astype("f8") ** 2)
    real = int((triplets.s > triplets.s[0] * max(W.shape) * np.finfo("f4").eps).sum()) or 1
    k = min(real, rank or real)
    if energy is not None:
        k = min(k, int(np.searchsorted(squares, energy * (whole or squares[-1]) * (1 - 1e-9)) + 1))
    return Svd(triplets.U[:, :k], triplets.s[:k], triplets.Vt[:k])


def approximate_svd(W: np.ndarray, k: int) -> Svd:
    """Return nearly the `k` largest singular triplets of a matrix, by a randomized SVD with two rounds of subspace
    iteration.

    It has 10 extra columns, which are cut off. The random numbers have a fixed seed.
    """
    random = np.random.default_rng(0)
    width = min(k + OVERSAMPLING, *W.shape)
    Q, _ = np.linalg.qr(W @ random.standard_normal((W.shape[1], width)).astype(W.dtype))
    for _ in range(ROUNDS):
        Q, _ = np.linalg.qr(W.T @ Q)
        Q, _ = np.linalg.qr(W @ Q)
    U, s, Vt = np.linalg.svd(Q.T @ W, full_matrices=False)
    return Svd(Q @ U[:, :k], s[:k], Vt[:k])
