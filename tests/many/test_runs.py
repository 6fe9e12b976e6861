# SPDX-License-Identifier: Apache-2.0
"""Runs together: each as alone, what ends them, what is refused, what failures leave."""

from __future__ import annotations

import copy
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import StringIO

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import LlamaConfig, LlamaForSequenceClassification

import graft
from graft.core.errors import AdapterNameError, AdapterNotFoundError, ConfigError, NoMatchingPeftModuleError
from graft.many import MultiTrain
from graft.many.joint import ForwardArguments, RunBatch, divide_passes, join_batches
from tests import models
from tests.many.alone import BITS, SPECS, Spec, alone, as_alone, batches, lora, one_run, same, started, tiny, train


def together(specs, steps=12, **options):
    runs = MultiTrain(tiny(), **options)
    for name, spec in specs.items():
        runs.add(name, spec.config, **spec.options(steps))
    return runs.run()


@pytest.mark.parametrize("at_once", [4096, 40], ids=["one pass", "several"])
def test_each_is_as_alone(at_once):
    """Ranks, targets, rates, lengths of rows, accumulation, clipping and schedules beside each other."""
    runs = together(SPECS, at_once=at_once)
    for name, spec in SPECS.items():
        parameters, losses = alone(spec, 12)
        assert as_alone(runs[name].parameters, parameters), name
        if spec.accumulate == 1:
            assert [point.loss for point in runs[name].curve] == pytest.approx(losses, rel=0.0 if BITS else 1e-4), name


def test_each_has_the_loss_that_its_adapter_adds():
    routed = dict(target_modules=["q_proj", "up_proj"], router_loss=True, router_aux_loss_coef=0.5)
    mixture = partial(graft.MoeLoraConfig, **routed)
    specs = {
        "few": Spec(mixture(r=2, num_experts=3)),
        "many": Spec(mixture(r=4, num_experts=8), 3e-3, 1, accumulate=2),
        "masked": Spec(mixture(r=2, num_experts=4, top_k=1), seed=2, padding=2),
    }
    runs = together(specs, 6)
    for name, spec in specs.items():
        parameters, losses = alone(spec, 6)
        for found, wanted in zip(runs[name].parameters, parameters):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        if spec.accumulate == 1:
            assert [point.loss for point in runs[name].curve] == pytest.approx(losses, rel=1e-4), name


def test_which_batches_share_a_pass():
    arguments = {exact: ForwardArguments.read_signature(tiny(), exact) for exact in (True, False)}
    parts = [RunBatch(name, next(iter(spec.data()))) for name, spec in SPECS.items()]
    found = {e: [{p.name for p in group} for group in divide_passes(parts, a, 4096)] for e, a in arguments.items()}
    assert found[True] == [{"plain", "wide", "gathers", "timed", "drops"}, {"long"}, {"masked", "too"}]
    assert found[False] == [{*SPECS}]
    assert [len(group) for group in divide_passes(parts, arguments[False], 4 * 12 * 3)] == [3, 3, 2]


def test_batches_are_grouped_without_a_look_at_values_on_a_device():
    def part(name, masked):
        batch = {"input_ids": torch.zeros(2, 6, dtype=torch.long), "logits_to_keep": torch.tensor(3)}
        batch |= {"attention_mask": torch.ones(2, 6)} if masked else {}
        return RunBatch(name, {k: v.to("meta") for k, v in batch.items()})  # whose values nobody can read

    own = [part("u", True), part("v", True), part("w", False)]
    for other in own:
        del other.batch["logits_to_keep"]
    own.append(part("x", True))
    passes = divide_passes(own, ForwardArguments.read_signature(tiny()), 4096)
    assert [[p.name for p in group] for group in passes] == [["u", "v"], ["w"], ["x"]]


class Seeing(nn.Module):
    def forward(self, pixel_values, input_ids, attention_mask=None):
        return input_ids


