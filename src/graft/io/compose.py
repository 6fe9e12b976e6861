# SPDX-License-Identifier: Apache-2.0
"""One adapter from the files of several: those that the stages of a pipeline saved, or a row of cartridges."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from graft.config.base import PeftConfig
from graft.config.prompt import PromptLearningConfig
from graft.core.errors import CheckpointError, ConfigError, PeftWarning, warn
from graft.io.files import LoadedWeights, check_tensors, load_pair, save_adapter
from graft.io.fingerprint import Fingerprint, join_fingerprints, make_fingerprint
from graft.prompts.base import STORED


def join_stages(
    folders: Sequence[str | os.PathLike[str]], folder: str | os.PathLike[str], safe_serialization: bool = True
) -> None:
    """Write into `folder` the adapter that the stages of a pipeline saved in `folders`, in their order.

    Call it on one process, after all have saved. The file equals that of a single process. A tensor may be in several
    parts if its values are equal. `target_modules`, results that configs record, and fingerprints are united; any other
    difference of the configs is the error. The number of stages is not checked.

    Raises:
        CheckpointError: no folder is named, the parts do not belong together, or one is missing or damaged.
    """
    if not folders:
        raise CheckpointError("There are no parts to join. Name the folder of each stage, the first one first.")
    pairs = [load_pair(os.fspath(part)) for part in folders]
    tensors: dict[str, Tensor] = {}
    for part, (_, loaded) in zip(folders, pairs):
        for key, t in loaded.tensors.items():
            if key in tensors and not torch.equal(tensors[key], t):
                raise CheckpointError(
                    f"'{key}' has other values in {os.fspath(part)} than in a part before it. Join "
                    "the folders of one save."
                )
            tensors[key] = t
    config = pairs[0][0]
    for part, (part_config, _) in zip(folders[1:], pairs[1:]):
        join_config(config, part_config, os.fspath(part))
    notes: list[Fingerprint] = [loaded.fingerprint or {} for _, loaded in pairs]
    save_adapter(os.fspath(folder), tensors, config, safe_serialization, join_fingerprints(notes))


def join_config(config: PeftConfig, other: PeftConfig, part: str) -> None:
    """Add the `target_modules` and the computed results of another stage's config to `config`, in place.

    Target modules become the union as a set, if both are sets or lists. `config.results` names the fields that hold
    computed results. Each such field becomes a dict with the entries of both; those of `other` win. None counts as an
    empty dict. Fields are compared in the form for files; equal ones stay.

    Args:
        part: the other stage's folder, for errors.

    Raises:
        CheckpointError: the configs differ in their class, in a result that is no dict, or in any other field. Fields
            before the faulty one are changed already.
    """
    saved, saved_by_other = config.to_file_dict(), other.to_file_dict()
    if type(config) is not type(other):
        raise CheckpointError(
            f"{part} holds a {type(other).__name__}, a part before it a {type(config).__name__}. Join the folders of "
            "one save."
        )
    for name in saved:
        a, b = getattr(config, name), getattr(other, name)
        if saved[name] == saved_by_other[name]:
            continue
        if name == "target_modules" and isinstance(a, (set, list)) and isinstance(b, (set, list)):
            setattr(config, name, set(a) | set(b))
        elif name in config.results and isinstance(a or {}, dict) and isinstance(b or {}, dict):
            setattr(config, name, {**(a or {}), **(b or {})})
        else:
            raise CheckpointError(
                f"{part} has {name}={saved_by_other[name]!r} in its config, a part before it "
                f"{saved[name]!r}. Join the folders of one save."
            )


SAME = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


def compose_cartridge_adapters(
    adapter_paths: Iterable[str | os.PathLike[str]],
    *,
    output_path: str | os.PathLike[str],
    safe_serialization: bool = True,
) -> None:
    """Write a CARTRIDGE adapter that holds the tokens of several saved ones, in that order.

    The first adapter's config gives all fields, such as the number of frozen first tokens; only the number of tokens is
    the sum, and the new one is for inference. The first fingerprint among the files is kept. On an error the old files
    stay. Different base names only warn.

    Args:
        adapter_paths: folders or hub repositories, at least two, for one base model.
        output_path: folder to write to, made if needed; may be one of those.
        safe_serialization: safetensors; else a torch file, adapter_model.bin.

    Raises:
        ConfigError: there are fewer than two, `adapter_paths` is one path, one is not a CARTRIDGE, holds more than a
            prompt, or their sizes or tasks differ.
        CheckpointError: one of them cannot be read.
        ValueError: `output_path` is a file.
    """
    if isinstance(adapter_paths, (str, os.PathLike)):
        raise ConfigError(f"adapter_paths must be a list of paths, got '{os.fspath(adapter_paths)}'. Pass a list.")
    paths = [os.fspath(path) for path in adapter_paths]
    if len(paths) < 2:
        raise ConfigError(f"Need at least 2 adapters to compose, got {len(paths)}. Give the folders of two cartridges.")
    if os.path.isfile(output_path):
        raise ValueError(f"Provided path ({output_path}) should be a directory, not a file")
    pairs = [load_pair(path) for path in paths]
    for path, (config, _) in zip(paths, pairs):
        if config.peft_type != "CARTRIDGE":
            raise ConfigError(f"Adapter at '{path}' is not a CARTRIDGE adapter (got {config.peft_type.value}).")
    configs = [config for config, _ in pairs]
    for path, config in zip(paths[1:], configs[1:]):
        check_composable(paths[0], configs[0], path, config)
    values = torch.cat([read_prompt(config, loaded) for config, loaded in pairs])
    composed = replace(configs[0], num_virtual_tokens=len(values), inference_mode=True)
    base = next((loaded.fingerprint for _, loaded in pairs if loaded.fingerprint), make_fingerprint({}))
    save_adapter(os.fspath(output_path), {STORED: values}, composed, safe_serialization, base)


def check_composable(first_path: str, first: PeftConfig, path: str, other: PeftConfig) -> None:
    """Raise ConfigError if two cartridges differ in `task_type`, `token_dim`, `num_layers`, `num_attention_heads` or
    `num_transformer_submodules`. The text names the first such field and both paths.

    Different names of the base model only give a PeftWarning.
    """
    for name in SAME:
        a, b = getattr(first, name), getattr(other, name)
        if a != b:
            raise ConfigError(
                f"Incompatible CARTRIDGE configs for attribute '{name}': {getattr(a, 'value', a)} in '{first_path}', "
                f"{getattr(b, 'value', b)} in '{path}'. Only cartridges for one base model and task can be composed."
            )
    names = first.base_model_name_or_path, other.base_model_name_or_path
    if names[0] != names[1]:
        warn(
            f"The cartridge in '{first_path}' was made for the base model {names[0]!r}, the one in '{path}' for "
            f"{names[1]!r}: unless these are the same, the composed one means nothing to either.",
            PeftWarning,
        )


def read_prompt(config: PromptLearningConfig, loaded: LoadedWeights) -> Tensor:
    """Return the prompt of a saved cartridge, (tokens, 2 · layers · token_dim).

    Missing sizes in the config count as 0.

    Raises:
        CheckpointError: the file has no prompt, one of another shape than the config says, or bad numbers in any
            tensor.
        ConfigError: the file holds other tensors as well.
    """
    check_tensors(loaded.tensors, loaded.path, loaded.finite)
    values = loaded.tensors.get(STORED)
    if values is None:
        raise CheckpointError(f"{loaded.path} does not hold '{STORED}'. Name the folder of a cartridge.")
    expected = config.num_virtual_tokens, 2 * (config.num_layers or 0) * (config.token_dim or 0)
    if values.shape != expected:
        raise CheckpointError(
            f"{STORED} in {loaded.path} has shape {tuple(values.shape)}, but its config says {expected}. Save the "
            "adapter again."
        )
    if len(loaded.tensors) > 1:
        other_keys = ", ".join(sorted(loaded.tensors.keys() - {STORED}))
        raise ConfigError(
            f"{loaded.path} holds more than a prompt ({other_keys}): only cartridges without modules_to_save and "
            "without embeddings of the base model can be composed."
        )
    return values
