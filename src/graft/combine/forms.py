# SPDX-License-Identifier: Apache-2.0
"""Forms: how the tensors of a method are read as a low-rank product, and written for a new adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from graft.combine.adding import Tensors, make_plain_config, union_configs
from graft.config.base import PeftConfig
from graft.core.errors import ConfigError
from graft.core.folding import EvaluationMode, compute_change, why_no_delta, widen
from graft.core.method import Method
from graft.core.ops import Opaque
from graft.core.site import Site
from graft.kernels.one_product import narrow
from graft.methods import method_of

if TYPE_CHECKING:
    from graft.methods.adalora.adalora import AdaLoraConfig
    from graft.methods.loha import LoHaConfig
    from graft.methods.lora.config import LoraConfig

C = TypeVar("C", bound="PeftConfig")
Parts = list[tuple["Method", float]]  # (method, weight)
Ranks = dict[str, int]  # by layer, or by pattern of its path


@dataclass
class Term:
    """One adapter's part of a combination on one layer: weight · scaling · B A.

    Each group of a convolution is a separate product, and so is each matrix of a stack, all of one rank.

    Attributes:
        A, B: (r, …) and (m, r / groups, …), in float32 at least.
        groups, stack: number of groups, and of matrices in a stack.
        transposed: the layer stores (in, out); random pruning draws in this order.
    """

    A: Tensor  # (r, …), float32 at least
    B: Tensor  # (m, r / groups, …)
    scaling: float
    weight: float
    groups: int = 1
    stack: int = 1
    transposed: bool = False  # the layer stores (in, out); random pruning draws in this order

    @property
    def rank(self) -> int:
        """The rank of each matrix: the rows of A divided by the number of matrices.

        The groups of a convolution count together.
        """
        return len(self.A) // self.stack

    @property
    def highest(self) -> int:
        """The highest rank that an update of this layer can have, over all groups together: groups · min(numbers in a
        row of A, rows of B / groups).
        """
        return self.groups * min(prod(self.A.shape[1:]), len(self.B) // self.groups)

    def product(self) -> tuple[Tensor, Tensor]:
        """Return A (groups, r / groups, n) and B (groups, m / groups, r / groups).

        A term of a stack (`stack` > 1) ignores groups: its A and B are split into one pair for each matrix by
        `Opaque.split_matrices`.
        """
        if self.stack > 1:
            return Opaque.split_matrices(self.A, self.B, self.stack)
        A, B, groups = self.A, self.B, self.groups
        r = len(A) // groups  # may be 0
        return A.reshape(groups, r, prod(A.shape[1:])), B.reshape(groups, len(B) // groups, prod(B.shape[1:]))


class ProductForm(Generic[C]):
    """How adapters of a combination are read, and the new one is written.

    Attributes:
        takes_factors: rules may act on A and B separately.
    """

    takes_factors: ClassVar[bool] = False  # True: rules may act on A and B apart

    def make_config(self, configs: Sequence[C]) -> C:
        """Return `union_configs(configs)`: a copy of the first config that targets the layers of all."""
        return union_configs(configs)

    def why_not(self, m: Method) -> str | None:
        """Return None if a method can be read: its effect is additive, or its class is exactly `method_of` its type, no
        variant.

        Otherwise return the reason.
        """
        if m.effect.additive or type(m) is method_of(m.cfg.peft_type):
            return None
        return f"{type(m).__name__} does more than add a low-rank update"

    def read(self, m: Method, weight: float) -> Term:
        """Return the term of a method with this weight, from its factors."""
        return read_term(m, weight)

    def write(self, A: Tensor, B: Tensor, parts: Parts, cfg: C) -> Tensors:
        """Return the tensors of a new adapter with ΔW = B A, made from `parts`: (method, weight).

        Raises NotImplementedError here: subclasses override it.
        """
        raise NotImplementedError

    def configure(self, cfg: C, ranks: Ranks, patterns: Ranks, configs: Sequence[C]) -> None:
        """Change `cfg` so that it describes the tensors that `write` returns.

        Raises NotImplementedError here: subclasses override it.
        """
        raise NotImplementedError


def read_term(m: Method, weight: float) -> Term:
    """Return the term of a method from its factors, in float32 at least, with the method's scale (1 without one) kept
    apart.

    The factors are read in evaluation mode. Vectors between and around the factors are multiplied in.
    """
    with EvaluationMode(m.layer):
        f = m.factors()
    A, B = f.matrices_without_scale()
    op, module = m.site.op, m.site.module
    stack = op.count_matrices(module) if op.opaque else 1
    scale: Any = 1.0 if f.scale is None else f.scale
    return Term(widen(A), widen(B), scale, weight, op.count_groups(module), stack, op.transposed)


class LoraForm(ProductForm["LoraConfig"]):
    """The form of LoRA: factors and a scaling."""

    takes_factors: ClassVar[bool] = True

    def write(self, A: Tensor, B: Tensor, parts: Parts, cfg: LoraConfig) -> Tensors:
        """Return LoRA's tensors for ΔW = B A, by (container, path), in the form of the config's variant on the first
        part's layer.

        Matrices of a stack of experts are joined first. With `cfg.lora_bias` B's bias is the sum of the parts' shifts,
        each times its weight, or zeros if none has one; not for embeddings.
        """
        m = parts[0][0]
        if m.site.op.opaque and len(B) == m.site.op.count_matrices(m.site.module) > 1 and B.dim() > 2:
            A, B = Opaque.join_matrices(A, B)
        values = method_of(cfg.peft_type).variant(cfg)(m.site, cfg, m.name).holding(A, B)
        if cfg.lora_bias and not m.site.op.takes_ids:
            shifts = [shift * w for m, w in parts if (shift := self.shift(m)) is not None]
            values["lora_B", "bias"] = torch.stack(shifts).sum(0) if shifts else B.new_zeros(m.site.out_features)
        return values

    def shift(self, m: Method) -> Tensor | None:
        """Return the adapter's change of the layer's bias, scaled; None without `lora_bias`."""
        return widen(m.lora_B.bias) * m.scaling if m.lora_bias else None

    def configure(self, cfg: LoraConfig, ranks: Ranks, patterns: Ranks, configs: Sequence[LoraConfig]) -> None:
        """Set `r` and `lora_alpha` to the highest rank, rank and alpha patterns to `patterns`, no rsLoRA, and
        `lora_bias` if any config has it.

        An `init_lora_weights` that is a text becomes True; a variant without `holds_any` is dropped.

        Raises:
            ConfigError: the variant that stays would need another rank (`check_base_unchanged`).
        """
        cfg.r = cfg.lora_alpha = max(ranks.values())  # scaling 1
        cfg.rank_pattern, cfg.alpha_pattern = patterns, dict(patterns)
        cfg.use_rslora = False
        cfg.lora_bias = any(c.lora_bias for c in configs)
        if isinstance(cfg.init_lora_weights, str):
            cfg.init_lora_weights = True  # some initialisations would change the base weight on loading
        if not method_of(cfg.peft_type).variant(cfg).holds_any:
            cfg.drop_variant()
        check_base_unchanged(cfg, ranks, configs)


def check_base_unchanged(cfg: PeftConfig, ranks: dict[str, int], configs: Sequence[LoraConfig]) -> None:
    """Raise ConfigError for a variant that takes a part of its rank out of the base weights, unless each layer has the
    highest rank of the other adapters.
    """
    setting = method_of(cfg.peft_type).variant(cfg).changes_base(cfg)
    for key, r in ranks.items() if setting else ():
        before = max(c.at(key).r for c in configs)
        if r != before:
            raise ConfigError(
                f"With {setting} the rank must stay {before} on layer '{key}', where the base weight lacks that part, "
                f"and would be {r}. Use linear, or svd with svd_rank={before}."
            )


class UpdateForm(LoraForm):
    """Plain LoRA, from adapters of any methods that have a ΔW. Make a new form for each combination.

    Attributes:
        has_shift: True once an adapter that was read changes a bias.
    """

    takes_factors: ClassVar[bool] = False

    def __init__(self) -> None:
        """Begin without shifts."""
        self.has_shift = False  # one of them changes a bias

    def make_config(self, configs: Sequence[PeftConfig]) -> LoraConfig:
        """Return a plain LoraConfig with the targets of all configs."""
        return make_plain_config(configs)

    def why_not(self, m: Method) -> str | None:
        """Return why a method has no ΔW; None if it has one."""
        return why_no_delta(m)

    def read(self, m: Method, weight: float) -> Term:
        """Return the term of a method's ΔW, with scaling 1 and all its matrices as groups; without factors as a product
        of ΔW and an identity of its shorter side.

        Sets `has_shift` if it changes a bias.
        """
        A, B, shift = compute_change(m)
        self.has_shift |= shift is not None
        if B is None:  # ΔW itself: the product with an identity of its shorter side
            one = torch.eye(min(A.shape[1:]), dtype=A.dtype, device=A.device).expand(len(A), -1, -1)
            A, B = (A, one) if A.shape[1] <= A.shape[2] else (one, A)
        return Term(spread_groups(A, m.site).flatten(0, 1), B.flatten(0, 1), 1.0, weight, len(A))

    def shift(self, m: Method) -> Tensor | None:
        """Return the method's change of the layer's bias; None if it has none."""
        return compute_change(m).shift

    def configure(self, cfg: LoraConfig, ranks: Ranks, patterns: Ranks, configs: Sequence[LoraConfig]) -> None:
        """Set the fields as `LoraForm` does without any configs, and `lora_bias` to whether an adapter read so far has
        a shift. `configs` is not used.
        """
        super().configure(cfg, ranks, patterns, ())
        cfg.lora_bias = self.has_shift


def spread_groups(A: Tensor, site: Site) -> Tensor:
    """Return A (groups, r, n) as a new tensor (groups, r, groups · n), with zeros for the inputs of other groups.

    One group, or an A with more inputs than `fan_in`, which sees all inputs already, is returned as it is.
    """
    groups, r, n = A.shape
    if groups == 1 or n > site.fan_in:
        return A
    return torch.block_diag(*A).view(groups, r, groups * n)


class AdaLoraForm(ProductForm["AdaLoraConfig"]):
    """The form of AdaLoRA: B diag(E) A; singular values E include the scaling."""

    def write(self, A: Tensor, B: Tensor, parts: Parts, cfg: AdaLoraConfig) -> Tensors:
        """Return AdaLoRA's tensors for ΔW = B A, by (container, path): columns of B of length 1, and their lengths in
        E, times (init_r + 1e-5) / lora_alpha. Columns of zeros stay zeros. `ranknum` is the initial rank, as float32
        (1,).
        """
        B = B.flatten(0, 1)
        E = B.norm(dim=0)  # (r,)
        start = torch.tensor([float(cfg.init_r)])
        return {
            ("lora_A", ""): A,
            ("lora_B", ""): B / torch.where(E > 0, E, 1.0),
            ("lora_E", ""): E[:, None] * ((cfg.init_r + 1e-5) / cfg.lora_alpha),
            ("ranknum", ""): start,
        }

    def configure(self, cfg: AdaLoraConfig, ranks: Ranks, patterns: Ranks, configs: Sequence[AdaLoraConfig]) -> None:
        """Set init_r, target_r and lora_alpha to the highest rank, at least 1, and `rank_pattern` to lists of True if
        ranks differ, else None.

        Sets `inference_mode`, since a model trains one AdaLoRA adapter at a time.
        """
        cfg.init_r = cfg.target_r = cfg.lora_alpha = max(1, *ranks.values())
        uneven = any(r != cfg.init_r for r in ranks.values())
        cfg.rank_pattern = {f"{key}.lora_E": [True] * r for key, r in ranks.items()} if uneven else None
        cfg.inference_mode = True  # a model trains one AdaLoRA adapter at a time


class LohaForm(ProductForm["LoHaConfig"]):
    """The form of LoHa: the elementwise product of two low-rank matrices. A written one has a second matrix of ones."""

    def read(self, m: Method, weight: float) -> Term:
        """Return the term with one product of rank r² that equals the elementwise product of both, in float32 at least.

        The parts are read in evaluation mode.
        """
        with EvaluationMode(m.layer):
            a, b, c, d = (widen(p) for p in m.parts())
        return Term(*narrow(a, b, c, d), m.scaling, weight)

    def write(self, A: Tensor, B: Tensor, parts: Parts, cfg: LoHaConfig) -> Tensors:
        """Return LoHa's tensors: the first matrix is B A.

        The second one is all ones, by ones in one column and one row and zeros in all others.
        """
        A, B = A.flatten(0, 1), B.flatten(0, 1)
        left, right = torch.zeros_like(B), torch.zeros_like(A)
        left[:, 0] = right[0] = 1.0
        return {("hada_w1_a", ""): B, ("hada_w1_b", ""): A, ("hada_w2_a", ""): left, ("hada_w2_b", ""): right}

    def configure(self, cfg: LoHaConfig, ranks: Ranks, patterns: Ranks, configs: Sequence[LoHaConfig]) -> None:
        """Set `r` and `alpha` to the highest rank, rank and alpha patterns to `patterns`, and `use_effective_conv2d` to
        False.
        """
        cfg.r = cfg.alpha = max(ranks.values())  # scaling 1
        cfg.rank_pattern, cfg.alpha_pattern = patterns, dict(patterns)
        cfg.use_effective_conv2d = False


FORMS: dict[str, ProductForm[Any]] = {"LORA": LoraForm(), "ADALORA": AdaLoraForm(), "LOHA": LohaForm()}
