# SPDX-License-Identifier: Apache-2.0
"""Rows and adapters: grouping, what cannot be routed, and what a backward pass recomputes."""

import copy
import io
from dataclasses import dataclass
from functools import partial
from threading import Event, Thread, get_ident
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import graft
from graft.core.call import Call, RecomputeContext
from graft.core.rows import BASE, NOTHING, CallContext, Rows
from tests import models
from tests.looks import get_registry, layers
from tests.models import disturb, seeded
from tests.raised import refuses
from tests.threads import at_once

FIRST, SECOND = ["default", "b", BASE, "b"], ["b", "b", "default", BASE]


# grouping


def test_rows_are_grouped_by_adapter_in_order_of_appearance():
    rows = Rows.from_names(["b", "a", BASE, "b", "a"])
    assert [(name, index.tolist()) for name, index in rows.segments] == [("b", [0, 3]), ("a", [1, 4]), (None, [2])]
    grouped = torch.cat([index for _, index in rows.segments])
    assert grouped[rows.inverse].tolist() == [0, 1, 2, 3, 4]


def test_a_batch_grouped_as_one_before_has_its_indices():
    names = ["b", "a", BASE, "b", "a"]
    first, other = (
        Rows.from_names(names, torch.device("cpu")),
        Rows.from_names(["x", "y", "z", "x", "y"], torch.device("cpu")),
    )
    assert first.order.data_ptr() == other.order.data_ptr() and other.names == ("x", "y", "z")
    assert first.to_device(torch.device("cpu")) is first
    there = first.to_device(torch.device("meta"))
    assert there is first.to_device(torch.device("meta")) and {i.device.type for _, i in there.segments} == {"meta"}


@pytest.mark.parametrize(
    "names, in_order",
    [(["a", "a", "b"], True), (["a", "b", "a"], False), (["b", "c", "a", "b"], False), ([BASE, "a", "b"], False)],
)
def test_rows_in_order(names, in_order):
    rows = Rows.from_names(names)
    order, found = rows.adapter_groups[1], rows.adapter_groups[3]
    assert found == in_order == (order.tolist() == list(range(len(names))))


def test_ids_that_all_samples_share_are_repeated():
    rows, ids = Rows.from_names(["a", "b", "a"]), torch.arange(4)[None]
    assert torch.equal(rows.expand_to_batch(ids, "positions", ids=True), ids.expand(3, 4))
    whole = torch.randn(3, 4)
    assert rows.expand_to_batch(whole, "layer") is whole


@pytest.mark.parametrize("size", [1, 2, 6])
def test_other_numbers_of_rows_cannot_be_routed(size):
    text = rf"'down' received {size} rows in a mixed batch of 3.*exclude_modules"
    refuses(graft.RoutingError, text, Rows.from_names(["a", "b", "a"]).expand_to_batch, torch.randn(size, 4), "down")


def test_using_puts_back_what_was_there_also_after_an_error():
    call, outer, inner = Call(), Rows.from_names(["a"]), Rows.from_names(["b"])
    with call.use_rows(outer):
        with pytest.raises(KeyError), call.use_rows(inner):
            assert call.current_rows() is inner
            raise KeyError
        assert call.current_rows() is outer
    assert call.rows is None


def test_facts_of_some_rows_are_where_these_are():
    """A caller may have them elsewhere, and layers may be on several devices."""
    some = CallContext(facts={"fact": torch.arange(4)}).narrow(torch.tensor([0, 2], device="meta"))
    assert some.facts["fact"].device.type == "meta"
    assert CallContext(facts={"fact": torch.arange(4)}).narrow(torch.tensor([0, 2])).facts["fact"].tolist() == [0, 2]


def test_a_layer_that_sees_no_rows_of_the_batch_is_named():
    model = adapter_pair(nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 3)), "LORA", ["1"], r=2)
    x = torch.randn(4, 5, 3)
    refuses(graft.RoutingError, "'1' received 20 rows", model, x, adapter_names=FIRST)
    assert not get_registry(model).call.open
    model(x)


def test_one_position_embedding_for_the_whole_batch():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(9, 3), nn.Embedding(5, 3)

        def forward(self, ids):
            return self.tokens(ids) + self.positions(torch.arange(ids.shape[1])[None])

    ids = torch.randint(0, 9, (4, 5))
    for method, options in (("LORA", dict(r=2)), ("HRA", dict(r=2))):
        model = adapter_pair(Positions(), method, ["tokens", "positions"], **options)
        assert_close(model(ids, adapter_names=FIRST), alone(model, ids, FIRST), rtol=1e-5, atol=1e-5)


