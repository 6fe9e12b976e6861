# SPDX-License-Identifier: Apache-2.0
"""W₀, the weight as it is without any adapter: adapters start from it, whatever is merged meanwhile."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from tests.looks import layers
from tests.models import seeded


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.lin = nn.Embedding(9, 6), nn.Linear(6, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 3)])
        self.shared = self.call = self.method = self.states = "the base's own"

    def forward(self, ids):
        return self.layers[0](torch.tanh(self.lin(self.emb(ids))))


def net():
    with seeded(0):
        return Net().eval()


IDS = torch.arange(9).view(3, 3)


def disturb(model, adapter):
    with seeded(1), torch.no_grad():
        for layer in layers(model).values():
            if adapter in layer.methods:
                for p in layer.parameters_of(adapter):
                    p.add_(torch.randn(p.shape) * 0.5)
    return model.eval()


def test_token_rows_start_from_the_table_without_what_is_merged():
    model = graft.get_peft_model(net(), graft.TrainableTokensConfig(token_indices=[1, 4], target_modules=["emb"]), "a")
    disturb(model, "a").merge_adapter()
    model.add_adapter("b", graft.TrainableTokensConfig(token_indices=[4, 7], target_modules=["emb"]))
    model.base_model.unmerge_adapter()
    model.set_adapter("b")
    assert torch.equal(model(IDS), net()(IDS))


@pytest.mark.parametrize("how", ["pissa", "olora"])
@pytest.mark.parametrize("dora", [True, False])
def test_an_initialisation_may_rewrite_the_base_under_a_merge(how, dora):
    def lora(**options):
        return graft.LoraConfig(target_modules=["lin"], r=2, **options)

    model = graft.get_peft_model(net(), lora(use_dora=dora), "a")
    expected = disturb(model, "a")(IDS)
    model.merge_adapter()
    model.add_adapter("b", lora(init_lora_weights=how))
    model.unmerge_adapter()
    model.set_adapter("b")
    assert_close(model(IDS), net()(IDS), rtol=1e-5, atol=1e-5)
    alone = graft.get_peft_model(net(), lora(init_lora_weights=how), "b").eval()
    assert_close(layers(model)["lin"].base_layer.weight, layers(alone)["lin"].base_layer.weight)
    assert (model(IDS) - expected).abs().max() > 1e-3


def test_an_injection_that_fails_gives_the_base_back_under_a_merge():
    model = graft.get_peft_model(net(), graft.LoraConfig(target_modules=["lin"], r=2), "a")
    disturb(model, "a").merge_adapter()
    merged = layers(model)["lin"].base_layer.weight.clone()
    with pytest.raises(graft.ConfigError):
        wrong = graft.LoraConfig(target_modules=["lin", "emb"], r=2, init_lora_weights="pissa_niter_x")
        model.add_adapter("b", wrong)
    layer = layers(model)["lin"]
    assert layer.merged_adapters == ["a"] and layer.adapters == ["a"]
    assert_close(layer.base_layer.weight, merged)


@pytest.mark.parametrize(
    "config",
    [
        graft.OFTConfig(target_modules=["lin"], oft_block_size=2, module_dropout=0.7),
        graft.LoHaConfig(target_modules=["lin"], r=2, rank_dropout=0.7),
        graft.LoHaConfig(target_modules=["lin"], r=8, module_dropout=0.7),
        graft.LoraConfig(target_modules=["lin"], r=2, lora_dropout=0.7),
        graft.LoraConfig(target_modules=["lin"], r=2, lora_dropout=0.7, use_dora=True),
    ],
    ids=["OFT", "LoHa rank", "LoHa module", "LoRA", "DoRA"],
)
@pytest.mark.parametrize("safe", [True, False])
def test_a_merge_is_the_same_in_training_mode(config, safe):
    weights = []
    for training in (False, True):
        with seeded(3):
            model = graft.get_peft_model(net(), config, "a")
        disturb(model, "a").train(training)
        delta = [m.training for m in model.modules()]
        model.merge_adapter(safe_merge=safe)
        assert [m.training for m in model.modules()] == delta
        weights.append(layers(model)["lin"].base_layer.weight.clone())
    assert torch.equal(*weights)


@pytest.mark.differs("names of the base model")
def test_names_of_the_base_model_are_let_through():
    """PEFT's wrappers hide none but their own, and graft's have no others."""
    import peft

    base = net()
    ours, theirs = (lib.get_peft_model(net(), lib.LoraConfig(target_modules=["lin"])) for lib in (graft, peft))
    for wrapper in (ours, ours.base_model):
        assert isinstance(wrapper.layers, nn.ModuleList) and wrapper.shared == wrapper.call == base.shared
        assert wrapper.method == wrapper.states == base.shared
    public = {n for n in dir(type(ours.base_model)) if not n.startswith("_")} - set(dir(nn.Module))
    public.remove("auxiliary_loss")  # the one that PEFT's tuners lack
    assert public <= {n for n in dir(theirs.base_model)}
    public = {n for n in dir(type(ours)) if not n.startswith("_")} - set(dir(nn.Module))
    own = {
        "base_model_prepare_inputs_for_generation",
        "accepts_loss_kwargs",
        "change_timeout",
        "adapter_parameters",
        "reference",
    }
    assert public - {n for n in dir(theirs)} <= own  # the second says what the base says, where it does
