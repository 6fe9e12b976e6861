# SPDX-License-Identifier: Apache-2.0
"""Extraction: a known change of low rank comes back, and PEFT makes the fine-tuned model of what was written."""

import os
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import graft
from graft.core.errors import BaseModelMismatchError, CheckpointError, NonFiniteError
from graft.files import algebra, extract
from graft.files.base import read_base_files
from graft.files.errors import OptionError
from graft.files.formats import peft as form
from graft.files.formats import read
from tests import families, models
from tests.families import RENAMED
from tests.leaves_out import FUSED_EXPERTS
from tests.pair import LIBS, close

pytestmark = pytest.mark.filterwarnings("ignore")


def checkpoints(tmp_path, model, change, shard="1KB"):
    """Save a model, and the same after `change`, in shards; return the changed one."""
    made = models.make(model)
    made.save_pretrained(tmp_path / "base", max_shard_size=shard)
    with torch.no_grad():
        change(made)
    made.save_pretrained(tmp_path / "tuned", max_shard_size=shard)
    return made.eval(), read_base_files(tmp_path / "base"), read_base_files(tmp_path / "tuned")


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
    made = extract.extract_adapter(new, base, rank=6)
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
    made = extract.extract_adapter(new, base, energy=1.0, embed=embed)
    assert [r.how for r in made.rows] == [embed] and made.same == len(new.tensors) - 1
    form.write(made.adapter, str(tmp_path / "a"))
    batch = models.inputs("gpt2")
    close(models.output(loaded(lib, "gpt2", tmp_path / "a"), batch), models.output(tuned, batch), 2e-4)


def write(folder, tensors, **config):
    os.makedirs(folder)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(graft.config.base.json.dumps({"model_type": "x", **config}))
    return read_base_files(folder)


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
    made = extract.extract_adapter(write(tmp_path / "new", new), write(tmp_path / "old", old), rank=4)
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
        parts = [torch.from_numpy(p.B @ p.A) for p in algebra.list_delta_products(held)]
        close(torch.stack(parts).view_as(delta), delta, 1e-5)
    assert again.config["target_parameters"] == ["mlp.experts.down_proj"]
    assert again.config["bias"] == "lora_only" and again.config["modules_to_save"] == ["embed_tokens", "norm"]


def test_what_is_kept_is_the_best_there_is(tmp_path):
    torch.manual_seed(1)
    old = {"a.weight": torch.randn(40, 30), "b.weight": torch.randn(20, 50)}
    new = {k: t + torch.randn_like(t) / 7 for k, t in old.items()}
    base, tuned = write(tmp_path / "old", old), write(tmp_path / "new", new)
    for options in (dict(rank=5), dict(energy=0.6), dict(max_mb=0.006)):
        made = extract.extract_adapter(tuned, base, **options)
        for row in made.rows:
            S = torch.linalg.svdvals((new[row.name] - old[row.name]).double()).square()
            assert row.energy == pytest.approx(float(S[: row.rank].sum() / S.sum()), rel=1e-5)
            if "energy" in options:
                assert row.rank == int((S.cumsum(0) < 0.6 * S.sum()).sum()) + 1
    assert [r.name for r in extract.extract_adapter(tuned, base, rank=1, include="a.*").rows] == ["a.weight"]
    assert [r.name for r in extract.extract_adapter(tuned, base, rank=1, exclude="a.*").rows] == ["b.weight"]


@pytest.mark.parametrize("how", [dict(rank=8), dict(energy=0.99)])
def test_large_matrices(how, monkeypatch):
    monkeypatch.setattr(extract, "LARGE", 16)
    rng = np.random.default_rng(0)
    low = rng.standard_normal((300, 8)) @ rng.standard_normal((8, 200))
    W = (low + rng.standard_normal((300, 200)) / 50).astype("f4")
    found = extract.largest_triplets(W, how.get("rank"), how.get("energy"))
    S = np.linalg.svd(W.astype("f8"), compute_uv=False)
    assert len(found.s) == 8 and np.allclose(found.s, S[:8], rtol=1e-5)
    left = np.linalg.norm(W - found.U * found.s @ found.Vt) ** 2
    assert left == pytest.approx(np.linalg.norm(W) ** 2 - (found.s.astype("f8") ** 2).sum(), rel=1e-2)


