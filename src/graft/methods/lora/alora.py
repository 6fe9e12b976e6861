# SPDX-License-Identifier: Apache-2.0
"""aLoRA: Activated LoRA, arXiv 2504.12397.

s · B A x is added from the last occurrence of the invocation tokens on. Keys and values of earlier positions are the
base model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.core.call import Call, in_this_thread
from graft.core.effect import Effect, Update
from graft.core.errors import ConfigTypeError, PeftWarning, RoutingError, warn
from graft.core.method import Tuner, return_unchanged
from graft.core.plan import compute_low_rank_part
from graft.core.rows import Finish, Rows, Run, count_cached_tokens, find_cache, is_stateful
from graft.kernels.waits import constant
from graft.methods.lora.lora import LoRA

ALL = 1 << 30  # more positions than any input has


@dataclass
class Progress:
    """How far `generate` has come; all `Offsets` of one input share it.

    `passed` is fixed for all steps with a full prompt in the cache, so that compiled code for one step serves all.
    """

    passed: int = 0  # positions between the end of the prompt and the end of the current input


@dataclass
class Offsets:
    """The positions at which an aLoRA adapter acts on each row, counted from the end of the prompt."""

    counts: Tensor  # (batch,), 0: nowhere
    longest: int  # of `counts`, at least
    progress: Progress

    def __getitem__(self, index: Tensor) -> Offsets:
        """Return the offsets of the rows `index`, in that order, on the device of the counts; `longest` and `progress`
        stay the same.
        """
        return Offsets(self.counts[index.to(self.counts.device)], self.longest, self.progress)

    def repeat_interleave(self, repeats: int, dim: int) -> Offsets:
        """Return the offsets for rows that are repeated `repeats` times each, next to each other; `longest` and
        `progress` stay the same.
        """
        return Offsets(self.counts.repeat_interleave(repeats, dim), self.longest, self.progress)

    def mask(self, positions: int, tail: int) -> Tensor:
        """Return a boolean mask (batch, tail): True where the adapter acts among the last `tail` of `positions`
        positions.

        A row acts from position `positions - passed - count` on; a row with count 0 acts nowhere.
        """
        at = torch.arange(positions - tail, positions, device=self.counts.device)
        acts = at >= (positions - self.progress.passed - self.counts)[:, None]
        return acts & (self.counts > 0)[:, None]


def ids_of(run: Run) -> Tensor | None:
    """Return the input ids of a run, (batch, positions); a single row becomes a batch of 1.

    In `generate` the argument `inputs` is read too. Return None if there are no ids, or they are floats, or have more
    than two dimensions.
    """
    ids = run.argument("input_ids")
    if ids is None and run.generates:
        ids = run.kwargs.get("inputs")
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() > 2:
        return None
    return ids[None] if ids.dim() == 1 else ids


@contextmanager
def following(model: nn.Module, run: Run, offsets: Mapping[object, Offsets]) -> Iterator[None]:
    """In the block, update `Progress.passed` of all offsets before each forward of `generate`, with a cache or without
    one.

    Does nothing for a run that does not generate, or without offsets. Else puts pre-forward hooks on the model and its
    decoder, and removes them at the end, also on errors. `passed` becomes ALL once the whole prompt was seen; before,
    it is the count of tokens seen since the prompt's end, also without a cache. Calls of other threads or without
    inputs change nothing.
    """
    if not (run.generates and offsets):
        yield
        return
    steps = {id(o.progress): o.progress for o in offsets.values()}.values()
    prompt = ids_of(run)
    length = (run.kwargs["inputs_embeds"] if prompt is None else prompt).shape[1]

    def follow(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set `passed` from the input's length and the number of cached tokens: ALL after the whole prompt was seen,
        else seen + new - prompt length.

        Without a readable cache count, an input shorter than the prompt or a cache with state means that the prompt was
        seen. Calls without inputs change nothing.
        """
        candidates = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
        inputs = next((t for t in candidates if t is not None), None)
        if inputs is None:
            return
        new = inputs.shape[1]
        cache = find_cache(kwargs)
        seen = count_cached_tokens(cache)
        if seen is None:  # no cache, or one that does not tell
            seen = length if new < length or is_stateful(cache) else 0
        for step in steps:
            step.passed = ALL if seen >= length else seen + new - length

    # transformers 4 fills a cache in chunks by `forward` itself, past the hooks of the model, not those of its decoder
    decoder = getattr(model, getattr(model, "base_model_prefix", ""), model)
    with ExitStack() as hooks:
        for m in {model, decoder}:
            hooks.enter_context(m.register_forward_pre_hook(in_this_thread(follow), with_kwargs=True))
        yield