def test_the_mask_of_a_batch_without_one_is_of_its_tokens():
    """Where others of the pass have one; pictures may stand before the tokens."""
    pixels, ids = torch.zeros(2, 3, 8, 8), torch.ones(2, 5, dtype=torch.int64)
    own = [RunBatch("u", {"pixel_values": pixels, "input_ids": ids}),
           RunBatch("v", {"pixel_values": pixels, "input_ids": ids,
                           "attention_mask": torch.ones_like(ids)})]  # fmt: skip
    arguments = ForwardArguments.read_signature(Seeing())
    assert divide_passes(own, arguments, 4096) == [own]
    batch, cut = join_batches(own, arguments)
    assert batch["attention_mask"].shape == (4, 5) and cut.lengths == [5, 5]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x, scales):
        return self.lin(x) * torch.tensor(scales, dtype=torch.float32).view(len(x), -1).sum(1, keepdim=True)


@pytest.mark.parametrize("scales", [lambda by: [2.0, 1.0, 1.0], lambda by: np.r_[np.ones(1000), by, np.ones(1000)]])
def test_arguments_that_are_no_tensors_stay_with_their_batch(scales):
    """A list may have an item per row; the text of an array leaves its numbers out."""
    found = []
    for company in (("one",), ("two",), ("one", "two")):
        with models.seeded(0):
            runs, x = MultiTrain(Scaled()), torch.randn(3, 4)
        for name in company:
            data = [{"x": x, "scales": scales({"one": 1.0, "two": 5.0}[name])}]
            runs.add(name, lora(target_modules=["lin"]), data=data, loss=lambda output, batch: output.square().mean())
        found.append({run.name: run.curve for run in runs.run().list_runs()})
    assert found[2] == found[0] | found[1]


def test_padded_to_any_length_it_is_close():
    specs = {name: spec for name, spec in SPECS.items() if not spec.config.lora_dropout}
    runs = together(specs, exact=False)
    for name, spec in specs.items():
        for found, wanted in zip(runs[name].parameters, alone(spec, 12)[0]):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pad", [0, 2])
