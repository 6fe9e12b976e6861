# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv 2303.10512."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from graft.config.bounds import Bound, at_least, must_be
from graft.config.fields import TARGETS
from graft.config.reading import Json
from graft.core.call import Call
from graft.core.containers import Transient
from graft.core.effect import Factors
from graft.core.errors import ConfigError, PeftWarning, warn
from graft.core.method import Method, PublishedRate, Tensors, Tuner
from graft.core.rows import Finish, Run
from graft.kernels.orthogonal import gram_distance
from graft.methods.adalora import allocator
from graft.methods.lora.config import LoraConfig
from graft.storage.parallel import gather_tensor, layout_of

SMOOTHING = must_be("between 0 and 1", lambda beta: 0 < beta < 1)
PENALTY = Bound(
    lambda weight: weight >= 0, "`{name}` should be greater than or equal to 0, but the value passed is {value}"
)


@dataclass(kw_only=True)
class AdaLoraConfig(LoraConfig):
    """AdaLoRA: LoRA in the form of a singular value decomposition; training prunes its least important values.

    Call `model.base_model.update_and_allocate(step)` after each optimizer step, before gradients are zeroed; or use
    `graft.train.adalora_callback` (transformers' Trainer) or `graft.train.allocate_on_step` (any optimizer).
    """

    peft_type: str = "ADALORA"
    target_r: Annotated[int, at_least(1)] = 8  # average rank at the end
    init_r: Annotated[int, at_least(1)] = 12  # rank of every layer at the start
    tinit: Annotated[int, at_least(0)] = 0  # steps before pruning begins
    tfinal: Annotated[int, at_least(0)] = 0  # steps at the end without changes of ranks
    deltaT: Annotated[int, at_least(1)] = 1  # steps between two allocations
    beta1: Annotated[float, SMOOTHING] = 0.85  # smoothing of the sensitivity
    beta2: Annotated[float, SMOOTHING] = 0.85  # smoothing of its uncertainty
    orth_reg_weight: Annotated[float, PENALTY] = 0.5  # weight of the loss that keeps A and B orthogonal
    total_step: int | None = None  # number of training steps; required
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]  # result: masks of the kept values, by layer

    patterns = {}
    results = ("rank_pattern",)
    counters = ("total_step", "tinit", "tfinal", "deltaT")

    def __post_init__(self) -> None:
        """Validate the fields, also those of LoRA.

        Warns if `target_r` is above `init_r`, so that nothing is pruned, and if `r` is not 8, its default, since it is
        not used.

        Raises:
            ConfigError: DoRA, LoftQ or a `loftq_config`; `total_step` is missing or not positive; `tinit` is not below
                `total_step` - `tfinal`, so that no step can prune.
        """
        if self.use_dora:
            raise ConfigError("PeftType.ADALORA does not support DoRA.")
        if self.init_lora_weights == "loftq" or self.loftq_config:
            raise ConfigError("PeftType.ADALORA does not support LOFTQ.")
        super().__post_init__()
        if self.total_step is None or self.total_step <= 0:
            raise ConfigError("AdaLoRA does not work when `total_step` is None, supply a value > 0.")
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                "The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` or increase "
                f"`total_step`: tinit={self.tinit}, tfinal={self.tfinal}, total_step={self.total_step}."
            )
        if self.target_r > self.init_r:
            warn(
                f"target_r={self.target_r} is more than init_r={self.init_r}, the rank at the start: nothing will be "
                "pruned."
            )
        if self.r != 8:
            warn("Note that `r` is not used in AdaLora and will be ignored. Use `init_r`.")

    def to_file_dict(self) -> Json:
        """Return the fields for a file.

        Keys of `rank_pattern` lose the adapter's name: "path.lora_E.name" becomes "path.lora_E".
        """
        values = super().to_file_dict()
        if self.rank_pattern:  # keys without the adapter's name
            values["rank_pattern"] = {re.sub(r"(\.lora_E)\..*$", r"\1", k): v for k, v in self.rank_pattern.items()}
        return values

    def rank_mask(self, key: str) -> list[bool] | None:
        """Return the first mask in `rank_pattern` with the name "key.lora_E" or "key.lora_E.adapter", for any adapter:
        the singular values that the layer kept. None without an entry.
        """
        for name, mask in (self.rank_pattern or {}).items():
            if name == f"{key}.lora_E" or name.startswith(f"{key}.lora_E."):
                return mask
        return None


