# SPDX-License-Identifier: Apache-2.0
"""diffusers: pytorch_lora_weights.safetensors, the parts of a pipeline in front of the names; its three older layouts.

Files in the names of a model's first release (ComfyUI's of Flux, Wan and others) are read by diffusers itself.

Since diffusers 0.34 the header's `lora_adapter_metadata` has a LoraConfig for each part. Without it, and without alpha
next to the factors, the scale is 1.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from graft import CheckpointError, LossError
from graft.config.reading import Json, check_value, parse_json
from graft.files.bases import COMPONENTS
from graft.files.errors import BaseNeededError, PackageNeededError, make_damage_error
from graft.files.formats import Base, one_file
from graft.files.formats.peft import find_rank_and_alpha, key_of, round_alpha
from graft.files.holding import FormatLimits, divide_alpha, fit_to_format, get_factor_pair, make_shape_error
from graft.files.names import find_pipeline_parts, is_pipeline
from graft.files.neutral import AdapterFile, LowRank
from graft.files.pickles import convert_tensors, mentions_name, read_tensors
from graft.files.tensors import Tensor, read_header, write_safetensors

NAME = "diffusers"
FILE, METADATA = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
FOLDER = (FILE, "adapter.safetensors"), ()
HOLDS = FormatLimits(parts=frozenset({"magnitude", "bias", "conv"}))
LEAVES = {  # ends of names → factor; the newest layout first
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_B.bias": "bias", ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude", ".lora.down.weight": "A", ".lora.up.weight": "B",
    ".lora_linear_layer.down.weight": "A", ".lora_linear_layer.up.weight": "B", ".alpha": "alpha",
}  # fmt: skip
OLDEST = re.compile(r"(?P<path>.+)\.processor\.(?P<which>to_q|to_k|to_v|to_out)_lora\.(?P<side>down|up)\.weight")
FIRST = re.compile(r"diffusion_model\..+|((double|single|joint)_)?blocks\.\d+\..+\.lora_(A|B|down|up)\.weight")
PART = re.compile(rf"({'|'.join(COMPONENTS)})(_\d+)?\.")


def recognises(path: str) -> bool:
    """Return True for a file of diffusers, or a folder with one; False if there is none.

    A .safetensors file counts with diffusers' metadata or names of a first release. Else more than half of its names
    must begin with a part of a pipeline or have the oldest layout, and one be a factor's name. Any other file is
    searched for diffusers' names without loading it.
    """
    file = find_diffusers_file(path)
    if file is None:
        return False
    if not file.endswith(".safetensors"):
        return mentions_name(file, b"_lora.down.weight", b".lora.down.weight", b"lora_linear_layer")
    header, metadata = read_header(file)
    if METADATA in metadata or of_first_release(header):
        return True
    known = [key for key in header if PART.match(key) or OLDEST.fullmatch(key)]
    return len(known) > len(header) / 2 and any(split_key(key) is not None for key in header)


def of_first_release(keys: Iterable[str]) -> bool:
    """Return True if a tensor has a name of a model's first release, with a known ending of factors."""
    return any(FIRST.fullmatch(key) is not None and split_key(key) is not None for key in keys)


def read_renamed(file: str, base: Base | None) -> dict[str, Tensor]:
    """Return a file's tensors by diffusers' names, with alphas in the factors, as diffusers reads them without network.

    For a base that is a pipeline its class reads them, for a transformer the loader mixin of the same family. The class
    is that of the base's config, or else of the loaded model.

    Raises:
        BaseNeededError: there is no base, or it is neither a pipeline nor a transformer.
        PackageNeededError: diffusers is not installed.
        LossError: there is no such class, or it reads no LoRA files.
        CheckpointError: it cannot read this one.
    """
    of_model = "" if base is None or base.model is None else type(base.model).__name__
    name = of_model if base is None else str(base.config.get("_class_name", of_model))
    if not name.endswith("Pipeline") and "Transformer" not in name:
        raise BaseNeededError(
            f"{file} has the names of a model's first release. Give the folder of the pipeline or of the transformer "
            "that it is for (--base)."
        )
    try:
        import diffusers
        from diffusers.loaders import lora_pipeline
    except ImportError:
        raise PackageNeededError(f"{file} is read by diffusers itself. Run pip install diffusers.") from None
    mixin = f"{name.partition('Transformer')[0]}LoraLoaderMixin"  # of FluxTransformer2DModel: FluxLoraLoaderMixin
    kind: Any = getattr(diffusers, name, None) if name.endswith("Pipeline") else getattr(lora_pipeline, mixin, None)
    if not hasattr(kind, "lora_state_dict"):
        raise LossError(
            f"{name} of diffusers {diffusers.__version__} reads no LoRA files such as {file}. Name one that does."
        )
    try:
        state = kind.lora_state_dict(file, local_files_only=True)
    except (ValueError, KeyError, RuntimeError, IndexError) as e:
        raise CheckpointError(f"{name} of diffusers cannot read {file}: {e}") from e
    return convert_tensors(state[0] if isinstance(state, tuple) else state, file)


