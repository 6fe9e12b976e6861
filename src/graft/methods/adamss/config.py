# SPDX-License-Identifier: Apache-2.0
"""AdamssConfig: the subspaces, and the schedule by which fewer and fewer of them train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from graft.config.fields import LayerRange, Targets, require_positive_rank
from graft.core.errors import ConfigError

SCHEDULE = (
    *("asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval"),
    *("asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent"),
)


@dataclass(kw_only=True)
class AdamssConfig(Targets, LayerRange):
    """AdaMSS: rows of the weight in clusters, and a small product in the space of singular vectors for each cluster.

    With `use_asa` call `model.base_model.update_and_allocate(step)` after each backward pass, before gradients are
    zeroed; or use `AdamssAsaCallback` (transformers' Trainer). Needs scikit-learn: `pip install graft[methods]`.
    """

    peft_type: Any = "ADAMSS"
    r: int = 100  # how many singular vectors span the space
    num_subspaces: int = 5  # clusters of rows of each layer
    subspace_rank: int = 1  # of the product of a cluster
    init_weights: Literal["orthogonal"] | bool | None = "orthogonal"  # None or False: B begins random, not 0
    use_asa: bool = False  # let fewer and fewer subspaces train
    asa_target_subspaces: int = 50  # how many do in the end, of all layers together
    init_warmup: int = 50  # steps before the number falls
    final_warmup: int = 1000  # the step at which it has reached the target
    mask_interval: int = 100  # steps between two choices
    asa_importance_beta: float = 0.85  # smoothing of the sensitivity
    asa_uncertainty_beta: float = 0.85  # smoothing of its uncertainty
    asa_schedule_exponent: float = 3.0  # the higher, the sooner the number falls
    use_dynamic_rank: bool = False  # a cluster has a rank for each singular value that is large enough
    svd_threshold: float = 0.1  # how large, compared with the largest
    random_seed: int = 0  # of the randomized SVD

    counters: ClassVar[tuple[str, ...]] = ("random_seed", "init_warmup", "final_warmup", "mask_interval")

    def __post_init__(self) -> None:
        for name in SCHEDULE if not self.use_asa else ():  # nobody looks at these: files have null there
            if getattr(self, name) is None:
                setattr(self, name, type(self).__dataclass_fields__[name].default)
        super().__post_init__()
        require_positive_rank(self.r)
        if self.init_weights is False:
            self.init_weights = None
        if self.init_weights not in ("orthogonal", None):
            raise ConfigError(f"`init_weights` must be 'orthogonal' or None, got {self.init_weights!r}")
        for name in ("num_subspaces", "subspace_rank"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"`{name}` should be a positive integer value, got {getattr(self, name)}")
        if not self.use_asa:
            return
        for name, what in (
            ("mask_interval", "integer"),
            ("asa_target_subspaces", "integer"),
            ("asa_schedule_exponent", "number"),
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"`{name}` must be a positive {what} when `use_asa=True`, got {getattr(self, name)}.")
        if self.init_warmup >= self.final_warmup:
            raise ConfigError(
                f"`init_warmup` ({self.init_warmup}) must be less than `final_warmup` ({self.final_warmup}) when "
                "`use_asa` is set"
            )
