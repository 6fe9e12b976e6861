# SPDX-License-Identifier: Apache-2.0
"""PEFT's folders: what is read and written again has the same tensors and config, and PEFT loads what has changed."""

import json
import warnings
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

import graft
from graft.core.errors import CheckpointError, LossError
from graft.files.base import BaseDescription
from graft.files.formats import peft as form
from graft.files.formats import read, recognise
from graft.files.neutral import OtherMethod
from graft.files.tensors import make_tensor
from graft.methods import METHODS, PROMPTS
from tests import models
from tests.pair import LIBS, adapt, close, output, randomize
from tests.samples import SAMPLES, first, over

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def written_again(folder, to):
    adapter = read(folder)
    assert not adapter.unknown_keys and form.write(adapter, str(to)) == []
    return adapter


def alike(a, b):
    ours, theirs = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[k], t) and ours[k].dtype == t.dtype for k, t in theirs.items())
    assert json.loads((a / CONFIG).read_text()) == json.loads((b / CONFIG).read_text())


@over(SAMPLES)
@pytest.mark.parametrize("lib", LIBS, ids=["graft", "peft"])
def test_read_and_written_again_it_is_the_same(sample, lib, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        randomize(adapt(lib, sample), sample).save_pretrained(tmp_path / "a")
    adapter = written_again(tmp_path / "a", tmp_path / "b")
    assert adapter.method == sample.method and (adapter.modules or adapter.rows or adapter.shared)
    alike(tmp_path / "a", tmp_path / "b")


def test_every_method_has_its_prefix():
    assert {*METHODS} == {*form.PREFIXES} and {*PROMPTS} == {*form.PROMPTS}
    for name in METHODS:
        assert graft.method_of(name).prefix.startswith(form.PREFIXES[name]), name


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name, tmp_path):
    base = models.make("gpt2")
    more = {"CPT": dict(cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2])}
    config = graft.config_of(name) if hasattr(graft, "config_of") else graft.PEFT_TYPE_TO_CONFIG_MAPPING[name]
    made = config(task_type="CAUSAL_LM", **more.get(name, dict(num_virtual_tokens=3)))
    graft.get_peft_model(base, made).save_pretrained(tmp_path / "a")
    adapter = written_again(tmp_path / "a", tmp_path / "b")
    assert "prompt_embeddings" in adapter.shared and not adapter.modules and not adapter.full
    alike(tmp_path / "a", tmp_path / "b")


class Experts(torch.nn.Module):
    """Two stacks, the second written (n, in, out) by a module that says so."""

    def __init__(self, transposed=False):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 6, 4))
        self.down_proj = torch.nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x):
        return torch.einsum("eoi,bi->beo", self.gate_up_proj, x).sum() + self.down_proj.sum()


class WithExperts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(4, 4)
        self.experts = Experts()

    def forward(self, x):
        return self.experts(self.up(x))


@pytest.mark.parametrize("lib", LIBS, ids=["graft", "peft"])
@pytest.mark.parametrize("names", [["gate_up_proj", "down_proj"], ["down_proj"]], ids=["both", "one"])
def test_experts(lib, names, tmp_path):
    torch.manual_seed(0)
    config = lib.LoraConfig(
        r=2, lora_alpha=5, target_modules=["up"], target_parameters=[f"experts.{n}" for n in names],
        rank_pattern={"experts.down_proj": 3}, init_lora_weights=False,
    )  # fmt: skip
    model = lib.get_peft_model(WithExperts(), config)
    model.save_pretrained(tmp_path / "a")
    adapter = written_again(tmp_path / "a", tmp_path / "b")
    alike(tmp_path / "a", tmp_path / "b")
    assert set(adapter.modules) == {"up", *(f"experts.{n}" for n in names)}
    before = {n: p.detach().clone() for n, p in model.base_model.model.named_parameters() if n.endswith("_proj")}
    merged = model.merge_and_unload()
    for name in names:
        held = adapter.modules[f"experts.{name}"]
        assert held.kind == "experts" and held.rank == (3 if name == "down_proj" else 2)
        delta = held.scale * held.B.read() @ held.A.read()
        was = next(t for n, t in before.items() if n.endswith(name))
        close(torch.from_numpy(delta), getattr(merged.experts, name) - was, 1e-5)


