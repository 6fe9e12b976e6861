# SPDX-License-Identifier: Apache-2.0
"""Control vectors of llama.cpp and repeng in GGUF: steering vectors, one for each block but the first."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from graft import BaseModelMismatchError, CheckpointError
from graft.config.reading import Json
from graft.files.formats import Base
from graft.files.holding import check_lost
from graft.files.neutral import AdapterFile, LostModule, Other
from graft.files.tensors import Tensor, tensor

ARCHITECTURE = "controlvector"
DIRECTION = re.compile(r"direction\.(\d{1,9})")
VECTOR = "steering_vector"


def read(path: str, fields: dict[str, object], tensors: Mapping[str, Tensor], base: Base | None) -> AdapterFile:
    """Read control vectors: `direction.N` is added to the output of block N.

    Raises:
        BaseNeededError: there is no base, whose blocks they count.
        BaseModelMismatchError: the base has no such block, or other widths.
        CheckpointError: it has no directions.
    """
    from graft.files.formats.adapterhub_places import blocks_of  # loads torch, which a look at headers does not need

    blocks, base = blocks_of(path, base)
    out = AdapterFile("gguf", path, "STEERING", config={"peft_type": "STEERING", "inference_mode": True})
    for name, values in tensors.items():
        match = DIRECTION.fullmatch(name)
        if match is None:
            out.unread.append(name)
            continue
        number = int(match[1])
        if number >= len(blocks) or values.shape != (blocks[number].width,):
            size = f"{len(blocks)} blocks of width {blocks[0].width}" if blocks else "no blocks"
            raise BaseModelMismatchError(f"{path} has {name} of shape {values.shape}, and {base.path} has {size}.")
        out.modules[blocks[number].path] = Other("STEERING", {VECTOR: values})
    if not out.modules:
        raise CheckpointError(f"{path} is a control vector without a direction.")
    numbers = [i for i, block in enumerate(blocks) if block.path in out.modules]
    out.config |= {"target_modules": "places", "layers": numbers}
    out.selected = frozenset(out.modules)
    return out


def vectors(adapter: AdapterFile, base: Base | None, lossy: bool) -> tuple[dict[str, Tensor], Json, list[str]]:
    """Return steering vectors times their coefficient, by the number of their block, a file's fields, and what is lost.

    Raises:
        BaseNeededError: there is no base, whose blocks count.
        LossError: a vector acts elsewhere than after a block or after the first one, or in another way than by adding.
    """
    from graft.files.formats.adapterhub_places import blocks_of

    blocks, base = blocks_of(adapter.path, base)
    numbers = {block.path: i for i, block in enumerate(blocks)}
    cfg, found, lost = adapter.config, dict[int, Tensor](), [f"the key '{key}'" for key in adapter.unread]
    lost += [f"{name}={cfg[name]}" for name in ("normalize", "min_token_index") if cfg.get(name)]
    for module, m in adapter.modules.items():
        number = numbers.get(module, 0)
        vector = m.tensors[VECTOR] if isinstance(m, Other) else None
        if number and vector is not None:
            found[number] = tensor(vector.read().astype("f4") * np.float32(cfg.get("coefficient", 1.0)), "F32")
        elif vector is None or vector.read().any():
            place = "the first block" if module in numbers else "no block"
            lost.append(LostModule(f"{module}, which is {place}"))
    check_lost(adapter, "gguf", lost, lossy, found)
    hint = {f"{ARCHITECTURE}.model_hint": str(base.config.get("model_type", ""))}
    fields: Json = hint | {f"{ARCHITECTURE}.layer_count": len(found)}
    return {f"direction.{number}": values for number, values in sorted(found.items())}, fields, lost
