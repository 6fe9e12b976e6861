# SPDX-License-Identifier: Apache-2.0
"""FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees, AAAI 2026, doi 10.1609/aaai.v40i31.39813."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from graft.config.bounds import Bound
from graft.config.fields import FRACTION, FROD, BaseBias
from graft.core.containers import Attached, Transient
from graft.core.effect import Effect, Update
from graft.core.errors import ConfigError, PeftWarning, warn_of_layer
from graft.core.method import COMPARISON, AdaptedLayers, Method, PublishedRate, Tensors, WeightUse
from graft.core.site import Site
from graft.kernels.one_product import Replacement
from graft.kernels.waits import copy_on_device
from graft.methods.projections import DrawnConfig, check_places, maybe_transient

SPARSITY = Bound(FRACTION.allows, "`{name}` should be between 0 and 1, got {value}.")


@dataclass(kw_only=True)
class FrodConfig(DrawnConfig, BaseBias):
    """FRoD: W = U diag(λ) Vᵀ with one V for all layers of a category. λ trains, and few entries off the diagonal."""

    peft_type: str = "FROD"
    frod_dropout: float = 0.0
    init_weights: bool = True  # False: random, away from W
    sparse_rate: Annotated[float, SPARSITY] = 0.01  # share of the entries off the diagonal that train
    regularization_alpha: float = 0.001  # of the inverse in the search for V
    progressbar: bool = True  # accepted for PEFT's files: there is none
    runtime_offload_base_weight: bool = False  # accepted for PEFT's files: the base weight stays where it is

    matrices = "frod_V and frod_s_indices"  # V, which a load computes again, and the places, drawn again


def category(key: str) -> str:
    """Return the category of a layer from its path; layers of a category share V.

    It is the last two names, joined by "_"; the last one alone if the other is an index or missing. A path that ends in
    "attention.output.dense" gives "attention_output".
    """
    parts = key.split(".")
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return parts[-1] if len(parts) == 1 or parts[-2].isdigit() else "_".join(parts[-2:])


def width(name: str, sites: Sequence[Site]) -> int:
    """Return the number of inputs of the layers of category `name`.

    Raises:
        ConfigError: the layers have different numbers.
    """
    sizes = {site.fan_in for site in sites}
    if len(sizes) > 1:
        raise ConfigError(
            f"FRoD gives one V to all layers of the category '{name}', and they have {sorted(sizes)} inputs, such as "
            f"{', '.join(repr(site.key) for site in sites[:4])}. Use one adapter for each width."
        )
    return sizes.pop()


def order(key: str) -> int:
    """Return the number of a layer's block: the part of its path after "layers" if numeric, else the first number in
    it, else 0.
    """
    parts = key.split(".")
    after = [b for a, b in pairwise(parts) if a == "layers"]
    return next((int(part) for part in (*after, *parts) if part.isdigit()), 0)


def basis(sites: Sequence[Site], n: int, alpha: float) -> Tensor:
    """Return V (n, n) of a category, in float32 on the CPU: it makes the columns of W V as orthogonal as possible for
    all its weights W.

    Of layers with equal `order` only the last counts. The weights get no gradient. With all weights below each other =
    Q R, V is Rᵀ times the eigenvectors of the mean of (Qᵢᵀ Qᵢ + alpha)⁻¹ over the layers. If they have fewer than n
    rows together, V are their right singular vectors. Return an empty V on the meta device if a weight is there.
    """
    V = torch.empty(n, n)
    if V.is_meta or any(site.on_meta for site in sites):
        return V.to("meta")
    last = {order(site.key): site for site in sites}  # of an encoder and a decoder PEFT takes the decoder's alone
    weights = [site.weight.canon() for _, site in sorted(last.items())]
    stack = torch.cat([W.detach().flatten(1).to("cpu", torch.float32) for W in weights])
    if len(stack) < n:
        return torch.linalg.svd(stack, full_matrices=True).Vh.T.contiguous()
    Q, R = torch.linalg.qr(stack)
    eye = alpha * torch.eye(n, dtype=stack.dtype, device=stack.device)
    parts = Q.split([len(W) for W in weights])
    T = sum(torch.linalg.inv(part.T @ part + eye) for part in parts) / len(parts)
    return R.T @ torch.linalg.eigh(T).eigenvectors


def count_entries(n: int, rate: float) -> int:
    """Return the number of entries of S (n, n) that train: ⌊n² · rate⌋, at most n² - n, and at least 1 if rate > 0 and
    n > 1.
    """
    count = min(int(n * n * rate), n * n - n)
    return max(count, min(1, n * n - n)) if rate > 0 else count


def support(n: int, rate: float, generator: torch.Generator) -> Tensor:
    """Draw the places of the entries of S, `count_entries` of them, off its diagonal and without repetition: rows and
    columns, (2, entries), int64, in random order.

    On the meta device the tensor stays uninitialised.
    """
    out = torch.empty(2, count_entries(n, rate), dtype=torch.int64)
    if out.is_meta:
        return out
    place = torch.randperm(n * n - n, generator=generator)[: out.shape[1]]
    rows, columns = place // (n - 1), place % (n - 1)
    return torch.stack((rows, columns + (columns >= rows)))


SMALLEST = 1e-12  # norm of a column that counts


class FRoD(Method[FrodConfig]):
    """FRoD, AAAI 2026: W' = U (diag(λ) + S) Vᵀ, with U diag(λ) Vᵀ = W₀ at the start and S sparse, 0 at the start."""

    prefix = "frod_"
    weight_use = WeightUse.STARTS  # `finish_load` follows
    published_lr = PublishedRate(1e-3, 1e-3, COMPARISON)
    targets = FROD
    keeps_base_dtype = frozenset({"frod_U", "frod_V"})
    lays_out_stacks = True  # it takes none
    agreeing_fields = ("projection_prng_key", "save_projection")
    joins_weights = "decomposes the weights of all layers of a category together"

    frod_lambda_l: nn.Parameter  # (in,)
    frod_lambda_s_values: nn.Parameter  # (entries,)
    frod_U: Tensor  # (out, in)
    frod_dropout: nn.Module

    @classmethod
    def share(cls, layers: AdaptedLayers) -> dict[str, object]:
        """Return three tensors for each category of layers: `frod_V` (n, n), `frod_s_indices` (2, entries) and
        `frod_s_size` [n, n].

        V and indices of a category come from the first other adapter if it has them, the indices only in the same
        shape. Else V is `basis`. `support` draws places from `projection_prng_key` for each category, in alphabetical
        order, also where they are not used. No file holds the tensors with `save_projection=False`.

        Raises:
            ConfigError: layers of a category have different widths, or the shared V has another width.
        """
        cfg, existing, first = layers.cfg, layers.existing, next(iter(layers.other_configs), None)
        groups: dict[str, list[Site]] = {}
        for site in layers.sites:
            groups.setdefault(category(site.key), []).append(site)
        generator = torch.Generator("cpu").manual_seed(cfg.projection_prng_key)
        values: dict[str, object] = {}
        for name in sorted(groups):
            n = width(name, groups[name])
            places = support(n, cfg.sparse_rate, generator)
            if first is not None and first in existing.get(f"frod_V.{name}", ()):
                V, before = (existing[f"frod_{part}.{name}"][first] for part in ("V", "s_indices"))
                if len(V) != n:
                    raise ConfigError(f"frod_V of '{name}' is for {len(V)} inputs, not {n}. Use a separate model.")
                places = before if before.shape == places.shape else places
            else:
                V = basis(groups[name], n, cfg.regularization_alpha)
            for part, t in (("V", V), ("s_indices", places), ("s_size", torch.tensor([n, n]))):
                values[f"frod_{part}.{name}"] = maybe_transient(t, cfg.save_projection)
        return values

    def check(self) -> str | None:
        """Return a reason against parameters that their module uses itself (opaque ops); else that of
        `Method.check`.
        """
        if self.site.op.opaque:
            return "FRoD gives a V to all layers of a category, made of their weights, and these are parameters"
        return super().check()

    def build(self, shared: dict[str, Any]) -> dict[str, object]:
        """Return trained `frod_lambda_l` (in,) and `frod_lambda_s_values` (entries,) of zeros, the buffer `frod_U`
        (out, in) of zeros, which no file holds.

        `frod_shared` holds the containers of this category's V and indices; without `shared` tensors it is [].
        Floating-point tensors are made on the default device, in the default dtype.
        """
        cfg, site, group = self.cfg, self.site, category(self.site.key)
        n = site.fan_in
        common = [shared[f"frod_{part}.{group}"].container for part in ("V", "s_indices")] if shared else []
        return dict(
            frod_shared=Attached(common),  # out of sight: names in memory are PEFT's
            frod_lambda_l=nn.Parameter(torch.zeros(n)),
            frod_lambda_s_values=nn.Parameter(torch.zeros(count_entries(n, cfg.sparse_rate))),
            frod_U=Transient(torch.zeros(site.out_features, n)),
        )

    def describe(self) -> Effect:
        """Return an `Update` by `delta` that reads W₀ (`of_weight`), with the dropout."""
        return Update(self.delta, of_weight=True, dropout=self.dropout)

    def dropout(self) -> nn.Module:
        """Return the module `frod_dropout`."""
        return self.frod_dropout

    @torch.no_grad()
    def init_values(self) -> None:
        """Compute U and fill λ with the lengths from `rotate`, so that W' = W₀; S stays 0.

        On the meta device do nothing.

        With `init_weights=False` fill S with normal values of std 0.1, and add such values to λ.
        """
        scale = self.rotate()
        if scale is None:
            return
        dtype = self.layer.W0.dtype
        if not self.cfg.init_weights:
            s = self.frod_lambda_s_values
            s.copy_(torch.empty(s.shape, dtype=dtype).normal_(0, 0.1))  # drawn and rounded as in PEFT
            scale = scale.to(dtype) + torch.randn(scale.shape, dtype=dtype) * 0.1
        self.frod_lambda_l.copy_(scale)

    def check_shared(self, tensors: Tensors) -> None:
        """Raise CheckpointError if the file's indices of this layer's category are negative, or not below its number of
        inputs.

        Files without such indices pass.
        """
        check_places(tensors, f"frod_s_indices.{category(self.site.key)}", self.site.fan_in, self.site.key)

    @torch.no_grad()
    def finish_load(self) -> None:
        """Compute `frod_U` anew from the base weight and the loaded V (`rotate`); the loaded λ stays.

        On the meta device it only warns.
        """
        self.rotate()

    @property
    def common_tensors(self) -> tuple[Tensor, Tensor]:
        """V (in, in), and the rows and columns of the entries of S (2, entries), on the device of U."""
        device = self.frod_U.device
        V, places = (copy_on_device(container[self.name], device) for container in self.layer.frod_shared)
        return V, places

    def rotate(self) -> Tensor | None:
        """Fill U so that U diag(λ) Vᵀ = W₀, with unit columns, and return λ (in,), in float64 on the CPU.

        A singular V gets a pseudo-inverse with a relative tolerance of 1e-6. Columns of a norm below 1e-12 are 0. On
        the meta device warn, and return None.
        """
        shared = self.layer.frod_shared[0][self.name]
        if self.site.on_meta or shared.is_meta:
            text = "FRoD needs the weight of layer {}, which is on the meta device: adapt a model that has its values."
            warn_of_layer(self.site.key, text, PeftWarning)
            return None
        W, V = (t.detach().to("cpu", torch.float64) for t in (self.layer.W0.flatten(1), shared))
        try:
            b = torch.linalg.solve(V, W.T).T
        except RuntimeError:  # singular
            b = W @ torch.linalg.pinv(V, rtol=1e-6).T
        scale: Tensor = b.norm(dim=0)
        U = torch.where(scale > SMALLEST, b / scale.clamp(min=SMALLEST), 0.0)
        self.frod_U.copy_(U)
        return scale

    def delta(self, W0: Tensor) -> Tensor | Replacement:  # type: ignore[override]
        """Return ΔW = U (diag(λ) + S) Vᵀ - W₀, in W₀'s shape: as a `Replacement` for more outputs than inputs, else
        formed.

        U and V are cast to the dtype of S's values before the product.
        """
        V, (rows, columns) = self.common_tensors
        values, n = self.frod_lambda_s_values, len(V)
        M = values.new_zeros(n, n).index_put((rows, columns), values) + torch.diag(self.frod_lambda_l)
        U, V = self.frod_U.to(values.dtype), V.to(values.dtype)
        return Replacement(U, M @ V.T, W0) if len(U) > n else (U @ M @ V.T).view(W0.shape) - W0
