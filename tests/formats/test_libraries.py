# SPDX-License-Identifier: Apache-2.0
"""The libraries themselves load what graft writes in their formats, and compute the change of weights that it has."""

import numpy as np
import pytest
import torch

from graft.files.convert import convert_adapter_file
from tests.files.make_fixtures import LLAMA, llama_weights, net, weight_in_forward
from tests.files.test_formats import FIXTURES, assert_same, wanted

BASE = FIXTURES / "base_llama"


def differences(after):
    before = llama_weights(str(BASE))
    found = {k.removesuffix(".weight"): (after[k].double() - before[k].double()).numpy() for k in before}
    return found


@pytest.mark.parametrize("name", ["mlx_lora", "mlx_dora", "torchtune_lora", "torchtune_dora", "litgpt_lora"])
def test_mlx(tmp_path, name):
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.utils import load_adapters

    convert_adapter_file(FIXTURES / name, "mlx", tmp_path / "out", BASE)
    model = Model(ModelArgs(**{k: v for k, v in LLAMA.items() if k != "architectures"}))
    model.load_weights([(k, mx.array(v.numpy())) for k, v in llama_weights(str(BASE)).items()])
    load_adapters(model, str(tmp_path / "out"))
    model.update_modules(tree_unflatten([(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]))
    assert_same(
        near(differences({k: torch.from_numpy(np.array(v)) for k, v in tree_flatten(model.parameters())})), wanted(name)
    )


def near(found, tolerance=1e-6):
    """Leave out modules that differ by rounding only: DoRA's of a library where nothing trained."""
    return {path: d for path, d in found.items() if np.abs(d).max() > tolerance}


@pytest.mark.parametrize("name", ["lycoris_locon", "lycoris_tucker", "lycoris_dora", "lycoris_loha", "lycoris_lokr"])
def test_lycoris(tmp_path, name):
    from lycoris import create_lycoris_from_weights

    convert_adapter_file(FIXTURES / name, "peft", tmp_path / "peft", FIXTURES / "base_net")
    convert_adapter_file(tmp_path / "peft", "kohya", tmp_path / "a.safetensors", FIXTURES / "base_net")
    model = net()
    before = {
        path: m.weight.detach().clone()
        for path, m in model.named_modules()
        if hasattr(m, "in_features") or hasattr(m, "kernel_size")
    }
    network, _ = create_lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), model)
    network.apply_to()
    found = {}
    for path, m in model.named_modules():
        if path in before:
            found[path] = (weight_in_forward(m).detach().double() - before[path].double()).numpy()
    assert_same(found, wanted(name), 4e-6)
