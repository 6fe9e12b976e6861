# SPDX-License-Identifier: Apache-2.0
"""SDT by its formula on models with Mamba's mixers: no package of its authors installs."""

import copy

import pytest
import torch
from torch.testing import assert_close

import graft
from graft.core.errors import CalibrationError, CheckpointError, ConfigError, ConfigTypeError, NoMatchingPeftModuleError
from graft.methods.sdt import strongest
from tests.inject.test_reading import IDS, SSM, base
from tests.looks import layers
from tests.models import adapted, seeded
from tests.raised import refuses

OPTIONS = dict(channels=0.1, states=0.5, r=2)
D, N, R = SSM["intermediate_size"], SSM["state_size"], SSM["time_step_rank"]
NAMES = ["mamba", "falcon_mamba", "jamba"]


def warmed(model, config, steps=2):
    def train(parameters):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for _ in range(steps):
            model(IDS).logits.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    graft.preprocess_sdt(model, config, train)
    return model


def with_sdt(name, **options):
    model, config = base(name), graft.SdtConfig(**{**OPTIONS, **options})
    if config.init_weights:
        warmed(model, config)
    return adapted(model, config, scale=0)


def changed(model):
    """Give every parameter of the adapter a value; return the model."""
    with seeded(2), torch.no_grad():
        for name, p in model.named_parameters():
            if "sdt_" in name:
                p.normal_(std=0.3)
    return model


def test_channels_and_states_of_the_largest_change():
    change = torch.tensor([[0.0, 1, 0], [3, -4, 1], [0, 0, 0], [-2, 1, -6]])
    channels, states = strongest(change, 2, 2)
    assert channels.tolist() == [1, 3]
    assert states.tolist() == [[0, 1], [0, 2]]


def test_places_are_made_where_the_changes_are():
    found = layers(with_sdt("mamba", init_weights=False))
    method, channels = (
        next(la for key, la in found.items() if key.endswith("x_proj")).methods["default"],
        torch.tensor([1, 3]),
    )
    expected = method.places(channels, torch.zeros(2, 1))
    with torch.device("meta"):  # stands for a device other than that of the tensors
        assert torch.equal(method.places(channels, torch.zeros(2, 1)), expected)


def test_a_warm_up_chooses_and_leaves_the_base_as_it_was():
    model, config = base("mamba"), graft.SdtConfig(**OPTIONS)
    before = copy.deepcopy(model.state_dict())
    warmed(model, config)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    change = model.backbone.layers[0].mixer._graft_sdt_change
    assert change.shape == (D, N) and change.any()
    channels, states = strongest(change, 3, 2)
    held = layers(graft.get_peft_model(model, config))
    entries = held["backbone.layers.0.mixer.A_log"].sdt_indices["default"]
    assert set(zip(*entries.tolist())) == {(int(c), int(s)) for c, of in zip(channels, states) for s in of}
    entries = held["backbone.layers.0.mixer.x_proj"].sdt_indices["default"]
    assert set(zip(*entries.tolist())) == {(row, int(c)) for row in range(R, R + 2 * N) for c in channels}
    assert sorted(held) == [f"backbone.layers.0.mixer.{name}" for name in ("A_log", "out_proj", "x_proj")]


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_one_is_the_identity_and_forward_is_merged(name, tmp_path):
    model = with_sdt(name)
    assert_close(model(IDS).logits, base(name)(IDS).logits)
    out = changed(model)(IDS).logits
    assert (out - base(name)(IDS).logits).abs().max() > 1e-4
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(base(name), tmp_path)
    assert_close(loaded(IDS).logits, out)
    merged = model.merge_and_unload()
    assert_close(merged(IDS).logits, out)
    was = base(name).state_dict()
    moved = {key for key, W in merged.state_dict().items() if not torch.equal(W, was[key])}
    assert moved == {
        k for k in was if k.endswith(("A_log", "x_proj.weight", "mixer.out_proj.weight", "mamba.out_proj.weight"))
    }


def test_what_a_state_space_takes_as_the_page_says():
    """Several at once, one for all rows, no LoRA."""
    model = with_sdt("mamba", init_weights=False)
    model.add_adapter("two", graft.SdtConfig(**OPTIONS, init_weights=False))
    model.base_model.set_adapter(["default", "two"])
    both, batch = changed(model)(IDS).logits, len(IDS)
    with pytest.raises(graft.RoutingError, match=r"mixer.A_log'.* Give all rows of a batch one adapter"):
        model(IDS, adapter_names=["default", *["two"] * (batch - 1)])
    assert not model.supports_lora_conversion()
    refuses(ConfigTypeError, r"do not support LoRA conversion: SDT", graft.convert_to_lora, model, rank=2)
    assert_close(model.merge_and_unload()(IDS).logits, both)


def test_only_the_chosen_entries_move():
    model = changed(with_sdt("mamba"))
    before, after = base("mamba").backbone.layers[0].mixer, model.merge_and_unload().backbone.layers[0].mixer
    of_A = (after.A_log - before.A_log) != 0
    of_x = (after.x_proj.weight - before.x_proj.weight) != 0
    assert of_A.sum() == 3 * 2 and of_A.any(1).sum() == 3
    assert of_x.sum() == 3 * 2 * N and not of_x[:R].any()
    assert torch.equal(of_A.any(1), of_x.any(0))


def test_bad_input(tmp_path):
    refuses(ConfigError, "`channels` must be above 0 and at most 1, got 2", graft.SdtConfig, channels=2)
    with pytest.raises(
        CalibrationError, match=r"which channels of layer 'backbone.layers.0.mixer.\w+'.*preprocess_sdt"
    ):
        graft.get_peft_model(base("mamba"), graft.SdtConfig(**OPTIONS))
    with pytest.raises(CalibrationError, match=r"left A_log of .*mixer\] unchanged"):
        graft.preprocess_sdt(base("mamba"), graft.SdtConfig(), lambda parameters: None)
    with pytest.raises(ConfigError, match=r"no A_log or x_proj"):
        graft.preprocess_sdt(base("mamba"), graft.SdtConfig(target_modules=["out_proj"], target_parameters=[]), print)
    with pytest.raises(NoMatchingPeftModuleError):
        graft.get_peft_model(base("mamba"), graft.SdtConfig(target_modules=["q_proj"], target_parameters=[]))
    model = with_sdt("mamba", init_weights=False)
    model.save_pretrained(tmp_path)
    state = graft.load_peft_weights(tmp_path)
    key = next(k for k in state if k.endswith("sdt_indices"))
    state[key] = state[key] + 1000
    refuses(CheckpointError, r"outside of its weight", graft.set_peft_model_state_dict, model, state)


def test_a_failed_injection_gives_the_changes_back(monkeypatch):
    model, config = base("mamba"), graft.SdtConfig(**OPTIONS)
    warmed(model, config)
    monkeypatch.setattr("graft.methods.sdt.nn.init.kaiming_uniform_", lambda *a, **k: 1 / 0)
    refuses(ZeroDivisionError, None, graft.get_peft_model, model, config)
    monkeypatch.undo()
    assert layers(graft.get_peft_model(model, config))
