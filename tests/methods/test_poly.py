# SPDX-License-Identifier: Apache-2.0
"""Poly and multi-head routing: skills mixed by task."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import graft
from tests import models
from tests.leaves_out import WHOLE_GRAPHS
from tests.looks import get_registry, layers
from tests.models import adapted, seeded
from tests.raised import refuses

LIBS = (graft, peft)
TASKS = torch.tensor([2, 0, 1, 2])
LLAMA = dict(r=3, n_tasks=3, n_skills=3, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
T5 = dict(r=2, n_tasks=3, n_skills=2, n_splits=2, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
VARIETY = {
    "plain": ("llama", LLAMA),
    "splits": ("llama", {**LLAMA, "n_splits": 2, "init_weights": False}),
    "one": ("llama", {**LLAMA, "n_skills": 1}),
    "t5": ("t5", T5),
    "bert-seq": ("bert-seq", dict(n_tasks=3, n_splits=4, target_modules=["query", "value"], task_type="SEQ_CLS")),
}
KINDS = {"PeftModelForSeq2SeqLM": "t5", "PeftModelForSequenceClassification": "bert-seq"}


def with_poly(lib, name="plain", change=True, **options):
    base, values = VARIETY[name]
    model = adapted(models.make(base), lib.PolyConfig(**{**values, **options}), lib=lib, scale=0)
    with torch.no_grad(), seeded(2):
        for key, p in sorted(model.named_parameters()) if change else ():
            if ".poly_" in key:
                p.copy_(torch.randn(p.shape) * 0.4)
    return model


def batch(model):
    return models.inputs(KINDS.get(type(model).__name__, "llama"), 4)


def output(model, tasks=TASKS, **options):
    return models.output(model, {**batch(model), "task_ids": tasks, **options})


def gradients(model):
    model.zero_grad()
    y = output(model)
    with seeded(6):
        (y * torch.randn(y.shape)).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def equal(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert_close(found[name], t, rtol=10 * tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


# PEFT


@pytest.mark.parametrize("name", VARIETY)
def test_names_values_outputs_and_gradients_are_pefts(name):
    fresh = [with_poly(lib, name, change=False) for lib in LIBS]
    states = [{k: v for k, v in m.state_dict().items() if "poly_" in k} for m in fresh]
    equal(*states, 0)
    assert {n for n, p in fresh[0].named_parameters() if p.requires_grad} == {
        n for n, p in fresh[1].named_parameters() if p.requires_grad
    }
    assert_close(output(fresh[0]), output(fresh[1]), rtol=1e-5, atol=1e-5)
    ours, theirs = (with_poly(lib, name) for lib in LIBS)
    assert_close(output(ours), output(theirs), rtol=1e-5, atol=1e-5)
    assert name == "one" or (output(ours) - output(ours, TASKS.flip(0))).abs().max() > 1e-3
    equal(gradients(ours), gradients(theirs))
    for model in (ours, theirs):
        model.train()
        models.seed(9)
        model.found = gradients(model)  # the router draws
    equal(ours.found, theirs.found)


@pytest.mark.parametrize("name", ["splits", "t5"])
def test_files(name, tmp_path):
    ours, theirs = (with_poly(lib, name) for lib in LIBS)
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(tmp_path / folder)
    held = [load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs")]
    equal(*held, 0)
    assert any(key.endswith("poly_router.module_logits") for key in held[0])
    configs = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "theirs")]
    assert {**configs[0], "target_modules": 0} == {**configs[1], "target_modules": 0}
    expected = output(theirs)
    for lib, folder in ((graft, "theirs"), (peft, "ours"), (graft, "ours")):
        loaded = lib.PeftModel.from_pretrained(models.make(VARIETY[name][0]), tmp_path / folder)
        assert_close(output(loaded), expected, rtol=1e-5, atol=1e-5)


def test_generation():
    ours, theirs = (with_poly(lib, "t5") for lib in LIBS)
    with torch.no_grad():
        for model in (ours, theirs):
            for key, p in model.named_parameters():
                if ".poly_" in key:
                    p.mul_(6)
    inputs = {k: v for k, v in models.inputs("t5", 4).items() if not k.startswith("decoder")}
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, task_ids=TASKS)
    out = ours.generate(**inputs, **options)
    assert torch.equal(out, theirs.generate(**inputs, **options))
    assert torch.equal(out, ours.generate(**inputs, **options, use_cache=False))
    assert not torch.equal(out, ours.generate(**inputs, **{**options, "task_ids": TASKS.flip(0)}))
    alone = []
    for i in range(4):
        one = {k: v[i : i + 1] for k, v in inputs.items()}
        alone.append(ours.generate(**one, **{**options, "task_ids": TASKS[i : i + 1]}, num_beams=3))
    assert torch.equal(ours.generate(**inputs, **options, num_beams=3), torch.cat(alone))  # in which PEFT fails
    assert not get_registry(ours).call.context


# the mathematics


def test_what_is_added():
    model = with_poly(graft, "splits")
    layer = layers(model)["model.layers.0.self_attn.q_proj"]
    x, seen = torch.randn(4, 7, layer.in_features), []
    hook = model.get_base_model().lm_head.register_forward_pre_hook(lambda *_: seen.append((layer(x), layer(x[:, 0]))))
    output(model)
    hook.remove()
    A, B = layer.poly_lora_A["default"], layer.poly_lora_B["default"]
    z = layer.poly_router["default"].module_logits.view(3, 2, 3).sigmoid()
    alpha = z / z.sum(-1, keepdim=True)
    for row, task in enumerate(TASKS):
        mixed_A = torch.cat([sum(alpha[task, q, k] * A[q, k] for k in range(3)) for q in range(2)], 0)
        mixed_B = torch.cat([sum(alpha[task, q, k] * B[q, k] for k in range(3)) for q in range(2)], 1)
        expected = layer.base_layer(x[row]) + x[row] @ mixed_A @ mixed_B / 3
        assert_close(seen[0][0][row], expected, rtol=1e-5, atol=1e-5)
        assert_close(seen[0][1][row], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.differs("Poly in a plain PeftModel, mixed batches, inputs of any shape, beams, Conv1D")
def test_any_model_and_the_tuner_itself():
    """PEFT's plain PeftModel hands task ids on to the base model, which does not know them."""
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    with seeded(1):
        config = graft.PolyConfig(target_modules=["0", "2"], n_tasks=3, init_weights=False)
        model = graft.get_peft_model(net, config).eval()
    x = torch.randn(4, 6)
    y = model(x, task_ids=TASKS)
    assert all(torch.equal(y, model(x, task_ids=kind(TASKS.tolist()))) for kind in (list, tuple))
    assert torch.equal(y, model.base_model(x, task_ids=TASKS))
    assert_close(y, torch.cat([model(x[i : i + 1], task_ids=TASKS[i : i + 1]) for i in range(4)]))
    llama = with_poly(graft)
    inputs = models.inputs("llama", 4)
    options = dict(task_ids=TASKS, max_new_tokens=2, do_sample=False)
    assert torch.equal(llama.base_model.generate(**inputs, **options), llama.generate(**inputs, **options))


