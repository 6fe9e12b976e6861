# SPDX-License-Identifier: Apache-2.0
"""aLoRA: Activated LoRA, arXiv 2504.12397.

s · B A x is added at the positions from the last occurrence of the invocation tokens on, and nowhere before, so that
keys and values of what stands before them are the base model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from graft.core.effect import Branch, Effect
from graft.core.errors import RoutingError
from graft.core.part import low_rank_part
from graft.core.run import Run
from graft.methods.lora.invocations import ARGUMENT, find
from graft.methods.lora.lora import LoRA
from graft.methods.lora.offsets import following


class ALoRA(LoRA):
    """LoRA at some positions. It does nothing where a call tells of no invocation."""

    arguments = (ARGUMENT,)

    def check(self) -> str | None:
        if self.site.op.known and not self.site.op.linear:
            return "aLoRA acts on the features of some positions, and so on linear layers only"
        return super().check()

    def describe(self) -> Effect:
        return Branch(self.branch, fixed="aLoRA does not support merging, as it acts at some positions only")

    def branch(self, x: Tensor) -> Tensor:
        offsets = self.layer.call.fact((ARGUMENT, self.name))
        by_position = x[:, None] if x.dim() == 2 else x
        if offsets is not None and (by_position.dim() != 3 or len(x) != len(offsets.counts)):
            raise RoutingError(
                f"layer '{self.site.key}' received an input of shape {tuple(x.shape)} in a batch of "
                f"{len(offsets.counts)} rows: aLoRA adapter '{self.name}' needs one row for each sample, and its "
                "positions. Exclude this layer with exclude_modules."
            )
        positions = by_position.shape[1]
        tail = 0 if offsets is None else min(max(offsets.longest + offsets.progress.passed, 0), positions)
        part = low_rank_part(self.layer, self, self.factors(), by_position[:, positions - tail :])
        if offsets is not None:
            part = part * offsets.mask(positions, tail).to(part.device)[..., None]
        return F.pad(part, (0, 0, positions - tail, 0)).view(*x.shape[:-1], part.shape[-1])

    @classmethod
    @contextmanager
    def around(cls, tuner: Any, call: Any, run: Run) -> Iterator[Callable[[Any], Any]]:
        """Find the invocations in the input.

        Raises:
            RoutingError: a search with several beams, or offsets that are not one per row.
        """
        with super().around(tuner, call, run) as finish:
            if tuner.disabled:
                yield finish
                return
            offsets: dict[Any, Any] = {(ARGUMENT, name): o for name, o in find(tuner, run).items()}
            if offsets and beams(tuner.model, run) > 1:
                raise RoutingError("Beam search not yet supported for aLoRA. Generate with num_beams=1.")
            with call.giving(facts=offsets), following(tuner.model, run, offsets):
                yield finish


def beams(model: Any, run: Run) -> int:
    config = run.kwargs.get("generation_config") or getattr(model, "generation_config", None)
    n: int = run.kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1
    return n if run.generates else 1