def test_what_is_not_of_one_architecture(tmp_path):
    a, b = {"a.weight": torch.randn(4, 4)}, {"b.weight": torch.randn(3)}
    old = write(tmp_path / "old", a | b)
    for name, tensors, text in (
        ("lacks", a, "it lacks .b.weight"),
        ("shape", {"a.weight": torch.randn(4, 5)} | b, "other shapes of .a.weight"),
        ("more", a | b | {"c.weight": torch.ones(1)}, "base lacks .c"),
        ("int", {"a.weight": torch.ones(4, 4, dtype=torch.int8)} | b, "a.weight"),
    ):
        with pytest.raises(BaseModelMismatchError, match=text):
            extract.extract_adapter(write(tmp_path / name, tensors), old)
    with pytest.raises(CheckpointError, match="have no difference"):
        extract.extract_adapter(old, old)
    with pytest.raises(OptionError):
        extract.extract_adapter(old, old, rank=2, energy=0.5)


@pytest.mark.parametrize("shape", [(4, 4), (3,), (5, 4)], ids=["matrix", "vector", "resized"])
def test_a_checkpoint_that_has_diverged(shape, tmp_path):
    old = write(tmp_path / "old", {"a.weight": torch.ones(4, *shape[1:])[: shape[0]], "b.weight": torch.ones(3)})
    bad = torch.full(shape, float("nan"))
    new = write(tmp_path / "new", {"a.weight": bad, "b.weight": torch.zeros(3)})
    with pytest.raises(NonFiniteError, match=r"a\.weight.*exclude"):
        extract.extract_adapter(new, old)
    assert [row.name for row in extract.extract_adapter(new, old, exclude="a.*").rows] == ["b.weight"]


@torch.no_grad()
def move(model):
    """Change every parameter that PEFT's files have a place for: what LoRA takes by a matrix of rank 2."""
    g, seen = torch.Generator().manual_seed(5), set()
    for name, p in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if id(p) in seen or any(True for _ in module.children()):
            continue
        seen.add(id(p))
        if p.dim() == 3 and "experts" in name:
            p += torch.randn(len(p), p.shape[1], 2, generator=g) @ torch.randn(len(p), 2, p.shape[2], generator=g) / 10
        elif p.dim() > 1 and hasattr(module, "kernel_size" if p.dim() > 2 else "in_features"):
            A, B = torch.randn(2, p[0].numel(), generator=g), torch.randn(len(p), 2, generator=g)
            p += (B @ A / 10).view_as(p)
        elif name.endswith((".weight", ".bias")) and p.dim() < 3:
            p += torch.randn(p.shape, generator=g) / 10


@FUSED_EXPERTS
@pytest.mark.parametrize(
    "family", [*RENAMED, "mixtral", "qwen3_moe", "glm4_moe", "gpt_oss", "llama4", "granitemoe", "nemotron_h"]
)
def test_an_extract_is_loaded_and_merged_by_all(family, tmp_path):
    """Of models whose files have other names than their modules, stacks in pieces, and stacks stored (in, out)."""
    tuned = families.base(family)
    tuned.save_pretrained(tmp_path / "base")
    move(tuned)
    tuned.save_pretrained(tmp_path / "tuned")
    made = extract.extract_adapter(read_base_files(tmp_path / "tuned"), read_base_files(tmp_path / "base"), rank=30)
    assert form.write(made.adapter, str(tmp_path / "a")) == []
    wanted = tuned.state_dict()
    again = type(tuned).from_pretrained
    found = [lib.PeftModel.from_pretrained(again(tmp_path / "base"), tmp_path / "a").merge_and_unload() for lib in LIBS]
    if family != "gte":  # whose file has q, k and v in one
        graft.merge_files(tmp_path / "base", [tmp_path / "a"], tmp_path / "merged")
        found.append(again(tmp_path / "merged"))
    for model in found:
        state = model.state_dict()
        for name, t in wanted.items():
            close(state[name], t, 1e-5)