ARGUMENT = "alora_offsets"
ONLY_EMBEDS = "when only inputs_embeds are provided. Disabling aLoRA for this forward pass"


def find_offsets(tuner: Tuner, run: Run) -> dict[str, Offsets]:
    """Return the `Offsets` of each aLoRA adapter that acts in this run, by name.

    The caller's `alora_offsets` count first, for all such adapters. Else they are found by a search for the invocation
    tokens in the input ids. Without ids warns, and returns {}.

    On the CPU, in `generate`, and at an adapter's first forward the counts are read on the host: `longest` is then
    exact, and `warn_absent` may warn. In later forwards on a device, and in compiled code, `longest` is the input's
    length. Marks the adapter in `tuner.states`.
    """
    tokens = {name: tuner.peft_config[name].alora_invocation_tokens for name in run.adapters}
    value, ids = run.graft_arguments.get(ARGUMENT), ids_of(run)
    if value is not None:
        return dict.fromkeys(tokens, offsets_from(value, run))
    if ids is None:
        where = "during generate as input_ids are not available" if run.generates else ONLY_EMBEDS
        warn(f"Cannot calculate aLoRA offsets {where}. Pass {ARGUMENT} to have it act.", PeftWarning)
        return {}
    out = {}
    for name, invocation in tokens.items():
        counts = find_last_occurrence(ids, constant(tuple(invocation), torch.long, ids.device))
        longest = ids.shape[1]
        if not torch.compiler.is_compiling() and (ids.is_cpu or run.generates or name not in tuner.states):
            tuner.states[name] = True  # later forwards outside of `generate` do not wait for them
            listed = counts.tolist()
            longest = max(listed, default=0)
            warn_absent(name, listed, run.rows)
        out[name] = Offsets(counts, longest, Progress())
    return out


def find_last_occurrence(ids: Tensor, invocation: Tensor) -> Tensor:
    """Return, for each row of `ids` (batch, positions), the number of positions from the last occurrence of
    `invocation` to the end, (batch,).

    0 where the row does not contain it, or is shorter than it. The count includes the invocation itself.
    """
    n, positions = len(invocation), ids.shape[1]
    if n > positions:
        return ids.new_zeros(len(ids))
    matches = (ids.unfold(1, n, 1) == invocation).all(-1)  # (batch, starts)
    start = (matches * torch.arange(1, positions - n + 2, device=ids.device)).amax(1)  # from 1; 0: none
    return torch.where(start > 0, positions - start + 1, 0)


