# SPDX-License-Identifier: Apache-2.0
"""Smaller ranks: PEFT loads them, and what is lost is what torch.linalg says must be."""

import itertools
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import graft
from graft.core.errors import LossError
from graft.files import algebra
from graft.files.errors import OptionError
from graft.files.formats import peft as form
from graft.files.formats import read
from graft.files.inspect import compare_adapters, inspect_adapter
from graft.files.lint import lint_adapter
from graft.files.neutral import AdapterFile, LowRank
from graft.files.resize import collect_loras, resize_adapter
from graft.files.tensors import make_tensor
from tests import models
from tests.pair import LIBS, adapt, close, output, randomize
from tests.samples import SAMPLES, first, over

pytestmark = pytest.mark.filterwarnings("ignore")
ANY = [
    s for s in SAMPLES
    if s.method == "LORA" and not any(o in s.name for o in ("kasa", "bdlora", "qalora", "grouped"))
    and not {"forward", "reload"} & s.unlike
]  # fmt: skip


def saved(sample, folder, lib=peft):
    model = randomize(adapt(lib, sample), sample).eval()
    model.save_pretrained(folder)
    return model


def adapter_of(*spectra, out=9, fan_in=7, seed=0):
    """An adapter whose modules have these singular values."""
    rng = np.random.default_rng(seed)
    modules = {}
    for i, s in enumerate(spectra):
        U, V = (np.linalg.qr(rng.standard_normal((n, len(s))))[0] for n in (out, fan_in))
        modules[f"m{i}"] = LowRank(make_tensor(V.T.astype("f4")), make_tensor((U * s).astype("f4")), 1.0)
    return AdapterFile("peft", "made", modules=modules)


@over(ANY)
def test_all_of_the_energy_is_all(sample, tmp_path):
    model = saved(sample, tmp_path / "a", graft if "pissa" in sample.name or "olora" in sample.name else peft)
    small, rows = resize_adapter(read(tmp_path / "a"), energy=1.0)
    assert all(row.energy == pytest.approx(1) for row in rows) and rows
    assert form.write(small, str(tmp_path / "b")) == []
    for lib in LIBS:
        loaded = lib.PeftModel.from_pretrained(models.make(sample.model), tmp_path / "b").eval()
        close(output(loaded, sample), output(model, sample), 2e-4)


@pytest.mark.parametrize("options", [dict(rank=2), dict(energy=0.7), dict(ratio=2.0), dict(energy=0.9, max_rank=2)])
@pytest.mark.parametrize("model", ["llama", "conv2d", "embedding"])
def test_what_is_lost(options, model, tmp_path):
    sample = first("LORA", model)
    sample = replace(sample, kwargs=sample.kwargs | dict(r=5))
    saved(sample, tmp_path / "a")
    before = read(tmp_path / "a")
    small, rows = resize_adapter(before, **options)
    form.write(small, str(tmp_path / "b"))
    after = read(tmp_path / "b")
    layers = dict(peft.PeftModel.from_pretrained(models.make(model), tmp_path / "b").base_model.model.named_modules())
    for row in rows:
        ((B, A),) = algebra.list_delta_products(before.modules[row.module])
        W = torch.from_numpy(B @ A)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        S = S[S.div(S[0]) > 1e-6]
        squares = S.square()
        k = row.after
        assert row.energy == pytest.approx(float(squares[:k].sum() / squares.sum()), rel=1e-6)
        if "rank" in options:
            assert k == options["rank"]
        elif "ratio" in options:
            assert k == int((S.div(S[0]) > 0.5).sum())
        else:
            wanted = next(i for i in range(1, 6) if squares[:i].sum() >= options["energy"] * squares.sum())
            assert k == min(wanted, options.get("max_rank", 5))
        theirs = layers[row.module].get_delta_weight("default").detach().double()
        close(theirs.flatten(1), U[:, :k] * S[:k] @ Vh[:k], 1e-5)
        assert after.modules[row.module].rank == k and layers[row.module].r["default"] == k


def test_a_budget_loses_least():
    """By brute force over all ranks of three modules of one size."""
    spectra = [np.array(s) for s in ([9, 3, 1, 0.5], [4, 3.5, 3, 2.5], [1, 0.9, 0.1, 0.01])]
    adapter = adapter_of(*spectra)
    for extra in range(8):
        size = 0.0
        for probe in np.arange(0.0002, 0.01, 0.00001):
            try:
                rows = resize_adapter(adapter, max_mb=float(probe))[1]
            except LossError:
                continue
            if sum(row.after for row in rows) == 3 + extra:
                size = probe
                break
        assert size
        lost = sum(float((s[row.after :] ** 2).sum()) for s, row in zip(spectra, rows, strict=True))
        every = (ks for ks in itertools.product(range(1, 5), repeat=3) if sum(ks) == 3 + extra)
        least = min(sum(float((s[k:] ** 2).sum()) for s, k in zip(spectra, ks, strict=True)) for ks in every)
        assert lost == pytest.approx(least), extra


@pytest.mark.parametrize("uniform", [False, True])
def test_a_file_is_no_larger_than_it_may_be(uniform, tmp_path):
    sample = first("LORA", "llama")
    sample = replace(sample, kwargs=sample.kwargs | dict(r=16, target_modules=["q_proj", "down_proj", "up_proj"]))
    saved(sample, tmp_path / "a")
    adapter = read(tmp_path / "a")
    full = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    for part in (0.3, 0.6, 0.9):
        small, rows = resize_adapter(adapter, max_mb=part * full / 1e6, uniform=uniform)
        form.write(small, str(tmp_path / "b"))
        size = (tmp_path / "b" / "adapter_model.safetensors").stat().st_size
        assert 0.75 * part * full < size <= part * full
        assert len({row.after for row in rows}) == 1 or not uniform


