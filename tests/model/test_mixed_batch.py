# SPDX-License-Identifier: Apache-2.0
"""One batch, another adapter per row, in whole transformers: forward, generation, training.

What holds for every method and layer type is in conformance/, what a backward pass recomputes in core/test_call.py.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from tests import models
from tests.leaves_out import OPEN_SETTINGS
from tests.looks import get_registry
from tests.models import adapted, disturb, seeded

NAMES = ["b", "__base__", "default", "b"]
LLAMA = dict(target_modules=["embed_tokens", "q_proj", "down_proj"], task_type="CAUSAL_LM")
T5 = dict(target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM")
METHODS = {"LORA": dict(r=2), "HRA": dict(r=2), "IA3": dict(feedforward_modules=["down_proj"])}


def two_adapters(name="llama", method="LORA", **options):
    values = {**(T5 if name == "t5" else LLAMA), **METHODS[method], **options}
    config = graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](**values)
    return adapted(models.make(name), dict.fromkeys(["default", "b"], config), scale=2.0 if name == "t5" else 0.3)


def use(model, name):
    """Activate one adapter, or none."""
    model.base_model.enable_adapter_layers()
    if name == "__base__":
        model.base_model.disable_adapter_layers()
    else:
        model.set_adapter(name)


def rows(batch, index):
    return {k: v[index] for k, v in batch.items()}


def alone(model, batch, names, run):
    """Each row by itself with its adapter."""
    out = []
    for i, name in enumerate(names):
        use(model, name)
        out.append(run(rows(batch, [i])))
    use(model, "default")
    return out


# forward


@pytest.mark.parametrize("method", METHODS)
def test_forward(method):
    model, batch = two_adapters(method=method), models.inputs("llama", 4)
    expected = torch.cat(alone(model, batch, NAMES, lambda one: models.output(model, one)))
    mixed = models.output(model, {**batch, "adapter_names": NAMES})
    assert_close(mixed, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(models.output(model, {**batch, "adapter_names": tuple(NAMES)}), mixed)


def test_input_embeddings_instead_of_ids():
    model, batch = two_adapters(target_modules=["q_proj"]), models.inputs("llama", 4)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    mixed = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], adapter_names=NAMES).logits
    assert_close(mixed, models.output(model, {**batch, "adapter_names": NAMES}))


def test_hooks_on_the_base_keep_its_own_output():
    model, kept = two_adapters(), []
    base = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    base.register_forward_hook(lambda _module, inputs, output: kept.append((inputs[0], output)))
    with torch.no_grad():
        model(**models.inputs("llama", 4), adapter_names=NAMES)
    x, y = kept[0]
    assert torch.equal(y, torch.nn.functional.linear(x, base.weight))


def test_the_active_adapter_and_the_next_call_are_not_touched():
    model, batch = two_adapters(), models.inputs("llama", 4)
    before = models.output(model, batch)
    models.output(model, {**batch, "adapter_names": NAMES})
    assert model.active_adapters == ["default"]
    assert torch.equal(models.output(model, batch), before)


def test_disabled_adapters_stay_disabled():
    model, batch = two_adapters(), models.inputs("llama", 4)
    with model.disable_adapter():
        expected = models.output(model, batch)
        assert torch.equal(models.output(model, {**batch, "adapter_names": NAMES}), expected)


def test_every_adapter_may_cover_other_layers():
    with seeded(1):
        model = graft.get_peft_model(models.make("llama"), graft.LoraConfig(target_modules=["q_proj"], r=2))
        model.add_adapter("b", graft.LoraConfig(target_modules=["down_proj"], r=4))
    disturb(model).eval()
    batch = models.inputs("llama", 4)
    expected = torch.cat(alone(model, batch, NAMES, lambda one: models.output(model, one)))
    assert_close(models.output(model, {**batch, "adapter_names": NAMES}), expected, rtol=1e-4, atol=1e-4)


def test_dropout_is_drawn_for_the_rows_of_each_adapter():
    model, batch = two_adapters(lora_dropout=0.5).train(), models.inputs("llama", 4)
    with seeded(3):
        one = models.output(model, {**batch, "adapter_names": NAMES})
    with seeded(4):
        two = models.output(model, {**batch, "adapter_names": NAMES})
    assert torch.equal(one[1], two[1]), "a row without adapter has none"
    assert all(not torch.equal(one[i], two[i]) for i in (0, 2, 3))


@pytest.mark.parametrize("method", ["LORA", pytest.param("HRA", marks=pytest.mark.slow)])
def test_compiled(method):
    torch._dynamo.reset()
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    with seeded(1):
        config = graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](target_modules=["0", "2"], r=2)
        model = graft.get_peft_model(net, config)
        model.add_adapter("b", copy.deepcopy(config))
    disturb(model)
    compiled, x = torch.compile(model, backend="eager"), torch.linspace(-1, 1, 12).view(4, 3)
    for names in (NAMES, NAMES[::-1], None):
        assert_close(compiled(x, adapter_names=names), model(x, adapter_names=names), rtol=1e-5, atol=1e-5)


# generation


def full(name="llama", n=4):
    """A batch without padding, so that a row alone is the row in the batch."""
    with seeded(5):
        ids = torch.randint(3, models.VOCAB, (n, 4))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


OPTIONS = {
    "greedy": dict(do_sample=False),
    "beams": dict(do_sample=False, num_beams=3),
    "returned beams": dict(do_sample=False, num_beams=3, num_return_sequences=2),
}


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generation(name, how):
    model, batch = two_adapters(name), full(name)
    options = dict(max_new_tokens=4, min_new_tokens=4, **OPTIONS[how])
    expected = torch.cat(alone(model, batch, NAMES, lambda one: model.generate(**one, **options)))
    mixed = model.generate(**batch, adapter_names=NAMES, **options)
    assert torch.equal(mixed, expected)
    assert len({tuple(row) for row in expected.tolist()}) > 1, "adapters differ in what they say"
    assert get_registry(model).call.current_rows() is None


def test_generation_with_samples_of_each_row():
    model, batch = two_adapters(), full()
    out = model.generate(**batch, adapter_names=NAMES, do_sample=True, num_return_sequences=2, max_new_tokens=2)
    assert out.shape == (8, 6)
    assert torch.equal(out[:, :4], batch["input_ids"].repeat_interleave(2, 0))


def test_generation_options_in_a_generation_config():
    from transformers import GenerationConfig

    model, batch = two_adapters(), full()
    config = GenerationConfig(do_sample=False, num_beams=2, max_new_tokens=3, pad_token_id=0, eos_token_id=2)
    expected = model.generate(**batch, adapter_names=NAMES, do_sample=False, num_beams=2, max_new_tokens=3)
    assert torch.equal(model.generate(**batch, adapter_names=NAMES, generation_config=config), expected)
    inputs = batch.pop("input_ids")
    assert torch.equal(model.generate(inputs, config, adapter_names=NAMES, **batch), expected)


@OPEN_SETTINGS
def test_the_models_generation_config_fills_in_what_a_given_one_leaves_open():
    from transformers import GenerationConfig

    model, batch = two_adapters(), full()
    config = GenerationConfig(max_new_tokens=3, pad_token_id=0, eos_token_id=2)
    expected = model.generate(**batch, adapter_names=NAMES, do_sample=False, num_beams=2, max_new_tokens=3)
    model.get_base_model().generation_config.num_beams = 2
    out = model.generate(**batch, adapter_names=NAMES, generation_config=config)
    assert torch.equal(out[:, : expected.shape[1]], expected)


@pytest.mark.differs("`generate` of an encoder-decoder with positional arguments")
def test_positional_inputs_of_generate():
    model, batch = two_adapters(), full()
    expected = model.generate(**batch, adapter_names=NAMES, max_new_tokens=2, do_sample=False)
    out = model.generate(batch["input_ids"], adapter_names=NAMES, max_new_tokens=2, do_sample=False)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("how", OPTIONS)
def test_a_generation_that_fails_leaves_nothing_behind(how):
    model, batch = two_adapters(), full()
    expected = models.output(model, batch)

    def fail(*_):
        raise KeyError("stop")

    hook = model.get_base_model().model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyError):
        model.generate(**batch, adapter_names=NAMES, max_new_tokens=2, **OPTIONS[how])
    hook.remove()
    assert not get_registry(model).call.open
    assert torch.equal(models.output(model, batch), expected)
    for names, error in ((["zz"] * 4, "non-existing"), (["b"], "same as the number of inputs")):
        with pytest.raises(graft.RoutingError, match=error):
            model.generate(**batch, adapter_names=names, max_new_tokens=2, **OPTIONS[how])


# training


@pytest.mark.parametrize("method", METHODS)
def test_two_adapters_trained_at_once_are_two_trained_apart(method):
    """Steps on mixed batches leave both adapters where steps on their own rows leave them."""
    batch = {**models.inputs("llama", 4)}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    names = ["default", "b", "default", "b"]

    def steps(model, take):
        model.set_requires_grad(["default", "b"])
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            take(model)
            optimizer.step()
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def summed(logits, index):
        flat = labels[index][:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), flat, reduction="sum")

    def mixed(model):
        summed(models.output(model, {**batch, "adapter_names": names}), [0, 1, 2, 3]).div(20).backward()

    def apart(model):
        for name, index in (("default", [0, 2]), ("b", [1, 3])):
            model.set_adapter(name)
            summed(models.output(model, rows(batch, index)), index).div(20).backward()
        model.set_requires_grad(["default", "b"])

    start = {n: p.detach().clone() for n, p in two_adapters(method=method).named_parameters()}
    together, separate = (
        steps(two_adapters(method=method).train(), mixed),
        steps(two_adapters(method=method).train(), apart),
    )
    assert together.keys() == separate.keys()
    for name, p in separate.items():
        assert_close(together[name], p, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(p, start[name]) for name, p in together.items())


def test_labels_give_the_loss_of_the_rows():
    model, batch = two_adapters(), full()
    losses = alone(model, batch, NAMES, lambda one: model(**one, labels=one["input_ids"]).loss)
    mixed = model(**batch, labels=batch["input_ids"], adapter_names=NAMES).loss
    assert_close(mixed, torch.stack(losses).mean())


def test_the_first_tensor_counts_the_rows_wherever_it_stands():
    model = graft.get_peft_model(models.make("mlp"), graft.LoraConfig(target_modules=["fc1"]))
    x = torch.randn(2, 4, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(x, adapter_names=["default"] * 2), model(x=x, adapter_names=["default"] * 2))


def test_a_batch_norm_keeps_rows_of_other_adapters_apart():
    """It takes its statistics from all rows that it runs on: of each adapter, its own."""
    base = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).train()
    plain = graft.LoraConfig(target_modules=["0"])
    alone = graft.get_peft_model(copy.deepcopy(base), copy.deepcopy(plain))
    model = graft.get_peft_model(base, graft.LNTuningConfig(target_modules=["1"]), "norm", mixed=True)
    model.add_adapter("plain", plain)
    x = torch.randn(8, 8)
    assert_close(model(x, adapter_names=["plain"] * 4 + ["norm"] * 4)[:4], alone(x[:4]))


class ScaledLinear(nn.Linear):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class KeywordNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = ScaledLinear(4, 5)

    def forward(self, x, scale=1.0):
        return self.layer(x, scale=scale)


@pytest.mark.parametrize("grad", [True, False])
def test_the_base_of_a_layer_gets_the_keywords_of_its_call(grad):
    config = graft.LoraConfig(target_modules=["layer"], init_lora_weights=False)
    model = graft.get_peft_model(KeywordNet(), config).eval()
    x = torch.randn(2, 4)
    with torch.set_grad_enabled(grad):
        mixed = model(x, scale=3.0, adapter_names=["default", "__base__"])
        rows = [model(x[:1], scale=3.0)]
        with model.disable_adapter():
            rows.append(model(x[1:], scale=3.0))
    assert_close(mixed, torch.cat(rows))