TIES = ["ee", "e", "h", "eh"]  # what training moves: the tied pair, or one of the two, or both by different values


@pytest.mark.parametrize("embed", ["lora", "full"])
@pytest.mark.parametrize("how", TIES)
@pytest.mark.parametrize("base_is_tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_pairs_that_training_ties_or_unties(kind, base_is_tied, how, embed, tmp_path):
    """In memory and in files, the head that was trained stays the head, and the embeddings stay theirs."""
    base = tied(kind, base_is_tied)
    base.save_pretrained(tmp_path / "base")
    tuned = tied(kind, how == "ee")
    tuned.load_state_dict(base.state_dict(), strict=False)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in dict.fromkeys(how):
            weight = (tuned.get_input_embeddings() if part == "e" else tuned.get_output_embeddings()).weight
            weight.copy_(weight + torch.randn(weight.shape, generator=g) / 5)
    tuned.save_pretrained(tmp_path / "tuned")
    files = (read_base_files(tmp_path / name) for name in ("tuned", "base"))
    made = extract.extract_adapter(*files, rank=40, embed=embed)
    assert made.adapter.config["ensure_weight_tying"] == (base_is_tied and how == "ee")
    form.write(made.adapter, str(tmp_path / "a"))
    ids = torch.arange(8)[None]
    wanted = tuned.eval()(ids).logits
    for lib in LIBS:
        loaded = lib.PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "a").eval()
        close(loaded(ids).logits, wanted, 2e-5)
        if lib is graft:
            close(loaded.merge_and_unload()(ids).logits, wanted, 2e-5)
    graft.merge_files(tmp_path / "base", [tmp_path / "a"], tmp_path / "merged")
    close(type(base).from_pretrained(tmp_path / "merged").eval()(ids).logits, wanted, 2e-5)


def tied(kind, together):
    import transformers as t

    sizes = dict(vocab_size=33, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    config = {
        "llama": lambda: t.LlamaConfig(**sizes), "bert": lambda: t.BertConfig(**sizes),
        "gpt2": lambda: t.GPT2Config(vocab_size=33, n_embd=16, n_layer=1, n_head=2, n_positions=16),
    }[kind]()  # fmt: skip
    config.tie_word_embeddings = together
    heads = {"llama": t.LlamaForCausalLM, "bert": t.BertForMaskedLM, "gpt2": t.GPT2LMHeadModel}
    with models.seeded(0):
        return heads[kind](config).eval()


def test_without_a_model_names_tell(tmp_path):
    """Of a base that no library knows: by the names of the files, as far as they are known."""
    old = {"transformer.wte.weight": torch.randn(10, 4), "transformer.h.0.attn.c_proj.weight": torch.randn(4, 4),
           "mlp.experts.down_proj": torch.randn(3, 5, 4)}  # fmt: skip
    new = {name: t + torch.randn(t.shape) for name, t in old.items()}
    kinds = {"gpt2": "GPT2LMHeadModel", "gpt_oss": "XForCausalLM"}
    for kind, architecture in kinds.items():
        base, tuned = (write(tmp_path / f"{kind}{i}", t, model_type=kind, architectures=[architecture])
                       for i, t in enumerate((old, new)))  # fmt: skip
        (tmp_path / f"{kind}0" / "config.json").unlink()
        made = extract.extract_adapter(tuned, base, rank=5, embed="lora").adapter
        assert {"transformer.wte", "lm_head"} <= made.modules.keys()
        assert made.config["fan_in_fan_out"] == (kind == "gpt2")
        stack = made.modules["mlp.experts.down_proj"]
        delta = new["mlp.experts.down_proj"] - old["mlp.experts.down_proj"]
        delta = delta.mT if kind == "gpt_oss" else delta
        close(torch.from_numpy(stack.B.read()) @ torch.from_numpy(stack.A.read()), delta, 1e-5)