def warn_if_forgotten(tuner: Tuner) -> None:
    """Give a PeftWarning, once, if an optimizer step has changed the first adapter that trains, and
    `update_and_allocate` was never called.

    A step shows as a changed version of its first A since the first call of this function. Does nothing if an active
    adapter has been allocated or warned of already, or if A is frozen. The remedy names `update_and_allocate` and the
    callbacks; in a PeftMixedModel, that the adapter has to train in a PeftModel.
    """
    for name in tuner.active_adapters:
        state = tuner.states.get(name)
        if state is not None and (state.called or state.warned):
            return
    pair = allocator.trainable(tuner)
    if pair is None or not pair[1]:
        return
    state = allocator.allocator_of(tuner, pair[0])
    A = next(iter(pair[1].values())).lora_A
    if not A.requires_grad:
        return
    state.version = A._version if state.version is None else state.version
    if A._version != state.version:
        state.warned = True
        remedy = (
            "A PeftMixedModel has no allocator: train the adapter in a PeftModel."
            if tuner.is_mixed
            else "Call model.base_model.update_and_allocate(step) after each step, or use "
            "graft.train.adalora_callback (Trainer) or graft.train.allocate_on_step (any optimizer)."
        )
        warn(
            f"AdaLoRA adapter '{pair[0]}' took an optimizer step without update_and_allocate(): its ranks will never "
            f"adapt. {remedy}",
            PeftWarning,
        )


TENSORS = ("lora_A", "lora_B", "lora_E")


