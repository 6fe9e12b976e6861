# SPDX-License-Identifier: Apache-2.0
"""The task of each row, an argument of the model's call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graft.core.errors import RoutingError
from graft.core.run import Run
from graft.kernels.waits import demand

TASKS = "task_ids"


def generate(tuner: Any, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
    """Run the base model's generate for these tasks, one for each row."""
    run = Run(args, kwargs, {TASKS: task_ids}, generates=True)
    with tuner.calling("generate"), tuner.call.using(None), tuner.acting(run) as finish:
        return finish(tuner.model.generate(*args, **kwargs))


def checked(run: Run, known: int) -> Tensor:
    """Return the tasks of the rows, (batch,), checked."""
    tasks = run.own.get(TASKS)
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
