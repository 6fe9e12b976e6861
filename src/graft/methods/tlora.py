# SPDX-License-Identifier: Apache-2.0
"""T-LoRA: Single Image Diffusion Model Customization Without Overfitting, arXiv 2507.05964.

The noisier the input, the fewer ranks act. The factors begin orthogonal, and their start is taken out again, so that a
fresh adapter changes nothing at any timestep.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from graft.config.fields import COUNT, LORA, POSITIVE, LayerRange, RankPatterns, Targeted
from graft.core.call import Call
from graft.core.effect import Effect, Factors, Update
from graft.core.errors import ConfigError, RoutingError
from graft.core.method import Method, PublishedRate, Tuner, WeightUse
from graft.core.rows import Constant, Facts, Run
from graft.kernels.waits import raise_unless
from graft.methods.loraxs import check_vectors, find_largest_components

TIMESTEP = "timestep"


@dataclass(kw_only=True)
class TLoraConfig(Targeted, LayerRange, RankPatterns):
    """T-LoRA: LoRA for diffusion models that uses the fewer ranks the noisier the input is.

    Raises:
        ConfigError: min_rank is not between 1 and r, or another number is not positive.
    """

    peft_type: str = "TLORA"
    r: Annotated[int, COUNT] = 4
    lora_alpha: float = 1  # the update counts alpha / r times
    sig_type: Literal["principal", "last", "middle"] = "principal"  # which singular triples it begins with
    use_data_init: bool = True  # those of the weight; else of a random matrix
    min_rank: int = 1  # ranks that act at max_timestep
    alpha_rank_scale: Annotated[float, POSITIVE] = 1.0  # exponent of the share of ranks; above 1, fewer act
    max_timestep: Annotated[float, POSITIVE] = 1000  # of pure noise, in the model's own units: Flux has 1
    init_weights: bool = True  # False: singular values that differ from their start, for tests

    patterns = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}

    def __post_init__(self) -> None:
        """Validate the fields; raise ConfigError unless `min_rank` is from 1 to r."""
        super().__post_init__()
        if not 1 <= self.min_rank <= self.r:
            raise ConfigError(f"`min_rank` must be between 1 and r={self.r}, got {self.min_rank}.")


@contextmanager
def timestep(tuner: Tuner, t: float | Tensor) -> Iterator[None]:
    """Within the block, calls of this thread are at timestep `t`: one for all rows, or (batch,).

    The argument `timestep` of the model is then not read. At the end, also on errors, the former one counts again. The
    range is checked by each call, not here.

    Raises:
        RoutingError: t is None, complex, boolean, or of more than one dimension.
    """
    with tuner.call.extend_context(facts={TIMESTEP: per_row(t)}):
        yield


class TLoRA(Method[TLoraConfig]):
    """T-LoRA, arXiv 2507.05964: ΔW = s · (P diag(λ ⊙ m) Q - P₀ diag(λ₀ ⊙ m) Q₀), m (r,) with ones for the ranks that
    act at a row's timestep.
    """

    prefix = "tlora_"
    unmergeable = "T-LoRA's rank follows the timestep, and no weight is that of all of them"
    published_lr = PublishedRate(1e-4, 1e-4, "arXiv 2507.05964")
    targets = LORA
    ungrouped = "T-LoRA has no factors for a convolution with groups"
    arguments = (TIMESTEP,)
    depends_on = TIMESTEP
    tuner_methods = {TIMESTEP: timestep}

    tlora_P: nn.Parameter  # (out, r)
    tlora_lambda: nn.Parameter  # (r,)
    tlora_Q: nn.Parameter  # (r, fan_in)
    tlora_P0: Tensor  # their start
    tlora_lambda0: Tensor
    tlora_Q0: Tensor
    scaling: float

    def check(self) -> str | None:
        """Return the reason of `Method.check`. Before that, on layers of known type, raises ConfigError if r is above
        the smaller side of the weight, or `min_rank` above this layer's r.
        """
        site, cfg = self.site, self.cfg
        check_vectors("T-LoRA", site, cfg.r)
        if site.op.known and cfg.min_rank > cfg.r:
            raise ConfigError(
                f"`min_rank` is {cfg.min_rank}, and layer '{site.key}' has r={cfg.r}. Choose a smaller one."
            )
        return super().check()

    def uses_weight(self) -> WeightUse:
        """Return `WeightUse.STARTS` with `use_data_init`, else `WeightUse.NONE`."""
        return WeightUse.STARTS if self.cfg.use_data_init else WeightUse.NONE

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return trained `tlora_P` (out, r), `tlora_Q` (r, fan_in) and `tlora_lambda` (r,), buffers `…P0`, `…Q0`,
        `…lambda0` of the same shapes, all zeros; r, and scaling = alpha / r. Floating-point tensors are made on the
        default device, in the default dtype.
        """
        site, r = self.site, self.cfg.r
        shapes = dict(P=(site.out_features, r), Q=(r, site.fan_in)) | {"lambda": (r,)}
        return dict(
            **{f"tlora_{name}": nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()},
            **{f"tlora_{name}0": torch.zeros(shape) for name, shape in shapes.items()},
            r=r,
            scaling=self.cfg.lora_alpha / r,
        )

    @torch.no_grad()
    def init_values(self) -> None:
        """Fill P, λ, Q and their frozen copies with r singular triples of W₀: the largest, last or middle ones by
        `sig_type`.

        Without `use_data_init` of a random normal matrix / r, drawn on the CPU. With `init_weights=False` λ gets normal
        values added, so that ΔW is not 0. Only λ itself gets them, not its copy. No gradients are recorded.
        """
        cfg, P = self.cfg, self.tlora_P
        if cfg.use_data_init:
            W = self.layer.W0.flatten(1)
        else:
            W = torch.randn(self.site.out_features, self.site.fan_in, device="cpu").to(P.device) / cfg.r
        n = min(W.shape) - cfg.r
        U, S, V = find_largest_components(W, cfg.r, {"principal": 0, "last": n, "middle": n // 2}[cfg.sig_type])
        for name, value in dict(P=U, Q=V, **{"lambda": S}).items():
            getattr(self, f"tlora_{name}").copy_(value)
            getattr(self, f"tlora_{name}0").copy_(value)
        if not cfg.init_weights:
            self.tlora_lambda.add_(torch.randn(cfg.r, device="cpu").to(P.device))

    def effect_at(self, value: object) -> Effect:
        """Return an `Update` with the factors of timestep `value`, computed when they are used.

        Raises ConfigError unless it is an int or float (no bool, no tensor) from 0 to `max_timestep`.
        """
        most = self.cfg.max_timestep
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
            raise ConfigError(f"timestep must be a number between 0 and max_timestep={most:g}, got {value!r}.")
        return Update(factors=lambda: self.of_timestep(value))

    def of_timestep(self, t: float) -> Factors:
        """Return the factors for timestep t, with the first k = `ranks`(t): A = [Q; Q₀], B = [P λ, -P₀ λ₀], and the
        scaling.
        """
        k = int(ranks(torch.tensor(t, device="cpu"), self.cfg))
        now = self.tlora_P[:, :k] * self.tlora_lambda[:k]
        start = self.tlora_P0[:, :k] * self.tlora_lambda0[:k]
        A = torch.cat([self.tlora_Q[:k], self.tlora_Q0[:k]])
        return Factors(A, torch.cat([now, -start], 1), self.scaling)

    def branch(self, x: Tensor) -> Tensor:
        """Return s · (P (λ ⊙ m) Q x - P₀ (λ₀ ⊙ m) Q₀ x), m that of each row's timestep.

        Raises RoutingError as `acting` does.
        """
        m = self.acting(x)
        now = self.product(x, self.tlora_Q, self.tlora_lambda * m, self.tlora_P)
        return (now - self.product(x, self.tlora_Q0, self.tlora_lambda0 * m, self.tlora_P0)) * self.scaling

    def product(self, x: Tensor, Q: Tensor, weights: Tensor, P: Tensor) -> Tensor:
        """Return P (weights ⊙ Q x) in the layer's way, with weights for each row, (batch, r), or for all, (1, r).

        All are cast to the adapter's dtype.
        """
        op, base = self.layer.op, self.layer.base_layer
        Q, weights, P = (t.to(self.dtype) for t in (Q, weights, P))  # those that are frozen may have another
        z = op.down(base, x, Q)
        spatial = len(self.site.shape) - 2
        between = [1] * (z.dim() - 2 - spatial)
        return op.up(base, z * weights.unflatten(-1, (*between, -1, *[1] * spatial)), P)

    def acting(self, x: Tensor) -> Tensor:
        """Return the mask m of the ranks that act, the first ones: of each row, (batch, r), or of all, (1, r).

        It is 1 or 0, in the dtype of `tlora_P`, on x's device; `ranks` gives their number.

        Raises:
            RoutingError: the call has no timestep, or another number than x has rows.
        """
        t = self.layer.call.fact(TIMESTEP)
        if t is None:
            raise RoutingError(MISSING)
        if isinstance(t, Constant):
            t = t.value[None]
        elif len(t) != len(x):
            raise RoutingError(
                f"layer '{self.site.key}' received {len(x)} rows for {len(t)} timesteps, not one row per sample. "
                "Give one timestep for all rows (model.timestep(t)), or leave the layer out with exclude_modules."
            )
        k = ranks(t.to(x.device), self.cfg)
        return (torch.arange(self.cfg.r, device=x.device) < k[:, None]).to(self.tlora_P.dtype)

    @classmethod
    def facts_of_run(cls, tuner: Tuner, call: Call, run: Run) -> Facts:
        """Return the timestep of each row as the fact TIMESTEP: that of the `timestep` block around the call, else the
        model's argument `timestep`.

        Raises:
            RoutingError: there is none; one is outside of 0 to the least `max_timestep` of the run's adapters; or they
                are not one for each row.
        """
        fact = call.fact(TIMESTEP)
        if fact is None:
            fact = per_row(run.find_argument(TIMESTEP, tuner.model))
        if run.rows is not None and not isinstance(fact, Constant) and len(fact) != run.rows.batch:
            raise RoutingError(
                f"The call has {run.rows.batch} rows and {len(fact)} timesteps. Give one timestep for each row, or "
                "one for all."
            )
        most = min(tuner.peft_config[name].max_timestep for name in run.adapters)
        t = fact.value if isinstance(fact, Constant) else fact
        text = f"timestep must be between 0 and max_timestep={most:g} of adapters {list(run.adapters)}."
        raise_unless(((t >= 0) & (t <= most)).all(), lambda: RoutingError(text), text)
        return {TIMESTEP: move_to_rows(fact, run)}


MISSING = (
    "T-LoRA has to know the timestep, and neither an argument `timestep` of the model's call nor a block "
    "`with model.timestep(t):` gives it. A model that adapters were injected into has no such block, nor sees its "
    "arguments: call the one that graft.get_peft_model returns."
)


def per_row(t: object) -> Constant | Tensor:
    """Return a timestep as a fact about each row: a tensor (batch,), or a `Constant` () of a single number, () or (1,).

    Dtype and device stay; the range is not checked.

    Raises:
        RoutingError: t is None, has more than one dimension, or is complex or boolean.
    """
    if t is None:
        raise RoutingError(MISSING)
    t = torch.as_tensor(t)
    if t.dim() > 1 or t.is_complex() or t.dtype == torch.bool:
        raise RoutingError(f"timestep must be a number, or one per row, got {t.dtype} of shape {tuple(t.shape)}.")
    return Constant(t.reshape(())) if t.numel() == 1 else t


def move_to_rows(fact: Constant | Tensor, run: Run) -> Constant | Tensor:
    """Return a timestep on the device of the run's first tensor, so that no layer copies it there.

    The argument `timestep` and tensors without dimensions do not count as that tensor. Without one, or on its device
    already, returns the same object. A moved `Constant` is a new Constant.
    """
    t = fact.value if isinstance(fact, Constant) else fact
    values = (*run.inputs, *(value for name, value in run.kwargs.items() if name != TIMESTEP))
    rows = [r for r in values if isinstance(r, Tensor) and r.dim()]
    if not rows or rows[0].device == t.device:
        return fact
    moved = t.to(rows[0].device, non_blocking=True)
    return Constant(moved) if isinstance(fact, Constant) else moved


def ranks(t: Tensor, cfg: TLoraConfig) -> Tensor:
    """Return the number of ranks that act at each timestep, as whole numbers in float32: ⌊((T - t) / T)ᵃ (r -
    min_rank)⌋ + min_rank, with T - t from 0 to T = `max_timestep`, a = `alpha_rank_scale`.
    """
    T, a, more = cfg.max_timestep, cfg.alpha_rank_scale, cfg.r - cfg.min_rank
    left = (T - t.float()).clamp(0, T)
    share = left * more / T if a == 1 else (left / T) ** a * more  # a whole number is not rounded
    return share.floor() + cfg.min_rank