def test_rows_that_are_padded_keep_their_last_token(pad):
    """A classifier takes the last one that is not the model's own padding."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_labels=3)
    with models.seeded(0):
        base = LlamaForSequenceClassification(LlamaConfig(vocab_size=models.VOCAB, pad_token_id=pad, **sizes)).eval()
    found = []
    for company in (("short",), ("short", "longer")):
        runs = MultiTrain(copy.deepcopy(base), exact=False)
        for name in company:
            ids = [batch["input_ids"][:, : 5 if name == "short" else 7] for batch in batches(3)]
            runs.add(name, lora(r=4), data=[{"input_ids": i, "labels": torch.tensor([0, 1, 2, 0])} for i in ids])
        runs.run()
        found.append([point.loss for point in runs["short"].curve])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_diverging_run_is_evicted_and_the_others_do_not_see_it():
    def diverge(output, batch):
        loss = output["logits"].square().mean()
        return loss / 0.0 if len(runs["bad"].curve) == 3 else loss

    runs = MultiTrain(tiny())
    spec = SPECS["plain"]
    runs.add("good", spec.config, **spec.options(8))
    bad = runs.add("bad", lora(r=4), **Spec(None, 1e-2, seed=9).options(8), loss=diverge)
    ended, values = {}, []
    text = r"Run 'bad' failed at step 4: its loss is not finite \(loss inf, lr 0.01\)"
    with pytest.warns(graft.PeftWarning, match=text):
        for step in runs:
            ended |= {name: step.number for name in step.ended}
            values.append([p.detach().clone() for p in bad.parameters])
    assert ended == {"bad": 4, "good": 8}
    assert (bad.state, bad.step, runs["good"].state) == ("failed", 3, "ended")
    assert same(bad.parameters, values[2]) and not same(values[1], values[2])
    assert as_alone(runs["good"].parameters, alone(spec, 8)[0])


def test_a_gradient_that_is_not_finite_evicts():
    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.mean()

        @staticmethod
        def backward(ctx, g):
            return torch.full((4, 7, models.VOCAB), float("nan"))

    runs = MultiTrain(tiny())
    run = runs.add("x", lora(), data=batches(), loss=lambda output, _: Infinite.apply(output.logits), steps=3)
    before = [p.detach().clone() for p in run.parameters]
    with pytest.warns(graft.PeftWarning, match="its gradient is not finite"):
        runs.run()
    assert run.step == 0 and same(run.parameters, before)


def test_how_runs_end():
    runs = MultiTrain(tiny())
    data = batches(3)
    once = runs.add("once", lora(), data=data)
    early = runs.add("early", lora(), data=iter(data), steps=5)
    told = runs.add("told", lora(), data=data, steps=50, stop=lambda run: run.step == 4)
    anew = runs.add("anew", lora(), data=data, steps=7)
    with pytest.warns(graft.PeftWarning, match="Run 'early': its data ended at step 3, before 5 steps"):
        runs.run()
    states = {run.name: (run.step, run.state) for run in (once, early, told, anew)}
    assert states == {"once": (3, "ended"), "early": (3, "ended"), "told": (4, "stopped"), "anew": (7, "ended")}
    assert same(once.parameters, early.parameters)


def no_room_on_a_device():
    raise torch.OutOfMemoryError("there is none")


def no_room_on_a_cpu():
    torch.empty(1 << 50)  # torch raises what it raises


def no_room_in_python():
    bytearray(1 << 60)


ROOMS = pytest.mark.parametrize("ends", [no_room_on_a_device, no_room_on_a_cpu, no_room_in_python])


def crowded(ends):
    """Return a base in which `ends`, given its input, is called for more than nine rows; and the rows of its passes."""
    base, passes, kept = tiny(), [], []
    real = base.model.layers[1].forward

    def forward(x, *args, **kwargs):
        assert not any(ref() is not None for ref in kept), "of passes that had no room"
        passes.append(len(x))
        if len(x) > 9:
            kept.append(weakref.ref(x))
            ends(x)
        return real(x, *args, **kwargs)

    base.model.layers[1].forward = forward
    return base, passes


def trained_as_alone(base, names):
    runs = started(names, 4, base)
    runs.run()
    for name in names:
        assert as_alone(runs[name].parameters, alone(SPECS[name], 4)[0]), name


@ROOMS
def test_memory_that_ends_halves_the_batch_and_changes_nothing(ends):
    base, passes = crowded(lambda _: ends())
    trained_as_alone(base, SPECS)
    assert max(passes[:8]) > 9 >= max(passes[8:])  # it has learnt


def test_memory_that_ends_in_the_backward_pass():
    """What the pass has kept is gone when a half of it runs."""
    base, passes = crowded(lambda x: x.register_hook(lambda _: no_room_on_a_cpu()))
    trained_as_alone(base, ["plain", "wide", "drops", "gathers"])
    assert passes[0] == 16 and max(passes[3:]) <= 9


@ROOMS
def test_a_batch_that_alone_takes_too_much_ends_its_run(ends):
    base = tiny()
    real = base.model.layers[0].forward

    def forward(x, *args, **kwargs):
        if x.shape[1] > 10:
            ends()
        return real(x, *args, **kwargs)

    base.model.layers[0].forward = forward
    runs = started(("plain", "long"), 3, base)
    with pytest.warns(graft.PeftWarning, match=r"Run 'long' failed.*one batch needs more memory.*accumulate"):
        runs.run()
    assert runs["long"].state == "failed" and as_alone(runs["plain"].parameters, alone(SPECS["plain"], 3)[0])


@ROOMS
def test_memory_that_ends_at_a_look_at_validation_data(ends):
    def looked(base, data):
        runs = MultiTrain(base)
        for i in range(4):
            runs.add(f"r{i}", lora(init_lora_weights=False), data=data, seed=i)
        return runs.evaluate(runs.names, data)

    base, passes = crowded(lambda _: ends())
    found = looked(base, batches(2))
    assert found == looked(tiny(), batches(2)) and len({*found.values()}) == 4
    assert passes[0] > 9 >= max(passes[2:])
    big = [{k: torch.cat([v] * 3) for k, v in batch.items()} for batch in batches(1)]
    with pytest.raises((RuntimeError, MemoryError)):  # one batch alone
        looked(crowded(lambda _: ends())[0], big)


def test_a_failed_add_of_an_adapter_that_is_there():
    model = graft.get_peft_model(tiny(), lora(), "there")
    for trains in (False, True):
        model.set_requires_grad("there", trains)
        runs = MultiTrain(model)
        with pytest.raises(graft.ConfigError, match="optimizer must make one"):
            runs.add("there", data=batches(1), optimizer=lambda _: None)
        assert {p.requires_grad for _, p in model.adapter_parameters("there")} == {trains}


def test_a_look_at_runs_that_are_not_there():
    runs = MultiTrain(tiny())
    assert runs.evaluate([], batches(1)) == {}
    with pytest.raises(graft.AdapterNotFoundError, match="There is no run 'other'"):
        runs.evaluate(["other"], batches(1))
    runs.add("x", lora(), data=batches(1))
    assert runs.evaluate(["x", "x"], batches(2)) == runs.evaluate(["x"], batches(2))


def test_rounds_between_saves(tmp_path):
    runs = MultiTrain(tiny())
    run = runs.add("x", lora(), data=batches(1))
    with pytest.raises(ConfigError, match="every must be a positive int, got 0"):
        runs.run(save=tmp_path, every=0)
    assert not run.step


def test_what_a_method_reads_goes_with_it():
    """Else batches of other runs would hand it on to a base that does not know it."""
    runs = MultiTrain(tiny())
    before = runs.arguments
    with pytest.raises(graft.ConfigError, match="optimizer must make one"):
        runs.add("tasks", graft.PolyConfig(target_modules=["q_proj"]), data=batches(1), optimizer=lambda _: None)
    assert runs.arguments == before
    runs.add("tasks", graft.PolyConfig(target_modules=["q_proj"]), data=batches(1))
    assert runs.arguments.names - before.names == {"task_ids"}
    runs.remove("tasks")
    assert runs.arguments == before


def packed(seed, *lengths):
    """Batches of rows of several texts, which positions keep apart."""
    positions = torch.cat([torch.arange(n) for n in lengths]).repeat(4, 1)
    with models.seeded(seed):
        ids = torch.randint(3, models.VOCAB, (4, *positions.shape))
    return [{"input_ids": i, "labels": i, "position_ids": positions, "use_cache": False} for i in ids]


@pytest.mark.parametrize("exact", [True, False])
def test_packed_rows(exact):
    """They share a pass with packed rows of the same length: beside others bits differ, and padding would have a mask,
    with which texts see each other."""
    data = {"two": packed(1, 7, 5), "more": packed(2, 3, 4, 5), "long": packed(3, 7, 9), "one": packed(4, 12)}
    runs = MultiTrain(tiny(), exact=exact)
    for i, (name, own) in enumerate(data.items()):
        runs.add(name, lora(r=4), data=own, optimizer=partial(torch.optim.AdamW, lr=1e-2), seed=i)
    parts = [RunBatch(name, own[0]) for name, own in data.items()]
    shared = [[part.name for part in group] for group in divide_passes(parts, runs.arguments, 4096)]
    assert shared == [["two", "more"], ["long"], ["one"]]
    runs.run()
    for i, (name, own) in enumerate(data.items()):
        with models.seeded(i):
            parameters = train(graft.get_peft_model(tiny(), lora(r=4)), own, partial(torch.optim.AdamW, lr=1e-2))
        assert as_alone(runs[name].parameters, parameters), name


def test_adapters_are_ordinary_folders(tmp_path):
    spec = SPECS["wide"]
    runs = together({"wide": spec, "plain": SPECS["plain"]}, 3)
    runs["wide"].save_pretrained(tmp_path / "out")
    batch = models.inputs("llama")
    wanted = models.output(runs.model.eval(), batch | {"adapter_names": ["wide"] * 3})
    assert runs.unload() is runs.base and not any("lora" in name for name, _ in runs.base.named_modules())
    model = graft.PeftModel.from_pretrained(tiny(), str(tmp_path / "out"))
    torch.testing.assert_close(models.output(model, batch), wanted)


def test_a_torch_file_holds_one_adapter(tmp_path):
    """Runs of one shape lie in one memory, and torch writes that of a tensor as a whole."""
    runs = MultiTrain(tiny())
    for name in ("x", "y", "z"):
        runs.add(name, lora(), data=batches(2))
    runs.step()
    runs.model.save_pretrained(tmp_path, selected_adapters=["y"], safe_serialization=False)
    tensors = torch.load(tmp_path / "y" / "adapter_model.bin", weights_only=True).values()
    assert same(tensors, runs["y"].parameters)
    assert len(tensors) == 8 and all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


def test_a_run_that_is_removed_leaves_the_others_as_they_train():
    runs = started(("plain", "wide"), 6)
    for step in runs:
        if step.number == 3:
            assert runs.remove("plain").step == 3
    assert runs.names == ["wide"] == list(runs.model.peft_config)
    assert as_alone(runs["wide"].parameters, alone(SPECS["wide"], 6)[0])


def test_adapters_of_a_peft_model():
    with models.seeded(1):
        model = graft.get_peft_model(tiny(), lora(r=4))
        model.add_adapter("other", lora(r=4))
    runs = MultiTrain(model)
    run = runs.add("other", data=batches(2))
    runs.add("third", lora(r=2), data=batches(2))
    before = [p.detach().clone() for p in run.parameters]
    runs.run()
    assert runs.model is model and run.step == 2 and not same(run.parameters, before)
    with pytest.raises(AdapterNameError, match="leave its config out"):
        runs.add("default", lora(), data=[])
    with pytest.raises(AdapterNotFoundError, match="no config"):
        runs.add("fourth", data=[])


def test_several_methods_on_one_model():
    runs = MultiTrain(tiny())
    runs.add("low", lora(), data=batches(3))
    runs.add("ia3", graft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), data=batches(3))
    first = {name: [p.detach().clone() for p in runs[name].parameters] for name in runs.names}
    runs.run()
    assert all(not same(runs[name].parameters, first[name]) for name in first)


# heads and losses


@pytest.mark.parametrize("base, labels", [("bert-seq", 3), ("bert-tok", 4)])
def test_heads_of_other_sizes(base, labels):
    """A classifier's own loss, of its own labels, beside wider ones."""
    batch = dict(models.inputs(base, 4))
    shape = (4,) if base == "bert-seq" else batch["input_ids"].shape
    with models.seeded(0):
        data = [batch | {"labels": torch.randint(0, 2, shape)} for _ in range(3)]
    task = "SEQ_CLS" if base == "bert-seq" else "TOKEN_CLS"
    runs = MultiTrain(models.make(base))
    make = lambda: graft.LoraConfig(task_type=task, target_modules=["query"])
    for name, n in ("own", labels), ("wide", 9):
        with models.seeded(2):
            head = nn.Linear(24, n)
        runs.add(name, make(), data=data, heads={"classifier": head}, optimizer=partial(torch.optim.SGD, lr=0.1))
    runs.run()
    with models.seeded(2):
        head = nn.Linear(24, labels)
    with models.seeded(0):
        model = graft.get_peft_model(models.make(base), make(), heads={"classifier": head})
    parameters = train(model, data, partial(torch.optim.SGD, lr=0.1))
    for found, wanted in zip(runs["own"].parameters, parameters):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("base, more", [
    ("bert-qa", {"start_positions": [1, 2, 0, 3], "end_positions": [2, 3, 1, 3]}),
    ("t5", {"labels": [[5, 6, 7, 1, -100]] * 4}), ("gpt2", {"labels": [[3, 4, 5, 6, 7, 8, 9]] * 4}),
])  # fmt: skip
def test_the_loss_is_the_models_own(base, more):
    batch = {k: v for k, v in models.inputs(base, 4).items() if k != "decoder_input_ids"}
    batch |= {k: torch.tensor(v) for k, v in more.items()}
    long = {k: torch.cat([v, v], 1) if v.dim() == 2 else v for k, v in batch.items()}
    targets = {"bert-qa": ["query"], "t5": ["q"], "gpt2": ["c_attn"]}[base]
    make = lambda: graft.LoraConfig(target_modules=targets, fan_in_fan_out=base == "gpt2")
    runs = MultiTrain(models.make(base))
    runs.add("short", make(), data=[batch])
    runs.add("longer", make(), data=[long])
    step = runs.step()
    wanted = {"short": models.make(base)(**batch).loss.item(), "longer": models.make(base)(**long).loss.item()}
    assert step.losses == pytest.approx(wanted, rel=1e-6)


