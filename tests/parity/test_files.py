# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are interchangeable with PEFT's, in both directions."""

import os

import pytest
import torch
from safetensors.torch import load_file

from tests import models
from tests.pair import LIBS, adapt, both, close, close_dicts, json_of, outcome, output, randomize
from tests.parity.test_config import plain
from tests.samples import SAMPLES, each, first, over

WEIGHTS = "adapter_model.safetensors"


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def load(lib, sample, folder, **options):
    base = models.make(sample.model)
    models.seed(2)  # some initialisations are drawn again before the file's values replace them
    return lib.PeftModel.from_pretrained(base, folder, **options)


@over(SAMPLES)
def test_saved_by_one_loaded_by_the_other(sample, tmp_path):
    ours, theirs = (randomize(m, sample).eval() for m in both(sample))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")

    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    close_dicts(load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS), 0)
    assert json_of(tmp_path / "ours") == json_of(tmp_path / "theirs")

    if "reload" in sample.unlike:
        return
    expected = load(LIBS[1], sample, tmp_path / "theirs")
    tensors = {k: v.clone() for k, v in expected.state_dict().items()}  # constrained OFT changes them in forward
    for lib, source in ((LIBS[0], "theirs"), (LIBS[1], "ours")):  # the same tensors and the same words, as seen above
        result = outcome(lambda lib=lib, source=source: load(lib, sample, tmp_path / source))
        assert result.error is None, (lib.__name__, source, result.error)
        copies = lib is LIBS[1] and sample.method == "RANDLORA"  # of what layers share, which graft does not write
        assert copies or not result.warned("missing adapter keys")
        assert not result.warned("Unexpected keyword arguments")
        assert type(result.value).__name__ == type(expected).__name__
        close_dicts(dict(result.value.state_dict()), tensors, 3e-6)  # KaSA takes a decomposition out of the base
        if "forward" not in sample.unlike:
            tolerance = 5e-5 if "kasa" in sample.name else 1e-5  # a decomposed base
            close(output(result.value, sample), output(expected, sample), tolerance)


@over(each("plain", "mlp llama") + each("head", "mlp") + each("tokens", "gpt2"))
@pytest.mark.parametrize("is_trainable", [False, True])
def test_loaded_model_state(sample, is_trainable, tmp_path):
    """Training mode, trainability and configuration after loading."""
    adapt(LIBS[1], sample).save_pretrained(tmp_path)
    ours, theirs = (
        lib.PeftModel.from_pretrained(models.make(sample.model).train(), tmp_path, is_trainable=is_trainable)
        for lib in LIBS
    )
    assert ours.training == theirs.training == is_trainable
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.named_parameters()
    }
    ours, theirs = (plain(m.peft_config["default"]) for m in (ours, theirs))
    assert {k: ours[k] for k in theirs} == theirs


@pytest.mark.parametrize("is_trainable", [0, 1, None])
def test_whatever_says_that_it_is_trainable(is_trainable, tmp_path):
    sample = first("LORA")
    adapt(LIBS[1], sample).save_pretrained(tmp_path)
    ours, theirs = (
        lib.PeftModel.from_pretrained(models.make(sample.model).train(), tmp_path, is_trainable=is_trainable)
        for lib in LIBS
    )
    for model in (ours, theirs):
        model.load_adapter(tmp_path, "default", is_trainable=is_trainable)
    assert ours.training == theirs.training
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.named_parameters()
    }


@over(each("plain", "mlp") + each("head", "mlp") + each("tokens", "gpt2"))
@pytest.mark.parametrize("is_trainable", [False, True])
def test_new_values_for_an_adapter_that_is_there(sample, is_trainable, tmp_path):
    """What trains goes on to: Trainer loads the best checkpoint so, with the default `is_trainable`."""
    randomize(adapt(LIBS[1], sample), sample).save_pretrained(tmp_path)
    for lib in LIBS:
        model = adapt(lib, sample).train()
        before = {n: p.requires_grad for n, p in model.named_parameters()}
        model.load_adapter(tmp_path, "default", is_trainable=is_trainable)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before
        assert model.training == is_trainable


