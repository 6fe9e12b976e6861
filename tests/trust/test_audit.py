# SPDX-License-Identifier: Apache-2.0
"""What does not train is said, once, and nothing else is."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import graft
from graft.model.audit import PASSES, find_active_parts
from tests import models
from tests.conformance.samples import LAYERS, SAMPLES, STORES, Cell
from tests.covering import Sometimes, law
from tests.looks import get_registry
from tests.models import adapted, seeded
from tests.prompts import samples as prompts

X = torch.linspace(-1, 1, 24).view(4, 6)


class Net(nn.Module):
    """Two ways through it: `spare` runs only if asked for, `lost` runs and nothing comes of it."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.spare, self.lost, self.emb = nn.Linear(6, 6), nn.Linear(6, 6), nn.Embedding(9, 6)

    def forward(self, x, spare=False):
        self.lost(x)
        y = self.inner(x).tanh()
        return self.head(self.spare(y) if spare else y)


def lora(*targets, **options):
    return graft.LoraConfig(**{"r": 2, "target_modules": list(targets or ["inner"]), **options})


def net_with(*targets, **options):
    return adapted(Net, lora(*targets, **options), seed=0, scale=0).train()


def said(*calls):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls:
            call()
    return [str(w.message) for w in caught if "graft.audit(model)" in str(w.message)]


def step(model, **kwargs):
    return lambda: model(X, **kwargs).square().mean().backward()


# by itself


def test_a_model_that_trains_as_set_up_hears_nothing():
    model = net_with("inner", "head")
    assert said(*[step(model)] * 3) == []
    assert get_registry(model).watch is None  # and is not looked at any longer


@pytest.mark.differs("adapters that do not train")
def test_a_layer_that_no_gradient_reaches_is_said_after_some_passes():
    model = net_with("inner", "lost", "spare")
    assert said(*[step(model)] * (PASSES - 1)) == []
    (text,) = said(*[step(model)] * 20)
    assert f"After {PASSES} backward passes" in text and "no gradient came there (2)" in text
    assert (
        "lost ('default')" in text and "spare ('default')" in text and "inner" not in text and "exclude_modules" in text
    )


def test_a_layer_that_comes_late_is_no_finding():
    """An expert that got no token, a head of another task, a layer that was dropped."""
    model = net_with("inner", "spare")
    calls = [step(model)] * (PASSES - 1) + [step(model, spare=True)] + [step(model)] * PASSES
    assert said(*calls) == []


def test_a_new_adapter_is_looked_at_as_well():
    model = net_with("inner")
    assert said(step(model)) == []
    model.add_adapter("b", lora("inner", "lost"))
    model.set_adapter("b")
    assert "lost ('b')" in said(*[step(model)] * PASSES)[0]


def test_no_gradient_on_any_layer_is_said_at_once():
    model = net_with("inner", modules_to_save=["head"])
    inner = model.base_model.model.inner
    inner.register_forward_hook(lambda module, args, y: y.detach())
    with pytest.warns(
        graft.PeftWarning, match=r"first backward pass[\s\S]*no gradient came there \(1\): \[inner"
    ) as caught:
        step(model)()
    assert caught[0].filename == __file__
    assert said(step(model)) == []


def test_training_while_merged_or_disabled_is_said_at_once():
    for change, word in (("merge_adapter", "merged"), ("disable_adapter_layers", "disabled")):
        model = net_with("inner")
        getattr(model.base_model, change)()
        model.base_model.model.head.weight.requires_grad_(True)
        assert f"inner ('default', {word})" in said(step(model))[0]


def test_zeros_are_said_after_some_passes():
    model = net_with("inner", "head")
    for p in model.base_model.model.inner.parameters_of("default"):
        p.data.zero_()  # of two factors that are zero neither gets a gradient
    (text,) = said(*[step(model)] * PASSES)
    assert "all gradients are zero (1): [inner ('default')]" in text


def test_gradients_that_are_not_finite_are_said_at_once():
    model = net_with("inner", "head")
    (text,) = said(lambda: (model(X) * float("inf")).sum().backward())
    assert "not finite (2)" in text and "head ('default')" in text


