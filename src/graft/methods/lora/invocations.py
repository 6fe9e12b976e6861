# SPDX-License-Identifier: Apache-2.0
"""Where an input invokes aLoRA adapters: found in its tokens, or given by the caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graft.core.errors import ConfigTypeError, PeftWarning, RoutingError, warn
from graft.core.rows import Rows
from graft.core.run import Run
from graft.kernels.waits import constant
from graft.methods.lora.offsets import Offsets, Progress, ids_of

ARGUMENT = "alora_offsets"
ONLY_EMBEDS = "when only inputs_embeds are provided. Disabling aLoRA for this forward pass"


def find(tuner: Any, run: Run) -> dict[str, Offsets]:
    """Return the offsets for each aLoRA adapter that acts; none if the input does not tell them.

    On a device, `generate` and the first forward of an adapter wait for them, to say where it does not act.
    """
    names = tuner.active_adapters if run.rows is None else [n for n in run.rows.names if n is not None]
    all_tokens = {name: getattr(tuner.peft_config[name], "alora_invocation_tokens", None) for name in names}
    tokens = {name: invocation for name, invocation in all_tokens.items() if invocation}
    given, ids = run.own.get(ARGUMENT), ids_of(run)
    if given is not None:
        offsets = offsets_from(given, run)
        return dict.fromkeys(tokens, offsets)
    if ids is None:
        where = "during generate as input_ids are not available" if run.generates else ONLY_EMBEDS
        warn(f"Cannot calculate aLoRA offsets {where}. Pass {ARGUMENT} to have it act.", PeftWarning)
        return {}
    out = {}
    for name, invocation in tokens.items():
        counts = last(ids, constant(tuple(invocation), torch.long, ids.device))
        longest = ids.shape[1]
        if not torch.compiler.is_compiling() and (ids.is_cpu or run.generates or name not in tuner.states):
            tuner.states[name] = True  # of what follows, `generate` apart, the host does not wait for the counts
            listed = counts.tolist()
            longest = max(listed, default=0)
            say_absent(name, listed, run.rows)
        out[name] = Offsets(counts, longest, Progress())
    return out


def last(ids: Tensor, invocation: Tensor) -> Tensor:
    """Return how far before the end the last occurrence in each row starts, (batch,); 0 where there is none."""
    n, positions = len(invocation), ids.shape[1]
    if n > positions:
        return ids.new_zeros(len(ids))
    found = (ids.unfold(1, n, 1) == invocation).all(-1)  # (batch, starts)
    start = (found * torch.arange(1, positions - n + 2, device=ids.device)).amax(1)  # from 1; 0: none
    return torch.where(start > 0, positions - start + 1, 0)


def offsets_from(given: Any, run: Run) -> Offsets:
    """Return the caller's offsets: a number for each row, or None where the adapter is not to act."""
    values = given.tolist() if isinstance(given, Tensor) else list(given) if isinstance(given, Sequence) else None
    if values is None or not all(v is None or (isinstance(v, int) and v >= 0) for v in values):
        raise ConfigTypeError(
            f"{ARGUMENT} takes one number of positions (from the invocation to the end) or None per row, got {given!r}."
        )
    tensors = [t for t in (*run.inputs, *run.kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    if tensors and len(values) not in {len(t) for t in tensors}:
        raise RoutingError(f"{ARGUMENT} has {len(values)} entries, for a batch of {len(tensors[0])} rows.")
    counts = constant(tuple(v or 0 for v in values), torch.long, tensors[0].device if tensors else None)
    return Offsets(counts, max((v or 0 for v in values), default=0), Progress())


def say_absent(name: str, counts: list[int], rows: Rows | None) -> None:
    """Warn of rows that use an adapter and do not invoke it."""
    own: Sequence[int] = range(len(counts))
    if rows is not None:
        own = rows.groups[name]
    absent = [row for row in own if row < len(counts) and not counts[row]]
    if absent:
        shown = f"rows {absent}" if len(absent) < len(counts) else "any row"
        warn(
            f"The invocation tokens of aLoRA adapter '{name}' are not in {shown} of the input, where it does nothing.",
            PeftWarning,
        )
