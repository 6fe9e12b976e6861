# SPDX-License-Identifier: Apache-2.0
"""Initialisations that change the base weight: saved and loaded on the original base, the outputs are the same."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import graft
from graft.train.calibration import CordaEigens
from tests import models
from tests.conformance.stores import Rounded, held
from tests.looks import layers
from tests.raised import refuses

TARGETS = ["lin0", "fc1"]
X = models.inputs("mlp")
HOW = {
    "pissa": {},
    "pissa_niter_2": {},
    "olora": {},
    "corda": dict(corda_config=graft.CordaConfig()),
    "lora_ga": dict(lora_ga_config=graft.LoraGAConfig(scale="weight_svd")),
    "loftq": dict(loftq_config=dict(loftq_iter=3)),
}


def base(dtype=torch.float32, kind=None):
    model = models.make("mlp").to(dtype)
    if kind is not None:
        model.lin0, model.layers[1].fc1 = held(model.lin0, kind), held(model.layers[1].fc1, kind)
    return model


def config(how, **options):
    return graft.LoraConfig(
        **dict(r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights=how) | HOW[how] | options
    )


def prepared(model, cfg):
    """The model, after what the initialisation needs of data."""
    x = {k: v.to(model.head.weight.dtype) for k, v in X.items()}
    if cfg.init_lora_weights == "corda":
        graft.preprocess_corda(model, cfg, lambda: model(**x))
    if cfg.init_lora_weights == "lora_ga":
        graft.preprocess_loraga(model, cfg, lambda: model(**x).square().sum().backward())
    return model


def started(how, dtype=torch.float32, kind=None, **options):
    """A model whose start is drawn as the caller's seed says."""
    cfg = config(how)
    return nudged(graft.get_peft_model(prepared(base(dtype, kind), cfg), cfg, **options).eval())


def nudged(model, seed=3):
    models.seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def output(model):
    with torch.no_grad():
        return model(X["x"].to(model.get_base_model().head.weight.dtype))


def quiet(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error", graft.PeftWarning)
        return call()


@pytest.mark.differs("files of PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", HOW)
def test_saved_and_loaded_on_the_original_base_it_is_the_same(how, dtype, tmp_path):
    model = started(how, dtype)
    weight = layers(model)["lin0"].base_layer.weight
    assert not torch.equal(weight, base(dtype).lin0.weight)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)  # whatever the generator's state
    for options in ({}, dict(low_cpu_mem_usage=True)):
        loaded = quiet(lambda o=options: graft.PeftModel.from_pretrained(base(dtype), tmp_path, **o))
        assert torch.equal(layers(loaded)["lin0"].base_layer.weight, weight)
        assert torch.equal(output(loaded), output(model))
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, again))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.differs("LoRA-GA on a quantized base")
@pytest.mark.parametrize("how", ["pissa", "pissa_niter_2", "olora", "corda"])
def test_over_a_quantized_base_as_well(how, tmp_path):
    model = started(how, kind=Rounded)
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(base(kind=Rounded), tmp_path)
    assert torch.equal(output(loaded), output(model))


@pytest.mark.differs("a file of PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ on a base that has been changed already")
@pytest.mark.parametrize("how", HOW)
def test_a_base_that_has_been_changed_already_is_left_alone(how, tmp_path):
    models.seed(1)
    model = started(how)
    model.save_pretrained(tmp_path)
    models.seed(1)  # a random start is the same again
    changed = started(how).unload()  # stays as the initialisation made it
    with pytest.warns(graft.PeftWarning, match="changed already as the .* initialisation of adapter 'default' does it"):
        loaded = graft.PeftModel.from_pretrained(changed, tmp_path)
    assert torch.equal(output(loaded), output(model))
    with pytest.warns(graft.PeftWarning, match="adapter 'other' does it"):  # two of one start share the base
        loaded.load_adapter(tmp_path, "other")
    loaded.set_adapter("other")
    assert torch.equal(output(loaded), output(model))


@pytest.mark.parametrize("how", HOW)
def test_in_half_precision_it_is_the_same_base(how, tmp_path):
    """As it was, or as the initialisation made it: rounded to 8 bits, its values are known."""
    models.seed(1)
    model = started(how)
    model.save_pretrained(tmp_path)
    quiet(lambda: graft.PeftModel.from_pretrained(base(torch.bfloat16), tmp_path))
    models.seed(1)
    changed = started(how).unload().bfloat16()
    kept = changed.lin0.weight.clone()
    with pytest.warns(graft.PeftWarning, match="changed already as the .* initialisation of adapter 'default' does it"):
        loaded = graft.PeftModel.from_pretrained(changed, tmp_path)
    assert torch.equal(layers(loaded)["lin0"].base_layer.weight, kept)


