# SPDX-License-Identifier: Apache-2.0
"""graft and PEFT side by side: the same sample on two equal base models, and ways to look at and compare them."""

from __future__ import annotations

import functools
import json
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import peft
import torch
from torch import Tensor, nn

import graft
from tests import models
from tests.samples import Sample

LIBS = (graft, peft)
jinja2.Template = functools.cache(jinja2.Template)  # PEFT compiles that of its model card at each save
PREFIX = "base_model.model."
UNLIKE = re.compile(r"\.lora_shift\.|\.adamss_clusters|\.psoft_basis\.|\.model\..*\.randlora_[AB]$")


def adapt(lib, sample: Sample, adapter: str = "default", *, seed: int = 1, base: nn.Module | None = None, **options):
    """A fresh base model with the sample's adapter in it, made by `lib`."""
    model = models.make(sample.model) if base is None else base
    models.seed(seed)
    return lib.get_peft_model(model, sample.config(lib), adapter, **options)


def both(sample: Sample, adapter: str = "default", **options) -> tuple[nn.Module, nn.Module]:
    return adapt(graft, sample, adapter, **options), adapt(peft, sample, adapter, **options)


def own_parameters(model: nn.Module, sample: Sample) -> Iterator[tuple[str, nn.Parameter]]:
    """What the adapters added, and whatever else is trainable; not the frozen base."""
    base = models.names(sample.model)
    for name, p in model.named_parameters():
        wrapped = ".base_layer." in name or ".original_module." in name
        if p.requires_grad or not (wrapped or name.removeprefix(PREFIX) in base):
            yield name, p


@torch.no_grad()
def randomize(model: nn.Module, sample: Sample) -> nn.Module:
    """Give every parameter of the adapters a value that depends on nothing but its name."""
    for name, p in own_parameters(model, sample):
        g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        p.copy_(torch.randn(p.shape, generator=g) * sample.spread)
    return model


def output(model: nn.Module, sample: Sample, **kwargs) -> Tensor:
    return models.output(model, {**models.inputs(sample.model), **kwargs})


def gradients(model: nn.Module, sample: Sample, **kwargs) -> dict[str, Tensor | None]:
    """Gradients of every parameter under a loss in which each output has its own weight."""
    model.zero_grad()
    y = output(model, sample, **kwargs)
    g = torch.Generator().manual_seed(3)
    (y * torch.randn(y.shape, generator=g)).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


# comparing


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5, what: str = "") -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


def common(tensors: dict) -> dict:
    """Without what only graft holds: what PiSSA and its like took out of the base, AdaMSS's clusters of rows;
    and without RandLoRA's projections for each layer, of which PEFT's files have copies."""
    return {name: t for name, t in tensors.items() if not UNLIKE.search(name)}


def close_dicts(ours: dict, theirs: dict, tolerance: float = 1e-5) -> None:
    """Same keys; tensors within the tolerance (0: equal in every bit), None only opposite None."""
    ours, theirs = common(ours), common(theirs)
    assert sorted(ours) == sorted(theirs)
    for key, t in theirs.items():
        assert (ours[key] is None) == (t is None), key
        if t is not None:
            close(ours[key], t, tolerance, key)


def shapes(model: nn.Module) -> dict[str, tuple]:
    return {name: (tuple(t.shape), t.dtype) for name, t in common(model.state_dict()).items()}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def json_of(folder: Path) -> dict:
    """adapter_config.json with lists sorted, for PEFT writes sets in arbitrary order; without the version."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return sorted((plain(v) for v in value), key=str)
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

    config = json.loads((folder / "adapter_config.json").read_text())
    return {k: plain(v) for k, v in config.items() if k != "peft_version"}


@dataclass
class Outcome:
    """What a call did: its value or the exception, and the warnings on the way."""

    value: Any = None
    error: Exception | None = None
    warnings: list[warnings.WarningMessage] = field(default_factory=list)

    @property
    def kind(self) -> type | None:
        """The builtin class of the exception, which is what callers catch."""
        return self.error and next(c for c in type(self.error).__mro__ if c.__module__ == "builtins")

    def warned(self, fragment: str) -> list[type[Warning]]:
        return [w.category for w in self.warnings if fragment in str(w.message)]


def outcome(call: Callable[[], Any]) -> Outcome:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            return Outcome(value=call(), warnings=seen)
        except Exception as error:
            return Outcome(error=error, warnings=seen)
