# SPDX-License-Identifier: Apache-2.0
"""MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts, arXiv 2404.15159.

Each MLP runs for each token with the LoRA of a few experts, chosen by a router, and the outputs are summed; attention
has plain LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from graft.config.fields import NOT_NEGATIVE
from graft.core.effect import Effect, Factors, Replace, Update
from graft.core.errors import NoMatchingPeftModuleError, RoutingError, UnsupportedLayerError, join_some
from graft.core.method import Method, NotedTokens, PublishedRate, fill_kaiming, make_dropout
from graft.core.ops import find_op
from graft.core.plan import put_input_first
from graft.methods.moelora import RoutedConfig, check_experts, compute_balance_loss, sum_experts
from graft.methods.places import ATTENTION, MLP, match_paths, walk

FIXED = "MixLoRA's router chooses experts for each token, which no weight does"


@dataclass(kw_only=True)
class MixLoraConfig(RoutedConfig):
    """MixLoRA: experts that share an MLP and differ by their LoRA, a few for each token; attention has plain LoRA.

    Raises:
        ConfigError: a number out of range; more choices than experts.
    """

    peft_type: str = "MIXLORA"
    top_k: int = 2  # experts that each token runs
    mlp_modules: list[str] | str | None = None  # names of MLPs, or one regex; None: found by name
    router_init_range: Annotated[float, NOT_NEGATIVE] = 0.02  # standard deviation of a router's start

    def __post_init__(self) -> None:
        """Validate the fields; set `within` and `routers` to {}, which `find_companions` fills for one model.

        Raises ConfigError if `top_k` is not from 1 to `num_experts`.
        """
        super().__post_init__()
        self.within: dict[str, str] = {}  # no fields, but of one model: layer → MLP
        self.routers: dict[str, int] = {}  # MLP → width
        check_experts(self.top_k, self.num_experts)


def mlp_of(path: str) -> str | None:
    """Return the path up to the last part before its end that is named as an MLP; None without one, or if a part is
    named as an attention.
    """
    parts = path.split(".")
    if any(ATTENTION.search(part) for part in parts):
        return None
    ends = [i for i, part in enumerate(parts[:-1]) if MLP.search(part)]
    return ".".join(parts[: ends[-1] + 1]) if ends else None


def of_these(path: str, mlps: Sequence[str]) -> str | None:
    """Return the longest path among `mlps` that `path` is below; None if it is below none."""
    return max((mlp for mlp in mlps if path.startswith(f"{mlp}.")), key=len, default=None)


class MixLoRA(Method[MixLoraConfig]):
    """MixLoRA, arXiv 2404.15159: y = Σₑ gₑ MLPₑ(h), g the k largest of softmax(G h) divided by their sum, 1 in all;
    attention has plain LoRA.
    """

    prefix = "mixlora_"
    fallback_targets = "all-linear"
    facts = ()  # a router has none
    published_lr = PublishedRate(2e-4, 2e-4, "arXiv 2404.15159, its code, MoE-PEFT")

    mixlora_router: nn.Linear  # of an MLP: weight (experts, H)
    mixlora_A: nn.Parameter  # (experts, r, in) in an MLP, (r, in) elsewhere
    mixlora_B: nn.Parameter  # (experts, out, r), (out, r)
    mixlora_dropout: nn.Module

    @classmethod
    def find_companions(cls, cfg: MixLoraConfig, model: nn.Module, paths: Sequence[str]) -> Sequence[str]:
        """Return the MLPs around the target layers `paths`: by name, or those in `mlp_modules`; they get the routers.

        Replaces `cfg.within` (layer → MLP; layers outside MLPs are left out) and `cfg.routers` (MLP → the input width
        of its first linear layer). Both are filled layer by layer, also if an error follows. Without `paths` returns
        [].

        Raises:
            NoMatchingPeftModuleError: `mlp_modules` fits no module, before the config changes; or, after all layers,
                none is in an MLP.
            UnsupportedLayerError: the MLP of a target layer has no linear layers. The first such layer raises.
        """
        modules = dict(walk(model))
        linears = {path: op.dims(m)[1] for path, m in modules.items() if (op := find_op(m)).linear}
        chosen = None if cfg.mlp_modules is None else match_paths(modules, cfg.mlp_modules, "mlp_modules")
        cfg.within, cfg.routers = {}, {}
        for path in paths:
            within = mlp_of(path) if chosen is None else of_these(path, chosen)
            if within is not None:
                width = next((width for p, width in linears.items() if p.startswith(f"{within}.")), None)
                if width is None:
                    raise UnsupportedLayerError(
                        f"MixLoRA adapts linear layers only, and MLP '{within}' of layer '{path}' has none. Leave the "
                        "layer out of target_modules."
                    )
                cfg.within[path], cfg.routers[within] = within, width
        if paths and not cfg.routers:
            raise NoMatchingPeftModuleError(
                f"No target layer is in an MLP, by its name or mlp_modules={cfg.mlp_modules}: "
                f"{join_some(sorted(paths))}. "
                "Set mlp_modules, or name layers of MLPs in target_modules."
            )
        return list(cfg.routers)

    @property
    def routes(self) -> bool:
        """True if the site is an MLP, with a router: the config's `routers` has its path."""
        return self.site.key in self.cfg.routers

    @property
    def chosen(self) -> bool:
        """True if the site is a layer of an MLP, with a LoRA for each expert.

        It is in one if `cfg.within` has the site's key: the path lies in a module named as an MLP or listed in
        `mlp_modules`.
        """
        return self.site.key in self.cfg.within

    def check(self) -> str | None:
        """Return a reason against a site that is neither linear nor an MLP, and against an "MLP" that is itself a known
        layer; else that of `Method.check`.
        """
        if not (self.routes or self.site.op.linear):
            return "MixLoRA adapts linear layers only, and MLPs of them"
        if self.routes and self.site.op.known:
            return "MixLoRA takes it for an MLP, and it is a layer: set mlp_modules"
        return super().check()

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return, of an MLP, only the linear layer `mixlora_router` (experts, H) without bias.

        Of a layer in an MLP uninitialised `mixlora_A` (experts, r, in) and `mixlora_B` (experts, out, r), of others (r,
        in) and (out, r); and `mixlora_dropout` and `r`. Floating-point tensors are made on the default device, in the
        default dtype.
        """
        cfg, site, E = self.cfg, self.site, self.cfg.num_experts
        if self.routes:
            return dict(mixlora_router=nn.Linear(cfg.routers[site.key], E, bias=False))
        each = [E] if self.chosen else []
        A, B = torch.empty(*each, cfg.r, site.in_features), torch.empty(*each, site.out_features, cfg.r)
        dropout = make_dropout(cfg.lora_dropout)
        return dict(r=cfg.r, mixlora_A=nn.Parameter(A), mixlora_B=nn.Parameter(B), mixlora_dropout=dropout)

    def init_values(self) -> None:
        """Fill a router with normal values of std `router_init_range`; else each A kaiming uniform (a=√5), B zeros.

        With `init_weights=False` B is normal with std 1/√r.
        """
        if self.routes:
            nn.init.normal_(self.mixlora_router.weight, std=self.cfg.router_init_range)
            return
        for A in self.mixlora_A if self.chosen else (self.mixlora_A,):
            fill_kaiming(A)
        self.fill_start(self.mixlora_B, self.cfg.r**-0.5)

    def describe(self) -> Effect:
        """Return, of an MLP, a `Replace` by `mixture`; of a layer in one, an `Update` with the branch `expert`; both
        cannot merge.

        Of other layers an `Update` by `factors`.
        """
        if self.routes:
            return Replace(self.module, why_unmergeable=FIXED)
        return Update(branch=self.expert, why_unmergeable=FIXED) if self.chosen else Update(factors=self.factors)

    def factors(self) -> Factors:
        """Return `mixlora_A` (r, in) and `mixlora_B` (out, r) with the scale alpha / r and dropout: plain LoRA."""
        return Factors(self.mixlora_A, self.mixlora_B, self.cfg.lora_alpha / self.cfg.r, self.mixlora_dropout)

    def module(self) -> Callable[..., Tensor]:
        """Return `mixture`, which runs in place of the MLP."""
        return self.mixture

    def mixture(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the MLP once for all pairs of a token and one of its `top_k` experts; return the weighted sums by token,
        in the MLP's dtype.

        The MLP's input is its first argument, by position or by name; other arguments reach the MLP unchanged. Weights
        are the k largest router probabilities (float32) over their sum. The layers inside get the experts' numbers by
        the call. In training with `router_loss`, while the router requires gradients, the probabilities are recorded
        for the auxiliary loss.

        Raises:
            UnsupportedLayerError: the MLP returns no tensor.
        """
        layer, k = self.layer, self.cfg.top_k
        if not args:
            args, kwargs = put_input_first(layer.argument_names, kwargs)
        x: Tensor = args[0]
        p = self.mixlora_router(self.cast(x)).softmax(-1, dtype=torch.float32)  # (…, tokens, experts)
        if self.cfg.router_loss and layer.training and self.mixlora_router.weight.requires_grad:
            layer.call.record_value(self.name, self.site.key, p)
        top = p.topk(k, -1)
        with layer.call.pass_to_layers(self.name, top.indices.flatten(-2)):
            y = layer.base_layer(x.repeat_interleave(k, -2), *args[1:], **kwargs)
        if not isinstance(y, Tensor):
            raise UnsupportedLayerError(
                f"MLP '{self.site.key}' returns a {type(y).__name__}: MixLoRA adapter '{self.name}' mixes tensors. "
                "Set mlp_modules to other modules."
            )
        g = top.values / top.values.sum(-1, keepdim=True)
        return (y.unflatten(-2, (-1, k)) * g.unsqueeze(-1)).sum(-2).to(y.dtype)

    def expert(self, x: Tensor) -> Tensor:
        """Return alpha / r · B_e A_e dropout(x) for each token, with e the expert that `mixture` has paired it with.

        The factor alpha / r is in the dtype of x; A, B and x are not cast here.

        Raises:
            RoutingError: no MLP runs around the layer, or x has another number of tokens than the pairs.
        """
        cfg, chosen = self.cfg, self.layer.call.value_from_block(self.name)
        if chosen is None or chosen.shape != x.shape[:-1]:
            raise RoutingError(
                f"Layer '{self.site.key}' has an expert of adapter '{self.name}' for each token of the MLP "
                f"'{cfg.within[self.site.key]}', and got an input {tuple(x.shape)} that is not of these. Call the MLP."
            )
        is_chosen = chosen.to(x.device).unsqueeze(-1) == torch.arange(cfg.num_experts, device=x.device)
        g = is_chosen.to(x.dtype) * (cfg.lora_alpha / cfg.r)
        x = self.mixlora_dropout(x)
        return sum_experts(self.site.op, self.layer.base_layer, x, self.mixlora_A, self.mixlora_B, g)

    @classmethod
    def compute_auxiliary_loss(cls, cfg: MixLoraConfig, noted: Sequence[NotedTokens]) -> Tensor:
        """Return router_aux_loss_coef · the balance loss of the noted probabilities (`compute_balance_loss`), ()."""
        return cfg.router_aux_loss_coef * compute_balance_loss(noted, cfg.top_k)
