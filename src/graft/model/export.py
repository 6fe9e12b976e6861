# SPDX-License-Identifier: Apache-2.0
"""Adapters of a model in the form that servers read (`graft.files.export`): any method that has a ΔW becomes LoRA."""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor, nn

from graft.core.errors import PeftWarning, warn
from graft.core.folding import change_of
from graft.files.convert import ENDS
from graft.files.errors import LossError
from graft.files.export import Exported
from graft.files.export import export as export_file
from graft.files.formats import peft
from graft.files.serving import server_named
from graft.inject.parts import reads
from graft.io import files
from graft.io.fingerprint import fingerprint, weights_of
from graft.model.checkpoints import check, contents, folder_of, names_to_save
from graft.model.convert import convert_to_lora, found
from graft.model.in_memory import names_in

ENERGY = 0.9999  # part of ‖ΔW‖² that a method which is no LoRA keeps


def export_adapters(
    model: nn.Module, directory: str, selected: list[str] | None, server: str, writes: bool = True
) -> None:
    """Write adapters for a server, "default" into the folder and others into sub-folders.

    A format that is one file is adapter.gguf there, or what its end is.
    """
    end = ENDS.get(server_named(server).formats[0])
    check(directory, "sampled", True)
    for name in names_to_save(model, selected, directory):
        if writes:
            path = folder_of(name, directory)
            if end is not None:
                os.makedirs(path, exist_ok=True)
                path = os.path.join(path, f"adapter{end}")
            report = export(model, name, server, path)
            if report.error is not None and report.error > 1e-3:
                warn(
                    f"Adapter '{name}' is no LoRA: what was written differs from its ΔW by {report.error:.1%}.",
                    PeftWarning,
                )


@reads
def export(model: nn.Module, adapter: str, server: str, path: str, rank: int | float | None = None) -> Exported:
    """Write an adapter of a model for a server.

    Args:
        rank: of a method that is no LoRA: as `graft.convert_to_lora` takes it.

    Raises:
        LossError: no LoRA does what the adapter does.
        TypeError: the adapter has no ΔW.
    """
    config, error = model.peft_config[adapter], None
    if config.is_prompt_learning:
        raise LossError(
            f"Adapter '{adapter}' ({config.peft_type.value}) is an input of the model, which no LoRA can take over: "
            "serve it from a PeftModel, or train a LoRA."
        )
    if config.peft_type == "LORA" and rank is None:
        tensors, config = contents(model, adapter, None, False, None)
    else:
        made, tensors = convert_to_lora(model, ENERGY if rank is None else rank, adapter)
        made.base_model_name_or_path, error = config.base_model_name_or_path, error_of(model, adapter, tensors)
        config = made
    parts, _, base, _ = found(model, adapter)
    with tempfile.TemporaryDirectory() as folder:
        files.save_adapter(folder, tensors, config, True, fingerprint(weights_of(parts, base)))
        file = peft.read(folder)
        file.path = f"adapter '{adapter}'"
        report = export_file(file, server, names_in(model), os.fspath(path))
    report.error = error
    if error is not None:
        report.notes.insert(0, f"ΔW became a product of factors, with a relative error of {error:.2g}")
    return report


@torch.no_grad()
def error_of(model: nn.Module, adapter: str, tensors: dict[str, Tensor]) -> float:
    """Return ‖ΔW - B A‖ / ‖ΔW‖ over all layers, for the tensors of `convert_to_lora`, whose scaling is 1."""
    parts, prefix, *_ = found(model, adapter)
    lost = whole = 0.0
    for key, layer in parts.layers.items():
        A, B, _ = change_of(layer.methods[adapter])
        delta = A if B is None else B @ A
        made = product(tensors, f"{prefix}{key}")
        if made is not None:
            lost += float((delta.flatten(0, 1) - made.to(delta).reshape(-1, delta.shape[-1])).square().sum())
            whole += float(delta.square().sum())
    return (lost / whole) ** 0.5 if whole else 0.0


def product(tensors: dict[str, Tensor], stem: str) -> Tensor | None:
    A, B = (tensors.get(f"{stem}.lora_{name}.weight") for name in "AB")
    if A is None or B is None:
        return None
    return B.flatten(1).float() @ A.flatten(1).float()
