# SPDX-License-Identifier: Apache-2.0
"""The neutral form of an adapter file. Readers convert to it, and writers from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from graft.config.reading import Json
from graft.files.tensors import Tensor

Kind = Literal["linear", "conv", "embedding", "experts"]


@dataclass
class LowRank:
    """The LoRA update of one module's weight: ΔW = scale · B A, for W (out, in).

    Attributes:
        A: (r, in); of a convolution (r, in, *kernel); of an embedding (r, vocabulary); of experts (E, r, in).
        B: (out, r); of a convolution (out, r, 1, …); of an embedding (dim, r); of experts (E, out, r).
        scale: the final factor, from alpha, rank and rsLoRA.
        magnitude: of DoRA, (out,).
        bias: a bias of the second factor, (out,); it is multiplied by `scale`.
        mid: a Tucker core of a convolution, (r, r, *kernel); A then is (r, in, 1, …).
        alpha: the file's alpha, where it does not follow from `scale`.
        extra: further tensors of PEFT's variants, by their names in the file, such as "lora_velora_embed".
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
        """The rank r of the factors: the first size of A, or the second for experts: their number is first."""
        return self.A.shape[1 if self.kind == "experts" else 0]

    @property
    def shift(self) -> tuple[Tensor, Tensor] | None:
        """The factors (A, B) of the part of the base that an initialisation such as PiSSA removed; None without one.

        For the original base, ΔW is scale · B A minus their product.
        """
        if "lora_shift.A" not in self.extra:
            return None
        return self.extra["lora_shift.A"], self.extra["lora_shift.B"]


@dataclass
class OtherMethod:
    """The tensors of one module for a method other than LoRA, by their names in PEFT's files."""

    kind: ClassVar[str] = "other"
    method: str  # PEFT's peft_type, or graft's name of a variant without one: "LOHA", "KASA", "BOTTLENECK"
    tensors: dict[str, Tensor]  # "hada_w1_a"
    scale: float | None = None  # if the method has one

    @property
    def rank(self) -> int:
        """The rank of LoHa, or of LoKr's second or else first factor; 0 for two full factors and for other methods."""
        return next((self.tensors[k].shape[0] for k in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if k in self.tensors), 0)


class LostModule(str):
    """A description of a module that a format drops completely. A lost part of a module is a plain str."""


@dataclass
class AdapterFile:
    """An adapter that was read from a file, or will be written to one.

    Attributes:
        format: name of the file's format.
        path: of the file or folder, for messages.
        method: PEFT's peft_type: "LORA", "LOHA", "PROMPT_TUNING".
        modules: module path in the base model → the adapter's tensors for it. For a parameter other than `weight`, such
            as a stack of experts, its name is part of the path: "model.layers.0.mlp.experts.down_proj".
        full: tensor name in the base model → its trained value: heads, norms, biases.
        rows: name of an embedding's weight → (token indices, their values (n, dim)).
        shared: tensors that belong to no module (prompts, projections of all layers), by name in the file.
        config: the fields of the file's config, unchanged.
        metadata: of a safetensors file.
        unknown_keys: keys without a known meaning. Writers refuse to drop them.
        changed_base: PEFT's name of an initialisation that changed the base, if the file does not describe the change.
        selected: the modules that the targets in `config` select; None if it is no config of PEFT.
        by_parameter: modules that PEFT's config names as parameters ("mlp.gate_proj.weight"), since PEFT would take
            their names for experts.
        is_server_layout: stacks of experts have the layout of servers.
        is_pipeline: paths begin with a pipeline part: "unet.", "text_encoder_2.".
        has_flat_names: `modules` has the file's own names, and no paths. A base model turns them into paths.
        base: name or path of the base, if the file has it.
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

    def group_by_module(
        self, tensors: Mapping[str, Tensor], split: Callable[[str], re.Match[str] | tuple[str, str] | None]
    ) -> dict[str, dict[str, Tensor]]:
        """Return module → name → tensor.

        A key is added to `unknown_keys` if `split` returns None. Of two keys with one place the later counts.

        split: returns module and name of a key, as a pair or as a match with two groups.
        """
        groups: dict[str, dict[str, Tensor]] = {}
        for key, t in tensors.items():
            if (place := split(key)) is None:
                self.unknown_keys.append(key)
                continue
            module, name = place.groups() if isinstance(place, re.Match) else place
            groups.setdefault(module, {})[name] = t
        return groups

    @property
    def loose_tensors(self) -> list[tuple[str, Tensor]]:
        """Pairs of name and tensor for all tensors outside of `modules`: whole tensors, shared tensors, values of token
        rows.
        """
        rows = [(name, values) for name, (_, values) in self.rows.items()]
        return [*self.full.items(), *self.shared.items(), *rows]

    @property
    def low_rank(self) -> dict[str, LowRank]:
        """The modules that are LowRank, by path, in a new dict."""
        return {path: module for path, module in self.modules.items() if isinstance(module, LowRank)}
