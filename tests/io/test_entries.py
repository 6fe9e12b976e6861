# SPDX-License-Identifier: Apache-2.0
"""Any adapter name saves and reloads every tensor. PEFT searches keys for names and loses weights here."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import graft
from graft.io import save
from graft.io.entries import rename_keys
from tests import models
from tests.covering import EVERYTHING
from tests.pair import adapt, close, close_dicts, output, randomize
from tests.samples import Sample, each, first, over

pytestmark = pytest.mark.graft_only

# parts of module paths, of parameter names, of file names; and anything else without a dot or a slash
TRAPS = [
    "0", "1", "mlp", "self_attn", "layers", "layer", "model", "base_model", "base_layer", "lora_A", "lora_B", "weight",
    "bias", "default", "modules_to_save", "original_module", "lora", "vera_A", "q_proj", "fc1", "lin0", "norm", "head",
    "token_adapter", "a b", "ünï", "A" * 40, "-", "adapter_model",
]  # fmt: skip
plain = st.text(
    st.characters(codec="utf-8", exclude_characters="./\\\0", exclude_categories=["C", "Z"]), min_size=1, max_size=12
).filter(lambda name: not hasattr(nn.ParameterDict(), name))  # these are refused
names = st.lists(st.sampled_from(TRAPS) | plain, min_size=2, max_size=3, unique_by=str.casefold)
SAMPLES = [
    first("LORA", "llama"), first("LORA", "mlp", "head"), first("LORA", "gpt2", "tokens"), first("VERA"), first("IA3"),
    first("OFT"), first("LOHA", "conv2d"), first("HRA"), first("LN_TUNING", "llama"), first("LORA", "embedding"),
    Sample("LN_TUNING", "container", "mlp", {"target_modules": ["layers.1", "lin0"]}),
]  # fmt: skip


@pytest.mark.differs('an adapter called "0" or "mlp"')
@given(st.sampled_from(SAMPLES), names)
@example(SAMPLES[0], ["0", "mlp", "weight"])
@example(SAMPLES[0], ["lora_A", "self_attn"])
@example(SAMPLES[1], ["default", "head"])
@example(SAMPLES[8], ["ln_tuning_layers", "1"])
@settings(
    max_examples=40 if EVERYTHING else 10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
def test_any_names(sample, adapters):
    model = adapt(graft, sample, adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, sample.config(graft))
    randomize(model, sample).eval()
    outputs = {}
    for name in adapters:
        model.set_adapter(name)
        outputs[name] = output(model, sample)
    alone = set(graft.get_peft_model_state_dict(adapt(graft, sample)))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name in adapters:
            place = Path(folder) / (name if name != "default" else "")
            saved = set(load_file(place / "adapter_model.safetensors"))
            # PEFT's keys of copied containers hold the adapter's name, so only their number is the same
            assert saved == alone if sample.name != "container" else len(saved) == len(alone)
            loaded = graft.PeftModel.from_pretrained(models.make(sample.model), place, adapter_name=name[::-1])
            close(output(loaded, sample), outputs[name])


@over(each("plain head", "mlp llama conv2d"))
def test_file_keys_do_not_depend_on_the_name(sample):
    one, other = (
        graft.get_peft_model_state_dict(adapt(graft, sample, name), adapter_name=name) for name in ("default", "weight")
    )
    close_dicts(one, other, 0)


@over(each("plain head", "mlp llama"))
def test_every_tensor_of_an_adapter_is_saved(sample):
    """What is trainable is in the file, once."""
    model = randomize(adapt(graft, sample), sample)
    saved = list(graft.get_peft_model_state_dict(model).values())
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert sum(t.data_ptr() == p.data_ptr() for t in saved) == 1, name


class Around(nn.Module):
    """Its own modules are called as the inner ones of layers and heads."""

    def __init__(self):
        super().__init__()
        self.base_layer, self.original_module, self.q = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.base_layer(x) + self.original_module(x) + self.q(x)


@pytest.mark.parametrize("targets", [["q"], ["base_layer"], ["q", "base_layer", "original_module"]])
def test_a_base_whose_own_modules_are_called_as_those_of_layers(targets, tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.ModuleDict({"block": Around()})

    before = base().state_dict()
    model = graft.get_peft_model(base(), graft.LoraConfig(r=2, target_modules=targets))
    found = graft.get_base_model_state_dict(model)
    assert found.keys() == before.keys() and all(torch.equal(found[name], t) for name, t in before.items())
    graft.set_base_model_state_dict(model, {name: t + 1 for name, t in before.items()})
    found = graft.get_base_model_state_dict(model)
    assert all(torch.equal(found[name], t + 1) for name, t in before.items())
    model.save_pretrained(tmp_path, fingerprint="full")
    with pytest.warns(graft.PeftWarning, match=f"{len(before)} of {len(before)} tensors differ"):
        graft.PeftModel.from_pretrained(base(), tmp_path)


class Named(nn.Module):
    """It has a module called as wrappers call what is in them."""

    def __init__(self, inner=True):
        super().__init__()
        self.q = nn.Linear(4, 4)
        if inner:
            self.module = Named(False)

    def forward(self, x):
        return self.module(self.q(x))


@pytest.mark.parametrize("around", ["", "module.", "_orig_mod.module."])
def test_a_state_dict_of_a_base_with_a_module_called_module(around):
    config = graft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False, bias="all")
    model = graft.get_peft_model(nn.ModuleDict({"block": Named()}), config)
    state = {f"{around}{key}": t + 1 for key, t in model.state_dict().items()}
    found, plain = graft.get_peft_model_state_dict(model, state_dict=state), graft.get_peft_model_state_dict(model)
    assert found.keys() == plain.keys() and len(found) == 6
    assert all(torch.equal(found[key], t + 1) for key, t in plain.items())


@pytest.mark.parametrize("wrapped", ["before", "after"])
@pytest.mark.parametrize("place", ["0", "0.0"])
def test_a_wrapper_that_is_in_no_name_of_a_state_dict(wrapped, place):
    """Activation checkpointing's, as of FSDP."""

    def wrap(model):
        parent, _, name = place.rpartition(".")
        setattr(model.get_submodule(parent), name, checkpoint_wrapper(model.get_submodule(place)))

    base = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    before = {name: t.clone() for name, t in base.state_dict().items()}
    if wrapped == "before":
        wrap(base)
    model = graft.get_peft_model(base, graft.LoraConfig(r=2, target_modules=["0.0", "1"]))
    if wrapped == "after":
        wrap(base)
    assert graft.get_base_model_state_dict(model).keys() == before.keys()
    graft.set_base_model_state_dict(model, {name: t + 1 for name, t in before.items()})
    found = graft.get_base_model_state_dict(model)
    assert all(torch.equal(found[name], t + 1) for name, t in before.items())


def test_a_key_mapping_that_fits_is_silent():
    keys = dict.fromkeys(["base_model.model.a.x", "b.y", "c"], 0)
    assert list(rename_keys(keys, {r"^a\.": "z.", r"^b": "w", r"\.": "!"}, True)) == [
        "base_model.model.z.x",
        "w.y",
        "c",
    ]


def test_a_sharded_prompt_is_saved_from_its_gathered_tensors(monkeypatch):
    model = graft.get_peft_model(
        models.make("llama"), graft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    before = graft.get_peft_model_state_dict(model)
    monkeypatch.setattr(save, "gather_tensors", lambda tensors: {k: torch.full_like(t, 3) for k, t in tensors.items()})
    after = graft.get_peft_model_state_dict(model)
    assert after.keys() == before.keys() == {"prompt_embeddings"}
    assert (after["prompt_embeddings"] == 3).all() and not (before["prompt_embeddings"] == 3).any()
