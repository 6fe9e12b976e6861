# SPDX-License-Identifier: Apache-2.0
"""Arrow: Towards Modular LLMs by Building and Reusing a Library of LoRAs, arXiv 2405.11157.

The router adapter makes no update itself: it sends each token through the other LoRA adapters of the layer, the
experts, by how much the token points in the direction that an expert acts on most. With GenKnowSub
(aclanthology.org/2025.acl-short.54) the mean of the adapters of general knowledge is subtracted from the experts.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from graft.config.fields import require_sub_config
from graft.core.effect import Effect, Factors, Update
from graft.core.errors import RoutingError
from graft.core.method import Method
from graft.kernels.versions import version_of
from graft.kernels.waits import vector
from graft.methods.lora.lora import LoRA

GENERAL = re.compile(r"gks_\d+")  # names of adapters of general knowledge, which are no experts
STEPS, EPS = 15, 1e-8  # of the power iteration


class Router(nn.Module):
    """The experts' directions, cached; valid as long as the experts' tensors keep their values."""

    prototypes: Tensor | None  # (experts, in)

    def __init__(self) -> None:
        """Register an empty buffer `prototypes` that no checkpoint holds, and an empty list `of` of source tensors."""
        super().__init__()
        self.register_buffer("prototypes", None, persistent=False)
        self.of: list[tuple[Tensor, int]] = []  # the tensors that they were made of, with their versions

    def current(self, tensors: list[Tensor]) -> bool:
        """Return True if `tensors` are the same objects as in `of`, in the same versions: `prototypes` is
        still right.
        """
        return len(self.of) == len(tensors) and all(
            a is b and version == version_of(b) for (a, version), b in zip(self.of, tensors)
        )

    def __getstate__(self) -> dict[str, object]:
        """Return the state without the source tensors, so that a copy or a pickle computes its directions anew."""
        return {**self.__dict__, "of": []}  # a copy has other tensors


class Arrow(LoRA):
    """Arrow, arXiv 2405.11157: a router.

    Each token goes through its `top_k` experts, the other LoRA adapters of the layer.
    """

    only_linear = "Arrow compares features of tokens, and so it routes on linear layers only"

    lora_arrow: Router  # without parameters

    def build(self, shared: dict[str, object], device: torch.device | None = None) -> dict[str, object]:
        """Return LoRA's tensors, and an empty `Router` as `lora_arrow`."""
        return super().build(shared, device) | dict(lora_arrow=Router())

    def describe(self) -> Effect:
        """Return an `Update` with a `branch` only, which cannot merge."""
        return Update(
            branch=self.branch, why_unmergeable="Cannot merge an active Arrow router adapter. Remove it first"
        )

    def factors(self) -> Factors:
        """Raise NotImplementedError: a router has no update, only its experts have."""
        raise NotImplementedError(
            f"Adapter '{self.name}' is an Arrow router, which has no update. Name its experts instead."
        )

    def branch(self, x: Tensor) -> Tensor:
        """Return Σ share_e · s_e · B_e A_e x over the experts, for x (…, in), followed by this adapter's dropout.

        The score of an expert is |x · direction|. The `top_k` largest get softmax(score / router_temperature) as share,
        all others 0. x is cast to the experts' dtype. Raises RoutingError if the layer cannot route.
        """
        general, experts = self.split_adapters()
        A, B = self.matrices(general, experts)
        cfg, E, x = require_sub_config(self.cfg.arrow_config), len(experts), x.to(A.dtype)  # not the router's dtype
        score, which = (x @ self.directions(general, experts, A, B).T).abs().topk(cfg.top_k, dim=-1)  # (…, top_k)
        share = torch.zeros(*x.shape[:-1], E, device=x.device, dtype=x.dtype)
        share = share.scatter(-1, which, (score / cfg.router_temperature).softmax(-1).to(x.dtype))
        share = share * vector([m.scaling for m in experts], share)
        z = (x @ A.flatten(0, 1).T).unflatten(-1, (E, -1)) * share[..., None]  # (…, experts, r)
        return self.lora_dropout(z.flatten(-2) @ B.movedim(0, 1).flatten(1).T)

    def split_adapters(self) -> tuple[list[Method], list[Method]]:
        """Return two lists of the layer's adapters: general knowledge, and experts.

        General are those in `gks_adapter_names` or with a name "gks_<number>"; experts are all others except Arrow
        routers.
        """
        named = require_sub_config(self.cfg.arrow_config).gks_adapter_names or ()
        general, experts = [], []
        for name, m in self.layer.methods.items():
            if name in named or GENERAL.fullmatch(name):
                general.append(m)
            elif not isinstance(m, Arrow):
                experts.append(m)
        return general, experts

    def matrices(self, general: list[Method], experts: list[Method]) -> tuple[Tensor, Tensor]:
        """Return the stacks A (experts, r, in) and B (experts, out, r).

        With `use_gks`, subtract the means of A and of B over the general adapters.

        Raises:
            RoutingError: the stack cannot be made: unequal ranks, or no general adapter.
        """
        try:
            A, B = (torch.stack([m.pair[i] for m in experts]) for i in (0, 1))
            if require_sub_config(self.cfg.arrow_config).use_gks:
                A, B = (M - torch.stack([m.pair[i] for m in general]).mean(0) for i, M in ((0, A), (1, B)))
        except RuntimeError as e:  # of torch, about sizes
            raise RoutingError(why_no_routing(self, general, experts)) from e
        return A, B

    def directions(self, general: list[Method], experts: list[Method], A: Tensor, B: Tensor) -> Tensor:
        """Return the top right singular vector of each expert's B A, (experts, in), in A's dtype, from the router's
        cache.

        If a tensor of an expert or general adapter is another one or was changed, they are computed anew in float32,
        without autocast and gradients. They are kept as `prototypes` and `of` of `lora_arrow`. Code compiled by
        TorchDynamo uses the cache unchecked if its number of experts fits.

        Raises:
            RoutingError: fewer than `top_k` experts, or one that is not plain LoRA. Only checked when they are
                computed.
        """
        router = self.lora_arrow
        if is_dynamo_compiling() and router.prototypes is not None and len(router.prototypes) == len(experts):
            return router.prototypes
        tensors = [t for m in (*experts, *general) for t in m.pair]
        if router.current(tensors):
            return router.prototypes  # type: ignore[return-value]
        if require_sub_config(self.cfg.arrow_config).top_k > len(experts) or not all(is_plain_lora(m) for m in experts):
            raise RoutingError(why_no_routing(self, general, experts))
        # not in inference mode: training may save the cached tensor
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(A.device.type, enabled=False):
            seed = require_sub_config(self.cfg.arrow_config).rng_seed
            prototypes = torch.stack([top_direction(a.float(), b.float(), seed) for a, b in zip(A, B)]).to(A.dtype)
        router.prototypes, router.of = prototypes, [(t, version_of(t)) for t in tensors]
        return prototypes


