# SPDX-License-Identifier: Apache-2.0
"""How an adapter of LoRA starts: kaiming (arXiv 2106.09685), gaussian, orthogonal, or by `start.py` from the base
weight.

PEFT adds the update of an nn.MultiheadAttention's output projection twice, in training, inference and merging. So the
values of B in a file count twice there. graft keeps the update as the config says it in memory, and halves and doubles
B on the way: either library computes the same from a file of the other, and nothing is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graft.config.base import PeftConfig
from graft.core.errors import ConfigError
from graft.core.method import Method, Tensors, WeightUse
from graft.core.random import kaiming_bound
from graft.methods.lora import shift
from graft.methods.lora.config import LoraConfig
from graft.methods.lora.start import BASE_MARKS, STARTS, start_name, start_of

KNOWN = ("True", "False", "gaussian", "orthogonal", "mica", "eva", "pissa_niter_[number]", *STARTS)


def initialise(lora: Method, how: bool | str) -> None:
    """Fill A and B of `lora`, and set a bias of B to 0 unless `how` is False.

    True: A kaiming uniform, B zeros; on an embedding A zeros, B normal. False: all values stay as `build` made them.
    "gaussian" in any spelling: A normal with std 1/r, B zeros. "orthogonal", for 2-D factors: `_orthogonal`. "eva", on
    linear layers: B zeros, A stays. An initialisation of STARTS (pissa, olora, corda, lora_ga, loftq):
    `set_first_values`, which changes the base weight; on the meta device, before it, A and B get the values of True.

    Raises:
        ConfigError: any other value, or one that has no meaning for this type of layer.
    """
    A, B = (p.data for p in lora.pair)
    site = lora.site
    if lora.lora_bias and how is not False:
        lora.lora_B.bias.data.zero_()
    if how is True and site.op.takes_ids:
        A.zero_()
        B.normal_()
    elif how is True:
        _plain(A, B)
    elif how is False:
        pass  # as the modules of A and B, or `build`, initialise themselves
    elif how.lower() == "gaussian":
        A.normal_(std=1 / lora.cfg.r)
        B.zero_()
    elif start_name(how) is not None:
        if site.on_meta:
            _plain(A, B)
        set_first_values(lora, A, B)
    elif how == "orthogonal" and A.dim() == 2:
        _orthogonal(A, B)
    elif how == "eva" and site.op.linear:
        B.zero_()  # and A as its module initialises itself, until `initialize_lora_eva_weights`
    else:
        why = "has no meaning" if how in KNOWN else "is unknown"
        raise ConfigError(
            f"Unknown initialization init_lora_weights='{how}' for layer '{site.key}' ({site.type_name}): it {why} "
            f"there. Known ones: {', '.join(KNOWN)}; convolutions take the first three, embeddings also orthogonal."
        )


def _plain(A: Tensor, B: Tensor) -> None:
    """Fill A as a new nn.Linear: uniform within ±1/√fan_in, fan_in counted over a row of A.

    Fill B with zeros. Both are data of parameters, so that autograd records nothing.
    """
    bound = kaiming_bound(A[0].numel())
    A.uniform_(-bound, bound)
    B.zero_()


def _orthogonal(A: Tensor, B: Tensor) -> None:
    """Fill A (r, in) and B (out, r) from rows of one random orthogonal matrix (r, r), so that B A = 0: A from rows 0,
    2, …, B from 1, 3, ….

    Both are products with normal values, divided by 10. Raises ConfigError for an odd r.
    """
    r = A.shape[0]
    if r % 2:
        raise ConfigError(f"Orthogonal initialization requires the LoRA rank to be even, got {r} instead.")
    Q, _ = torch.linalg.qr(torch.randn(r, r))
    odd, even = Q[0::2], Q[1::2]  # (r/2, r) each
    A.copy_((torch.randn(A.shape[1], r // 2) @ odd).T / 10)
    B.copy_((torch.randn(r // 2, B.shape[0]).T @ even) / 10)


@torch.no_grad()
def set_first_values(lora: Method, A: Tensor, B: Tensor) -> None:
    """Fill A and B with the start of `init_lora_weights`, and subtract its product from the base weight
    (`shift.take_out`).

    On the meta device nothing is filled; `rewrite_base` warns.

    Raises:
        ConfigError: the layer is not linear, or another module uses its weight as well.
    """
    site, how = lora.site, lora.cfg.init_lora_weights
    if not site.op.linear:
        raise ConfigError(
            f"init_lora_weights={how!r} changes the weight of a linear layer and has no meaning for "
            f"'{site.key}' ({site.type_name}). Take the layer out of target_modules, or choose another initialisation "
            "for it."
        )
    if site.shared:
        raise ConfigError(
            f"init_lora_weights={how!r} would change the weight of layer '{site.key}', which another module uses as "
            "well. Take the layer out of target_modules, or choose another initialisation."
        )
    W = lora.layer.W0
    if site.on_meta:
        lora.layer.rewrite_base(W)  # warns, as there is nothing to begin with
        return
    start = start_of(lora, W)
    A.copy_(start.A)
    B.copy_(start.B)
    shift.take_out(lora, start.taken_A, start.taken_B)


PLACE = ("lora_B", "weight")


def scale_B(tensors: Tensors, factor: float) -> Tensors:
    """Return tensors by place, with B of a linear layer times `factor`; the others as they are."""
    return {place: t * factor if place == PLACE else t for place, t in tensors.items()}


class Started(Method[LoraConfig]):
    """LoRA with a start by `init_lora_weights`, and a `Shift` on each layer with a base weight that the start
    changes.
    """

    def init_values(self) -> None:
        """Fill A and B as `init_lora_weights` says (`initialise`); an initialisation of STARTS also changes the base
        weight.
        """
        initialise(self, self.cfg.init_lora_weights)

    def restart(self, how: bool | str) -> None:
        """Fill A and B anew as initialisation `how` (`initialise`).

        Raises:
            ConfigError: `how` is not True, False or "gaussian" (in any spelling).
        """
        if not isinstance(how, bool) and how.lower() != "gaussian":
            raise ConfigError(
                f"Unknown initialization init_lora_weights={how!r} for values that start again on layer "
                f"'{self.site.key}': True, False and 'gaussian' are known. For another, add the adapter anew."
            )
        initialise(self, how)

    @property
    def base_mark(self) -> str:  # type: ignore[override]
        """The attribute of the base module that the calibration sets: "eigens" of CorDA, "_peft_loraga_grad" of
        LoRA-GA; "" for other starts.
        """
        return BASE_MARKS.get(self.cfg.init_lora_weights, "")

    @classmethod
    def changes_base(cls, cfg: LoraConfig) -> str | None:
        """Return "init_lora_weights=…" if that initialisation is in STARTS, so that `init_values` changes the base
        weight; else None.
        """
        how = cfg.init_lora_weights
        return f"init_lora_weights={how!r}" if start_name(how) else None

    def uses_weight(self) -> WeightUse:
        """Return `WeightUse.STARTS | WeightUse.CHANGES` if `changes_base` names a setting: `init_values` reads and
        changes the weight.

        Else `WeightUse.NONE`.
        """
        return WeightUse.NONE if self.changes_base(self.cfg) is None else WeightUse.STARTS | WeightUse.CHANGES

    @property
    def keeps_shift(self) -> bool:
        """True if the adapter holds the product that `init_values` subtracts from the base: the initialisation is in
        STARTS (an exact str) and the layer is linear.
        """
        how = self.cfg.init_lora_weights
        return type(how) is str and start_name(how) is not None and self.site.op.linear

    @property
    def shift_rank(self) -> int:
        """Return the rank of the product that `init_values` subtracts from the base: r, or 0 for LoftQ with one round,
        which subtracts nothing before it quantizes.
        """
        cfg, loftq = self.cfg, self.cfg.loftq_config
        assert isinstance(loftq, dict)  # as `check_start` leaves it
        return 0 if cfg.init_lora_weights == "loftq" and loftq["loftq_iter"] == 1 else cfg.r

    def to_file_tensors(self, values: Tensors, cfg: LoraConfig) -> Tensors:
        """Return the file's tensors, the same dict if nothing differs: B halved if the config names the module around
        the site (`via_container`).

        `lora_shift` is left out if the initialisation in `cfg` is not one of STARTS: then the file is for the base as
        it is now.
        """
        if self.via_container:
            values = scale_B(values, 0.5)
        if start_name(cfg.init_lora_weights) is None:  # a caller says so: the file is for the base as it is now
            return {place: t for place, t in values.items() if place[0] != shift.NAME}
        return values

    @property
    def is_stored_unchanged(self) -> bool:
        """True if `to_file_tensors` is this class's, the adapter holds no shift, and B is not halved
        (`via_container`).
        """
        return type(self).to_file_tensors is Started.to_file_tensors and not self.keeps_shift and not self.via_container

    def from_file_tensors(self, tensors: Tensors, cfg: PeftConfig) -> Tensors:
        """Return the tensors in memory: B doubled with `via_container`; with `keeps_shift` a missing shift is added
        (`complete_file_tensors`).
        """
        tensors = shift.complete_file_tensors(self, tensors) if self.keeps_shift else tensors
        return scale_B(tensors, 2) if self.via_container else tensors

    def finish_load(self) -> None:
        """With `keeps_shift`, change the base weight as the loaded shift says (`apply_file_shift`). Else do nothing."""
        if self.keeps_shift:
            shift.apply_file_shift(self)