class AdaLoRA(Method[AdaLoraConfig]):
    """AdaLoRA, arXiv 2303.10512: ΔW = s · B diag(E) A, A (r, in), E (r, 1), B (out, r).

    Training sets the least important of E to 0.
    """

    prefix = "lora_"
    lays_out_stacks = True  # it takes none
    published_lr = PublishedRate(5e-4, 2.2e-3, "arXiv 2303.10512, its code, GLUE and XSum")
    targets = TARGETS["ADALORA"]
    facts = ("lora_alpha",)
    surrounds_disabled = True  # as PEFT's loss
    over_layers = "divides a budget of ranks among all layers"
    tuner_methods = {
        "update_and_allocate": allocator.update_and_allocate,
        "resize_modules_by_rank_pattern": allocator.resize_modules_by_rank_pattern,
        "trainable_adapter_name": property(lambda tuner: (allocator.trainable(tuner) or (None,))[0]),
    }

    lora_A: nn.Parameter  # (r, fan_in), right singular vectors
    lora_B: nn.Parameter  # (out, r), left singular vectors
    lora_E: nn.Parameter  # (r, 1), singular values
    ranknum: nn.Parameter  # (1,) the rank at the start, which the scaling keeps
    lora_dropout: nn.Module
    scaling: float

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return normal `lora_A` (r, fan_in), `lora_E` (r, 1) and `lora_B` (out, r), r and scaling; r = `init_r`, or
        the number that the config's mask kept.

        scaling = lora_alpha, or `init_r` for an alpha ≤ 0. `ranknum` (1,) holds `init_r`, frozen, and is in no file.
        Floating-point tensors are made on the default device, in the default dtype.

        Raises:
            ConfigError: the weight is a stack of experts.
        """
        site, cfg = self.site, self.cfg
        if site.is_stack:
            raise ConfigError(
                f"AdaLoRA does not adapt stacks of experts (layer '{site.key}'): their matrices would share singular "
                "values. Use LoRA there, or leave the layer out of target_parameters."
            )
        mask = cfg.rank_mask(site.key)
        r = cfg.init_r if mask is None else sum(mask)
        A, E, B = torch.randn(r, site.fan_in), torch.randn(r, 1), torch.randn(site.out_features, r)
        return dict(
            r=r,
            scaling=cfg.lora_alpha if cfg.lora_alpha > 0 else cfg.init_r,
            lora_A=nn.Parameter(A),
            lora_B=nn.Parameter(B),
            lora_E=nn.Parameter(E),
            ranknum=Transient(nn.Parameter(torch.randn(1).fill_(cfg.init_r), requires_grad=False)),
        )

    def init_values(self) -> None:
        """Fill E with zeros, A and B with normal values of std 0.02.

        With `init_lora_weights=False` keep the normal values of `build`.
        """
        if self.cfg.init_lora_weights:
            nn.init.zeros_(self.lora_E)
            nn.init.normal_(self.lora_A, mean=0.0, std=0.02)
            nn.init.normal_(self.lora_B, mean=0.0, std=0.02)

    seen: list[Tensor] | None = None  # distances of A and B as the layer's call saw them
    sees = False  # the tensors are whole only then

    def distances(self) -> list[Tensor]:
        """Return [‖P Pᵀ - I‖ for A, and for Bᵀ]: how far they are from orthonormal.

        `seen` becomes None in all cases. Without `sees` both are computed now. Under FSDP (`sees`) those of the forward
        pass in `seen` are returned. Raises NotImplementedError if it left none.
        """
        seen, self.seen = self.seen, None
        if not self.sees:
            return [gram_distance(self.lora_A), gram_distance(self.lora_B.T)]
        if seen is None:
            raise NotImplementedError(
                f"AdaLoRA adapter '{self.name}' needs the tensors of layer '{self.site.key}' whole, and the call of "
                "this step left no graph. Pass use_reentrant=False to gradient checkpointing."
            )
        return seen

    def factors(self) -> Factors:
        """Return A and B, with E · scaling / (ranknum + 1e-5) as `inner`, in A's dtype, and dropout.

        Under FSDP (`sees`), in training with gradients, also stores the two distances for the loss in `seen`. The
        product is computed in the wider dtype and then cast.
        """
        if self.sees and torch.is_grad_enabled() and self.layer.training:
            self.seen = [gram_distance(self.lora_A), gram_distance(self.lora_B.T)]
        E = (self.lora_E * (self.scaling / (self.ranknum + 1e-5))).flatten().to(self.lora_A.dtype)
        return Factors(self.lora_A, self.lora_B, dropout=self.lora_dropout, inner=E)

    def to_file_tensors(self, values: Tensors, cfg: AdaLoraConfig) -> Tensors:
        """Return the tensors cut to the singular triples that the config's mask kept for this layer; unchanged without
        a mask.

        A tensor of another number of triples than the mask stays as it is.
        """
        mask = cfg.rank_mask(self.site.key)
        if mask is None:
            return values
        return {
            (name, path): t.index_select(find_triples_dim(name), find_kept_indices(mask, t))
            if len(mask) == t.shape[find_triples_dim(name)]
            else t
            for (name, path), t in values.items()  # an adapter from a file has no others
        }

    def from_file_tensors(self, tensors: Tensors, cfg: AdaLoraConfig) -> Tensors:
        """Return the tensors in memory: the file's triples at the places that the mask kept, all others as they are in
        memory, with E = 0.

        Tensors other than A, B and E are unchanged. So are all without a mask for the layer, a tensor of the shape in
        memory, and one that does not fit the mask. Sharded tensors in memory are gathered; results take their dtype and
        device.
        """
        mask = cfg.rank_mask(self.site.key)
        if mask is None:
            return tensors
        out = {}
        for (name, path), t in tensors.items():
            if name not in TENSORS:
                out[name, path] = t
                continue
            current, dim = gather_tensor(getattr(self, name)), find_triples_dim(name)
            if (
                t.dim() == current.dim()
                and t.shape != current.shape
                and (len(mask), sum(mask)) == (current.shape[dim], t.shape[dim])
            ):
                all_ = torch.zeros_like(current) if name == "lora_E" else current.detach().clone()
                t = all_.index_copy_(dim, find_kept_indices(mask, current), t.to(current))
            out[name, path] = t
        return out

    @classmethod
    @contextmanager
    def surround_run(cls, tuner: Tuner, call: Call, run: Run) -> Iterator[Finish]:
        """Yield once the function that adds the orthogonal regularisation to the loss of a training step, or keeps it
        for the caller.

        In training with gradients and outside of TorchDynamo, it first sets `sees` of each layer that trains: True if
        its `lora_A` is sharded. `super().surround_run` is not entered.
        """

        names = list(run.adapters)
        trains = tuner.training and torch.is_grad_enabled() and not is_dynamo_compiling()
        for _, methods in allocator.all_trainable(tuner, names) if trains else ():
            for m in methods.values():
                m.sees = layout_of(m.lora_A) is not None

        def with_loss(output: Any) -> object:
            """Return the output; in training with gradients add the losses of all adapters to `output.loss`, in place.

            If `output.loss` is no tensor, the losses are put into the thread's `losses` instead, unless `generate`
            runs. With gradients, and not in compiled code, `warn_if_forgotten` warns if nobody allocates ranks, also
            outside of training. Without gradients nothing changes.
            """
            if not torch.is_grad_enabled():
                return output
            if not torch.compiler.is_compiling():  # a version is no number that can be traced
                warn_if_forgotten(tuner)
            loss = getattr(output, "loss", None)
            if tuner.training and isinstance(loss, Tensor):
                losses = allocator.orthogonal_losses(tuner, names, run).values()
                output.loss = loss + sum(compute_loss() for compute_loss in losses)
            elif tuner.training and not run.generates:
                call.thread_state.losses.update(allocator.orthogonal_losses(tuner, names, run))
            return output

        yield with_loss


def find_triples_dim(container: str) -> int:
    """Return the dimension that counts singular triples: 1 for "lora_B", else 0."""
    return 1 if container == "lora_B" else 0


def find_kept_indices(mask: list[bool], like: Tensor) -> Tensor:
    """Return the indices of the True entries of a mask, on the device of `like`."""
    return torch.tensor(mask, device=like.device).nonzero()[:, 0]
