# SPDX-License-Identifier: Apache-2.0
"""Compositions: what a Stack, an Average and a Parallel compute, alone, by row and merged; and bad ones."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import graft
from graft.core.errors import RoutingError
from tests import models
from tests.models import seeded
from tests.raised import refuses, warns

NAMES = ("one", "two", "three")


def adapters(config, n=3, seed=0):
    """A model with adapters a, b, c that act, and inputs."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double().eval()
    x = torch.randn(3, 6, dtype=torch.double)
    model = graft.get_peft_model(base, config(), "one", autocast_adapter_dtype=False)
    for name in NAMES[1:n]:
        model.add_adapter(name, config())
    for name, p in model.named_parameters():
        if "base_layer" not in name and p.dim():
            nn.init.normal_(p, std=0.3)
    return model.eval(), x


def lora():
    return graft.LoraConfig(target_modules=["0", "2"], r=2)


def last():
    return graft.LoraConfig(target_modules=["2"], r=2)


def loha():
    return graft.LoHaConfig(target_modules=["0", "2"], r=2)


def alone(model, x, names):
    model.base_model.set_adapter(names)
    return model(x).detach()


@pytest.mark.parametrize("config", [last, lora, loha])
def test_an_average_of_additive_adapters_is_the_weighted_sum_of_their_updates(config):
    model, x = adapters(config)
    plain = copy.deepcopy(model).unload()
    for key, layer in ((m.key, m) for m in model.modules() if isinstance(m, graft.AdapterLayer)):
        for name, weight in (("one", 0.7), ("two", -0.4)):
            plain.get_submodule(key).weight.data += weight * layer.get_delta_weight(name)
    model.set_adapter(graft.Average("one", "two", weights=[0.7, -0.4]))
    torch.testing.assert_close(model(x), plain(x))
    assert model.active_adapters == ["one", "two"]
    model.merge_adapter()
    torch.testing.assert_close(model(x), plain(x))
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model.merge_and_unload()(x), plain(x))


def test_averages_of_other_weights_leave_nothing_behind():
    model, x = adapters(lora)
    layers = [m for m in model.modules() if isinstance(m, graft.AdapterLayer)]

    def kept(part):
        average = graft.Average("one", "two", weights=[part, 1 - part])
        model.set_adapter(average)
        model(x, adapter_names=[average, "three", "__base__"])
        return sum(len(layer.state.plans) for layer in layers)

    first = kept(0.0)
    assert {kept(i / 7) for i in range(1, 8)} == {first}


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("config", [last, lora, loha])
def test_a_copy_of_an_average_is_a_model_of_its_own(config, how):
    model, x = adapters(config)
    average = graft.Average("one", "two", weights=[0.7, -0.4])
    model.set_adapter(average)
    want = model(x, adapter_names=[average, "three", "__base__"]), model(x)
    copied = how(model)
    for name, p in model.named_parameters():
        if "base_layer" not in name:
            p.data.zero_()
    assert torch.equal(copied(x, adapter_names=[average, "three", "__base__"]), want[0])
    assert torch.equal(copied(x), want[1]) and not torch.equal(model(x), want[1])


def test_merging_an_adapter_next_to_an_average():
    """One that has no weight in it counts whole, whatever it does to the layer."""
    model, x = adapters(lora)
    mixed = graft.get_peft_model(model.unload(), lora(), "one", mixed=True).eval()
    for name, other in (
        ("two", lora()),
        ("scales", graft.IA3Config(target_modules=["0", "2"], feedforward_modules=[])),
    ):
        mixed.add_adapter(name, other)
    for name, p in mixed.named_parameters():
        if "base_layer" not in name and p.dim():
            nn.init.normal_(p, std=0.3)
    plain = copy.deepcopy(mixed).unload()
    for key, layer in ((m.key, m) for m in mixed.modules() if isinstance(m, graft.AdapterLayer)):
        base, scales = plain.get_submodule(key), layer.ia3_l["scales"].data
        for name, weight in (("one", 0.7), ("two", -0.4)):
            base.weight.data += weight * layer.get_delta_weight(name)
        base.weight.data *= scales
        base.bias.data *= scales.flatten()
    mixed.set_adapter(graft.Average("one", "two", weights=[0.7, -0.4]))
    mixed.base_model.merge_adapter(["scales", "two", "one"])
    torch.testing.assert_close(mixed(x), plain(x))
    mixed.base_model.unmerge_adapter()
    warns(UserWarning, r"\['two'\] are not merged", mixed.base_model.merge_adapter, ["one"])
    warns(UserWarning, "additionally merging two,scales", mixed.base_model.merge_adapter, ["two", "scales"])
    torch.testing.assert_close(mixed(x), plain(x))


