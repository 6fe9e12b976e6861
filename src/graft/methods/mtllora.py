# SPDX-License-Identifier: Apache-2.0
"""MTL-LoRA: Low-Rank Adaptation for Multi-Task Learning, arXiv 2410.09437.

All tasks share A and some up-projections B; each task has weights λ of the ranks between, and mixes the projections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from graft.config.fields import COUNT, LORA, POSITIVE, LayerRange, Targeted
from graft.core.effect import Effect, Factors, Update
from graft.core.errors import ConfigError
from graft.core.method import PublishedRate, fill_kaiming
from graft.methods.tasks import TASKS, ByTask


@dataclass(kw_only=True)
class MtlLoraConfig(Targeted, LayerRange):
    """MTL-LoRA: LoRA with a factor for each rank and task; tasks also mix its up-projections.

    Raises:
        ConfigError: a number that is not positive.
    """

    peft_type: str = "MTLLORA"
    n_tasks: Annotated[int, POSITIVE] = 1
    r: Annotated[int, COUNT] = 8
    lora_alpha: float = 8  # the update counts alpha / r times
    n_up_projection: Annotated[int, POSITIVE] = 1  # matrices B, which a task mixes
    weights_sharpness: Annotated[float, POSITIVE] = 0.05  # temperature of the mixture
    init_weights: bool = True  # B of zeros; False: random, for tests


class MtlLoRA(ByTask[MtlLoraConfig]):
    """MTL-LoRA, arXiv 2410.09437: Δy = s · Σₖ softmax(w_t / τ)ₖ Bₖ diag(λ_t) A x, for a row of task t."""

    prefix = "mtllora_"
    unmergeable = "MTL-LoRA has weights for each task, and no weight is that of all tasks"
    targets = LORA
    facts = ()
    depends_on = TASKS
    published_lr = PublishedRate(3e-4, 3e-4, "arXiv 2410.09437, its code, commonsense reasoning")
    only_linear = "MTL-LoRA adapts linear layers only"

    mtllora_A: nn.Parameter  # (r, in)
    mtllora_B: nn.Parameter  # (projections, out, r)
    mtllora_lambda: nn.Parameter  # (tasks, r)
    mtllora_w: nn.Parameter  # (tasks, projections)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return parameters of ones: `mtllora_A` (r, in), `mtllora_B` (projections, out, r), `mtllora_lambda` (tasks,
        r), `mtllora_w` (tasks, projections).

        w trains only if there are several projections. All are made on the default device, in the default dtype.
        """
        cfg, site = self.cfg, self.site
        tasks, n, r = cfg.n_tasks, cfg.n_up_projection, cfg.r
        shapes = dict(A=(r, site.in_features), B=(n, site.out_features, r)) | {"lambda": (tasks, r)}
        w = nn.Parameter(torch.ones(tasks, n), requires_grad=n > 1)  # else there is nothing to mix
        values = {f"mtllora_{name}": nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
        return {**values, "mtllora_w": w}

    def init_values(self) -> None:
        """Fill A kaiming uniform (a=√5) and B with zeros; with `init_weights=False` B is normal with std 1/√r.

        λ and w stay ones.
        """
        fill_kaiming(self.mtllora_A)
        self.fill_start(self.mtllora_B, self.cfg.r**-0.5)

    def effect_at(self, value: object) -> Effect:
        """Return an `Update` with a function that computes the factors of task `value` (`of_task`) when they are
        needed.

        Raises ConfigError, at once, unless `value` is an int, and no bool, from 0 to below `n_tasks`.
        """
        tasks = self.cfg.n_tasks
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < tasks:
            raise ConfigError(f"Only {tasks} tasks available: task_ids={value!r} is none of 0 to {tasks - 1}.")
        return Update(factors=lambda: self.of_task(value))

    def of_task(self, task: int) -> Factors:
        """Return the factors for one task: A, Σₖ softmax(w_t / τ)ₖ Bₖ, alpha / r, and λ_t as `inner`, without dropout;
        τ = `weights_sharpness`. The softmax is computed in w's dtype, and its result cast to that of B. alpha / r is a
        Python number.
        """
        # (projections,)
        mixing = (self.mtllora_w[task] / self.cfg.weights_sharpness).softmax(-1).to(self.mtllora_B.dtype)
        B = torch.einsum("k,kor->or", mixing, self.mtllora_B)
        return Factors(self.mtllora_A, B, self.cfg.lora_alpha / self.cfg.r, inner=self.mtllora_lambda[task])

    def branch(self, x: Tensor) -> Tensor:
        """Return alpha / r · Σₖ softmax(w_t / τ)ₖ Bₖ diag(λ_t) A x for x (batch, …, in), with t the task of each row
        and τ = `weights_sharpness`. The softmax is cast to x's dtype; there is no dropout.

        Raises RoutingError without a task for each row.
        """
        tasks = self.tasks_of(x)
        mixing = (self.mtllora_w[tasks] / self.cfg.weights_sharpness).softmax(-1).to(x.dtype)  # (batch, projections)
        between = [1] * (x.dim() - 2)
        z = self.site.op.down(self.layer.base_layer, x, self.mtllora_A)
        z = z * self.mtllora_lambda[tasks].unflatten(-1, (*between, -1))  # (batch, …, r)
        z = z.unsqueeze(-2) * mixing.unflatten(-1, (*between, -1, 1))  # (batch, …, projections, r)
        B = self.mtllora_B.transpose(0, 1).flatten(1)  # (out, projections · r)
        return self.site.op.up(self.layer.base_layer, z.flatten(-2) * (self.cfg.lora_alpha / self.cfg.r), B)
