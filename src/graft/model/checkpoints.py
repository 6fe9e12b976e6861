# SPDX-License-Identifier: Apache-2.0
"""Loads of adapters into a model, new or existing ones, and saves by one process or by several together.

A load reads the files (`read_checkpoint`), finds and checks a value for each tensor (`io/load.py`), and then assigns
one, in an injection or in `fill_adapter`. A save computes all tensors first. The files are then written under temporary
names, synced and renamed (`config/pair.py`).

If several processes hold parts of an adapter's tensors, all meet in the process group's store (`io/rendezvous.py`),
where a process that is alone can leave. They compare their arguments and gather the tensors whole, in order of their
names. The first one writes, and the others wait for its result or error. If each process has a copy of the adapter
(DDP), no meeting is needed: the first writes at once, and the others wait for the same values.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import fields

from torch import Tensor, nn

from graft.config.atomic import check_no_link
from graft.config.base import PeftConfig
from graft.config.pair import FORMAT_VERSION
from graft.config.prompt import NAMES as OF_THE_BASE
from graft.core.carrier import check_name_list
from graft.core.containers import place_tensors
from graft.core.errors import CheckpointError, ConfigError, PeftWarning, warn
from graft.core.layer import AdapterLayer
from graft.inject.parts import get_registry
from graft.inject.survey import survey_model
from graft.io import files, save
from graft.io.fingerprint import digest_base_tensor, hash_text
from graft.io.load import CheckpointValues
from graft.io.rendezvous import CALL, save_once
from graft.model.averaging import is_replicated
from graft.storage.meeting import Meeting
from graft.storage.parallel import processes

SETTLED = {f.name for f in fields(PeftConfig)} | {  # fields that the tensors imply, or that have no effect later
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
}  # fmt: skip


def prepare_config(config: PeftConfig, is_trainable: bool) -> None:
    """Set `inference_mode` of a config before its adapter is added. Raises ValueError for a prompt that is to train."""
    if config.is_prompt_learning and is_trainable:
        raise ValueError(
            "Cannot set a prompt learning adapter to trainable when loading pretrained adapter. The file holds the "
            "prompt, not the encoder that it was trained with."
        )
    config.inference_mode = not is_trainable


def widen_to_float32(layers: Iterable[AdapterLayer], adapter: str) -> None:
    """Replace an adapter's half-precision tensors on these layers by float32 ones.

    Containers in the method's `keeps_base_dtype` stay, and layers without the adapter.
    """
    for layer in layers:
        for key in layer.adapter_layer_names:
            container = getattr(layer, key)
            if adapter in container and key not in layer.methods[adapter].keeps_base_dtype:
                place_tensors(container, adapter, None, None, upcast=True)


def fill_adapter(model: nn.Module, values: CheckpointValues, is_trainable: bool, upcast: bool = False) -> None:
    """Put a checkpoint's values into an existing adapter, which keeps its config; only fields in `results` are the
    file's then.

    All values are checked before one is assigned. The function waits until no call uses the adapter (for merged
    adapters and trained biases: until there is no call), drops the method's training state, and warns of differing
    configs. With `is_trainable` it also warns if the prompt was computed by a network, which the file lacks.

    Args:
        is_trainable: check that the adapter may train next to those that do.
        upcast: widen its half-precision tensors to float32 first, where the method trains so.

    Raises:
        ConfigError: the adapter is of another method, or cannot train next to those that do.
        AdapterKeyError, NonFiniteError: as `PeftModel.load_adapter`.
    """
    adapter, config, registry = values.adapter, values.config, get_registry(model)
    current = registry.peft_config[adapter]
    if config.peft_type != current.peft_type:
        raise ConfigError(
            f"Adapter '{adapter}' is {current.peft_type}, but the checkpoint holds {config.peft_type}: load it under "
            "another name into another model."
        )
    if is_trainable:
        registry.check_trainable(adapter, current)
    warn_other_config(adapter, values.path, current, config)
    parts = registry.parts_of(adapter)
    prompt = parts.prompt or nn.Module()
    before = len([*prompt.modules()])
    new_values = values.match_entries(parts, adapter)
    whole = adapter in registry.merged_adapters or getattr(current, "bias", "none") != "none"
    registry.wait_for_calls(None if whole else (adapter,))
    if upcast:
        widen_to_float32(parts.layers.values(), adapter)
    registry.assign_values(adapter, new_values)
    if is_trainable and len([*prompt.modules()]) < before:
        warn(
            f"The network that computed the prompt of adapter '{adapter}' is gone, since the file holds only the "
            "prompt: an optimizer's earlier state does not fit. Before Trainer resumes, delete optimizer.pt in the "
            "checkpoint, or use graft.train.Resumable(strict=False).",
            PeftWarning,
        )
    for name in config.results:
        setattr(current, name, getattr(config, name))


def warn_other_config(adapter: str, path: str, config: PeftConfig, file_config: PeftConfig) -> None:
    """Warn of the fields that differ between an adapter's config and the config of a file that gave it only values.

    Left out are computed results, the fields of PeftConfig itself, and the fields that name modules or layers (such as
    `target_modules`). So are fields with "init" in their names, and those that the file lacks. Sizes of a prompt that
    the file leaves to the base do not count either. Empty values count as equal. No warning if none is left.
    """
    fields, file_fields = config.to_file_dict(), file_config.to_file_dict()
    # these come from the file, or are a client's
    left = SETTLED | set(config.results) | (set(fields) - set(file_fields))
    if config.is_prompt_learning:  # sizes that the base model gives: CPT's files have none
        left |= {n for n in OF_THE_BASE if file_fields[n] is None}
    names = [n for n in fields if n not in left and "init" not in n and (fields[n] or None) != (file_fields[n] or None)]
    if names:
        differ = ", ".join(f"{n} ({fields[n]!r}, in the file {file_fields[n]!r})" for n in names)
        warn(
            f"Adapter '{adapter}' gets the values of {path} and keeps its own config, which differs: {differ}. For the "
            "file's config, call delete_adapter() before loading, or use hotswap_adapter() (LoRA).",
            PeftWarning,
        )


def let_train(model: nn.Module, adapter: str, is_trainable: bool, new: bool = True) -> None:
    """Let a loaded adapter train, or set the model to eval mode.

    If `is_trainable`, all its parameters require gradients and `inference_mode` is False; an existing adapter
    (`new=False`) that trains in part keeps its frozen tensors. Else a new adapter gets `inference_mode` True, and a
    model in training mode is set to eval mode, with a warning if the adapter is new and other parameters train.
    """
    registry = get_registry(model)
    if new or is_trainable:
        registry.peft_config[adapter].inference_mode = not is_trainable  # 0 and 1, which callers pass, count as in PEFT
    # a new one is frozen; of one that trains some may be frozen on purpose, as A is by LoRA-FA
    if is_trainable and (new or not registry.trains(adapter)):
        registry.set_requires_grad(adapter, True)  # active or not, so that an optimizer made next has it
    if not is_trainable and model.training:  # else the adapter has the base's mode already
        if new and any(p.requires_grad for p in model.parameters()):
            warn(
                f"Adapter '{adapter}' was loaded for inference (is_trainable=False), which set the model to eval mode "
                "while other parameters train. Call model.train() before you train further.",
                PeftWarning,
            )
        model.eval()


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Widen an adapter's half-precision tensors to float32, where its method trains so.

    If `autocast_adapter_dtype` is False, or no layer has the adapter, do nothing. Waits until no call uses the adapter.
    """
    if not autocast_adapter_dtype:
        return
    layers = [layer for layer in survey_model(model).layers.values() if adapter_name in layer.methods]
    if layers:
        with layers[0].call.gate.change(f"cast_adapter_dtype({adapter_name!r})", (adapter_name,)):
            widen_to_float32(layers, adapter_name)


