# SPDX-License-Identifier: Apache-2.0
"""A base model as files: its config, and the names and shapes of its tensors from the headers of the
safetensors files.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from graft import CheckpointError
from graft.config.reading import LARGEST_HEADER, Json, read_object
from graft.files.errors import make_damage_error
from graft.files.tensors import Tensor, read_header

if TYPE_CHECKING:
    from torch import nn

WHOLE = "model.safetensors"
INDEX: str = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"
# names of files in a model's folder, as in a shell
WEIGHTS = (WHOLE, "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin")
# files next to the weights that transformers or sentence-transformers need, or that a licence asks to pass on
NEEDED: tuple[str, ...] = (
    "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json",
    "merges.txt", "bpe.codes", "dict.txt", "byte_maps.json", "emoji.json", "normalizer.json", "word_shape.json",
    "word_pronunciation.json", "prophetnet.tokenizer", "tokenizer.model*", "tekken.json", "*.tiktoken", "*.spm",
    "spiece.model", "spm.model", "spm_char.model", "sentencepiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "modules.json", "config_sentence_transformers.json", "sentence_*_config.json",
    "[0-9]*_*/config.json", "[0-9]*_*/model.safetensors",
    "configuration_*.py", "modeling_*.py", "tokenization_*.py", "*processing_*.py", "feature_extraction_*.py",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
CERTIFICATE = "merge.json"
MODEL = (*NEEDED, INDEX, TORCH_INDEX, CERTIFICATE)  # further files of a model's folder
# files of a base that a merge writes anew, or that are not needed
ELSEWHERE = ("*.safetensors", "*.index.json", "README.md", CERTIFICATE)


@dataclass
class BaseDescription:
    """A base model by the names and shapes of its tensors; all, some or none of them have values.

    Attributes:
        path: of its folder; of a live model its name in messages.
        config: the content of config.json.
        shapes: tensor name → shape.
        modules: the paths of its modules.
        tensors: those with values, which are not read yet.
        files: tensor name → name of its file in the folder; empty if the description is not of safetensors files.
        adapters: of a live model: name → config.
        model: the live model or its meta copy, if there is one.
        parts: the models of a pipeline, by name.
        shift: (prefix of the names here, prefix that the model has instead).
        views: cache of `graft.files.bases.view_by_model_names`: empty, or its one result.
    """

    path: str
    config: Json = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    adapters: Mapping[str, object] = field(default_factory=dict)
    model: nn.Module | None = None
    parts: Mapping[str, BaseDescription] = field(default_factory=dict)
    shift: tuple[str, str] = ("", "")
    views: list[BaseDescription | None] = field(default_factory=list, compare=False)


def read_base_files(path: str | os.PathLike[str]) -> BaseDescription:
    """Read config.json and the headers of the safetensors files of a model's folder.

    Tensor values stay unread. A missing config.json gives an empty config; numbers in it may be NaN. Modules are the
    tensors' names without the last part, each once.

    Raises:
        CheckpointError: there is no such folder, no safetensors file in it, a file is damaged or missing, or a tensor
            is in two files.
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
        raise CheckpointError(f"{path} is no folder with a model. Give one with config.json and safetensors files.")
    config = os.path.join(path, "config.json")
    base = BaseDescription(path, read_object(config, finite=False) if os.path.exists(config) else {})
    for name in list_shards(path):
        where = os.path.join(path, name)
        if not os.path.exists(where):
            raise make_damage_error(f"{where} is missing, but {INDEX} names it")
        for key, tensor in read_header(where)[0].items():
            if key in base.tensors:
                raise CheckpointError(
                    f"'{key}' is in two files of {path}, {base.files[key]} and {name}. Remove the wrong one."
                )
            base.tensors[key], base.files[key], base.shapes[key] = tensor, name, tensor.shape
    base.modules = [*dict.fromkeys(name.rpartition(".")[0] for name in base.tensors)]
    return base


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Return True if a name matches one of these shell patterns, with case."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def list_folder_entries(folder: str, patterns: Collection[str]) -> Iterator[tuple[str, bool]]:
    """Yield (name, is a regular file) for the entries of a folder in order of names. Links are not followed.

    A folder named by the first part of a pattern with "/" is opened, and its entries are yielded as "folder/name".
    Other folders are yielded as "name/" and False. The rest of the pattern opens folders below in the same way.
    Patterns leave out no entry.

    Args:
        patterns: shell patterns of file names.
    """
    rooms = {pattern.partition("/")[0] for pattern in patterns if "/" in pattern}
    with os.scandir(folder) as scan:
        for entry in sorted(scan, key=lambda entry: entry.name):
            if not entry.is_dir(follow_symlinks=False):
                yield entry.name, entry.is_file(follow_symlinks=False)
            elif not matches_any(entry.name, rooms):
                yield f"{entry.name}/", False
            else:
                inner = (p.partition("/")[2] for p in patterns if fnmatchcase(entry.name, p.partition("/")[0]))
                for name, is_file in list_folder_entries(entry.path, [*inner]):
                    yield f"{entry.name}/{name}", is_file