def test_conv1D_too():
    from transformers.pytorch_utils import Conv1D

    net = nn.Sequential(Conv1D(4, 6))
    model = graft.get_peft_model(net, graft.PolyConfig(target_modules=["0"], n_tasks=3, init_weights=False)).eval()
    plain = nn.Sequential(nn.Linear(6, 4))
    plain[0].weight.data, plain[0].bias.data = net[0].base_layer.weight.data.T, net[0].base_layer.bias.data
    same = graft.get_peft_model(plain, graft.PolyConfig(target_modules=["0"], n_tasks=3)).eval()
    graft.set_peft_model_state_dict(same, graft.get_peft_model_state_dict(model), strict=True)
    x = torch.randn(4, 5, 6)
    assert_close(model(x, task_ids=TASKS), same(x, task_ids=TASKS))


@WHOLE_GRAPHS
@pytest.mark.slow
def test_compiled():
    torch._dynamo.reset()
    model = with_poly(graft)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for tasks in (TASKS, TASKS.flip(0)):
        assert_close(output(compiled, tasks), output(model, tasks))


# refused


@pytest.mark.differs("Poly: negative `task_ids`; `n_splits` that does not divide a layer")
@pytest.mark.parametrize(
    "tasks, text",
    [
        (None, "task_ids should not be None"),
        (torch.tensor([0, 1, 3, 0]), r"Only 3 tasks available\. Found task id = 3"),
        (torch.tensor([0, 1, -1, 0]), r"Only 3 tasks available\. Found task id = -1"),
        (torch.tensor([0, 1]), "2 task_ids for a batch of 4 rows"),
        (torch.tensor([0.0, 1, 0, 0]), "one integer per row, got torch.float32"),
        (torch.tensor([[0, 1, 0, 0]]), r"one integer per row, got .* of shape \(1, 4\)"),
        (torch.tensor([True, False, True, False]), "one integer per row, got torch.bool"),
    ],
)
def test_tasks_that_are_none(tasks, text):
    model = with_poly(graft)
    expected = output(model)
    refuses(ValueError, text, output, model, tasks)
    assert not get_registry(model).call.context
    assert torch.equal(output(model), expected)
    if isinstance(tasks, torch.Tensor) and tasks.dim() == 1 and tasks.max() < 3:
        return
    if tasks is None or tasks.dim() == 1:
        refuses(ValueError, text, output, with_poly(peft), tasks)


