# SPDX-License-Identifier: Apache-2.0
"""Heads of attention: how many keys and values each layer takes, how large, and which of them this process has."""

from __future__ import annotations

from torch import Tensor, nn

from graft.core.errors import warn
from graft.core.ops import find_op
from graft.kernels.cuts import Cut, cut_up
from graft.prompts.kv_prefix import Pairs
from graft.storage import innermost, piece_of

Shape = tuple[int, int]  # heads, head_dim


def key_shapes(stack: nn.Module) -> list[Shape | None] | None:
    """Return heads and head size of each layer, None for one without keys of its own; None: the modules do not say."""
    found: dict[int, Shape | None] = {}
    for module in stack.modules():
        index, size, keys = (getattr(module, name, None) for name in ("layer_idx", "head_dim", "k_proj"))
        if not isinstance(index, int) or not isinstance(size, int):
            continue
        weight = getattr(keys, "out_features", None)
        if getattr(module, "is_kv_shared_layer", False) or (keys is None and hasattr(module, "q_proj")):
            found[index] = None
        elif weight is not None:
            found[index] = (weight // size, size)
    n = len(found)
    return [found[i] for i in range(n)] if n and set(found) == set(range(n)) else None


def head_cuts(stack: nn.Module) -> dict[int, Cut]:
    """Return the cut of the heads of each layer of which this process has some."""
    found: dict[int, Cut] = {}
    for module in stack.modules():
        index, size, keys = (getattr(module, name, None) for name in ("layer_idx", "head_dim", "k_proj"))
        if isinstance(index, int) and isinstance(size, int) and keys is not None:
            keys = innermost(keys)
            piece = piece_of(keys, find_op(keys))
            if piece is not None and piece.outputs is not None and piece.outputs.chunk % size == 0:
                found[index] = piece.outputs._replace(size=piece.outputs.size // size)
    return found


def unclear_heads(stack: nn.Module) -> str | None:
    """Say which projection gives some heads of a layer, of which nothing tells which ones; None if there is none."""
    for module in stack.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            for name, child in module.named_modules():
                piece = None if name == "k_proj" else piece_of(child, find_op(child))
                if piece is not None and piece.outputs is not None:
                    return f"'{name}', parallel by the style '{piece.style}'"
    return None


def own_heads(pairs: Pairs, cuts: dict[int, Cut]) -> Pairs:
    """Return the pairs of the heads that this process has."""
    if not cuts:
        return pairs
    return [
        p if p is None else (cut_up(p[0], cuts.get(i), 1), cut_up(p[1], cuts.get(i), 1)) for i, p in enumerate(pairs)
    ]


def fitted(pairs: list[tuple[Tensor, Tensor]], shapes: list[Shape | None] | None) -> Pairs:
    """Return the pairs that each layer can hold: cut where its heads are fewer or smaller, None where they are larger.

    Raises:
        ValueError: no layer can hold its pair.
    """
    if shapes is None:
        return list(pairs)
    out: Pairs = []
    skipped = []
    for i, (pair, shape) in enumerate(zip(pairs, shapes)):
        have = pair[0].shape[1], pair[0].shape[3]
        if shape is None or shape[0] > have[0] or shape[1] > have[1]:
            out.append(None)
            skipped.append(i)
        else:
            out.append(pair if shape == have else tuple(t[:, : shape[0], :, : shape[1]] for t in pair))  # type: ignore[arg-type]
    if len(skipped) == len(out):
        raise ValueError(
            "Prefix tuning skipped every layer because none has keys and values of its own in the prompt's shape: "
            f"{pairs[0][0].shape[1]} heads of {pairs[0][0].shape[3]}."
        )
    if skipped:
        done = [i for i in range(len(out)) if i not in skipped]
        warn(
            f"Prefix tuning injected into layers {done}; skipped {skipped} due to KV shape mismatch or shared-KV "
            "layers."
        )
    return out
