# SPDX-License-Identifier: Apache-2.0
"""EVA, against PEFT on the same data."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification

import graft
from graft.train.components import Components
from tests import models
from tests.looks import layers
from tests.pair import json_of
from tests.raised import refuses

WIDTHS = torch.tensor([3.0, 2.0, 1.5, 1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05])


def batches(n=6, seed=5):
    """Inputs of "mlp" whose directions differ in how much they vary."""
    with models.seeded(seed):
        turn = torch.linalg.qr(torch.randn(10, 10))[0]
        return [{"x": (torch.randn(8, 12, 10) * WIDTHS) @ turn} for _ in range(n)]


def config(lib, **options):
    return lib.LoraConfig(
        **dict(
            r=4,
            lora_alpha=6,
            target_modules=["lin0", "fc1", "fc2"],
            init_lora_weights="eva",
            eva_config=lib.EvaConfig(rho=2.0),
        )
        | options
    )


PLAIN = dict(prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False)


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert ours[name].shape == t.shape, name
        assert_close(ours[name].abs(), t.abs().float(), atol=2e-3, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_components_and_ranks_are_pefts(rho, whiten):
    made = []
    for lib in (graft, peft):
        options = config(lib, eva_config=lib.EvaConfig(rho=rho, whiten=whiten), rank_pattern={"lin0": 5})
        made.append(lib.get_eva_state_dict(models.make("mlp"), batches(), options, **PLAIN))
    same(*made)
    assert rho == 1.0 or len({len(t) for t in made[0].values()}) > 1


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("adjust", [False, True])
def test_the_adapter_is_pefts_afterwards(adjust, low_cpu_mem_usage, tmp_path):
    made = {}
    for lib in (graft, peft):
        cfg = config(lib, eva_config=lib.EvaConfig(adjust_scaling_factors=adjust))
        model = lib.get_peft_model(models.make("mlp"), cfg, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        lib.initialize_lora_eva_weights(model, batches(), **PLAIN)
        model.save_pretrained(tmp_path / lib.__name__)
        made[lib] = model
    ours, theirs = (made[lib].state_dict() for lib in (graft, peft))
    same(ours, theirs)
    a, b = (made[lib].peft_config["default"] for lib in (graft, peft))
    assert a.rank_pattern == b.rank_pattern and a.alpha_pattern == b.alpha_pattern and a.rank_pattern
    assert set(a.target_modules) == set(b.target_modules)
    assert json_of(tmp_path / "graft") == json_of(tmp_path / "peft")
    x = batches(1)[0]
    assert_close(made[graft](**x), models.make("mlp")(**x))
    trains = lambda m: {n for n, p in m.named_parameters() if p.requires_grad}
    assert trains(made[graft]) == trains(made[peft])
    for source in ("graft", "peft"):
        loaded = graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path / source)
        assert_close(loaded(**x), made[graft](**x))


def test_a_language_model_leaves_out_what_is_masked():
    made = []
    for lib in (graft, peft):
        x = models.inputs("llama", 30)
        labels = torch.where(x["input_ids"] > 10, x["input_ids"], -100)
        data = [{**x, "labels": labels}, {**x, "labels": x["input_ids"]}]
        cfg = config(lib, target_modules=["q_proj", "v_proj", "down_proj"], r=2)
        model = lib.get_peft_model(models.make("llama"), cfg)
        made.append(lib.get_eva_state_dict(model, data, show_progress_bar=False))
    same(*made)
    assert all(name.startswith("base_model.model.model.layers.") for name in made[0])


@pytest.mark.parametrize("options", [dict(use_label_mask=False), dict(label_mask_value=7)], ids=str)
def test_masks_of_labels_are_pefts(options):
    made = []
    for lib in (graft, peft):
        x = models.inputs("llama", 30)
        labels = torch.where(x["input_ids"] > 10, x["input_ids"], 7)
        cfg = config(lib, target_modules=["q_proj"], r=2, eva_config=lib.EvaConfig(**options))
        made.append(
            lib.get_eva_state_dict(models.make("llama"), [{**x, "labels": labels}] * 2, cfg, show_progress_bar=False)
        )
    same(*made)
    assert len(made[0]) == 2


@pytest.mark.differs("EVA on a classifier, whose batches have a label for each sequence")
def test_a_label_of_a_sequence_says_nothing_of_its_tokens():
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)

    def found(lib, **labels):
        ids = torch.randint(40, (8, 10), generator=torch.Generator().manual_seed(1))
        data = [dict(input_ids=ids, attention_mask=torch.ones_like(ids), **labels)] * 2
        with models.seeded(0):
            base = BertForSequenceClassification(BertConfig(**sizes)).eval()
        return lib.get_eva_state_dict(base, data, config(lib, target_modules=["query"], r=2), show_progress_bar=False)

    labels = torch.zeros(8, dtype=torch.long)
    same(found(graft, labels=labels), found(peft))
    refuses(RuntimeError, "size of tensor", found, peft, labels=labels)


def test_a_forward_and_rows_of_the_callers_own_for_a_named_adapter():
    """`forward_fn`, a function for each layer in `prepare_layer_inputs_fn`, `adapter_name`."""
    made = []
    for lib in (graft, peft):
        cfg = lambda: config(lib, target_modules=["lin0", "layers.0.fc1"])  # noqa: B023
        model = lib.get_peft_model(models.make("mlp"), cfg(), "mine").eval()
        prefix, calls = "base_model.model.", []

        def forward(m, batch):
            calls.append(batch)  # noqa: B023
            return m(x=batch["rows"])

        def rows(layer_input, model_input, layer_name):
            found = layer_input[0] if isinstance(layer_input, tuple) else layer_input
            return found.flatten(0, -2)[::2].contiguous()

        options = dict(PLAIN, forward_fn=forward, prepare_layer_inputs_fn={f"{prefix}lin0": rows})
        data = [{"rows": b["x"]} for b in batches()]
        lib.initialize_lora_eva_weights(model, data, adapter_name="mine", **options)
        assert calls
        made.append({k: t for k, t in model.state_dict().items() if "lora_" in k})
    same(*made)


def test_inputs_of_other_processes_can_be_left_out(monkeypatch):
    asked = []
    several = SimpleNamespace(is_initialized=lambda: True, get_rank=lambda: 0)
    monkeypatch.setattr("graft.train.eva.dist", several)
    monkeypatch.setattr("graft.train.eva.gather_from_processes", lambda rows: asked.append(1) or rows)
    for gather in (False, True):
        cfg = config(graft, target_modules=["lin0"])
        said = pytest.warns(UserWarning, match="will gather tensors from all ranks") if gather else nullcontext()
        with said:
            graft.get_eva_state_dict(models.make("mlp"), batches(2), cfg, gather_distributed_inputs=gather, **PLAIN)
        assert bool(asked) is gather


def test_twenty_targets_and_more_are_shortened_as_in_peft():
    found = []
    for lib in (graft, peft):
        with models.seeded(0):
            base = nn.ModuleDict({"net": nn.Sequential(*(nn.Linear(4, 4) for _ in range(22)))})
        model = lib.get_peft_model(base, config(lib, r=2, target_modules=r"net\.\d+"))
        values = {f"base_model.model.net.{i}": torch.randn(3 if i % 2 else 1, 4) for i in range(22)}
        lib.initialize_lora_eva_weights(model, eva_state_dict=values)
        cfg = model.peft_config["default"]
        found.append((set(cfg.target_modules), cfg.rank_pattern, cfg.alpha_pattern))
    assert found[0] == found[1] and len(found[0][1]) == 22


def test_layers_that_get_no_rank_lose_the_adapter():
    made = {}
    for lib in (graft, peft):
        model = lib.get_peft_model(models.make("mlp"), config(lib))
        prefix = "base_model.model."
        values = {f"{prefix}layers.{i}.fc1": torch.randn(3 * i, 12) for i in range(3)}
        values |= {f"{prefix}layers.{i}.fc2": torch.randn(4, 20) for i in range(2)}
        if lib is peft:
            peft.initialize_lora_eva_weights(model, eva_state_dict=dict(values))
        else:
            with pytest.warns(graft.PeftWarning, match="with init_lora_weights=True .*lin0, layers.2.fc2"):
                graft.initialize_lora_eva_weights(model, eva_state_dict=values)
        made[lib] = model
    ours, theirs = made[graft], made[peft]
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert type(ours.get_base_model().layers[0].fc1) is nn.Linear and "layers.0.fc1" not in layers(ours)
    assert ours.peft_config["default"].alpha_pattern == theirs.peft_config["default"].alpha_pattern
    assert layers(ours)["layers.2.fc1"].scaling["default"] == 6 / 4
    x = batches(1)[0]
    assert_close(ours(**x), models.make("mlp")(**x))
    ours(**x).sum().backward()
    assert layers(ours)["layers.2.fc1"].lora_B["default"].weight.grad is not None


def test_components_are_those_of_all_rows_together():
    with models.seeded(1):
        X = torch.randn(300, 10) * WIDTHS + torch.randn(10)
    found = Components(4, 0.99)
    for part in X.split([60, 100, 140]):
        found.add(part)
    _, S, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    assert_close((found.V @ Vh[:4].T).abs(), torch.eye(4), atol=2e-2, rtol=0)
    assert_close(found.S, S[:4], atol=1e-1, rtol=1e-2)
    assert_close(found.mean.float(), X.mean(0))
    assert_close(found.squares.sum().float(), S.square().sum())
    assert found.converged.shape == (4,)


# too little


def small(*names, **options):
    return graft.LoraConfig(**dict(r=2, target_modules=list(names), init_lora_weights="eva", eva_config={}) | options)


@pytest.mark.parametrize(
    "names, data, text",
    [
        ("a", [], "dataloader is empty"),
        ("ab", [dict(x=torch.randn(9, 6))], r"gave no input for 1 of 2 layers: \[(base_model.model.)?b\]"),
        ("a", [dict(x=torch.randn(3, 6))], r"too few samples .*a \(4 rows needed, at most 3 in a batch\)"),
        ("a", [dict(x=torch.full((9, 6), float("nan")))], r"inputs of layer '(base_model.model.)?a' are not finite"),
    ],
)
def test_data_that_say_too_little(names, data, text):
    for model, cfg in ((models.Idle(), small(*names)), (graft.get_peft_model(models.Idle(), small(*names)), None)):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        refuses(graft.CalibrationError, text, graft.get_eva_state_dict, model, data, cfg, **PLAIN)
        if cfg is None:
            refuses(graft.CalibrationError, None, graft.initialize_lora_eva_weights, model, data, **PLAIN)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert not any(m._forward_hooks for m in model.modules()) and model.training


@pytest.mark.differs("EVA with batches of too few rows")
def test_what_never_settles_ends(monkeypatch):
    monkeypatch.setattr("graft.train.eva.MAX_PASSES", 2)
    with pytest.raises(graft.CalibrationError, match="1 layers still turn after 2 passes"):
        with models.seeded(0):
            data = [dict(x=torch.randn(5, 6)) for _ in range(2)]
        graft.get_eva_state_dict(models.Idle(), data, small("a", eva_config=graft.EvaConfig(tau=1.0)), **PLAIN)


@pytest.mark.differs("EVA: values for layers that are not adapted")
def test_bad_input():
    data = [dict(x=torch.randn(20, 6))]
    refuses(ValueError, "peft_config is required", graft.get_eva_state_dict, models.Idle(), data)
    refuses(ValueError, "model must be a PeftModel", graft.initialize_lora_eva_weights, models.Idle(), data)
    with pytest.raises(graft.ConfigError, match="rank of layer 'a' is 7, and its inputs have 6"):
        graft.get_eva_state_dict(models.Idle(), data, small("a", r=7), **PLAIN)
    with pytest.raises(TypeError, match="inputs must be a dictionary"):
        graft.get_eva_state_dict(models.Idle(), [torch.randn(9, 6)], small("a"), show_progress_bar=False)
    with pytest.raises(ValueError, match=r"names were not found in the model: \[c\]"):
        graft.get_eva_state_dict(models.Idle(), data, small("a"), prepare_layer_inputs_fn={"c": None})
    plain = graft.get_peft_model(models.Idle(), graft.LoraConfig(r=2, target_modules=["a"]))
    with pytest.raises(ValueError, match="can only be used with `init_lora_weights='eva'`"):
        graft.initialize_lora_eva_weights(plain, data)
    model = graft.get_peft_model(models.Idle(), small("a"))
    refuses(ValueError, "dataloader is required", graft.initialize_lora_eva_weights, model)
    for values, text in (
        ({"b": torch.randn(2, 6)}, r"values for \[b\], where adapter 'default' is not"),
        ({"a": torch.randn(2, 5)}, r"shape \(2, 5\), expected is \(rank, 6\)"),
        ({"a": torch.randn(0, 6)}, "gives no layer of adapter 'default' a rank"),
    ):
        refuses(graft.CalibrationError, text, graft.initialize_lora_eva_weights, model, eva_state_dict=values)
    for wrong, text in ((dict(rho=0.5), "`rho` must be >= 1.0"), (dict(tau=2.0), "`tau` must be between 0.0 and 1.0")):
        refuses(ValueError, text, graft.EvaConfig, **wrong)
    with pytest.warns(UserWarning, match="`eva_config` is not specified. Using default EVA config"):
        assert graft.LoraConfig(init_lora_weights="eva").eva_config == graft.EvaConfig()


TWO = """
import sys, torch, torch.distributed as dist
import graft
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model, cfg, data = torch.load(f"{folder}/input.pt", weights_only=False)
mine = [{"input": b["input"][:3] if rank == 0 else b["input"][3:]} for b in data]
options = dict(prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False)
found = graft.get_eva_state_dict(model, mine, cfg, **options)
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    with models.seeded(0):
        model = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 5))
    data = [{"input": b["x"]} for b in batches(4)]
    cfg = config(graft, target_modules=["0", "1"])
    torch.save((model, cfg, data), tmp_path / "input.pt")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = [sys.executable, "-W", "ignore", "-c", TWO]
    started = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=env) for rank in range(2)]
    assert [p.wait(timeout=120) for p in started] == [0, 0]
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    same(a, graft.get_eva_state_dict(model, data, cfg, **PLAIN))
