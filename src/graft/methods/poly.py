# SPDX-License-Identifier: Apache-2.0
"""Poly: Combining Modular Skills in Multitask Learning, arXiv 2202.13914; with splits, multi-head routing, 2211.03831.

Each layer has an inventory of skills, pairs A and B. A task mixes them: with its weights α of the skills, A' = Σ α A
and B' = Σ α B, and x A' B' / r is added. With splits, each part of the inputs, and of the outputs, has its own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli

from graft.config.fields import Targeted, require_positive_rank
from graft.config.targets import LORA
from graft.core.effect import Branch, Effect
from graft.core.errors import ConfigError, RoutingError
from graft.core.method import Method
from graft.core.random import kaiming_bound
from graft.core.rows import Run
from graft.kernels.waits import demand


@dataclass(kw_only=True)
class PolyConfig(Targeted):
    """Poly (arXiv 2202.13914) and, with `n_splits` > 1, multi-head routing (2211.03831).

    Raises:
        ConfigError: a number that is not positive, or another `poly_type`.
    """

    peft_type: Any = "POLY"
    r: int = 8  # rank of each skill
    init_weights: bool = True  # B starts at 0
    poly_type: Literal["poly"] = "poly"
    n_tasks: int = 1
    n_skills: int = 4  # of each layer
    n_splits: int = 1  # of its inputs and outputs

    def __post_init__(self) -> None:
        if self.poly_type not in ("poly", None):
            raise ConfigError(
                f"Unsupported poly_type: {self.poly_type}. Currently, only the following types are supported: `poly`."
            )
        super().__post_init__()
        require_positive_rank(self.r)
        for name in ("n_tasks", "n_skills", "n_splits"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be a positive integer, got {getattr(self, name)}.")


TASKS = "task_ids"


def generate(tuner: Any, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
    """Run the base model's generate for these tasks, one for each row."""
    run = Run(args, kwargs, {TASKS: task_ids}, generates=True)
    with tuner.calling("generate"), tuner.call.using(None), tuner.acting(run) as finish:
        return finish(tuner.model.generate(*args, **kwargs))


