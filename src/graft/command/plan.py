# SPDX-License-Identifier: Apache-2.0
"""`graft plan`: the layers that an adapter would adapt and the memory of training, from a model's config alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft import CheckpointError, ConfigError
from graft.command import show
from graft.command.app import Result, add_verb
from graft.config.reading import Json, read_object
from graft.files.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graft import InjectReport, PeftConfig
    from graft.files.budget import Training

DTYPES = ("float32", "float16", "bfloat16")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@add_verb
def plan(
    model: str,
    *,
    config: Path | None = None,
    method: str = "LORA",
    rank: Annotated[int | None, typer.Option("--rank", "-r", min=1)] = None,
    targets: str | None = None,
    parameters: str = "",
    settings: Annotated[list[str] | None, typer.Option("--set")] = None,
    base: str | None = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    length: Annotated[int, typer.Option("--seq", min=1)] = 1024,
    dtype: str = "bfloat16",
    checkpointing: bool = False,
    optimizer: str = "adamw",
    gpu: str | None = None,
) -> Result:
    """Show the layers that an adapter would adapt, and the memory of a training step, part by part.

    Activations are measured where autograd keeps them, on tensors without memory; weights are never created.

    Example: graft plan models/llama --rank 16 --batch 4 --seq 2048 --gpu 24GB

    Args:
        model: Folder with config.json, or hub id; weights are not needed.
        config: adapter_config.json, or its folder; default: the options below.
        method: peft_type of the method.
        rank: 16 if the method needs one.
        targets: Names by commas, or all-linear; default: all-linear, or the method's own places.
        parameters: Stacks of experts, as experts.gate_up_proj,experts.down_proj.
        settings: A field of the method's config, as num_virtual_tokens=20; several times for several.
        base: How the base is packed: nf4, mxfp4, nvfp4, fp8, none; default: as config.json says.
        batch: Rows of a step.
        length: Tokens of a row.
        dtype: Of the base: float32, float16, bfloat16.
        checkpointing: Blocks run again in the backward pass.
        optimizer: adamw, adamw_8bit, sgd.
        gpu: Memory of a GPU, 24GB: show whether the step fits.

    Returns:
        The document is `summarize_report`'s with memory, and with `gpu` whether the step fits into 97 % of it. Errors
        of a config from options become OptionError with a remedy; those of a file stay.
    """
    from graft import plan as planned
    from graft.command.change import parse_size
    from graft.files.budget import SPARE, measure_budget
    from graft.files.skeleton import build_meta_model
    from graft.files.sources import find_base

    if dtype not in DTYPES:
        raise OptionError(f"--dtype {dtype} is unknown. Choose one of {', '.join(DTYPES)}.")
    folder = find_base(model)
    whole = build_meta_model(folder)
    if whole is None:
        raise CheckpointError(
            f"{model} has no config.json that this transformers knows. Give another folder, or a newer transformers."
        )
    packed = choose_base_format(read_object(Path(folder, "config.json")), base)
    try:
        adapter = make_adapter_config(config, method, rank, targets, parameters, settings or [], find_task_type(whole))
        report = planned(whole, adapter)
    except ConfigError as e:
        if config is not None:
            raise
        raise OptionError(f"{e} Fields of {method.upper()}'s config: --set name=value, or a file by --config.") from e
    document = summarize_report(whole, report)
    training = make_training(whole, adapter, length, dtype, gpu is not None)
    memory = measure_budget(training, batch, checkpointing, optimizer, packed)
    how = {"batch": batch, "seq": length, "dtype": dtype, "checkpointing": checkpointing, "base": packed}
    document["memory"] = {**vars(memory), "total": memory.total, **how}
    if gpu is not None:
        document["gpu"] = {"bytes": parse_size(gpu), "fits": memory.total <= parse_size(gpu) * (1 - SPARE)}
    return Result(document, partial(print_plan, report, document))


def choose_base_format(config: Json, option: str | None) -> str | None:
    """Return the weight format of the base, a key of FORMATS: the option's, or without one that of config.json.

    None means not packed; the option "none" gives it, too.

    Raises OptionError for an option that is neither "none" nor a text among the keys of FORMATS.
    """
    from graft.files.bases import read_quantization_format
    from graft.files.budget import FORMATS

    if option is not None:
        known = [name for name in FORMATS if isinstance(name, str)] + ["none"]
        if option not in known:
            raise OptionError(f"--base {option} is unknown. Choose one of {', '.join(known)}.")
        return None if option == "none" else option
    return read_quantization_format(config)


def find_task_type(model: PreTrainedModel) -> str | None:
    """Return "SEQ_2_SEQ_LM" or "CAUSAL_LM" for a language model, by its config and class name; None for other models.

    Prompts need it.
    """
    if model.config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None


def make_adapter_config(
    path: Path | None,
    method: str,
    rank: int | None,
    targets: str | None,
    parameters: str = "",
    settings: Sequence[str] = (),
    task: str | None = None,
) -> PeftConfig:
    """Return the adapter's config: from a folder `path`, or the folder of a file, or without a path from the options.

    A loaded config gets `inference_mode=False`, and `task` if it has no task type; other options are then ignored.

    Without `targets`, LoRA-like methods target all linear layers, and other methods keep their own default. Targets
    other than "all-linear", and `parameters`, are split at commas. `rank` also sets `init_r` in place of `r` where a
    config has it, and `oft_block_size` to 0. Without it the rank is 16 if the method has `r` alone with a default other
    than 0. Options that the method's config lacks are ignored, but not `settings`, which win over the others.

    Raises:
        OptionError: the method is unknown, or a setting is malformed.
    """
    from graft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, method_of

    if path is not None:
        config = PeftConfig.from_pretrained(str(path.parent if path.is_file() else path))
        config.inference_mode = False  # a save sets it
        config.task_type = config.task_type or task
        return config
    kinds = {str(getattr(kind, "value", kind)): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if method.upper() not in kinds:
        raise OptionError(f"--method {method} is unknown. Choose one of {', '.join(sorted(kinds))}.")
    kind = kinds[method.upper()]
    # the method's default targets are like LoRA's
    if targets is None and "nemotron_h" in getattr(method_of(method.upper()), "targets", ()):
        targets = "all-linear"
    names: Json = {}
    if targets is not None:
        names["target_modules"] = targets if targets == "all-linear" else show.split_commas(targets)
    if parameters:
        names["target_parameters"] = show.split_commas(parameters)
    fields = kind.__dataclass_fields__
    if rank is not None:
        of_rank = "init_r" if "init_r" in fields else "r"  # AdaLoRA starts at init_r
        names |= {of_rank: rank, "oft_block_size": 0}  # OFT takes r or a block size
    elif "r" in fields and "init_r" not in fields and fields["r"].default != 0:
        names["r"] = 16
    chosen = {"task_type": task, **{n: v for n, v in names.items() if n in fields}}
    return kind(**chosen | dict(map(parse_setting, settings)))


def parse_setting(text: str) -> tuple[str, object]:
    """Return name and value of a text name=value. The value is parsed as JSON, or else kept as a text.

    Raises:
        OptionError: the name is no identifier, or "=" is missing.
    """
    name, sign, value = text.partition("=")
    if not (name.isidentifier() and sign):
        raise OptionError(f"--set {text!r} is no name=value. Write it as --set num_virtual_tokens=20.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def summarize_report(model: PreTrainedModel, report: InjectReport) -> Json:
    """Return the report of an injection as plain values for JSON: method, layers, trainable, base_parameters, blocks
    and unmatched_targets.

    `layers` is the number of matched modules. `blocks` has by kind the numbers of all and of adapted blocks.
    """
    from graft.files.budget import count_adapted_blocks, find_block_classes

    blocks = count_adapted_blocks([m.name for m in report.matched], find_block_classes(model))
    return {
        "method": report.peft_type, "layers": len(report.matched), "trainable": report.trainable_parameters,
        "base_parameters": report.base_parameters,
        "blocks": {kind: {"all": n, "adapted": adapted} for kind, (n, adapted) in blocks.items()},
        "unmatched_targets": sorted(report.unmatched_targets),
    }  # fmt: skip


def make_training(model: PreTrainedModel, adapter: PeftConfig, length: int, dtype: str, on_gpu: bool) -> Training:
    """Return the training setup of an adapter on a model, which can be built with any number of blocks.

    Raises OptionError if the config does not say how many blocks the model has. `make` builds only the base model, on
    the default device. The other values are stored as they are; `period` is that of the config's `layer_types`.
    """
    import torch

    from graft.files.budget import Training

    text = model.config.get_text_config()
    name = next((n for n in LAYERS if isinstance(getattr(text, n, None), int)), None)
    if name is None:
        raise OptionError(f"The config of {type(model).__name__} does not say how many blocks it has. Add {LAYERS[0]}.")
    kinds = list(getattr(text, "layer_types", None) or [])

    def make(blocks: int) -> PreTrainedModel:
        """Build a model of the same class with that many blocks, on the current default device.

        The config is copied, and its `layer_types` are cut, if it has some.
        """
        config = copy.deepcopy(model.config)
        part = config.get_text_config()
        setattr(part, name, blocks)
        if kinds:
            part.layer_types = kinds[:blocks]
        return type(model)(config)

    return Training(make, getattr(text, name), adapter, length, getattr(torch, dtype), on_gpu, find_period(kinds))


def find_period(kinds: list[str]) -> int:
    """Return the smallest number of blocks after which their kinds repeat to the end; 1 if they do not."""
    return next((n for n in range(1, len(kinds)) if kinds[n:] == kinds[:-n]), 1)


def print_plan(report: InjectReport, document: Json) -> None:
    """Print the report of the injection, and a line for each kind of blocks with some that have no adapter.

    Then print a table of the memory by parts in GB of 10^9 bytes, without empty parts. If the document has a GPU, print
    whether it fits, and a remedy if not.
    """
    from rich.console import Console

    Console(highlight=False).print(report)
    for kind, of in document["blocks"].items():
        without = of["all"] - of["adapted"]
        if without:
            show.print_line(f"{without} of {of['all']} blocks ({kind}) have no adapter.")
    memory = document["memory"]
    how = ", checkpointing" if memory["checkpointing"] else ""
    base = f", base in {memory['base']}" if memory["base"] else ""
    show.print_line(f"A step of {memory['batch']} × {memory['seq']} tokens, {memory['dtype']}{base}{how}:")
    names = {"weights": "base's weights", "adapter": "adapter", "gradients": "gradients", "optimizer": "optimizer",
             "kept": "activations", "working": "backward pass",
             "context": "CUDA context", "total": "all"}  # fmt: skip
    sizes = [(title, f"{memory[name] / 1e9:.3f}") for name, title in names.items() if memory[name]]
    show.print_table("", ["part", "GB"], sizes)
    if "gpu" in document:
        memory = f"{document['gpu']['bytes'] / 1e9:g} GB"
        remedy = "try --checkpointing, --base nf4 or a smaller --batch."
        show.print_line(
            f"It fits into {memory}." if document["gpu"]["fits"] else f"It does not fit into {memory}: {remedy}"
        )