def test_a_finding_after_a_call_of_the_base_is_said():
    """As of a reference: what a backward pass would run again for that call, nobody knows."""

    def run():
        y = model(X)
        with model.disable_adapter():
            model(X)
        (y * float("inf")).sum().backward()

    model = net_with("inner", "head")
    (text,) = said(run)
    assert "not finite (2)" in text and "head ('default')" in text


def test_an_overflow_in_float16_is_a_scalers_business():
    model = net_with("inner")
    with torch.autocast("cpu", torch.float16):
        assert said(lambda: (model(X).float() * float("inf")).sum().backward()) == []


def test_base_parameters_that_train_and_are_not_saved():
    model = net_with("inner", bias="lora_only")
    model.base_model.model.head.weight.requires_grad_(True)
    (text,) = said(step(model))
    assert "train, but save_pretrained() writes no file with them (1): [head.weight]" in text


def test_a_loss_without_a_gradient_names_is_trainable(tmp_path):
    adapted(models.make("llama"), graft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    batch = models.inputs("llama")
    model = graft.PeftModel.from_pretrained(models.make("llama"), tmp_path).train()
    with pytest.warns(graft.PeftWarning, match=r"\['default'\] has no gradient.*is_trainable=True"):
        model(**batch, labels=batch["input_ids"])
    model(**batch, labels=batch["input_ids"])  # once
    for other in (
        model.eval(),
        adapted(models.make("llama"), graft.LoraConfig(r=2, target_modules=["q_proj"])).train(),
    ):
        with other.disable_adapter():
            other(**batch, labels=batch["input_ids"])
        with torch.no_grad():
            other(**batch, labels=batch["input_ids"])


def test_nothing_trains_at_all(tmp_path):
    """Gradient checkpointing makes the embeddings' output require gradients, so that backward() passes in silence."""

    class WithTokens(Net):
        def forward(self, ids):
            return super().forward(self.emb(ids))

    def loaded():
        model = graft.PeftModel.from_pretrained(WithTokens(), tmp_path)
        model.get_base_model().emb.register_forward_hook(lambda module, args, y: y.requires_grad_(True))
        return model.train()

    net_with("inner").save_pretrained(tmp_path)
    ids = torch.arange(4)
    model = loaded()
    (text,) = said(lambda: model(ids).sum().backward())
    assert "no parameter of the model requires gradients" in text and "is_trainable=True" in text
    model = loaded().eval()
    assert said(lambda: model(ids).sum().backward()) == []


def test_a_loss_without_a_gradient_is_reported(tmp_path):
    """Not an error of torch's: it is what an audit is asked about."""

    def audited(model):
        return graft.audit(model, loss=lambda: model(X).sum())

    model = net_with("inner")
    model.merge_adapter()
    assert audited(model).no_gradient == ["inner ('default', merged)"]
    (part,) = find_active_parts(list(get_registry(model).carriers()))
    part.carrier.state.disabled = True
    assert part.label == "inner ('default', disabled, merged)"
    part.carrier.state.disabled = False
    model.unmerge_adapter()
    with model.disable_adapter():
        assert audited(model).no_gradient == ["inner ('default', disabled)"]
    assert audited(model).ok
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(Net(), tmp_path)
    assert audited(loaded).not_trained == ["inner.lora_A ('default')", "inner.lora_B ('default')"]
    assert "is_trainable=True" in str(audited(loaded))


def test_a_frozen_model_behind_one_that_trains_is_in_order(tmp_path):
    net_with("inner").save_pretrained(tmp_path)
    model, front = graft.PeftModel.from_pretrained(Net(), tmp_path).train(), nn.Linear(6, 6)
    assert said(lambda: model(front(X)).sum().backward()) == []


def test_a_flat_loss_or_gradients_taken_elsewhere_say_nothing():
    model = net_with("inner", "head")
    assert said(*[lambda: (model(X) * 0).sum().backward()] * 99) == []
    model = net_with("inner", "lost")
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    assert said(*[step(model)] * 99) == [] and get_registry(model).watch is None
    model = net_with("inner")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert said(lambda: torch.autograd.grad(model(X).sum(), trained)) == []


def test_rows_of_a_table_that_a_batch_lacks():
    model = graft.get_peft_model(models.make("llama"), lora("q_proj", trainable_token_indices={"embed_tokens": [5, 8]}))
    ids = torch.tensor([[1, 2, 3]])
    assert said(*[lambda: model(input_ids=ids).logits.square().mean().backward()] * (PASSES + 1)) == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    with seeded(0):
        model = graft.get_peft_model(Checkpointed(), lora("inner", "head"))
    x = X.clone().requires_grad_(True)
    assert said(lambda: model(x).sum().backward(), lambda: model(x).sum().backward()) == []
    assert get_registry(model).watch is None


def test_copies_and_files_of_a_model_under_watch():
    model = net_with("inner", "lost")
    step(model)()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert get_registry(again).watch.registry is get_registry(again)
        assert len(said(*[step(again)] * PASSES)) == 1


def test_a_compiled_model_is_left_alone():
    model = net_with("inner")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert said(step(compiled), step(compiled)) == []


SITES = {"LN_TUNING": "norm", "TRAINABLE_TOKENS": "embedding"}


@law("sample", SAMPLES, lambda s: [s.method, Sometimes(str(s), 3)])
def test_no_method_gives_a_false_alarm(sample):
    layer = next(layer for layer in LAYERS if layer.name == SITES.get(sample.method, "linear"))
    cell = Cell(sample, layer, STORES[0])
    for model in (cell.fresh(), cell.trained(), cell.fresh(("default", "other"))):
        assert said(*[lambda model=model: model(cell.inputs()).square().mean().backward()] * (PASSES + 1)) == []
        assert get_registry(model).watch is None and graft.audit(model).ok


@pytest.mark.parametrize("sample", prompts.SAMPLES, ids=str)
def test_no_prompt_gives_a_false_alarm(sample):
    model, inputs = prompts.adapt(graft, sample), prompts.batch(sample)
    assert said(*[lambda: model(**inputs).loss.backward()] * (PASSES + 1)) == []
    assert get_registry(model).watch is None and graft.audit(model).ok


# on request


def test_a_report_of_all_that_an_audit_can_see():
    model = net_with("inner", "lost", "spare", modules_to_save=["head"])
    base = model.base_model.model
    base.emb.weight.requires_grad_(True)
    base.inner.lora_A["default"].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if p.requires_grad and "head" not in n], lr=0.1)
    before = graft.audit(model, optimizer)
    assert not before.no_gradient and str(before).startswith("Before any backward pass")
    report = graft.audit(model, optimizer, loss=lambda: model(X).square().mean())
    assert report.never_called == ["spare ('default')"] and report.no_gradient == ["lost ('default')"]
    assert report.not_trained == before.not_trained == ["inner.lora_A ('default')"]
    assert report.not_saved == before.not_saved == ["base_model.model.emb.weight"]
    assert report.not_optimized == [f"base_model.model.head.modules_to_save.default.{n}" for n in ("weight", "bias")]
    assert not report.ok and all(p.grad is None for p in model.parameters())
    text = str(report)
    for word in ("spare ('default')", "emb.weight", "add_param_group", "modules_to_save", "set_requires_grad"):
        assert word in text


