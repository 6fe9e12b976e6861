# SPDX-License-Identifier: Apache-2.0
"""Models of which accelerate has parts on two devices, or the embedding on the host: as on the CPU."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

import graft
from graft.inject.parts import get_registry
from graft.kernels.waits import copy_on_device
from graft.model import averaging
from tests import models
from tests.device.dispatch import (
    FIRST,
    METHODS,
    SECOND,
    check_llama,
    check_sample,
    dispatched,
    equal,
    file_of,
    inputs,
    llama,
    logits,
    moved_away,
    parts,
    places,
)
from tests.models import adapted, seeded

pytestmark = pytest.mark.filterwarnings("ignore:(aLoRA is currently only supported|.* trains without its)")


def split(model):
    """Each part on a device."""
    return dispatched(model, {"one": FIRST, "two": SECOND})


def halves(model):
    return dispatched(model, places())


def crossed(model):
    """Embedding and head on another device than what is next to them: only their own hooks move their inputs."""
    return dispatched(model, places(embedding=SECOND, head=FIRST))


def on_host(model):
    """The embedding on the CPU, its input and output on the device."""
    model.to(FIRST)
    add_hook_to_module(model.get_input_embeddings(), AlignDevicesHook("cpu", io_same_device=True))
    return model


def apart(model):
    """Tied weights on two devices: one of each, with the same values."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model = halves(model)
    model.config.tie_word_embeddings = True
    return model


ENDS = ["q_proj", "embed_tokens", "lm_head"]
CONFIGS = {
    "LORA": lambda: graft.LoraConfig(r=3, target_modules=ENDS),
    "VERA": lambda: graft.VeraConfig(r=3, target_modules=ENDS),
    "HIRA": lambda: graft.HiraConfig(r=3, target_modules=ENDS),
    "OFT": lambda: graft.OFTConfig(oft_block_size=4, target_modules=["q_proj", "lm_head"]),
    "HRA": lambda: graft.HRAConfig(r=2, target_modules=ENDS),
    "heads": lambda: graft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    "token rows": lambda: graft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[1, 4, 7]),
    "TRAINABLE_TOKENS": lambda: graft.TrainableTokensConfig(token_indices=[1, 4, 7]),
    "ADAPTION_PROMPT": lambda: graft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"),
    "SHADOW": lambda: graft.ShadowConfig(shadow_dropout=0.0, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": lambda: graft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "P_TUNING": lambda: graft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
}
MERGE = ("LORA", "VERA", "HIRA", "HRA", "token rows", "TRAINABLE_TOKENS")
saves_embeddings = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")


@pytest.mark.parametrize("sample", METHODS, ids=str)
def test_a_model_over_two_devices(sample, tmp_path):
    check_sample(sample, split, tmp_path)


@saves_embeddings
@pytest.mark.parametrize("spread", [crossed, on_host])
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_whose_hooks_move_their_inputs(name, spread, tmp_path):
    check_llama(CONFIGS[name], spread, tmp_path, merges=name in MERGE)


@pytest.mark.parametrize("name", ["token rows", "TRAINABLE_TOKENS"])
def test_rows_of_a_tied_embedding_train_where_the_embedding_is(name, tmp_path):
    """The head is on the other device, and its gradients reach the one parameter."""
    check_llama(CONFIGS[name], apart, tmp_path, tied=True)


def test_a_shadow_network_gives_its_loss_on_the_models_device(tmp_path):
    def loss(model):
        return logits(model, labels=models.inputs("llama")["input_ids"])

    values = []
    for spread in (lambda model: model, halves, crossed):
        model = moved_away(adapted(spread(llama()), CONFIGS["SHADOW"](), scale=0))
        device = "cpu" if spread not in (halves, crossed) else FIRST
        batch = {k: v.to(device) for k, v in models.inputs("llama").items()}
        out = model(**batch, labels=batch["input_ids"])
        out.loss.backward()
        values.append((out.loss.detach(), out.shadow_loss))
    for here in values[1:]:
        for a, b in zip(here, values[0]):
            equal(a, b)


