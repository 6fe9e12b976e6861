# SPDX-License-Identifier: Apache-2.0
"""Laws of losses that adapters add to the model's (`Method.compute_auxiliary_loss`), for one method.

It is the weighted mean of what a toy's layers note, so that every token and every note has its part.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import graft
from graft.core.effect import Update
from graft.core.errors import AdapterNotFoundError
from graft.core.method import Method
from graft.methods.ln_tuning import LNTuning
from tests import models
from tests.looks import get_registry, layers
from tests.models import adapted, seeded
from tests.raised import refuses
from tests.threads import at_once

WIDTH, TOKENS = 4, 3
ROWS = ["b", "__base__", "a", "b", "a"]
FORMS = {
    "object": lambda y, loss: Output(y, loss),
    "dict": lambda y, loss: {"logits": y, "loss": loss},
    "tuple": lambda y, loss: (loss, y),
    "number": lambda y, loss: loss,
}


@dataclass
class Output:
    logits: Any
    loss: Any = None


def loss_in(output):
    if isinstance(output, tuple):
        return output[0]
    return output["loss"] if isinstance(output, dict) else getattr(output, "loss", output)


class Net(nn.Module):
    """Two layers, the first of which runs twice; its loss is a mean over tokens."""

    loss_type = "ForCausalLM"

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.again, self.form = None, "object"

    def body(self, x):
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))

    def forward(self, x, attention_mask=None, labels=None, num_items_in_batch=None):
        y = self.body(x) if self.again is None else checkpoint(self.body, x, use_reentrant=self.again)
        if labels is None:
            return y
        each = (y - 1).square().mean(-1)[:, :-1][labels[:, 1:] != -100]
        return FORMS[self.form](y, each.mean() if num_items_in_batch is None else each.sum() / num_items_in_batch)


class Noting(LNTuning):
    """A product beside the layer, whose squares are the loss."""

    ln_tuning_layers: nn.Parameter

    check = Method.check

    def build(self, shared):
        return dict(ln_tuning_layers=nn.Parameter(torch.randn(WIDTH, WIDTH)))

    def describe(self):
        return Update(branch=self.branch)

    def branch(self, x):
        z = x @ self.ln_tuning_layers
        if self.layer.training:
            self.layer.call.record_value(self.name, self.site.key, z)
        return z

    @classmethod
    def compute_auxiliary_loss(cls, cfg, noted):
        weights = {"a": 1.0, "b": 2.0}
        whole = [torch.ones(len(one.values)) if one.real is None else one.real for one in noted]
        sums = [weights[one.layer] * (real @ one.values.square()).sum() for one, real in zip(noted, whole)]
        return sum(sums) / sum(real.sum() for real in whole)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(LNTuning, "variant", classmethod(lambda cls, cfg: Noting))
    with seeded(1):
        config = graft.LNTuningConfig(target_modules=["a", "b"])
        made = graft.get_peft_model(Net(), config, "a")
        made.add_adapter("b", config)
    made.set_requires_grad(["a", "b"])
    return made.train()


def inputs(rows=5):
    with seeded(2):
        return torch.randn(rows, TOKENS, WIDTH)


def labels(rows=5):
    return torch.zeros(rows, TOKENS, dtype=torch.long)


def by_hand(model, name, x, real=None, names=None):
    """An adapter's loss where `names` act, from the formulas alone."""
    found = layers(model)
    weight = {k: [layer.ln_tuning_layers[n] for n in names or [name]] for k, layer in found.items()}
    own = {k: layer.ln_tuning_layers[name] for k, layer in found.items()}
    base = {k: layer.base_layer for k, layer in found.items()}
    total, h = 0.0, x
    real = torch.ones(x.shape[:2]) if real is None else real
    for n, key in enumerate("aab"):
        h = torch.tanh(h) if n else h
        total = total + (1.0, 1.0, 2.0)[n] * ((h @ own[key]).square().sum(-1) * real).sum()
        h = base[key](h) + sum(h @ w for w in weight[key])
    return total / (3 * real.sum())


def plain(model, x, **kwargs):
    """The model's own loss: that in eval mode, in which adapters here note nothing."""
    model.eval()
    found = loss_in(model(x, **kwargs))
    model.train()
    return found


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_the_output_has_it(form, model):
    model.get_base_model().form = form
    x = inputs()
    output = model(x, labels=labels())
    assert_close(loss_in(output), plain(model, x, labels=labels()) + by_hand(model, "a", x))
    model(x, labels=labels())
    assert model.base_model.auxiliary_loss() == 0.0, "it is in there already"
    with torch.no_grad():
        assert_close(loss_in(model(x, labels=labels())), plain(model, x, labels=labels()))