def test_a_stack_is_a_list_of_names():
    model, x = adapters(loha)
    want = alone(model, x, ["two", "one"])
    model.set_adapter("three")
    assert torch.equal(model(x, compose=graft.Stack("two", "one")), want)
    assert model.active_adapters == ["three"]
    model.set_adapter(graft.Stack("two", "one"))
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("config", [lora, loha])
@pytest.mark.parametrize("grad", [True, False])
def test_rows_take_compositions(config, grad):
    model, x = adapters(config)
    stack, average = graft.Stack("one", "two"), graft.Average("one", "three", weights=[0.2, 2])
    want = [model(x, compose=value)[i] for i, value in enumerate((stack, average))]
    with torch.set_grad_enabled(grad):
        out = model(x, adapter_names=[stack, average, "__base__"])
    torch.testing.assert_close(out[0], want[0])
    torch.testing.assert_close(out[1], want[1])
    with model.disable_adapter():
        torch.testing.assert_close(out[2], model(x)[2])


def test_parallel_is_each_child_alone():
    model, x = adapters(lora)
    value = graft.Parallel("one", graft.Stack("one", "two"), graft.Average("two", "three"))
    want = [model(x, compose=child) for child in (graft.Stack("one"), *value.children[1:])]
    for part, own in zip(graft.split(model(x, compose=value), 3), want):
        torch.testing.assert_close(part, own)
    model.set_adapter(value)
    assert model.active_adapters == ["one", "two", "three"]
    torch.testing.assert_close(model(x), torch.cat(want))
    with model.disable_adapter():
        assert len(model(x)) == len(x)
    refuses(NotImplementedError, "in parallel", model.merge_adapter)
    refuses(RoutingError, "Call the PeftModel itself", model.get_base_model(), x)
    model.set_adapter("one")
    torch.testing.assert_close(model(x), want[0])


def test_under_parallel_each_adapter_learns_as_alone():
    model, x = adapters(lora, 2)
    y, own = torch.randn(3, 4, dtype=torch.double), {}
    for name in NAMES[:2]:
        model.set_adapter(name)
        (model(x) - y).square().mean().backward()
        own |= {n: p.grad / 2 for n, p in model.named_parameters() if f".{name}." in n}
        model.zero_grad()
    model.set_adapter(graft.Parallel("one", "two"))
    (model(x) - y.repeat(2, 1)).square().mean().backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == own.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad, own[name])


def test_parallel_copies_masks_and_generates(tiny):
    model, ids = tiny
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    value = graft.Parallel("one", "two")
    out = model(input_ids=ids, attention_mask=mask, labels=ids, compose=value)
    losses = []
    for part, name in zip(graft.split(out, 2), NAMES[:2]):
        model.set_adapter(name)
        own = model(input_ids=ids, attention_mask=mask, labels=ids)
        torch.testing.assert_close(part.logits, own.logits)
        losses.append(own.loss)
    torch.testing.assert_close(out.loss, sum(losses) / 2)
    for items in (40, torch.tensor(40)):  # of a step, as Trainer counts them
        step = dict(input_ids=ids, labels=ids, num_items_in_batch=items)
        losses = [model(**step, compose=graft.Stack(name)).loss for name in NAMES[:2]]
        torch.testing.assert_close(model(**step, compose=value).loss, sum(losses) / 2)
    tokens = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    both = model.generate(input_ids=ids, attention_mask=mask, compose=value, **tokens)
    for part, name in zip(graft.split(both, 2), NAMES[:2]):
        model.set_adapter(name)
        assert torch.equal(part, model.generate(input_ids=ids, attention_mask=mask, **tokens))
    positions = torch.arange(5)[None]  # of all rows; it comes first
    for shared in ({"position_ids": positions}, {"cache_position": positions[0]}):
        got = model(**shared, input_ids=ids, attention_mask=mask, compose=value)
        torch.testing.assert_close(got.logits, out.logits)
    refuses(RoutingError, "past_key_values", model, input_ids=ids, past_key_values=out.past_key_values, compose=value)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    config = graft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = graft.get_peft_model(models.make("llama"), config, "one")
    model.add_adapter("two", config)
    return model.eval(), torch.randint(1, 40, (2, 5))