def check_file_is_inside(folder: str, name: str) -> None:
    """Raise CheckpointError if a model's file is a link out of its folder, or is no regular file.

    Links to the blobs of the same repository in the hub's cache are allowed.
    """
    root, real = (Path(os.path.realpath(p)) for p in (folder, os.path.join(folder, name)))
    rooms = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(map(real.is_relative_to, rooms)):
        raise CheckpointError(
            f"{os.path.join(folder, name)} is a link to {real}, outside of the model's folder. Put the file itself "
            "there."
        )
    if not real.is_file():
        raise CheckpointError(f"{os.path.join(folder, name)} is no regular file. Put the model's file there.")


def list_shards(path: str) -> list[str]:
    """Return the names of a model's safetensors files, sorted: those of the index, or without an index all in the
    folder that do not begin with "adapter_" or ".".

    If the folder has a model.safetensors that the index does not name, the result is that file alone, as in
    transformers. Whether the index's files exist is not checked.

    Raises:
        CheckpointError: the index is damaged or names files outside the folder, or there is neither index nor
            safetensors file.
    """
    index = os.path.join(path, INDEX)
    whole = os.path.exists(os.path.join(path, WHOLE))
    if os.path.exists(index):
        files = read_object(index, LARGEST_HEADER).get("weight_map")
        names = list(files.values()) if isinstance(files, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise make_damage_error(f"{index} names no file for each tensor")
        names = sorted(set(names))
        if strange := [n for n in names if os.path.basename(n) != n]:
            raise CheckpointError(f"{index} names files outside its folder: {strange[:3]}. Download the model again.")
        return [WHOLE] if whole and WHOLE not in names else names  # transformers looks for it first
    shards = sorted(n for n in os.listdir(path) if n.endswith(".safetensors") and not n.startswith(("adapter_", ".")))
    if not shards:
        raise CheckpointError(f"{path} has no safetensors files of a model. Give the folder of the base model.")
    return shards


def model_file_patterns(folder: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return shell patterns of the files in a model's folder: (weights, others).

    The safetensors files in its index count as weights, unless it is damaged. Others are the needed files, indexes and
    merge.json.
    """
    named: list[str] = []
    if os.path.isfile(os.path.join(folder, INDEX)):
        with suppress(CheckpointError):  # a damaged index names no files
            named = [glob.escape(name) for name in list_shards(folder) if name.endswith(".safetensors")]
    return (*WEIGHTS, *named), MODEL


def list_needed_files(base: BaseDescription) -> tuple[list[str], list[str]]:
    """Return the names of a base folder's files that a model needs besides its weights, and of the other entries.

    The latter are without hidden ones, safetensors files, indexes, README.md and merge.json.

    Raises:
        CheckpointError: one of the needed files, or of the weights, is no file, or a link that leads out of the folder.
    """
    entries = [name for name, _ in list_folder_entries(base.path, NEEDED)]
    names = [name for name in entries if matches_any(name, NEEDED)]
    for name in (*names, *dict.fromkeys(base.files.values())):
        check_file_is_inside(base.path, name)
    return names, [n for n in entries if not (n in names or n.startswith(".") or matches_any(n, ELSEWHERE))]
