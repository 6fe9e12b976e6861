# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters: Parameter-Efficient Transfer Learning for NLP, arXiv 1902.00751 (Houlsby).

Others are presets: AdapterFusion, 2005.00247 (Pfeiffer); Towards a Unified View of PETL, 2110.04366 (parallel);
Adapters Strike Back, 2406.06820 (AdapterPlus); Compacter, 2106.04647; MAD-X, 2005.00052 (invertible).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.config.bounds import Bound
from graft.config.fields import BELOW_1, POSITIVE, Chosen, Targeted
from graft.config.reading import Json
from graft.core.base_config import input_embeddings, output_embeddings
from graft.core.containers import Transient
from graft.core.effect import Effect, Rewrite, Tap
from graft.core.errors import ConfigError, NoMatchingPeftModuleError, UnsupportedLayerError
from graft.core.method import AdaptedLayers, Method, PublishedRate, fill_kaiming, make_dropout
from graft.methods.places import Block, find_blocks, find_embedding_output, find_width, match_paths, walk

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "swish": F.silu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "leakyrelu": F.leaky_relu, "relu6": F.relu6, "elu": F.elu, "mish": F.mish, "linear": lambda x: x,
}  # fmt: skip
NON_LINEARITY = Bound(
    lambda name: name.lower() in ACTIVATIONS, f"Unknown {{name}} {{value!r}}. Known: {', '.join(ACTIVATIONS)}."
)
ENDS = ("embedding", "head")
PLACES = "places"  # target_modules of a config that names none: they are found from the model's structure


