# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of bitsandbytes: codes of 4 bits with a scale for each block, of 8 bits with one for each row.

The package bitsandbytes is not needed: a file holds the table of its codes' values. QLoRA, arXiv 2305.14314, describes
the form and the second quantization of the scales.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graft.config.reading import Json, parse_json
from graft.files.base import BaseDescription
from graft.files.errors import make_damage_error
from graft.files.merging.weights import BaseWeights, of_file, to_file
from graft.files.tensors import Tensor

KINDS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LARGEST_BLOCK = 2**16  # weights with one scale: bitsandbytes has at most 4,096
STATE = ".quant_state.bitsandbytes__"
INT8 = ("SCB", "weight_format")


def is_state(state: object) -> bool:
    """Return True if a JSON value is a valid state of a weight in 4 bits.

    It is a dict with `dtype` float32, float16 or bfloat16, `shape` a list of two ints from 1 to 2³¹ - 1, and
    `blocksize` an int from 1 to 65536. Optional are `nested_blocksize` in the same range and `nested_offset`, an int or
    a float. A bool is no int here.
    """
    if not isinstance(state, dict) or state.get("dtype") not in (*KINDS,) or not isinstance(state.get("shape"), list):
        return False
    blocks = state.get("blocksize"), state.get("nested_blocksize", 1)
    return (
        len(state["shape"]) == 2
        and all(type(n) is int and 0 < n < 2**31 for n in state["shape"])
        and all(type(n) is int and 0 < n <= LARGEST_BLOCK for n in blocks)
        and type(state.get("nested_offset", 0.0)) in (int, float)
    )