def test_a_layer_without_one_row_per_sample():
    pooled = nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 3))
    model = graft.get_peft_model(pooled, graft.PolyConfig(target_modules=["1"], n_tasks=3))
    refuses(graft.RoutingError, "'1' received 20 rows for 4 task_ids", model, torch.randn(4, 5, 3), task_ids=TASKS)


def test_modules_that_are_left_out_or_trained_whole(tmp_path):
    options = dict(exclude_modules=["layers.0.self_attn.q_proj"], modules_to_save=["lm_head"])
    ours, theirs = (with_poly(lib, **options) for lib in LIBS)
    trains = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert trains[0] == trains[1] and any("lm_head" in n for n in trains[0])
    assert_close(output(ours), output(theirs), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for model in (ours, theirs):
            model.get_submodule("base_model.model.lm_head.modules_to_save.default").weight.mul_(1.5)
    ours.save_pretrained(tmp_path)
    for lib in LIBS:
        loaded = lib.PeftModel.from_pretrained(models.make("llama"), tmp_path)
        assert_close(output(loaded), output(theirs), rtol=1e-5, atol=1e-5)


def test_configs_and_layers():
    for lib in LIBS:
        with pytest.raises(ValueError, match=r"Unsupported poly_type: zz\. .*: `poly`"):
            lib.get_peft_model(models.make("mlp"), lib.PolyConfig(target_modules=["lin0"], poly_type="zz"))
        with pytest.raises(ValueError, match="`r` should be a positive integer"):
            lib.get_peft_model(models.make("mlp"), lib.PolyConfig(target_modules=["lin0"], r=0))
        with pytest.raises(TypeError, match=r"following modules are supported: `torch\.nn\.Linear`"):
            lib.get_peft_model(models.make("embedding"), lib.PolyConfig(target_modules=["emb"]))
    for name in ("n_tasks", "n_skills", "n_splits"):
        refuses(graft.ConfigError, f"`{name}` must be positive, got 0", graft.PolyConfig, **{name: 0})
    with pytest.raises(graft.ConfigError, match="in_features=10 of layer 'lin0' must be divisible by n_splits=4"):
        graft.get_peft_model(models.make("mlp"), graft.PolyConfig(target_modules=["lin0"], n_splits=4))
    targets = graft.get_peft_model(models.make("llama"), graft.PolyConfig()).peft_config["default"].target_modules
    assert targets == {"q_proj", "v_proj"}
