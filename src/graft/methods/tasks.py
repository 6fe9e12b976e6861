# SPDX-License-Identifier: Apache-2.0
"""Adapters that do another thing for each task: the rows of a call say theirs by `task_ids`."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from graft.core.call import Call
from graft.core.errors import RoutingError
from graft.core.method import Method, Tuner
from graft.core.rows import Facts, Run
from graft.kernels.waits import raise_unless

TASKS = "task_ids"


def generate(tuner: Tuner, *args: object, task_ids: object = None, **kwargs: object) -> object:
    """Run the base model's `generate` with the active adapters for all rows, each row as its task in `task_ids`; return
    its output. The model does not get `task_ids`.

    The hooks of its methods (`surround_run`) are around the call; without `task_ids` theirs raises RoutingError.
    """
    run = Run(args, kwargs, {TASKS: task_ids}, generates=True)
    with tuner.calling("generate"), tuner.call.use_rows(None), tuner.enter_methods(run) as finish:
        return finish(tuner.model.generate(*args, **kwargs))


def check_tasks(run: Run, model: nn.Module, known: int) -> Tensor:
    """Return the tasks of a run's rows, (batch,), in their integer dtype, on the device of the call's first tensor.

    Without a tensor in the call they stay on their device, and their number is not checked. An empty list has no range
    to check.

    Raises:
        RoutingError: the call gives none, or no list of integers; one is not from 0 to below `known`; no input has as
            many rows. Compiled code does not check the range.
    """
    tasks = run.find_argument(TASKS, model)
    if tasks is None:
        raise RoutingError("task_ids should not be None. Pass the task of each row: model(…, task_ids=…).")
    tasks = torch.as_tensor(tasks)
    if tasks.dim() != 1 or tasks.is_floating_point() or tasks.is_complex() or tasks.dtype == torch.bool:
        raise RoutingError(f"task_ids must be one integer per row, got {tasks.dtype} of shape {tuple(tasks.shape)}.")
    if not torch.compiler.is_compiling() and len(tasks):
        low, high = tasks.aminmax()

        def unknown() -> RoutingError:
            """Return the RoutingError with the number of tasks and one task outside of the range: the highest if it is
            too high, else the lowest.
            """
            return RoutingError(f"{available}. Found task id = {int(high) if high >= known else int(low)}")

        available = f"Only {known} tasks available"
        raise_unless((low >= 0) & (high < known), unknown, available)
    rows = [t for t in (*run.inputs, *run.kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    if rows and len(tasks) not in {len(t) for t in rows}:
        raise RoutingError(f"There are {len(tasks)} task_ids for a batch of {len(rows[0])} rows. Pass one per row.")
    return tasks.to(rows[0].device, non_blocking=True) if rows else tasks


K = TypeVar("K")


class ByTask(Method[K]):
    """A method with `n_tasks` in its config."""

    arguments = (TASKS,)
    tuner_methods = {"generate": generate}

    def tasks_of(self, x: Tensor) -> Tensor:
        """Return the task of each row of a layer's input, (batch,), on its device.

        Raises:
            RoutingError: the call has no tasks, or another number than x has rows.
        """
        tasks: Tensor | None = self.layer.call.fact(TASKS)
        if tasks is None:
            raise RoutingError("task_ids should not be None.")
        if len(tasks) != len(x):
            raise RoutingError(
                f"layer '{self.site.key}' received {len(x)} rows for {len(tasks)} task_ids: its input is not one row "
                "per sample. Exclude this layer with exclude_modules."
            )
        return tasks.to(x.device)

    @classmethod
    def facts_of_run(cls, tuner: Tuner, call: Call, run: Run) -> Facts:
        """Return the task of each row as the fact TASKS.

        Raises:
            RoutingError: there are none, or not one for each row, or an adapter that acts lacks a task.
        """
        known = min(tuner.peft_config[name].n_tasks for name in run.adapters)
        return {TASKS: check_tasks(run, tuner.model, known)}