def test_where_the_output_has_none_the_tuner_gives_it(model):
    x = inputs()
    model(x)
    assert_close(model.base_model.auxiliary_loss(), by_hand(model, "a", x))
    assert_close(model.auxiliary_loss("a"), by_hand(model, "a", x))
    assert model.auxiliary_loss(["b"]) == 0.0
    refuses(AdapterNotFoundError, "Adapter c not found", model.auxiliary_loss, "c")
    model.auxiliary_loss().backward()
    assert {n.split(".")[-1] for n in gradients(model)} == {"a"}
    model.eval()(x)
    assert model.auxiliary_loss() == 0.0, "in eval mode, and of no call before"
    model.train().get_base_model()(x)
    assert model.auxiliary_loss() == 0.0, "of layers that are called past the model"


def test_padding_is_left_out(model):
    x, mask = inputs(), torch.ones(5, TOKENS)
    mask[0, 0] = mask[3, 1:] = 0
    model(x, attention_mask=mask)
    assert_close(model.auxiliary_loss(), by_hand(model, "a", x, mask))
    model.set_adapter("b")
    model(x, mask.bool())
    assert_close(model.auxiliary_loss(), by_hand(model, "b", x, mask))
    model(x, attention_mask=torch.ones(5, 1, TOKENS, TOKENS))
    assert_close(model.auxiliary_loss(), by_hand(model, "b", x))
    model(x, attention_mask=torch.zeros(5, TOKENS + 1))
    assert_close(model.auxiliary_loss(), by_hand(model, "b", x))  # a mask of other tokens


def test_gradient_checkpointing_counts_once(model):
    x, found = inputs(), []
    for again in (None, False):
        model.get_base_model().again = again
        loss = model(x, labels=labels()).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    assert_close(*found)
    assert len(found[0][1]) == 2
    model.get_base_model().again = True
    with pytest.raises(NotImplementedError, match=r"'a' has a loss of values of layer 'a'.*use_reentrant=False"):
        model(x.requires_grad_(), labels=labels())
    model.get_base_model().again = None
    assert_close(model(x, labels=labels()).loss, found[0][0])


@pytest.mark.parametrize("labelled", [True, False], ids=["in its output", "apart"])
def test_a_whole_model_under_gradient_checkpointing(labelled, model):
    """The backward pass calls the model again, which collects its values anew."""
    x, found = inputs(), []

    def run(x):
        return model(x, labels=labels()).loss if labelled else model(x).square().mean()

    for again in (None, False, *[True] * labelled):
        loss = run(x) if again is None else checkpoint(run, x.clone().requires_grad_(), use_reentrant=again)
        (loss + model.auxiliary_loss()).backward()
        found.append(gradients(model))
    assert len(found[0]) == 2
    for other in found[1:]:
        assert_close(other, found[0])


def test_a_gradient_within_the_forward_pass_counts_once(model):
    """As a model takes forces from its energy: the backward pass runs checkpointed layers again within the call."""
    base, x = model.get_base_model(), inputs()

    def force(x):
        x = x.requires_grad_()
        y = checkpoint(base.body, x, use_reentrant=False)
        return torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]

    base.forward = force
    model(x)
    assert_close(model.auxiliary_loss(), by_hand(model, "a", x))


@pytest.mark.parametrize("again", [None, False], ids=["", "checkpointed"])
def test_several_adapters_add_theirs(again, model):
    x, names = inputs(), ["a", "b"]
    model.base_model.set_adapter(names)
    model.get_base_model().again = again
    loss = model(x, labels=labels()).loss
    terms = [by_hand(model, name, x, names=names) for name in names]
    assert_close(loss, plain(model, x, labels=labels()) + sum(terms))
    model(x)
    for name, term in zip(names, terms):
        assert_close(model.auxiliary_loss(name), term)


@pytest.mark.parametrize("again", [None, False], ids=["", "checkpointed"])
def test_an_adapter_of_a_mixed_batch_has_its_rows(again, model):
    x, mask = inputs(), torch.ones(5, TOKENS)
    mask[0, 1] = mask[4, 0] = 0
    model.get_base_model().again = again
    model(x, attention_mask=mask, adapter_names=ROWS)
    terms = {}
    for name in "ab":
        own = [i for i, n in enumerate(ROWS) if n == name]
        terms[name] = by_hand(model, name, x[own], mask[own])
        assert_close(model.auxiliary_loss(name), terms[name])
    model.auxiliary_loss().backward()
    mixed = gradients(model)
    sum(terms.values()).backward()
    assert_close(mixed, gradients(model))
    assert len(mixed) == 4
    both = model(x, labels=labels(), attention_mask=mask, adapter_names=ROWS).loss
    assert_close(both, plain(model, x, labels=labels(), adapter_names=ROWS) + sum(terms.values()))


def test_compositions_have_their_rows(model):
    x = inputs(2)
    model(x, adapter_names=[graft.Stack("a", "b"), "a"])
    whole = by_hand(model, "a", x[:1], names=["a", "b"]) + by_hand(model, "a", x[1:])
    assert_close(model.auxiliary_loss("a"), whole / 2)
    assert_close(model.auxiliary_loss("b"), by_hand(model, "b", x[:1], names=["a", "b"]))


