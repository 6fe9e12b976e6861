# SPDX-License-Identifier: Apache-2.0
"""litgpt, read only: lit_model.pth.lora and two YAML files; q, k and v are one product with a block for each."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from graft import CheckpointError
from graft.config.reading import LARGEST_NUMBER, Json, check_value, open_file
from graft.core.errors import join_some, shorten_text
from graft.files.errors import make_damage_error
from graft.files.formats import Base
from graft.files.holding import get_factor_pair, make_shape_error
from graft.files.neutral import AdapterFile, LowRank
from graft.files.pickles import convert_tensors, mentions_name, read_torch
from graft.files.tensors import Tensor, make_tensor

NAME = "litgpt"
FILE, OF_RUN, OF_MODEL = "lit_model.pth.lora", "hyperparameters.yaml", "model_config.yaml"
FOLDER = (FILE,), (OF_RUN, OF_MODEL)
KEY = re.compile(r"(.+)\.lora_([AB])")
OWN = re.compile(r"transformer\.h\.(?P<number>\d+)\.(?P<rest>.+)")
NAMES = {"attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj",
         "mlp.proj": "mlp.down_proj"}  # fmt: skip
QKV = {"self_attn.q_proj": "lora_query", "self_attn.k_proj": "lora_key", "self_attn.v_proj": "lora_value"}
MLPS = ("LLaMAMLP", "GemmaMLP")  # MLP classes of litgpt with the names above in transformers
LARGEST = 2**16  # bytes of a YAML file


def find_checkpoint(path: str) -> str | None:
    """Return the path of lit_model.pth.lora, for that file itself or a folder with it; else None."""
    where = os.path.join(path, FILE) if os.path.isdir(path) else path
    return where if os.path.basename(where) == FILE and os.path.isfile(where) else None


def recognises(path: str) -> bool:
    """Return True if there is a lit_model.pth.lora that mentions ".lora_A". It is not loaded."""
    file = find_checkpoint(path)
    return file is not None and mentions_name(file, b".lora_A")


def read_yaml(path: str) -> Json:
    """Return the content of a YAML file: a dict of plain values, each named once. The package yaml is imported here.

    Raises:
        CheckpointError: it is missing, damaged, larger than 64 KiB, no mapping, or holds other values. Also if it has
            an alias, since a few bytes of aliases can become gigabytes.
    """
    import yaml

    if not os.path.exists(path):
        raise CheckpointError(f"{path} is not there: litgpt's weights do not say scale and projections. Copy it, too.")
    with open_file(path) as f:
        text = f.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise CheckpointError(f"{path} has more than {LARGEST:,} bytes: it is no config. Copy it again.")
    try:
        fields = yaml.load(text, plain_loader())
    except Exception as e:  # odd tags, dates and numbers raise errors of many types
        raise CheckpointError(f"{path} is damaged, or holds more than plain values: {shorten_text(str(e))}") from None
    if not isinstance(fields, dict):
        raise make_damage_error(f"{path} holds a {type(fields).__name__}, not the fields of a config")
    check_value(fields, path, "", 0)
    return fields


def plain_loader() -> Any:
    """Return a new YAML loader class, derived from SafeLoader, that refuses aliases, and names that are in one mapping
    twice, with YAMLError.
    """
    import yaml

    class PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
        """A safe loader without aliases and repeated names."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            """Return the next node. Raises YAMLError for an alias, or a mapping with one name twice."""
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it has an alias. Write the value itself")
            node = super().compose_node(parent, index)
            names = [str(key.value) for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
            if len({*names}) < len(names):
                raise yaml.YAMLError(f"a name stands twice among {join_some(names)}")
            return node

    return PlainLoader


def read(path: str, base: Base | None = None) -> AdapterFile:
    """Read a folder, or the file of weights in it, together with hyperparameters.yaml (the run) and model_config.yaml
    of the folder.

    Modules get transformers' names, and the scale is alpha / r.

    The qkv module is split into q, k and v. Modules other than qkv, those of NAMES and lm_head go to `unknown_keys`.
    The config is that of the run, and the base's name that of the model.

    Raises:
        CheckpointError: one of the three files is missing or damaged, or the model's MLP class is neither LLaMAMLP nor
            GemmaMLP. Also if
            lora_r is no positive int, alpha is no number, or factors are missing, not 2-D or of another rank.
    """
    file = find_checkpoint(path) or path
    folder = os.path.dirname(file)
    run, model = read_yaml(os.path.join(folder, OF_RUN)), read_yaml(os.path.join(folder, OF_MODEL))
    if model.get("mlp_class_name") not in MLPS:
        raise CheckpointError(
            f"{path} is for a model with the MLP {model.get('mlp_class_name')!r}: graft knows litgpt's names of those "
            f"with {' or '.join(MLPS)}."
        )
    loaded = read_torch(file)
    tensors = convert_tensors(loaded.get("model", loaded) if isinstance(loaded, dict) else loaded, file)
    out = AdapterFile(NAME, path, config=run, base=model.get("name"))
    r: Any = run.get("lora_r")
    alpha = run.get("lora_alpha", "none")
    has_rank = type(r) is int and 1 <= r <= LARGEST_NUMBER
    if not has_rank or type(alpha) not in (int, float) or abs(alpha) > LARGEST_NUMBER:
        raise CheckpointError(
            f"{os.path.join(folder, OF_RUN)}: lora_r is {r!r} and lora_alpha {alpha!r}. Write positive numbers there."
        )
    for name, of_module in out.group_by_module(tensors, KEY.fullmatch).items():
        A, B = get_factor_pair(of_module, "AB", file, name)
        if len(A.shape) != 2 or len(B.shape) != 2:
            raise make_shape_error(file, name, A, B)
        match = OWN.fullmatch(name)
        if match is not None and match["rest"] == "attn.qkv":
            stem = f"model.layers.{match['number']}."
            for suffix, (a, b) in split_qkv(path, name, A, B, r, run, model).items():
                out.modules[stem + suffix] = LowRank(a, b, alpha / r)
        elif name == "lm_head" or (match is not None and match["rest"] in NAMES):
            if A.shape[0] != r or B.shape[1] != r:
                raise make_shape_error(file, name, A, B, f"of rank {r}")
            inner = name if match is None else f"model.layers.{match['number']}.{NAMES[match['rest']]}"
            out.modules[inner] = LowRank(A, B, alpha / r)
        else:
            out.unknown_keys += [f"{name}.lora_{side}" for side in of_module]
    return out


def split_qkv(
    path: str, name: str, A: Tensor, B: Tensor, r: int, run: Json, model: Json
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors of q, k and v as separate pairs, for those that the run adapted (lora_query, lora_key,
    lora_value): r rows of A each, and their rows of B.

    Raises:
        CheckpointError: the shapes do not fit r and the config of the run.
    """
    rows = count_qkv_rows(model)
    on = [suffix for suffix, flag in QKV.items() if run.get(flag)]
    if A.shape[0] != r * len(on) or B.shape != (sum(rows[suffix] for suffix in on), r):
        raise make_shape_error(
            path, name, A, B, f"which do not fit rank {r} on {join_some(on)}: {OF_RUN} is of another run"
        )
    a, b = A.read(), B.read()
    out, row = {}, 0
    for i, suffix in enumerate(on):
        out[suffix] = make_tensor(a[i * r : (i + 1) * r], A.dtype), make_tensor(b[row : row + rows[suffix]], B.dtype)
        row += rows[suffix]
    return out


def count_qkv_rows(model: Mapping[str, object]) -> dict[str, int]:
    """Return the number of rows of self_attn.q_proj, k_proj and v_proj by litgpt's config of a model: heads · head
    size, and for k and v groups · head size.

    Groups default to the heads, the head size to n_embd // n_head.

    Raises:
        CheckpointError: one of the three numbers is missing or not positive.
    """
    heads, width = model.get("n_head"), model.get("n_embd")
    groups = model.get("n_query_groups") or heads
    size = model.get("head_size") or (
        width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None
    )
    if not all(isinstance(n, int) and n > 0 for n in (heads, groups, size)):
        raise CheckpointError(f"{OF_MODEL} does not say the number and size of the model's heads. Copy it again.")
    q, kv = heads * size, groups * size  # type: ignore[operator]
    return {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