def find_diffusers_file(path: str) -> str | None:
    """Return the file, or the only .safetensors file or pytorch_lora_weights.bin of a folder; None for others.

    A missing path raises FileNotFoundError.
    """
    return one_file(path, ".safetensors") or one_file(path, "pytorch_lora_weights.bin")


def split_key(key: str) -> tuple[str, str] | None:
    """Return the module's path and the kind of a tensor ("A", "B", "bias", "magnitude", "alpha"); None for an unknown
    name.

    Names of the oldest layout get the part "unet." if they have none, and `to_out` becomes `to_out.0`.
    """
    if match := OLDEST.fullmatch(key):
        path = f"{match['path']}.{match['which']}{'.0' if match['which'] == 'to_out' else ''}"
        path = path if PART.match(path) else f"unet.{path}"
        return path, "A" if match["side"] == "down" else "B"
    leaf = next((leaf for leaf in LEAVES if key.endswith(leaf)), None)
    return None if leaf is None else (key.removesuffix(leaf), LEAVES[leaf])


def read(path: str, base: Base | None = None) -> AdapterFile:
    """Read a file of any layout; paths begin with the part of the pipeline ("unet.", "text_encoder_2.").

    Raises:
        CheckpointError: it is damaged, or factors are missing or contradict the metadata.
        BaseNeededError, PackageNeededError, LossError: it has the names of a first release, see `read_renamed`.
    """
    file = find_diffusers_file(path) or path
    tensors, metadata = read_tensors(file)
    if METADATA not in metadata and of_first_release(tensors):
        tensors = read_renamed(file, base)
    return make_adapter(file, tensors, metadata)


