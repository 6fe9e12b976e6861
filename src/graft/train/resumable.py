# SPDX-License-Identifier: Apache-2.0
"""A callback for transformers' Trainer that resumes by parameter name, and a search for a Trainer's newest whole
checkpoint.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

from torch import nn

from graft import CheckpointError, ConfigError
from graft.config.reading import LARGEST_HEADER, read_object
from graft.core.errors import warn
from graft.files.tensors import read_header
from graft.storage.parallel import layout_of
from graft.train.callbacks import Listener
from graft.train.resuming import FILE, ResumeJob, collect_training_state, find_registry, load_training, write_training

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

NAME = re.compile(r"checkpoint-(\d{1,18})")
STATE = "trainer_state.json"  # Trainer writes it last
ARCHIVES = (".pt", ".pth", ".bin")


class Resumable(Listener):
    """Saves with each checkpoint of a Trainer the file of `graft.save_training`, and resumes from it by parameter name:

    `Trainer(…, TrainingArguments(…, save_only_model=True), callbacks=[graft.train.Resumable()])`, then
    `trainer.train(resume_from_checkpoint=…)`. A training so resumed has the bits of one that was not interrupted; but
    under transformers 4 Trainer takes the first epoch's batches where it resumes within a later one. Let
    `save_total_limit` be 2 or more: Trainer deletes older checkpoints before a new one is whole.

    Processes may hold copies (DDP), or parts under `TrainingArguments(fsdp=True)`, which is FSDP2. DeepSpeed is
    refused, as Trainer loads nothing there but DeepSpeed's own checkpoints.

    Args:
        folder: the checkpoint to resume from; None: that of Trainer's arguments, or checkpoint-STEP in its folder.
        strict: as of `graft.resume`.

    Attributes:
        resumed: the result of `graft.resume`; None before.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, strict: bool = True):
        """Note the folder and `strict`. Nothing is read yet."""
        self.folder, self.strict = folder, strict
        self.resumed: Any = None
        self._job: ResumeJob | None = None  # until the generators are put back

    def on_init_end(self, args: Any, state: object, control: object, model: Any = None, **kwargs: object) -> None:
        """Refuse a Trainer that would load the optimizer's state by index, or not at all, or save only a part.

        Raises:
            ConfigError: `save_only_model` is not set, DeepSpeed trains, or processes hold parts of the model and the
                arguments do not say so. The latter is not checked without a model.
        """
        if getattr(args, "deepspeed_plugin", None) is not None:
            raise ConfigError(
                "graft.train.Resumable cannot resume under DeepSpeed: Trainer loads only its checkpoints there. "
                "Write a loop of your own with graft.save_training, or leave out this callback and save_only_model."
            )
        if not args.save_only_model:
            raise ConfigError(
                "graft.train.Resumable needs TrainingArguments(save_only_model=True). Otherwise Trainer loads the "
                "optimizer's state by index."
            )
        if model is not None:
            check_sharding_is_known(args, model)

    def on_save(
        self, args: Any, state: TrainerState, control: object, model: Any = None, optimizer: Any = None,
        lr_scheduler: object = None, **kwargs: object,
    ) -> None:  # fmt: skip
        """Write training.json and training.safetensors into checkpoint-STEP in Trainer's output folder, with the epoch
        and without a loader.
        """
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        extra: dict[str, object] = {"epoch": state.epoch}
        write_training(folder, *collect_training_state(model, optimizer, lr_scheduler, None, state.global_step, extra))

    def on_train_begin(
        self, args: Any, state: TrainerState, control: object, model: Any = None, optimizer: Any = None,
        lr_scheduler: object = None, **kwargs: object,
    ) -> None:  # fmt: skip
        """Resume the training from the checkpoint, if Trainer begins after step 0, and set `resumed`.

        At step 0 only the model is checked.

        Generators are put back later. Warns with fp16, which has a scale that is not saved, also at step 0.

        Raises:
            CheckpointError: the checkpoint lacks training.safetensors (the text names the newest whole one), its epoch,
                or is of another step.
            ConfigError: the model is no PeftModel, or has no adapter. And the errors of `graft.resume`.
        """
        if args.fp16:
            warn("graft.train.Resumable does not keep the scale of float16's gradients. Use bf16=True.")
        find_registry(model)  # else the first save would say that there is none
        if not state.global_step:
            return
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        if (choice := self.folder or args.resume_from_checkpoint) and os.path.isdir(choice):
            folder = os.fspath(choice)
        if not os.path.isfile(os.path.join(folder, FILE)):
            parent = os.path.dirname(os.path.abspath(folder))
            newest = find_last_checkpoint(parent) if os.path.isdir(parent) else None
            remedy = f"Resume from {newest}" if newest else "No checkpoint near it is whole: begin anew"
            raise CheckpointError(
                f"{folder} holds no {FILE}: Resumable did not save it, or the process was killed meanwhile. {remedy}."
            )
        job = ResumeJob(*load_training(folder), folder, self.strict)
        if not isinstance(epoch := job.report.extra.get("epoch"), (int, float)) or not epoch >= 0:
            raise CheckpointError(f"{folder} does not hold its epoch. Resume from an earlier one.")
        if job.report.step != state.global_step:
            raise CheckpointError(
                f"{folder} was saved at step {job.report.step}, and Trainer resumes at step {state.global_step}. Give "
                "both the same checkpoint."
            )
        self.resumed, self._job = job.run(model, optimizer, lr_scheduler, None), job

    def on_epoch_begin(self, args: tuple[object, ...], state: object, control: object, **kwargs: object) -> None:
        """Put the generators back if the training was saved at the end of an epoch: the loader, which begins now, draws
        first.
        """
        if self._job is not None and float(self.resumed.extra["epoch"]).is_integer():
            self._put_generators()  # the loader, which begins now, draws first

    def on_step_begin(self, args: tuple[object, ...], state: object, control: object, **kwargs: object) -> None:
        """Put the generators back at the first step, after Trainer has skipped the batches of before, which drew."""
        self._put_generators()  # Trainer has passed over the batches of before, which drew

    def _put_generators(self) -> None:
        """Put the saved generators back at the first call after resuming; later calls do nothing."""
        if self._job is not None:
            self._job.put_generators()
            self._job = None


