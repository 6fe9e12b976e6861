# SPDX-License-Identifier: Apache-2.0
"""MixLoRA on small models, by its formula, in every kind of call."""

import pytest
import torch
from torch.testing import assert_close

import graft
from tests.leaves_out import WHOLE_GRAPHS
from tests.looks import layers
from tests.models import make, seeded
from tests.raised import refuses

IDS = torch.arange(1, 25).view(3, 8)
PLAIN = ("q_proj", "k_proj", "v_proj", "o_proj")


def config(**options):
    return graft.MixLoraConfig(**{"r": 2, "lora_alpha": 4, "num_experts": 3, **options})


def with_mixlora(*names, base=None, mixed=False, **options):
    model = None
    for name in names or ("one",):
        with seeded(len(name) + ord(name[0])):
            own = config(init_weights=False, **options)
            if model is None:
                model = graft.get_peft_model(base or make("llama"), own, name, mixed=mixed)
            else:
                model.add_adapter(name, own)
            for key, p in model.named_parameters():
                if f".{name}" in key and "router" in key:
                    p.data.normal_()
    return model.eval()


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def mlp_by_hand(layer, name, h):
    """Σ over the chosen experts of g · MLP with that expert's LoRA, a token at a time."""
    mlp, m = layer.base_layer, layer.methods[name]
    G = m.mixlora_router.weight

    def linear(which, e, x):
        own = getattr(mlp, which)
        A, B = own.mixlora_A[name][e], own.mixlora_B[name][e]
        return own.base_layer(x) + 2 * B @ (A @ x)

    rows = []
    for x in h.flatten(0, -2):
        p = (G @ x).softmax(0)
        chosen = p.argsort(descending=True)[:2]
        total = 0
        for e in chosen:
            inner = mlp.act_fn(linear("gate_proj", e, x)) * linear("up_proj", e, x)
            total = total + p[e] / p[chosen].sum() * linear("down_proj", e, inner)
        rows.append(total)
    return torch.stack(rows).view(h.shape)


@torch.no_grad()
def test_each_token_runs_the_mlp_of_its_experts():
    model = with_mixlora()
    mlps = {key: layer for key, layer in layers(model).items() if key.endswith(".mlp")}
    assert len(mlps) == model.config.num_hidden_layers
    for layer in mlps.values():
        with seeded(4):
            h = torch.randn(2, 3, model.config.hidden_size)
        assert_close(layer(h), mlp_by_hand(layer, "one", h), rtol=1e-4, atol=1e-5)
        assert (layer(h) - layer.base_layer.act_fn(h)).abs().max() > 1e-3
    for key, layer in layers(model).items():
        if key.endswith(PLAIN):
            assert layer.methods["one"].effect.product is not None


def test_fresh_it_is_the_model():
    with seeded(1):
        model = graft.get_peft_model(make("llama"), config(top_k=3)).eval()
    assert_close(logits(model), logits(make("llama").eval()), rtol=1e-4, atol=1e-5)
    weight = next(p for n, p in model.named_parameters() if "router" in n)
    assert 0.005 < weight.std() < 0.04


def test_plan_counts_what_trains():
    report = graft.plan(make("llama"), config())
    model = graft.get_peft_model(make("llama"), config())
    assert sum(m.parameters for m in report.matched) == model.get_nb_trainable_parameters()[0]
    kinds = {m.name.rpartition(".")[2]: m.shapes for m in report.matched}
    H, I = model.config.hidden_size, model.config.intermediate_size
    assert kinds["mlp"] == (f"mixlora_router (3, {H})",)
    assert kinds["up_proj"] == (f"mixlora_A (3, 2, {H})", f"mixlora_B (3, {I}, 2)")
    assert kinds["q_proj"][0] == f"mixlora_A (2, {H})"


def test_routers_add_their_balance():
    model = with_mixlora().train()
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    probabilities = []

    def keep(module, args, kwargs):
        probabilities.append((args[0] @ layer_of(module).mixlora_router["one"].weight.T).softmax(-1)[mask.bool()])

    def layer_of(module):
        return next(layer for layer in layers(model).values() if layer is module)

    hooks = [
        layer.register_forward_pre_hook(keep, with_kwargs=True)
        for k, layer in layers(model).items()
        if k.endswith("mlp")
    ]
    with torch.no_grad():
        plain = model(IDS, labels=IDS, attention_mask=mask).loss
    probabilities.clear()
    loss = model(IDS, labels=IDS, attention_mask=mask).loss
    for hook in hooks:
        hook.remove()
    p = torch.cat(probabilities)
    f = torch.stack([(p.topk(2).indices == e).any(-1).float().mean() for e in range(3)])
    assert_close(loss - plain, 1e-3 * 3 * (f * p.mean(0)).sum(), rtol=1e-2, atol=1e-6)


