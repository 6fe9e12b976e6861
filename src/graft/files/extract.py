# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter from two checkpoints of one model, of which one was fine-tuned whole: the largest part of the
difference, matrix by matrix.

The SVD of a large matrix is randomized (Halko, Martinsson, Tropp 2011, arXiv 0909.4061), and checked: ‖Δ‖² - Σ σ² is
what it leaves out, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

import numpy as np

from graft.config.reading import Json
from graft.core.errors import BaseModelMismatchError, CheckpointError, NonFiniteError, some
from graft.files import algebra
from graft.files.algebra import Svd
from graft.files.base import BaseFiles
from graft.files.errors import LossError, OptionError
from graft.files.names import CONV1D
from graft.files.neutral import AdapterFile, LowRank
from graft.files.resize import check, resize
from graft.files.tensors import Tensor, rearranged

if TYPE_CHECKING:
    from graft.files.neutral import Kind

LARGE = 2048  # rows and columns: above, the SVD is randomized
OVERSAMPLING, ROUNDS = 10, 2
TOKENS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings")
EMBEDDINGS = (*TOKENS, "wpe", "position_embeddings", "token_type_embeddings", "embed_positions")
CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
HEAD = "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16")
RANK = 32  # if no option limits ranks
WIDEST = 256  # of which `max_mb` chooses


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
    One matrix and its difference are in memory at a time.

    Args:
        rank: at most, of all modules; 32 if nothing else is given.
        energy: the part of ‖Δ‖² that each module keeps, of 1.
        max_mb: megabytes of the file; the ranks are those that lose least.
        include: a pattern of names as shells have them (`*.self_attn.*`): what else differs is left out.
        exclude: the same for what is left out.
        embed: how embeddings and heads are kept if their size is the same: "lora" or "full".
        progress: takes the name of each tensor before it is read.

    Raises:
        BaseModelMismatchError: the checkpoints are not of one architecture.
        CheckpointError: they are the same.
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
    twice = twins(tuned, base)
    compare(tuned, base, twice)
    made = Extraction(AdapterFile("peft", tuned.path, base=base.path))
    for name in sorted(tuned.tensors):
        if name in twice or not wanted(name, include, exclude):
            continue
        progress(name)
        take(made, name, tuned.tensors[name], base.tensors.get(name), tuned.config, rank, energy, embed)
    if not made.rows:
        raise CheckpointError(f"{tuned.path} and {base.path} do not differ where include and exclude let them.")
    complete(made.adapter, tuned)
    made.adapter.config["fan_in_fan_out"] = is_conv1d(tuned.config)
    if twice or is_tied(base):
        made.adapter.config["ensure_weight_tying"] = True
        tie(made.adapter, tuned.config)
    if max_mb is not None and made.adapter.modules:
        made.adapter, cut = resize(made.adapter, max_mb=max_mb)
        left = {f"{row.module}.weight": row for row in cut} | {row.module: row for row in cut}
        for i, row in enumerate(made.rows):
            if (now := left.get(row.name)) is not None:
                made.rows[i] = replace(row, rank=now.after, energy=row.energy * now.energy)
    return made


def is_tied(base: BaseFiles) -> bool:
    """Return True if the head is the embedding. Where a model ties, transformers 4 writes neither a head nor that."""
    said = base.config.get("tie_word_embeddings")
    return generates(base.config) and HEAD not in base.tensors if said is None else bool(said)


def generates(config: Json) -> bool:
    return any(kind.endswith(("LMHeadModel", "ForCausalLM")) for kind in config.get("architectures") or ())


def tie(adapter: AdapterFile, config: Json) -> None:
    """Give the head of a model for generation the change of its embedding: files hold both."""
    if not generates(config):
        return
    for path, lora in adapter.low_rank.items():
        if lora.kind == "embedding" and path.rpartition(".")[2] in TOKENS:
            A, B = (rearranged(t, lambda v: v.T, *t.shape[::-1]) for t in (lora.B, lora.A))
            adapter.modules["lm_head"] = LowRank(A, B, lora.scale)
    for name, value in [*adapter.full.items()]:
        if module_of(name).rpartition(".")[2] in TOKENS:
            adapter.full[HEAD] = value


def complete(adapter: AdapterFile, tuned: BaseFiles) -> None:
    """Add what stands beside tensors that are kept whole: files hold modules whole, and the biases of all targets.

    Raises:
        LossError: a parameter of a module that holds others changed, for which PEFT's files have no place.
    """
    if bare := sorted(n for n in adapter.full if n.rpartition(".")[2] not in ("weight", "bias")):
        raise LossError(
            f"PEFT's files have no place for parameters of their own: {some(bare)}. Leave them out by exclude."
        )
    biases = {f"{path}.bias" for path in adapter.modules} & {*tuned.tensors}
    modules = {module_of(name) for name in adapter.full} - {*adapter.modules}
    beside = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")} & {*tuned.tensors}
    for name in beside | (biases if biases & {*adapter.full} else set()):
        adapter.full[name] = tuned.tensors[name]


