# SPDX-License-Identifier: Apache-2.0
"""Models over two devices, or with weights offloaded, as accelerate dispatches them; and what is compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

import graft
from tests import models
from tests.conformance.samples import CALLED, LAYERS, REFUSED, SAMPLES, find
from tests.models import adapted, seeded
from tests.samples.laws import Sample

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
LINEAR = next(layer for layer in LAYERS if layer.name == "linear")
OUT = {"LORA-lora_ga", "LORAXS-sb"}  # their gradients cannot be had of offloaded weights
METHODS = [s for s in (*SAMPLES, *CALLED) if find(REFUSED, s, LINEAR) is None and str(s) not in OUT]


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(30, 30)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


class Parts(nn.Module):
    """Two parts, of which each may be somewhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Part(), Part()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(self.one(x))
        return y


def parts() -> nn.Module:
    with seeded(0):
        return Parts().eval()


def inputs(rows: int = 4) -> Tensor:
    with seeded(2):
        return torch.randn(rows, 30)


def dispatched(model: nn.Module, places: dict[str, Any]) -> nn.Module:
    """Spread a model over devices, or to "cpu", from which hooks bring weights to the first device for a call."""
    return accelerate.dispatch_model(model, places, main_device=FIRST, force_hooks=True)  # type: ignore[no-any-return]


def made(sample: Sample, base: nn.Module) -> nn.Module:
    """A model with a fresh adapter."""
    with seeded(1):
        config, after = sample.make(), None
        if sample.prepare is not None:
            after = sample.prepare(base, config, inputs())
        model = graft.get_peft_model(base, config)
        if after is not None:
            after(model)
    return sample.called(model).eval()


def llama(tied: bool = False) -> nn.Module:
    model: Any = models.make("llama")
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    return model  # type: ignore[no-any-return]


def places(embedding: Any = FIRST, second: Any = SECOND, head: Any = SECOND) -> dict[str, Any]:
    """Where the parts of a llama go."""
    return {
        "model.embed_tokens": embedding,
        "model.rotary_emb": FIRST,
        "model.layers.0": FIRST,
        "model.layers.1": second,
        "model.norm": FIRST if second == "cpu" else second,
        "lm_head": head,
    }


def logits(model: nn.Module, **more: Any) -> Tensor:
    """The logits of a llama for a batch that stands where users put it."""
    device = "cpu" if all(p.device.type == "cpu" for p in model.parameters()) else FIRST
    out = model(**{k: v.to(device) for k, v in models.inputs("llama").items()}, **more)
    return out.logits  # type: ignore[no-any-return]


@torch.no_grad()
def moved_away(model: nn.Module) -> nn.Module:
    """Move every parameter that trains, by values that depend on its name only."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            with seeded(sum(map(ord, name))):
                p.add_((torch.randn(p.shape) * 0.3).to(p))
    return model.eval()


def step(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Return the gradients of one training step, on the CPU."""
    model.zero_grad()
    call(model).square().sum().backward()
    found = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def file_of(model: Any, folder: Path) -> dict[str, Tensor]:
    """Save a model; return what the file holds."""
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def equal(here: Any, there: Any) -> None:
    """Check values from a device against the CPU's."""
    if isinstance(there, dict):
        assert here.keys() == there.keys()
        for name in there:
            equal(here[name], there[name])
    else:
        largest = there.abs().max().item() if there.is_floating_point() and there.numel() else 1.0
        assert_close(here.detach().cpu(), there.detach(), rtol=1e-4, atol=1e-5 * max(largest, 1.0))


def check_sample(sample: Sample, spread: Callable[[nn.Module], nn.Module], folder: Path) -> None:
    """Check an adapter that is made on a model that `spread` dispatches, and one that is loaded there."""
    x = inputs()
    one, other = made(sample, parts()), made(sample, spread(parts()))
    equal(file_of(other, folder / "there"), file_of(one, folder / "here"))
    for model in (one, other):
        moved_away(model)
    equal(other(x), one(x))
    trained = file_of(one, folder / "trained")
    loaded = graft.PeftModel.from_pretrained(spread(parts()), folder / "trained", is_trainable=True)
    loaded = sample.called(loaded).eval()
    equal(loaded(x), one(x))
    equal(file_of(loaded, folder / "again"), trained)
    gradients = step(one.train(not sample.draws), lambda m: m(x))
    for model in (other, loaded):
        equal(step(model.train(not sample.draws), lambda m: m(x)), gradients)


def check_llama(
    config: Callable[[], Any],
    spread: Callable[[nn.Module], nn.Module],
    folder: Path,
    tied: bool = False,
    call: Callable[[nn.Module], Tensor] = logits,
    merges: bool = False,
) -> None:
    """Do as `check_sample` with a llama."""
    one, other = (moved_away(adapted(base, config(), scale=0)) for base in (llama(tied), spread(llama(tied))))
    one.save_pretrained(folder)
    trains = not one.peft_config["default"].is_prompt_learning
    loaded = graft.PeftModel.from_pretrained(spread(llama(tied)), folder, is_trainable=trains).eval()
    for model in (other, loaded):
        equal(call(model), call(one))
        if merges:
            model.merge_adapter()
            equal(call(model), call(one))
            model.unmerge_adapter()
    gradients = step(one, call)
    for model in (other, loaded) if trains else (other,):
        equal(step(model, call), gradients)
