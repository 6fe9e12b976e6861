# SPDX-License-Identifier: Apache-2.0
"""What an adapter file says, whatever its format: the one form between all readers and writers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from graft.config.reading import Json
from graft.files.tensors import Tensor

Kind = Literal["linear", "conv", "embedding", "experts"]


@dataclass
class LowRank:
    """What LoRA adds to the weight of a module: ΔW = scale · B A, with W (out, in).

    Attributes:
        A: (r, in); of a convolution (r, in, *kernel); of an embedding (r, vocabulary); of experts (E, r, in).
        B: (out, r); of a convolution (out, r, 1, …); of an embedding (dim, r); of experts (E, out, r).
        scale: whatever alpha, rank and rsLoRA make of it.
        magnitude: DoRA's, (out,).
        bias: that the second factor adds, (out,), times `scale`.
        mid: Tucker's core of a convolution, (r, r, *kernel); A is (r, in, 1, …) then.
        alpha: what the file says, where `scale` does not tell it.
        extra: further tensors of PEFT's variants, by their names there: "lora_velora_embed".
    """

    method: ClassVar[str] = "LORA"
    A: Tensor
    B: Tensor
    scale: float
    kind: Kind = "linear"
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    mid: Tensor | None = None
    alpha: float | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.A.shape[1 if self.kind == "experts" else 0]

    @property
    def shift(self) -> tuple[Tensor, Tensor] | None:
        """A and B of what an initialisation took out of the base (PiSSA): ΔW of the base as it was is scale · B A less
        their product."""
        if "lora_shift.A" not in self.extra:
            return None
        return self.extra["lora_shift.A"], self.extra["lora_shift.B"]


@dataclass
class OtherMethod:
    """What a method that is not LoRA keeps for a module: its tensors, by the names that PEFT's files give them."""

    kind: ClassVar[str] = "other"
    method: str  # PEFT's peft_type, or that of a method or variant that has none: "LOHA", "KASA", "BOTTLENECK"
    tensors: dict[str, Tensor]  # "hada_w1_a"
    scale: float | None = None  # where the method has one

    @property
    def rank(self) -> int:
        """The rank of LoHa, or of LoKr's second factor, or its first; 0 where both are whole, and of other methods."""
        return next((self.tensors[k].shape[0] for k in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if k in self.tensors), 0)


class LostModule(str):
    """A line on a module that a format leaves out whole. A line on a part of a module is a plain text."""


@dataclass
class AdapterFile:
    """An adapter that was read from a file, or is about to be written to one.

    Attributes:
        method: PEFT's peft_type of it: "LORA", "LOHA", "PROMPT_TUNING".
        modules: module path of the base model → what the adapter has for it. What acts on a parameter of another name
            than `weight`, such as a stack of experts, has that behind the path: "model.layers.0.mlp.experts.down_proj".
        full: name of a tensor of the base model → its trained value: heads, norms, biases.
        rows: name of an embedding's weight → (their indices, their values (n, dim)).
        shared: tensors that belong to no module: prompts, projections of all layers; by name in the file.
        config: the fields of the file's own config, as they are.
        metadata: of a safetensors file.
        unknown_keys: keys that the reader knows no meaning of. Writers refuse to drop them in silence.
        changed_base: an initialisation that changed the base, by PEFT's name, where the file does not say how: ΔW is
            that of a base which only this initialisation makes.
        selected: the modules that the targets in `config` select; None where it is no config of PEFT.
        by_parameter: modules that a config of PEFT names as parameters ("mlp.gate_proj.weight"), since PEFT takes their
            names for those of experts.
        is_server_layout: stacks of experts stand in the file as servers have them.
        is_pipeline: paths begin with the part of a pipeline: "unet.", "text_encoder_2.".
        has_flat_names: `modules` has the file's own names, which are no paths: only a base model's names make paths
            of them.
    """

    format: str
    path: str
    method: str = "LORA"
    modules: dict[str, LowRank | OtherMethod] = field(default_factory=dict)
    full: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    config: Json = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    unknown_keys: list[str] = field(default_factory=list)
    is_server_layout: bool = False
    has_flat_names: bool = False
    is_pipeline: bool = False
    base: str | None = None  # its name or path, where the file says it
    changed_base: str | None = None
    selected: frozenset[str] | None = None
    by_parameter: frozenset[str] = frozenset()

    @property
    def loose_tensors(self) -> list[tuple[str, Tensor]]:
        """The tensors that belong to no adapted module, by name: whole ones, values of rows, shared ones."""
        rows = [(name, values) for name, (_, values) in self.rows.items()]
        return [*self.full.items(), *self.shared.items(), *rows]

    @property
    def low_rank(self) -> dict[str, LowRank]:
        return {path: module for path, module in self.modules.items() if isinstance(module, LowRank)}
