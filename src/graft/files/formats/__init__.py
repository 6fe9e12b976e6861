# SPDX-License-Identifier: Apache-2.0
"""The formats of adapter files, a module each, and the table that recognises a file's format.

A format's module has:

- `NAME`, as `--to` takes it, and `FOLDER`: names, as in a shell, of its files: (weights, others).
- `recognises(path)`: True if a file or folder is of this format, by names and a header; no values are read.
- `read(path, base)`: the adapter; BaseNeededError without a `base` if the format needs one.
- `write(adapter, path, base, lossy)`, if the format is in `WRITTEN`: writes a file or folder, whole or not at all, and
  returns descriptions of the losses. LossError if something would be lost and `lossy` is False.
"""

from __future__ import annotations

import math
import os
from importlib import import_module
from types import ModuleType

from graft import BaseModelMismatchError, CheckpointError, NonFiniteError
from graft.config import pair
from graft.config.atomic import is_special
from graft.core.errors import join_some, shorten_text
from graft.files.base import BaseDescription
from graft.files.bases import view_by_model_names
from graft.files.errors import OptionError
from graft.files.neutral import AdapterFile
from graft.files.pickles import mentions_name
from graft.files.tensors import read_header

Base = BaseDescription  # the base's names and shapes; a format reads values only if its docstring says so
# in the order in which `recognise` tries them
FORMATS = ("gguf", "torchtune", "litgpt", "peft", "mlx", "adapterhub", "pyreft", "kohya", "diffusers")
WRITTEN = tuple(name for name in FORMATS if name not in ("torchtune", "litgpt"))  # their libraries have ended


NEMO = "adapter_metadata.json"  # a file next to the weights that NeMo 2 saves
OF_NEMO = (
    "an adapter of NeMo or Megatron, which graft does not read: the model orders the rows of its fused projections. "
    "Their own export to HuggingFace PEFT writes what graft reads"
)
SIGNS = {  # part of tensors' names → the description of such a file
    ".adapter.linear_in.": OF_NEMO,
    "lora_kqv_adapter": OF_NEMO,
    "adapter_query.weight": "an adapter of the original LLaMA-Adapter, which graft does not read: it has a gate for "
    "each head, of which it takes the tanh, and adaption prompts have one number for all heads",
}


def module_of(name: str) -> ModuleType:
    """Return the module `graft.files.formats.<name>`, imported when it is first needed."""
    return import_module(f"graft.files.formats.{name}")


def writer_of(name: str) -> ModuleType:
    """Return the module of a format that graft writes, by its name.

    Raises:
        OptionError: there is no such format, or graft only reads it.
    """
    if name not in WRITTEN:
        what = f"The format {name!r} is read, and not written" if name in FORMATS else f"There is no format {name!r}"
        raise OptionError(f"{what}. Formats that graft writes: {', '.join(WRITTEN)}.")
    return module_of(name)


def recognise(path: str) -> str:
    """Return the name of the format of a file or folder: the first of gguf, torchtune, litgpt, peft, mlx, adapterhub,
    pyreft, kohya and diffusers that recognises it.

    Raises:
        CheckpointError: nothing exists there, or it is a pipe or device, a model, a known format that graft cannot
            read, a folder of adapters, or unknown.
    """
    if not os.path.exists(path):
        raise CheckpointError(f"{path} does not exist. Give a file or folder of an adapter.")
    if is_special(path):
        raise CheckpointError(f"{path} is a pipe or device, and no adapter. Give a file or folder.")
    for name in FORMATS:
        if module_of(name).recognises(path):
            return name
    if what := unread(path):
        raise CheckpointError(f"{path} is {what}.")
    if inner := pair.find_adapter_folders(path):
        raise CheckpointError(
            f"{path} is no adapter, but holds some in the folders {join_some(inner)}: give one of them."
        )
    what = "holds a model, and no adapter" if is_model(path) else "is no adapter"
    raise CheckpointError(f"{path} {what} of a format that graft reads: {', '.join(FORMATS)}.")


def unread(path: str) -> str | None:
    """Return a description of a known format that graft does not read, with the reason; None for other paths.

    Detects NeMo by a .nemo file or adapter_metadata.json. Tensor names of NeMo, Megatron and the original LLaMA-Adapter
    (`SIGNS`) are looked for in the only .pth, .pt or .ckpt file, or else the only .safetensors file: in the tensors'
    names, or in the file's bytes.

    Raises:
        CheckpointError: the header of the .safetensors file is damaged.
    """
    if one_file(path, ".nemo") or os.path.exists(os.path.join(path, NEMO)):
        return OF_NEMO
    file = one_file(path, ".pth", ".pt", ".ckpt") or one_file(path, ".safetensors")
    keys = " ".join(read_header(file)[0]) if file and file.endswith(".safetensors") else ""
    for sign, what in SIGNS.items():
        if file and (sign in keys or mentions_name(file, sign.encode())):
            return what
    return None


def is_model(path: str) -> bool:
    """Return True if a path looks like a model: a folder with config.json and without adapter_config.json.

    Or a safetensors file with a tensor that ends in .weight or .bias.
    """
    if os.path.isdir(path):
        return os.path.isfile(os.path.join(path, "config.json")) and not os.path.isfile(
            os.path.join(path, pair.CONFIG_NAME)
        )
    names = read_header(path)[0] if path.endswith(".safetensors") else {}
    return any(name.endswith((".weight", ".bias")) for name in names)


def read(path: str | os.PathLike[str], base: Base | None = None) -> AdapterFile:
    """Read an adapter file of any format.

    If its modules do not fit the base's files, read it once more by the model's names.

    Args:
        path: a file or folder.
        base: the base model's names, where the format needs them.

    Raises:
        CheckpointError: `recognise` finds no format, a file is damaged, or the base model's name is no text.
        NonFiniteError: a module's scale is NaN or infinite.
        BaseModelMismatchError, BaseNeededError: the base does not fit, or is needed.
    """
    path = os.fspath(path)
    form = module_of(recognise(path))
    try:
        adapter: AdapterFile = form.read(path, base)
    except BaseModelMismatchError:
        if (known := None if base is None else view_by_model_names(base)) is None:
            raise
        adapter = form.read(path, known)  # its modules may have other names than its files
    if not isinstance(adapter.base, str | None):
        raise CheckpointError(
            f"{path} names {shorten_text(repr(adapter.base))} as its base model, and no text. Edit it."
        )
    for module, factors in adapter.modules.items():
        if not math.isfinite(factors.scale or 0.0):
            raise NonFiniteError(f"{path}: the scale of '{module}' is {factors.scale}. Save or download it again.")
    return adapter


def one_file(path: str, *suffixes: str) -> str | None:
    """Return `path` if it is a file with one of `suffixes`, or the path of the only such file of a folder; None: none,
    or several.

    Hidden files of a folder do not count. A path that does not exist raises FileNotFoundError.
    """
    if os.path.isfile(path):
        return path if path.endswith(suffixes) else None
    names = [name for name in sorted(os.listdir(path)) if name.endswith(suffixes) and not name.startswith(".")]
    return os.path.join(path, names[0]) if len(names) == 1 else None
