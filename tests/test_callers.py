# SPDX-License-Identifier: Apache-2.0
"""What libraries do with a model that has adapters, done by small stand-ins: diffusers and the like are not needed."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from peft import helpers
from torch import nn

from graft.core.layer import AdapterLayer
from graft.model.functional import disable_input_dtype_casting
from tests.pair import LIBS, adapt, both, close, output, randomize
from tests.samples import each, first

# diffusers: layers are found by their class, and told what to do one by one


def layers_of(model: nn.Module) -> list:
    return [m for m in model.modules() if hasattr(m, "base_layer")]


@pytest.mark.parametrize("sample", each("plain", "mlp"), ids=str)
def test_deleting_layer_by_layer(sample):
    """As diffusers' delete_adapters does: what is left takes over, first by name."""
    outputs = []
    for model in both(sample):
        for name in "cb":
            model.add_adapter(name, sample.config(LIBS[len(outputs)]))
        randomize(model, sample).eval()
        for layer in layers_of(model):
            layer.delete_adapter("default")
        assert {tuple(layer.active_adapters) for layer in layers_of(model)} == {("b",)}
        outputs.append(output(model, sample))
        for name in "bc":
            for layer in layers_of(model):
                layer.delete_adapter(name)
        assert {tuple(layer.active_adapters) for layer in layers_of(model)} == {()}
    close(*outputs)


def cast_when_run(module: nn.Linear, storage: torch.dtype, compute: torch.dtype) -> None:
    """Keep weights in one dtype and compute in another, as layerwise casting does."""
    forward = module.forward

    def run(x):
        module.to(compute)
        try:
            return forward(x)
        finally:
            module.to(storage)

    module.to(storage)
    module.forward = run


@pytest.mark.parametrize(
    ("sample", "everything"),
    [(first("LORA"), True), (first("LORA"), False), (first("LORA", "mlp", "dora"), False)],
    ids=str,
)
def test_layerwise_casting(sample, everything):
    """Adapters too (if `everything`), whose input then must not be cast to the dtype they are kept in."""
    outputs = []
    with torch.no_grad():
        for model in both(sample):
            randomize(model, sample).eval()
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and (everything or "lora_" not in name):
                    cast_when_run(module, torch.bfloat16, torch.float32)
            disable = (disable_input_dtype_casting, helpers.disable_input_dtype_casting)[len(outputs)]
            with disable(model) if everything else nullcontext():
                outputs.append(output(model, sample))
            if everything:
                with pytest.raises(RuntimeError, match="same dtype"):
                    output(model, sample)
    assert outputs[0].dtype == torch.float32
    close(*outputs)


def test_casting_of_inputs_is_put_back():
    model = adapt(LIBS[0], first("LORA", "mlp"))
    layers = [m for m in model.modules() if isinstance(m, AdapterLayer)]
    layers[0].cast_input_dtype_enabled = False
    with pytest.raises(ZeroDivisionError), disable_input_dtype_casting(model):
        assert not any(layer.cast_input_dtype_enabled for layer in layers)
        raise ZeroDivisionError
    assert [layer.cast_input_dtype_enabled for layer in layers] == [False] + [True] * (len(layers) - 1)
    with disable_input_dtype_casting(model, active=False):
        assert layers[1].cast_input_dtype_enabled
