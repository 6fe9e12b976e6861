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
from graft.files.layers import Layers, module_of, same
from graft.files.neutral import AdapterFile, LowRank
from graft.files.resize import check, resize
from graft.files.tensors import Bytes, Tensor, rearranged

if TYPE_CHECKING:
    from graft.files.neutral import Kind

LARGE = 2048  # rows and columns: above, the SVD is randomized
OVERSAMPLING, ROUNDS = 10, 2
RANK = 32  # if no option limits ranks
WIDEST = 256  # of which `max_mb` chooses
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Extracted:
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
    rows: list[Extracted] = field(default_factory=list)
    same: int = 0  # tensors that training left alone


def extract(
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
    check(dict(rank=rank, energy=energy, max_mb=max_mb), None)
    if max_mb is not None:
        rank = WIDEST
    layers = Layers(tuned, base)
    compare(layers, tuned.path, base.path)
    made = Extraction(AdapterFile("peft", tuned.path, base=base.path))
    for name in sorted(layers.new):
        if name not in layers.twins and wanted(name, include, exclude):
            progress(name)
            take(made, name, layers, rank, energy, embed)
    if not made.rows:
        raise CheckpointError(f"{tuned.path} and {base.path} do not differ where include and exclude let them.")
    made.adapter.config["ensure_weight_tying"] = tie(made.adapter, layers)
    complete(made.adapter, layers)
    linear = (path for path, lora in made.adapter.low_rank.items() if lora.kind == "linear")
    made.adapter.by_parameter = frozenset(filter(layers.is_called_as_experts, linear))
    made.adapter.config["fan_in_fan_out"] = any(map(layers.is_conv1d, layers.old))
    if max_mb is not None and made.adapter.modules:
        made.adapter, cut = resize(made.adapter, max_mb=max_mb)
        left = {f"{row.module}.weight": row for row in cut} | {row.module: row for row in cut}
        for i, row in enumerate(made.rows):
            if (now := left.get(row.name)) is not None:
                made.rows[i] = replace(row, rank=now.after, energy=row.energy * now.energy)
    return made


def tie(adapter: AdapterFile, layers: Layers) -> bool:
    """Give the further names of tied tensors the change of the first, since files hold all.

    Return True if the base's model ties some that have changed.
    """
    changed = False
    for name, first in layers.twins.items():
        lora = adapter.low_rank.get(module_of(first)) if first.endswith(".weight") else None
        changed = changed or first in adapter.full or lora is not None
        if first in adapter.full:
            adapter.full[name] = adapter.full[first]
        elif lora is not None:
            if lora.kind == "embedding" and not layers.is_embedding(name):
                A, B = (rearranged(t, lambda v: v.T, *t.shape[::-1]) for t in (lora.B, lora.A))
                lora = LowRank(A, B, lora.scale)
            adapter.modules[module_of(name)] = lora
    return changed and layers.is_tied


def complete(adapter: AdapterFile, layers: Layers) -> None:
    """Add what stands beside tensors that are kept whole: files hold modules whole, and the biases of all targets.

    Raises:
        LossError: a parameter of a module that holds others changed, for which PEFT's files have no place.
    """
    adapted = {module_of(path) for path, lora in adapter.low_rank.items() if lora.kind == "experts"}
    bare = [name for name in adapter.full if layers.holds(name) or module_of(name) in adapted]
    if bare:
        raise LossError(
            f"PEFT's files have no place for parameters of their own: {join_some(sorted(bare))}. Leave them out by "
            "exclude."
        )
    biases = {f"{path}.bias" for path in adapter.modules} & layers.new.keys()
    modules = {module_of(name) for name in adapter.full} - {*adapter.modules}
    beside = {name for name in layers.new if module_of(name) in modules}
    for name in beside | (biases if biases & {*adapter.full} else set()):
        adapter.full[name] = layers.new[name]


def wanted(name: str, include: str | None, exclude: str | None) -> bool:
    return (include is None or fnmatchcase(name, include)) and not (exclude is not None and fnmatchcase(name, exclude))


def compare(layers: Layers, tuned: str, base: str) -> None:
    """Raise BaseModelMismatchError if two checkpoints, of these paths, are not of one architecture."""
    new, old = layers.new, layers.old
    ours, theirs = ({n for n, t in m.items() if t.dtype in FLOATS} for m in (new, old))
    missing, added = sorted(theirs - ours), sorted(ours - theirs)
    packed = [n for m in (new, old) for n, t in m.items() if t.dtype not in FLOATS and n in ours | theirs]
    packed += layers.quantized
    other = [n for n in ours & theirs if new[n].shape != old[n].shape and not resized(new[n].shape, old[n].shape)]
    if missing or added or other or packed or not ours & theirs:
        raise BaseModelMismatchError(
            f"{tuned} is no fine-tuned {base}: "
            + "; ".join(
                f"{what} {join_some(names, 3)}"
                for what, names in (
                    ("it lacks", missing), ("the base lacks", added), ("other shapes of", other), ("quantized", packed),
                )
                if names
            )
            + "."
        )  # fmt: skip


def resized(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Return True if two shapes are those of one embedding with vocabularies of two sizes."""
    return len(a) == len(b) and len(a) in (1, 2) and a[1:] == b[1:]


def take(made: Extraction, name: str, layers: Layers, rank: int | None, energy: float | None, embed: str) -> None:
    """Add what one tensor has become to an adapter."""
    new, old = layers.new[name], layers.old[name]
    if old.shape != new.shape:
        made.adapter.full[name] = new
        made.rows.append(Extracted(name, "full", measured(name, new.read().astype("f8")), 1.0))
        return
    if same(new, old):
        made.same += 1
        return
    kind, path = layers.kind(name, embed), module_of(name) if name.endswith(".weight") else name
    turned = (kind == "linear" and layers.is_conv1d(name)) or (kind == "experts" and layers.is_transposed(name))
    size = whole = kept = 0.0
    found = []
    for after, before in zip(*(matrices(t, kind) for t in (new, old)), strict=True):
        W = before.read()
        delta = np.subtract(after.read(), W, dtype=np.promote_types(W.dtype, "f4"))
        whole, size = np.hypot(whole, np.linalg.norm(W)), np.hypot(size, measured(name, delta))
        if kind is not None:
            found.append(largest(delta.T if turned else delta.reshape(len(delta), -1), rank, energy))
            kept += float((found[-1].s.astype("f8") ** 2).sum())
    if size == 0:
        made.same += 1
        return
    relative = float(size / whole) if whole else float("inf")
    if kind is None:
        made.adapter.full[name] = new
        made.rows.append(Extracted(name, "full", float(size), relative))
        return
    k = max(len(svd.s) for svd in found)
    made.adapter.modules[path] = algebra.with_factors(shaped(kind, new.shape, turned), found, k)
    made.rows.append(Extracted(name, "lora", float(size), relative, k, min(kept / float(size) ** 2, 1.0)))


def matrices(t: Tensor, kind: Kind | None) -> list[Tensor]:
    """Return the matrices of a stack, or the tensor itself if it is none."""
    if kind != "experts":
        return [t]
    data, n = t.load(), t.nbytes // t.shape[0]

    def load(i: int) -> Bytes:
        return memoryview(data)[n * i : n * (i + 1)]

    return [Tensor(t.shape[1:], t.dtype, partial(load, i)) for i in range(t.shape[0])]


def measured(name: str, values: np.ndarray) -> float:
    """Return the norm of values; raise NonFiniteError if some are NaN or infinite."""
    if not np.isfinite(values).all():
        raise NonFiniteError(
            f"'{name}' holds NaN or infinite numbers in one of the checkpoints: no adapter makes the one of the other. "
            "Leave it out by exclude."
        )
    return float(np.linalg.norm(values))


def shaped(kind: Kind, shape: tuple[int, ...], turned: bool) -> LowRank:
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


def largest(W: np.ndarray, rank: int | None, energy: float | None) -> Svd:
    """Return the triplets of a matrix that are kept: the first `rank`, or those that hold `energy`; all if neither."""
    most = min(W.shape)
    if most <= LARGE:
        U, s, Vt = np.linalg.svd(W, full_matrices=False)
        return cut(Svd(U, s, Vt), W, rank, energy)
    whole = float(np.linalg.norm(W)) ** 2
    k = rank or 64
    while True:
        found = randomized(W, k)
        enough = energy is None or float((found.s.astype("f8") ** 2).sum()) >= energy * whole or k >= most
        if enough:
            return cut(found, W, rank, energy, whole)
        k = min(2 * k, most)


def cut(found: Svd, W: np.ndarray, rank: int | None, energy: float | None, whole: float | None = None) -> Svd:
    """Return the triplets that are kept, without those that rounding alone made."""
    squares = np.cumsum(found.s.astype("f8") ** 2)
    real = int((found.s > found.s[0] * max(W.shape) * np.finfo("f4").eps).sum()) or 1
    k = min(real, rank or real)
    if energy is not None:
        k = min(k, int(np.searchsorted(squares, energy * (whole or squares[-1]) * (1 - 1e-9)) + 1))
    return Svd(found.U[:, :k], found.s[:k], found.Vt[:k])


def randomized(W: np.ndarray, k: int) -> Svd:
    """Return nearly the `k` largest triplets of a matrix, by two rounds of subspace iteration."""
    random = np.random.default_rng(0)
    width = min(k + OVERSAMPLING, *W.shape)
    Q, _ = np.linalg.qr(W @ random.standard_normal((W.shape[1], width)).astype(W.dtype))
    for _ in range(ROUNDS):
        Q, _ = np.linalg.qr(W.T @ Q)
        Q, _ = np.linalg.qr(W @ Q)
    U, s, Vt = np.linalg.svd(Q.T @ W, full_matrices=False)
    return Svd(Q @ U[:, :k], s[:k], Vt[:k])