def test_another_base_is_said(tmp_path):
    started("pissa").save_pretrained(tmp_path)
    other = base()
    with torch.no_grad():
        other.lin0.weight.add_(torch.randn_like(other.lin0.weight))
    with pytest.warns(graft.PeftWarning, match="changed a base model with other weights"):
        graft.PeftModel.from_pretrained(other, tmp_path)


def test_values_of_another_start_replace_it(tmp_path):
    """As when Trainer resumes in a new process, where a random start is another one."""
    models.seed(1)
    model = started("pissa_niter_2")
    model.save_pretrained(tmp_path)
    models.seed(2)
    resumed = graft.get_peft_model(base(), config("pissa_niter_2")).eval()
    assert (layers(resumed)["lin0"].base_layer.weight - layers(model)["lin0"].base_layer.weight).abs().max() > 1e-3
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    assert_close(output(resumed), output(model), atol=1e-5, rtol=1e-5)
    before = layers(model)["lin0"].base_layer.weight.clone()
    model.load_adapter(tmp_path, "default", is_trainable=True)  # its own: nothing moves
    assert torch.equal(layers(model)["lin0"].base_layer.weight, before)
    assert layers(resumed)["lin0"].state.takebacks is None


def test_loftq_of_another_weight_cannot_be_undone(tmp_path):
    started("loftq").save_pretrained(tmp_path)
    other = base()
    with torch.no_grad():
        other.lin0.weight.mul_(1.1)
    model = graft.get_peft_model(other, config("loftq"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(graft.ConfigError, match="layer 'lin0' LoftQ has quantized another weight"):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_peft_reads_our_files_and_we_read_its(how, tmp_path):
    model = started(how)
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    assert_close(theirs(**X), output(model), atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert not any("lora_shift" in k for k in load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    loaded = quiet(lambda: graft.PeftModel.from_pretrained(base(), tmp_path / "theirs"))
    assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "back")  # now with the shift
    assert torch.equal(output(graft.PeftModel.from_pretrained(base(), tmp_path / "back")), output(loaded))


@pytest.mark.differs("LoRA-GA files that PEFT wrote")
@pytest.mark.parametrize("how", ["corda", "lora_ga"])
def test_a_file_of_peft_without_what_data_took_out(how, tmp_path):
    model = started(how)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "lora_shift" not in k}, path)
    if how == "lora_ga":
        expected = output(model)
        with pytest.warns(graft.PeftWarning, match="does not hold LoRA-GA's change"):
            loaded = graft.PeftModel.from_pretrained(model.unload(), tmp_path)  # the base as it was left
        assert torch.equal(output(loaded), expected)
        return
    fresh = base()
    refuses(graft.CalibrationError, "run `preprocess_corda` first", graft.PeftModel.from_pretrained, fresh, tmp_path)
    assert type(fresh.lin0) is nn.Linear
    loaded = graft.PeftModel.from_pretrained(prepared(fresh, config("corda")), tmp_path)
    assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("tensor", ["A", "B", "sample"])
def test_a_file_with_a_part_of_what_was_taken_out_is_refused(tensor, over, tmp_path):
    model = started("pissa")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != f"base_model.model.lin0.lora_shift.{tensor}"}, path)
    expected = output(model)
    with pytest.raises(graft.AdapterKeyError, match=rf"lin0.lora_shift.\w+.{tensor}\b"):
        model.load_adapter(tmp_path, "default" if over else "other")
    assert torch.equal(output(model), expected)


def test_without_the_init_in_the_config_a_file_is_for_the_base_as_it_is(tmp_path):
    """PEFT's way of sharing a changed base with its adapter."""
    model = started("pissa")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path)
    assert not any("lora_shift" in k for k in load_file(tmp_path / "adapter_model.safetensors"))
    expected = output(model)
    loaded = graft.PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(output(loaded), expected)


@pytest.mark.differs("converting on save from an adapter that was not the start")
def test_a_conversion_from_another_start_is_refused(tmp_path):
    models.seed(1)
    other = graft.get_peft_model(base(), config("pissa_niter_2"))
    other.peft_config["default"].init_lora_weights = True
    other.save_pretrained(tmp_path / "start")
    models.seed(2)
    model = started("pissa_niter_2")
    with pytest.raises(graft.ConfigError, match=r"not the start of this one, by A of 'base_model.model.lin0'"):
        model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert not (tmp_path / "end").exists()


@pytest.mark.parametrize("change", [dict(target_modules=["lin0"]), dict(r=5)], ids=["a layer less", "another rank"])
def test_a_conversion_from_a_start_of_other_layers_is_refused(change, tmp_path):
    plain = dict(r=3, target_modules=TARGETS)
    graft.get_peft_model(base(), graft.LoraConfig(**plain | change)).save_pretrained(tmp_path / "start")
    model = graft.get_peft_model(base(), graft.LoraConfig(**plain))
    with pytest.raises(graft.ConfigError, match=r"it lacks \['?base_model.model.*, or has another shape there"):
        model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert not (tmp_path / "end").exists()


