# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA over a whole training run: equal to PEFT's, its budget kept, and nobody forgets the allocator in silence."""

from __future__ import annotations

import copy
import textwrap
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import graft
from graft.core.errors import ConfigError
from graft.methods.adalora.adalora import AdaLoRA
from graft.methods.adalora.allocator import Allocator, find_rank_budget
from graft.train import adalora_callback, allocate_on_step
from tests.compat.test_compat import run
from tests.leaves_out import WHOLE_GRAPHS
from tests.looks import layers
from tests.models import adapted
from tests.raised import refuses, warns

STEPS = 12
CONFIG = dict(target_modules=["a", "b", "c"], init_r=5, target_r=2, total_step=STEPS, tinit=2, tfinal=3, lora_alpha=3)


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 9), nn.Linear(9, 7), nn.Linear(7, 4)

    def forward(self, x, labels=None):
        y = self.c(self.b(self.a(x).relu()).tanh())
        return Output(y, None if labels is None else (y - labels).square().mean())


def data():
    g = torch.Generator().manual_seed(3)
    return torch.randn(STEPS, 16, 6, generator=g), torch.randn(STEPS, 16, 4, generator=g)


def base():
    torch.manual_seed(0)
    return Net()


def with_adalora(lib, **changes):
    torch.manual_seed(1)
    return lib.get_peft_model(base(), lib.AdaLoraConfig(**{**CONFIG, **changes}))


def trained(lib, **changes):
    model = with_adalora(lib, **changes)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    call = model.base_model if lib is peft else model  # PEFT adds its loss one level below
    losses = []
    for step, (x, y) in enumerate(zip(*data())):
        loss = call(x, labels=y).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize(
    "changes", [{}, {"deltaT": 3}, {"orth_reg_weight": 0.1}, {"beta1": 0.5, "beta2": 0.9}], ids=str
)
def test_a_training_run_is_pefts(changes, tmp_path):
    (ours, losses), (theirs, expected) = trained(graft, **changes), trained(peft, **changes)
    assert losses == pytest.approx(expected, abs=1e-5)
    x = data()[0][0]
    # Adam divides by the size of a gradient, so rounding in tiny ones shows
    torch.testing.assert_close(ours(x).logits, theirs(x).logits, atol=5e-4, rtol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / w / "adapter_model.safetensors") for w in ("ours", "theirs"))
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    for lib in (graft, peft):
        for where, model in (("ours", ours), ("theirs", theirs)):
            loaded = lib.PeftModel.from_pretrained(base(), tmp_path / where)
            torch.testing.assert_close(loaded(x).logits, model(x).logits, atol=1e-5, rtol=1e-5)


def test_pruned_values_stay_away_and_merging_agrees():
    model, _ = trained(graft)
    kept = model.peft_config["default"].rank_pattern
    assert sum(map(sum, kept.values())) == 3 * CONFIG["target_r"]
    for key, layer in layers(model).items():
        mask = torch.tensor(kept[f"{key}.lora_E.default"])
        assert (layer.lora_E["default"][~mask] == 0).all() and (layer.lora_E["default"][mask] != 0).all()
    x = data()[0][0]
    expected = model(x).logits
    torch.testing.assert_close(model.merge_and_unload()(x).logits, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(0, 20), st.integers(1, 50), st.integers(0, 20), st.integers(1, 7), st.data())