def offsets_from(value: object, run: Run) -> Offsets:
    """Return `Offsets` of the caller's value: per row a number of positions before the end, or None (no action on that
    row).

    They hold the numbers, int64 with 0 for None, on the device of the call's first tensor; their maximum (0 for an
    empty list); and a new `Progress`. Without tensors in the call, the length is not checked.

    Raises:
        ConfigTypeError: the value is no list or tensor of non-negative integers and None.
        RoutingError: its length fits the first dimension of no tensor in the call.
    """
    values = value.tolist() if isinstance(value, Tensor) else value
    if not isinstance(values, Sequence) or not all(v is None or (type(v) is int and v >= 0) for v in values):
        raise ConfigTypeError(
            f"{ARGUMENT} takes one number of positions (from the invocation to the end) or None per row, got {value!r}."
        )
    tensors = [t for t in (*run.inputs, *run.kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    if tensors and len(values) not in {len(t) for t in tensors}:
        raise RoutingError(
            f"{ARGUMENT} has {len(values)} entries, for a batch of {len(tensors[0])} rows. Give one each."
        )
    counts = constant(tuple(v or 0 for v in values), torch.long, tensors[0].device if tensors else None)
    return Offsets(counts, max((v or 0 for v in values), default=0), Progress())


def warn_absent(name: str, counts: list[int], rows: Rows | None) -> None:
    """Give a PeftWarning if rows that use adapter `name` have a count of 0, so that it does nothing there.

    In a mixed batch only its own `rows` matter, and of these only those that `counts` has. The text names the rows, or
    "any row" if all counts are such.
    """
    rows_of_adapter: Sequence[int] = range(len(counts)) if rows is None else rows.rows_of(name)
    absent = [row for row in rows_of_adapter if row < len(counts) and not counts[row]]
    if absent:
        shown = f"rows {absent}" if len(absent) < len(counts) else "any row"
        warn(
            f"The invocation tokens of aLoRA adapter '{name}' are not in {shown} of the input, where it does nothing.",
            PeftWarning,
        )


class ALoRA(LoRA):
    """aLoRA, arXiv 2504.12397: s · B A x is added from the last invocation on; nothing is added in a call
    without one.
    """

    arguments = (ARGUMENT,)
    only_linear = "aLoRA acts on the features of some positions, and so on linear layers only"

    def describe(self) -> Effect:
        """Return an `Update` with a `branch` only, which cannot merge: it acts at some positions."""
        return Update(
            branch=self.branch, why_unmergeable="aLoRA does not support merging, as it acts at some positions only"
        )

    def branch(self, x: Tensor) -> Tensor:
        """Return LoRA's part s · B A x at the positions at which the adapter acts, zeros elsewhere, in the shape of the
        layer's output.

        The part is computed for the last `longest + passed` positions only, then masked by row. Without offsets in the
        call it is all zeros. An x of two dimensions has one position per row.

        Raises:
            RoutingError: the call has offsets, and x is not one row with positions for each sample.
        """
        offsets = self.layer.call.fact((ARGUMENT, self.name))
        by_position = x[:, None] if x.dim() == 2 else x
        if offsets is not None and (by_position.dim() != 3 or len(x) != len(offsets.counts)):
            raise RoutingError(
                f"layer '{self.site.key}' received an input of shape {tuple(x.shape)} in a batch of "
                f"{len(offsets.counts)} rows: aLoRA adapter '{self.name}' needs a row of positions per sample. "
                "Exclude this layer with exclude_modules."
            )
        positions = by_position.shape[1]
        tail = 0 if offsets is None else min(max(offsets.longest + offsets.progress.passed, 0), positions)
        part = compute_low_rank_part(self.layer, self, self.factors(), by_position[:, positions - tail :])
        if offsets is not None:
            part = part * offsets.mask(positions, tail).to(part.device)[..., None]
        return F.pad(part, (0, 0, positions - tail, 0)).view(*x.shape[:-1], part.shape[-1])

    @classmethod
    @contextmanager
    def surround_run(cls, tuner: Tuner, call: Call, run: Run) -> Iterator[Finish]:
        """Find each adapter's offsets before the run (`find_offsets`), show them to the layers in it as facts of the
        call, and follow `generate`.

        The facts have the keys (ARGUMENT, adapter). The finish is identity. Without ids or offsets of the caller's, the
        adapters do nothing.

        Raises:
            RoutingError: a search with several beams, or offsets that are not one per row.
        """
        offsets: dict[object, Offsets] = {(ARGUMENT, name): o for name, o in find_offsets(tuner, run).items()}
        if offsets and beams(tuner.model, run) > 1:
            raise RoutingError("Beam search not yet supported for aLoRA. Generate with num_beams=1.")
        with call.extend_context(facts=offsets), following(tuner.model, run, offsets):
            yield return_unchanged


def beams(model: nn.Module, run: Run) -> int:
    """Return the number of beams of a run that generates, else 1.

    It is `num_beams` of the call's keywords, else of a generation config, else 1; None and 0 count as missing. The
    config is the call's keyword `generation_config`; the model's is read only if the call has none.
    """
    config = run.kwargs.get("generation_config") or getattr(model, "generation_config", None)
    n: int = run.kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1
    return n if run.generates else 1