@pytest.mark.parametrize("how", ["corda", "lora_ga"])
def test_conversion_to_plain_lora(how, tmp_path):
    cfg = config(how)
    model = graft.get_peft_model(prepared(base(), cfg), cfg).eval()
    cfg.init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    cfg.init_lora_weights = how
    nudged(model).save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert json.loads((tmp_path / "end" / "adapter_config.json").read_text())["init_lora_weights"] is True
    for lib in (graft, peft):
        assert_close(lib.PeftModel.from_pretrained(base(), tmp_path / "end")(**X), output(model), atol=2e-5, rtol=1e-4)


# where it has no meaning


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.lin, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.conv = nn.Conv1d(6, 6, 1)
        self.head.weight = self.emb.weight


@pytest.mark.differs(
    "`init_lora_weights` of linear layers (PiSSA, EVA, …) on an embedding; LoRA-GA on a convolution; unknown "
    "strings on an embedding"
)
@pytest.mark.parametrize("how", HOW)
def test_where_it_has_no_meaning_nothing_changes(how):
    cases = (("emb", r"no meaning for 'emb' \(Embedding\)"), ("conv", r"no meaning for 'conv' \(Conv1d\)"))
    cases += (("head", "'head', which another module uses as well"),)
    for name, text in cases:
        with models.seeded(0):
            model = Tied()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        if how in ("corda", "lora_ga"):  # which would say that there are no data for 'lin'
            model.lin.eigens = CordaEigens(torch.ones(2), torch.ones(6, 2), torch.ones(6, 2))
            model.lin._peft_loraga_grad = torch.randn(6, 6)
        refuses(graft.ConfigError, text, graft.get_peft_model, model, config(how, r=2, target_modules=["lin", name]))
        assert {k: True for k in before} == {k: torch.equal(v, before[k]) for k, v in model.state_dict().items()}
        assert type(model.lin) is nn.Linear
        assert how != "corda" or hasattr(model.lin, "eigens")


@pytest.mark.differs('"gaussian" and "orthogonal" on an embedding')
def test_other_strings_work_or_raise():
    def make(how, *names):
        with models.seeded(0):
            model = Tied()
        return graft.get_peft_model(model, graft.LoraConfig(r=2, target_modules=list(names), init_lora_weights=how))

    gaussian = layers(make("gaussian", "emb"))["emb"]
    assert gaussian.lora_embedding_A["default"].std() > 0 and not gaussian.lora_embedding_B["default"].any()
    orthogonal = layers(make("orthogonal", "emb"))["emb"]
    assert orthogonal.lora_embedding_A["default"].any() and orthogonal.lora_embedding_B["default"].any()
    assert orthogonal.get_delta_weight("default").abs().max() < 1e-6
    for how, name in (
        ("eva", "emb"),
        ("eva", "conv"),
        ("orthogonal", "conv"),
        ("nonsense", "emb"),
        ("nonsense", "lin"),
    ):
        with pytest.raises(
            graft.ConfigError, match=f"Unknown initialization init_lora_weights='{how}' for layer '{name}'"
        ):
            make(how, "lin", name) if name != "lin" else make(how, name)


@pytest.mark.differs("a rank above the dimensions, of PiSSA and its like")
@pytest.mark.parametrize("how", HOW)
def test_a_rank_above_the_dimensions(how):
    model = base()
    if how == "lora_ga":
        cfg = config(how, r=6)
        prepared(model, cfg)
    else:
        cfg = config(how, r=11)
    if how == "corda":
        refuses(graft.ConfigError, "rank of layer 'lin0' is 11, and its weight has 10", prepared, model, cfg)
    with pytest.raises(graft.ConfigError, match=f"'lin0' can have, at most {5 if how == 'lora_ga' else 10}"):
        graft.get_peft_model(model, cfg)
    assert type(model.lin0) is nn.Linear


@pytest.mark.parametrize("how", ["pissa_niter_2", "corda", "lora_ga"])
def test_kasa_takes_none_that_loading_cannot_repeat(how):
    refuses(graft.ConfigError, f"kasa_config does not work with init_lora_weights='{how}'", config, how, kasa_config={})


def test_beside_others_it_warns():
    model = graft.get_peft_model(base(), graft.LoraConfig(target_modules=TARGETS))
    with pytest.warns(UserWarning, match="PiSSA changes the base weights of the model and should thus not be used"):
        model.add_adapter("b", config("pissa"))