def test_the_budget_is_kept_and_falls(start, tinit, middle, tfinal, delta_t, more):
    target = more.draw(st.integers(1, start))
    cfg = SimpleNamespace(tinit=tinit, tfinal=tfinal, total_step=tinit + middle + tfinal, deltaT=delta_t)
    budgets = [find_rank_budget(step, start, target, cfg)[0] for step in range(cfg.total_step + 1)]
    assert all(target <= b <= start for b in budgets)
    assert budgets == sorted(budgets, reverse=True) and budgets[-1] == target
    assert set(budgets[: tinit + 1]) == {start}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_an_allocation_never_keeps_more_than_its_budget(layers, r, more):
    keep = more.draw(st.integers(0, layers * r))
    seed = more.draw(st.integers(0, 1000))
    g = torch.Generator().manual_seed(seed)
    methods = {}
    allocator = Allocator(SimpleNamespace(beta1=0.85, beta2=0.85))
    for i in range(layers):
        m = SimpleNamespace()
        for name, shape in dict(lora_A=(r, 3), lora_B=(4, r), lora_E=(r, 1)).items():
            p = nn.Parameter(torch.randn(shape, generator=g))
            p.grad = torch.randn(shape, generator=g)
            setattr(m, name, p)
            allocator.importance.update(f"{i}.{name}", p)
        methods[str(i)] = m
    masks = allocator.allocate(methods, keep)
    assert sum(map(sum, masks.values())) <= keep
    for key, m in methods.items():
        assert (m.lora_E[~torch.tensor(masks[key])] == 0).all()


def step(model, optimizer, i=0):
    x, y = (d[i] for d in data())
    model(x, labels=y).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:AdaLoRA adapter")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=WHOLE_GRAPHS)])
def test_who_computes_the_loss_asks_for_its_part(compiled, monkeypatch):
    """With the values and gradients that the model's own loss has; who does not ask pays nothing."""
    model, computed, real = with_adalora(graft).train(), [], AdaLoRA.distances
    monkeypatch.setattr(AdaLoRA, "distances", lambda self: computed.append(self.site.key) or real(self))
    call = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    x, y = (t[0] for t in data())
    call(x)
    assert computed == []
    call(x)
    assert model.auxiliary_loss() > 0 and model.auxiliary_loss("default") > 0 and computed == ["a", "b", "c"]
    with torch.no_grad():
        call(x)
        assert model.auxiliary_loss() == 0.0
    losses = call(x, labels=y).loss, (call(x).logits - y).square().mean() + model.auxiliary_loss()
    assert torch.equal(*losses)
    gradients = [torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]) for loss in losses]
    assert all(map(torch.equal, *gradients))


@pytest.mark.differs("AdaLoRA without `update_and_allocate`")
def test_a_forgotten_allocator_is_noticed_at_the_second_step():
    model = with_adalora(graft)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step(model, optimizer)
    warns(graft.PeftWarning, r"update_and_allocate\(\)", step, model, optimizer, 1)


def test_the_optimizer_hook_allocates_at_every_step(recwarn):
    model = with_adalora(graft)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    handle = allocate_on_step(optimizer, model)
    for i in range(STEPS):
        step(model, optimizer, i)
    handle.remove()
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 3 * CONFIG["target_r"]
    assert not [w for w in recwarn if issubclass(w.category, graft.PeftWarning)]


def test_what_allocates_is_found_in_wrappers_or_missed_at_once():
    model = with_adalora(graft)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    handle = allocate_on_step(optimizer, nn.DataParallel(model))
    step(model, optimizer)
    handle.remove()
    other = graft.get_peft_model(nn.Sequential(nn.Linear(3, 3)), graft.LoraConfig(target_modules=["0"]))
    for make in adalora_callback, partial(allocate_on_step, optimizer):
        refuses(ConfigError, "with the AdaLoRA", make, other)
    assert not optimizer._optimizer_step_post_hooks


def test_the_callback_allocates_in_transformers_trainer(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=30, num_labels=2
    )
    adalora = graft.AdaLoraConfig(task_type="SEQ_CLS", init_r=4, target_r=1, total_step=8, tinit=1, tfinal=2)
    model = graft.get_peft_model(BertForSequenceClassification(config), adalora)
    rows = [dict(input_ids=torch.arange(1, 8), labels=i % 2) for i in range(16)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=8,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[adalora_callback(model)]).train()
    masks = model.peft_config["default"].rank_pattern
    assert sum(map(sum, masks.values())) == len(masks) * adalora.target_r


