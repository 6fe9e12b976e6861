# SPDX-License-Identifier: Apache-2.0
"""IA3: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, arXiv 2205.05638."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.config.fields import IA3_FEEDFORWARD, TARGETS, FanInFanOut, Targeted, as_set
from graft.config.reading import compile_pattern
from graft.core.base_config import model_type
from graft.core.containers import Attached
from graft.core.effect import Effect, Rewrite
from graft.core.errors import ConfigError
from graft.core.method import Method, PublishedRate


@dataclass(kw_only=True)
class IA3Config(Targeted, FanInFanOut):
    """IA3: a learned factor per output channel, y ⊙ l, or per input channel of feed-forward layers, W (x ⊙ l)."""

    peft_type: str = "IA3"
    feedforward_modules: list[str] | set[str] | str | None = None  # target_modules with a factor on the input
    init_ia3_weights: bool = True  # ones; else N(0, 1)

    def __post_init__(self) -> None:
        """Validate the fields; make `feedforward_modules` a set unless it is a regular expression.

        Raises ConfigError if it has names that are in neither `target_modules` nor `target_parameters`.
        """
        super().__post_init__()
        self.feedforward_modules = as_set(self.feedforward_modules)
        targets, inner = self.target_modules, self.feedforward_modules
        parameters = set(self.target_parameters or ())
        if isinstance(targets, set) and isinstance(inner, set) and (left := inner - targets - parameters):
            raise ConfigError(
                f"`feedforward_modules` should be a subset of `target_modules`, but has {sorted(left)} too."
            )

    def is_feedforward(self, key: str) -> bool:
        """Return True if the layer at path `key` is a feed-forward layer, scaled at its input.

        `feedforward_modules` is a regular expression for the whole path, or names that the path may end with, also
        inside a name: "proj" fits "q_proj".
        """
        if isinstance(self.feedforward_modules, str):
            return compile_pattern(self.feedforward_modules, "feedforward_modules").fullmatch(key) is not None
        return any(key.endswith(name) for name in self.feedforward_modules or ())


class IA3(Method[IA3Config]):
    """IA3, arXiv 2205.05638: y ⊙ l, l (out,); in feed-forward layers W (x ⊙ l), l (in,)."""

    prefix = "ia3_"
    published_lr = PublishedRate(3e-3, 3e-3, "arXiv 2205.05638, T-Few, with Adafactor")
    targets = TARGETS["IA3"]
    compresses_targets = False  # or feedforward_modules would no longer be among them

    ia3_l: nn.Parameter  # (out, 1); feed-forward (1, in); convolutions (1, channels, 1, …)

    @classmethod
    def prepare(cls, cfg: IA3Config, model: nn.Module) -> None:
        """Set `feedforward_modules`, if it is None, to the default of the model type, as a set.

        Raises ConfigError if there is none.
        """
        if cfg.feedforward_modules is None:
            kind = model_type(model)
            if kind not in IA3_FEEDFORWARD:
                raise ConfigError(
                    f"Please specify `feedforward_modules` in `peft_config`: no defaults for model_type '{kind}'. "
                    "An empty list means that there are none."
                )
            cfg.feedforward_modules = as_set(IA3_FEEDFORWARD[kind])

    def check(self) -> str | None:
        """Return the reason that an embedding's input cannot be scaled, if a feed-forward name fits it; else that of
        `Method.check`.
        """
        if self.site.op.takes_ids and self.inner:
            return "An embedding's input cannot be scaled, so it cannot be a feed-forward module"
        return super().check()

    @property
    def inner(self) -> bool:
        """True if the config scales this layer's input, as `is_feedforward` says."""
        return self.cfg.is_feedforward(self.site.key)

    def describe(self) -> Effect:
        """Return a `Rewrite` by `fold`, with `pre` on a feed-forward layer, else `post`."""
        inner = self.inner
        return Rewrite(self.fold, pre=self.pre if inner else None, post=None if inner else self.post)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return `ia3_l` with normal values, and `is_feedforward`, an `Attached` bool.

        A feed-forward layer has a factor for each input, others for each output. The shape is (out, 1), for
        feed-forward (1, in); for convolutions of both kinds (1, channels, 1, …). Floating-point tensors are made on the
        default device, in the default dtype.
        """
        site, inner = self.site, self.inner
        n, spatial = site.in_features if inner else site.out_features, len(site.shape) - 2
        shape = (1, n, *[1] * spatial) if spatial or inner else (n, 1)
        return dict(ia3_l=nn.Parameter(torch.randn(shape)), is_feedforward=Attached(inner))

    def init_values(self) -> None:
        """Fill l with ones; with `init_ia3_weights=False` keep the normal values."""
        if self.cfg.init_ia3_weights:
            nn.init.ones_(self.ia3_l)

    @property
    def scale(self) -> Tensor:
        """The factors l, shaped so that they multiply the channels of an input or output."""
        return self.site.op.channels(self.ia3_l.flatten())

    def pre(self, x: Tensor) -> Tensor:
        """Return x ⊙ l, without a cast: the wider dtype counts."""
        return x * self.scale

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y ⊙ l, without a cast: the wider dtype counts. x is not read."""
        return y * self.scale

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight with rows times l, and the bias times l; on a feed-forward layer columns times l, and the
        bias unchanged. Results are new tensors in the dtypes of weight and bias.

        Of a convolution with groups, l's channels are those of each group.
        """
        l = self.ia3_l.flatten().to(W.dtype)
        if not self.inner:
            return W * l.view(-1, *[1] * (W.dim() - 1)), None if b is None else b * l.to(b.dtype)
        groups = self.site.op.count_groups(self.site.module)
        per_group = l.view(groups, -1).repeat_interleave(W.shape[0] // groups, dim=0)  # (out, in / groups)
        return W * per_group.view(*per_group.shape, *[1] * (W.dim() - 2)), b