def test_a_plain_module_needs_a_loss():
    data = [{"x": torch.randn(4, 4, 10), "y": torch.randn(4, 4, 5)}] * 3
    config = graft.LoraConfig(target_modules=["lin0"])
    runs = MultiTrain(models.make("mlp"))
    with pytest.raises(ConfigError, match=r"Run 'a1': MLP has no loss.*loss\(output, batch\)"):
        runs.add("a1", config, data=data)
    assert runs.model is None and not any("lora" in name for name, _ in runs.base.named_modules())
    runs.add("a1", config, data=data, loss=lambda output, batch: (output - batch["y"]).square().mean())
    losses = [step.losses for step in runs]
    assert losses == [*({"a1": point.loss} for point in runs["a1"].curve), {}]
    assert len(runs["a1"].curve) == 3


@pytest.mark.parametrize(
    "base, missing", [("llama", "no labels"), ("bert-qa", "no start_positions and no end_positions")]
)
def test_a_batch_without_what_its_loss_is_made_of(base, missing):
    runs = MultiTrain(models.make(base))
    config = graft.LoraConfig(target_modules="all-linear")
    for name in "a1", "b1":
        runs.add(name, config, data=[{"input_ids": torch.arange(3, 7)[None]}])
    with pytest.raises(ConfigError, match=rf"Run 'a1': a batch has {missing}.*loss\(output, batch\)"):
        runs.step()


