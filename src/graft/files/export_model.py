# SPDX-License-Identifier: Apache-2.0
"""Export of a model's adapters for servers: every method with a ΔW becomes LoRA, then `graft.files.export`
writes it.
"""

from __future__ import annotations

import os
import tempfile
import warnings

import torch
from torch import nn

from graft import ConfigError, LossError, PeftWarning, save_as_lora
from graft.files.convert import ENDS
from graft.files.errors import OptionError
from graft.files.export import ExportReport
from graft.files.export import export_adapter_file as export_file
from graft.files.formats import peft
from graft.files.load import describe_base_of, find_adapter_layers
from graft.files.neutral import AdapterFile
from graft.files.pickles import to_torch
from graft.files.serving import get_server

ENERGY = 1 - 1e-8  # share of ‖ΔW‖² that each layer keeps, for methods other than LoRA
LOSS = 1e-3  # share of a layer's ‖ΔW‖ that may be lost without `lossy`
RANK = 512  # the largest rank that servers accept


def export_adapters(model: nn.Module, folders: dict[str, str], server: str, writes: bool = True) -> None:
    """Write adapters of a model for a server, each into its folder: {adapter: folder}.

    For a format of one file that file is `adapter` plus its ending, in the folder. With `writes` False only the check
    of `server` runs, as on processes that do not save.
    """
    end = ENDS.get(get_server(server).formats[0])
    for name, path in folders.items():
        if writes:
            if end is not None:
                os.makedirs(path, exist_ok=True)
                path = os.path.join(path, f"adapter{end}")
            export_model_adapter(model, name, server, path)


def export_model_adapter(
    model: nn.Module, adapter: str, server: str, path: str, rank: int | float | None = None, lossy: bool = False
) -> ExportReport:
    """Write one adapter of a model for a server, and return an account. A method other than LoRA is converted first.

    The account has the error of the conversion as `error` and as first note; LoRA without `rank` has none. The adapter
    goes through a temporary PEFT folder, without rows of embeddings. The conversion's own warning is silenced.

    Args:
        rank: for methods other than LoRA, as `graft.convert_to_lora` takes it; None: the lowest that keeps 1 - 1e-8 of
            each layer's ‖ΔW‖². With a rank, LoRA is converted, too.
        lossy: allow a rank that loses more than a thousandth of a layer's ‖ΔW‖.

    Raises:
        KeyError: the model has no such adapter.
        LossError: the adapter is a prompt, plain LoRA cannot do the same, a layer loses too much at this rank, or
            without `rank` a layer needs more than servers allow.
        OptionError: an adapter or a layer does not allow this `rank`.
        TypeError: the adapter has no ΔW.
    """
    config, error = model.peft_config[adapter], None
    if config.is_prompt_learning:
        raise LossError(
            f"Adapter '{adapter}' ({config.peft_type.value}) is an input of the model, which no LoRA can replace. "
            "Serve it from a PeftModel, or train a LoRA."
        )
    with tempfile.TemporaryDirectory() as folder:
        if config.peft_type == "LORA" and rank is None:
            model.save_pretrained(folder, selected_adapters=[adapter], save_embedding_layers=False)
            file = peft.read(folder if adapter == "default" else os.path.join(folder, adapter))
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "As LoRA of rank", PeftWarning)  # LossError below says the same
                try:
                    save_as_lora(folder, model, ENERGY if rank is None else rank, adapter)
                except ConfigError as e:
                    if rank is None:
                        raise
                    raise OptionError(str(e)) from e
            file = peft.read(folder)
            error = check_factor_loss(model, adapter, file, rank, lossy)
        file.path = f"adapter '{adapter}'"
        report = export_file(file, server, describe_base_of(model), os.fspath(path))
    report.error = error
    if error is not None:
        report.notes.insert(0, f"ΔW became a product of factors, with a relative error of {error:.2g}")
    return report


@torch.no_grad()
def check_factor_loss(
    model: nn.Module, adapter: str, file: AdapterFile, rank: int | float | None, lossy: bool
) -> float:
    """Return ‖ΔW - B A‖ / ‖ΔW‖ over all layers, for the factors in a file of `save_as_lora`; 0 if all ΔW are 0.

    The factors' scaling is 1. Layers without factors in the file are skipped, and so are stacks of experts and
    embeddings. A layer with ΔW = 0 never counts as lossy. Errors are raised after all layers were measured, the loss
    before the rank.

    Args:
        rank: as the user asked for, for the text; None: each layer has the lowest rank that holds its change.

    Raises:
        LossError: a layer loses more than 1e-3 of its ‖ΔW‖ plus half the epsilon of B's dtype, unless `lossy`; the text
            names the one that exceeds this bound most. Also, without a `rank` and even with `lossy`, if a layer needs a
            rank above 512; the text names the highest.
    """
    lost = whole = worst = 0.0
    where, ranks = "", dict[str, int]()
    for key, layer in find_adapter_layers(model).items():
        factors = file.low_rank.get(key)
        if factors is None or factors.kind not in ("linear", "conv"):
            continue
        A, B = to_torch(factors.A), to_torch(factors.B)
        change, ranks[key] = layer.compute_change(adapter), len(A)
        delta = (change.A if change.B is None else change.B @ change.A).flatten(0, 1)
        approximation = (B.flatten(1).float() @ A.flatten(1).float()).to(delta).reshape(-1, delta.shape[-1])
        off, size = float((delta - approximation).square().sum()), float(delta.square().sum())
        lost, whole = lost + off, whole + size
        bound = LOSS + torch.finfo(B.dtype).eps / 2
        if size and (off / size) ** 0.5 / bound > worst:
            worst, where = (off / size) ** 0.5 / bound, f"'{key}' loses {(off / size) ** 0.5:.1%} of its ‖ΔW‖"
    if worst > 1 and not lossy:
        raise LossError(
            f"As LoRA of rank {rank}, adapter '{adapter}' loses too much: {where}. Leave --rank out, which takes the "
            "lowest rank that holds it, merge it (graft merge), or pass lossy=True (--lossy)."
        )
    highest = max(ranks, key=lambda key: ranks[key], default="")
    if rank is None and ranks and ranks[highest] > RANK:
        raise LossError(
            f"Adapter '{adapter}' ({model.peft_config[adapter].peft_type.value}) needs rank {ranks[highest]} on "
            f"'{highest}', and servers take {RANK} at most. Merge it (graft merge), or pass a lower rank and lossy=True"
            " (--lossy)."
        )
    return (lost / whole) ** 0.5 if whole else 0.0