OLD = [  # version of PEFT, model type, stacks that it wrote exchanged
    ("0.18.0", "mixtral", True), ("0.18.1", "gpt_oss", False), ("0.19.0", "mixtral", True), ("0.19.0", "gpt_oss", True),
    ("0.19.1", "mixtral", False), (None, "mixtral", True), (None, "gpt_oss", False),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of files that do not tell
@pytest.mark.parametrize("sizes", [(8, 3), (6, 3), (4, 4)], ids=["none-square", "gate-square", "down-square"])
@pytest.mark.parametrize("names", [["gate_up_proj", "down_proj"], ["down_proj"]], ids=["both", "one"])
@pytest.mark.parametrize("version, kind, exchanged", OLD)
def test_experts_of_older_versions(version, kind, exchanged, names, sizes, tmp_path):
    """Files by construction, as PEFT before 0.19.1 has them; what they mean is what today's file does."""
    (hidden, inner), n, r = sizes, 3, 2
    shapes = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
    rng = np.random.default_rng(0)
    wanted = {name: [rng.normal(size=s).astype("f4") for s in ((n, r, shapes[name][1]), (n, shapes[name][0], r))]
              for name in names}  # fmt: skip
    tensors = {}
    for depth, name in enumerate(reversed(names)):
        A, B = wanted[name]
        A, B = (B.swapaxes(1, 2), A.swapaxes(1, 2)) if exchanged else (A, B)
        stem = "base_model.model.experts" + ".base_layer" * depth
        tensors[f"{stem}.lora_A.weight"] = np.ascontiguousarray(A.reshape(n * r, -1))
        tensors[f"{stem}.lora_B.weight"] = np.ascontiguousarray(B.transpose(1, 2, 0).reshape(-1, r * n))
    config = dict(peft_type="LORA", r=r, lora_alpha=r, target_modules=[],
                  target_parameters=[f"experts.{name}" for name in names]) | ({"peft_version": version} if version else {})  # fmt: skip # noqa: E501
    write_folder(tmp_path / "a", tensors, config)
    turned = kind == "gpt_oss"
    stored = {f"experts.{name}": (n, *shapes[name][:: -1 if turned else 1]) for name in names}
    base = BaseDescription("base", {"model_type": kind}, stored, ["experts"])
    bases = [base] if len(names) == 1 or version is None else [base, None]
    for known in bases:
        adapter = read(tmp_path / "a", known)
        for name, (A, B) in wanted.items():
            held = adapter.modules[f"experts.{name}"]
            assert np.array_equal(held.A.read(), A) and np.array_equal(held.B.read(), B), (known, name)
        form.write(adapter, tmp_path / "b")
        again = read(tmp_path / "b", base)
        assert all(np.array_equal(again.modules[f"experts.{name}"].A.read(), A) for name, (A, _) in wanted.items())


def write_folder(path, tensors, config):
    path.mkdir()
    save_arrays(tensors, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps(config))


def test_attention_whose_projections_are_one_parameter(tmp_path):
    for lib in LIBS:
        base = torch.nn.ModuleDict({"mha": torch.nn.MultiheadAttention(8, 2), "lin": torch.nn.Linear(8, 8)})
        config = lib.LoraConfig(target_modules=["mha", "lin"], init_lora_weights=False)
        lib.get_peft_model(base, config).save_pretrained(tmp_path / lib.__name__ / "a")
        adapter = written_again(tmp_path / lib.__name__ / "a", tmp_path / lib.__name__ / "b")
        assert {"mha", "mha.out_proj", "lin"} == set(adapter.modules)
        alike(tmp_path / lib.__name__ / "a", tmp_path / lib.__name__ / "b")


def test_torch_files(tmp_path):
    sample = first("LORA", "conv2d")
    model = randomize(adapt(peft, sample), sample)
    model.save_pretrained(tmp_path / "a", safe_serialization=False)
    model.save_pretrained(tmp_path / "safe")
    written_again(tmp_path / "a", tmp_path / "b")
    alike(tmp_path / "safe", tmp_path / "b")


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scales_that_changed_load_in_peft(rslora, tmp_path):
    sample = first("LORA", "llama")
    sample = replace(sample, kwargs=sample.kwargs | dict(use_rslora=rslora, target_modules=["q_proj", "v_proj"]))
    model = randomize(adapt(peft, sample), sample).eval()
    model.save_pretrained(tmp_path / "a")
    adapter = read(tmp_path / "a")
    for i, held in enumerate(adapter.modules.values()):
        grown = i + 1
        A, B = held.A.read(), held.B.read()
        zeros = np.zeros((grown, A.shape[1]), "f4"), np.zeros((B.shape[0], grown), "f4")
        held.A = make_tensor(np.concatenate([A, zeros[0]]))
        held.B = make_tensor(np.concatenate([B * held.scale / (i + 1.5), zeros[1]], 1))
        held.scale = i + 1.5
    form.write(adapter, str(tmp_path / "b"))
    for lib in LIBS:
        loaded = lib.PeftModel.from_pretrained(models.make("llama"), tmp_path / "b")
        close(output(loaded, sample), output(model, sample))


@pytest.mark.parametrize("lib", LIBS, ids=["graft", "peft"])
def test_embeddings_beside_a_head_of_one(lib, tmp_path):
    """The file holds the head twice, and the base's embeddings, of which an adapter is none."""
    model = lib.get_peft_model(models.make("llama"), lib.LoraConfig(modules_to_save=["lm_head"]))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1) if p.requires_grad else None
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert sum("lm_head" in key for key in load_file(tmp_path / "a" / WEIGHTS)) == 3
    adapter = written_again(tmp_path / "a", tmp_path / "b")
    assert [key for key in adapter.full if "lm_head" in key] == ["lm_head.weight"]
    loaded = lib.PeftModel.from_pretrained(models.make("llama"), tmp_path / "b").eval()
    batch = models.inputs("llama")
    close(models.output(loaded, batch), models.output(model.eval(), batch))


