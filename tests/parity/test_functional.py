# SPDX-License-Identifier: Apache-2.0
"""The functions beside PeftModel: injection into a bare model, and state dicts as plain dictionaries."""

import torch
from peft.tuners.tuners_utils import BaseTuner

import graft
from tests import models
from tests.pair import LIBS, adapt, both, close, close_dicts, output, randomize, shapes, trainable
from tests.samples import SAMPLES, each, first, over

# methods with tensors that all layers share need a tuner to hold them
INJECTABLE = [s for s in each("plain head", "mlp llama conv2d") if not graft.method_of(s.method).shares]


def inject(lib, sample, adapter="default", **options):
    base = models.make(sample.model)
    models.seed(1)
    model = lib.inject_adapter_in_model(sample.config(lib), base, adapter, **options)
    assert model is base and not isinstance(model, BaseTuner)
    return model


@over(INJECTABLE)
def test_inject(sample):
    ours, theirs = (inject(lib, sample) for lib in LIBS)
    assert shapes(ours) == shapes(theirs) and trainable(ours) == trainable(theirs)
    close_dicts(dict(ours.state_dict()), dict(theirs.state_dict()), 0)
    assert list(ours.peft_config) == list(theirs.peft_config) == ["default"]
    close(output(randomize(ours, sample).eval(), sample), output(randomize(theirs, sample).eval(), sample))


@over([s for s in INJECTABLE if s.name == "plain"])
def test_inject_twice(sample):
    found = []
    for lib in LIBS:
        model = inject(lib, sample)
        lib.inject_adapter_in_model(sample.config(lib), model, "b")
        found.append((shapes(model), list(model.peft_config), output(randomize(model, sample).eval(), sample)))
    assert found[0][:2] == found[1][:2]
    close(found[0][2], found[1][2])


@over(INJECTABLE)
def test_inject_on_meta_then_load(sample):
    values = randomize(inject(LIBS[1], sample), sample)
    state = LIBS[1].get_peft_model_state_dict(values)
    model = inject(LIBS[0], sample, low_cpu_mem_usage=True)
    LIBS[0].set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    close(output(model.eval(), sample), output(values.eval(), sample))


def test_inject_from_a_state_dict():
    """The tensors say where adapters go, not the configuration."""
    sample = first("LORA", "llama")
    state = LIBS[1].get_peft_model_state_dict(inject(LIBS[1], sample))
    state = {k: v for k, v in state.items() if "layers.1" in k or "q_proj" in k}
    ours, theirs = (inject(lib, sample, state_dict=state) for lib in LIBS)
    assert shapes(ours) == shapes(theirs)


@over(SAMPLES)
def test_state_dict(sample):
    ours, theirs = (lib.get_peft_model_state_dict(randomize(m, sample)) for lib, m in zip(LIBS, both(sample)))
    close_dicts(ours, theirs, 0)


@over(each("plain head bias_all tokens", "mlp llama"))
def test_set_state_dict(sample):
    """Values move between models under any adapter name; the result tells what was not used."""
    state = LIBS[1].get_peft_model_state_dict(randomize(adapt(LIBS[1], sample), sample))
    ours, theirs = both(sample, "other")
    reports = [
        lib.set_peft_model_state_dict(m, dict(state), adapter_name="other") for lib, m in zip(LIBS, (ours, theirs))
    ]
    close_dicts(dict(ours.state_dict()), dict(theirs.state_dict()), 0)
    assert list(reports[0].unexpected_keys) == list(reports[1].unexpected_keys) == []


@over(each(models="mlp") + each("head", "mlp") + each("tokens", "gpt2"))
def test_base_state_dict(sample):
    """The base under its own names, whatever is wrapped around it."""
    base = models.make(sample.model).state_dict()
    ours, theirs = both(sample)
    for lib, model in zip(LIBS, (ours, theirs)):
        close_dicts(dict(lib.get_base_model_state_dict(randomize(model, sample))), dict(base), 0)
        lib.set_base_model_state_dict(model, {k: v + 1 for k, v in base.items()})
    close_dicts(dict(ours.state_dict()), dict(theirs.state_dict()), 0)


def test_mismatched_sizes_can_be_ignored():
    sample, found = first("LORA"), []
    for lib, model in zip(LIBS, both(sample)):
        state = dict(lib.get_peft_model_state_dict(randomize(model, sample)))
        key = next(k for k in state if "lora_A" in k)
        state[key] = torch.zeros(2, 2)
        lib.set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)
        found.append(dict(model.state_dict()))
    close_dicts(*found, 0)


@over(each(models="mlp"))
def test_load_peft_weights(sample, tmp_path):
    adapt(LIBS[1], sample).save_pretrained(tmp_path)
    close_dicts(*(lib.load_peft_weights(str(tmp_path)) for lib in LIBS), 0)
