# SPDX-License-Identifier: Apache-2.0
"""VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks, arXiv 2405.15179."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from graft.config.bounds import Bound
from graft.config.fields import COUNT, POSITIVE, VBLORA, BaseBias, FanInFanOut, LayerRange, Targeted
from graft.core.call import Call
from graft.core.effect import Factors
from graft.core.errors import CheckpointError, ConfigError
from graft.core.method import COMPARISON, AdaptedLayers, Method, PublishedRate, Tensors, Tuner
from graft.core.random import skip_draws
from graft.core.rows import Facts, Run
from graft.core.site import Site
from graft.kernels.eager import eager, watched
from graft.kernels.waits import raise_unless
from graft.methods.projections import indivisible

SIZE = Bound(POSITIVE.allows, "`{name}` {value} should be a positive integer value")


@dataclass(kw_only=True)
class VBLoRAConfig(Targeted, LayerRange, FanInFanOut, BaseBias):
    """VB-LoRA: ΔW = B A, made of mixtures of a few vectors from a bank that all layers share."""

    peft_type: str = "VBLORA"
    r: Annotated[int, COUNT] = 4
    num_vectors: Annotated[int, SIZE] = 256  # in the bank
    vector_length: Annotated[int, SIZE] = 256  # must divide the widths of all layers
    topk: Annotated[int, SIZE] = 2  # how many vectors a mixture has
    save_only_topk_weights: bool = False  # small files, which cannot be trained further
    vblora_dropout: float = 0.0
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def __post_init__(self) -> None:
        """Validate the fields; raise ConfigError if `topk` is above `num_vectors`."""
        super().__post_init__()
        if self.topk > self.num_vectors:
            raise ConfigError(f"`topk` {self.topk} is more than `num_vectors` {self.num_vectors}")

    @property
    def index_type(self) -> torch.dtype:
        """The integer dtype for indices of vectors in files: uint8 below 256 vectors, int16 below 2¹⁵, int32 below 2³¹,
        else int64.
        """
        sizes = ((2**8, torch.uint8), (2**15, torch.int16), (2**31, torch.int32))
        return next((dtype for most, dtype in sizes if self.num_vectors < most), torch.int64)


INDICES, WEIGHTS = "_topk_indices", "_topk_weights"  # ends of names in files with the largest logits alone
ROUNDED = 1.05  # the most that weights in half precision can sum up to


def check_largest(shape: torch.Size, index: Tensor, first: Tensor, topk: int, where: str) -> None:
    """Raise CheckpointError unless `index` (…, topk) and `first` (…, topk - 1) can be indices and weights of the
    largest logits of `shape`.

    Checked: shapes and integer dtype, the range of indices, no index twice, floating-point weights ≥ 0 with a sum of at
    most 1.05. `where` names the tensor.
    """
    rows, n = shape[:-1], shape[-1]
    shapes = index.shape == (*rows, topk) and first.shape == (*rows, topk - 1)
    if not shapes or index.is_floating_point() or index.dtype is torch.bool:
        why = f"shapes {tuple(index.shape)} and {tuple(first.shape)}"
    elif int(index.min()) < 0 or int(index.max()) >= n:
        why = f"an index outside the bank of {n} vectors"
    elif topk > 1 and bool((index.long().sort(-1)[0].diff() == 0).any()):
        why = "one index twice"
    elif not first.is_floating_point() or bool((first.float() < 0).any() | (first.float().sum(-1) > ROUNDED).any()):
        why = "weights that are negative, or sum up to more than 1"
    else:
        return
    raise CheckpointError(
        f"{where}{INDICES} and {WEIGHTS} have {why}: they are not the {topk} largest of logits of shape {tuple(shape)}."
    )


def savable_parameters(tuner: Tuner, adapter: str = "default") -> tuple[int, int]:
    """Return two counts of numbers, in units of four bytes: VB-LoRA's in a file of `adapter`, and those of other
    parameters that train.

    With `save_only_topk_weights` logits count as their `topk` indices and weights. Raises AdapterNotFoundError for an
    unknown adapter. Tensors of any adapter, not only of this one, are left out of the other parameters. An adapter of
    another method is not refused.
    """
    tuner.check_known([adapter])
    cfg, carriers = tuner.peft_config[adapter], [*tuner.layers.values(), tuner.common_tensors]
    added = {id(slot.tensor) for c in carriers for name in c.adapters for slot in c.slots(name)}
    other_count = sum(p.numel() for p in tuner.model.parameters() if p.requires_grad and id(p) not in added)
    bank, *logits = (sum(slot.tensor.numel() for slot in c.slots(adapter)) for c in reversed(carriers))
    size: float = sum(logits)
    if cfg.save_only_topk_weights:
        size *= (cfg.topk - 1 + cfg.topk * cfg.index_type.itemsize / 4) / cfg.num_vectors
    return int(bank + size), other_count


def print_savable_parameters(tuner: Tuner, adapter: str = "default") -> None:
    """Print the two counts of `savable_parameters`: VB-LoRA's, and the total."""
    count, trained = savable_parameters(tuner, adapter)
    print(
        f"VB-LoRA params to-be-saved (float32-equivalent): {count:,d} || total params to-be-saved: {count + trained:,d}"
    )