def checked(run: Run, model: nn.Module, known: int) -> Tensor:
    """Return the tasks of the rows, (batch,), checked."""
    tasks = run.said(TASKS, model)
    if tasks is None:
        raise RoutingError("task_ids should not be None. Pass the task of each row: model(…, task_ids=…).")
    tasks = torch.as_tensor(tasks)
    if tasks.dim() != 1 or tasks.is_floating_point() or tasks.is_complex() or tasks.dtype == torch.bool:
        raise RoutingError(f"task_ids must be one integer per row, got {tasks.dtype} of shape {tuple(tasks.shape)}.")
    if not torch.compiler.is_compiling() and len(tasks):
        low, high = tasks.aminmax()

        def unknown() -> RoutingError:
            return RoutingError(f"{available}. Found task id = {int(high) if high >= known else int(low)}")

        available = f"Only {known} tasks available"
        demand((low >= 0) & (high < known), unknown, available)
    rows = [t for t in (*run.inputs, *run.kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    if rows and len(tasks) not in {len(t) for t in rows}:
        raise RoutingError(f"There are {len(tasks)} task_ids for a batch of {len(rows[0])} rows.")
    return tasks.to(rows[0].device) if rows else tasks


EPS = 1e-12


class Router(nn.Module):
    """How much a task counts on each skill, in each split."""

    def __init__(self, tasks: int, splits: int, skills: int):
        super().__init__()
        self.module_logits = nn.Parameter(torch.empty(tasks, splits * skills))


class Poly(Method):
    config = PolyConfig
    prefix = "poly_"
    targets = LORA
    arguments = (TASKS,)
    tuner_methods: ClassVar[dict[str, Any]] = {"generate": generate}

    poly_lora_A: nn.Parameter  # (splits, skills, in / splits, r)
    poly_lora_B: nn.Parameter  # (splits, skills, r, out / splits)
    poly_router: nn.Module  # module_logits (tasks, splits · skills)

    def check(self) -> str | None:
        site, q = self.site, self.cfg.n_splits
        if site.op.known and not site.op.linear:
            return "Currently, only the following modules are supported: `torch.nn.Linear`, and those like it"
        for what, size in (("in_features", site.in_features), ("out_features", site.out_features)):
            if site.op.known and size % q:
                raise ConfigError(f"{what}={size} of layer '{site.key}' must be divisible by n_splits={q}.")
        return super().check()

    def build(self, shared: dict[str, Any]) -> dict[str, Any]:
        cfg, site = self.cfg, self.site
        q, k = cfg.n_splits, cfg.n_skills
        A, B = torch.empty(q, k, site.in_features // q, cfg.r), torch.empty(q, k, cfg.r, site.out_features // q)
        return dict(
            r=cfg.r,
            n_tasks=cfg.n_tasks,
            n_skills=k,
            n_splits=q,
            poly_type=cfg.poly_type,
            poly_lora_A=nn.Parameter(A),
            poly_lora_B=nn.Parameter(B),
            poly_router=Router(cfg.n_tasks, q, k),
        )

    def init(self) -> None:
        drawn(self.poly_lora_A.data)
        if self.cfg.init_weights:
            nn.init.zeros_(self.poly_lora_B)
        else:
            drawn(self.poly_lora_B.data)
        nn.init.uniform_(self.poly_router.module_logits, -1e-3, 1e-3)  # type: ignore[arg-type]

    def describe(self) -> Effect:
        return Branch(self.branch, fixed="Poly mixes its skills for each task, and no weight is that of all tasks")

    def branch(self, x: Tensor) -> Tensor:
        tasks = self.layer.call.fact(TASKS)
        if tasks is None:
            raise RoutingError("task_ids should not be None.")
        if len(tasks) != len(x):
            raise RoutingError(
                f"layer '{self.site.key}' received {len(x)} rows for {len(tasks)} task_ids: its input is not one row "
                "per sample. Exclude this layer with exclude_modules."
            )
        mixing = self.mixing(tasks).to(self.poly_lora_A.dtype)
        A = torch.einsum("bqk,qkir->bqir", mixing, self.poly_lora_A).flatten(1, 2)  # (batch, in, r)
        B = torch.einsum("bqk,qkro->brqo", mixing, self.poly_lora_B).flatten(2)  # (batch, r, out)
        y: Tensor = x.reshape(len(x), -1, self.site.in_features) @ A @ B / self.cfg.r
        return y.view(*x.shape[:-1], self.site.out_features)

    def mixing(self, tasks: Tensor) -> Tensor:
        """Return α (batch, splits, skills), random in training."""
        logits: Any = self.poly_router.module_logits
        z = logits[tasks.to(logits.device)].unflatten(-1, (self.cfg.n_splits, -1))
        if self.layer.training:
            z = relaxed(z)
        else:
            z = z.sigmoid()
        shares: Tensor = z / (z.sum(-1, keepdim=True) + EPS)
        return shares

    @classmethod
    @contextmanager
    def around(cls, tuner: Any, call: Any, run: Run) -> Iterator[Callable[[Any], Any]]:
        """Give the task of each row to the layers.

        Raises:
            RoutingError: there are none, or not one for each row, or an adapter that acts lacks a task.
        """
        with super().around(tuner, call, run) as finish:
            if tuner.disabled:
                yield finish
                return
            names = tuner.active_adapters if run.rows is None else [n for n in run.rows.names if n is not None]
            configs = [c for c in (tuner.peft_config[name] for name in names) if isinstance(c, PolyConfig)]
            tasks = checked(run, tuner.model, min(c.n_tasks for c in configs))
            with call.giving(facts={TASKS: tasks}):
                yield finish


def relaxed(logits: Tensor) -> Tensor:
    """Draw from the relaxed Bernoulli distribution of temperature 1, as torch does, which would check the logits."""
    temperature = torch.ones((), device=logits.device)
    drawn: Tensor = LogitRelaxedBernoulli(temperature, logits=logits, validate_args=False).rsample()
    limits = torch.finfo(drawn.dtype)
    return drawn.sigmoid().clamp(limits.tiny, 1 - limits.eps)


def drawn(skills: Tensor) -> None:
    """Fill (splits, skills, n, m): each skill as kaiming draws (m, n), in PEFT's order."""
    q, k, n, m = skills.shape
    bound = kaiming_bound(n)
    for skill in range(k):
        for split in range(q):
            skills[split, skill] = torch.empty(m, n, device=skills.device, dtype=skills.dtype).uniform_(-bound, bound).T
