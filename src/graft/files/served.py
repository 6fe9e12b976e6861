# SPDX-License-Identifier: Apache-2.0
"""Stacks of experts in files of servers, and of tinker: 3-D factors under names of parameters or of parts of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graft import CheckpointError
from graft.config.reading import Json
from graft.files.errors import BaseNeededError
from graft.files.tensors import Tensor

if TYPE_CHECKING:
    from graft.files.formats import Base

KEY = re.compile(r".*\bexperts\.(gate_up_proj|gate_proj|up_proj|down_proj|w[123])\.lora_[AB]\.weight")


UNEMBED = re.compile(r"(?:model\.)?unembed_tokens(?=\.lora_)")  # tinker's name of the head


def with_todays_names(tensors: Mapping[str, Tensor], base: Base | None) -> dict[str, Tensor]:
    """Return tensors with the model's names for what tinker calls otherwise: the head, and gpt-oss's attention."""
    own = base is not None and any(m.rpartition(".")[2] == "unembed_tokens" for m in base.modules)
    if own or not any(UNEMBED.search(key) or KEY.fullmatch(key) for key in tensors):
        return dict(tensors)
    known = set() if base is None else {m.rpartition(".")[0].rpartition(".")[2] for m in base.modules}
    out = {}
    for key, t in tensors.items():
        name = UNEMBED.sub("lm_head", key)
        if "self_attn" in known and "attn" not in known:
            name = name.replace(".attn.", ".self_attn.")
        out[name] = t
    return out


def is_served(tensors: Mapping[str, Tensor]) -> bool:
    """Return True if a file has a stack of experts as servers do."""
    return any(len(t.shape) == 3 and KEY.fullmatch(key) for key, t in tensors.items())


def as_trained(
    tensors: Mapping[str, Tensor], config: Json, base: Base | None, what: str
) -> tuple[dict[str, Tensor], Json]:
    """Return tensors and config of a file as PEFT has them.

    Args:
        what: the file, for errors.

    Raises:
        BaseNeededError: there is no base, whose class says which rows are gate's and which are up's.
        CheckpointError: transformers does not know the base.
    """
    if base is None:
        raise BaseNeededError(
            f"{what} has experts as servers hold them, and only the base model says which of its rows are whose: give "
            "it (--base)."
        )
    from graft import PeftConfig
    from graft.files.pickles import from_torch, to_torch
    from graft.files.skeleton import skeleton
    from graft.io.servers import arranged

    model = getattr(base, "model", None) or skeleton(base.path)
    if model is None:
        raise CheckpointError(
            f"{what} has experts as servers hold them, and {base.path} is no model that is known here."
        )
    made: Any = PeftConfig.resolve("LORA")(**{k: v for k, v in config.items() if k != "peft_type"})
    state = arranged({key: to_torch(t) for key, t in tensors.items()}, made, model)
    return {key: from_torch(t, f"'{key}' in {what}") for key, t in state.items()}, made.saved_dict()
