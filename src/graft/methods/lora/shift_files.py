# SPDX-License-Identifier: Apache-2.0
"""What an initialisation has taken out of a base weight, from a file: completed, and taken out of the base here."""

from __future__ import annotations

from typing import Any

import torch

from graft.core.errors import ConfigError, PeftWarning, warn
from graft.core.method import Tensors
from graft.methods.lora.shift import NAME, Shift, near, sample, take_out, title_of
from graft.methods.lora.start import start_of


def restored(lora: Any, stored: Tensors) -> Tensors:
    """Complete a file's tensors: one of PEFT holds no shift, which is then computed anew where that is possible."""
    shift = lora.lora_shift
    stored_shift = {place[1]: t for place, t in stored.items() if place[0] == NAME}
    complete = stored_shift.keys() >= {"A", "B", "sample"}
    shift.before = None
    if shift.done:
        here = {(NAME, n): getattr(shift, n) for n in ("A", "B", "sample")}
        if not complete:  # the base stays as this adapter has it
            return stored | here
        if not all(torch.equal(stored_shift[n].to(here[NAME, n]), here[NAME, n]) for n in "AB"):
            if lora.cfg.init_lora_weights == "loftq" or not lora.layer.store.exact:
                raise ConfigError(
                    f"Adapter '{lora.name}' cannot take the values of this file: on layer '{lora.site.key}' "
                    f"{title_of(lora)} has quantized another weight, which cannot be undone. Load it onto a fresh base "
                    "model."
                )
            shift.before = here[NAME, "A"].clone(), here[NAME, "B"].clone()
        return stored
    return stored if complete else stored | computed(lora)


def computed(lora: Any) -> Tensors:
    """Return the shift of a file that does not hold it, as the initialisation makes it from the weight."""
    site, cfg = lora.site, lora.cfg
    made = Shift(lora.shift_rank, site.shape)
    if site.on_meta:
        return {(NAME, n): getattr(made, n) for n in ("A", "B", "sample")}
    W = lora.layer.W0
    seen = sample(W).expand(2, -1)
    if cfg.init_lora_weights == "lora_ga" and not hasattr(lora.site.module, "_peft_loraga_grad"):
        warn(
            f"The file of adapter '{lora.name}' does not hold what LoRA-GA took out of the base weights: it is right "
            "on the base as LoRA-GA left it, and on no other.",
            PeftWarning,
        )
        return {(NAME, "A"): made.A, (NAME, "B"): made.B, (NAME, "sample"): seen}
    start = start_of(lora, W)
    return {(NAME, "A"): start.taken_A, (NAME, "B"): start.taken_B, (NAME, "sample"): seen}


def loaded(lora: Any) -> None:
    """Change the base weight as the file's shift says, unless it has been changed so already."""
    shift, layer = lora.lora_shift, lora.layer
    if shift.done:
        if shift.before is not None:
            (A, B), W = shift.before, layer.W0
            shift.before = None
            wide = W.to(torch.promote_types(W.dtype, torch.float32))
            layer.rewrite_base((wide + (B @ A - shift.B @ shift.A).to(wide)).to(W.dtype))
            layer.settle()
        return
    if lora.site.on_meta:
        layer.rewrite_base(layer.W0)  # warns, as there is nothing to change
        return
    here, (fresh, changed) = sample(layer.W0), shift.sample.to(layer.W0.device)
    if torch.dist(here, changed) < torch.dist(here, fresh) and near(here, changed):
        shift.done = True
        warn(
            f"The base model has been changed already as the {title_of(lora)} initialisation of adapter '{lora.name}' "
            "does it: it stays as it is.",
            PeftWarning,
        )
        return
    if not near(here, fresh):
        warn(
            f"The {title_of(lora)} initialisation of adapter '{lora.name}' changed a base model with other weights: "
            "expect other outputs than in training.",
            PeftWarning,
        )
    take_out(lora, shift.A, shift.B)