def test_a_report_on_a_model_without_a_wrapper_and_on_wrapped_ones():
    model = graft.inject_adapter_in_model(lora("inner", "lost"), Net())
    step(model)()
    assert graft.audit(model).no_gradient == ["lost ('default')"]
    model = net_with("inner", "lost")
    step(model)()
    assert graft.audit(nn.DataParallel(model)).no_gradient == ["lost ('default')"]
    assert graft.audit(torch.compile(model)).no_gradient == ["lost ('default')"]


def test_long_lists_are_shortened():
    blocks = nn.Sequential(*[nn.Sequential(nn.Tanh(), nn.Linear(6, 6)) for _ in range(30)])
    model = graft.get_peft_model(blocks, lora(*[f"{i}.1" for i in range(30)]))
    model(X).sum().backward()
    for p in model.parameters():
        p.grad = None
    next(p for p in model.parameters() if p.requires_grad).grad = torch.ones(2, 6)
    text = str(graft.audit(model))
    assert "no gradient came there (29)" in text and "*.1 ('default') × 29" in text and len(text) < 900


def test_all_is_well():
    model = net_with("inner", "head", bias="all", modules_to_save=["emb"])
    step(model)()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    report = graft.audit(model, optimizer)
    report.no_gradient = [entry for entry in report.no_gradient if not entry.startswith("emb")]  # not in this batch
    assert report.ok and str(report) == "After a backward pass: nothing is wrong with the adapters."


