# SPDX-License-Identifier: Apache-2.0
"""VB-LoRA: the bank that all layers share and that trains, files of the largest logits, and what they hold."""

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graft
from tests import models
from tests.looks import layers_of
from tests.pair import LIBS, adapt, close, close_dicts, output, randomize
from tests.samples import Sample, first

PLAIN, TOPK = first("VBLORA"), first("VBLORA", "mlp", "topk_saved")
FILE = "adapter_model.safetensors"


def two(sample=PLAIN):
    model = adapt(graft, sample)
    model.add_adapter("b", sample.config(graft))
    return randomize(model, sample).eval()


def banks(model):
    return model.base_model.vblora_vector_bank


def test_every_layer_has_the_one_bank_of_its_adapter():
    model = two()
    layers = layers_of(model, "default")
    assert all(layer.vblora_vector_bank is banks(model) for layer in layers) and len(layers) > 1
    assert banks(model)["default"] is not banks(model)["b"]
    assert [n for n, _ in model.named_parameters() if "bank" in n] == [
        f"base_model.model.lin0.vblora_vector_bank.{name}" for name in ("default", "b")
    ]


def test_its_gradient_is_the_sum_of_those_through_each_layer():
    model, parts = two(), []
    bank, layers = banks(model)["default"], layers_of(model, "default")

    def gradient():
        bank.grad = None
        output(model, PLAIN).square().mean().backward()
        return bank.grad

    whole = gradient()
    for layer in layers:
        for other in layers:
            other.__dict__["vblora_vector_bank"] = {"default": bank if other is layer else bank.detach()}
        parts.append(gradient())
    close(sum(parts), whole)
    assert all(part.abs().sum() > 0 for part in parts) and banks(model)["b"].grad is None


def test_it_trains_with_its_adapter():
    model = two()
    for active in ("default", "b", "default"):
        model.set_adapter(active)
        assert {name: p.requires_grad for name, p in banks(model).items()} == {n: n == active for n in ("default", "b")}
    model.set_requires_grad("b")
    assert banks(model)["b"].requires_grad
    model.delete_adapter("default")
    assert list(banks(model)) == ["b"] and model.active_adapters == ["b"]


def test_training_moves_it():
    model = adapt(graft, PLAIN).train()
    before = banks(model)["default"].detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    output(model, PLAIN).square().mean().backward()
    optimizer.step()
    assert not torch.equal(banks(model)["default"], before)


# files


@pytest.mark.parametrize("vectors, dtype", [(255, torch.uint8), (256, torch.int16), (2**15, torch.int32)])
def test_indices_are_as_small_as_the_bank_allows(vectors, dtype, tmp_path):
    sample = Sample("VBLORA", "many", "mlp", {**TOPK.kwargs, "target_modules": ["lin0"], "num_vectors": vectors})
    for lib in LIBS:
        randomize(adapt(lib, sample), sample).save_pretrained(tmp_path / lib.__name__)
    ours, theirs = (load_file(tmp_path / lib.__name__ / FILE) for lib in LIBS)
    close_dicts(ours, theirs, 0)
    assert {t.dtype for k, t in ours.items() if k.endswith("indices")} == {dtype}


@pytest.mark.differs("VB-LoRA with `save_only_topk_weights` and `topk` > 2")
def test_a_rounded_sum_of_weights_may_exceed_one(tmp_path):
    """The last weight is what is left; PEFT takes the logarithm of a negative number."""
    sample = first("VBLORA", "llama", "topk_saved")
    adapt(graft, sample).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    for key, t in tensors.items():
        if key.endswith("topk_weights"):
            t[...] = torch.tensor([0.75, 0.25 + 1e-7])
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = graft.PeftModel.from_pretrained(models.make("llama"), tmp_path)
    assert output(loaded, sample).isfinite().all()


def test_missing_logits_leave_the_bank_as_it_was_loaded(tmp_path):
    source = randomize(adapt(graft, PLAIN), PLAIN)
    source.save_pretrained(tmp_path)
    tensors = {k: t for k, t in load_file(tmp_path / FILE).items() if "lin0" not in k}
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="lin0.vblora_logits_A"):
        loaded = graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path, strict=False)
    assert torch.equal(banks(loaded)["default"], banks(source)["default"])
    assert output(loaded, PLAIN).isfinite().all()


@pytest.mark.differs("VB-LoRA: training after loading a file of the largest logits alone")
@pytest.mark.differs("VB-LoRA with truncated logits that trains on a GPU")
def test_the_largest_logits_serve_but_do_not_train(tmp_path):
    source = randomize(adapt(graft, TOPK), TOPK).eval()
    source.save_pretrained(tmp_path)
    model = graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path)
    model.add_adapter("whole", TOPK.config(graft))
    close(output(model, TOPK), output(source, TOPK))
    model.merge_adapter()
    close(output(model, TOPK), output(source, TOPK))
    model.unmerge_adapter()
    model.train()
    for names in (None, ["default", "whole", "whole"]):
        with pytest.raises(RuntimeError, match=r"Found infinity values in VB-LoRA logits.*adapter 'default'"):
            output(model, TOPK, **({"adapter_names": names} if names else {}))
    with model.disable_adapter():
        output(model, TOPK)
    model.set_adapter("whole")
    output(model, TOPK)


def test_nor_do_those_of_a_stack(tmp_path):
    stack = nn.Module()
    stack.stack = nn.Parameter(torch.ones(3, 4, 8))
    stack.forward = lambda x: torch.einsum("bi,eoi->beo", x, stack.stack)
    options = dict(num_vectors=6, vector_length=4, save_only_topk_weights=True)
    cfg = graft.VBLoRAConfig(target_modules=[], target_parameters=["0.stack"], **options)
    graft.get_peft_model(nn.Sequential(stack), cfg).save_pretrained(tmp_path)
    model = graft.PeftModel.from_pretrained(nn.Sequential(stack), tmp_path).eval()
    model(torch.ones(2, 8))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"Found infinity values in VB-LoRA logits.*adapter 'default'"):
            model.train()(torch.ones(2, 8))


# counting


@pytest.mark.parametrize(
    "changes",
    [{}, dict(bias="vblora_only", modules_to_save=["head"]), dict(topk=3), dict(num_vectors=300)],
    ids=["plain", "beside", "topk", "many"],
)
@pytest.mark.parametrize("sample", [PLAIN, TOPK], ids=str)
def test_savable_parameters(sample, changes, capsys):
    found = []
    for lib in LIBS:
        model = lib.get_peft_model(models.make("mlp"), sample.config(lib, **changes))
        model.print_savable_parameters()
        found.append((model.base_model.get_nb_savable_parameters(), capsys.readouterr().out))
    assert found[0] == found[1]


@pytest.mark.differs("VB-LoRA's `get_nb_savable_parameters(adapter)`")
def test_savable_parameters_of_one_of_two(tmp_path):
    """PEFT counts the logits of both."""
    model = two()
    model.add_adapter("small", PLAIN.config(graft, target_modules=["lin0"]))
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("small", tmp_path / "small")):
        assert model.get_nb_savable_parameters(name)[0] == sum(t.numel() for t in load_file(folder / FILE).values())
    with pytest.raises(graft.AdapterNotFoundError, match="nope"):
        model.get_nb_savable_parameters("nope")