@pytest.mark.parametrize("loss, text", [
    (lambda output, batch: output.logits.mean().item(), "its loss is -?[0-9.e-]+\\. Return a mean"),
    (lambda output, batch: output.logits.mean().detach(), "no gradient leads from its loss"),
    (lambda output, batch: output.logits, r"its loss has the shape \(4, 7"),
])  # fmt: skip
def test_a_loss_that_is_none(loss, text):
    """Also beside a run whose loss has a gradient."""
    runs = MultiTrain(tiny())
    runs.add("a1", lora(), data=batches(2), loss=loss)
    runs.add("b1", lora(), data=batches(2))
    with pytest.raises(ConfigError, match=f"Run 'a1': {text}"):
        runs.step()
    runs.remove("a1")
    assert runs.run()["b1"].step == 2


# validation


def test_validation_does_not_disturb_training():
    runs = MultiTrain(tiny())
    spec = SPECS["plain"]
    full, other = batches(2)
    valid = [full, {name: t[:2] for name, t in other.items()}]  # rows count the same, and not batches
    run = runs.add("plain", spec.config, **spec.options(6), valid=valid, every=2)
    runs.run()
    assert [look.step for look in run.valid] == [2, 4, 6]
    assert as_alone(run.parameters, alone(spec, 6)[0])
    model = runs.model.eval()
    with torch.no_grad():
        wanted = [model(**batch).loss.item() for batch in valid]
    assert run.valid[-1].loss == pytest.approx((4 * wanted[0] + 2 * wanted[1]) / 6)
    assert abs(wanted[0] - wanted[1]) > 1e-3