def wanted(name: str, include: str | None, exclude: str | None) -> bool:
    return (include is None or fnmatchcase(name, include)) and not (exclude is not None and fnmatchcase(name, exclude))


def twins(tuned: BaseFiles, base: BaseFiles) -> set[str]:
    """Return the head if it is the input embedding, value by value: a tied pair is compared once."""
    head = tuned.tensors.get(HEAD)
    if head is None or not (base.config.get("tie_word_embeddings") or HEAD not in base.tensors):
        return set()
    tokens = [t for name, t in tuned.tensors.items() if module_of(name).rpartition(".")[2] in TOKENS]
    same = any(t.shape == head.shape and t.dtype == head.dtype and t.load() == head.load() for t in tokens)
    return {HEAD} if same else set()


def compare(tuned: BaseFiles, base: BaseFiles, twice: set[str]) -> None:
    """Raise BaseModelMismatchError if two checkpoints are not of one architecture."""
    ours, theirs = ({n for n, t in m.tensors.items() if t.dtype in FLOATS} for m in (tuned, base))
    head = {HEAD} | twice  # a tied pair may be written once
    missing, added = sorted(theirs - ours - head), sorted(ours - theirs - head)
    packed = [
        n for n, t in (*tuned.tensors.items(), *base.tensors.items()) if t.dtype not in FLOATS and n in ours | theirs
    ]
    other = [
        n for n in ours & theirs if tuned.shapes[n] != base.shapes[n] and not resized(tuned.shapes[n], base.shapes[n])
    ]
    if missing or added or other or packed or not ours & theirs:
        raise BaseModelMismatchError(
            f"{tuned.path} is no fine-tuned {base.path}: "
            + "; ".join(
                f"{what} {some(names, 3)}"
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


def module_of(name: str) -> str:
    return name.rpartition(".")[0]


def take(
    made: Extraction, name: str, new: Tensor, old: Tensor | None, config: Mapping[str, object], rank: int | None,
    energy: float | None, embed: str,
) -> None:  # fmt: skip
    """Add what one tensor has become to an adapter."""
    if old is None or old.shape != new.shape:
        made.adapter.full[name] = new
        size = measured(name, new.read().astype("f8"))
        made.rows.append(Extracted(name, "full", size, 1.0))
        return
    if new.dtype == old.dtype and new.load() == old.load():
        made.same += 1
        return
    before = old.read()
    whole = float(np.linalg.norm(before))
    delta = np.subtract(new.read(), before, dtype=np.promote_types(before.dtype, "f4"))
    del before
    size = measured(name, delta)
    if size == 0:
        made.same += 1
        return
    relative = size / whole if whole else float("inf")
    kind = kind_of(name, delta, embed)
    if kind is None:
        made.adapter.full[name] = new
        made.rows.append(Extracted(name, "full", size, relative))
        return
    path = module_of(name) if name.endswith(".weight") else name
    turned = kind == "linear" and is_conv1d(config) and path.rpartition(".")[2] in CONV1D_NAMES
    matrices = list(delta) if kind == "experts" else [delta.T if turned else delta.reshape(len(delta), -1)]
    found = [largest(matrix, rank, energy) for matrix in matrices]
    k = max(len(svd.s) for svd in found)
    lora = algebra.with_factors(shaped(kind, delta, turned), found, k)
    share = sum(float((svd.s.astype("f8") ** 2).sum()) for svd in found) / size**2
    made.adapter.modules[path] = lora
    made.rows.append(Extracted(name, "lora", size, relative, k, min(share, 1.0)))


def measured(name: str, values: np.ndarray) -> float:
    """Return the norm of values; raise NonFiniteError if some are NaN or infinite."""
    if not np.isfinite(values).all():
        raise NonFiniteError(
            f"'{name}' holds NaN or infinite numbers in one of the checkpoints: no adapter makes the one of the other. "
            "Leave it out by exclude."
        )
    return float(np.linalg.norm(values))


def kind_of(name: str, delta: np.ndarray, embed: str) -> Kind | None:
    """Return the kind of LoRA that a tensor's change becomes; None: it is kept whole."""
    leaf = module_of(name).rpartition(".")[2]
    if not name.endswith(".weight"):
        return "experts" if delta.ndim == 3 and ".experts." in name else None
    if delta.ndim < 2 or min(delta.shape[:2]) == 1:
        return None
    if leaf in EMBEDDINGS:
        return "embedding" if embed == "lora" else None
    if leaf == "lm_head" and embed == "full":
        return None
    return "linear" if delta.ndim == 2 else "conv"


def is_conv1d(config: Mapping[str, object]) -> bool:
    return config.get("model_type") in CONV1D


def shaped(kind: Kind, delta: np.ndarray, turned: bool) -> LowRank:
    """Return empty factors whose shapes say how those of `delta` shall stand."""
    shape = delta.shape[::-1] if turned else delta.shape

    def empty(*sizes: int) -> Tensor:
        return Tensor(sizes, "F32", bytes)

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
