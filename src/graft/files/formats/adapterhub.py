# SPDX-License-Identifier: Apache-2.0
"""AdapterHub's adapters: a folder with adapter_config.json and pytorch_adapter.bin; LoRA, bottlenecks, ReFT, fusion."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping

import numpy as np

from graft import CheckpointError
from graft.config.atomic import replace_file
from graft.config.reading import Json, read_object
from graft.files.errors import make_damage_error
from graft.files.formats import Base, adapterhub_places
from graft.files.formats.peft import round_alpha
from graft.files.holding import FormatLimits, check_losses, fit_to_format, get_factor_pair, make_shape_error
from graft.files.neutral import AdapterFile, LostModule, LowRank, OtherMethod
from graft.files.pickles import read_tensors, to_torch, write_torch
from graft.files.tensors import Tensor, make_tensor

NAME = "adapterhub"
CONFIG = "adapter_config.json"
FILES = ("adapter.safetensors", "pytorch_adapter.bin")
FUSION = "adapter_fusion_config.json"
FUSION_FILES = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")
FOLDER = (
    (*FILES, *FUSION_FILES),
    (CONFIG, FUSION, "head_config.json", "model_head.safetensors", "pytorch_model_head.bin"),
)
HEAD, HEAD_FILES = "head_config.json", ("model_head.safetensors", "pytorch_model_head.bin")
# that library's heads, by kind and number of layers → models with the same head, its layers, and needed config fields
HEADS: dict[tuple[str, int], tuple[str, tuple[str, ...], Json]] = {
    ("classification", 1): ("(Bert|Albert)ForSequenceClassification", ("classifier",), {"use_pooler": True}),
    ("classification", 2): (
        "(XLM)?RobertaForSequenceClassification", ("classifier.dense", "classifier.out_proj"),
        {"use_pooler": False, "activation_function": "tanh"},
    ),
    ("tagging", 1): (".*ForTokenClassification", ("classifier",), {}),
    ("question_answering", 1): (".*ForQuestionAnswering", ("qa_outputs",), {}),
}  # fmt: skip
HOLDS = FormatLimits("alpha", False, methods=frozenset({"IA3"}))
PLACES = {  # ends of the paths that their config can name → its field, and a letter of attn_matrices
    "query": ("selfattn_lora", "q"), "q_proj": ("selfattn_lora", "q"), "key": ("selfattn_lora", "k"),
    "k_proj": ("selfattn_lora", "k"), "value": ("selfattn_lora", "v"), "v_proj": ("selfattn_lora", "v"),
    "intermediate.dense": ("intermediate_lora", None), "fc1": ("intermediate_lora", None),
    "up_proj": ("intermediate_lora", None), "output.dense": ("output_lora", None), "fc2": ("output_lora", None),
    "down_proj": ("output_lora", None),
}  # fmt: skip


def recognises(path: str) -> bool:
    """Return True for a folder with AdapterHub's adapter or fusion of adapters.

    An adapter has adapter_config.json with a dict `config` and `version`, and without `peft_type`; a fusion has
    adapter_fusion_config.json, which is not read. A damaged adapter_config.json raises CheckpointError.
    """
    config = os.path.join(path, CONFIG)
    if os.path.isfile(os.path.join(path, FUSION)):
        return True
    if not os.path.isdir(path) or not os.path.exists(config):
        return False
    fields = read_object(config)
    return "peft_type" not in fields and isinstance(fields.get("config"), dict) and "version" in fields


def read(path: str, base: Base | None = None) -> AdapterFile:
    """Read a folder. Its head becomes whole tensors if the base has the same head; else its keys are unknown keys.

    Raises:
        CheckpointError: a file is missing or damaged, or the architecture is none that graft reads.
        BaseNeededError: a bottleneck or ReFT needs the base's names, or a fusion the model with its bottlenecks.
    """
    out = read_without_head(path, base)
    add_head(out, base)
    return out


def read_without_head(path: str, base: Base | None) -> AdapterFile:
    """Read a folder without its head.

    A file of a fusion makes it a fusion; else the config's architecture says LoRA, (IA)³ or ReFT, and no architecture
    but a `reduction_factor` a bottleneck.

    (IA)³ is LoRA with composition_mode "scale": its vector is lora_B times alpha, as a column in lora_B's dtype, and
    the file's config is replaced by `peft_type` "IA3", `feedforward_modules` [] and the sorted modules as
    `target_modules`. A missing alpha is 1. Tensors of another adapter name than the config's go to `unknown_keys`; a
    config without a name accepts any.

    Raises:
        CheckpointError: another architecture, r below 1 or no numbers, a missing or damaged file, or a module without
            its factors.
        BaseNeededError: a fusion, bottleneck or ReFT without a base, see `read`.
    """
    if os.path.isfile(os.path.join(path, FUSION)):
        return adapterhub_places.read_fusion(
            path, read_object(os.path.join(path, FUSION)), read_first_file(path, FUSION_FILES), base
        )
    fields = read_object(os.path.join(path, CONFIG))
    config = fields["config"]
    architecture = config.get("architecture")
    at_places = architecture == "reft" or (architecture is None and "reduction_factor" in config)
    if architecture != "lora" and not at_places:
        raise CheckpointError(
            f"{path} is an adapter of architecture {architecture!r}: graft reads LoRA, (IA)³, bottlenecks and ReFT."
        )
    tensors = read_first_file(path, FILES)
    if at_places:
        return adapterhub_places.read(path, fields, tensors, base)
    scales = config.get("composition_mode") == "scale"
    out = AdapterFile(NAME, path, "IA3" if scales else "LORA", config=fields, base=fields.get("model_name") or None)
    name = re.escape(str(fields["name"])) if "name" in fields else "[^.]+"
    modules = out.group_by_module(tensors, re.compile(rf"(.+)\.loras\.{name}\.(lora_[AB])").fullmatch)
    r, alpha = config.get("r"), config.get("alpha", 1)
    if not isinstance(r, int) or r < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{path}: r is {r!r} and alpha {alpha!r}. Edit {CONFIG}.")
    for module, of_module in modules.items():
        if scales:
            if "lora_B" not in of_module:
                raise make_damage_error(f"{path} has no vector for '{module}': it is cut off")
            vector = of_module["lora_B"].read().astype("f8").reshape(-1, 1) * alpha
            out.modules[module] = OtherMethod(
                "IA3", {"ia3_l": make_tensor(vector.astype("f4"), of_module["lora_B"].dtype)}
            )
        else:
            out.modules[module] = read_factors(path, module, of_module, r, alpha)
    if scales:  # these scale outputs everywhere; PEFT scales the inputs of feed-forward layers
        out.config = {"peft_type": "IA3", "feedforward_modules": [], "target_modules": sorted(modules)}
    return out


def read_first_file(path: str, files: tuple[str, ...]) -> Mapping[str, Tensor]:
    """Return the tensors of the first of these files that a folder has. Raises CheckpointError if it has none."""
    file = take_first(path, files)
    if file is None:
        raise make_damage_error(f"{path} holds neither {' nor '.join(files)}")
    return read_tensors(file)[0]


def take_first(path: str, files: tuple[str, ...]) -> str | None:
    """Return the path of the first of these files that exists in a folder; None if none does."""
    return next((where for name in files if os.path.exists(where := os.path.join(path, name))), None)


def add_head(out: AdapterFile, base: Base | None) -> None:
    """Add the head in an adapter's folder to `out.full`, in place, and set `modules_to_save` of a config with
    `peft_type` to its modules.

    The head's config gives the names in the model; without one, tensors keep theirs. Tensors with the base's values are
    left out. If names are unknown, or a base is given that lacks such a tensor or has another shape, all keys go to
    `out.unknown_keys`. Without a head file nothing happens.
    """
    file = take_first(out.path, HEAD_FILES)
    if file is None:
        return
    tensors = read_tensors(file)[0]
    config = os.path.join(out.path, HEAD)
    said = read_object(config).get("config") if os.path.exists(config) else None
    names = {key: key for key in tensors} if said is None else head_names(tensors, said, base)
    if names is None or (base is not None and any(base.shapes.get(names[k]) != t.shape for k, t in tensors.items())):
        out.unknown_keys += [f"{os.path.basename(file)}: {key}" for key in tensors]
        return
    base_tensors: Mapping[str, Tensor] = getattr(base, "tensors", {})
    for key, name in names.items():
        if name not in base_tensors or not np.array_equal(base_tensors[name].read(), tensors[key].read()):
            out.full[name] = tensors[key]
    if out.full and "peft_type" in out.config:
        out.config["modules_to_save"] = sorted({name.rpartition(".")[0] for name in out.full})


def head_names(tensors: Collection[str], config: Json, base: Base | None) -> dict[str, str] | None:
    """Return the base's tensor names by those of AdapterHub's head; a multilabel head counts as the plain one.

    The head's layers are taken in the order of the numbers in the keys. Returns None in these cases:

    - The table has no such head.
    - The base's class has another head. It is the class of its model, else the first of `architectures`; without a base
      it is "".
    - A field of the config differs.
    - A key does not end in ".<number>.<leaf>" after another part.
    - The keys have more or fewer numbers than the head has layers.
    """
    kind = str(config.get("head_type")).removeprefix("multilabel_")
    pattern, layers, facts = HEADS.get((kind, config.get("layers", 0)), ("", (), {}))
    model = getattr(base, "model", None)
    of_base = (base.config.get("architectures") or [""])[0] if base else ""
    if not re.fullmatch(pattern, str(of_base) if model is None else type(model).__name__):
        return None
    ends = {key: match for key in tensors if (match := re.fullmatch(r".*\.([0-9]{1,9})\.([^.]+)", key))}
    numbers = sorted({int(end[1]) for end in ends.values()})
    if any(config.get(name) != value for name, value in facts.items()) or len(numbers) != len(layers):
        return None
    if len(ends) != len(tensors):
        return None
    return {key: f"{layers[numbers.index(int(end[1]))]}.{end[2]}" for key, end in ends.items()}


def read_factors(path: str, module: str, factors: dict[str, Tensor], r: int, alpha: float) -> LowRank:
    """Return a module's factors, with scale alpha / r.

    Raises:
        CheckpointError: a factor is missing, or the shapes do not fit each other and r, as in a fused projection.
    """
    A, B = get_factor_pair(factors, ("lora_A", "lora_B"), path, module)
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1] or A.shape[0] % r:
        raise make_shape_error(path, module, A, B, f"of rank {r}")
    if A.shape[0] != r:
        raise CheckpointError(
            f"{path}: '{module}' has {A.shape[0]} rows of A for rank {r}: a fused projection, with parts that "
            "graft does not know. Train it anew without the fusion."
        )
    return LowRank(A, B, alpha / r)


def write(adapter: AdapterFile, path: str, base: Base | None = None, lossy: bool = False) -> list[str]:
    """Write a folder with adapter_config.json and pytorch_adapter.bin, which is made if needed, for an adapter called
    "default".

    Ranks are made equal by padding, and scales by folding them into B. Return descriptions of the losses.

    The config has alpha = scale · rank of the first module, and for (IA)³ r = alpha = 1 with composition_mode "scale".

    Args:
        base: gives sizes and classes for the config; may be None.

    Raises:
        LossError: without `lossy`, a module has no field in the config (it knows query, key, value, and the two layers
            of an MLP), or an (IA)³ vector is for inputs. Or nothing is left.
    """
    fitted, lost = fit_to_format(adapter, HOLDS, NAME, lossy)
    modules = fitted.modules
    fields: Json = {"selfattn_lora": False, "intermediate_lora": False, "output_lora": False}
    letters: set[str] = set()
    tensors: dict[str, object] = {}
    for module, m in modules.items():
        place = find_config_field(module)
        if place is None or (isinstance(m, OtherMethod) and m.tensors["ia3_l"].shape[-1] != 1):
            lost.append(LostModule(f"no place in the config of AdapterHub: {module}"))
            continue
        fields[place[0]] = True
        letters |= {place[1]} if place[1] else set()
        stem = f"{module}.loras.default"
        if isinstance(m, OtherMethod):
            tensors[f"{stem}.lora_B"] = to_torch(
                make_tensor(np.ascontiguousarray(m.tensors["ia3_l"].read().reshape(-1, 1)))
            )
        else:
            tensors |= {f"{stem}.lora_A": to_torch(m.A), f"{stem}.lora_B": to_torch(m.B)}
    check_losses(adapter, NAME, lost, lossy, tensors)
    first = next(iter(modules.values()))
    numbers = (1, 1.0) if isinstance(first, OtherMethod) else (first.rank, first.scale * first.rank)
    config = {
        "architecture": "lora", "r": numbers[0], "alpha": round_alpha(numbers[1]), "attn_matrices": sorted(letters),
        "composition_mode": "scale" if isinstance(first, OtherMethod) else "add", "dropout": 0.0, "dtype": None,
        "init_weights": "ia3" if isinstance(first, OtherMethod) else "lora", "leave_out": [], "use_gating": False,
        **fields,
    }  # fmt: skip
    facts = base.config if base else {}
    text = {
        "config": config, "name": "default", "version": "adapters.1.3.0", "model_name": adapter.base or "",
        "hidden_size": facts.get("hidden_size"), "model_class": (facts.get("architectures") or [None])[0],
        "model_type": facts.get("model_type"),
    }  # fmt: skip
    os.makedirs(path, exist_ok=True)
    write_torch(os.path.join(path, FILES[1]), tensors)
    replace_file(os.path.join(path, CONFIG), json.dumps(text, indent=2, sort_keys=True) + "\n")
    return lost


def find_config_field(module: str) -> tuple[str, str | None] | None:
    """Return the config's field of a module, and its letter in attn_matrices or None; None if the config cannot name
    it.

    The field is selfattn_lora, with the letter q, k or v, intermediate_lora or output_lora, by the path's end in whole
    parts. A path with "attention.output" anywhere is never named.
    """
    if "attention.output" in module:  # their config cannot name this layer
        return None
    return next((place for end, place in PLACES.items() if f".{module}".endswith(f".{end}")), None)
