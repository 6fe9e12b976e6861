# SPDX-License-Identifier: Apache-2.0
"""X-LoRA over stacks of experts, dense and packed: each token weighs what adapters add to its experts."""

import warnings

import pytest
import torch
from torch.testing import assert_close

import graft
from graft.storage import stacks
from tests.families import IDS
from tests.inject.test_parameters import base
from tests.leaves_out import FUSED_EXPERTS
from tests.looks import get_registry, layers
from tests.models import seeded
from tests.storage.packed_experts import both

pytestmark = FUSED_EXPERTS
ADAPTERS = ("both", "down")
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
MAKE = {"dense": lambda: base("mixtral"), "packed": lambda: both("fp8")[0]}


def xlora_of_stacks(kind, folder):
    """X-LoRA with two adapters: of both stacks, and of one."""
    configs = dict(zip(ADAPTERS, (dict(r=2, target_parameters=BOTH), dict(r=3, target_parameters=BOTH[1:]))))
    for i, (name, values) in enumerate(configs.items()):
        with seeded(i), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = graft.LoraConfig(**values, target_modules=[], lora_alpha=3, init_lora_weights=False)
            graft.get_peft_model(MAKE[kind](), config).save_pretrained(folder / name)
    model, saved = MAKE[kind](), {name: str(folder / name) for name in configs}
    with seeded(2):
        config = graft.XLoraConfig(
            hidden_size=model.config.hidden_size,
            adapters=saved,
            use_trainable_adapters=True,
            layerwise_scalings=True,
            task_type="CAUSAL_LM",
        )
        model.config.use_cache = False
        return graft.get_peft_model(model, config).eval()


def by_hand(module, own, gates, x, index, weights):
    """Return what a block of Mixtral's experts makes of each token, (tokens, width), written as the papers do.

    Args:
        own: name of a stack → [(adapter, A, B)], of each expert, with the scaling in B.
        gates: name of a stack, adapter → (tokens,).
    """

    def product(name, v, t, e):
        held = stacks.find_matrices(module, name)
        W = getattr(module, name)[e] if held is None else held.matrix(e, torch.float32)
        return W @ v + sum(gates[name, adapter][t] * (B[e] @ (A[e] @ v)) for adapter, A, B in own[name])

    out = []
    for t, v in enumerate(x):
        y = 0
        for e, weight in zip(index[t].tolist(), weights[t]):
            gate, up = product("gate_up_proj", v, t, e).chunk(2)
            y = y + weight * product("down_proj", torch.nn.functional.silu(gate) * up, t, e)
        out.append(y)
    return torch.stack(out)


@pytest.mark.differs("X-LoRA: adapters on stacks of experts")
@pytest.mark.parametrize("kind", MAKE)
def test_outputs_and_gradients_are_those_of_the_formula(kind, tmp_path):
    model = xlora_of_stacks(kind, tmp_path)
    found, seen = layers(model), {}
    inner = {key.rpartition(".")[0]: layer.get_base_layer() for key, layer in found.items()}
    for path, m in inner.items():
        m.register_forward_hook(lambda _, args, y, path=path: seen.update({path: (args, y)}))  # of the last pass
    model(input_ids=IDS)
    scalings = model.get_latest_scalings()  # (batch, tokens, layers, adapters)
    places = get_registry(model).places  # of the layers
    assert scalings.shape == (*IDS.shape, len(places), 2) and places.keys() == found.keys() and len(inner) == 2
    for path, m in inner.items():
        own, gates, trained = {}, {}, [scalings]
        for name in ("gate_up_proj", "down_proj"):
            layer = found[f"{path}.{name}"]
            own[name] = []
            for adapter, method in layer.methods.items():
                A, B = method.effect.factors().matrices()
                own[name].append((adapter, *layer.op.split_matrices(A, B, layer.site.shape[0])))
                gates[name, adapter] = scalings[:, :, places[layer.site.key], ADAPTERS.index(adapter)].flatten()
                trained += layer.parameters_of(adapter)
        (x, index, weights), y = seen[path]
        expected = by_hand(m, own, gates, x, index, weights)
        assert_close(y, expected, rtol=1e-5, atol=1e-6)
        with seeded(3):
            v = torch.randn_like(y)
        grads, wanted = (torch.autograd.grad(out, trained, v, retain_graph=True) for out in (y, expected))
        assert len(grads) == 7 and all(g.any() for g in grads)
        for g, other in zip(grads, wanted):
            assert_close(g, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_blocks_that_do_not_say_whose_tokens_they_have_are_refused(tmp_path):
    config = graft.LoraConfig(r=2, target_parameters=BOTH[1:], target_modules=["q_proj"])
    graft.get_peft_model(base("llama4"), config).save_pretrained(tmp_path)
    model = base("llama4")
    model.config.use_cache = False
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    config = graft.XLoraConfig(hidden_size=16, adapters={"a": str(tmp_path)}, task_type="CAUSAL_LM")
    with pytest.raises(graft.ConfigError, match=r"which layer 'model\..*experts.down_proj' \(Llama4TextExperts"):
        graft.get_peft_model(model, config)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