def test_one_rank_for_all(tmp_path):
    adapter = adapter_of([5, 1e-9], [3, 2.9], [1, 0.1])
    _, rows = resize_adapter(adapter, energy=0.99, uniform=True)
    assert [row.after for row in rows] == [2, 2, 2]
    _, rows = resize_adapter(adapter, energy=0.99)
    assert [row.after for row in rows] == [1, 2, 1]
    wider, rows = resize_adapter(adapter, rank=6, uniform=True)
    assert [row.after for row in rows] == [6, 6, 6]
    for path, held in adapter.modules.items():
        (a,), (b,) = algebra.list_delta_products(held), algebra.list_delta_products(wider.modules[path])
        assert algebra.compare_deltas([a], [b]).relative < 1e-6


@pytest.mark.parametrize(
    "options", [{}, dict(rank=2, energy=0.5), dict(rank=0), dict(energy=1.5), dict(ratio=1), dict(max_mb=-1),
                dict(rank=2, max_rank=0)]
)  # fmt: skip
def test_options_that_cannot_be(options):
    with pytest.raises(OptionError):
        resize_adapter(adapter_of([1, 2]), **options)


def test_what_has_no_rank_is_refused(tmp_path):
    for method, model in (("LOHA", "mlp"), ("IA3", "mlp"), ("LN_TUNING", "llama")):
        saved(first(method, model), tmp_path / method)
        with pytest.raises(LossError, match="that are no LoRA"):
            resize_adapter(read(tmp_path / method), rank=1)
    sample = next(s for s in SAMPLES if s.method == "LORA" and s.name == "pissa" and s.model == "mlp")
    saved(sample, tmp_path / "pissa")
    with pytest.raises(LossError, match="changed the base"):
        resize_adapter(read(tmp_path / "pissa"), rank=1)
    with pytest.raises(LossError, match="MB at rank 1"):
        resize_adapter(adapter_of([1, 2]), max_mb=1e-6)
    assert collect_loras(adapter_of([1.0]))


@pytest.mark.parametrize("options", [dict(rank=2), dict(energy=0.9), dict(ratio=2.0), dict(max_mb=0.01)])
def test_a_module_that_adalora_has_left_no_rank(options, tmp_path):
    base = models.make("llama")
    config = graft.AdaLoraConfig(init_r=2, target_r=2, total_step=10, target_modules=["q_proj", "v_proj"])
    graft.get_peft_model(base, config).save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    none = next(key for key in tensors if key.endswith("q_proj.lora_A")).removesuffix("lora_A")
    for name, axis in ("lora_A", 0), ("lora_B", 1), ("lora_E", 0):
        tensors[none + name] = tensors[none + name].narrow(axis, 0, 0)
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    path = none.removeprefix("base_model.model.").removesuffix(".")
    adapter = read(tmp_path / "a")
    (found,) = (m for m in inspect_adapter(adapter, spectrum=True)["modules"] if m["module"] == path)
    assert (found["rank"], found["norm"], found["utilisation"]) == (0, 0.0, 0.0)
    assert any(f.rule == "zero-B" and path in f.where for f in lint_adapter(adapter))
    assert compare_adapters(adapter, adapter)["equal"]
    small, rows = resize_adapter(adapter, **options)
    assert next((row.before, row.energy) for row in rows if row.module == path) == (0, 1.0)
    form.write(small, str(tmp_path / "b"))
    graft.PeftModel.from_pretrained(models.make("llama"), tmp_path / "b")


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("options", [dict(rank=8), dict(energy=1.0), dict(rank=6, uniform=True), dict(max_mb=1)])
def test_what_loses_nothing_keeps_its_bits(dtype, options):
    adapter = adapter_of((3.0, 2.0, 1.0, 0.5), (2.0, 1.0, 0.1))
    for path, of in adapter.low_rank.items():
        adapter.modules[path] = replace(
            of, A=make_tensor(of.A.read(), dtype), B=make_tensor(of.B.read(), dtype), scale=1.7
        )
    made, _ = resize_adapter(adapter, **options)
    for path, of in made.low_rank.items():
        was = adapter.low_rank[path]
        assert of.scale == 1.7 and of.A.dtype == dtype and of.rank == (6 if options.get("uniform") else was.rank)
        assert np.array_equal(of.A.read()[: was.rank], was.A.read()) and not of.A.read()[was.rank :].any()
        assert np.array_equal(of.B.read()[:, : was.rank], was.B.read()) and not of.B.read()[:, was.rank :].any()
    assert compare_adapters(adapter, made)["largest"] < 1e-12


def test_one_alpha_for_all_where_there_was_one(tmp_path):
    """Servers that read no patterns scale by it: also where a module keeps its factors and another does not."""
    adapter = adapter_of((3.0, 2.0, 1.0, 0.5), (2.0, 1.0))
    adapter.modules = {path: replace(of, scale=2.0) for path, of in adapter.low_rank.items()}
    form.write(resize_adapter(adapter, rank=3, uniform=True)[0], str(tmp_path))
    config = read(tmp_path).config
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    assert not config["alpha_pattern"] and not config["rank_pattern"]