LOGITS = ("vblora_logits_A", "vblora_logits_B")
TRUNCATED = (
    "Found infinity values in VB-LoRA logits. Ensure training was not resumed from a `save_only_topk_weights` model, "
    "as adapter '{}' is. Call eval() to run it."
)


class VBLoRA(Method[VBLoRAConfig]):
    """VB-LoRA, arXiv 2405.15179: ΔW = B A.

    Each L numbers of a row of A, or of a column of B, mix the vectors of the k largest logits.
    """

    prefix = "vblora_"
    published_lr = PublishedRate(5e-4, 5e-4, COMPARISON)
    targets = VBLORA
    facts = ("r", "topk")
    tuner_methods = {
        "get_nb_savable_parameters": savable_parameters,
        "print_savable_parameters": print_savable_parameters,
    }

    vblora_logits_A: nn.Parameter  # (r, in / L, vectors)
    vblora_logits_B: nn.Parameter  # (out / L, r, vectors)
    vblora_vector_bank: nn.Parameter  # (vectors, L), shared
    vblora_dropout: nn.Module

    looked_at: Tensor | None = None  # the logits, since they were made or loaded

    @classmethod
    def share(cls, layers: AdaptedLayers) -> dict[str, object]:
        """Return a new trained bank `vblora_vector_bank` (vectors, L) for each adapter, uniform within
        ±`init_vector_bank_bound`.

        The values are those of PEFT, which draws the bank again for each layer; torch's generator stays as it was.
        """
        cfg = layers.cfg
        bank = torch.empty(cfg.num_vectors, cfg.vector_length)
        with torch.random.fork_rng(devices=[]):  # PEFT draws it for each layer, before the logits, and keeps the last
            for site in layers.sites:
                nn.init.uniform_(bank, -cfg.init_vector_bank_bound, cfg.init_vector_bank_bound)
                for shape in logits_of(site, cfg):
                    torch.empty(shape).normal_()
        return dict(vblora_vector_bank=nn.Parameter(bank))

    def check(self) -> str | None:
        """Return the reason of `Method.check`, or, only if that is None, that `vector_length` does not divide
        in_features or out_features.
        """
        text = f"`{{name}}` {{size}} must be divisible by `vector_length` {self.cfg.vector_length}"
        return super().check() or indivisible(self.site, self.cfg.vector_length, text)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return uninitialised logits `vblora_logits_A` (r, in / L, vectors) and `vblora_logits_B` (out / L, r,
        vectors), and the shared bank. Floating-point tensors are made on the default
        device, in the default dtype.
        """
        A, B = (nn.Parameter(torch.empty(shape)) for shape in logits_of(self.site, self.cfg))
        return dict(vblora_logits_A=A, vblora_logits_B=B) | shared

    def init_values(self) -> None:
        """Fill both logits with normal values of std `init_logits_std`, after the generator has advanced as far as for
        a bank, as in PEFT.
        """
        skip_draws(torch.empty(self.cfg.num_vectors, self.cfg.vector_length))  # see `share`
        for logits in (self.vblora_logits_A, self.vblora_logits_B):
            nn.init.normal_(logits, std=self.cfg.init_logits_std)

    def factors(self) -> Factors:
        """Return A (r, in) and B (out, r), mixed from the bank by the logits, with dropout."""
        A, B = self.mix_vectors(self.vblora_logits_A), self.mix_vectors(self.vblora_logits_B)
        return Factors(A.flatten(1), B.transpose(1, 2).flatten(0, 1), dropout=self.vblora_dropout)

    def mix_vectors(self, logits: Tensor) -> Tensor:
        """Return Σ softmax(k largest logits) · their vectors of the bank: logits (…, vectors) → (…, L).

        The bank moves to the logits' device.
        """
        largest, index = logits.topk(self.cfg.topk, dim=-1)
        vectors = self.vblora_vector_bank.to(logits.device).index_select(0, index.flatten())
        return (largest.softmax(-1)[..., None] * vectors.view(*index.shape, -1)).sum(-2)

    @classmethod
    def facts_of_run(cls, tuner: Tuner, call: Call, run: Run) -> Facts:
        """Return no facts. Raise RuntimeError for an adapter of the run that came from a file with only its largest
        logits (`refuse_truncated`). Only its first layer is looked at, if that is in training mode.

        Not checked in compiled code, or under a dispatch mode.
        """
        if eager() and not watched():
            for name in run.adapters:
                m = next((layer.methods[name] for layer in tuner.layers.values() if name in layer.methods), None)
                if m is not None and m.layer.training:
                    refuse_truncated(m)
        return {}

    def to_file_tensors(self, values: Tensors, cfg: VBLoRAConfig) -> Tensors:
        """Return the tensors as they are, in a new dict.

        With `save_only_topk_weights` replace each logits by two tensors:

        `…_topk_indices` (…, k), in `index_type`, and `…_topk_weights` (…, k - 1). The weights are the softmax of the k
        largest logits, largest first, without the last one.
        """
        out = dict(values)
        for name in LOGITS if cfg.save_only_topk_weights else ():
            largest, index = out.pop((name, "")).topk(cfg.topk, dim=-1)
            out[name + INDICES, ""] = index.to(cfg.index_type)
            out[name + WEIGHTS, ""] = largest.softmax(-1)[..., :-1].contiguous()
        return out

    def from_file_tensors(self, tensors: Tensors, cfg: VBLoRAConfig) -> Tensors:
        """Return the tensors with logits restored from `…_topk_indices` and `…_topk_weights`: log weights at the
        indices, -inf elsewhere.

        The last weight is 1 minus the sum of the others, at least 0. Logits without both tensors, and all other
        tensors, stay. Sets `looked_at` to None. Raises CheckpointError for indices or weights that cannot be
        (`check_largest`).
        """
        out, self.looked_at = dict(tensors), None
        for name in LOGITS:
            if (name + INDICES, "") in out and (name + WEIGHTS, "") in out:
                index, first = out.pop((name + INDICES, "")), out.pop((name + WEIGHTS, ""))
                check_largest(getattr(self, name).shape, index, first, cfg.topk, f"{self.site.key}.{name}")
                index = index.long()
                last = (1 - first.sum(-1, keepdim=True)).clamp(min=0)  # rounding may leave less
                empty = first.new_full((*index.shape[:-1], cfg.num_vectors), -torch.inf)
                out[name, ""] = empty.scatter(-1, index, torch.cat([first, last], -1).log())
        return out


def refuse_truncated(m: Any) -> None:
    """Raise RuntimeError if the adapter's first logits contain -inf: it has only its largest logits, and cannot train.

    Only the first row of `vblora_logits_A` is read. New logits are noted in `looked_at` and read on the host, which
    waits for the device; later runs check on the device, without a wait. Does nothing on the meta device.
    """
    logits, text = m.vblora_logits_A, TRUNCATED.format(m.name)
    if logits.is_meta:
        return
    known, m.looked_at = vars(m).get("looked_at") is logits, logits
    whole = ~logits.flatten(0, -2)[0].isneginf().any()
    raise_unless(whole if known else whole.cpu(), lambda: RuntimeError(text), text)


def logits_of(site: Site, cfg: VBLoRAConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the logits: of A (r, fan_in / L, vectors), and of B (out / L, r, vectors)."""
    L, n, r = cfg.vector_length, cfg.num_vectors, cfg.r
    return (r, site.fan_in // L, n), (site.out_features // L, r, n)
