# SPDX-License-Identifier: Apache-2.0
"""Multitask prompt tuning: a shared prompt, times a low-rank factor per task (https://arxiv.org/abs/2303.02861)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from graft.config.fields import POSITIVE
from graft.config.reading import read_weights
from graft.core.errors import CheckpointError, ConfigError
from graft.kernels.waits import raise_unless
from graft.prompts.base import STORED
from graft.prompts.prompt_tuning import PromptEmbedding, PromptTuningConfig
from graft.storage.parallel import strip_inner_wrappers


class MultitaskPromptTuningInit(str, Enum):
    """The initial value of the shared prompt."""

    TEXT = "TEXT"  # embeddings of a text, as in prompt tuning
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"  # the mean of the tasks of a trained prompt
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"  # one task of a trained prompt
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"  # the shared part of a trained prompt


FACTORS = ("prefix_task_cols", "prefix_task_rows")
SOURCES = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@dataclass(kw_only=True)
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multitask prompts: P ⊙ (u_t v_tᵀ), a shared prompt P times a factor of rank `num_ranks` per task t."""

    peft_type: str = "MULTITASK_PROMPT_TUNING"
    prompt_tuning_init: Any = MultitaskPromptTuningInit.RANDOM  # a MultitaskPromptTuningInit
    prompt_tuning_init_state_dict_path: str | None = None  # weights file of the trained prompt
    prompt_tuning_init_task: int = 0  # number of its task, for EXACT_SOURCE_TASK
    num_ranks: Annotated[int, POSITIVE] = 1  # rank of the factor per task
    num_tasks: Annotated[int, POSITIVE] = 1
    inits = MultitaskPromptTuningInit


class MultitaskPromptEmbedding(PromptEmbedding):
    """The prompt of a task: embedding ⊙ (cols[task] · rows[task])."""

    config = MultitaskPromptTuningConfig
    arguments = ("task_ids",)
    in_decoder = True

    def __init__(self, cfg: Any, words: nn.Module | None = None):
        """Make the shared prompt and factors for each task, random normal with deviation 0.02, or read them from a
        trained prompt.

        Reading happens for an init of `SOURCES` without inference_mode; tensors that the file's kind of init does not
        give stay random.

        Raises:
            ConfigError: a tensor of the trained prompt has another shape; or as `source_values`.
            CheckpointError: the file lacks a tensor.
        """
        super().__init__(cfg, words)
        self.num_tasks = cfg.num_tasks
        self.prefix_task_cols = nn.Parameter(torch.empty(cfg.num_tasks, cfg.rows, cfg.num_ranks).normal_(0, 0.02))
        self.prefix_task_rows = nn.Parameter(torch.empty(cfg.num_tasks, cfg.num_ranks, cfg.token_dim).normal_(0, 0.02))
        if cfg.prompt_tuning_init in SOURCES and not cfg.inference_mode:
            for name, value in source_values(cfg).items():
                target = self.embedding.weight if name == STORED else getattr(self, name)
                if value.shape != target.shape:
                    raise ConfigError(
                        f"{name} in {cfg.prompt_tuning_init_state_dict_path} has shape {tuple(value.shape)}, where "
                        f"{tuple(target.shape)} is needed: num_virtual_tokens, num_ranks and the width of the model "
                        f"must be the source's, and num_tasks 1 (it is {cfg.num_tasks})."
                    )
                self.restore(name, value)

    def forward(self, indices: Tensor | None = None, task_ids: Tensor | None = None, **arguments: Any) -> Tensor:
        """Return the prompt of each sample's task, (batch, tokens, dim), or (tokens, dim) for a single task number.

        It is the shared prompt times, element by element, the product of the task's two factors. `indices` is unused:
        the prompt has all tokens.

        Raises:
            ValueError: no task_ids, no int32 or int64, more than one dimension, or a task that does not exist. On CUDA
                the device checks the last.
        """
        if task_ids is None:
            raise ValueError(
                "task_ids cannot be None: pass the number of each sample's task. (transformers' Trainer keeps that "
                "column of a data set only with remove_unused_columns=False.)"
            )
        ids, allowed = torch.as_tensor(task_ids), f"task_ids must be whole numbers from 0 to {self.num_tasks - 1}"

        def wrong() -> ValueError:
            """Return the ValueError for wrong task_ids, with the allowed range and the ids."""
            return ValueError(f"{allowed}, one for each sample, got {task_ids}.")

        if ids.dim() > 1 or ids.dtype not in (torch.int64, torch.int32):
            raise wrong()
        raise_unless(((ids >= 0) & (ids < self.num_tasks)).all(), wrong, allowed)
        ids = ids.to(self.prefix_task_cols.device, non_blocking=True)
        factor = self.prefix_task_cols[ids] @ self.prefix_task_rows[ids]
        return super().forward(None) * factor

    def to_file_tensors(self) -> dict[str, Tensor]:
        """Return the shared prompt and the factors of all tasks, detached, by name."""
        return {STORED: self.embedding.weight.detach(), **{name: getattr(self, name).detach() for name in FACTORS}}

    def restore(self, name: str, value: Tensor) -> None:
        """Copy the value into the shared prompt (`prompt_embeddings`) or the factor with this name, in place, without
        gradient; another shape is torch's RuntimeError.
        """
        with torch.no_grad():
            (self.embedding.weight if name == STORED else getattr(self, name)).copy_(value)


def source_values(cfg: MultitaskPromptTuningConfig) -> dict[str, Tensor]:
    """Return the tensors that the config takes from the weights file of a trained prompt, by name. Reads the file.

    ONLY_SOURCE_SHARED takes the shared prompt alone. The others take the factors as well, with a first dimension of 1:
    AVERAGE_SOURCE_TASKS their mean over tasks, any other those of task `prompt_tuning_init_task`.

    Raises:
        ConfigError: no file is named, or it has no such task (negative numbers included).
        CheckpointError: the file lacks one of the tensors.
    """
    path = cfg.prompt_tuning_init_state_dict_path
    if path is None:
        raise ConfigError(
            "prompt_tuning_init_state_dict_path needs to be specified with "
            f"prompt_tuning_init={cfg.prompt_tuning_init.value}: the weights file of the source."
        )
    source = {
        strip_inner_wrappers(name): value
        for name, value in read_weights(path, "prompt_tuning_init_state_dict_path").items()
    }
    alone = cfg.prompt_tuning_init == "ONLY_SOURCE_SHARED"
    missing = [name for name in (STORED, *(() if alone else FACTORS)) if name not in source]
    if missing:
        raise CheckpointError(
            f"{path} (prompt_tuning_init_state_dict_path) does not hold {', '.join(missing)}: no multitask prompt."
        )
    if alone:
        return {STORED: source[STORED]}
    factors = {k: source[k] for k in FACTORS}
    if cfg.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
        factors = {k: v.mean(0, keepdim=True) for k, v in factors.items()}
    else:
        i = cfg.prompt_tuning_init_task
        if not 0 <= i < len(factors["prefix_task_cols"]):
            raise ConfigError(
                f"prompt_tuning_init_task={i}, but {path} holds {len(factors['prefix_task_cols'])} tasks."
            )
        factors = {k: v[i : i + 1] for k, v in factors.items()}
    return {STORED: source[STORED], **factors}
