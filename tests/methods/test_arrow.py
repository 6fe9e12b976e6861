# SPDX-License-Identifier: Apache-2.0
"""Arrow: tokens go to the experts that answer their direction most; GenKnowSub takes general knowledge out."""

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import graft
from graft.model.experts import split_source
from tests import models
from tests.leaves_out import WHOLE_GRAPHS
from tests.looks import get_registry, layers
from tests.models import seeded
from tests.raised import refuses

LIBS = (graft, peft)
LORA = dict(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def saved(where, number, on="llama", **options):
    """A LoRA adapter with arbitrary values, on disk."""
    with seeded(number), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = graft.get_peft_model(models.make(on), graft.LoraConfig(**{**LORA, "lora_alpha": 3 + number, **options}))
        for layer in layers(model).values():
            for p in layer.parameters_of("default"):
                p.data.copy_(torch.randn(p.shape) * 0.3)
        model.save_pretrained(where, save_embedding_layers=False)
    return str(where)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for i in range(6):
        saved(root / str(i), i)
    return root


def made(lib, folder, on="llama", base=None, tasks=(0, 1, 2), general=(3, 4), **options):
    config = lib.ArrowConfig(**{"top_k": 2, "rng_seed": 7, **options})
    paths = [[str(folder / str(i)) for i in group] for group in (tasks, general)]
    return lib.create_arrow_model(models.make(on) if base is None else base, paths[0], config, paths[1]).eval()


def output(model):
    return models.output(model, models.inputs("llama")).detach()


VARIETY = {
    "top 2": {},
    "top 1": dict(top_k=1),
    "all": dict(top_k=3, router_temperature=0.3),
    "general": dict(use_gks=True),
}


# PEFT


@pytest.mark.parametrize("how", VARIETY)
def test_outputs_are_pefts(how, folder):
    ours, theirs = (made(lib, folder, **VARIETY[how]) for lib in LIBS)
    expected = output(theirs)
    assert_close(output(ours), expected, rtol=1e-4, atol=1e-5)
    assert ours.active_adapters == theirs.active_adapters == ["arrow_router"]
    assert list(ours.peft_config) == list(theirs.peft_config)
    assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
    for model in (ours, theirs):
        model.load_adapter(folder / "5", "more")  # another expert, which is not active
    changed = output(theirs)
    assert (changed - expected).abs().max() > 1e-3
    assert_close(output(ours), changed, rtol=1e-4, atol=1e-5)


def test_conv1D_and_gradients_of_the_input(tmp_path):
    targets = dict(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    paths = [saved(tmp_path / str(i), i, "gpt2", **targets) for i in range(2)]
    found = []
    for lib in LIBS:
        model = lib.create_arrow_model(models.make("gpt2"), paths, lib.ArrowConfig(top_k=1, rng_seed=1)).eval()
        embeds = torch.linspace(-1, 1, 3 * 5 * 24).view(3, 5, 24).requires_grad_()
        y = model(inputs_embeds=embeds).logits
        y.square().sum().backward()
        found.append((y.detach(), embeds.grad))
    assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_without_autocast(dtype, folder):
    config, paths = graft.ArrowConfig(top_k=3, rng_seed=7), [str(folder / str(i)) for i in range(3)]
    half = graft.create_arrow_model(models.make("llama").to(dtype), paths, config, autocast_adapter_dtype=False).eval()
    assert {p.dtype for n, p in half.named_parameters() if "lora_" in n} == {dtype}
    y = output(half)
    full = graft.create_arrow_model(models.make("llama"), paths, graft.ArrowConfig(top_k=3, rng_seed=7)).eval()
    assert_close(y.float(), output(full), atol=0.15, rtol=0.1)


def test_adapters_from_the_hub_may_lie_in_folders_of_a_repository(folder):
    assert split_source("me/tasks") == ("me/tasks", None)
    assert split_source("me/tasks/deep/er") == ("me/tasks", "deep/er")
    assert split_source(str(folder / "0")) == (str(folder / "0"), None)


@pytest.mark.differs(
    "Arrow: experts with rank patterns, DoRA, `lora_bias`, or on fewer layers than share their last name"
)
def test_the_router_is_where_the_experts_are(tmp_path):
    """PEFT's is on every module of the same last name, where it fails without experts."""
    targets = dict(target_modules=["mlp.c_proj"], fan_in_fan_out=True)
    paths = [saved(tmp_path / str(i), i, "gpt2", **targets) for i in range(2)]
    model = graft.create_arrow_model(models.make("gpt2"), paths, graft.ArrowConfig(top_k=1))
    assert all(layer.adapters == ["task_0", "task_1", "arrow_router"] for layer in layers(model).values())
    models.output(model, models.inputs("gpt2"))


@pytest.mark.differs("Arrow: a saved router")
def test_files(folder, tmp_path):
    ours, theirs = (made(lib, folder) for lib in LIBS)
    for model, name in ((ours, "ours"), (theirs, "theirs")):
        output(model)
        model.save_pretrained(tmp_path / name)
    for part in ("arrow_router", "task_1"):
        held = [load_file(tmp_path / n / part / "adapter_model.safetensors") for n in ("ours", "theirs")]
        assert {k: v.shape for k, v in held[0].items()} == {k: v.shape for k, v in held[1].items()}
        configs = [json.loads((tmp_path / n / part / "adapter_config.json").read_text()) for n in ("ours", "theirs")]
        for config in configs:
            config["target_modules"].sort()
        assert configs[0] == configs[1]
    assert configs[0]["r"] == 2
    for name in ("ours", "theirs"):  # a router among adapters that are there; PEFT cannot load one
        model = graft.PeftModel.from_pretrained(models.make("llama"), tmp_path / name / "task_0", "task_0")
        for part in ("task_1", "task_2", "arrow_router"):
            model.load_adapter(tmp_path / name / part, part)
        model.set_adapter("arrow_router")
        assert_close(output(model), output(theirs), rtol=1e-4, atol=1e-5)


# the mathematics


@pytest.mark.differs("Arrow: GenKnowSub")
def test_each_token_goes_to_the_experts_that_answer_its_direction_most(folder):
    model = made(graft, folder, use_gks=True, router_temperature=0.5)
    layer = layers(model)["model.layers.0.mlp.down_proj"]
    x = torch.randn(3, 5, layer.in_features)
    pairs = {n: [layer.lora_A[n].weight.detach(), layer.lora_B[n].weight.detach()] for n in layer.methods}
    general = [(pairs["gks_0"][i] + pairs["gks_1"][i]) / 2 for i in (0, 1)]
    expected = layer.base_layer(x)
    directions, updates = [], []
    for i in range(3):
        A, B = (M - g for M, g in zip(pairs[f"task_{i}"], general))
        directions.append(torch.linalg.svd(B @ A).Vh[0])
        updates.append(layer.scaling[f"task_{i}"] * B @ A)
    score = (x @ torch.stack(directions).T).abs()
    best = score.topk(2, dim=-1)
    for row in range(3):
        for t in range(5):
            for share, i in zip((best.values[row, t] / 0.5).softmax(-1), best.indices[row, t]):
                expected[row, t] += share * (updates[i] @ x[row, t])
    close = (layer(x) - expected).abs() < 1e-2  # the directions come from a few steps of iteration
    assert close.float().mean() > 0.9
    assert torch.equal(pairs["task_0"][0], layer.lora_A["task_0"].weight), "experts keep their values"
    assert layer(x[0, 0]).shape == layer.base_layer(x[0, 0]).shape


@pytest.mark.differs("Arrow: new values for an expert; an expert deleted")
def test_directions_follow_the_experts(folder):
    model = made(graft, folder)
    before = output(model)
    layer = layers(model)["model.layers.0.mlp.down_proj"]
    kept = layer.lora_arrow["arrow_router"].prototypes
    output(model)
    assert layer.lora_arrow["arrow_router"].prototypes is kept, "found once"
    assert not any("prototypes" in name for name in model.state_dict())
    model.load_adapter(folder / "5", "task_1")  # new values
    changed = output(model)
    assert layer.lora_arrow["arrow_router"].prototypes is not kept
    assert (changed - before).abs().max() > 1e-3
    model.delete_adapter("task_2")
    assert layer.lora_arrow["arrow_router"].prototypes.shape[0] == 3
    output(model)
    assert layer.lora_arrow["arrow_router"].prototypes.shape[0] == 2
    assert torch.equal(output(copy.deepcopy(model)), output(model))


@pytest.mark.parametrize("within", [True, False], ids=["made in inference mode", "used in it"])
@pytest.mark.filterwarnings("ignore:After the first backward pass")  # of the router's own A and B, which do nothing
def test_inference_mode(within, folder):
    with torch.inference_mode(within):
        model = made(graft, folder, top_k=1, use_gks=True)
    with torch.inference_mode():
        expected = output(model)
    if not within:  # training may use the directions that were found there
        model.set_requires_grad(["task_0", "task_1", "task_2"])
        models.output(model, models.inputs("llama")).sum().backward()
    assert_close(output(model), expected)


def test_rows_experts_and_none(folder):
    model = made(graft, folder)
    routed = output(model)
    names, expected = ["arrow_router", "task_1", "__base__"], [routed]
    model.set_adapter("task_1")
    expected.append(output(model))
    with model.disable_adapter():
        expected.append(output(model))
    mixed = models.output(model, {**models.inputs("llama"), "adapter_names": names})
    for row in range(3):
        assert_close(mixed[row], expected[row][row], rtol=1e-4, atol=1e-4)
    model.set_adapter("arrow_router")
    batch = {k: v[:1] for k, v in models.inputs("llama").items()}
    out = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(out, model.generate(**batch, max_new_tokens=4, do_sample=False, use_cache=False))


@WHOLE_GRAPHS
@pytest.mark.slow
def test_compiled(folder):
    torch._dynamo.reset()
    model = made(graft, folder, use_gks=True)
    expected = output(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(models.output(compiled, models.inputs("llama")).detach(), expected, rtol=1e-4, atol=1e-4)


# refused


def unchanged(folder, error, text, on="llama", **options):
    base = models.make(on)
    before = {n: (p.clone(), p.requires_grad) for n, p in base.named_parameters()}
    [*base.train().modules()][-1].eval()
    modes = [m.training for m in base.modules()]
    refuses(error, text, made, graft, folder, base=base, **options)
    after = dict(base.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] for n, p in after.items())
    assert [m.training for m in base.modules()] == modes


def test_what_cannot_be_made(folder, tmp_path):
    for i in (0, 1):
        (tmp_path / str(i)).symlink_to(folder / str(i))
    saved(tmp_path / "2", 2, r=3)
    saved(tmp_path / "3", 3, target_modules=["q_proj"])
    saved(tmp_path / "4", 4, target_modules=["embed_tokens"])
    (tmp_path / "5").mkdir()
    headed = graft.get_peft_model(models.make("llama"), graft.LoraConfig(**LORA, modules_to_save=["lm_head"]))
    headed.get_base_model().lm_head.modules_to_save["default"].weight.data += 1
    headed.save_pretrained(tmp_path / "6")
    unchanged(tmp_path, graft.ConfigError, r"\[task_2\] rank mismatch: 3 != 2", tasks=(0, 1, 2))
    unchanged(tmp_path, graft.ConfigError, r"\[task_1\] target_modules mismatch", tasks=(0, 3))
    unchanged(tmp_path, TypeError, r"Linear-like layers.*\n.*'task_1' on module 'model.embed_tokens'", tasks=(0, 4))
    unchanged(tmp_path, ValueError, "does not contain 'adapter_config.json'", tasks=(0, 5))
    unchanged(tmp_path, graft.CheckpointError, "gone", tasks=(0, "gone"))
    unchanged(tmp_path, graft.CheckpointError, "gone", tasks=(6, "gone"))
    unchanged(tmp_path, ValueError, "should contain at least one adapter path", tasks=())
    unchanged(tmp_path, ValueError, "general LoRA paths if you want to use GenKnowSub", use_gks=True, general=())
    unchanged(tmp_path, graft.ConfigError, "top_k=2 is more than the 1 experts", tasks=(0,))


def test_configs():
    for lib in LIBS:
        refuses(ValueError, "top_k cannot be negative", lib.ArrowConfig, top_k=0)
        refuses(ValueError, "router_temperature must be greater than 0", lib.ArrowConfig, router_temperature=0)
    config = graft.LoraConfig(arrow_config={"top_k": 2, "task_adapter_names": ["a"]})
    assert config.arrow_config.top_k == 2 and config.arrow_config.task_adapter_names is None
    refuses(graft.ConfigError, "variant combination", graft.LoraConfig, arrow_config=graft.ArrowConfig(), use_dora=True)
    with pytest.raises(graft.UnsupportedLayerError, match="linear layers only"):
        config = graft.LoraConfig(arrow_config=graft.ArrowConfig(), target_modules=["embed_tokens"])
        graft.get_peft_model(models.make("llama"), config)


def test_what_a_router_cannot_do(folder):
    model = made(graft, folder)
    expected = output(model)
    for call in (model.merge_adapter, copy.deepcopy(model).merge_and_unload):
        refuses(RuntimeError, r"Cannot merge an active Arrow router adapter\. Remove it first", call)
    with pytest.raises(NotImplementedError, match="Arrow router, which has no update"):
        model.add_weighted_adapter(["task_0", "arrow_router"], [1.0, 1.0], "sum", combination_type="linear")
    assert torch.equal(output(model), expected)
    model.add_adapter("dora", graft.LoraConfig(**LORA, use_dora=True))
    refuses(graft.RoutingError, r"must be plain LoRA, without bias, and \['dora'\] are not", output, model)
    model.delete_adapter("dora")
    model.add_adapter("wide", graft.LoraConfig(**{**LORA, "r": 5}))
    refuses(graft.RoutingError, r"must have one rank.*'wide': \(5, ", output, model)
    model.delete_adapter("wide")
    model.delete_adapter("task_0"), model.delete_adapter("task_1")
    refuses(graft.RoutingError, r"top_k=2 is more than its 1 experts \['task_2'\]", output, model)
    assert not get_registry(model).call.context


def test_a_router_without_general_adapters(folder):
    model = graft.PeftModel.from_pretrained(models.make("llama"), folder / "0", "a")
    config = graft.LoraConfig(**LORA, arrow_config=graft.ArrowConfig(top_k=1, use_gks=True))
    model.add_adapter("router", config)
    model.set_adapter("router")
    refuses(graft.RoutingError, "needs adapters of general knowledge", output, model)