def make_adapter(file: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> AdapterFile:
    """Return the adapter of tensors by diffusers' names.

    Unknown keys, and an alpha without factors, go to `unknown_keys`. Each module becomes an entry of `modules`, without
    a config. `is_pipeline` is True if paths begin with a pipeline's parts; no tensors give an empty adapter.

    Raises:
        CheckpointError: factors are missing, have wrong shapes, or contradict the metadata.
    """
    out = AdapterFile(NAME, file, metadata=metadata)
    configs = read_part_configs(metadata, file)
    for module, of_module in out.group_by_module(tensors, split_key).items():
        if of_module.keys() == {"alpha"}:
            out.unknown_keys.append(f"{module}.alpha")
        else:
            out.modules[module] = make_low_rank(file, module, of_module, configs)
    out.is_pipeline = bool(find_pipeline_parts(out.modules))
    return out


def read_part_configs(metadata: dict[str, str], file: str) -> dict[str, Json]:
    """Return the config of each part of the pipeline from the file's `lora_adapter_metadata`; {} without it.

    A key "unet.r" is the field "r" of the part "unet".

    Raises:
        CheckpointError: they are no JSON dict, or hold values that no config has.
    """
    if METADATA not in metadata:
        return {}
    fields = parse_json(metadata[METADATA], f"{file}: {METADATA}")
    if not isinstance(fields, dict):
        raise make_damage_error(f"{file}: {METADATA} is a {type(fields).__name__}, and no dict of the parts' fields")
    check_value(fields, f"{file}: {METADATA}", "", 0)
    out: dict[str, Json] = {}
    for key, value in fields.items():
        part, _, name = key.partition(".")
        out.setdefault(part, {})[name] = value
    return out


def make_low_rank(file: str, module: str, tensors: dict[str, Tensor], configs: dict[str, dict[str, object]]) -> LowRank:
    """Return a module's factors with scale, flattened magnitude and bias.

    The scale is alpha / rank of the file, 1 for an alpha of 0. Without alpha it is that of the part's config (alpha /
    √rank for rsLoRA), and 1 without a config. Factors of more than two dimensions are a convolution's.

    Raises:
        CheckpointError: a factor is missing, shapes do not fit, or, without alpha, the metadata have another rank.
    """
    A, B = get_factor_pair(tensors, "AB", file, module)
    if len(A.shape) < 2 or len(A.shape) != len(B.shape) or B.shape[1] != A.shape[0]:
        raise make_shape_error(file, module, A, B)
    part, _, path = module.partition(".")
    scale = divide_alpha(tensors.get("alpha"), A.shape[0])
    if "alpha" not in tensors and part in configs:
        r, alpha = find_rank_and_alpha(configs[part], path, "lora_alpha")
        if r != A.shape[0]:
            raise make_damage_error(f"{file}: '{module}' has rank {A.shape[0]}, and its metadata say {r}")
        scale = alpha / (r**0.5 if configs[part].get("use_rslora") else r)
    magnitude = tensors.get("magnitude")
    if magnitude is not None:
        magnitude = magnitude.reshape(B.shape[0])
    return LowRank(A, B, scale, "conv" if len(A.shape) > 2 else "linear", magnitude, tensors.get("bias"))


def write(adapter: AdapterFile, path: str, base: Base | None = None, lossy: bool = False) -> list[str]:
    """Write a file of the newest layout: `path` if it ends in .safetensors, else pytorch_lora_weights.safetensors in
    the folder `path`, made if needed.

    Return descriptions of the losses.

    The header gets a LoraConfig for each part.

    Args:
        base: tells the part of the pipeline for an adapter of one model.

    Raises:
        BaseNeededError: nothing tells that part.
        LossError: without `lossy`, a part of the adapter cannot be held.
    """
    fitted, lost = fit_to_format(adapter, HOLDS, NAME, lossy, base)
    parts: dict[str, dict[str, LowRank]] = {}
    for module, of_module in place_modules(fitted, base).items():
        part, _, inner = module.partition(".")
        parts.setdefault(part, {})[inner] = of_module
    tensors: dict[str, Tensor] = {}
    fields: Json = {}
    for part, modules in parts.items():
        fields |= {f"{part}.{name}": value for name, value in make_config(modules).items()}
        for inner, m in modules.items():
            stem = f"{part}.{inner}"
            tensors |= {f"{stem}.lora_A.weight": m.A, f"{stem}.lora_B.weight": m.B}
            if m.bias is not None:
                tensors[f"{stem}.lora_B.bias"] = m.bias
            if m.magnitude is not None:
                ones = [1] * (len(m.A.shape) - 2)
                shape = (1, *m.magnitude.shape, *ones) if ones else m.magnitude.shape
                tensors[f"{stem}.lora_magnitude_vector"] = m.magnitude.reshape(*shape)
    metadata = {"format": "pt", METADATA: json.dumps(fields, indent=2, sort_keys=True)}
    if not path.endswith(".safetensors"):
        os.makedirs(path, exist_ok=True)
        path = os.path.join(path, FILE)
    write_safetensors(path, tensors, metadata)
    return lost


def place_modules(adapter: AdapterFile, base: Base | None) -> dict[str, LowRank]:
    """Return the LoRA modules by paths that begin with a part of a pipeline.

    They are unchanged if the adapter is a pipeline's, or all its paths are in a pipeline `base`. Else the prefix is the
    only part of `base` that has all modules. For a base that is one model, it is "unet." for a class "UNet…", and
    "transformer." for one with "Transformer" in its name.

    Raises:
        BaseNeededError: no part, or several, fit, or there is no base.
    """
    modules = adapter.low_rank
    known = set() if base is None else set(base.modules)
    if adapter.is_pipeline or (is_pipeline(base) and known.issuperset(modules)):
        return modules
    parts = {m[0]: None for path in known if (m := PART.match(path))} if is_pipeline(base) else {}
    fitting = [part for part in parts if all(part + module in known for module in modules)]
    if base is not None and not parts:
        name = str(base.config.get("_class_name", ""))
        fitting = ["unet."] if name.startswith("UNet") else ["transformer."] if "Transformer" in name else []
    if len(fitting) != 1:
        raise BaseNeededError(
            f"Nothing says which part of a pipeline {adapter.path} is for. Give the pipeline's folder, or that of its "
            f"unet or transformer (--base).{' It fits ' + ' and '.join(sorted(fitting)) if fitting else ''}"
        )
    return {fitting[0] + module: of_module for module, of_module in modules.items()}


def make_config(modules: dict[str, LowRank]) -> Json:
    """Return the fields of a LoraConfig that gives each module its rank and scale (alpha = scale · rank, rounded).

    The first module gives `r` and `lora_alpha`; others that differ get entries in `rank_pattern` and `alpha_pattern`.
    `use_dora` and `lora_bias` are True if any module has a magnitude or bias. `target_modules` are all paths, sorted.
    Fixed are `peft_type` "LORA", `lora_dropout` 0.0, `bias` "none", `use_rslora` False and `init_lora_weights` True.
    """
    first = next(iter(modules.values()))
    r, alpha = first.rank, round_alpha(first.scale * first.rank)
    alphas = {path: round_alpha(m.scale * m.rank) for path, m in modules.items()}
    return {
        "peft_type": "LORA", "r": r, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "use_rslora": False,
        "rank_pattern": {key_of(path, modules): m.rank for path, m in modules.items() if m.rank != r},
        "alpha_pattern": {key_of(path, modules): a for path, a in alphas.items() if a != alpha},
        "target_modules": sorted(modules), "use_dora": any(m.magnitude is not None for m in modules.values()),
        "lora_bias": any(m.bias is not None for m in modules.values()), "init_lora_weights": True,
    }  # fmt: skip
