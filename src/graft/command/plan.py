# SPDX-License-Identifier: Apache-2.0
"""`graft plan`: what an adapter would adapt, and what training it would take, from a model's config alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from graft.command.app import app, print_json
from graft.files.errors import OptionError

DTYPES = ("float32", "float16", "bfloat16")
WAYS = ((False, None), (True, None), (False, 4), (True, 4))  # checkpointing, bits of the base
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@app.command()
def plan(
    model: Annotated[Path, typer.Argument(help="Folder with config.json; weights are not needed.")],
    config: Annotated[
        Path | None, typer.Option(help="adapter_config.json, or its folder; else the options below.")
    ] = None,
    method: Annotated[str, typer.Option(help="peft_type of the method.")] = "LORA",
    rank: Annotated[int, typer.Option("--rank", "-r", min=1)] = 16,
    targets: Annotated[str, typer.Option(help="Names by commas, or all-linear.")] = "all-linear",
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 1,
    length: Annotated[int, typer.Option("--seq", min=1, help="Tokens of a row.")] = 1024,
    dtype: Annotated[str, typer.Option(help="Of the base: float32, float16, bfloat16.")] = "bfloat16",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Blocks run again in the backward pass.")
    ] = False,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit, sgd.")] = "adamw",
    gpu: Annotated[str | None, typer.Option(help="Memory of a GPU, 24GB: say what fits.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One document for programs.")] = False,
) -> None:
    """Show what an adapter would adapt, and the memory that a training step takes, part by part.

    Activations are measured where autograd keeps them, on tensors without memory; weights are never made.

    Example: graft plan models/llama --rank 16 --batch 4 --seq 2048 --gpu 24GB
    """
    from graft.command.merge import size
    from graft.files.merging.skeleton import skeleton
    from graft.model.api import plan as planned

    if dtype not in DTYPES:
        raise OptionError(f"--dtype is one of {', '.join(DTYPES)}, not {dtype!r}.")
    whole = skeleton(str(model))
    if whole is None:
        raise OptionError(f"{model} has no config.json of a model that the installed transformers knows.")
    adapter = adapter_config(config, method, rank, targets)
    report = planned(whole, adapter)
    found = account(whole, adapter, report)
    budgets = memory(whole, adapter, batch, length, dtype, optimizer, gpu is not None)
    held = budgets(checkpointing, None)
    found["memory"] = held.as_dict() | {"batch": batch, "seq": length, "dtype": dtype, "checkpointing": checkpointing}
    if gpu is not None:
        found["gpu"] = {"bytes": size(gpu), "fits": fits(budgets, batch, size(gpu))}
    if as_json:
        print_json(found)
    else:
        show(report, found)


def adapter_config(path: Path | None, method: str, rank: int, targets: str) -> Any:
    """Return the config of the adapter: of a file, or of the options."""
    from graft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig

    if path is not None:
        return PeftConfig.from_pretrained(str(path.parent if path.is_file() else path))
    kinds = {str(getattr(kind, "value", kind)): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if method.upper() not in kinds:
        raise OptionError(f"--method is one of {', '.join(sorted(kinds))}, not {method!r}.")
    kind: Any = kinds[method.upper()]
    names = {"target_modules": targets if targets == "all-linear" else targets.split(",")}
    fields = kind.__dataclass_fields__
    return kind(**{n: v for n, v in {**names, "r": rank}.items() if n in fields})


def account(model: Any, adapter: Any, report: Any) -> dict[str, Any]:
    """Return what the report says, for programs: how many blocks of each kind have an adapter."""
    from graft.model.budget import block_kinds, coverage

    blocks = coverage([m.name for m in report.matched], block_kinds(model))
    return {
        "method": report.peft_type, "layers": len(report.matched), "trainable": report.trainable_parameters,
        "base_parameters": report.base_parameters,
        "blocks": {kind: {"all": n, "adapted": adapted} for kind, (n, adapted) in blocks.items()},
        "unmatched_targets": sorted(report.unmatched_targets),
    }  # fmt: skip


def memory(
    model: Any, adapter: Any, batch: int, length: int, dtype: str, optimizer: str, on_gpu: bool
) -> Callable[[bool, int | None], Any]:
    """Return what gives the budget of a step: (checkpointing, bits of the base) → Budget."""
    import copy

    import torch

    from graft.model.budget import budget

    held = model.config
    name = next((n for n in LAYERS if isinstance(getattr(held, n, None), int)), None)
    if name is None:
        raise OptionError(f"The config of {type(model).__name__} does not say how many blocks it has ({LAYERS[0]}).")

    def make(n: int) -> Any:
        config = copy.deepcopy(held)
        setattr(config, name, n)
        if isinstance(getattr(config, "layer_types", None), list):
            config.layer_types = config.layer_types[:n]
        with torch.device("meta"):
            return type(model)(config)

    def of(checkpointing: bool, bits: int | None) -> Any:
        layers = int(getattr(held, name))
        return budget(
            make, layers, adapter, batch, length, getattr(torch, dtype), checkpointing, optimizer, on_gpu, bits
        )

    return of


def fits(budgets: Callable[[bool, int | None], Any], batch: int, gpu: int) -> list[dict[str, Any]]:
    """Return the largest batch for each way of training."""
    from graft.model.budget import largest_batch

    found = []
    for checkpointing, bits in WAYS:
        held = budgets(checkpointing, bits)
        most = largest_batch(held, batch, gpu)
        found.append({"checkpointing": checkpointing, "bits": bits, "total": held.total, "largest_batch": most})
    return found


def show(report: Any, found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(report)
    for kind, of in found["blocks"].items():
        without = of["all"] - of["adapted"]
        if without:
            console.print(f"{without} of {of['all']} blocks ({kind}) have no adapter.")
    held = found["memory"]
    table = Table(title=f"A step of {held['batch']} × {held['seq']} tokens, {held['dtype']}", title_justify="left")
    table.add_column("part")
    table.add_column("GB", justify="right")
    names = {"weights": "base's weights", "adapter": "adapter", "gradients": "gradients", "optimizer": "optimizer",
             "kept": "activations", "logits": "gradient of the logits",
             "context": "CUDA context", "total": "all"}  # fmt: skip
    for name, title in names.items():
        if held[name]:
            table.add_row(title, f"{held[name] / 1e9:.3f}", style="bold" if name == "total" else "")
    console.print(table)
    if "gpu" in found:
        console.print(f"In {found['gpu']['bytes'] / 1e9:g} GB:")
        for way in found["gpu"]["fits"]:
            how = f"{'with' if way['checkpointing'] else 'without'} checkpointing, base in " + (
                f"{way['bits']} bits" if way["bits"] else held["dtype"]
            )
            most = way["largest_batch"]
            console.print(f"  {how}: " + (f"batches up to {most}" if most else "does not fit"))