def test_trainer_resumes_and_loads_the_best_once_pruning_has_begun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch
            from peft import AdaLoraConfig, PeftModel, get_peft_model
            from transformers import Trainer, TrainingArguments
            from graft.train import adalora_callback
            from tests import models

            row = {k: v[0] for k, v in models.inputs("bert-seq").items()}
            data = [{**row, "labels": i % 2} for i in range(16)]

            def trainer(**more):
                config = AdaLoraConfig(
                    task_type="SEQ_CLS", init_r=4, target_r=1, total_step=8, tinit=1, tfinal=2, target_modules=["query"]
                )
                model = get_peft_model(models.make("bert-seq"), config)
                arguments = TrainingArguments(
                    sys.argv[1], max_steps=8, per_device_train_batch_size=2, report_to=[], disable_tqdm=True,
                    use_cpu=True, save_steps=4, learning_rate=1e-2, **more,
                )
                callbacks = [adalora_callback(model)]
                return model, Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)

            def logits(model):
                return model.eval()(input_ids=row["input_ids"][None]).logits

            for larger in (True, False):  # one of the two is the first checkpoint
                model, first = trainer(
                    eval_strategy="steps", eval_steps=4, load_best_model_at_end=True,
                    metric_for_best_model="eval_loss", greater_is_better=larger,
                )
                first.train()
                best = PeftModel.from_pretrained(models.make("bert-seq"), first.state.best_model_checkpoint)
                assert torch.allclose(logits(model), logits(best), atol=1e-6)
                model.save_pretrained(f"{sys.argv[1]}/again")
                again = PeftModel.from_pretrained(models.make("bert-seq"), f"{sys.argv[1]}/again")
                assert torch.allclose(logits(again), logits(best), atol=1e-6)

            model, second = trainer()
            second.train(resume_from_checkpoint=f"{sys.argv[1]}/checkpoint-4")
            masks = model.peft_config["default"].rank_pattern
            assert sum(map(sum, masks.values())) <= len(masks) and all(len(mask) == 4 for mask in masks.values())
            """
        )
    )
    run("", str(script), str(tmp_path / "run"), module="graft.compat.peft")


def test_only_one_adapter_trains():
    model = with_adalora(graft)
    before = copy.deepcopy(model.state_dict())
    refuses(ValueError, "supports only 1 trainable adapter", model.add_adapter, "b", graft.AdaLoraConfig(**CONFIG))
    assert model.state_dict().keys() == before.keys()
    model.add_adapter("b", graft.AdaLoraConfig(**CONFIG, inference_mode=True))


@pytest.mark.differs("AdaLoRA: `init_r`, `target_r`, `deltaT` < 1, `tinit`, `tfinal` < 0")
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(tinit=8, tfinal=6), "don't allow for a budgeting phase"),
        (dict(orth_reg_weight=-0.5), "but the value passed is -0.5"),
        (dict(beta1=1.0), "`beta1` must be between 0 and 1"),
        (dict(init_r=0), "`init_r` must be at least 1, got 0"),
        (dict(target_r=0), "`target_r` must be at least 1, got 0"),
        (dict(tinit=-1), "`tinit` must be at least 0, got -1"),
        (dict(tfinal=-2), "`tfinal` must be at least 0, got -2"),
        (dict(deltaT=0), "`deltaT` must be at least 1, got 0"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(changes, text):
    refuses(ValueError, text, graft.AdaLoraConfig, **{**CONFIG, **changes})


def test_a_target_above_the_start_is_said():
    with pytest.warns(UserWarning, match="target_r=8 is more than init_r=5, the rank at the start: nothing will be"):
        graft.AdaLoraConfig(**{**CONFIG, "target_r": 8})


@pytest.mark.differs("AdaLoRA: `update_and_allocate` after `zero_grad`")
def test_allocating_without_gradients_is_refused():
    model = with_adalora(graft)
    with pytest.raises(ValueError, match=r"AdaLoRA adapter 'default' has no gradients.*before zero_grad\(\)"):
        model.base_model.update_and_allocate(0)


@pytest.mark.differs("AdaLoRA: a layer that never had a gradient (an expert without tokens)")
def test_a_layer_that_never_got_a_gradient_is_pruned_first():
    model = with_adalora(graft, target_modules=["a", "b", "c"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for i in range(STEPS):
        x, y = (d[i] for d in data())
        model(x, labels=y).logits.square().mean().backward()  # without the regularisation
        for p in model.base_model.model.b.parameters():
            p.grad = None  # as of an expert that got no token
        optimizer.step()
        model.base_model.update_and_allocate(i)
        optimizer.zero_grad()
    kept = model.peft_config["default"].rank_pattern
    assert not any(kept["b.lora_E.default"]) and any(kept["a.lora_E.default"])


def loaded_and_trainable(tmp_path):
    model, _ = trained(graft)
    model.save_pretrained(tmp_path / "first")
    return model, graft.PeftModel.from_pretrained(base(), tmp_path / "first", is_trainable=True)


def test_a_pruned_adapter_can_be_loaded_saved_and_loaded(tmp_path):
    model, loaded = loaded_and_trainable(tmp_path)
    loaded.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    x = data()[0][0]
    for lib in (graft, peft):
        torch.testing.assert_close(
            lib.PeftModel.from_pretrained(base(), tmp_path / "second")(x).logits, model(x).logits, atol=1e-5, rtol=1e-5
        )


def test_a_pruned_adapter_trains_on_after_loading(tmp_path):
    _, loaded = loaded_and_trainable(tmp_path)
    loaded.train()
    optimizer = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], lr=1e-2)
    for i, (x, y) in enumerate(zip(*data())):
        loaded(x, labels=y).loss.backward()
        optimizer.step()
        loaded.base_model.update_and_allocate(i + CONFIG["total_step"] - CONFIG["tfinal"])  # from the last one on
        optimizer.zero_grad()
    loaded.save_pretrained(tmp_path / "third")
    x = data()[0][0]
    again = graft.PeftModel.from_pretrained(base(), tmp_path / "third")
    torch.testing.assert_close(again(x).logits, loaded.eval()(x).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.differs(
    "AdaLoRA: a pruned checkpoint loaded under the name of an adapter that is not pruned (Trainer resumes, or loads "
    "the best)"
)
def test_a_pruned_checkpoint_goes_into_an_adapter_that_is_not_pruned_and_back(tmp_path):
    pruned, _ = trained(graft)
    pruned.save_pretrained(tmp_path / "pruned")
    fresh = with_adalora(graft)
    fresh.save_pretrained(tmp_path / "fresh")
    parameters = dict(fresh.named_parameters())
    x = data()[0][0]
    for where, source in (("pruned", pruned), ("fresh", with_adalora(graft)), ("pruned", pruned)):
        fresh.load_adapter(tmp_path / where, "default", is_trainable=True)
        assert all(parameters[n] is p for n, p in fresh.named_parameters())  # an optimizer may hold them
        torch.testing.assert_close(fresh(x).logits, source(x).logits, atol=1e-5, rtol=1e-5)
        fresh.save_pretrained(tmp_path / "again")
        saved, before = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("again", where))
        assert all(torch.equal(saved[k], before[k]) for k in before)
    state = graft.get_peft_model_state_dict(pruned)
    for m in layers(pruned).values():
        m.lora_E["default"].data.zero_()
    graft.set_peft_model_state_dict(pruned, state)
    torch.testing.assert_close(pruned(x).logits, fresh(x).logits, atol=1e-5, rtol=1e-5)


def test_pruned_triples_leave_memory(tmp_path):
    (ours, _), (theirs, _) = trained(graft), trained(peft)
    x = data()[0][0]
    before = ours(x).logits
    pattern = ours.peft_config["default"].rank_pattern
    for model in (ours, theirs):
        model.base_model.resize_modules_by_rank_pattern(dict(model.peft_config["default"].rank_pattern), "default")
    torch.testing.assert_close(ours(x).logits, before)
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (ours, theirs)]
    assert {n: s for n, s in shapes[0].items() if "ranknum" not in n} == {
        n: s for n, s in shapes[1].items() if "ranknum" not in n
    }
    assert ours.base_model.model.a.lora_E["default"].requires_grad
    ours.save_pretrained(tmp_path)
    torch.testing.assert_close(graft.PeftModel.from_pretrained(base(), tmp_path)(x).logits, before)
    refuses(ConfigError, r"'a'.*triples", ours.base_model.resize_modules_by_rank_pattern, pattern, "default")
    refuses(ConfigError, "'z'", ours.base_model.resize_modules_by_rank_pattern, {"z.lora_E": [True]}, "default")


def test_triples_that_a_file_lacks_stay_and_their_singular_values_are_zero():
    config = graft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["a"])
    model = adapted(nn.ModuleDict({"a": nn.Linear(6, 5)}), config)
    m = layers(model)["a"].methods["default"]
    m.cfg.rank_pattern = {"a.lora_E": [True, False, True, False]}
    file = {("lora_E", ""): torch.full((2, 1), 5.0), ("lora_A", ""): torch.ones(2, 6), ("lora_B", ""): torch.ones(5, 2)}
    values = m.from_file_tensors(file, m.cfg)
    assert values["lora_E", ""].flatten().tolist() == [5.0, 0.0, 5.0, 0.0]
    assert torch.equal(values["lora_A", ""][1::2], m.lora_A[1::2]) and torch.all(values["lora_A", ""][::2] == 1)
    assert torch.equal(values["lora_B", ""][:, 1::2], m.lora_B[:, 1::2]) and torch.all(
        values["lora_B", ""][:, ::2] == 1
    )


def test_what_masks_of_a_caller_leave_can_be_loaded(tmp_path):
    model, x = with_adalora(graft), data()[0][0]
    r = len(model.base_model.model.a.lora_E["default"])
    masks = {"a.lora_E": 1 - torch.arange(r) % 2}  # numbers, not indices
    for _ in range(2):
        model.base_model.resize_modules_by_rank_pattern(masks, "default")
        expected = model.eval()(x).logits
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(graft.PeftModel.from_pretrained(base(), tmp_path)(x).logits, expected)
        masks = {"a.lora_E": [True] + [False] * (len(model.base_model.model.a.lora_E["default"]) - 1)}


def test_a_deleted_adapter_leaves_no_allocator():
    model = with_adalora(graft)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    allocate_on_step(optimizer, model)
    step(model, optimizer)
    model.delete_adapter("default")
    model.add_adapter("default", graft.AdaLoraConfig(**{**CONFIG, "init_r": 7}))
    model.set_adapter("default")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    allocate_on_step(optimizer, model)
    for i in range(4):
        step(model, optimizer, i)
    assert all(len(mask) == 7 for mask in model.peft_config["default"].rank_pattern.values())


@pytest.mark.differs("combining: AdaLoRA")
@pytest.mark.parametrize("kind", ["cat", "svd", "exact"])
@pytest.mark.parametrize("empty", [("a.",), ("a.", "b.", "c.")], ids=["a layer", "all"])
def test_adapters_of_rank_0_can_be_combined(kind, empty, tmp_path):
    model, _ = trained(graft)
    kept = model.peft_config["default"].rank_pattern
    for key in kept:
        if key.startswith(empty):
            kept[key] = [False] * CONFIG["init_r"]
            layers(model)[key[0]].lora_E["default"].data.zero_()
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(base(), tmp_path, "x")
    loaded.load_adapter(tmp_path, "y")
    x = data()[0][0]
    loaded.add_weighted_adapter(["x", "y"], [0.25, 0.75], "sum", combination_type=kind)
    loaded.set_adapter("sum", inference_mode=True)
    torch.testing.assert_close(loaded(x).logits, model.eval()(x).logits, atol=1e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = graft.PeftModel.from_pretrained(base(), tmp_path / "sum")
    torch.testing.assert_close(again(x).logits, model(x).logits, atol=1e-5, rtol=1e-5)


def test_a_sharded_layer_keeps_the_distances_of_its_training_call_alone():
    model = with_adalora(graft).train()
    layer, x = layers(model)["a"], data()[0][0]
    m = layer.methods["default"]
    expected = m.distances()
    m.sees = True
    layer(x)
    assert [d.requires_grad for d in m.seen] == [True, True]
    torch.testing.assert_close(m.distances(), expected)
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    refuses(NotImplementedError, "left no graph", m.distances)
