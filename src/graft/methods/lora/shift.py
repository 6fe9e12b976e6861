# SPDX-License-Identifier: Apache-2.0
"""The update that an initialisation subtracts from a base weight: saved with the adapter, and subtracted again on
loading.

PiSSA, OLoRA, CorDA and LoRA-GA make W ← W - B A, LoftQ W ← Q(W - B A). The file holds A, B and a few values of the
weight before and after. So a load makes the same base without the data, the generator's state or the same SVD, and
recognises a base that has been changed already.

The module `lora_shift` holds float32 factors, and 16 values of the weight before and after. A load subtracts the same
product from the base, to the same bits, on a quantized base as well. A base with the values of after is left unchanged,
with a warning: so two adapters of one start share a base. PEFT reads such files and drops the extra tensors without a
warning. For a file of PEFT, graft computes the shift as PEFT does, where that needs no data. If the config in memory
has another `init_lora_weights` when the adapter is saved (PEFT's way to share a changed base), the file has no shift. A
fingerprint would not do, since knowing a base does not restore it; LoRA of twice the rank would not, since training
could not continue.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from graft.core.containers import ExactBuffers
from graft.core.errors import ConfigError, PeftWarning, warn
from graft.core.method import Method, Tensors
from graft.methods.lora.loftq import round_to_bits
from graft.methods.lora.start import start_of
from graft.methods.lora.sub_configs import TITLES

NAME = "lora_shift"  # container
SAMPLES = 16
TOLERANCE = 2**-7  # relative: a base in half precision is the same base


class Shift(ExactBuffers):
    """The product B A that an initialisation subtracted from one weight, kept in float32: rounded, it would make
    another base.
    """

    A: Tensor  # (k, in)
    B: Tensor  # (out, k), times the scaling
    sample: Tensor  # (2, n): evenly spaced values of the base weight before, and after

    def __init__(self, k: int, shape: tuple[int, ...], device: torch.device | None = None):
        """Register the buffers A (k, in), B (out, k) and sample (2, n), n = min(16, out · in): zeros in float32.

        The base counts as unchanged.
        """
        super().__init__()
        out, fan_in = shape
        zeros = partial(torch.zeros, device=device, dtype=torch.float32)
        self.register_buffer("A", zeros(k, fan_in))
        self.register_buffer("B", zeros(out, k))
        self.register_buffer("sample", zeros(2, min(SAMPLES, out * fan_in)))
        self.done = False  # the base has been changed
        self.before: tuple[Tensor, Tensor] | None = None  # A and B while a file's others are taking their place


def sample(W: Tensor) -> Tensor:
    """Return min(16, numel) evenly spaced values of a matrix W, row by row, in float32, without gradient."""
    n = min(SAMPLES, W.numel())
    at = torch.arange(n, device=W.device) * (W.numel() // n)
    return W.detach()[at // W.shape[1], at % W.shape[1]].float()


def is_base_changed(W: Tensor, seen: Tensor) -> bool:
    """Return True if W is the weight after the initialisation: its sample is near that one, and nearer than the one
    before. `seen`: the samples before and after, (2, n), on W's device.
    """
    current, (fresh, changed) = sample(W), seen
    return bool(torch.dist(current, changed) < torch.dist(current, fresh)) and are_near(current, changed)


def without(W: Tensor, A: Tensor, B: Tensor, bits: int | None = None) -> Tensor:
    """Return the base weight that remains: W - B A, in W's dtype, computed in at least float32.

    With `bits`, of LoftQ, it is also rounded to them. W, A and B are matrices, with the scale inside; A and B are
    widened before the product. Nothing is subtracted if A has no rows.
    """
    wide = W.to(torch.promote_types(W.dtype, torch.float32))
    if len(A):
        wide = wide - B.to(wide) @ A.to(wide)
    return (wide if bits is None else round_to_bits(wide, bits)).to(W.dtype)


def subtract_start(W: Tensor, A: Tensor, B: Tensor, seen: Tensor | None, bits: int | None) -> Tensor:
    """Return `without(W, A, B, bits)`; W itself if its sample shows that the base has been changed already.

    seen: the samples before and after, as of `is_base_changed`; None: the base counts as unchanged.
    """
    return W if seen is not None and is_base_changed(W, seen) else without(W, A, B, bits)


def take_out(lora: Method, A: Tensor, B: Tensor) -> None:
    """Replace the base weight by `without(W, A, B)`, rounded for LoftQ to its bits.

    Warns if the layer has other adapters too.

    With `keeps_shift`, also store A and B in `lora_shift`, detached and in float32, with a sample of the weight before
    and after, and mark it as done.
    """
    layer, W = lora.layer, lora.layer.W0
    if len(layer.methods) > 1:
        title = title_of(lora)
        warn(
            f"{title} changes the base weights of the model and should thus not be used with other adapters. Consider "
            f"saving the {title} adapter as plain LoRA, with path_initial_model_for_weight_conversion."
        )
    bits = lora.cfg.loftq_config["loftq_bits"] if lora.cfg.init_lora_weights == "loftq" else None
    before, changed = sample(W), without(W, A, B, bits)
    layer.rewrite_base(changed)
    if lora.keeps_shift:
        shift = lora.lora_shift
        shift.A, shift.B = A.detach().float(), B.detach().float()
        after = changed if layer.store.exact else layer.W0  # which has been rounded
        shift.sample, shift.done = torch.stack([before, sample(after)]), True


def title_of(lora: Method) -> str:
    """Return the printed name of the adapter's initialisation, such as "PiSSA".

    A text without such a name is a KeyError, a bool an AttributeError.
    """
    how = lora.cfg.init_lora_weights
    return TITLES["pissa" if how.startswith("pissa") else how]


def are_near(a: Tensor, b: Tensor) -> bool:
    """Return True if a and b are equal up to 2⁻⁷, relative to each value plus b's largest: the rounding of half
    precision.
    """
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * float(b.abs().max()))


def complete_file_tensors(lora: Method, tensors: Tensors) -> Tensors:
    """Return a file's tensors with a complete shift.

    A file with all three tensors of the shift (A, B, sample) stays as it is, and so does a damaged one with some of
    them. If it has none, they are added: those of this adapter if it has changed the base already, else
    `compute_shift`.

    If the base was changed with another A or B than the file's, keep copies of the current ones in `shift.before`, so
    that `apply_file_shift` can undo them. In all other cases `shift.before` becomes None.

    Raises:
        ConfigError: that change was a quantization (LoftQ, or a weight that is not exact), which cannot be undone.
    """
    shift = lora.lora_shift
    shift_in_file = {place[1]: t for place, t in tensors.items() if place[0] == NAME}
    complete = shift_in_file.keys() >= {"A", "B", "sample"}
    shift.before = None
    if shift_in_file and not complete:
        return tensors  # the load reports those that are missing
    if shift.done:
        current = {(NAME, n): getattr(shift, n) for n in ("A", "B", "sample")}
        if not complete:  # the base stays as this adapter has it
            return tensors | current
        if not all(torch.equal(shift_in_file[n].to(current[NAME, n]), current[NAME, n]) for n in "AB"):
            if lora.cfg.init_lora_weights == "loftq" or not lora.layer.store.exact:
                raise ConfigError(
                    f"Adapter '{lora.name}' cannot take the values of this file: on layer '{lora.site.key}' "
                    f"{title_of(lora)} has quantized another weight, which cannot be undone. Load it onto a fresh base "
                    "model."
                )
            shift.before = current[NAME, "A"].clone(), current[NAME, "B"].clone()
        return tensors
    return tensors if complete else tensors | compute_shift(lora)


def compute_shift(lora: Method) -> Tensors:
    """Return the three tensors of the shift for a file that lacks them, computed anew by the initialisation from the
    current weight. Both rows of the sample are values of that weight.

    On the meta device they are zeros. LoRA-GA without a gradient warns, and gets a shift of zeros: the base counts as
    changed already.
    """
    site, cfg = lora.site, lora.cfg
    empty_shift = Shift(lora.shift_rank, site.shape)
    if site.on_meta:
        return {(NAME, n): getattr(empty_shift, n) for n in ("A", "B", "sample")}
    W = lora.layer.W0
    seen = sample(W).expand(2, -1)
    if cfg.init_lora_weights == "lora_ga" and not hasattr(lora.site.module, "_peft_loraga_grad"):
        warn(
            f"The file of adapter '{lora.name}' does not hold LoRA-GA's change of the base weights. It is right only "
            "on the base as LoRA-GA left it.",
            PeftWarning,
        )
        return {(NAME, "A"): empty_shift.A, (NAME, "B"): empty_shift.B, (NAME, "sample"): seen}
    start = start_of(lora, W)
    return {(NAME, "A"): start.taken_A, (NAME, "B"): start.taken_B, (NAME, "sample"): seen}


def apply_file_shift(lora: Method) -> None:
    """Change the base weight as the loaded shift says.

    If this adapter has changed it already: exchange the former product for the file's (`shift.before`, which becomes
    None) and forget how the layer would roll back, or without `before` do nothing. On the meta device only warn. If the
    weight's sample is nearest to the file's changed one, warn, mark it as done and leave it. If the sample fits
    neither, warn. Then subtract the product (`take_out`), which marks it as done.
    """
    shift, layer = lora.lora_shift, lora.layer
    if shift.done:
        if shift.before is not None:
            (A, B), W = shift.before, layer.W0
            shift.before = None
            wide = W.to(torch.promote_types(W.dtype, torch.float32))
            layer.rewrite_base((wide + (B @ A - shift.B @ shift.A).to(wide)).to(W.dtype))
            layer.drop_rollback()
        return
    if lora.site.on_meta:
        layer.rewrite_base(layer.W0)  # warns, as there is nothing to change
        return
    seen = shift.sample.to(layer.W0.device)
    if is_base_changed(layer.W0, seen):
        shift.done = True
        warn(
            f"The base model has been changed already as the {title_of(lora)} initialisation of adapter '{lora.name}' "
            "does it: it stays as it is.",
            PeftWarning,
        )
        return
    if not are_near(sample(layer.W0), seen[0]):
        warn(
            f"The {title_of(lora)} initialisation of adapter '{lora.name}' changed a base model with other weights. "
            "Expect other outputs than in training.",
            PeftWarning,
        )
    take_out(lora, shift.A, shift.B)