def test_parts_of_rewrites_in_an_average_come_from_one_output():
    """Bottlenecks on the MLP's output: y + Σ w u(y), by each adapter's own u, found when it runs alone."""
    torch.manual_seed(0)
    config = graft.BottleneckConfig(mh_adapter=False, output_adapter=True, init_weights="bert")
    model = graft.get_peft_model(models.make("llama"), config, "one")
    model.add_adapter("two", config)
    for name, p in model.named_parameters():
        if "bottleneck" in name:
            nn.init.normal_(p, std=0.5)
    model.eval()
    ids, seen = torch.randint(1, 40, (2, 5)), {}
    layer = next(m for m in model.modules() if isinstance(m, graft.AdapterLayer))

    def look(_module, _args, output):
        seen["y"] = output if isinstance(output, torch.Tensor) else output[0]

    layer.register_forward_hook(look)
    with model.disable_adapter():
        model(ids)
    base, parts = seen["y"], {}
    for name in NAMES[:2]:
        model.set_adapter(name)
        model(ids)
        parts[name] = seen["y"] - base
    value = graft.Average("one", "two", weights=[0.7, 0.5])
    model.set_adapter(value)
    model(ids)
    torch.testing.assert_close(seen["y"], base + 0.7 * parts["one"] + 0.5 * parts["two"])
    model(ids, adapter_names=[value, "one"])
    torch.testing.assert_close(seen["y"][0], (base + 0.7 * parts["one"] + 0.5 * parts["two"])[0])
    torch.testing.assert_close(seen["y"][1], (base + parts["one"])[1])


@pytest.mark.parametrize("preset", ["seq_bn", "double_seq_bn", "par_bn", "adapter_plus", "compacter++"])
def test_bottlenecks_of_a_model_whose_norms_stand_after_the_residual_are_averaged(preset):
    """`seq_bn` acts on what the norm gets: LN(s + Σ w u(LN s)), by each adapter's own u on the base's s and LN s."""
    torch.manual_seed(0)
    config = graft.BottleneckConfig.preset(preset, reduction_factor=3)
    model = graft.get_peft_model(models.make("bert"), config, "one")
    model.add_adapter("two", config)
    for name, p in model.named_parameters():
        if "bottleneck" in name:
            nn.init.normal_(p, std=0.5)
    model.eval()
    ids = torch.randint(1, 40, (3, 5))
    value = graft.Average("one", "two", weights=[0.7, 0.5])
    wants = {name: model(ids, compose=graft.Stack(name)).last_hidden_state for name in NAMES[:2]}
    rows = model(ids, adapter_names=[value, "one", "__base__"]).last_hidden_state
    whole = model(ids, compose=value).last_hidden_state
    torch.testing.assert_close(rows[0], whole[0])
    torch.testing.assert_close(rows[1], wants["one"][1])
    with model.disable_adapter():
        torch.testing.assert_close(rows[2], model(ids).last_hidden_state[2])
    torch.testing.assert_close(model(ids, compose=graft.Average("two")).last_hidden_state, wants["two"])
    parallel = graft.split(model(ids, compose=graft.Parallel(value, "two")), 2)
    torch.testing.assert_close(parallel[0].last_hidden_state, whole)
    model.set_adapter(value)
    model(ids).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    if preset == "seq_bn":
        layer = model.base_model.model.encoder.layer[1].output.LayerNorm
        s, norm = torch.randn(2, 3, 24), layer.base_layer
        y = norm(s)
        parts = [layer.methods[name].u(y) for name in NAMES[:2]]
        torch.testing.assert_close(layer(s), norm(s + 0.7 * parts[0] + 0.5 * parts[1]))


def test_an_average_refuses_invertible_adapters():
    config = graft.BottleneckConfig.preset("seq_bn_inv", reduction_factor=4)
    model = graft.get_peft_model(models.make("bert"), config, "one")
    model.add_adapter("two", config)
    with pytest.raises(RoutingError, match=r"Adapter 'one' of layer 'embeddings' \(Bottleneck\) does more than add"):
        model.set_adapter(graft.Average("one", "two"))
    assert model.active_adapters == ["one"]


