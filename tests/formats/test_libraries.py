# SPDX-License-Identifier: Apache-2.0
"""The libraries themselves load what graft writes in their formats, and compute the change of weights that it has."""

import json

import numpy as np
import pytest
import torch

from graft.files.convert import convert
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

    convert(FIXTURES / name, "mlx", tmp_path / "out", BASE)
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

    convert(FIXTURES / name, "peft", tmp_path / "peft", FIXTURES / "base_net")
    convert(tmp_path / "peft", "kohya", tmp_path / "a.safetensors", FIXTURES / "base_net")
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


@pytest.mark.parametrize("name", ["torchtune_lora", "torchtune_dora", "mlx_lora"])
def test_torchtune(tmp_path, name):
    from torchtune.models import convert_weights
    from torchtune.models.llama2 import lora_llama2
    from torchtune.modules.peft import get_merged_lora_ckpt

    convert(FIXTURES / name, "peft", tmp_path / "peft", BASE)
    convert(tmp_path / "peft", "torchtune", tmp_path / "out", BASE)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    heads = dict(num_heads=4, num_kv_heads=2, dim=16)
    theirs = {v: k for k, v in convert_weights._TO_PEFT_TARGET_MODULES.items()}
    targets = {theirs[t] for t in config["target_modules"]}
    model = lora_llama2(
        sorted(targets & {"q_proj", "k_proj", "v_proj", "output_proj"}),
        apply_lora_to_mlp=bool(targets & {"w1", "w2", "w3"}),
        apply_lora_to_output="output" in targets, vocab_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
        embed_dim=16, intermediate_dim=24, max_seq_len=64, lora_rank=config["r"], lora_alpha=config["lora_alpha"],
        use_dora=config["use_dora"],
    )  # fmt: skip
    model.load_state_dict(convert_weights.hf_to_tune(llama_weights(str(BASE)), **heads), strict=False)
    held = torch.load(tmp_path / "out" / "adapter_model.pt")
    assert not model.load_state_dict(held, strict=False).unexpected_keys
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    merged = get_merged_lora_ckpt(state, rank=config["r"], alpha=config["lora_alpha"])
    assert_same(near(differences(convert_weights.tune_to_hf(merged, **heads))), wanted(name))


@pytest.mark.parametrize("name", ["litgpt_lora", "mlx_lora", "torchtune_lora"])
def test_litgpt(tmp_path, name):
    from collections import defaultdict

    from litgpt.lora import GPT, Config, lora_filter, merge_lora_weights
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama
    from litgpt.scripts.merge_lora import load_lora_metadata

    convert(FIXTURES / name, "peft", tmp_path / "peft", BASE)
    out = tmp_path / "out"
    convert(tmp_path / "peft", "litgpt", out, BASE)
    with open(out / "hyperparameters.yaml", "a") as f:  # what litgpt's own runs say, too
        f.write("checkpoint_dir: nowhere\nprecision: null\n")
    run, _, _ = load_lora_metadata(out)
    config = Config.from_file(out / "model_config.yaml", **run)
    model = GPT(config)
    theirs, weights = {}, llama_weights(str(BASE))
    copy_weights_hf_llama(
        config, defaultdict(lambda: defaultdict(dict)), theirs, {k: v.clone() for k, v in weights.items()}
    )
    model.load_state_dict(theirs, strict=False)
    held = torch.load(out / "lit_model.pth.lora")["model"]
    assert not model.load_state_dict(held, strict=False).unexpected_keys
    assert held.keys() <= {k for k, v in model.state_dict().items() if lora_filter(k, v)}
    merge_lora_weights(model)
    after: dict = {}
    copy_weights_llama(
        config, after, {k.replace("linear.", ""): v for k, v in model.state_dict().items() if not lora_filter(k, v)}
    )
    assert_same(near(differences({k: after[k] for k in weights})), wanted(name))