def check_sharding_is_known(args: TrainingArguments, model: nn.Module) -> None:
    """Raise ConfigError if a parameter of the model is sharded and Trainer does not know: then only one process would
    save.

    It knows by `args.fsdp`, the model's mark of transformers' distributed loading, or ACCELERATE_USE_FSDP=true in the
    environment. With one of these nothing is checked.
    """
    known = args.fsdp or getattr(model, "is_distributed_loading_by_transformers", False)
    if known or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return
    if any(layout_of(p) is not None for p in model.parameters()):
        raise ConfigError(
            "Processes hold parts of the model, and Trainer does not know, so that only one process would save. Pass "
            "TrainingArguments(fsdp=True), and leave fully_shard to it; or, after fully_shard, add "
            'fsdp_config={"auto_wrap_policy": "NO_WRAP"}.'
        )


# checkpoints


def find_last_checkpoint(folder: str | os.PathLike[str], by_name: bool = True) -> str | None:
    """Return the path of the whole folder "checkpoint-N" with the highest N in the output folder of a Trainer; None if
    there is none.

    transformers' `get_last_checkpoint` returns the one of the largest number, also if a process was killed while it was
    saved. This reads all files of tensors: headers of safetensors and archives, and the digest of graft's file.

    Args:
        by_name: the checkpoint must have the training.safetensors that `graft.train.Resumable` writes. False: Trainer
            resumes by its own files.

    Raises FileNotFoundError if there is no such folder.
    """
    folders = {int(m[1]): m[0] for name in os.listdir(folder) if (m := NAME.fullmatch(name))}
    for step in sorted(folders, reverse=True):
        path = os.path.join(folder, folders[step])
        if is_whole_checkpoint(path, step, by_name):
            return path
    return None


def is_whole_checkpoint(path: str, step: int, by_name: bool) -> bool:
    """Return True if the Trainer's state in a checkpoint is of this step, and its files of tensors are whole.

    The sizes of .safetensors files are checked, and that files of `ARCHIVES` are zip archives; no values are read. With
    `by_name` it must also have a training.safetensors of this step. Files that are missing, damaged or unreadable give
    False, not an error.
    """
    try:
        state = read_object(os.path.join(path, STATE), LARGEST_HEADER, finite=False)  # its losses may be NaN
        if state.get("global_step") != step:
            return False
        for name in os.listdir(path):
            where = os.path.join(path, name)
            if name.endswith(".safetensors"):
                read_header(where)
            elif name.endswith(ARCHIVES) and not (os.path.isfile(where) and is_zipfile(where)):
                return False
        return not by_name or load_training(path)[0]["step"] == step
    except (CheckpointError, OSError):
        return False
