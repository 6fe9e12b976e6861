# SPDX-License-Identifier: Apache-2.0
"""Steering vectors on whole models: the formula, coefficients of a call, vectors from pairs."""

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModel

import graft
from graft.core.errors import CalibrationError, ConfigError, RoutingError
from graft.core.rows import Run
from graft.methods.states import numbers_by_row
from tests.looks import layers
from tests.methods import test_reft
from tests.methods.make_reft_steering import IDS, PAIRS, Letters
from tests.models import adapted, inputs, make, output, seeded, transformer
from tests.raised import refuses

HERE = Path(__file__).parent / "fixtures"


def with_vectors(layers_of=(1,), **changes):
    return adapted(make("llama"), graft.SteeringConfig(layers=list(layers_of), **changes), scale=1)


@torch.no_grad()
def states(model, **options):
    """What the last block gives out."""
    return test_reft.states(model, **inputs("llama"), **options)


def test_the_formula():
    model = with_vectors(coefficient=2.0)
    v = layers(model)["model.layers.1"].steering_vector["default"].detach()
    with model.disable_adapter():
        h = states(model)
    assert_close(states(model), h + 2 * v)
    each = torch.tensor([0.0, -1.0, 0.5])
    assert_close(states(model, steering_coefficient=each), h + each[:, None, None] * v)
    moved = h + 2 * v
    expected = moved / moved.norm(dim=-1, keepdim=True) * h.norm(dim=-1, keepdim=True)
    assert_close(states(with_vectors(coefficient=2.0, normalize=True)), expected)
    late = states(with_vectors(coefficient=2.0, min_token_index=3))
    assert_close(late, torch.cat([h[:, :3], moved[:, 3:]], 1))
    mixed = states(model, adapter_names=["default", "__base__", "default"], steering_coefficient=[1, 5, 3])
    assert_close(mixed, h + torch.tensor([1.0, 0, 3])[:, None, None] * v)
    refuses(RoutingError, r"shape \(2,\) for 3 rows", model, **inputs("llama"), steering_coefficient=[1, 2])
    for value in (float("nan"), [1.0, float("inf"), 1.0], torch.tensor([1.0, float("nan"), 1.0]), 1e39):
        with pytest.raises(RoutingError, match=r"NaN or infinite\. Give finite numbers"):
            model(**inputs("llama"), steering_coefficient=value)
    refuses(RoutingError, "takes a number, or one for each row", model, **inputs("llama"), steering_coefficient=10**400)


def test_coefficients_go_where_the_rows_are():
    run = Run((torch.empty(2, 3, device="meta"),), {}, {})
    for value in (1.0, [1.0, 2.0], torch.tensor([1.0, 2.0])):
        numbers = numbers_by_row("steering_coefficient", value, run, torch.isfinite, "is not finite.")
        assert numbers.device.type == "meta"