@pytest.mark.parametrize("more", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_adapters_cannot_share_memory_of_two_devices(more):
    base = apart(llama(tied=True))
    config = graft.LoraConfig(**{"r": 3, "target_modules": ["q_proj"], "ensure_weight_tying": True, **more})
    with pytest.raises(graft.ConfigError, match="put both on one device"):
        graft.get_peft_model(base, config)
    assert not any("lora" in name or "modules_to_save" in name for name in base.state_dict())


def vera(spread):
    with seeded(1):
        return moved_away(graft.get_peft_model(spread(parts()), graft.VeraConfig(r=3, target_modules=["layer"])))


def test_a_file_holds_one_of_what_devices_share(tmp_path):
    here, there = vera(lambda model: model), vera(split)
    there(inputs())
    assert there.state_dict().keys() == here.state_dict().keys()
    equal(file_of(there, tmp_path / "there"), file_of(here, tmp_path / "here"))
    assert sum(p.numel() for p in there.buffers()) == sum(p.numel() for p in here.buffers())


@torch.no_grad()
def test_what_devices_share_follows_writes_and_loads():
    here, there, x = vera(lambda model: model), vera(split), inputs()
    equal(there(x), here(x))
    for model in (here, there):
        for shared in (model.base_model.vera_A, model.base_model.vera_B):
            shared["default"].mul_(1.7)
    equal(there(x), here(x))
    with seeded(5):
        config = graft.VeraConfig(r=3, target_modules=["layer"])
        other = moved_away(graft.get_peft_model(parts(), config))
        for shared in (other.base_model.vera_A, other.base_model.vera_B):
            shared["default"].normal_()
    for model in (here, there):
        graft.set_peft_model_state_dict(model, graft.get_peft_model_state_dict(other))
    equal(there(x), here(x))
    moved = copy.deepcopy(there)
    equal(moved(x), here(x))


def test_copies_are_kept_as_long_as_they_hold():
    t = torch.randn(3, device=FIRST)
    with torch.inference_mode():
        copied = copy_on_device(t, SECOND)
    assert copy_on_device(t, SECOND) is copied and copy_on_device(t, FIRST) is t and not copied.is_inference()
    t.add_(1)
    equal(copy_on_device(t, SECOND).cpu(), t.cpu())
    p = nn.Parameter(torch.ones(3, device=FIRST))
    copy_on_device(p, SECOND).sum().backward()
    assert p.grad.device == FIRST
    with torch.no_grad():
        p.data.add_(1)
        assert copy_on_device(p, SECOND).eq(2).all()


def test_what_an_adapter_begins_with_is_noted_of_both_devices(monkeypatch):
    """Several processes, each with a model over two devices."""
    notes = []
    monkeypatch.setattr(averaging, "processes", lambda: 2)
    monkeypatch.setattr(averaging, "RankNote", lambda _topic, text: notes.append(text))
    for spread in (lambda model: model, split):
        config = graft.LoraConfig(r=3, target_modules=["layer"])
        with seeded(1):
            averaging.note_start(get_registry(graft.get_peft_model(spread(parts()), config)), "default")
    assert notes[0] == notes[1] != "[]"


@torch.no_grad()
def test_rows_of_several_adapters():
    outputs = []
    for spread in (lambda model: model, halves, crossed):
        model = adapted(spread(llama()), graft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"]), scale=0)
        with seeded(2):
            model.add_adapter("b", graft.LoraConfig(r=2, target_modules=["v_proj", "lm_head"]))
        for name in ("default", "b"):
            model.set_adapter(name)
            moved_away(model)
        outputs.append(logits(model, adapter_names=["b", "__base__", "default"]))
    for here in outputs[1:]:
        equal(here, outputs[0])


def test_reft_counts_prompts_by_labels_that_are_on_another_device():
    config = graft.ReftConfig(r=2, prefix_positions=1, suffix_positions=2, dropout=0.0, task_type="CAUSAL_LM")
    labels = models.inputs("llama")["input_ids"].clone()
    labels[:, :2] = -100
    outputs = []
    for spread, device in ((lambda model: model, "cpu"), (halves, FIRST)):
        model = moved_away(adapted(spread(llama()), config, scale=0))
        outputs.append(logits(model, labels=labels.to(device)))
        assert not torch.equal(logits(model), outputs[-1])  # without labels all is prompt
    equal(outputs[1], outputs[0])