def test_bad_compositions_change_nothing():
    model, x = adapters(lora)
    before = model(x)
    for make, text in (
        (lambda: graft.Stack(), "no adapters"),
        (lambda: graft.Average("one", "two", weights=[1.0]), "2 adapters got 1 weights"),
        (lambda: graft.Average("one", weights=[float("nan")]), "finite numbers"),
        (lambda: graft.Average("one", weights=[1e39]), "finite numbers"),
        (lambda: graft.Stack("one", "one"), "twice"),
        (
            lambda: graft.Stack("one", graft.Parallel("two")),
            r"Parallel\('two'\) is a composition.*Name its adapters in",
        ),
        (lambda: graft.Stack("one", graft.Average("two")), "only a Parallel can contain.*_weighted_adapter makes"),
        (lambda: graft.Stack("one", graft.Stack("two")), "in one Stack, in their order"),
        (lambda: graft.Average("one", graft.Stack("two")), "Name its adapters in the Average"),
        (lambda: graft.Parallel(graft.Parallel("one")), "children of both in one Parallel"),
        (lambda: model.set_adapter(graft.Average("one", "no")), r"names \['no'\], which are not loaded"),
        (lambda: model(x, compose=graft.Parallel("one", graft.Stack("no"))), "not loaded"),
        (lambda: model(x, compose=graft.Stack("one"), adapter_names=["one"] * 3), "pass one of them"),
        (lambda: model(x, adapter_names=[graft.Parallel("one")] * 3), "compose="),
        (lambda: graft.split(before, 2), "3 rows into 2"),
    ):
        refuses(RoutingError, text, make)
    refuses(TypeError, "compose takes", model, x, compose=["one"])
    assert model.active_adapters == ["one"] and torch.equal(model(x), before)


def test_what_does_more_than_add_is_not_averaged():
    model, x = adapters(lambda: graft.IA3Config(target_modules=["0", "2"], feedforward_modules=[]), 2)
    before = model(x)
    with pytest.raises(RoutingError, match=r"Adapter 'one' of layer '0' \(IA3\) does more than add"):
        model.set_adapter(graft.Average("one", "two"))
    assert torch.equal(model(x), before) and model.active_adapters == ["one"]


def test_a_composition_ends_with_a_member():
    model, x = adapters(lora)
    want = alone(model, x, "two")
    model.set_adapter(graft.Average("one", "two"))
    warns(UserWarning, r"'one' was a part of Average\('one', 'two'", model.delete_adapter, "one")
    torch.testing.assert_close(model(x), want)


OWN_LOSSES = {
    "MoE-LoRA": lambda: graft.MoeLoraConfig(target_modules=["q_proj", "up_proj"], num_experts=3, router_loss=True),
    "MixLoRA": lambda: graft.MixLoraConfig(num_experts=3),
    "AdaLoRA": lambda: graft.AdaLoraConfig(target_modules=["q_proj"], total_step=9),
    "SHADOW": lambda: graft.ShadowConfig(task_type="CAUSAL_LM", shadow_dropout=0.0),
}


@pytest.mark.filterwarnings("ignore::graft.PeftWarning")
@pytest.mark.parametrize("name", OWN_LOSSES)
def test_losses_that_adapters_add_are_means_over_the_copies(name):
    """So that each adapter gets 1/n of the gradient that it would get alone."""
    model = graft.get_peft_model(models.make("llama"), OWN_LOSSES[name](), "one")
    trains = NAMES[:1] if name == "AdaLoRA" else NAMES[:2]  # of which one adapter trains
    model.add_adapter("two", replace(OWN_LOSSES[name](), inference_mode=len(trains) == 1))
    model.set_requires_grad(list(trains))
    with torch.no_grad(), seeded(2):
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape), alpha=0.1)
    model.train()
    ids = models.inputs("llama")["input_ids"]

    def of(value):
        loss = model(input_ids=ids, labels=ids, compose=value).loss
        if loss.requires_grad:
            loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return loss.detach(), found

    alone = [of(graft.Stack(adapter)) for adapter in NAMES[:2]]
    loss, found = of(graft.Parallel("one", "two"))
    torch.testing.assert_close(loss, sum(loss for loss, _ in alone) / 2)
    halves = {n: g / 2 for _, gradients in alone for n, g in gradients.items()}
    torch.testing.assert_close(found, halves, atol=1e-6, rtol=1e-3)