# errors of a call


def adapter_pair(base, method, targets, **options):
    with seeded(1):
        config = graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](target_modules=list(targets), **options)
        model = graft.get_peft_model(base, config)
        model.add_adapter("b", copy.deepcopy(config))
    disturb(model)
    model.set_requires_grad(["default", "b"])
    return model


def alone(model, x, names):
    rows = []
    for i, name in enumerate(names):
        if name == BASE:
            with model.disable_adapter():
                rows.append(model(x[i : i + 1]))
        else:
            model.set_adapter(name)
            rows.append(model(x[i : i + 1]))
    return torch.cat(rows)


def test_names_are_checked_before_anything_runs():
    model = adapter_pair(nn.Sequential(nn.Linear(3, 3)), "LORA", ["0"], r=2)
    x = torch.randn(2, 3)
    refuses(graft.RoutingError, r"non-existing adapter.*: x, y", model, x, adapter_names=["y", "x"])
    for names in (["b"], ["b"] * 3, []):
        refuses(graft.RoutingError, f"same as the number of inputs.*{len(names)} and 2", model, x, adapter_names=names)
    model.merge_adapter()
    refuses(graft.RoutingError, r"merged adapters.*unmerge_adapter.*default", model, x, adapter_names=["b", "b"])
    model.unmerge_adapter()
    assert not get_registry(model).call.open
    model(x, adapter_names=["b", BASE])


def test_an_error_inside_the_model_leaves_no_rows_behind():
    model = adapter_pair(nn.Sequential(nn.Linear(3, 3)), "LORA", ["0"], r=2)
    x = torch.randn(2, 3)
    expected = model(x)
    refuses(RuntimeError, None, model, torch.randn(2, 7), adapter_names=["b", "b"])
    assert torch.equal(model(x), expected)


def test_no_adapter_can_be_named_as_the_base_is():
    model = adapter_pair(nn.Sequential(nn.Linear(3, 3)), "LORA", ["0"], r=2)
    refuses(graft.AdapterNameError, BASE, model.add_adapter, BASE, graft.LoraConfig(target_modules=["0"]))


# gradients, with and without recomputing


TARGETS = ["q_proj", "down_proj"]
CHECKPOINTING = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def llama(method="LORA", targets=TARGETS, checkpointing=None, prepare=lambda base: None, **options):
    base = models.make("llama")
    prepare(base)
    options = options or {"LORA": dict(r=2), "HRA": dict(r=2), "LN_TUNING": {}}[method]
    model = adapter_pair(base, method, targets, task_type="CAUSAL_LM", **options).train()
    if checkpointing is not None:
        models.checkpoint(model, checkpointing)
        model.enable_input_require_grads()
    return model


def loss(model, names=None, number=1):
    batch = models.inputs("llama", 4)
    y = models.output(model, {**batch, **({} if names is None else {"adapter_names": names})})
    with seeded(number):
        return (y * torch.randn(y.shape)).sum()


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def backward(model, *args):
    loss(model, *args).backward()
    return gradients(model)