def test_files(tmp_path):
    model = with_mixlora(num_experts=4, rank_pattern={"up_proj": 3})
    model.save_pretrained(tmp_path, selected_adapters=["one"])
    loaded = graft.PeftModel.from_pretrained(make("llama"), tmp_path / "one", "one").eval()
    assert torch.equal(logits(loaded), logits(model))
    state = graft.get_peft_model_state_dict(model, adapter_name="one")
    assert "base_model.model.model.layers.0.mlp.mixlora_router.weight" in state
    assert "base_model.model.model.layers.0.mlp.gate_proj.mixlora_A" in state


def test_injected_from_a_state_dict():
    model = with_mixlora()
    state = graft.get_peft_model_state_dict(model, adapter_name="one")
    state = {key.removeprefix("base_model.model."): t for key, t in state.items()}
    base = graft.inject_adapter_in_model(config(), make("llama"), "one", state_dict=state)
    graft.set_peft_model_state_dict(base, state, "one")
    assert torch.equal(logits(base.eval()), logits(model))


def test_some_layers_alone():
    targets = ["q_proj", "up_proj", "down_proj"]
    model = graft.get_peft_model(make("llama"), config(target_modules=targets, layers_to_transform=[1]))
    paths = ("self_attn.q_proj", "mlp", "mlp.up_proj", "mlp.down_proj")
    assert set(layers(model)) == {f"model.layers.1.{path}" for path in paths}


def test_beside_a_lora_adapter():
    model = with_mixlora(mixed=True)
    with seeded(7):
        beside = graft.LoraConfig(r=2, target_modules=["gate_proj", "q_proj"], init_lora_weights=False)
        model.add_adapter("plain", beside)
    alone = logits(model)
    model.set_adapter(["one", "plain"])
    both = logits(model)
    assert (both - alone).abs().max() > 1e-3
    model.set_adapter("plain")
    plain = graft.get_peft_model(make("llama"), beside, "plain").eval()
    state = graft.get_peft_model_state_dict(model, adapter_name="plain")
    assert not graft.set_peft_model_state_dict(plain, state, adapter_name="plain").unexpected_keys
    assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    mixed = logits(model, adapter_names=["plain", "one", "__base__"])
    assert_close(mixed[0], logits(plain)[0], rtol=1e-4, atol=1e-5)
    assert_close(mixed[1], alone[1], rtol=1e-4, atol=1e-5)


@WHOLE_GRAPHS
def test_it_compiles():
    torch._dynamo.reset()
    mlp = layers(with_mixlora().train())["model.layers.0.mlp"]
    h = torch.randn(2, 3, mlp.base_layer.hidden_size)
    assert_close(torch.compile(mlp, fullgraph=True, backend="aot_eager")(h), mlp(h))


def test_what_it_refuses():
    model = with_mixlora("one", "two")
    refuses(NotImplementedError, r"layer 'model.layers.0.*router chooses experts for each token", model.merge_adapter)
    with pytest.raises(ValueError, match=r"\['one', 'two'\] at once on layer .*activate one"):
        model.base_model.set_adapter(["one", "two"])
    assert model.active_adapters == ["one"]
    mlp = layers(model)["model.layers.0.mlp"].base_layer
    with pytest.raises(graft.RoutingError, match=r"'model.layers.0.mlp.up_proj' has an expert.*. Call the MLP"):
        mlp.up_proj(torch.ones(2, 3, model.config.hidden_size))
    refuses(TypeError, "missing 1 required positional argument: 'x'", layers(model)["model.layers.0.mlp"])
    base = make("llama")
    for options, error, text in (
        (dict(target_modules=["q_proj"]), graft.NoMatchingPeftModuleError, r"is in an MLP.*layers.0.self_attn.q_proj"),
        (dict(mlp_modules=["ffn"]), graft.NoMatchingPeftModuleError, r"mlp_modules=\['ffn'\] matched nothing"),
        (dict(mlp_modules="ff("), graft.ConfigError, "mlp_modules"),
        (dict(target_modules=["up_proj", "input_layernorm"]), graft.UnsupportedLayerError, "linear layers only"),
    ):
        refuses(error, text, graft.get_peft_model, base, config(**options))
        assert not any(isinstance(m, graft.AdapterLayer) for m in base.modules())
    refuses(graft.ConfigError, "`top_k` is 4", config, top_k=4)
    block = torch.nn.ModuleDict({"mlp": torch.nn.Sequential(torch.nn.Conv1d(3, 3, 1))})
    cfg = config(target_modules=["mlp.0"])
    refuses(
        graft.UnsupportedLayerError,
        "linear layers only, and MLP 'mlp' of layer 'mlp.0' has none",
        graft.get_peft_model,
        block,
        cfg,
    )


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_other_models(name):
    if name == "bert":  # whose two layers have no module of their own around them
        refuses(graft.NoMatchingPeftModuleError, "in an MLP", graft.get_peft_model, make("bert"), config())
        return
    with seeded(1):
        model = graft.get_peft_model(make(name), config(init_weights=False)).train()
    ids = dict(input_ids=IDS) | (dict(decoder_input_ids=IDS[:, :5]) if name == "t5" else {})
    output = model(**ids).logits
    base = make(name).eval()
    assert (output - base(**ids).logits).abs().max() > 1e-3
    (output.square().mean() + model.auxiliary_loss()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
