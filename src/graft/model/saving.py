# SPDX-License-Identifier: Apache-2.0
"""Saving adapters of a model, each into its folder; by one process or by several together."""

from __future__ import annotations

import copy
import os
from typing import Any

from torch import Tensor

from graft.config.base import FORMAT_VERSION
from graft.core.errors import CheckpointError, PeftWarning, warn
from graft.core.names import several
from graft.inject.parts import registry_of
from graft.io import files, save
from graft.io.fingerprint import tensor_digest
from graft.io.rendezvous import CALL, Meeting, hashed, once
from graft.model import averaged


def save_adapters(
    model: Any,
    directory: str,
    selected: list[str] | None,
    given: dict[str, Tensor] | None,
    *,
    fingerprint: str,
    safetensors: bool,
    embeddings: str | bool,
    writes: bool,
    subtract: str | None,
) -> None:
    """Do what `PeftModel.save_pretrained` says.

    Args:
        given: a state dict to take values from; None: the model's own.
        writes: this process writes, unless several save together.
        subtract: folder of the adapter as it was before training.
    """
    check(directory, fingerprint, safetensors)
    names = names_to_save(model, selected, directory)
    ranks = save.ranks_of_adapters(model, names) if given is None else []
    if not (ranks or writes):
        return
    what = f"{sorted(names)}, fingerprint={fingerprint!r}"
    meeting = Meeting(CALL, what, ranks) if len(ranks) > 1 else None
    made = {}
    for name in names:
        tensors, config = contents(model, name, given, embeddings, subtract)
        folder = folder_of(name, directory)
        files.check(folder, tensors)
        base = save.base_fingerprint(model, name, fingerprint == "full", together=bool(ranks))
        made[folder] = (tensors, config, base)

    def write() -> None:
        if not writes:
            return
        for folder, (tensors, config, base) in made.items():
            files.save_adapter(folder, tensors, config, safetensors, base)
        try:
            model.create_or_update_model_card(directory)
        except Exception as e:  # of many types: a README.md may hold anything
            warn(f"The adapter is saved; {directory}/README.md could not be written: {e}", PeftWarning)

    if meeting is not None:
        meeting.by_the_first(write)
    elif given is None and averaged.has_copies(registry_of(model)):
        values = [tensor_digest(t) for tensors, *_ in made.values() for t in tensors.values()]
        once(os.fspath(directory), hashed(str(values)), write)
    else:
        write()


def check(directory: str, fingerprint: str, safetensors: bool) -> None:
    """Raise ValueError for a fingerprint that cannot be made or held, or a directory that is a file."""
    if fingerprint not in ("sampled", "full"):
        raise ValueError(f'fingerprint must be "sampled" or "full", got {fingerprint!r}.')
    if fingerprint == "full" and not safetensors:
        raise ValueError('fingerprint="full" needs safe_serialization=True: a torch file has no place for it.')
    if os.path.isfile(directory):
        raise ValueError(f"Provided path ({directory}) should be a directory, not a file")


def names_to_save(model: Any, selected: list[str] | None, directory: str) -> list[str]:
    """Return the names of the adapters to save, all if none are selected."""
    known = list(model.peft_config)
    names = known if selected is None else several(selected, "selected_adapters")
    unknown = [n for n in names if n not in known]
    if unknown:
        raise ValueError(
            f"You passed an invalid `selected_adapters` arguments, current supported adapter names are "
            f"{known} - got {unknown}."
        )
    if not names and selected is None:
        raise CheckpointError(f"There is nothing to save into {directory}: the model has no adapter.")
    return names


def contents(
    model: Any, name: str, given: dict[str, Tensor] | None, embeddings: str | bool, subtract: str | None
) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors and the config that a file holds of an adapter."""
    tensors = save.get_peft_model_state_dict(model, given, name, save_embedding_layers=embeddings)
    config = copy.copy(model.peft_config[name])
    if subtract is not None:
        from graft.methods.lora.convert import subtract_initial, warn_rounded

        _, initial = files.load_pair(subtract)
        tensors, config = subtract_initial(initial.tensors, tensors, config)
        warn_rounded(name, registry_of(model).layers)
    save.describe_base(config, model.get_base_model())
    config.inference_mode = True
    if getattr(config, "target_parameters", None):
        config.peft_version = FORMAT_VERSION  # readers tell the layout of stacks by it
    return tensors, config


def folder_of(adapter: str, directory: str) -> str:
    """Return the folder an adapter is saved to; refuse a link, which may have come with a folder from elsewhere."""
    if adapter == "default":
        return directory
    folder = os.path.join(directory, adapter)
    if os.path.islink(folder):
        raise CheckpointError(
            f"'{folder}' is a symbolic link, and adapter '{adapter}' would be written to where it leads: remove the "
            "link, or save to that folder itself."
        )
    return folder