def equal(ours, *theirs):
    """`ours` is the sum of `theirs`."""
    total: dict = {}
    for g in theirs:
        for name, t in g.items():
            total[name] = total[name] + t if name in total else t
    assert ours.keys() == total.keys()
    for name, t in total.items():
        assert_close(ours[name], t, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def plain():
    """Gradients without checkpointing: of both mixed batches, and of a batch of the active adapter."""
    model = llama()
    return backward(model, FIRST, 1), backward(model, SECOND, 2), backward(model, None, 3)


@CHECKPOINTING
@pytest.mark.parametrize("method, targets", [("LORA", TARGETS), ("HRA", TARGETS), ("LN_TUNING", ["input_layernorm"])])
def test_recomputed_layers_see_their_rows(method, targets, reentrant):
    expected = backward(llama(method, targets), FIRST)
    model = llama(method, targets, reentrant)
    for _ in range(2):
        equal(backward(model, FIRST), expected)
        assert not get_registry(model).call.open


@CHECKPOINTING
@pytest.mark.parametrize("backwards", [False, True], ids=["in order", "in reverse"])
def test_two_forwards_with_separate_backwards(plain, reentrant, backwards):
    model = llama(checkpointing=reentrant)
    losses = [loss(model, FIRST, 1), loss(model, SECOND, 2), loss(model, None, 3)]
    for i in reversed(range(3)) if backwards else range(3):
        losses[i].backward()
        equal(gradients(model), plain[i])


def test_two_forwards_and_one_backward_without_checkpointing(plain):
    model = llama()
    (loss(model, FIRST, 1) + loss(model, SECOND, 2) + loss(model, None, 3)).backward()
    equal(gradients(model), *plain)


@CHECKPOINTING
def test_two_forwards_and_one_backward_with_checkpointing_are_refused(plain, reentrant):
    model = llama(checkpointing=reentrant)
    with pytest.raises(graft.RoutingError, match=r"forward passes with different rows.*backward\(\) after each"):
        (loss(model, FIRST, 1) + loss(model, SECOND, 2)).backward()
    model.zero_grad()
    equal(backward(model, FIRST, 1), plain[0])
    equal(backward(model, None, 3), plain[2])


@CHECKPOINTING
@pytest.mark.parametrize("order", [(FIRST, None), (None, FIRST)], ids=["mixed first", "plain first"])
def test_a_mixed_and_a_plain_forward_and_one_backward_are_refused(plain, reentrant, order):
    model = llama(checkpointing=reentrant)
    numbers = {False: 1, True: 3}
    total = sum(loss(model, names, numbers[names is None]) for names in order)
    refuses(graft.RoutingError, "forward passes with different rows", total.backward)
    model.zero_grad()
    equal(backward(model, FIRST, 1), plain[0])


@CHECKPOINTING
def test_a_backward_pass_that_fails_leaves_no_rows_behind(plain, reentrant):
    def fail(_):
        raise KeyError("out of memory, say")

    model = llama(checkpointing=reentrant)
    expected = loss(model, None, 3)
    p = layers(model)["model.layers.0.self_attn.q_proj"].lora_A["default"].weight
    hook = p.register_post_accumulate_grad_hook(fail)  # torch 2.6 runs no others where a checkpoint saves a Parameter
    refuses(KeyError, None, loss(model, FIRST, 1).backward)
    hook.remove()
    model.zero_grad()
    assert torch.equal(loss(model, None, 3), expected)
    equal(backward(model, SECOND, 2), plain[1])


@CHECKPOINTING
@pytest.mark.parametrize("method", ["LORA", "HRA"])
def test_an_adapted_embedding_whose_output_is_made_to_require_gradients(method, reentrant):
    targets = ["embed_tokens", "q_proj"]
    expected = backward(llama(method, targets), FIRST)
    model = llama(method, targets, reentrant, prepare=lambda base: base.enable_input_require_grads())
    equal(backward(model, FIRST), expected)


@CHECKPOINTING
def test_it_is_the_mode_of_the_layers_that_counts(plain, reentrant):
    model = llama(checkpointing=reentrant).eval()
    model.get_base_model().train()
    equal(backward(model, FIRST, 1), plain[0])


@CHECKPOINTING
def test_gradients_of_an_intermediate_output_alone(plain, reentrant):
    def middle(model):
        batch = models.inputs("llama", 4)
        return model(**batch, adapter_names=FIRST, output_hidden_states=True).hidden_states[1].square().sum()

    first, model = llama(), llama(checkpointing=reentrant)
    middle(first).backward()
    middle(model).backward()
    equal(gradients(model), gradients(first))


def test_higher_derivatives_and_retained_graphs():
    model = adapter_pair(nn.Sequential(nn.Linear(3, 3)), "LORA", ["0"], r=2)
    x = torch.randn(4, 3, requires_grad=True)
    y = model(x, adapter_names=FIRST).square().sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    g.square().sum().backward(retain_graph=True)
    y.backward()
    assert not get_registry(model).call.open
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# outputs of every kind


@dataclass
class Output:
    y: torch.Tensor


class Slotted:
    __slots__ = ("y",)

    def __init__(self, y):
        self.y = y


def circular(y):
    found = SimpleNamespace(others=[SimpleNamespace(y=y)])
    found.itself, found.model = found, nn.Linear(3, 3)
    return found


OUTPUTS = {
    "dict": (lambda y: {"a": [y]}, lambda out: out["a"][0]),
    "dataclass": (Output, lambda out: out.y),
    "objects": (circular, lambda out: out.others[0].y),
    "dataclass in a tuple": (lambda y: (1, Output(y)), lambda out: out[1].y),
}
OPAQUE = {"slots": (Slotted, lambda out: out.y), "function": (lambda y: lambda: y, lambda out: out())}


class Packing(nn.Module):
    def __init__(self, pack, reentrant):
        super().__init__()
        self.first, self.second, self.pack, self.reentrant = nn.Linear(3, 3), nn.Linear(3, 2), pack, reentrant

    def forward(self, x):
        h = self.first(x)
        if self.reentrant is None:
            return self.pack(self.second(h))
        return self.pack(checkpoint(self.second, h, use_reentrant=self.reentrant))


def packing(pack, reentrant=None):
    with seeded(2):
        return adapter_pair(Packing(pack, reentrant), "LORA", ["first", "second"], r=2)


X = torch.linspace(-1, 1, 12).view(4, 3)


@CHECKPOINTING
@pytest.mark.parametrize("kind", OUTPUTS)
def test_rows_come_back_whatever_the_output_is(kind, reentrant):
    pack, unpack = OUTPUTS[kind]
    found = []
    for model in (packing(pack), packing(pack, reentrant)):
        for _ in range(2):
            unpack(model(X, adapter_names=FIRST)).square().sum().backward()
            found.append(gradients(model))
            assert not get_registry(model).call.open
    for other in found[1:]:
        equal(other, found[0])


@CHECKPOINTING
@pytest.mark.parametrize("kind", OPAQUE)
def test_an_output_that_hides_its_tensors_is_refused_where_layers_run_again(kind, reentrant):
    pack, unpack = OPAQUE[kind]
    model = packing(pack)
    unpack(model(X, adapter_names=FIRST)).square().sum().backward()  # nothing runs again
    expected = gradients(model)
    model = packing(pack, reentrant)
    with pytest.raises(graft.RoutingError, match=r"no tensor with a gradient.*dataclasses.*checkpointing off"):
        unpack(model(X, adapter_names=FIRST)).square().sum().backward()
    model.zero_grad()
    inner = model.get_base_model()
    for run in (model, inner):  # what is not mixed is as before, also past the model's own forward
        unpack(run(X)).square().sum().backward()
        assert all(".b." not in name for name in gradients(model))
    model.get_base_model().reentrant = None
    unpack(model(X, adapter_names=FIRST)).square().sum().backward()
    equal(gradients(model), expected)


def test_parameters_in_an_output_are_left_alone():
    model = packing(lambda y: (y, model.get_base_model().first.lora_A["b"].weight))
    _, p = model(X, adapter_names=FIRST)
    assert not p._backward_hooks


# threads


def test_batches_of_several_threads_have_rows_of_their_own():
    model = adapter_pair(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), "LORA", ["0", "2"], r=2)
    batches = [["default"] * 4, ["b"] * 4, None]
    expected = [model(X, adapter_names=names).detach() for names in batches]
    outcomes = []

    def work(i):
        for _ in range(150):
            outcomes.append(torch.equal(model(X, adapter_names=batches[i]), expected[i]))

    at_once(*(partial(work, i) for i in range(3)))
    assert outcomes == [True] * 450
    assert torch.equal(model(X, adapter_names=batches[1]), expected[1])


def test_outputs_are_saved_without_a_warning_of_hooks():
    """torch warns of the hooks of a tensor that it saves, and warnings are errors here."""
    model = graft.get_peft_model(models.make("mlp"), graft.LoraConfig(r=2, target_modules=["fc1"]))
    y = model(**models.inputs("mlp"))
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file), y)
    y.sum().backward()
    assert any(p.grad is not None for p in model.parameters())


def test_contexts_of_failed_backward_passes_are_removed_once_their_thread_has_ended():
    call, this, ended = Call(), get_ident(), -1  # no thread has the identifier -1
    release = Event()
    running = Thread(target=release.wait)
    running.start()
    threads = {
        "here": (ended, this),
        "ended": (this, ended),
        "running": (this, running.ident),
        "of another": (ended, ended),
    }
    call._restored.update({task: RecomputeContext(NOTHING, pair) for task, pair in threads.items()})
    call._drop_stale_contexts()
    release.set()
    running.join()
    assert set(call._restored) == {"running", "of another"}
