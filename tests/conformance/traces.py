# SPDX-License-Identifier: Apache-2.0
"""Numbers of every method under every value of its config, as tests/conformance/traces.txt has them.

python -m tests.conformance.traces       write the file anew, after a change that is meant to change them
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graft
from graft.config.base import type_hints
from tests import models
from tests.conformance.samples import CALLED_CELLS, CELLS, Cell
from tests.looks import get_registry, layers
from tests.models import disturb, seed

FILE = Path(__file__).with_suffix(".txt")
COMMON = {field.name for field in dataclasses.fields(graft.PeftConfig)} | {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "target_parameters", "megatron_core", "progressbar", "layers", "init_r", "total_step",
}  # fmt: skip
TEXTS = {  # values of fields whose annotation is only `str`
    "non_linearity": ["tanh", "gelu", "silu"], "act_fn": ["tanh", "none"], "wavelet_family": ["db2", "sym3", "haar"],
    "variant": ["road_2", "road_4"], "mask_type": ["other"],
    "bias": ["all", "{}_only"], "init_lora_weights": ["gaussian", "orthogonal", "pissa_niter_2"],
}  # fmt: skip


WHOLE: dict[str, tuple[dict[str, Any], str]] = {  # methods on whole attentions or blocks: config and models
    "ADAPTION_PROMPT": (dict(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"), "llama gpt2"),
    "MIXLORA": (dict(r=2, lora_alpha=4, num_experts=3), "llama"),
    "SHADOW": (dict(task_type="CAUSAL_LM"), "llama gpt2"),
    "BOTTLENECK": (dict(reduction_factor=4), "llama bert"),
    "REFT": ({}, "llama"),
    "LORA": (dict(r=4), "t5 gemma3"),
    "ADAPTER_FUSION": (dict(adapters=["a", "b"]), "llama"),
    "ADALORA": (
        dict(init_r=4, target_r=2, total_step=9, tinit=1, tfinal=2, deltaT=2, target_modules=["lin0", "fc1"]), "mlp"
    ),
    "ADAMSS": (
        dict(r=7, num_subspaces=4, subspace_rank=2, use_asa=True, asa_target_subspaces=3, init_warmup=1, final_warmup=6,
             mask_interval=2, target_modules=["lin0", "fc1"]), "mlp"
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class WholeModel:
    """A method on its default targets of a small model."""

    name: str
    method: str
    config: dict[str, Any] = dataclasses.field(hash=False)

    def fresh(self) -> Any:
        config = graft.PEFT_TYPE_TO_CONFIG_MAPPING[self.method](**copy.deepcopy(self.config))
        model = models.make(self.name)
        seed(1)
        if self.method == "ADAPTER_FUSION":
            model = graft.get_peft_model(model, graft.BottleneckConfig(reduction_factor=2), "a", mixed=True)
            model.add_adapter("b", graft.BottleneckConfig(reduction_factor=2))
            model.add_adapter("default", config)
            model.set_adapter("default")
            return model.eval()
        return graft.get_peft_model(model, config).eval()


def values_of(method: str, name: str, hint: Any, value: Any) -> Iterator[Any]:
    """Yield a few values of a field other than `value`, by its annotation."""
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if name in TEXTS:
        yield from (text.format(method.lower()) for text in TEXTS[name] if text != value)
    elif typing.get_origin(hint) is typing.Literal:
        yield from (v for v in typing.get_args(hint) if v != value)
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from values_of(method, name, part, value)
    elif hint is bool:
        yield from ({True, False} - {value})
    elif hint is int and type(value) in (int, type(None)):
        yield from ([value + 1, 2 * value] if value else [1, 2])
    elif hint is float and type(value) in (int, float, type(None)):
        yield from ([value / 2] if value else [0.4])


def variants(method: str, make: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """Yield changes of a config, each of one of its fields."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = make()
    for name, hint in type_hints(type(config)).items():
        if name not in COMMON or name == "bias":
            for value in values_of(method, name, hint, getattr(config, name, None)):
                yield {name: value}


@functools.cache
def rows() -> dict[str, tuple[Cell | WholeModel, dict[str, Any]]]:
    """Return what each row is of, and the changes of its config, by name."""
    table: dict[str, tuple[Cell | WholeModel, dict[str, Any]]] = {}
    for cell in [c for c in CELLS + CALLED_CELLS if c.store.name == "dense"]:
        name, changes = f"{cell.sample} {cell.layer}", iter(())
        first = not cell.sample.label and cell.layer.name in ("embedding", "conv2d-stride", "conv1d", "conv2d-grouped")
        if (cell.layer.name == "linear" or first) and cell.sample.method != "LN_TUNING":
            changes = variants(cell.sample.method, cell.sample.make)
        table |= {named(name, change): (cell, change) for change in ({}, *changes)}
    for method, (config, names) in WHOLE.items():
        kind = graft.PEFT_TYPE_TO_CONFIG_MAPPING[method]
        presets = [{"preset": preset} for preset in getattr(import_module(kind.__module__), "PRESETS", ())]
        for name in names.split():
            cell, changes = WholeModel(name, method, config), variants(method, partial(kind, **config))
            table |= {named(f"{method} {name}", change): (cell, change) for change in ({}, *changes, *presets)}
    return table