def is_plain_lora(m: Method) -> bool:
    """Return True if the method is exactly LoRA, no variant, and has no bias."""
    return type(m) is LoRA and not m.lora_bias


def top_direction(A: Tensor, B: Tensor, seed: int | None) -> Tensor:
    """Return the unit vector (in,) that maximizes ‖B A v‖, by 15 steps of power iteration on (B A)ᵀ B A.

    The start is random, drawn on the CPU in A's dtype, which the result has, too: from `seed`, or from torch's
    generator if None. Each length gets 1e-8 added before the division.
    """
    generator = None if seed is None else torch.Generator("cpu").manual_seed(int(seed))
    gram = B.T @ B  # (r, r)
    v: Tensor = torch.randn(A.shape[1], dtype=A.dtype, device="cpu", generator=generator).to(A.device)
    v = v / (v.norm() + EPS)
    for _ in range(STEPS):
        w = A.T @ (gram @ (A @ v))
        v = w / (w.norm() + EPS)
    return v


def why_no_routing(router: Arrow, general: list[Method], experts: list[Method]) -> str:
    """Return the text of the error for a router that cannot run, with adapter and layer.

    The first reason that holds: experts that are not plain LoRA; `top_k` above their number; `use_gks` without general
    adapters; else unequal ranks.
    """
    start = f"Arrow router '{router.name}' on layer '{router.site.key}': "
    cfg, names = require_sub_config(router.cfg.arrow_config), [m.name for m in experts]
    variants = [m.name for m in experts if not is_plain_lora(m)]
    if variants:
        return f"{start}experts must be plain LoRA, without bias, and {variants} are not. Delete these adapters."
    if cfg.top_k > len(experts):
        return f"{start}top_k={cfg.top_k} is more than its {len(experts)} experts {names}. Lower top_k, or load others."
    if cfg.use_gks and not general:
        return f"{start}GenKnowSub (use_gks) needs adapters of general knowledge, 'gks_0' and so on, and it has none."
    shapes = {m.name: tuple(m.pair[0].shape) for m in (*experts, *general)}
    return f"{start}experts and general adapters must have one rank, and A has the shapes {shapes}."