@dataclass(kw_only=True)
class BottleneckConfig(Targeted, Chosen):
    """Bottlenecks: h + s · Up σ(Down h), at places that are found from the model's structure.

    `target_modules` in place of the structure: the adapter acts on the outputs of these modules.

    Raises:
        ConfigError: a number out of range, or fields that exclude each other.
    """

    peft_type: str = "BOTTLENECK"
    reduction_factor: float | dict[str, float] = 16  # hidden size / width of the bottleneck; by block: {"default": 16}
    non_linearity: Annotated[str, NON_LINEARITY] = "relu"  # σ
    mh_adapter: bool = False  # after attention
    cross_adapter: bool = False  # after attention to an encoder
    output_adapter: bool = True  # after the MLP
    original_ln_before: bool = True  # after the residual is added, too (and the norm, where that stands after it)
    original_ln_after: bool = True  # such a norm acts on the result
    is_parallel: bool = False  # parallel to the MLP, on its residual
    scaling: float | Literal["learned", "channel"] = 1.0  # s; "channel": one for each feature
    use_gating: bool = False  # weigh by a gate for each row
    ln_before: bool = False  # one more norm, before Down
    dropout: Annotated[float, BELOW_1] = 0.0
    stochastic_depth: Annotated[float, BELOW_1] = 0.0  # share of rows that it leaves as they are, in training
    leave_out: list[int] = field(default_factory=list)  # numbers of blocks, encoder first
    init_weights: Literal["bert", "mam_adapter", "houlsby"] = "mam_adapter"  # this one starts as nothing
    phm_layer: bool = False  # Compacter: Down and Up are sums of Kronecker products
    phm_dim: Annotated[int, POSITIVE] = 4  # n, how many
    inv_adapter: Literal["nice"] | None = None  # an invertible adapter after the embedding
    inv_adapter_reduction_factor: Annotated[float, POSITIVE] = 2
    inverse_before_head: bool = True  # its inverse acts before the output embedding
    attention_modules: list[str] | str | None = None  # modules for `mh_adapter`, in place of those found
    mlp_modules: list[str] | str | None = None  # modules for `output_adapter`
    block_modules: list[str] | str | None = None  # with `original_ln_before`

    def __post_init__(self) -> None:
        """Validate the fields; set `places` to {} and `width` to None, which `prepare` fills for one model.

        Raises:
            ConfigError: a reduction factor that is not positive; an unknown `non_linearity`; `is_parallel` with
                adapters of attentions or without `output_adapter`; `original_ln_before` with adapters of attentions.
        """
        super().__post_init__()
        self.places: dict[str, BottleneckPlace] = {}  # no fields: these hold for one model only
        self.width: int | None = None
        r = self.reduction_factor
        for factor in r.values() if isinstance(r, dict) else (r,):
            POSITIVE.check("reduction_factor", factor)
        if self.is_parallel and (self.mh_adapter or self.cross_adapter or not self.output_adapter):
            raise ConfigError("Parallel bottlenecks adapt the MLP only. Leave mh_adapter and cross_adapter off.")
        if self.original_ln_before and not self.is_parallel and (self.mh_adapter or self.cross_adapter):
            raise ConfigError(
                "After an attention the bottleneck acts before the residual. Set original_ln_before=False."
            )

    def factor(self, block: int) -> float:
        """Return the reduction factor of a block: the number itself, or the dict's entry for the block, or for
        "default".

        Raises:
            ConfigError: the dict has neither entry.
        """
        r = self.reduction_factor
        if not isinstance(r, dict):
            return r
        if str(block) not in r and "default" not in r:
            raise ConfigError(f"reduction_factor={r} has no entry for block {block}, and no 'default'. Add one.")
        return r.get(str(block), r.get("default", 0))

    def check_blocks(self, numbers: Collection[int]) -> None:
        """Raise ConfigError if `leave_out`, or a `reduction_factor` that is a dict, names a block that is not in
        `numbers`, the model's blocks.

        The name "default" is no block and passes. Text and number of a block are equal.
        """
        by_block = self.reduction_factor if isinstance(self.reduction_factor, dict) else {}
        for name, blocks in ("leave_out", self.leave_out), ("reduction_factor", [*by_block]):
            if unknown := [block for block in blocks if str(block) not in {"default", *map(str, numbers)}]:
                last = max(numbers, default=0)
                raise ConfigError(f"`{name}` names block {unknown[0]!r}. Choose among the model's blocks, 0 to {last}.")

    @classmethod
    def preset(cls, name: str, **changes: object) -> BottleneckConfig:
        """Return the config of a paper by AdapterHub's name for it, such as "pfeiffer"; `changes` override its fields.

        Names are matched exactly, with their case.

        Raises:
            ConfigError: there is no such preset.
        """
        if name not in PRESETS:
            raise ConfigError(f"There is no preset {name!r}; there are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **changes})

    def places_in_block(self, i: int, block: Block) -> dict[str, BottleneckPlace]:
        """Return the places in block number `i`, by path; `Block.follow` has completed the block.

        Parallel: a tap at the module with the residual, and its reader at the end of the MLP. Else "after" at the ends
        of attentions (`mh_adapter`, `cross_adapter`). `output_adapter`: "after" at the MLP without
        `original_ln_before`, else "norm" if the block ends with one and `original_ln_after`, else "after" at the block.

        Raises:
            UnsupportedLayerError: a parallel adapter needs the residual of the MLP, and no module gets it.
        """
        places: dict[str, BottleneckPlace] = {}
        after = BottleneckPlace("after", block.width, i)
        if self.is_parallel:
            if block.residual is None:
                raise UnsupportedLayerError(
                    f"A parallel bottleneck needs the residual of block '{block.path}', which no module gets as its "
                    "input. Choose another preset than par_bn."
                )
            return {
                block.residual: BottleneckPlace("tap", block.width, i, (block.mlp,)),
                block.mlp: BottleneckPlace("beside", block.width, i)
            }  # fmt: skip
        for cross, adapts in ((False, self.mh_adapter), (True, self.cross_adapter)):
            places.update(dict.fromkeys(block.ends_of(cross) if adapts else (), after))
        if self.output_adapter and not self.original_ln_before:
            places[block.mlp] = after
        elif self.output_adapter and block.norm is not None and self.original_ln_after:
            places[block.norm] = BottleneckPlace("norm", block.width, i)
        elif self.output_adapter:
            places[block.path] = after
        return places


PFEIFFER: Json = dict(init_weights="bert")
HOULSBY: Json = dict(mh_adapter=True, original_ln_before=False, non_linearity="swish", init_weights="bert")
COMPACTER: Json = dict(phm_layer=True, reduction_factor=32, non_linearity="gelu", init_weights="bert")
PRESETS: dict[str, Json] = {
    **dict.fromkeys(("seq_bn", "pfeiffer"), PFEIFFER),
    **dict.fromkeys(("double_seq_bn", "houlsby"), HOULSBY),
    "par_bn": dict(
        is_parallel=True, original_ln_before=False, reduction_factor=2, scaling=4.0, init_weights="mam_adapter"
    ),
    "adapter_plus": dict(
        original_ln_after=False, reduction_factor=96, non_linearity="gelu", scaling="channel", stochastic_depth=0.1,
        init_weights="houlsby",
    ),
    "compacter": HOULSBY | COMPACTER,
    "compacter++": COMPACTER,
    "seq_bn_inv": PFEIFFER | dict(inv_adapter="nice"),
    "double_seq_bn_inv": HOULSBY | dict(inv_adapter="nice"),
}  # fmt: skip


class BottleneckPlace(NamedTuple):
    """The role of a bottleneck at one module.

    "after" adds to the output, "norm" to the input of a norm. A "tap" only passes its input to its `readers`, which
    add to the output. "embedding" and "head" are the invertible adapter.
    """

    role: Literal["after", "norm", "tap", "beside", "embedding", "head"]
    width: int | None = None  # of the hidden states; None: the layer's
    block: int = 0
    readers: tuple[str, ...] = ()  # of a tap


def places_in(cfg: BottleneckConfig, model: nn.Module) -> dict[str, BottleneckPlace]:
    """Return the places of an adapter in a model, by path.

    They are those in each block except `leave_out` (`places_in_block`). `attention_modules`, `mlp_modules` and
    `block_modules` replace them by the outputs of these modules; parallel bottlenecks keep both. The first number in
    such a module's path is its block, 0 without a number, and `leave_out` holds for it, too. The invertible adapter
    adds the places of `around_model`.

    Raises:
        NoMatchingPeftModuleError: the model has no such places.
        ConfigError: `leave_out` or `reduction_factor` names a block that the model lacks.
    """
    places: dict[str, BottleneckPlace] = {}
    overridden = {
        name: getattr(cfg, name) for name in ("attention_modules", "mlp_modules", "block_modules")
        if getattr(cfg, name) is not None
    }  # fmt: skip
    blocks = [] if overridden and not cfg.is_parallel else find_blocks(model)
    modules, numbers = dict(walk(model)), {*range(len(blocks))}
    for i, block in enumerate(blocks):
        if i not in cfg.leave_out:
            places |= cfg.places_in_block(i, block.follow(modules[block.path]))
    for name, wanted in overridden.items():
        for path in match_paths(filter(None, modules), wanted, name):
            number = next((int(part) for part in path.split(".") if part.isdecimal()), 0)
            numbers.add(number)
            if number not in cfg.leave_out:
                places[path] = BottleneckPlace("after", find_width(model), number)
    cfg.check_blocks(numbers)
    if cfg.inv_adapter:
        places |= around_model(cfg, model)
    if not places:
        raise NoMatchingPeftModuleError(
            "The options leave no place for a bottleneck. Set output_adapter, or a shorter leave_out."
        )
    return places


def around_model(cfg: BottleneckConfig, model: nn.Module) -> dict[str, BottleneckPlace]:
    """Return the places of an invertible adapter: "embedding" after the embedding (of the encoder), and "head" before
    the output embedding.

    Both have the width of the embedding. A model with encoder and decoder, without output embedding, or with
    `inverse_before_head=False`, has no "head".

    Raises:
        NoMatchingPeftModuleError: there is no embedding.
        UnsupportedLayerError: encoder and decoder share one module for their embeddings (the path with "decoder" for
            "encoder" is the same module).
    """
    modules = dict(walk(model))
    embedding: Any = strip_carriers(input_embeddings(model))
    twofold = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    path = find_embedding_output([path for path, module in modules.items() if module is embedding], modules, twofold)
    if path is None:
        raise NoMatchingPeftModuleError(f"{type(model).__name__} has no input embeddings. Set inv_adapter=None.")
    if twofold and modules[path] is modules.get(path.replace("encoder", "decoder")):
        raise UnsupportedLayerError(
            f"The encoder and the decoder of {type(model).__name__} have one module for their embeddings, and an "
            "invertible adapter acts on the encoder's alone. Use transformers 5, or a config with inv_adapter=None."
        )
    paths = {id(module): path for path, module in modules.items()}
    places = {path: BottleneckPlace("embedding", embedding.weight.shape[1])}
    head = None if twofold else paths.get(id(strip_carriers(output_embeddings(model))))
    if head and cfg.inverse_before_head:
        places[head] = BottleneckPlace("head", embedding.weight.shape[1])
    return places


def strip_carriers(module: nn.Module | None) -> nn.Module | None:
    """Return the module inside all adapter layers around it; None for None."""
    return None if module is None else next(walk(module))[1]


class Kronecker(nn.Module):
    """A matrix (in, out) as Σᵢ Aᵢ ⊗ (Lᵢ Rᵢ); the whole model shares A (n, n, n). Compacter, arXiv 2106.04647."""

    def __init__(self, n: int, fan_in: int, out: int):
        """Make uninitialised parameters `W_left` (n, fan_in / n, 1) and `W_right` (n, 1, out / n), and a bias `b`
        (out,) of zeros.
        """
        super().__init__()
        self.W_left = nn.Parameter(torch.empty(n, fan_in // n, 1))
        self.W_right = nn.Parameter(torch.empty(n, 1, out // n))
        self.b = nn.Parameter(torch.zeros(out))

    def matrix(self, A: Tensor) -> Tensor:
        """Return Σᵢ Aᵢ ⊗ (Lᵢ Rᵢ), (in, out), for the shared A (n, n, n), cast to the dtype and device of L."""
        product = torch.einsum("iab,icd->acbd", A.to(self.W_left), self.W_left @ self.W_right)
        return product.flatten(2).flatten(0, 1)


def two_layers(fan_in: int, out: int, factor: float) -> nn.ModuleList:
    """Return two linear layers with bias: fan_in → max(1, ⌊fan_in / factor⌋) → out, with torch's first values."""
    width = max(1, int(fan_in // factor))
    return nn.ModuleList([nn.Linear(fan_in, width), nn.Linear(width, out)])


class Coupling(nn.Module):
    """An invertible function of x = (x₁, x₂): y₁ = x₁ + F(x₂), y₂ = x₂ + G(y₁). NICE, as in MAD-X, arXiv 2005.00052."""

    def __init__(self, width: int, factor: float, activation: str):
        """Make F and G, each two linear layers with the activation between, for parts of width // 2 and the rest.

        F maps the rest to the first part, G the first part to the rest.
        """
        super().__init__()
        first, second = width // 2, width - width // 2
        self.F, self.G = two_layers(second, first, factor), two_layers(first, second, factor)
        self.first, self.activation = first, activation

    def step(self, net: nn.ModuleList, x: Tensor) -> Tensor:
        """Return net[1](activation(net[0](x)))."""
        return net[1](ACTIVATIONS[self.activation](net[0](x)))

    def forward(self, x: Tensor) -> Tensor:
        """Return y (…, width) with y₁ = x₁ + F(x₂) and y₂ = x₂ + G(y₁)."""
        a, b = x[..., : self.first], x[..., self.first :]
        a = a + self.step(self.F, b)
        return torch.cat([a, b + self.step(self.G, a)], -1)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x with `forward`(x) = y."""
        a, b = y[..., : self.first], y[..., self.first :]
        b = b - self.step(self.G, a)
        return torch.cat([a - self.step(self.F, b), b], -1)


class Bottleneck(Method[BottleneckConfig]):
    """Bottleneck adapters, arXiv 1902.00751: u(x) = g(x) · s · (Up σ(Down x)), added to the output of a layer."""

    prefix = "bottleneck_"
    fallback_targets = PLACES
    published_lr = PublishedRate(1e-4, 1e-4, "AdapterFusion, arXiv 2005.00247, adapters of single tasks")
    compresses_targets = False
    files = {"bottleneck_inv": "{0}{1}"}  # without the adapter's name, which deep ones get

    bottleneck_norm: nn.LayerNorm
    bottleneck_down: nn.Module  # (d, H)
    bottleneck_up: nn.Module  # (H, d)
    bottleneck_scale: nn.Parameter  # (1,) or (H,)
    bottleneck_gate: nn.Linear  # (1, H)
    bottleneck_dropout: nn.Module
    bottleneck_rule: nn.Parameter  # Compacter's A, (n, n, n), shared
    bottleneck_inv: nn.Module  # Coupling
    scaling: float

    layer_keys = {"bottleneck_inv": lambda methods: [m.place.role in ENDS or m for m in methods]}

    @classmethod
    def prepare(cls, cfg: BottleneckConfig, model: nn.Module) -> None:
        """Set `cfg.places` to the places in the model (`places_in`) if `target_modules` is "places", and
        `cfg.target_paths` to the set of their paths, or None for none.

        With other targets `cfg.places` becomes {}, so that all act as "after", and `cfg.target_paths` None. Also sets
        `cfg.width` to the model's hidden width.
        """
        finds_places = cfg.target_modules == PLACES
        cfg.places = places_in(cfg, model) if finds_places else {}
        cfg.target_paths = set(cfg.places) or None
        cfg.width = find_width(model)

    @classmethod
    def share(cls, layers: AdaptedLayers) -> dict[str, object]:
        """Return Compacter's shared `bottleneck_rule` (n, n, n), normal with std 1e-4; {} without `phm_layer`.

        Each adapter gets a new one.
        """
        cfg = layers.cfg
        if not cfg.phm_layer:
            return {}
        rule = torch.empty(cfg.phm_dim, cfg.phm_dim, cfg.phm_dim)
        return dict(bottleneck_rule=nn.Parameter(rule.normal_(std=1e-4)))

    @property
    def place(self) -> BottleneckPlace:
        """The place of this site in the config; "after" if it has none, with a known layer's output width, else the
        model's.
        """
        site = self.site
        place = self.cfg.places.get(site.key)
        return place or BottleneckPlace("after", site.out_features if site.op.known else self.cfg.width)

    @property
    def width(self) -> int:
        """The width H that the bottleneck acts on; 0 if it is unknown."""
        return self.place.width or 0

    def check(self) -> str | None:
        """Return the reason why a bottleneck cannot act here; None at once at a tap and for the invertible adapter.

        In this order: the reason that the width is unknown, or a known layer's weight no matrix. With `phm_layer`,
        ConfigError unless `phm_dim` divides the width and the bottleneck's. Last the reason of `Method.check`.
        """
        site, place = self.site, self.place
        if place.role in ("tap", *ENDS):
            return None
        if place.width is None or (site.op.known and len(site.shape) != 2):
            return (
                "A bottleneck acts on vectors: on outputs of linear layers, embeddings, and blocks whose width is known"
            )
        d, n = self.narrow, self.cfg.phm_dim
        if self.cfg.phm_layer and (place.width % n or d % n):
            raise ConfigError(
                f"phm_dim={n} must divide the width {place.width} of layer '{site.key}' and that of its bottleneck, "
                f"{d}. Choose another phm_dim or reduction_factor."
            )
        return super().check()

    @property
    def narrow(self) -> int:
        """The inner width d: max(1, ⌊width / reduction factor of the block⌋)."""
        return max(1, int(self.width // self.cfg.factor(self.place.block)))

    def describe(self) -> Effect:
        """Return the effect of the place's role: a `Tap`, or a `Rewrite` with this class's method for that role.

        "tap": `Tap` for the place's readers. "norm": `before_norm` ahead of a block. "head": `before_head` on the input
        (`pre`). "embedding": `after_embedding` on the output (`post`). A reader of a tap: its branch of the
        tapped input. Any other: the part `after`. The last three mark a block if the module's kind is unknown.
        """
        place, block = self.place, not self.site.op.known
        if place.role == "tap":
            return Tap(place.readers)
        if place.role == "norm":
            return Rewrite(ahead=self.before_norm, block=True)
        if place.role == "head":
            return Rewrite(pre=self.before_head)
        if place.role == "embedding":
            return Rewrite(post=self.after_embedding, block=block)
        if place.role == "beside":
            return Rewrite(part=self.beside, tapped=True, block=block)
        return Rewrite(part=self.after, block=block)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return `bottleneck_down` (H → d) and `bottleneck_up` (d → H), linear layers or with `phm_layer` `Kronecker`,
        the shared rule, `bottleneck_dropout` (`make_dropout(cfg.dropout)`) and `scaling`.

        By options also a LayerNorm `bottleneck_norm`, `bottleneck_scale` (ones, (H,) for "channel", else (1,)) and
        `bottleneck_gate` (H → 1). The scaling is 1.0 if the config's is a text. A tap gets only one empty buffer
        `bottleneck_tap`, the invertible adapter only `bottleneck_inv`, a `Coupling`. Floating-point tensors are made on
        the default device, in the default dtype.
        """
        cfg, place = self.cfg, self.place
        if place.role == "tap":
            return dict(bottleneck_tap=Transient(torch.empty(0)))
        if place.role in ENDS:
            factor = cfg.inv_adapter_reduction_factor
            return dict(bottleneck_inv=Coupling(self.width, factor, cfg.non_linearity.lower()))
        H, d = self.width, self.narrow
        make: Any = partial(Kronecker, cfg.phm_dim) if cfg.phm_layer else nn.Linear
        values: dict[str, object] = dict(bottleneck_down=make(H, d), bottleneck_up=make(d, H))
        if cfg.ln_before:
            values["bottleneck_norm"] = nn.LayerNorm(H)
        if isinstance(cfg.scaling, str):
            values["bottleneck_scale"] = nn.Parameter(torch.ones(H if cfg.scaling == "channel" else 1))
        if cfg.use_gating:
            values["bottleneck_gate"] = nn.Linear(H, 1)
        scaling = 1.0 if isinstance(cfg.scaling, str) else float(cfg.scaling)
        return values | shared | dict(bottleneck_dropout=make_dropout(cfg.dropout), scaling=scaling)

    def init_values(self) -> None:
        """Fill Down and Up as `init_weights` says (`init_projection`), and the gate as "bert". A tap has no values.

        Of the invertible adapter, first layers are filled as "bert", second ones too, or with zeros for "mam_adapter".
        """
        role, how = self.place.role, self.cfg.init_weights
        if role == "tap":
            return
        if role in ENDS:
            coupling = self.bottleneck_inv
            for net in (coupling.F, coupling.G):
                init_projection(net[0], "bert")
                init_projection(net[1], how if how == "mam_adapter" else "bert", last=True)
            return
        init_projection(self.bottleneck_down, how)
        init_projection(self.bottleneck_up, how, last=True)
        if self.cfg.use_gating:
            init_projection(self.bottleneck_gate, "bert")

    def u(self, x: Tensor) -> Tensor:
        """Return the bottleneck's update for x (rows, …, H), in the adapter's dtype, not x's: `up` with dropout, times
        a sigmoid gate with `use_gating`.

        The gate, from x before the bottleneck, is averaged over all positions of a row; x of two dimensions has one
        gate per row.
        """
        z = self.bottleneck_dropout(self.up(x))
        if self.cfg.use_gating:
            gate = self.bottleneck_gate(x.to(self.dtype)).sigmoid()
            z = z * (gate.mean(tuple(range(1, x.dim() - 1)), keepdim=True) if x.dim() > 2 else gate)
        return z

    def up(self, x: Tensor) -> Tensor:
        """Return s · Up σ(Down x) in the adapter's dtype, σ by its name in any case, without dropout and gate:
        AdapterFusion takes this.

        s is `bottleneck_scale` if the config's scaling is a text, else the number.

        `ln_before` normalizes x first. In training, `stochastic_depth` sets whole rows to 0, and rescales the others.
        """
        cfg, x = self.cfg, x.to(self.dtype)
        z = self.bottleneck_norm(x) if cfg.ln_before else x
        z = self.product(self.bottleneck_down, z)
        z = self.product(self.bottleneck_up, ACTIVATIONS[cfg.non_linearity.lower()](z))
        if cfg.stochastic_depth and self.layer.training:
            z = z * F.dropout(z.new_ones(len(z), *[1] * (z.dim() - 1)), cfg.stochastic_depth)
        return z * (self.bottleneck_scale if isinstance(cfg.scaling, str) else self.scaling)

    def product(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the output of Down or Up for x: of a `Kronecker` with the shared rule and its bias, else the
        module's.
        """
        return x @ module.matrix(self.bottleneck_rule) + module.b if self.cfg.phm_layer else module(x)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the update `u` for the layer's output y; x is not read."""
        return self.u(y)

    def beside(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the update `u` for x, the input of the tapped module; y is not read."""
        return self.u(x)

    def after_embedding(self, ids: object, y: Tensor) -> Tensor:
        """Return the invertible function of the embedding's output y, which is cast to the adapter's dtype, and not
        back. The ids are not read.
        """
        return self.bottleneck_inv(y.to(self.dtype))

    def before_head(self, h: Tensor) -> Tensor:
        """Return the inverse of the invertible function of h, the head's input, which is cast to the adapter's dtype,
        and not back.
        """
        return self.bottleneck_inv.inverse(h.to(self.dtype))

    def before_norm(self, s: Tensor) -> Tensor:
        """Return the update u(LN s) for the norm's input s; the norm's input becomes s + u.

        The base layer, which is the norm, makes LN s here.
        """
        return self.u(self.layer.base_layer(s))


@torch.no_grad()
def init_projection(module: nn.Module, how: str, last: bool = False) -> None:
    """Fill Down, or with `last` Up, with the first values that `how` names, in place. Biases are zeros.

    "bert": normal with std 0.02. "houlsby": normal with std 0.01, cut at ±0.02. "mam_adapter": kaiming uniform (a=√5),
    with `last` zeros. A `Kronecker` is xavier normal, with zeros in W_right for `last` and "mam_adapter".
    """
    if isinstance(module, Kronecker):
        for half in (module.W_left, module.W_right):
            for matrix in half:
                nn.init.xavier_normal_(matrix)
        nn.init.zeros_(module.b)
        if last and how == "mam_adapter":
            nn.init.zeros_(module.W_right)
        return
    nn.init.zeros_(module.bias)
    if how == "bert":
        nn.init.normal_(module.weight, std=0.02)
    elif how == "houlsby":
        nn.init.trunc_normal_(module.weight, std=0.01, a=-0.02, b=0.02)
    elif last:
        nn.init.zeros_(module.weight)
    else:
        fill_kaiming(module.weight)