def named(name: str, changes: dict[str, Any]) -> str:
    return " ".join([name, *(f"{field}={value}" for field, value in changes.items())])


def sizes(tensors: list[Tensor]) -> float:
    """Return a number that each of these tensors changes: a weighted sum of their mean magnitudes."""
    return sum(t.detach().double().abs().mean().item() * (1 + i / 9) for i, t in enumerate(tensors) if t.numel())


def facts_of(model: nn.Module) -> Iterator[float]:
    """Yield the numbers that layers hold of an adapter next to its tensors."""
    for layer in layers(model).values():
        held = {key: v["default"] for key, v in vars(layer).items() if isinstance(v, dict) and "default" in v}
        for _, value in sorted(held.items()):
            if isinstance(value, (bool, int, float, str)):
                yield float(sum(map(ord, value)) if isinstance(value, str) else value)


def trace(cell: Cell | WholeModel, changes: dict[str, Any]) -> list[str]:
    """Return numbers of an adapter: its parameters, outputs and gradients, fresh, trained and merged; or an error."""
    numbers: list[float] = []
    try:
        if isinstance(cell, Cell):
            sample = dataclasses.replace(cell.sample, config={**cell.sample.config, **changes})
            cell = dataclasses.replace(cell, sample=sample)
            model, run = cell.fresh(), partial(call_cell, inputs=cell.inputs())
        else:
            if "preset" in changes:
                presets = import_module(graft.PEFT_TYPE_TO_CONFIG_MAPPING[cell.method].__module__).PRESETS
                small = {"phm_dim": 2, "reduction_factor": 4}  # what divides the model's width
                changes = presets[changes["preset"]] | (small if "compacter" in changes["preset"] else {})
            cell = dataclasses.replace(cell, config={**cell.config, **changes})
            model, run = cell.fresh(), partial(models.output, batch=models.inputs(cell.name))
        trained, numbers = [p for p in model.parameters() if p.requires_grad], []
        facts = sum(v * (1 + i / 9) for i, v in enumerate(facts_of(model)))
        numbers += [sum(p.numel() for p in trained), facts, sizes([*trained, *model.buffers()]), sizes([run(model)])]
        numbers.append(sizes([run(disturb(model) if layers(model) else model)]))
        seed(4)
        y = run(model.train())
        (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
        loss = get_registry(model).auxiliary_loss("default")
        numbers += [sizes([y]), float(loss), sizes([p.grad for p in trained if p.grad is not None])]
        if hasattr(model.base_model, "update_and_allocate") and isinstance(cell, WholeModel):
            numbers += train(model, run, trained)
        model.eval().merge_adapter()
        numbers.append(sizes([run(model)]))
    except (ValueError, RuntimeError) as error:
        return [*map(written, numbers), type(error).__name__]
    return [*map(written, numbers)]


def train(model: Any, run: Callable[[Any], Tensor], trained: list[nn.Parameter]) -> list[float]:
    """Return numbers of a training with an allocator: what trains after each step, and the parameters at the end."""
    optimizer, numbers = torch.optim.SGD(trained, lr=0.05), []
    for step in range(8):
        optimizer.zero_grad()
        run(model).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        numbers.append(sizes([p for p in model.parameters() if p.requires_grad]))
    return [*numbers, sizes(trained)]


def call_cell(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs)


def written(number: float) -> str:
    return f"{number:.5g}"


def generator_print() -> list[str]:
    """Return what this torch draws and decomposes under a seed: where it differs, traces do."""
    torch.default_generator.manual_seed(5)
    A = torch.randn(9, 7)
    drawn = [
        A,
        torch.rand(5),
        torch.randperm(50).float(),
        nn.init.orthogonal_(torch.empty(5, 5)),
        torch.linalg.svd(A)[0],
    ]
    return [written(t.flatten()[-1].item()) for t in drawn]


@functools.cache
def read() -> dict[str, list[str]]:
    """Return the words of each row of the file, by name; "=" are those of the config without a change."""
    table: dict[str, list[str]] = {}
    for line in FILE.read_text().splitlines():
        name, _, words = line.rpartition(": ")
        table[name] = table[plain(name)] if words == "=" else words.split()
    return table


def plain(name: str) -> str:
    """Return the name of the row of the same cell without changes of its config."""
    return " ".join(name.split(" ")[:2])


def differ(ours: list[str], theirs: list[str]) -> bool:
    """Return True if two rows have other words, or numbers that differ by more than rounding."""
    return len(ours) != len(theirs) or any(
        not math.isclose(float(a), float(b), rel_tol=2e-3, abs_tol=1e-6) if digits(a) and digits(b) else a != b
        for a, b in zip(ours, theirs)
    )


def digits(word: str) -> bool:
    """Return True for a number, False for the name of an error."""
    return not word.endswith("Error")


def main() -> None:
    warnings.simplefilter("ignore")
    lines = [f"torch: {' '.join(generator_print())}"]
    table = {name: trace(*row) for name, row in rows().items()}
    for name, words in table.items():
        same = name != plain(name) and words == table[plain(name)]
        lines.append(f"{name}: {'=' if same else ' '.join(words)}")
    FILE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