# refused


@pytest.mark.parametrize("options, text", [
    ({"lr": 1e-3}, r"add\(\) takes no 'lr'\. An optimizer gets its arguments by optimizer=partial"),
    ({"learning_rate": 1, "max_steps": 1}, r"'learning_rate' \(here 'lr'\), 'max_steps' \(here 'steps'\)"),
    ({"valid": 3}, "Run 'x': valid must be batches, such as a DataLoader, got 3"),
    ({"trainer": 3, "data": None}, "Run 'x': trainer must be a Trainer of transformers, got 3"),
    ({"data": 3}, "data must be an iterable"),
    ({"steps": 0}, "steps must be a positive int"),
    ({"accumulate": 1.5}, "accumulate must be a positive int"),
    ({"loss": 3}, "loss must be a function"),
    ({"stop": 2}, "stop must be a function"),
    ({"schedule": "cosine"}, "schedule must be a function"),
    ({"optimizer": lambda p: torch.optim.SGD(p[:1], lr=0.1)}, "its SGD leaves out [0-9]+ of [0-9]+ parameters"),
    ({"clip": -1.0}, "clip must be a positive"),
    ({"optimizer": "adamw"}, "optimizer must make one of its parameters.* got 'adamw'"),
    ({"seed": "x"}, "seed must be an int"),
    ({"every": 2}, "every=2 needs validation data to iterate again. Pass a list"),
    ({"every": 2, "valid": iter(())}, "every=2 needs validation data to iterate again"),
    ({"optimizer": lambda p: None}, "optimizer must make one of its parameters"),
    ({"optimizer": partial(torch.optim.LBFGS, lr=1)}, "LBFGS needs more than gradients"),
    ({"schedule": ReduceLROnPlateau}, "ReduceLROnPlateau needs more"),
    ({"config": lora(target_modules=["nothing"])}, "nothing"),
    ({"config": graft.PromptTuningConfig(num_virtual_tokens=2)}, "PROMPT_TUNING puts a prompt before the input"),
])  # fmt: skip
def test_bad_settings_change_nothing(options, text):
    runs = MultiTrain(tiny())
    for first in (True, False):
        given = {"config": lora(), "data": batches(1)} | options
        names = [n for n, _ in runs.base.named_modules()]
        errors = (TypeError, ConfigError, NoMatchingPeftModuleError)
        with pytest.raises(TypeError if {"lr", "learning_rate"} & {*options} else errors, match=text):
            runs.add("x", given.pop("config"), **given)
        assert [n for n, _ in runs.base.named_modules()] == names and "x" not in runs
        if first:
            runs.add("there", lora(), data=batches(1))