@over(each(models="mlp"))
def test_several_adapters_in_sub_folders(sample, tmp_path):
    for lib, name in zip(LIBS, ("ours", "theirs")):
        model = adapt(lib, sample)
        model.add_adapter("other", sample.config(lib))
        randomize(model, sample).save_pretrained(tmp_path / name)
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    for part in ("", "other"):
        close_dicts(*(load_file(tmp_path / name / part / WEIGHTS) for name in ("ours", "theirs")), 0)
        assert json_of(tmp_path / "ours" / part) == json_of(tmp_path / "theirs" / part)

    outputs = []
    for lib, name in ((LIBS[1], "theirs"), (LIBS[0], "theirs"), (LIBS[1], "ours")):
        model = load(lib, sample, tmp_path / name)
        model.load_adapter(tmp_path / name / "other", "other")
        plain = output(model, sample)
        model.set_adapter("other")
        outputs.append(torch.stack([plain, output(model, sample)]))
    for other in outputs[1:]:
        close(other, outputs[0])


@over(each(models="mlp"))
def test_selected_adapters(sample, tmp_path):
    for lib, name in zip(LIBS, ("ours", "theirs")):
        model = adapt(lib, sample)
        model.add_adapter("other", sample.config(lib))
        model.save_pretrained(tmp_path / name, selected_adapters=["other"])
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


@over(each(models="mlp"))
def test_loaded_under_another_name(sample, tmp_path):
    randomize(adapt(LIBS[1], sample), sample).save_pretrained(tmp_path)
    ours, theirs = (load(lib, sample, tmp_path, adapter_name="renamed") for lib in LIBS)
    close_dicts(dict(ours.state_dict()), dict(theirs.state_dict()), 0)
    assert ours.active_adapters == theirs.active_adapters == ["renamed"]


@over(each(models="mlp"))
def test_bin_files(sample, tmp_path):
    for writer, reader in (LIBS, LIBS[::-1]):
        folder = tmp_path / writer.__name__
        model = randomize(adapt(writer, sample), sample)
        model.save_pretrained(folder, safe_serialization=False)
        assert "adapter_model.bin" in files(folder) and WEIGHTS not in files(folder)
        close_dicts(dict(load(reader, sample, folder).state_dict()), dict(model.state_dict()), 0)


@over(each())
def test_low_cpu_mem_usage(sample, tmp_path):
    model = randomize(adapt(LIBS[1], sample), sample).eval()
    model.save_pretrained(tmp_path)
    loaded = load(LIBS[0], sample, tmp_path, low_cpu_mem_usage=True)
    close_dicts(dict(loaded.state_dict()), dict(model.state_dict()), 0)
    assert not any(p.is_meta for p in [*loaded.parameters(), *loaded.buffers()])
    close(output(loaded, sample), output(model, sample))


@over(each(models="mlp"))
def test_unknown_config_keys_of_newer_versions(sample, tmp_path):
    """They are set aside with a notice."""
    adapt(LIBS[1], sample).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("{", '{"invented_in_2030": 3,', 1))
    for lib in LIBS:
        result = outcome(lambda lib=lib: load(lib, sample, tmp_path))
        assert result.error is None
        assert result.warned("invented_in_2030")


@pytest.mark.parametrize("lib", LIBS)
def test_save_of_chosen_tensors(lib, tmp_path):
    """`state_dict=` is written instead of the model's own values."""
    sample = first("LORA")
    model = adapt(lib, sample)
    doubled = {k: v * 2 + 1 for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=doubled)
    expected = {k: v * 2 + 1 for k, v in lib.get_peft_model_state_dict(model).items()}
    close_dicts(load_file(tmp_path / WEIGHTS), expected, 0)


@pytest.mark.parametrize("lib", LIBS)
def test_not_the_main_process(lib, tmp_path):
    adapt(lib, first("LORA")).save_pretrained(tmp_path / "x", is_main_process=False)
    assert not os.path.exists(tmp_path / "x" / WEIGHTS)


def test_base_model_name_in_the_files(tmp_path):
    sample = first("LORA", "llama")
    for lib, name in zip(LIBS, ("ours", "theirs")):
        base = models.make(sample.model)
        base.name_or_path = base.config.name_or_path = "someone/some-base"
        model = adapt(lib, sample, base=base, revision="v1")
        assert model.peft_config["default"].base_model_name_or_path == "someone/some-base"
        model.save_pretrained(tmp_path / name)
    assert json_of(tmp_path / "ours") == json_of(tmp_path / "theirs")
    assert json_of(tmp_path / "ours")["revision"] == "v1"
    for name in ("ours", "theirs"):
        assert "base_model: someone/some-base" in (tmp_path / name / "README.md").read_text()
