# SPDX-License-Identifier: Apache-2.0
"""Extraction: a known change of low rank comes back, and PEFT makes the fine-tuned model of what was written."""

import os
import warnings

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import graft
from graft.core.errors import BaseModelMismatchError, CheckpointError, NonFiniteError
from graft.files import algebra, extract
from graft.files.base import base_files
from graft.files.errors import OptionError
from graft.files.formats import peft as form
from graft.files.formats import read
from tests import models
from tests.pair import LIBS, close

pytestmark = pytest.mark.filterwarnings("ignore")


def checkpoints(tmp_path, model, change, shard="1KB"):
    """Save a model, and the same after `change`, in shards; return the changed one."""
    made = models.make(model)
    made.save_pretrained(tmp_path / "base", max_shard_size=shard)
    with torch.no_grad():
        change(made)
    made.save_pretrained(tmp_path / "tuned", max_shard_size=shard)
    return made.eval(), base_files(tmp_path / "base"), base_files(tmp_path / "tuned")


def loaded(lib, model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", graft.core.errors.PeftWarning)
        return lib.PeftModel.from_pretrained(models.make(model), folder).eval()


@pytest.mark.parametrize("lib", LIBS, ids=["graft", "peft"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
def test_a_known_change_comes_back(model, lib, tmp_path):
    def change(made):
        g = torch.Generator().manual_seed(5)
        for name, p in made.named_parameters():
            if p.dim() == 2 and ("attn" in name or "mlp" in name or "attention" in name):
                p += torch.randn(len(p), 2, generator=g) @ torch.randn(2, p.shape[1], generator=g) / 10
            elif p.dim() == 1:
                p += torch.randn(p.shape, generator=g) / 10

    tuned, base, new = checkpoints(tmp_path, model, change)
    made = extract.extract(new, base, rank=6)
    assert {r.rank for r in made.rows if r.how == "lora"} == {2}, "no rank beyond the change's own"
    assert all(r.energy == pytest.approx(1, abs=1e-6) for r in made.rows)
    assert form.write(made.adapter, str(tmp_path / "a")) == []
    ours = loaded(lib, model, tmp_path / "a")
    batch = models.inputs(model)
    close(models.output(ours, batch), models.output(tuned, batch), 2e-4)


@pytest.mark.parametrize("lib", LIBS, ids=["graft", "peft"])
@pytest.mark.parametrize("embed", ["lora", "full"])
def test_embeddings_and_a_tied_head(lib, embed, tmp_path):
    def change(made):
        made.get_input_embeddings().weight.add_(torch.randn(made.get_input_embeddings().weight.shape) / 5)

    tuned, base, new = checkpoints(tmp_path, "gpt2", change)
    assert tuned.config.tie_word_embeddings
    if embed == "full":
        base.config.pop("tie_word_embeddings", None)  # as transformers 4 writes it
    made = extract.extract(new, base, energy=1.0, embed=embed)
    assert [r.how for r in made.rows] == [embed] and made.same == len(new.tensors) - 1
    form.write(made.adapter, str(tmp_path / "a"))
    batch = models.inputs("gpt2")
    close(models.output(loaded(lib, "gpt2", tmp_path / "a"), batch), models.output(tuned, batch), 2e-4)


def write(folder, tensors, **config):
    os.makedirs(folder)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(graft.config.base.json.dumps({"model_type": "x", **config}))
    return base_files(folder)


def test_experts_convolutions_and_tensors_of_other_sizes(tmp_path):
    torch.manual_seed(0)
    old = {
        "conv.weight": torch.randn(6, 4, 3, 3), "mlp.experts.down_proj": torch.randn(3, 5, 4),
        "norm.weight": torch.randn(4),
        "norm.bias": torch.randn(4), "embed_tokens.weight": torch.randn(10, 4), "lin.weight": torch.randn(6, 4),
        "lin.bias": torch.randn(6), "other.bias": torch.randn(3), "other.weight": torch.randn(3, 4),
    }  # fmt: skip
    new = {k: t.clone() for k, t in old.items()}
    new["conv.weight"] += torch.einsum("or,rikl->oikl", torch.randn(6, 2), torch.randn(2, 4, 3, 3))
    new["mlp.experts.down_proj"] += torch.randn(3, 5, 1) @ torch.randn(3, 1, 4)
    new["norm.weight"] += 1
    new["embed_tokens.weight"] = torch.randn(12, 4)
    new["lin.weight"] += torch.randn(6, 1) @ torch.randn(1, 4)
    new["lin.bias"] += 1
    made = extract.extract(write(tmp_path / "new", new), write(tmp_path / "old", old), rank=4)
    a = made.adapter
    assert {p: (h.kind, h.rank) for p, h in a.low_rank.items()} == {
        "conv": ("conv", 2), "mlp.experts.down_proj": ("experts", 1), "lin": ("linear", 1)
    }  # fmt: skip
    assert set(a.full) == {"norm.weight", "norm.bias", "embed_tokens.weight", "lin.bias"}
    form.write(a, str(tmp_path / "a"))
    again = read(tmp_path / "a")
    for path, held in again.low_rank.items():
        name = path if held.kind == "experts" else f"{path}.weight"
        delta = (new[name] - old[name]).double()
        parts = [torch.from_numpy(p.B @ p.A) for p in algebra.products(held)]
        close(torch.stack(parts).view_as(delta), delta, 1e-5)
    assert again.config["target_parameters"] == ["mlp.experts.down_proj"]
    assert again.config["bias"] == "lora_only" and again.config["modules_to_save"] == ["embed_tokens", "norm"]


def test_what_is_kept_is_the_best_there_is(tmp_path):
    torch.manual_seed(1)
    old = {"a.weight": torch.randn(40, 30), "b.weight": torch.randn(20, 50)}
    new = {k: t + torch.randn_like(t) / 7 for k, t in old.items()}
    base, tuned = write(tmp_path / "old", old), write(tmp_path / "new", new)
    for options in (dict(rank=5), dict(energy=0.6), dict(max_mb=0.006)):
        made = extract.extract(tuned, base, **options)
        for row in made.rows:
            S = torch.linalg.svdvals((new[row.name] - old[row.name]).double()).square()
            assert row.energy == pytest.approx(float(S[: row.rank].sum() / S.sum()), rel=1e-5)
            if "energy" in options:
                assert row.rank == int((S.cumsum(0) < 0.6 * S.sum()).sum()) + 1
    assert [r.name for r in extract.extract(tuned, base, rank=1, include="a.*").rows] == ["a.weight"]
    assert [r.name for r in extract.extract(tuned, base, rank=1, exclude="a.*").rows] == ["b.weight"]


@pytest.mark.parametrize("how", [dict(rank=8), dict(energy=0.99)])
def test_large_matrices(how, monkeypatch):
    monkeypatch.setattr(extract, "LARGE", 16)
    rng = np.random.default_rng(0)
    low = rng.standard_normal((300, 8)) @ rng.standard_normal((8, 200))
    W = (low + rng.standard_normal((300, 200)) / 50).astype("f4")
    found = extract.largest(W, how.get("rank"), how.get("energy"))
    S = np.linalg.svd(W.astype("f8"), compute_uv=False)
    assert len(found.s) == 8 and np.allclose(found.s, S[:8], rtol=1e-5)
    left = np.linalg.norm(W - found.U * found.s @ found.Vt) ** 2
    assert left == pytest.approx(np.linalg.norm(W) ** 2 - (found.s.astype("f8") ** 2).sum(), rel=1e-2)


def test_what_is_not_of_one_architecture(tmp_path):
    old = write(tmp_path / "old", {"a.weight": torch.randn(4, 4), "b.weight": torch.randn(3)})
    for name, tensors, text in (
        ("lacks", {"a.weight": torch.randn(4, 4)}, "it lacks .b.weight"),
        ("shape", {"a.weight": torch.randn(4, 5), "b.weight": torch.randn(3)}, "other shapes of .a.weight"),
        (
            "more",
            {"a.weight": torch.randn(4, 4), "b.weight": torch.randn(3), "c.weight": torch.ones(1)},
            "base lacks .c",
        ),
        ("int", {"a.weight": torch.ones(4, 4, dtype=torch.int8), "b.weight": torch.randn(3)}, "a.weight"),
    ):
        with pytest.raises(BaseModelMismatchError, match=text):
            extract.extract(write(tmp_path / name, tensors), old)
    with pytest.raises(CheckpointError, match="do not differ"):
        extract.extract(old, old)
    with pytest.raises(OptionError):
        extract.extract(old, old, rank=2, energy=0.5)
    assert load_file(tmp_path / "old" / "model.safetensors")
    assert peft


@pytest.mark.parametrize("shape", [(4, 4), (3,), (5, 4)], ids=["matrix", "vector", "resized"])
def test_a_checkpoint_that_has_diverged(shape, tmp_path):
    old = write(tmp_path / "old", {"a.weight": torch.ones(4, *shape[1:])[: shape[0]], "b.weight": torch.ones(3)})
    bad = torch.full(shape, float("nan"))
    new = write(tmp_path / "new", {"a.weight": bad, "b.weight": torch.zeros(3)})
    with pytest.raises(NonFiniteError, match=r"a\.weight.*exclude"):
        extract.extract(new, old)
    assert [row.name for row in extract.extract(new, old, exclude="a.*").rows] == ["b.weight"]