def test_two_threads():
    """The second is told, and does not disturb the first."""
    runs, data = MultiTrain(tiny()), batches(1)

    def loss(output, batch):
        with ThreadPoolExecutor(1) as other:
            for call in (runs.step, lambda: runs.evaluate(["a1"], data), lambda: runs.add("b1", lora(), data=data)):
                with pytest.raises(RuntimeError, match="Another thread has the runs a1"):
                    other.submit(call).result()
        with pytest.raises(RuntimeError, match="A step is under way"):
            runs.step()
        assert runs.model.training
        return output.logits.square().mean()

    def stop(run):
        with pytest.raises(RuntimeError, match="let its `stop` return"):
            runs.step()
        return runs.evaluate(["a1"], data)["a1"] < 0

    runs.add("a1", lora(), data=data, loss=loss, steps=2, stop=stop)
    runs["a1"].validation_loss = lambda output, batch: output.logits.square().mean()
    runs.run()
    assert runs["a1"].step == 2


def test_unload_leaves_the_mode_that_was():
    base = tiny().eval()
    base.get_input_embeddings().train()
    runs = MultiTrain(base)
    runs.add("a1", lora(), data=batches(1), steps=1)
    runs.run()
    assert runs.unload() is base and not base.training and base.get_input_embeddings().training