class Form(BaseWeights):
    """The weights of a checkpoint of bitsandbytes: in 4 bits (NF4, FP4), in 8 bits (LLM.int8), or plain."""

    form = "bitsandbytes"

    def __init__(self, base: BaseDescription, config: Mapping[str, object]):
        """Find the packed weights: 4 bits by their quant_state tensor, and 8 bits by their scales `SCB`.

        The states of 4 bits are read. `packed` gets the names of their parts.

        `shapes` gets the dense shapes of 4-bit weights, and loses the tensors of scales and tables. `config` is not
        read.

        Raises:
            CheckpointError: a weight's codes are missing, or its state is invalid.
        """
        super().__init__(base)
        self.states: dict[str, Json] = {}
        for key in base.tensors:
            name, has_state, _ = key.partition(STATE)
            if has_state:
                self._four(name, key)
            elif key.endswith(".SCB"):
                name = f"{key.removesuffix('SCB')}weight"
                parts = [f"{key.removesuffix('SCB')}{end}" for end in INT8]
                self.packed[name] = [name, *(part for part in parts if part in base.tensors)]
        for name, parts in self.packed.items():
            if name not in base.tensors:
                raise make_damage_error(f"{base.path} has '{parts[1]}' and no '{name}'")
            for part in parts[1:]:
                self.shapes.pop(part, None)

    def _four(self, name: str, key: str) -> None:
        """Add the weight `name` in 4 bits, with the state in tensor `key`, to `states`, `packed` and `shapes`.

        Raises:
            CheckpointError: the state is invalid, or the codes, the scales (absmax) or the table (quant_map) are
                missing.
        """
        where = f"'{key}' of {self.base.path}"
        state = parse_json(bytes(self.base.tensors[key].load()), where)
        if not is_state(state) or not {name, f"{name}.absmax", f"{name}.quant_map"} <= self.base.tensors.keys():
            raise make_damage_error(f"{where} does not say how its codes are packed")
        state["dtype"], self.shapes[name] = KINDS[state["dtype"]], tuple(state["shape"])
        self.states[name] = state
        ends = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        self.packed[name] = [name, *(p for end in ends if (p := f"{name}.{end}") in self.base.tensors), key]

    def unpack(self, name: str, parts: Mapping[str, Tensor]) -> torch.Tensor:
        """Return the dense weight (out, in) in float32.

        8 bits: codes times the row's scale / 127. 4 bits: two codes in a byte, the high one first, looked up in the
        file's table and multiplied by the block's scale. The result is rounded to the state's dtype, since training saw
        it so.
        """
        if name not in self.states:
            scale = of_file(parts[f"{name.removesuffix('weight')}SCB"]).float()
            return of_file(parts[name]).float() * (scale / 127)[:, None]
        state = self.states[name]
        byte = of_file(parts[name]).flatten().view(torch.uint8)
        table = of_file(parts[f"{name}.quant_map"]).float()
        n, size = state["shape"][0] * state["shape"][1], state["blocksize"]
        W = table[torch.stack([byte >> 4, byte & 15], 1).flatten().long()[:n]]
        scale = self._scales(name, parts)
        W = torch.nn.functional.pad(W, (0, -n % size)).view(-1, size).mul_(scale[:, None]).flatten()[:n]
        return W.to(state["dtype"]).float().view(state["shape"])  # rounded as training saw it

    def _scales(self, name: str, parts: Mapping[str, Tensor]) -> torch.Tensor:
        """Return the scale of each block in float32.

        If the scales are quantized themselves, each is the table's value times the scale of its outer block, plus the
        offset.
        """
        absmax, state = of_file(parts[f"{name}.absmax"]), self.states[name]
        if f"{name}.nested_absmax" not in parts:
            return absmax.float()
        values = of_file(parts[f"{name}.nested_quant_map"]).float()[absmax.long()]
        outer = of_file(parts[f"{name}.nested_absmax"]).float()
        return values * outer.repeat_interleave(state["nested_blocksize"])[: len(values)] + state["nested_offset"]

    def pack(self, name: str, W: torch.Tensor) -> dict[str, Tensor]:
        """Return the tensors of a packed weight for the dense `W`, with new codes and scales.

        Tables and state are the old ones. New scales are float32, unless the old 4-bit ones were quantized themselves.

        8 bits: the scale is the row's largest absolute value. 4 bits: W is rounded to the state's dtype, the scale is
        the block's largest absolute value, and each code is that of the nearest value in the table. The codes keep
        dtype and shape; an odd last one is paired with code 0. Rows and blocks of zeros get the scale 0, without an
        error.
        """
        old = self.parts(name)
        if name not in self.states:
            scale = W.abs().amax(1)
            codes = (W / scale.clamp_min(1e-30)[:, None] * 127).round_().to(torch.int8)
            return old | {name: to_file(codes), f"{name.removesuffix('weight')}SCB": to_file(scale.float())}
        state, table = self.states[name], of_file(old[f"{name}.quant_map"]).float()
        codes, scale = encode_blocks(W.to(state["dtype"]).float().flatten(), state["blocksize"], table)
        codes = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2)
        form = of_file(old[name])
        parts = {name: to_file((codes[:, 0] << 4 | codes[:, 1]).to(torch.uint8).view(form.dtype).view(form.shape))}
        return old | parts | self._pack_scales(name, scale, old)

    def _pack_scales(self, name: str, scale: torch.Tensor, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of new scales `scale` (blocks,): plain absmax, or quantized if the old ones were.

        Quantized scales keep the old offset. Each outer block gets its largest absolute remainder as scale.
        """
        if f"{name}.nested_absmax" not in old:
            return {f"{name}.absmax": to_file(scale)}
        state, table = self.states[name], of_file(old[f"{name}.nested_quant_map"]).float()
        remainder = scale - state["nested_offset"]  # that of the file: a mean of much the same scales
        codes, outer = encode_blocks(remainder, state["nested_blocksize"], table)
        return {f"{name}.absmax": to_file(codes.to(torch.uint8)), f"{name}.nested_absmax": to_file(outer)}


def encode_blocks(values: torch.Tensor, size: int, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a code for each value of a vector, and the scale of each block of `size` values: its largest absolute
    value.

    A code is the index in `table` of the entry nearest to value / scale; midway between two, that of the lower one. The
    table may be in any order. A block of zeros has the scale 0, and its values count as 0.
    """
    blocks = torch.nn.functional.pad(values, (0, -len(values) % size)).view(-1, size)
    scale = blocks.abs().amax(1)
    ordered, places = table.sort()
    at = torch.bucketize(blocks / scale.clamp_min(1e-30)[:, None], (ordered[1:] + ordered[:-1]) / 2)
    return places[at].flatten()[: len(values)], scale