def test_a_parallel_weighs_each_by_its_copies(model):
    """As it does the model's loss, which is the mean over the copies."""
    x = inputs(2)
    value = graft.Parallel("a", graft.Stack("a", "b"), "b")
    model(x, compose=value)
    pair = {name: by_hand(model, name, x, names=["a", "b"]) for name in "ab"}
    expected = {name: (by_hand(model, name, x) + pair[name]) / 3 for name in "ab"}  # two of three copies
    for name in "ab":
        assert_close(model.auxiliary_loss(name), expected[name])
    loss = model(x, labels=labels(2), compose=value).loss
    assert_close(loss, plain(model, x, labels=labels(2), compose=value) + sum(expected.values()))
    model.set_adapter(value)
    model(x)
    assert_close(model.auxiliary_loss("a"), expected["a"])
    assert_close(model.auxiliary_loss(), sum(expected.values()))
    model(x, compose=graft.Stack("a", "b"))
    assert_close(model.auxiliary_loss("a"), pair["a"])


def test_disabled_adapters_have_none(model):
    x = inputs()
    with model.disable_adapter():
        loss = model(x, labels=labels()).loss
        assert_close(loss, plain(model, x, labels=labels()))
        model(x)
    assert model.auxiliary_loss() == 0.0
    model.base_model.disable_adapter_layers()
    model(x)
    assert model.auxiliary_loss() == 0.0
    model.base_model.enable_adapter_layers()
    model(x)
    assert model.auxiliary_loss() > 0


def test_accumulated_it_is_a_mean_over_the_steps_tokens(model):
    """As Trainer accumulates: told how many tokens the step has, each loss is a share of it."""
    x, targets = inputs(), labels()
    targets[0, 1:] = targets[2, 0] = targets[4, 2] = -100
    items = (targets[:, 1:] != -100).sum()
    parts = [(slice(0, 2), 2), (slice(2, 5), 5)]
    found = expected = 0.0
    for part, count in parts:
        found += model(x[part], labels=targets[part], num_items_in_batch=items).loss
        own = plain(model, x[part], labels=targets[part], num_items_in_batch=items)
        expected += own + count / 7 * by_hand(model, "a", x[part])
    assert items == 7
    assert_close(found, expected)


OWN = {
    "ADALORA": lambda: graft.AdaLoraConfig(
        init_r=3, target_r=2, target_modules=["q_proj"], total_step=9, orth_reg_weight=0.7
    ),
    "SHADOW": lambda: graft.ShadowConfig(shadow_dropout=0.0, auxiliary_loss_weight=0.7, task_type="CAUSAL_LM"),
}


@pytest.mark.differs("the losses of AdaLoRA and SHADOW when Trainer accumulates batches")
@pytest.mark.parametrize("method", OWN)
def test_losses_that_a_method_adds_itself_are_a_mean_over_the_steps_tokens_too(method):
    """Trainer passes the number of tokens of all batches of a step, and adds the losses of the batches up."""
    net = adapted(models.make("llama"), OWN[method]()).train()
    ids = models.inputs("llama", 4)["input_ids"]
    targets = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.4, -100, ids)
    items = (targets[:, 1:] != -100).sum()
    whole = net(input_ids=ids, labels=targets).loss
    assert_close(net(input_ids=ids, labels=targets, num_items_in_batch=items).loss, whole)
    parts = [
        net(input_ids=ids[i], labels=targets[i], num_items_in_batch=items).loss for i in (slice(0, 1), slice(1, 4))
    ]
    assert_close(sum(parts), whole)
    with net.disable_adapter():
        assert net(input_ids=ids, labels=targets).loss != whole


def test_threads_have_losses_of_their_own(model):
    many = [inputs(rows) for rows in (2, 3, 5, 7)]
    found = {}

    def run(i):
        for _ in range(5):
            model(many[i])
            found.setdefault(i, []).append(model.auxiliary_loss().detach())

    at_once(*[partial(run, i) for i in range(len(many))])
    for i, x in enumerate(many):
        assert len(found[i]) == 5
        for ours in found[i]:
            assert_close(ours, by_hand(model, "a", x).detach())


def test_a_run_that_fails_leaves_nothing(model):
    x = inputs()
    model(x)
    refuses(RuntimeError, None, model, x[..., :2])
    assert get_registry(model).call.thread_state.noted is None
    assert model.auxiliary_loss() == 0.0
    model(x)
    assert_close(model.auxiliary_loss(), by_hand(model, "a", x))


def test_it_compiles(model):
    torch._dynamo.reset()
    x = inputs()
    expected = model(x, labels=labels()).loss
    expected.backward()
    grads = gradients(model)
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(x, labels=labels()).loss
    loss.backward()
    assert_close(loss, expected)
    assert_close(gradients(model), grads)
