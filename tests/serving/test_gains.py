# SPDX-License-Identifier: Apache-2.0
"""DoRA and IA3 in slots, beside LoRA, and adapters that go from a model or a training to slots without a file."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import count

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

import graft
from graft.core.errors import AdapterKeyError, AdapterNotFoundError, ConfigError, RoutingError, UnsupportedLayerError
from graft.core.pieces import LayerPiece
from graft.inject.parts import get_registry
from graft.kernels.cuts import Cut
from graft.serving import AdapterSlots
from tests import models
from tests.threads import at_once

TARGETS = ["q_proj", "v_proj", "down_proj"]
BASE = "__base__"


def ia3(**fields):
    return graft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"], **fields)


CONFIGS = {
    "plain": graft.LoraConfig(r=3, lora_alpha=4.1, target_modules=TARGETS),
    "dora": graft.LoraConfig(r=2, lora_alpha=3.3, target_modules=["q_proj", "down_proj"], use_dora=True),
    "rsdora": graft.LoraConfig(r=4, lora_alpha=2.2, target_modules=TARGETS, use_dora=True, use_rslora=True),
    "scales": ia3(),
}
NAMES = [*CONFIGS, BASE]


def base(dtype=torch.float32):
    """A Llama, with biases on the layers that get slots: DoRA leaves them alone, IA3 does not."""
    model, g = models.make("llama"), torch.Generator().manual_seed(3)
    for name, layer in model.named_modules():
        if name.endswith(tuple(TARGETS)):
            layer.bias = torch.nn.Parameter(torch.randn(layer.out_features, generator=g) * 0.3)
    return model.to(dtype)


def carrying(dtype=torch.float32):
    """A model with all of the adapters, with random values, always the same: what slots must agree with."""
    return models.adapted(base(dtype), CONFIGS, seed=2, mixed=True)


@pytest.fixture(scope="module")
def model():
    return carrying()


def filled(model, n=4, dtype=torch.float32, **options):
    slots = AdapterSlots(base(dtype), n, 4, TARGETS, gains=True, **options)
    for name in CONFIGS:
        slots.load(name, model, adapter=name)
    return slots


@torch.no_grad()
def out(model, names):
    return models.output(lambda **k: model(adapter_names=names, **k), models.inputs("llama", 5))


@pytest.mark.parametrize("name", NAMES)
def test_one_adapter_for_all_rows(model, name):
    y = out(model, [name] * 5)
    assert_close(out(filled(model), [name] * 5), y)
    assert torch.allclose(y, out(model, [BASE] * 5), atol=1e-3) == (name == BASE)


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "gathered anew"])
def test_rows_of_all_kinds_in_one_batch(model, keep):
    slots = filled(model, keep_gathered=keep)
    for names in (NAMES, ["scales", "scales", "plain", "dora", BASE], ["plain", BASE, "plain", BASE, "plain"]):
        for _ in range(3):
            assert_close(out(slots, names), out(model, names))


def test_a_slot_forgets_the_vectors_that_it_had(model):
    slots = filled(model, n=1)
    for name in ("scales", "plain", "dora", "plain", "scales", "rsdora", BASE):
        assert_close(out(slots, [name] * 5), out(model, [name] * 5))
    assert_close(out(slots, ["plain", BASE] * 2 + ["plain"]), out(model, ["plain", BASE] * 2 + ["plain"]))


def test_files(model, tmp_path):
    slots = AdapterSlots(base(), 4, 4, TARGETS, gains=True)
    model.save_pretrained(tmp_path)
    for name in CONFIGS:
        slots.load(name, tmp_path / name, keep=name != "dora")
    assert_close(out(slots, NAMES), out(model, NAMES))


def test_half_precision():
    model = carrying(torch.bfloat16)
    exact = copy.deepcopy(model).double()
    ours, theirs, y = out(filled(model, dtype=torch.bfloat16), NAMES), out(model, NAMES), out(exact, NAMES)
    assert (ours.double() - y).norm() <= 1.2 * (theirs.double() - y).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_in_half_precision(dtype, tmp_path):
    config = copy.deepcopy(CONFIGS["dora"])
    made = models.disturb(graft.get_peft_model(base(), config), 0.3)
    made.to(dtype).save_pretrained(tmp_path)
    slots = AdapterSlots(base(), 1, 4, TARGETS, gains=True)
    slots.load("dora", tmp_path)
    model = graft.PeftModel.from_pretrained(base(), tmp_path, "dora").eval()
    assert_close(out(slots, ["dora"] * 5), out(model, ["dora"] * 5))


def test_compiled_code_takes_any_mix(model):
    torch._dynamo.reset()
    slots = filled(model, n=2)
    layer = next(iter(slots.layers.values()))
    compiled, x = torch.compile(layer, fullgraph=True, backend="eager"), torch.randn(4, 3, layer.in_features)
    for names in (["dora", "plain"] * 2, ["scales", BASE] * 2, ["plain"] * 4, [BASE] * 4):
        with slots.using(names), torch.no_grad():
            assert_close(compiled(x), layer(x))


def test_memory_is_that_of_all_buffers(model):
    report = filled(model).report()
    plain = AdapterSlots(base(), 4, 4, TARGETS).report()
    layers = filled(model).layers.values()
    vectors = sum(2 * layer.out_features + layer.in_features for layer in layers)  # of outputs, and of inputs
    assert report.slot_bytes == plain.slot_bytes + 5 * 4 * vectors  # slots with that of the base, bytes


# from a model or a training, without a file


def test_adapters_of_a_model_move_into_slots(model):
    slots = AdapterSlots.of(carrying(), ["dora", "scales"], gains=True)
    names = ["dora", BASE, "scales", "scales", BASE]
    assert_close(out(slots, names), out(model, names))
    assert slots.max_rank == 2 and slots.max_adapters == 2 and slots.names == ["dora", "scales"]


def test_a_head_of_another_adapter_stays_out_of_slots():
    model = graft.get_peft_model(base(), graft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "x")
    model.get_base_model().lm_head.modules_to_save["x"].weight.data += 1
    model.add_adapter("plain", copy.deepcopy(CONFIGS["plain"]))
    y = out(models.disturb(model).eval(), ["plain"] * 5)
    assert_close(out(AdapterSlots.of(model, "plain"), ["plain"] * 5), y)


def test_winners_of_a_training_move_into_slots():
    torch.manual_seed(0)
    data = DataLoader([{"input_ids": ids, "labels": ids} for ids in torch.randint(20, (8, 6))], 4)
    runs = graft.MultiTrain(base())
    for name, config in (("plain", CONFIGS["plain"]), ("dora", CONFIGS["dora"])):
        runs.add(name, copy.deepcopy(config), data=data, steps=2)
    runs.run()
    rows = ["plain", "dora", BASE, "dora", "plain"]
    y = out(runs.model.eval(), rows)
    slots = AdapterSlots.of(runs, gains=True)
    assert_close(out(slots, rows), y)
    assert len(runs) == 0 and slots.model is runs.base and runs.step().losses == {}


def test_nobody_trains_or_changes_what_moves(monkeypatch):
    """In another thread, between the reading of adapters and the unloading of their model: a step waits."""
    ids = torch.randint(20, (4, 6))
    runs = graft.MultiTrain(base())
    runs.add("plain", copy.deepcopy(CONFIGS["plain"]), data=[{"input_ids": ids, "labels": ids}] * 2)
    model, real = carrying(), graft.get_peft_model_state_dict
    model.change_timeout = 0.1
    with ThreadPoolExecutor(1) as other:
        for source, change in ((runs, runs.step), (model, lambda: model.delete_adapter("plain"))):
            found = []

            def meanwhile(*args, change=change, found=found):
                found.append(other.submit(change))
                wait(found, timeout=0.5)
                found.append(found[0].done())
                return real(*args)

            monkeypatch.setattr("graft.serving.slots.get_peft_model_state_dict", meanwhile)
            AdapterSlots.of(source, ["plain"])
            if source is runs:
                assert not found[1]
                found[0].result(60)
            else:
                assert found[1] and isinstance(found[0].exception(), graft.InUseError)


def test_answers_while_adapters_come_and_go(model):
    """Mixed batches in two threads, with the logits of each alone, while a third loads and unloads what they use."""
    single = {name: out(model, [name] * len(NAMES)) for name in {*NAMES}}
    held = {name: (model.peft_config[name], graft.get_peft_model_state_dict(model, None, name)) for name in CONFIGS}
    slots, answers, going = AdapterSlots.of(carrying(), max_adapters={1: 1, 4: 2}, gains=True), [], [None, None]
    unanswered = {*CONFIGS}

    def serve():
        try:
            end = time.monotonic() + 60
            for i in count():
                if (i >= 20 and not unanswered) or time.monotonic() > end:
                    break
                here = [*slots.names, BASE]
                pair = min(here, key=lambda name: name not in unanswered), here[i % len(here)]
                names = [pair[row % 2] for row in range(len(NAMES))]
                with suppress(RoutingError):  # it went meanwhile
                    y = out(slots, names)
                    answers.extend((y[row] - single[name][row]).abs().max().item() for row, name in enumerate(names))
                    unanswered.difference_update(names)
        finally:
            going.pop()

    def refill():
        while going:
            for name, (config, tensors) in held.items():
                slots.unload(name)
                slots.load(name, tensors, config=config)

    at_once(serve, serve, refill)
    assert not unanswered and max(answers) < 1e-5


def test_what_slots_cannot_hold_stays_where_it_was():
    model = graft.get_peft_model(models.make("llama"), graft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("heads", graft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    y = out(model.eval(), ["default", "heads", BASE, BASE, "heads"])
    for names, error, text in (
        (None, ConfigError, "'heads' does not fit: its config says modules_to_save"),
        (["other"], AdapterNotFoundError, r"no adapter \[other\]\. Known: \[default, heads\]"),
        ([], AdapterNotFoundError, "to serve"),
    ):
        with pytest.raises(error, match=text):
            AdapterSlots.of(model, names)
    for options, error, text in (
        (dict(max_rank=1), ConfigError, "need max_rank=2"),
        (dict(max_adapters={2: 1, 8: 0}), ConfigError, "max_adapters must be at least 1, got 0"),
        (dict(max_adapters={2: 1}, max_rank=2), ConfigError, "not to slots by rank"),
        (dict(gain=True), TypeError, "gain"),
        (dict(targets=["q_proj"]), TypeError, "targets"),
    ):
        with pytest.raises(error, match=text):
            AdapterSlots.of(model, "default", **options)
    assert torch.equal(out(model, ["default", "heads", BASE, BASE, "heads"]), y)
    embedding = graft.get_peft_model(models.make("llama"), graft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(AdapterKeyError, match=r"no slots for .*embed_tokens"):
        AdapterSlots.of(embedding)
    assert list(embedding.peft_config) == ["default"]
    next(iter(get_registry(model).layers.values())).site.piece = LayerPiece(
        "colwise", None, outputs=Cut(None, 0, 2, 16)
    )
    with pytest.raises(UnsupportedLayerError, match="q_proj' is parallel by the style 'colwise'"):
        AdapterSlots.of(model, "default")
    assert list(model.peft_config) == ["default", "heads"]


def test_what_is_merged_stays_where_it_was():
    model = carrying()
    model.set_adapter("plain")
    model.merge_adapter()
    y = models.output(model, models.inputs("llama", 5))
    with pytest.raises(ConfigError, match=r"\[plain\] are merged .* unmerge_adapter"):
        AdapterSlots.of(model, "scales", gains=True)
    assert torch.equal(models.output(model, models.inputs("llama", 5)), y)


def test_adapters_stay_where_there_is_no_memory_for_slots(monkeypatch):
    model, ids = carrying(), models.inputs("llama", 5)
    y = models.output(model, ids)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr("graft.serving.slots.SlotLayer", full)
        AdapterSlots.of(model, gains=True)
    assert [*model.peft_config] == [*CONFIGS] and torch.equal(models.output(model, ids), y)
    assert AdapterSlots.of(model, gains=True).names == [*CONFIGS]


def test_slots_come_where_the_adapters_are_and_at_no_module_of_that_name_elsewhere():
    net = torch.nn.Module()
    net.fc, net.block = torch.nn.Linear(4, 4), torch.nn.ModuleDict({"fc": torch.nn.Conv1d(4, 4, 1)})
    net.forward = lambda x: net.block.fc(net.fc(x).T).T
    model = models.disturb(graft.get_peft_model(net, graft.LoraConfig(r=2, target_modules="fc")), 0.3)
    x = torch.linspace(-1, 1, 12).view(3, 4)
    y = model.eval()(x)
    slots = AdapterSlots.of(model)
    assert list(slots.layers) == ["fc"]
    assert_close(slots(x, adapter_names="default"), y)


def test_vectors_of_other_shapes_are_refused(model):
    slots = filled(model)
    tensors = {k: v.clone() for k, v in graft.get_peft_model_state_dict(model, None, "scales").items()}
    key = next(k for k in tensors if "v_proj" in k)
    with pytest.raises(AdapterKeyError, match=r"'x' does not fit: .*ia3_l' is .*, which should be"):
        slots.load("x", tensors | {key: tensors[key].mT.contiguous()}, config=model.peft_config["scales"])
    lacking = {k: v for k, v in tensors.items() if k != key}
    with pytest.raises(AdapterKeyError, match="'x' does not fit: the given state dict lacks"):
        slots.load("x", lacking, config=model.peft_config["scales"])
    assert "x" not in slots
