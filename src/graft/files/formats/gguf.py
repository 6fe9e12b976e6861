# SPDX-License-Identifier: Apache-2.0
"""GGUF, llama.cpp's: names by the package gguf, one alpha for all, rows of q and k in the order of llama.cpp's RoPE.

Steering vectors are its control vectors, one for each block but the first."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from dataclasses import replace as with_
from types import ModuleType
from typing import Any

import numpy as np

from graft import CheckpointError, LossError
from graft.config.atomic import replace_file
from graft.config.reading import LARGEST_NUMBER, Json, open_file
from graft.core.errors import join_some, shorten_text
from graft.files.errors import BaseNeededError, PackageNeededError, make_damage_error, make_misfit_error
from graft.files.formats import Base, one_file
from graft.files.formats.gguf_file import MAGIC, import_gguf, read_contents
from graft.files.holding import FormatLimits, check_losses, fit_to_format, get_factor_pair, make_shape_error
from graft.files.names import count_heads, index_by_name
from graft.files.neutral import AdapterFile, Kind, LostModule, LowRank, OtherMethod
from graft.files.tensors import Tensor, make_tensor, reorder_rows

NAME = "gguf"
FOLDER = ("adapter.gguf",), ()
KEY = re.compile(r"(.+)\.weight\.lora_([ab])")
ALORA, TOKENS = "adapter.alora.invocation_tokens", "alora_invocation_tokens"  # here, and in a config of PEFT
HOLDS = FormatLimits("alpha", True, frozenset({"embedding", "experts", TOKENS}))
# llama.cpp's converter, November 2026: architecture in config.json → its name in GGUF, whether it permutes q and k.
# Left out: architectures with weights that it changes in another way (falcon's qkv, bloom's, internlm2's).
OTHER_NAMES = {"Mistral": "llama", "Mixtral": "llama", "Cohere": "command-r"}  # others have that of the class
PERMUTED = ("Llama", "Mistral", "Mixtral", "Arcee", "Granite", "SmolLM3", "Olmo")
PLAIN = ("Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Phi3", "Gemma", "Gemma2", "Gemma3", "Olmo2", "StableLm",
         "Starcoder2", "Cohere")  # fmt: skip
ARCHITECTURES = {
    f"{name}ForCausalLM": (OTHER_NAMES.get(name, name.lower()), name in PERMUTED) for name in PERMUTED + PLAIN
} | {"GPT2LMHeadModel": ("gpt2", False)}
MOST_BLOCKS = 10_000
DTYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # safetensors' names → those of ggml


def recognises(path: str) -> bool:
    """Return True for a file that begins with GGUF's magic bytes, or a folder with exactly one .gguf file that does;
    False for a missing path.
    """
    file = one_file(path, ".gguf") or path
    if not os.path.isfile(file):
        return False
    with open_file(file) as f:
        return f.read(4) == MAGIC


def read(path: str, base: Base | None = None) -> AdapterFile:
    """Read a file with LoRA or control vectors, or a folder with one .gguf file.

    Without a base, LoRA's modules have llama.cpp's names and `has_flat_names` is set.

    The metadata is the config; aLoRA's tokens are added as `alora_invocation_tokens`. The base's name is that of the
    repository, else of the model, in the metadata, else None. A missing alpha is 0. Tensors that are no factors go to
    `unknown_keys`.

    Raises:
        CheckpointError: it is a model, an adapter of another type, has an alpha or aLoRA's tokens of a wrong type, or
            is damaged.
        BaseModelMismatchError: the base is of another architecture, or lacks a module.
        BaseNeededError: control vectors without a base.
    """
    path = one_file(path, ".gguf") or path
    fields, tensors = read_contents(path)
    if fields.get("general.architecture") == ARCHITECTURE:
        return read_control(path, fields, tensors, base)
    kind = fields.get("general.type")
    if kind != "adapter":
        raise CheckpointError(
            f"{path} is a model (general.type = {kind!r}), not an adapter. Pass it as --base, and give an adapter."
        )
    if fields.get("adapter.type") != "lora":
        raise CheckpointError(f"{path} is an adapter of type {fields.get('adapter.type')!r}: graft reads LoRA.")
    arch, alpha = str(fields.get("general.architecture")), fields.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, (int, float)) or not abs(alpha) <= LARGEST_NUMBER:
        raise CheckpointError(f"{path}: adapter.lora.alpha is {alpha!r}, and no number for it. Save the adapter again.")
    out = AdapterFile(NAME, path, config=fields, has_flat_names=base is None)
    if tokens := fields.get(ALORA):
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise CheckpointError(f"{path}: {ALORA} is no list of tokens. Save the adapter again.")
        out.config = {**fields, TOKENS: tokens}
    out.base = next(
        (str(fields[k]) for k in ("general.base_model.0.repo_url", "general.base_model.0.name") if k in fields), None
    )
    modules = out.group_by_module(tensors, KEY.fullmatch)
    paths = {name: name for name in modules} if base is None else paths_of(base, arch, path)
    if absent := [name for name in modules if name not in paths]:
        raise make_misfit_error(f"{base.path if base else ''} has no modules for {join_some(absent, 4)} of {path}")
    for name, factors in modules.items():
        out.modules[paths[name]] = read_gguf_pair(path, name, factors, alpha, base)
    return out


def read_gguf_pair(path: str, name: str, tensors: Mapping[str, Tensor], alpha: float, base: Base | None) -> LowRank:
    """Return the factors of module `name`. The scale is alpha / rank, or 1 for alpha 0.

    A name that begins with "token_embd" is an embedding, and its A is transposed; factors of three dimensions are those
    of experts. With a base, rows of B that llama.cpp permutes by heads are put back.

    Raises:
        CheckpointError: a factor is missing, or shapes do not fit.
    """
    a, b = get_factor_pair(tensors, "ab", path, name)
    kind: Kind = "embedding"
    if name.startswith("token_embd"):
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[1]:
            raise make_shape_error(path, name, a, b)
        A, rank = a.transpose(), a.shape[1]
    else:
        if len(a.shape) != len(b.shape) or len(a.shape) not in (2, 3) or a.shape[-2] != b.shape[-1]:
            raise make_shape_error(path, name, a, b)
        A, rank, kind = a, a.shape[-2], "linear" if len(a.shape) == 2 else "experts"
    out = LowRank(A, b, alpha / rank if alpha else 1.0, kind)
    heads = None if base is None else heads_in(name, base)
    return out if heads is None else with_(out, B=reorder_rows(out.B, heads, to_halves=True))


def arch_of(base: Base) -> tuple[str, bool]:
    """Return the base's architecture in GGUF, and whether llama.cpp's converter permutes its q and k.

    The first of the config's `architectures` counts; without any, that of its `model_type`.

    Raises:
        BaseNeededError: the base's config has neither.
        LossError: graft does not know the architecture.
    """
    kind = str(base.config.get("model_type") or "").replace("_", "")
    of_kind = {name.lower().removesuffix("forcausallm").removesuffix("lmheadmodel"): name for name in ARCHITECTURES}
    named = (base.config.get("architectures") or [of_kind.get(kind.removesuffix("text"), kind)])[0]
    if not named:
        raise BaseNeededError(f"{base.path} has no config.json that names its architecture. Give a folder with one.")
    if named not in ARCHITECTURES:
        raise LossError(
            f"graft does not know how llama.cpp converts the weights of {named} ({base.path}). Give a model of these: "
            f"{', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[named]


def heads_in(name: str, base: Base) -> int | None:
    """Return the number of heads if llama.cpp permutes a module's rows by heads; else None.

    It does for names that end in attn_q or attn_k, if the architecture is one that permutes (`arch_of`). attn_k has the
    number of key and value heads.
    """
    leaf = name.rpartition(".")[2]
    if leaf not in ("attn_q", "attn_k") or not arch_of(base)[1]:
        return None
    return count_heads(base, leaf == "attn_k")


def paths_of(base: Base, arch: str, what: str) -> dict[str, str]:
    """Return the base's module path by llama.cpp's name, for the modules that have one.

    Raises:
        BaseModelMismatchError: the base is of another architecture than `arch`.
        CheckpointError: two modules have one name.
        And the errors of `arch_of` and `names_of`.
    """
    base_arch, _ = arch_of(base)
    if base_arch != arch:
        raise make_misfit_error(f"{what} is for a model of architecture '{arch}', and {base.path} is '{base_arch}'")
    return index_by_name(
        names_of(base), lambda name, a, b: f"llama.cpp has one name, '{name}', for {a} and {b} of {base.path}."
    )


def names_of(base: Base) -> dict[str, str]:
    """Return module path → llama.cpp's name, for the base's modules that have one.

    The number of blocks is `num_hidden_layers` or `n_layer`, else 0.

    Raises:
        CheckpointError: the config's number of blocks is no number from 0 to 10,000.
        BaseNeededError, LossError: the base's architecture is not known, as in `arch_of`.
        PackageNeededError: the package gguf is missing.
    """
    gguf = import_gguf()
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch_of(base)[0])
    blocks = base.config.get("num_hidden_layers") or base.config.get("n_layer")
    if not isinstance(blocks, int | None) or not 0 <= (blocks or 0) <= MOST_BLOCKS:
        raise CheckpointError(
            f"The config of {base.path} says {shorten_text(repr(blocks))} blocks. Give a model's config."
        )
    table = gguf.get_tensor_name_map(arch, int(blocks or 0))
    by_path = {path: table.get_name(path) for path in base.modules}
    return {path: name for path, name in by_path.items() if name is not None}


def write(adapter: AdapterFile, path: str, base: Base | None = None, lossy: bool = False) -> list[str]:
    """Write a file: LoRA, or control vectors for steering vectors. Return descriptions of the losses.

    Rows of q and k are put into llama.cpp's order where its converter permutes them, and A of embeddings is transposed.
    The file has one alpha: scale · rank of the first module; aLoRA's tokens are written, too.

    Raises:
        BaseNeededError: `base` is None: the file needs its architecture and heads.
        LossError: without `lossy`, a module has no name in llama.cpp, or a part cannot be held; always, if no module is
            left.
        PackageNeededError: the package gguf is missing, or too old for aLoRA's tokens.
    """
    gguf = import_gguf()
    if adapter.method == "STEERING":
        vectors, facts, lost = control_vectors(adapter, base, lossy)
        save_gguf(path, ARCHITECTURE, facts, vectors)
        return lost
    if base is None:
        raise BaseNeededError("A GGUF adapter says its base's architecture. Give the base model (--base).")
    arch, _ = arch_of(base)
    fitted, lost = fit_to_format(adapter, HOLDS, NAME, lossy)
    names = names_of(base)
    lost += [LostModule(f"no name in llama.cpp: {module}") for module in fitted.modules if module not in names]
    modules = {names[path]: module for path, module in fitted.low_rank.items() if path in names}
    check_losses(adapter, NAME, lost, lossy, modules)
    first = next(iter(modules.values()))
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        heads = heads_in(name, base)
        A = module.A.transpose() if module.kind == "embedding" else module.A
        tensors[f"{name}.weight.lora_a"] = A
        tensors[f"{name}.weight.lora_b"] = module.B if heads is None else reorder_rows(module.B, heads, to_halves=False)
    keys = gguf.Keys
    fields: Json = {keys.General.TYPE: gguf.GGUFType.ADAPTER, keys.Adapter.TYPE: "lora"}
    fields[keys.Adapter.LORA_ALPHA] = float(first.scale * first.rank)
    if tokens := adapter.config.get(TOKENS):
        fields[ALORA] = tokens
    save_gguf(path, arch, fields, tensors)
    return lost


def save_gguf(path: str, arch: str, fields: Json, tensors: Mapping[str, Tensor]) -> None:
    """Write a file with fields and tensors, whole or not at all.

    Raises:
        OSError: the disk is full. The package does not notice that, so the file is read again.
        PackageNeededError: the package is too old for a list of numbers.
    """
    gguf = import_gguf()

    def write(temporary: str) -> None:
        """Write the file to the path `temporary`, and read it again to see that it is whole.

        Lists are written as arrays of uint32; other fields by their type as text, uint32 or float32.

        Raises:
            PackageNeededError: the package gguf is too old for lists.
            OSError: the written file is damaged, perhaps because the disk is full. It names the final path.
        """
        writer = gguf.GGUFWriter(temporary, arch)
        for name, value in fields.items():
            if isinstance(value, list):
                try:
                    writer.add_key_value(name, value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
                except TypeError as e:  # the first versions know no kind of an array's items but int32
                    writer.close()
                    raise PackageNeededError(f"{name} needs a later version of gguf. Run pip install -U gguf.") from e
                continue
            kind = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
            kind(name, value)
        for name, t in tensors.items():
            add_tensor(gguf, writer, name, t)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        try:
            read_contents(temporary)
        except CheckpointError as e:
            raise OSError(errno.EIO, "it was not written whole, perhaps because the disk is full", path) from e

    replace_file(path, write)


def add_tensor(gguf: ModuleType, writer: Any, name: str, t: Tensor) -> None:
    """Add a tensor to the writer: F32, F16 and BF16 as they are, other dtypes as F32."""
    if t.dtype not in DTYPES:
        t = make_tensor(t.read().astype("f4"), "F32")
    if t.dtype == "BF16":
        values = np.frombuffer(t.load(), "u1").reshape(*t.shape[:-1], 2 * t.shape[-1])
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType.BF16)
        return
    values = np.frombuffer(t.load(), "<f4" if t.dtype == "F32" else "<f2").reshape(t.shape)
    writer.add_tensor(name, values)


ARCHITECTURE = "controlvector"
DIRECTION = re.compile(r"direction\.(\d{1,9})")
VECTOR = "steering_vector"


def read_control(path: str, fields: dict[str, object], tensors: Mapping[str, Tensor], base: Base | None) -> AdapterFile:
    """Read control vectors as steering: `direction.N` is added to the output of block N.

    Other names go to `unknown_keys`. The config has `peft_type` "STEERING", `inference_mode` True, the numbers of these
    blocks as `layers`, and "places" as `target_modules`. `selected` has all modules.

    Raises:
        BaseNeededError: there is no base to count blocks.
        BaseModelMismatchError: the base has no such block, or other widths.
        CheckpointError: it has no directions.
    """
    # loads torch, which a look at headers does not need
    from graft.files.formats.adapterhub_places import find_base_blocks

    blocks, base = find_base_blocks(path, base)
    out = AdapterFile("gguf", path, "STEERING", config={"peft_type": "STEERING", "inference_mode": True})
    for name, values in tensors.items():
        match = DIRECTION.fullmatch(name)
        if match is None:
            out.unknown_keys.append(name)
            continue
        number = int(match[1])
        if number >= len(blocks) or values.shape != (blocks[number].width,):
            size = f"{len(blocks)} blocks of width {blocks[0].width}" if blocks else "no blocks"
            raise make_misfit_error(f"{path} has {name} of shape {values.shape}, and {base.path} has {size}")
        out.modules[blocks[number].path] = OtherMethod("STEERING", {VECTOR: values})
    if not out.modules:
        raise make_damage_error(f"{path} is a control vector without a direction")
    numbers = [i for i, block in enumerate(blocks) if block.path in out.modules]
    out.config |= {"target_modules": "places", "layers": numbers}
    out.selected = frozenset(out.modules)
    return out


def control_vectors(adapter: AdapterFile, base: Base | None, lossy: bool) -> tuple[dict[str, Tensor], Json, list[str]]:
    """Return steering vectors times their coefficient in float32, by name, the fields of a file, and descriptions of
    the losses.

    A vector of zeros elsewhere is dropped without a loss. Unknown keys and modules of other methods are losses, too. A
    missing coefficient is 1. The fields are `model_hint` and `layer_count`, the number of vectors written.

    Raises:
        BaseNeededError: there is no base to count blocks.
        LossError: without `lossy`, a vector acts after the first block or after no block, or the config has normalize
            or min_token_index. Or nothing is left.
    """
    from graft.files.formats.adapterhub_places import find_base_blocks

    blocks, base = find_base_blocks(adapter.path, base)
    numbers = {block.path: i for i, block in enumerate(blocks)}
    cfg, directions, lost = adapter.config, dict[int, Tensor](), [f"the key '{key}'" for key in adapter.unknown_keys]
    lost += [f"{name}={cfg[name]}" for name in ("normalize", "min_token_index") if cfg.get(name)]
    for module, m in adapter.modules.items():
        number = numbers.get(module, 0)
        vector = m.tensors[VECTOR] if isinstance(m, OtherMethod) else None
        if number and vector is not None:
            directions[number] = make_tensor(
                vector.read().astype("f4") * np.float32(cfg.get("coefficient", 1.0)), "F32"
            )
        elif vector is None or vector.read().any():
            place = "the first block" if module in numbers else "no block"
            lost.append(LostModule(f"{module}, which is {place}"))
    check_losses(adapter, "gguf", lost, lossy, directions)
    hint = {f"{ARCHITECTURE}.model_hint": str(base.config.get("model_type", ""))}
    fields: Json = hint | {f"{ARCHITECTURE}.layer_count": len(directions)}
    return {f"direction.{number}": values for number, values in sorted(directions.items())}, fields, lost