# saving


def save_adapters(
    model: nn.Module,
    directory: str,
    folders: dict[str, str],
    state_dict: dict[str, Tensor] | None,
    *,
    fingerprint: str,
    safetensors: bool,
    embeddings: str | bool,
    writes: bool,
    subtract: str | None,
) -> None:
    """Write adapters and their configs, each into its folder; then a model card into `directory`.

    All contents are computed and checked before the first file is written. One process writes; see the module for
    several. If the card fails, warn.

    Args:
        folders: of the adapters to save, by name, as `list_save_folders` returns them.
        state_dict: a state dict to take values from; None: the model's own.
        fingerprint: "sampled" or "full", of the base.
        embeddings: as `save_embedding_layers` of `PeftModel.save_pretrained`.
        writes: this process writes. Without tensors that processes hold together, a process with False returns at once.
        subtract: folder of the adapter before training, to save a PiSSA or OLoRA adapter as plain LoRA.

    Raises:
        ValueError: the fingerprint is neither "sampled" nor "full", or is "full" without safetensors.
        CheckpointError: a tensor is a part of one; nothing is written.
    """
    if fingerprint not in ("sampled", "full"):
        raise ValueError(f'fingerprint must be "sampled" or "full", got {fingerprint!r}.')
    if fingerprint == "full" and not safetensors:
        raise ValueError('fingerprint="full" needs safe_serialization=True: a torch file has no place for it.')
    registry, are_several = get_registry(model), processes() > 1
    ranks = save.find_adapter_ranks(model, [*folders], embeddings) if are_several and state_dict is None else []
    if not (ranks or writes):
        return
    meeting = Meeting(CALL, f"{sorted(folders)}, fingerprint={fingerprint!r}", ranks) if len(ranks) > 1 else None
    contents_by_folder = {}
    together = state_dict is None and (bool(ranks) or not are_several)
    for name, folder in folders.items():
        tensors, config = file_contents(model, name, state_dict, embeddings, subtract)
        files.check_saved_tensors(folder, tensors)
        note = registry.fingerprint_base(name, together, full=fingerprint == "full")
        contents_by_folder[folder] = (tensors, config, note)

    def write() -> None:
        """Write the files of all adapters and the model card, if this process writes.

        An error in writing the card only gives a PeftWarning; one in an adapter's files is raised.
        """
        if not writes:
            return
        for folder, (tensors, config, note) in contents_by_folder.items():
            files.save_adapter(folder, tensors, config, safetensors, note)
        try:
            model.create_or_update_model_card(directory)
        except Exception as e:  # of many types: a README.md may hold anything
            warn(f"The adapter is saved; {directory}/README.md could not be written: {e}", PeftWarning)

    if meeting is not None:
        meeting.run_on_first(write)
    elif are_several and state_dict is None and is_replicated(registry):
        values = [digest_base_tensor(t) for tensors, *_ in contents_by_folder.values() for t in tensors.values()]
        save_once(os.fspath(directory), hash_text(str(values)), write)
    else:
        write()


