# SPDX-License-Identifier: Apache-2.0
"""The positions at which an aLoRA adapter acts, by row, and how they move on in `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.run import Run

ALL = 1 << 30  # more positions than any input has
CACHES = ("cache", "past_key_values")  # the argument in transformers from 5.2x on, and before


@dataclass
class Progress:
    """How far `generate` is. A fixed number for all steps after the prompt, so that a compiled one is used again."""

    passed: int = 0  # positions between the end of the prompt and the end of what the model sees now


@dataclass
class Offsets:
    """The positions, counted from the end of the prompt, at which the adapter acts on each row."""

    counts: Tensor  # (batch,), 0: nowhere
    longest: int  # of `counts`, at least
    progress: Progress

    def __getitem__(self, index: Tensor) -> Offsets:
        return Offsets(self.counts[index.to(self.counts.device)], self.longest, self.progress)

    def repeat_interleave(self, repeats: int, dim: int) -> Offsets:
        return Offsets(self.counts.repeat_interleave(repeats, dim), self.longest, self.progress)

    def mask(self, positions: int, tail: int) -> Tensor:
        """Return where the adapter acts at the last `tail` of so many positions, (batch, tail)."""
        at = torch.arange(positions - tail, positions, device=self.counts.device)
        acts = at >= (positions - self.progress.passed - self.counts)[:, None]
        return acts & (self.counts > 0)[:, None]


def ids_of(run: Run) -> Tensor | None:
    """Return the input ids, (batch, positions); None if the run has none."""
    ids = run.argument("input_ids")
    if ids is None and run.generates:
        ids = run.kwargs.get("inputs")
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() > 2:
        return None
    return ids[None] if ids.dim() == 1 else ids


@contextmanager
def following(model: nn.Module, run: Run, offsets: dict[Any, Any]) -> Iterator[None]:
    """Keep the offsets, which count from the end of the prompt, right in every step of `generate`, with a cache or
    without."""
    if not (run.generates and offsets):
        yield
        return
    steps = {id(o.progress): o.progress for o in offsets.values()}.values()
    prompt, thread = ids_of(run), get_ident()
    length = (run.kwargs["inputs_embeds"] if prompt is None else prompt).shape[1]

    def follow(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if get_ident() != thread:  # others may run the model as well
            return
        given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
        inputs = next((t for t in given if t is not None), None)
        if inputs is None:
            return
        new = inputs.shape[1]
        cache: Any = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        if hasattr(cache, "get_seq_length"):
            seen = int(cache.get_seq_length())
        else:  # none, or one that does not tell
            seen = length if new < length else 0
        for step in steps:
            step.passed = ALL if seen >= length else seen + new - length

    # transformers 4 fills a cache in chunks by `forward` itself, past the hooks of the model, not those of its decoder
    decoder = getattr(model, getattr(model, "base_model_prefix", ""), model)
    handles = [m.register_forward_pre_hook(follow, with_kwargs=True) for m in {model, decoder}]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