TINY = dict(vocab_size=41, hidden_size=24, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
CACHED = {  # a cache of tokens, of tokens in its second layer only, and of states
    "llama": lambda: make("llama"),
    "minimax": transformer(
        "MiniMaxConfig", "MiniMaxForCausalLM", intermediate_size=36, num_attention_heads=3, num_key_value_heads=3,
        head_dim=8, num_local_experts=2, layer_types=["linear_attention", "full_attention"], **TINY,
    ),
    "mamba": transformer("MambaConfig", "MambaForCausalLM", state_size=4, **TINY),
}  # fmt: skip


@pytest.mark.parametrize("first", [3, 9], ids=["in the prompt", "after it"])
@pytest.mark.parametrize("name", CACHED)
@torch.no_grad()
def test_the_first_token_counts_from_the_prompts_begin(name, first):
    """Also in steps of `generate` that see one token, of which a cache holds those before; padding does not count."""
    with seeded(0):
        base = CACHED[name]().eval()
    places = dict(target_modules=["layers.0", "layers.1"]) if name == "mamba" else {}
    model = adapted(base, graft.SteeringConfig(min_token_index=first, **places), scale=1)
    ids = torch.cat([torch.zeros(3, 1, dtype=torch.long), inputs("llama")["input_ids"]], 1)
    options = dict(input_ids=ids, attention_mask=(torch.arange(8) > 0).long().expand(3, 8), max_new_tokens=4)
    options |= dict(do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_logits=True)
    cached, anew = (torch.stack(model.generate(**options, use_cache=cache).logits) for cache in (True, False))
    assert_close(cached, anew, rtol=1e-3, atol=5e-3)
    with model.disable_adapter():
        plain = torch.stack(model.generate(**options).logits)
    assert ((cached - plain).abs().amax((1, 2)) > 1e-3).tolist() == [first < 8, first < 8, first < 9, True]


@torch.no_grad()
def test_the_first_token_of_a_decoder():
    base, batch = make("t5"), {k: v for k, v in inputs("t5").items() if "decoder" not in k}
    model = adapted(base, graft.SteeringConfig(min_token_index=2, layers=[2, 3]), scale=1)
    options = dict(batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    cached, anew = (torch.stack(model.generate(**options, use_cache=cache).logits) for cache in (True, False))
    assert_close(cached, anew, rtol=1e-4, atol=1e-4)
    plain = torch.stack(make("t5").generate(**options).logits)
    assert ((cached - plain).abs().amax((1, 2)) > 1e-3).tolist() == [False, False, True, True]


def test_states_whose_rows_are_not_first():
    base = transformer("XLNetConfig", "XLNetModel", vocab_size=41, d_model=24, n_layer=1, n_head=3, d_inner=36)()
    model = graft.get_peft_model(base, graft.SteeringConfig(target_modules=["layer.0"], min_token_index=1))
    ids = inputs("llama")["input_ids"]
    with pytest.raises(RoutingError, match="min_token_index=1 of adapter 'default' needs one row for each sample"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


class Pair(NamedTuple):
    states: torch.Tensor
    rest: str


class Named(nn.Module):
    """A block whose output has names, as Reformer's."""

    def forward(self, x):
        return Pair(2 * x, "rest")


def test_outputs_with_names_keep_them():
    base = nn.Sequential(Named())
    base.config = SimpleNamespace(hidden_size=3, to_dict=lambda: {})
    out = graft.get_peft_model(base, graft.SteeringConfig(target_modules=["0"]))(torch.ones(2, 3))
    assert isinstance(out, Pair) and out.rest == "rest"
    assert_close(out.states, torch.full((2, 3), 2.0))


def pairs():
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2] * 2)
    with seeded(5):
        drawn = torch.randint(1, 40, (2, 2, 4, 6))
    return [tuple(dict(input_ids=ids, attention_mask=mask) for ids in pair) for pair in drawn]


@pytest.mark.parametrize("how", ["mean", "pca"])
@torch.no_grad()
def test_vectors_from_pairs(how):
    model = graft.get_peft_model(make("llama"), graft.SteeringConfig())
    graft.set_steering_vectors(model, pairs(), how=how)
    base, last = make("llama"), torch.tensor([5, 3, 5, 3])
    for block, key in ((0, "model.layers.0"), (1, "model.layers.1")):
        found = []
        for pair in pairs():
            both = []
            for given in pair:
                seen = []
                handle = base.model.layers[block].register_forward_hook(lambda _m, _a, y, seen=seen: seen.append(y))
                base(**given)
                handle.remove()
                y = seen[0] if torch.is_tensor(seen[0]) else seen[0][0]
                both.append(y[torch.arange(4), last])
            found.append(both[0] - both[1])
        differences = torch.cat(found)
        v = layers(model)[key].steering_vector["default"]
        mean = differences.mean(0)
        if how == "mean":
            assert_close(v.detach(), mean)
        else:
            spread = (differences - mean).T @ (differences - mean)
            assert_close(spread @ v, torch.linalg.eigvalsh(spread)[-1] * v, rtol=1e-3, atol=1e-3)
            assert v @ mean >= 0
    assert (output(model, inputs("llama")) - output(base, inputs("llama"))).abs().max() > 1e-3


def test_each_module_keeps_its_mode():
    model = graft.get_peft_model(make("llama"), graft.SteeringConfig()).train()
    next(layer for layer in layers(model).values()).eval()
    before = [m.training for m in model.modules()]
    graft.set_steering_vectors(model, pairs())
    assert [m.training for m in model.modules()] == before


def test_vectors_are_a_change_which_a_call_does_not_see():
    model = graft.get_peft_model(make("llama"), graft.SteeringConfig())
    with graft.calling(model), pytest.raises(graft.InUseError, match="set_steering_vectors"):
        graft.set_steering_vectors(model, pairs())
    assert not any(layer.steering_vector["default"].any() for layer in layers(model).values())


def test_bad_input():
    model = graft.get_peft_model(make("llama"), graft.SteeringConfig())
    refuses(CalibrationError, "no pairs", graft.set_steering_vectors, model, [])
    with pytest.raises(ConfigError, match="'other' is no adapter of steering vectors"):
        graft.set_steering_vectors(model, pairs(), "other")
    with pytest.raises(ConfigError, match="'default' is no adapter of steering vectors"):
        graft.set_steering_vectors(make("llama"), pairs())
    refuses(ConfigError, "'mean' or 'pca'", graft.set_steering_vectors, model, pairs(), how="median")
    refuses(ConfigError, "blocks 0 to 1", graft.get_peft_model, make("llama"), graft.SteeringConfig(layers=[7]))


@torch.no_grad()
def test_repeng_computes_the_same():
    held = load_file(HERE / "repeng" / "outputs.safetensors")
    for label in ("plain", "normalized"):
        base = AutoModel.from_pretrained(HERE / "adapterhub" / "llama", attn_implementation="eager")
        config = graft.SteeringConfig(layers=[1], coefficient=1.5, normalize=label == "normalized")
        model = graft.get_peft_model(base, config).eval()
        layers(model)["layers.1"].steering_vector["default"].copy_(held["direction.1"])
        assert_close(model(IDS).last_hidden_state, held[label], rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_repeng_finds_the_same_directions():
    base = AutoModel.from_pretrained(HERE / "adapterhub" / "llama", attn_implementation="eager")
    model = graft.get_peft_model(base, graft.SteeringConfig(layers=[0]))
    texts = Letters()
    graft.set_steering_vectors(model, [(texts([a]), texts([b])) for a, b in PAIRS], how="pca")
    found = layers(model)["layers.0"].steering_vector["default"]
    theirs = load_file(HERE / "repeng" / "outputs.safetensors")["found.0"]
    assert_close(found * (found @ theirs).sign(), theirs, rtol=1e-4, atol=1e-4)  # its signs are by majority