# values


def stepped(lr, steps=3, **options):
    model = net_with("inner", "head", **options)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        step(model)()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_updates_of_an_ordinary_training():
    model, optimizer = stepped(1e-3)
    report = graft.audit(model, optimizer)
    assert report.ok and report.stepped and str(report).startswith("After training")
    for layer in ("inner", "head"):
        base = getattr(model.base_model.model, layer)
        share = (base.get_delta_weight("default").norm() / base.base_layer.weight.norm()).item()
        assert report.updates[f"{layer} ('default')"] == pytest.approx(share, rel=1e-5)
    assert report.range_of_updates() in str(report)
    assert graft.audit(model).ok  # gradients that are gone say as much as the optimizer does


@pytest.mark.differs("learning rates by which nothing moves, or all explodes")
@pytest.mark.parametrize("lr", [0.0, 1e-8])
def test_a_learning_rate_by_which_nothing_moves(lr):
    for report in (graft.audit(*stepped(lr)), graft.audit(stepped(lr)[0])):
        assert report.not_moved == ["inner ('default')", "head ('default')"] and not report.exploded
        assert "learning rate" in str(report)


def test_a_learning_rate_by_which_all_explodes():
    report = graft.audit(*stepped(1e4))
    assert report.exploded == ["inner ('default')", "head ('default')"] and "lower learning rate" in str(report)


def test_values_that_are_not_finite():
    model, _ = stepped(1e-3)
    with torch.no_grad():
        model.base_model.model.head.lora_A["default"].weight[0, 0] = float("nan")
    report = graft.audit(model)
    assert report.broken == ["head ('default')"] and not report.exploded and "checkpoint" in str(report)


def test_an_adapter_that_is_in_no_optimizer_does_not_move():
    model, optimizer = stepped(1e-3, steps=0)
    del optimizer.param_groups[0]["params"][2:]
    step(model)()
    optimizer.step()
    report = graft.audit(model, optimizer)
    assert report.not_moved == ["head ('default')"] and len(report.not_optimized) == 2


def test_a_head_that_trains_whole_is_measured_beside_its_original():
    model = net_with("inner", modules_to_save=["head"])
    head = model.base_model.model.head
    with torch.no_grad():
        for p in head.modules_to_save["default"].parameters():
            p *= 1.5
    assert graft.audit(model).updates["head ('default')"] == pytest.approx(0.5, rel=1e-5)


def test_before_an_optimizer_steps_a_zero_update_is_no_finding():
    model = net_with("inner")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    assert graft.audit(model, optimizer).ok
    step(model)()
    assert graft.audit(model, optimizer).ok and not graft.audit(model, optimizer).stepped


def test_a_pass_of_its_own_is_no_training():
    model = net_with("inner", "lost")
    report = graft.audit(model, loss=lambda: model(X).square().mean())
    assert report.never_called == [] and len(report.no_gradient) == 1
    again = graft.audit(model)
    assert again.ok and not again.stepped and str(again).startswith("Before any backward pass")
    assert len(said(*[step(model)] * PASSES)) == 1  # and the watch has its own passes before it


def test_a_start_that_leaves_little_of_the_weight_has_not_exploded():
    model = net_with("inner", r=6, init_lora_weights="pissa")
    report = graft.audit(model)
    assert report.updates["inner ('default')"] > 10 and report.ok


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_no_trained_method_gives_a_false_alarm(sample):
    layer = next(layer for layer in LAYERS if layer.name == SITES.get(sample.method, "linear"))
    model = (cell := Cell(sample, layer, STORES[0])).trained().train()
    model(cell.inputs()).square().mean().backward()
    model.zero_grad()
    report = graft.audit(model)
    assert report.stepped and report.ok, str(report)