def test_fewer_modules_are_what_the_config_says(tmp_path):
    sample = first("LORA", "llama")
    randomize(adapt(graft, sample), sample).save_pretrained(tmp_path / "a")
    adapter = read(tmp_path / "a")
    gone = next(iter(adapter.modules))
    del adapter.modules[gone]
    form.write(adapter, str(tmp_path / "b"))
    for lib in LIBS:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model = lib.PeftModel.from_pretrained(models.make("llama"), tmp_path / "b")
        found = {n for n, _ in model.named_parameters() if "lora_A" in n}
        assert len(found) == len(adapter.modules) and not any(gone in n for n in found)


def test_what_has_no_place_is_refused_by_name(tmp_path):
    sample = first("LORA", "mlp")
    randomize(adapt(graft, sample), sample).save_pretrained(tmp_path / "a")
    adapter = read(tmp_path / "a")
    path = next(iter(adapter.modules))
    adapter.modules[path] = OtherMethod("BOTTLENECK", {"down": adapter.modules[path].A})
    with pytest.raises(LossError, match=rf"{path} \(BOTTLENECK\)"):
        form.write(adapter, str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()
    assert form.write(adapter, str(tmp_path / "b"), lossy=True) == [f"{path} (BOTTLENECK)"]
    assert path not in read(tmp_path / "b").modules


def test_keys_without_a_meaning_are_listed(tmp_path):
    sample = first("LORA", "mlp")
    randomize(adapt(graft, sample), sample).save_pretrained(tmp_path)
    held = load_file(tmp_path / WEIGHTS)
    key = next(k for k in held if "lora_A" in k)
    more = {"base_model.model.fc.hada_w1_a": torch.ones(2), key.replace("lora_A", "lora_Q"): torch.ones(2)}
    save_file(held | more, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text((tmp_path / CONFIG).read_text())
    adapter = read(tmp_path)
    assert "base_model.model.fc.hada_w1_a" in adapter.unknown_keys
    assert any("lora_Q.weight" in m.extra for m in adapter.low_rank.values())


@pytest.mark.parametrize("wrong", [[-1, 1], [0.5, 1], ["a", "b"], [True, False], "ab", 2])
def test_token_indices_that_cannot_be(wrong, tmp_path):
    config = graft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [0, 1]})
    graft.get_peft_model(models.make("llama"), config).save_pretrained(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)  # without the config in it
    assert list(read(tmp_path).rows) == ["model.embed_tokens.weight"]
    fields = json.loads((tmp_path / CONFIG).read_text()) | {"trainable_token_indices": {"embed_tokens": wrong}}
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"token indices of 'model\.embed_tokens'"):
        read(tmp_path)


@pytest.mark.parametrize("fields, text", [
    ({"r": 64}, "says rank 64"), ({"rank_pattern": ["fc1"]}, "rank_pattern is"),
    ({"alpha_pattern": ["fc1"]}, "alpha_pattern is"),
])  # fmt: skip
def test_ranks_that_the_factors_do_not_have_and_patterns_that_are_no_dict(fields, text, tmp_path):
    sample = first("LORA", "mlp")
    randomize(adapt(peft, sample), sample).save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(json.loads((tmp_path / CONFIG).read_text()) | fields))
    with pytest.raises(CheckpointError, match=text):
        read(tmp_path)


def test_what_is_no_adapter(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read(tmp_path / "none")
    (tmp_path / CONFIG).write_text('{"fine_tune_type": "lora"}')
    assert not form.recognises(str(tmp_path))
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"}')
    assert recognise(str(tmp_path)) == recognise(str(tmp_path / CONFIG)) == "peft"
    with pytest.raises(CheckpointError, match="neither"):
        read(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"\x10" + bytes(30))
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"')
    with pytest.raises(CheckpointError, match=r"is no safetensors file|not valid JSON"):
        read(tmp_path)