def list_save_folders(model: nn.Module, selected: list[str] | None, directory: str) -> dict[str, str]:
    """Return name → folder of each adapter that a save into `directory` writes: those selected, in their order, or all
    that are not frozen references.

    The folder of "default" is `directory`, that of another adapter a sub-folder of its name. An empty selection gives
    {}. A selected frozen reference is saved.

    Raises:
        FileNotFoundError: the directory's name is empty.
        ValueError: the directory is a file, or a selected adapter is not loaded or named twice.
        CheckpointError: nothing is selected and the model has no adapter to save, or a sub-folder is a link, which may
            come from a download.
    """
    if not os.fspath(directory):
        raise FileNotFoundError("The folder to save into has an empty name. Pass a path, such as '.'.")
    if os.path.isfile(directory):
        raise ValueError(f"Provided path ({directory}) should be a directory, not a file")
    registry = get_registry(model)
    known = list(registry.peft_config)
    unfrozen = [n for n in known if n not in registry.frozen]
    names = unfrozen if selected is None else check_name_list(selected, "selected_adapters")
    unknown = [n for n in names if n not in known]
    if unknown:
        raise ValueError(
            f"You passed an invalid `selected_adapters` arguments, current supported adapter names are "
            f"{known} - got {unknown}."
        )
    if not names and selected is None:
        raise CheckpointError(f"There is nothing to save into {directory}: the model has no adapter.")
    folders = {name: directory if name == "default" else os.path.join(directory, name) for name in names}
    for name in names:
        if name != "default":
            check_no_link(folders[name], f"adapter '{name}'")
    return folders


def file_contents(
    model: nn.Module, name: str, state_dict: dict[str, Tensor] | None, embeddings: str | bool, subtract: str | None
) -> tuple[dict[str, Tensor], PeftConfig]:
    """Return the tensors and a copy of the config that an adapter's file holds; nothing is written.

    The config gets the base's name and `inference_mode=True`, and the current format version if it has
    target_parameters. With `subtract`, the initial adapter in that folder is subtracted, and a warning says if layers
    lost digits.

    Args:
        state_dict: source of the values; None: the model's tensors.
        embeddings: as `save_embedding_layers` of `PeftModel.save_pretrained`.
        subtract: folder of the adapter before training; None: save it as it is.
    """
    registry = get_registry(model)
    parts, base, config = registry.parts_of(name), registry.model, copy.copy(registry.peft_config[name])
    carriers = parts, parts.prefix, base, registry.peft_config[name]
    tensors = save.collect_adapter_tensors(model, carriers, name, state_dict, embeddings)
    if subtract is not None:
        from graft.methods.lora.convert import subtract_initial, warn_rounded

        _, initial = files.load_pair(subtract)
        tensors, config = subtract_initial(initial.tensors, tensors, config)
        warn_rounded(name, registry.layers)
    save.describe_base(config, base)
    config.inference_mode = True
    if getattr(config, "target_parameters", None):
        config.peft_version = FORMAT_VERSION  # readers tell the layout of stacks by it
    return tensors, config