def test_two_runs_of_one_name():
    runs = MultiTrain(tiny())
    runs.add("a1", lora(), data=batches(1))
    with pytest.raises(AdapterNameError, match=r"needs a non-empty string as its name, got LoraConfig\(.{,190}…"):
        runs.add(lora(), data=batches(1))
    with pytest.raises(AdapterNameError, match="There is a run 'a1' already"):
        runs.add("a1", lora(), data=batches(1))
    with pytest.raises(AdapterNotFoundError, match=r"no run 'b1'\. Runs: a1"):
        runs["b1"]


@pytest.mark.parametrize("data, text", [
    ([], "its data holds no batch"),
    ([torch.ones(2)], "a batch must be a mapping"),
    ([*batches(1), None, *batches(1)], "a batch must be a mapping"),
    ([{"other": torch.ones(2)}], "the model takes"),
    ([{"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(3, 3)}], "one row per sample"),
])  # fmt: skip
def test_bad_batches(data, text):
    runs = one_run(data=data)
    with pytest.raises(ConfigError, match=f"Run 'x': .*{text}"):
        runs.run()


def test_a_base_with_dropout_of_its_own():
    base = models.make("bert-seq")
    base.config.hidden_dropout_prob = base.dropout.p = 0.5
    with pytest.raises(ConfigError, match=r"'dropout'.*base_in_eval=True"):
        MultiTrain(base)
    batch = dict(models.inputs("bert-seq", 4), labels=torch.tensor([0, 1, 2, 0]))
    config = graft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], lora_dropout=0.5)
    runs = MultiTrain(base, base_in_eval=True)
    runs.add("x", config, data=[batch] * 2, optimizer=partial(torch.optim.SGD, lr=0.0))
    runs.step()
    dropping = [m for m in base.modules() if isinstance(m, nn.Dropout) and m.training]
    assert {m.p for m in dropping} == {0.5} and base.dropout not in dropping and len(dropping) == 2


class Normalized(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8, **options)

    def forward(self, x):
        return self.norm(self.first(x))


def test_a_base_whose_rows_depend_on_each_other():
    with pytest.raises(ConfigError, match=r"'norm'.*base_in_eval=True"):
        MultiTrain(Normalized())
    with pytest.raises(ConfigError, match="'norm'"):
        MultiTrain(Normalized(track_running_stats=False), base_in_eval=True)
    runs = MultiTrain(Normalized(), base_in_eval=True)
    data, config = [{"x": torch.ones(4, 4)}] * 2, graft.LoraConfig(target_modules=["first"])
    runs.add("u", config, data=data, loss=lambda y, batch: y.square().mean())
    assert runs.run()["u"].step == 2 and not runs.base.norm.training
    router = Normalized()
    router.norm.expert_capacity = 8
    with pytest.raises(ConfigError, match=r"'norm\.expert_capacity'"):
        MultiTrain(router, base_in_eval=True)


def test_the_table_says_how_runs_stand():
    from rich.console import Console

    from graft.many.table import Progress

    runs = together({"plain": SPECS["plain"]}, 3)
    console, now = Console(record=True, width=120, file=StringIO()), [0.0]
    with Progress(runs.list_runs, console, lambda: now[0]) as shown:
        shown.update()
        assert console.export_text(clear=False) == ""
        now[0] = 31.0
        shown.update()
        said = console.export_text(clear=False)
    assert "plain" in said and "3/3" in said and f"{runs['plain'].curve[-1].loss:.4f}" in said and "ended" in said
