# SPDX-License-Identifier: Apache-2.0
"""Steering vectors: Steering Llama 2 via Contrastive Activation Addition, arXiv 2312.06681.

Representation Engineering, 2310.01405, scales the result back to the norm that it had (`normalize`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from graft.config.fields import NOT_NEGATIVE
from graft.core.call import Call
from graft.core.errors import RoutingError
from graft.core.method import Tuner
from graft.core.rows import Facts, Run
from graft.methods.states import OnStates, StatesConfig, numbers_by_row

COEFFICIENT = "steering_coefficient"


@dataclass(kw_only=True)
class SteeringConfig(StatesConfig):
    """Steering vectors: h + c · v after blocks, with one v for each.

    `target_modules` in place of `layers`: the vectors are added to the outputs of these modules.

    Raises:
        ConfigError: a number out of range.
    """

    peft_type: str = "STEERING"
    coefficient: float = 1.0  # c, unless a call says another by `steering_coefficient`
    normalize: bool = False  # scale back to the norm of h
    min_token_index: Annotated[int, NOT_NEGATIVE] = 0  # the first token of each row that changes, padding left out


class Steering(OnStates[SteeringConfig]):
    """Steering vectors, arXiv 2312.06681: h + c · v.

    A fresh v is zero; `graft.set_steering_vectors` finds it from pairs of inputs, or it trains.
    """

    prefix = "steering_"
    acts = "A steering vector is added to vectors"
    arguments = (COEFFICIENT,)

    steering_vector: nn.Parameter  # (H,)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return `steering_vector` (H,) of zeros, H = 0 for an unknown width.

        It is made on the default device, in the default dtype.
        """
        return dict(steering_vector=nn.Parameter(torch.zeros(self.width or 0)))

    def part(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the update of y, (rows, …, H): c · v; with `normalize` the difference between y and y + c · v, scaled
        back to the norm of y.

        c is the call's coefficient of each row, else the config's. Tokens before `min_token_index` get zero
        (`from_first`). The result has the adapter's dtype.

        Raises:
            RoutingError: y has another number of rows than the call has coefficients.
        """
        h, call = y.to(self.dtype), self.layer.call
        c = call.fact(COEFFICIENT)
        if c is None:
            c = self.cfg.coefficient
        elif len(c) != len(y):
            raise RoutingError(f"Layer '{self.site.key}' got {len(y)} rows for {len(c)} numbers of {COEFFICIENT}.")
        else:
            c = c.to(h).view(-1, *[1] * (h.dim() - 1))
        delta: Tensor = (c * self.steering_vector).expand(h.shape)
        if self.cfg.normalize:
            moved = h + delta
            norms = [t.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny) for t in (h, moved)]
            return self.from_first(moved * (norms[0] / norms[1]) - h)
        return self.from_first(delta)

    def from_first(self, delta: Tensor) -> Tensor:
        """Return delta (rows, tokens, H) with zeros before token `min_token_index` of each row; padding and passed
        tokens are counted off.

        Unchanged for index 0 or another number of dimensions. Passed tokens and rows' starts are counted off only where
        the call knows them.

        Raises:
            RoutingError: the rows' starts are known, and their number differs from that of the output's rows.
        """
        least, positions = self.cfg.min_token_index, self.positions
        if not least or delta.dim() != 3:
            return delta
        at = torch.arange(delta.shape[1], device=delta.device)[None]
        if positions is not None and positions.passed is not None:
            at = at + positions.passed
        if positions is not None and positions.start is not None:
            if len(positions.start) != len(delta):
                raise RoutingError(
                    f"Layer '{self.site.key}' has an output of shape {tuple(delta.shape)}: min_token_index={least} of "
                    f"adapter '{self.name}' needs one row for each sample. Use exclude_modules."
                )
            at = at - positions.start.to(delta.device)[:, None]
        return delta * (at >= least)[..., None]

    @classmethod
    def facts_of_run(cls, tuner: Tuner, call: Call, run: Run) -> Facts:
        """Return the positions of each row's prompt, and the fact COEFFICIENT, float32 (batch,), if the call gives
        `steering_coefficient`, a number or a list.

        Raises:
            RoutingError: they are no finite numbers, or not one for each row.
        """
        facts, value = super().facts_of_run(tuner, call, run), run.graft_arguments.get(COEFFICIENT)
        if value is None:
            return facts
        text = "has a number that is NaN or infinite. Give finite numbers."
        return {**facts, COEFFICIENT: numbers_by_row(COEFFICIENT, value, run, torch.isfinite, text)}
