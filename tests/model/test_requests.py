# SPDX-License-Identifier: Apache-2.0
"""A request sees one state of the model from its beginning to its end, whatever other threads change meanwhile."""

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import graft
from graft.core.gate import Gate
from graft.io import save
from graft.io.load import CheckpointValues
from graft.model import functional
from graft.serving import AdapterSlots
from tests import models
from tests.covering import EVERYTHING
from tests.looks import get_registry, layers
from tests.models import adapted, disturb, seeded
from tests.raised import refuses
from tests.threads import at_once, in_child

X = torch.linspace(-1, 1, 18).view(6, 3)
NAMES = ["ann", "bob", "ann", "bob", "__base__", "ann"]


class Net(nn.Module):
    """Layers of two adapters, between which a request can be stopped, and a `generate` of three steps."""

    def __init__(self, checkpoints=False):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.checkpoints = checkpoints

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = checkpoint(self.second, h, use_reentrant=False) if self.checkpoints else self.second(h)
        return self.head(h)

    def generate(self, x):
        return torch.stack([self(x * (step + 1)) for step in range(3)])


CONFIGS = {
    "LORA": graft.LoraConfig(r=2, target_modules=["first", "second"], modules_to_save=["head"]),
    "HRA": graft.HRAConfig(r=2, target_modules=["first", "second"]),
    "VERA": graft.VeraConfig(r=2, target_modules=["first", "second"]),
    "BONE": graft.MissConfig(r=1, target_modules=["first", "second"]),
}


def two_adapters(method="LORA", seed=1, **options):
    with seeded(0):
        base = Net(**options)
    configs = dict.fromkeys(["ann", "bob"], CONFIGS[method])
    model = adapted(base, configs, seed=seed, scale=0.3 * seed, change_timeout=30)
    if method == "LORA":
        for i, own in enumerate(base.head.modules_to_save.values()):
            own.weight.data.add_(i + seed)
    return model


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A folder with adapters "ann" and "bob" of other values."""
    folder = tmp_path_factory.mktemp("other")
    two_adapters(seed=2).save_pretrained(folder)
    return folder


KINDS = {
    "plain": lambda model: model(X),
    "mixed": lambda model: model(X, adapter_names=NAMES),
    "generate": lambda model: model.generate(X),
    "mixed generate": lambda model: model.generate(X, adapter_names=NAMES),
    "tuner": lambda model: model.base_model(X),
    "block": lambda model: in_block(model),
}


def in_block(model):
    """Run the base model's own forward: nothing sees it but the block around it."""
    with graft.calling(model):
        return get_registry(model).model(X)


@dataclass
class Change:
    act: Any  # (model, folder of other values)
    before: Any = lambda model: None
    beside: tuple = tuple(KINDS)


def rescaled(model, _):
    with functional.rescale_adapter_scale(model, 0.5):
        model(X)


def disabled(model, _):
    with model.disable_adapter():
        model(X)


def base_values(model, _):
    state = {k: v * 2 for k, v in graft.get_base_model_state_dict(model).items()}
    graft.set_base_model_state_dict(model, state)


def with_values(model, folder):
    graft.set_peft_model_state_dict(model, graft.load_peft_weights(str(folder / "ann")), "ann")


PLAIN = ("plain", "generate", "tuner", "block")
CHANGES = {
    "set_adapter": Change(lambda m, _: m.set_adapter("bob")),
    "several": Change(lambda m, _: m.base_model.set_adapter(["bob"])),
    "functional set_adapter": Change(lambda m, _: functional.set_adapter(m, "bob")),
    "layer.set_adapter": Change(lambda m, _: layers(m)["second"].set_adapter("bob")),
    "disable_adapter_layers": Change(lambda m, _: m.base_model.disable_adapter_layers()),
    "enable_adapter_layers": Change(
        lambda m, _: m.base_model.enable_adapter_layers(), lambda m: m.base_model.disable_adapter_layers()
    ),
    "layer.enable_adapters": Change(lambda m, _: layers(m)["second"].enable_adapters(False)),
    "delete_adapter": Change(lambda m, _: m.delete_adapter("ann")),
    "unload": Change(lambda m, _: m.base_model.unload()),
    "load_adapter": Change(lambda m, folder: m.load_adapter(folder / "ann", "ann")),
    "hotswap_adapter": Change(lambda m, folder: graft.hotswap_adapter(m, folder / "ann", "ann")),
    "set_peft_model_state_dict": Change(with_values),
    "set_base_model_state_dict": Change(base_values),
    "merge_adapter": Change(lambda m, _: m.base_model.merge_adapter()),
    "layer.merge": Change(lambda m, _: layers(m)["second"].merge()),
    "unmerge_adapter": Change(
        lambda m, _: m.base_model.unmerge_adapter(), lambda m: m.base_model.merge_adapter(), PLAIN
    ),
    "disable_adapter of merged": Change(disabled, lambda m: m.base_model.merge_adapter(), PLAIN),
    "merge_and_unload": Change(lambda m, _: m.base_model.merge_and_unload()),
    "add_adapter": Change(lambda m, _: m.add_adapter("new", copy.deepcopy(CONFIGS["LORA"]))),
    "pissa": Change(
        lambda m, _: m.add_adapter("new", graft.LoraConfig(r=2, target_modules=["first"], init_lora_weights="pissa"))
    ),
    "load_adapter of a new name": Change(lambda m, folder: m.load_adapter(folder / "ann", "new")),
    "add_weighted_adapter": Change(lambda m, _: m.base_model.add_weighted_adapter(["ann"], [0.5], "new")),
    "set_requires_grad": Change(lambda m, _: m.set_requires_grad("bob")),
    "train": Change(lambda m, _: m.train() and None),
    "rescale_adapter_scale": Change(rescaled),
    "prepare_model_for_compiled_hotswap": Change(
        lambda m, _: graft.prepare_model_for_compiled_hotswap(m, target_rank=4)
    ),
}
CASES = [(c, k) for c, change in CHANGES.items() for k in change.beside]
quiet = pytest.mark.filterwarnings(
    "ignore:(This thread was started|Already|All adapters|PiSSA|Adapter .* (was (active|loaded)|gets))"
)


class Thread(threading.Thread):
    """A thread that keeps what its function returns or raises."""

    def __init__(self, function, name=None):
        super().__init__(name=name, daemon=True)
        self.function, self.result = function, None
        self.start()

    def run(self):
        try:
            self.result = self.function()
        except Exception as e:
            self.result = e

    def value(self):
        self.join(20)
        assert not self.is_alive()
        return self.result


@contextmanager
def stopped_at(module, request, name):
    """A request of another thread, which stands before a module until the block ends."""
    entered, leave = threading.Event(), threading.Event()

    def stop(*_):
        if threading.current_thread() is thread and not entered.is_set():
            entered.set()
            assert leave.wait(20)

    handle = module.register_forward_pre_hook(stop)
    ready = threading.Event()
    thread = Thread(lambda: ready.wait(20) and request(), name)
    ready.set()
    assert entered.wait(20), thread.result
    handle.remove()
    try:
        yield thread
    finally:
        leave.set()
        thread.join(20)


def stopped(model, request):
    """One that stands between two layers."""
    return stopped_at(get_registry(model).model.second, lambda: request(model), "request")


def until(condition):
    """Wait until another thread has come so far."""
    for _ in range(4000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it never came so far")


def outcome(function):
    try:
        return function()
    except Exception as e:
        return type(e)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    return (a if isinstance(a, type) else type(a)) is b


@pytest.mark.differs("calls and changes in several threads")
@quiet
@pytest.mark.parametrize(("change", "kind"), CASES, ids=[f"{c}-{k}" for c, k in CASES])
def test_a_change_waits_for_a_request_and_later_ones_for_the_change(change, kind, other):
    act, request = CHANGES[change].act, KINDS[kind]
    model, twin = two_adapters(), two_adapters()
    for each in (model, twin):
        CHANGES[change].before(each)
    before, gate = request(model), get_registry(model).call.gate
    act(twin, other)
    after = outcome(lambda: request(twin))
    with stopped(model, request) as thread:
        changing = Thread(lambda: act(model, other))
        until(lambda: gate.closed_by is not None)
        later = Thread(lambda: request(model))
        until(lambda: gate.waiting)
        assert changing.is_alive() and later.is_alive()
    assert torch.equal(thread.value(), before)
    assert not isinstance(changing.value(), Exception), changing.result
    assert same(later.value(), after) or change in ("rescale_adapter_scale",)
    assert same(outcome(lambda: request(model)), after)
    assert not (gate.calls or gate.waiting or gate.closed_by or gate.turn_of)


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_requests_of_any_kind_run_side_by_side(first, second):
    model = two_adapters()
    expected = [KINDS[kind](model) for kind in (first, second)]
    with stopped(model, KINDS[first]) as thread:
        assert torch.equal(KINDS[second](model), expected[1])
    assert torch.equal(thread.value(), expected[0])
    assert not get_registry(model).call.open


# within a request of the same thread


def within(model, request, act):
    """The outcome of a change in the middle of a request, and that of the request."""
    found = []

    def change(*_):
        if not found:
            found.append(None)
            found[0] = outcome(lambda: act(model))

    handle = get_registry(model).model.second.register_forward_pre_hook(change)
    output = request(model)
    handle.remove()
    return found[0], output


ACTS = ("add_adapter", "load_adapter of a new name", "add_weighted_adapter", "set_requires_grad", "train")
TEARS = [(change, kind) for change, kind in CASES if change not in ACTS]


@quiet
@pytest.mark.parametrize(("change", "kind"), TEARS, ids=[f"{c}-{k}" for c, k in TEARS])
def test_a_change_within_a_request_is_refused_where_it_would_tear_it(change, kind, other):
    model = two_adapters()
    CHANGES[change].before(model)
    before, request = KINDS[kind](model), KINDS[kind]
    error, output = within(model, request, lambda m: CHANGES[change].act(m, other))
    assert error is graft.InUseError
    assert torch.equal(output, before) and torch.equal(request(model), before)
    assert not isinstance(outcome(lambda: CHANGES[change].act(model, other)), type)


def acts_on_b(folder):
    return {
        "delete": lambda m: m.delete_adapter("bob"),
        "load": lambda m: m.load_adapter(folder / "bob", "bob") and None,
        "hotswap": lambda m: graft.hotswap_adapter(m, folder / "bob", "bob"),
        "values": lambda m: (
            graft.set_peft_model_state_dict(m, graft.load_peft_weights(str(folder / "bob")), "bob") and None
        ),
        "train": lambda m: m.set_requires_grad("bob"),
        "a new one": lambda m: m.add_adapter("new", copy.deepcopy(CONFIGS["LORA"])),
        "a new file": lambda m: m.load_adapter(folder / "ann", "new") and None,
        "combined": lambda m: m.base_model.add_weighted_adapter(["ann"], [0.5], "new") and None,
    }


@pytest.mark.parametrize("act", acts_on_b(None))
def test_a_change_within_a_request_acts_on_what_the_request_does_not_use(act, other):
    model = two_adapters()
    before = model(X)
    error, output = within(model, KINDS["plain"], acts_on_b(other)[act])
    assert error is None and torch.equal(output, before)
    if act in ("delete", "load", "hotswap", "values", "train"):
        assert within(two_adapters(), KINDS["mixed"], acts_on_b(other)[act])[0] is graft.InUseError


@pytest.mark.filterwarnings("ignore:Adapter 'bob' was a part of")
@pytest.mark.parametrize("first, second", [("bob", "both"), ("both", "bob"), ("both", "deleted")])
def test_a_call_that_waits_for_another_composition_has_it(first, second):
    acts = {
        "bob": lambda m: m.set_adapter("bob"),
        "both": lambda m: m.set_adapter(graft.Parallel("ann", "bob")),
        "deleted": lambda m: m.delete_adapter("bob"),
    }
    model, after = two_adapters().eval(), two_adapters().eval()
    acts[first](model)
    acts[second](after)
    with stopped(model, lambda m: m(X)):
        changes = Thread(lambda: acts[second](model))
        until(lambda: get_registry(model).call.gate.closed_by)
        later = Thread(lambda: model(X))
        until(lambda: get_registry(model).call.gate.waiting)
    assert changes.value() is None and torch.equal(later.value(), after(X))


def test_the_composition_of_a_call_is_checked_when_the_call_begins():
    """Its adapters may come or go while it waits."""
    model = two_adapters("HRA")
    gate = get_registry(model).call.gate
    with gate.change("a change"):
        request = Thread(lambda: model(X, compose=graft.Stack("ann", "new")), "request")
        until(lambda: gate.waiting)
        model.add_adapter("new", CONFIGS["HRA"])
        disturb(model)
    assert torch.equal(request.value(), model(X, compose=graft.Stack("ann", "new")))
    with gate.change("a change"):
        request = Thread(lambda: model(X, compose=graft.Stack("ann", "new")), "request")
        until(lambda: gate.waiting)
        model.delete_adapter("new")
    assert isinstance(request.value(), graft.RoutingError) and "['new'], which are not loaded" in str(request.result)


def test_the_reason_names_the_call_and_the_remedy():
    model, errors = two_adapters(), []

    def change(*_):
        with pytest.raises(graft.InUseError) as e:
            model.set_adapter("bob")
        errors.append(str(e.value))

    model.base_model.model.second.register_forward_pre_hook(change)
    model(X), model(X, adapter_names=NAMES), model.generate(X)
    assert "set_adapter('bob')" in errors[0] and "forward with adapters ['ann']" in errors[0]
    assert "forward with adapters ['__base__', 'ann', 'bob']" in errors[1] and "generate" in errors[2]
    assert all("adapter_names" in e and "between calls" in e for e in errors)


def test_blocks_and_further_calls_within_a_request():
    model = two_adapters()
    on, mixed = model(X), model(X, adapter_names=NAMES)
    with model.disable_adapter():
        off = model(X)

    def further(m):
        with m.disable_adapter():
            assert torch.equal(m(X), off)
        assert torch.equal(m(X, adapter_names=NAMES), mixed)

    for kind in ("plain", "mixed", "generate"):
        expected = KINDS[kind](model)
        error, output = within(model, KINDS[kind], further)
        assert error is None and torch.equal(output, expected)
    assert torch.equal(model(X), on)


def test_a_callback_between_calls_and_a_backward_pass_to_come_are_no_requests():
    model = two_adapters().train()
    loss = model(X).square().sum()
    model.add_adapter("new", copy.deepcopy(CONFIGS["LORA"]))  # as a callback of a Trainer may do
    model.base_model.set_adapter(["ann"])
    loss.backward()
    assert layers(model)["first"].lora_B["ann"].weight.grad is not None


# patience


def test_a_timeout_names_the_calls_and_changes_nothing(other):
    model = two_adapters()
    model.change_timeout, on = 0.05, model(X)
    with stopped(model, KINDS["mixed"]):
        with pytest.raises(
            graft.InUseError,
            match=r"set_adapter\('bob'\) changed nothing, since it waited 0.05 s.*forward.*'request'.*change_timeout",
        ):
            model.set_adapter("bob")
        refuses(graft.InUseError, "add_adapter", model.add_adapter, "new", copy.deepcopy(CONFIGS["LORA"]))
        refuses(graft.InUseError, "load_adapter", model.load_adapter, other / "ann", "new")
        assert model.active_adapter == "ann" and list(model.peft_config) == ["ann", "bob"]
        assert not any("new" in layer.methods for layer in layers(model).values())
        assert torch.equal(model(X), on)
    model.add_adapter("new", copy.deepcopy(CONFIGS["LORA"]))
    with ThreadPoolExecutor(1) as pool:  # another thread gets its turn as well
        pool.submit(model.set_adapter, "bob").result(20)


def test_a_call_that_waits_too_long_for_a_change_says_for_which():
    model = two_adapters()
    gate = get_registry(model).call.gate
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with gate.change("a long one"):
            entered.set()
            leave.wait(20)

    thread = Thread(hold, "changer")
    entered.wait(20)
    model.change_timeout = 0.05
    refuses(graft.InUseError, r"forward waited 0.05 s for a long one in thread 'changer'", model, X)
    with pytest.raises(
        graft.InUseError, match=r"set_adapter\('bob'\) waited 0.05 s for a long one in thread 'changer'"
    ):
        model.set_adapter("bob")
    leave.set()
    thread.value()
    assert not gate.waiting and not gate.calls
    model(X)


@pytest.mark.parametrize("timeout", [None, 7.0])
def test_the_timeout_is_an_argument(timeout, other):
    with seeded(0):
        made = graft.get_peft_model(Net(), copy.deepcopy(CONFIGS["HRA"]), change_timeout=timeout)
    with seeded(0):
        loaded = graft.PeftModel.from_pretrained(Net(), other / "ann", change_timeout=timeout)
    for model in (made, loaded, copy.deepcopy(made), pickle.loads(pickle.dumps(loaded))):
        assert model.change_timeout == timeout


def test_neither_calls_nor_changes_starve():
    gate, done, stop = Gate(), [], threading.Event()

    def calls():
        while not stop.is_set():
            with gate.call("call"):
                pass

    def changes():
        while not stop.is_set():
            with gate.change("change"):
                pass

    def some(context, n=30):
        for _ in range(n):
            with context():
                pass
        done.append(1)
        if len(done) == 2:
            stop.set()

    at_once(calls, changes, calls, changes, *(partial(some, partial(f, "one")) for f in (gate.call, gate.change)))
    assert len(done) == 2 and not (gate.calls or gate.waiting or gate.closed_by)


# what is not in the gate


def test_reading_and_building_go_on_beside_requests(other, monkeypatch):
    model, of = two_adapters(), CheckpointValues.match_entries
    expected, building, leave = model(X, adapter_names=NAMES), threading.Event(), threading.Event()

    def slow(self, *args):
        building.set()
        assert leave.wait(20)
        return of(self, *args)

    monkeypatch.setattr(CheckpointValues, "match_entries", slow)
    for name in ("new", "ann"):
        building.clear(), leave.clear()
        thread = Thread(partial(model.load_adapter, other / "ann", name))
        assert building.wait(20)
        for _ in range(3):
            assert torch.equal(model(X, adapter_names=NAMES), expected)
        changing = Thread(lambda: model.set_adapter("bob"))  # changes come one after another
        assert changing.is_alive()
        leave.set()
        assert not isinstance(thread.value(), Exception), thread.result
        changing.value()
        model.set_adapter("ann")
    assert not torch.equal(model(X, adapter_names=NAMES), expected)


OTHERS = ["bob", "cid", "dan", "eve"]


READS = {
    "save_pretrained": lambda m, folder: m.save_pretrained(folder),
    "layout": lambda m, folder: m.save_pretrained(folder, layout="vllm"),
    "for_server": lambda m, folder: m.save_pretrained(folder, for_server="vllm"),
    "adapter_tensors": lambda m, _: graft.adapter_tensors(m, "ann").tensors,
    "AdapterSlots.load": lambda m, _: in_slots(m),
    "reference": lambda m, _: m.reference("ann") and graft.get_peft_model_state_dict(m, adapter_name="ann-reference"),
}


def in_slots(model):
    with seeded(0):
        slots = AdapterSlots(Net(), 1, 2, ["first", "second"])
    slots.load("x", model, adapter="ann")
    return {key: f.A for key, f in slots._known["x"].factors.items()}


@pytest.mark.parametrize("name", READS)
def test_a_save_holds_what_adapters_were_when_it_began(name, other, tmp_path, monkeypatch):
    def values(made):
        return graft.load_peft_weights(str(tmp_path / "ann")) if made is None else made

    def model():
        with seeded(0):
            base = Net()
        configs = dict.fromkeys(["ann", "bob"], graft.LoraConfig(r=2, target_modules=["first", "second"]))
        return adapted(base, configs, seed=1, scale=0.3, change_timeout=30)

    expected = {k: v.clone() for k, v in values(READS[name](model(), tmp_path)).items()}
    changing, changes = model(), []
    new = {k: v + 1 for k, v in graft.get_peft_model_state_dict(changing, adapter_name="ann").items()}

    def collected(*args, **kwargs):
        """Return what is there, while another thread waits to change it."""
        found = original(*args, **kwargs)
        if not changes:
            changes.append(Thread(lambda: graft.set_peft_model_state_dict(changing, new, "ann")))
            until(lambda: changing._registry.call.gate.closed_by or not changes[0].is_alive())
        return found

    original = save.list_entries
    monkeypatch.setattr(save, "list_entries", collected)
    made = values(READS[name](changing, tmp_path))
    assert changes and made.keys() == expected.keys() and all(torch.equal(made[k], v) for k, v in expected.items())
    changes[0].value()
    after = graft.get_peft_model_state_dict(changing, adapter_name="ann")
    assert all(torch.equal(after[k], v) for k, v in new.items())


def test_two_loads_at_once_bring_both(other):
    config = graft.LoraConfig(r=2, target_modules=["head"])
    for _ in range(5):
        model = graft.get_peft_model(Net(), graft.LoraConfig(r=2, target_modules=["first"]), "ann")
        at_once(*(partial(model.add_adapter, name, copy.deepcopy(config)) for name in OTHERS))
        assert set(layers(model)["head"].methods) == set(OTHERS) and next(iter(model.peft_config)) == "ann"


def test_what_a_backward_pass_runs_again_is_no_request():
    model = two_adapters(checkpoints=True).train()
    x = X.clone().requires_grad_()
    loss = model(x, adapter_names=NAMES).square().sum()
    with get_registry(model).call.gate.change("a change"):
        assert Thread(loss.backward).value() is None
    assert x.grad.abs().sum() > 0


def test_each_thread_trains_with_the_rows_of_its_own_request():
    orders, expected = [NAMES, NAMES[::-1], ["bob"] * 6, None], []
    model = two_adapters(checkpoints=True).train()

    def gradient(names):
        x = X.clone().requires_grad_()
        y = model(x) if names is None else model(x, adapter_names=names)
        return torch.autograd.grad(y.square().sum(), x)[0]

    expected, wrong = [gradient(names) for names in orders], []

    def work(i):
        wrong.extend(i for _ in range(15) if not torch.equal(gradient(orders[i]), expected[i]))

    at_once(*(partial(work, i) for i in range(4)))
    assert not wrong and not get_registry(model).call.open


def test_copies_and_child_processes_begin_with_an_open_gate():
    model = two_adapters()
    expected = model(X)
    with stopped(model, KINDS["plain"]):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            twin.set_adapter("bob")
            assert not get_registry(twin).call.gate.calls

        def child():
            model.set_adapter("bob")
            model(X)

        assert in_child(child) == 0
    assert torch.equal(model(X), expected)


def test_a_compiler_sees_nothing_of_it_and_a_block_guards_compiled_calls():
    torch._dynamo.reset()
    model = two_adapters()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before, gate = compiled(X), get_registry(model).call.gate
    with graft.calling(model):
        assert gate.calls
        thread = Thread(lambda: model.set_adapter("bob"))
        until(lambda: gate.closed_by)
        assert torch.equal(compiled(X), before)
    thread.value()
    assert not torch.equal(compiled(X), before)


def test_a_model_without_a_wrapper_has_a_gate_as_well():
    with seeded(0):
        model = Net()
    graft.inject_adapter_in_model(graft.LoraConfig(r=2, target_modules=["first", "second"]), model, "ann")
    graft.inject_adapter_in_model(graft.LoraConfig(r=2, target_modules=["first", "second"]), model, "bob")
    for name in ("ann", "bob"):
        model.second.lora_B[name].weight.data.fill_(len(name) if name == "ann" else 1.0)
    functional.set_adapter(model, "ann")
    before = model(X)
    with graft.calling(model):
        h = model.first(X)
        thread = Thread(lambda: functional.set_adapter(model, "bob"))
        until(lambda: model.first.call.gate.closed_by)
        assert torch.equal(model.head(model.second(torch.tanh(h))), before)
        refuses(graft.InUseError, r"a block of graft\.calling", functional.delete_adapter, model, "ann")
    thread.value()
    assert not torch.equal(model(X), before)
    refuses(graft.AdapterNotFoundError, "no adapter", graft.calling, Net())


def test_labels_of_heads_with_other_sizes_are_those_of_the_request():
    class Classifier(nn.Module):
        """A loss that reads the number of labels, as those of transformers do."""

        def __init__(self):
            super().__init__()
            self.body, self.score = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)
            self.config, self.num_labels = SimpleNamespace(num_labels=2, id2label=None, label2id=None), 2

        def forward(self, input_ids, labels):
            logits = self.score(torch.tanh(self.body(input_ids)))
            n = self.config.num_labels
            return logits, nn.functional.cross_entropy(logits.view(-1, n), labels)

    with seeded(0):
        base = Classifier()
    config = graft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["body"])
    model = graft.get_peft_model(base, copy.deepcopy(config), "two").eval()
    model.add_adapter("five", copy.deepcopy(config), heads={"score": nn.Linear(4, 5, bias=False)})
    wrong = []

    def request(names, labels):
        for _ in range(30):
            logits, loss = model(X[:2], labels=torch.tensor(labels), adapter_names=names)
            if logits.shape[1] != (5 if names else 2) or not loss.isfinite():
                wrong.append(names)

    at_once(partial(request, ["five"] * 2, [4, 3]), partial(request, None, [1, 0]), partial(request, None, [0, 1]))
    assert not wrong and model.config.num_labels == 2


# many requests at once


def expected_of(model, requests):
    return [request(model) for request in requests]


def serve(model, requests, allowed, n, *work):
    """Eight threads with `n` requests each beside changes that go on meanwhile; return what nobody may get."""
    wrong, left = [], threading.Event()

    def run(i):
        for k in range(n):
            j = (i + k) % len(requests)
            got = requests[j](model)
            if not any(torch.equal(got, state[j]) for state in allowed):
                wrong.append(j)

    def keep(act):
        i = 0
        while not left.is_set():
            act(i)
            i += 1
        counts.append(i)

    counts = []
    changers = [Thread(partial(keep, act)) for act in work]
    at_once(*(partial(run, i) for i in range(8)))
    left.set()
    for thread in changers:
        value = thread.value()
        assert not isinstance(value, Exception), value
    assert len(counts) == len(work) and all(counts)
    return wrong


ROUNDS = 200 if EVERYTHING else 60
REQUESTS = [
    lambda m: m(X),
    lambda m: m(X, adapter_names=NAMES),
    lambda m: m(X, adapter_names=NAMES[::-1]),
    lambda m: m.generate(X, adapter_names=["bob"] * 6),
    lambda m: m.generate(X),
]


@quiet
@pytest.mark.parametrize("method", CONFIGS)
def test_eight_threads_beside_swapping_loading_and_deleting(method, tmp_path):
    model, allowed = two_adapters(method), []
    for seed in (1, 2):
        twin = two_adapters(method, seed)
        twin.save_pretrained(tmp_path / str(seed), selected_adapters=["bob"])
        state = graft.load_peft_weights(str(tmp_path / str(seed) / "bob"))
        graft.set_peft_model_state_dict(model, state, "bob")
        for active in ("ann", "bob"):
            model.set_adapter(active)
            allowed.append(expected_of(model, REQUESTS))

    def swap(i):
        model.set_adapter(("bob", "ann")[i % 2])

    def load(i):
        where = tmp_path / str(i % 2 + 1) / "bob"
        model.load_adapter(where, "bob")
        model.load_adapter(where, "new")
        model.delete_adapter("new")

    assert not serve(model, REQUESTS, allowed, ROUNDS, swap, load)
    assert not get_registry(model).call.open


@quiet
@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"])
def test_eight_threads_beside_swapping_loading_and_deleting_of_prompts(kind, tmp_path):
    configs = {
        "PROMPT_TUNING": graft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "PREFIX_TUNING": graft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "P_TUNING": graft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    }
    model = graft.get_peft_model(models.make("llama"), configs[kind], "ann").eval()
    model.add_adapter("bob", copy.deepcopy(configs[kind]))
    batch = models.inputs("llama", 2)
    requests = [
        lambda m: models.output(m, batch),
        lambda m: m.generate(input_ids=batch["input_ids"][:1, :4], max_new_tokens=2, do_sample=False),
    ]
    model.save_pretrained(tmp_path, selected_adapters=["bob"])
    allowed = []
    for active in ("ann", "bob"):
        model.set_adapter(active)
        allowed.append(expected_of(model, requests))
    assert not torch.equal(allowed[0][0], allowed[1][0])

    def load(_):
        model.load_adapter(tmp_path / "bob", "new")
        model.delete_adapter("new")

    assert not serve(
        model, requests, allowed, 12 if EVERYTHING else 6, lambda i: model.set_adapter(("bob", "ann")[i % 2]), load
    )


# slots


def slots_of(adapters=6, room=3, **options):
    with seeded(0):
        slots = AdapterSlots(Net(), room, 2, ["first", "second"], **options)
    for i in range(adapters):
        with seeded(i + 1):
            model = graft.get_peft_model(Net(), graft.LoraConfig(r=2, target_modules=["first", "second"]))
        slots.load(f"a{i}", disturb(model, 0.3 + i / 10))
    return slots.model.eval() and slots


def mixes(adapters=6, room=3):
    """Mixes of a batch of six rows, and single adapters."""
    found = [[f"a{(i + k * j) % adapters}" for k in range(6)] for i in range(adapters) for j in (0, 1)]
    return [[n if int(n[1]) in {int(m[1]) for m in mix[:room]} else "__base__" for n in mix] for mix in found]


def stopped_slots(slots, names):
    return stopped_at(slots.model.second, lambda: slots(X, adapter_names=names), "batch")


def test_slots_refill_beside_a_batch_what_it_does_not_use_and_wait_for_what_it_does():
    slots = slots_of(room=3)
    expected = {n: slots(X, adapter_names=n) for n in slots.names}
    mix = ["a0", "a1", "a0", "a1", "__base__", "a0"]
    before = slots(X, adapter_names=mix)
    with stopped_slots(slots, mix) as batch:
        for n in ("a2", "a3", "a4", "a0", "a1", "a5"):  # one slot is left for them
            assert torch.equal(slots(X, adapter_names=n), expected[n])
        assert {"a0", "a1"} <= slots.report().resident.keys()
        waits = Thread(lambda: slots(X, adapter_names=["a2", "a3"] * 3))
        until(lambda: slots._line)
        later = Thread(lambda: slots(X, adapter_names="a5"))
        until(lambda: len(slots._line) == 2)
        assert waits.is_alive() and later.is_alive()
    assert torch.equal(batch.value(), before) and torch.equal(later.value(), expected["a5"])
    rows = torch.stack([expected["a2"], expected["a3"]] * 3)[range(6), range(6)]
    torch.testing.assert_close(waits.value(), rows)


def test_unload_and_remove_wait_for_batches_that_use_them():
    slots = slots_of(room=3)
    expected = slots(X, adapter_names="a0")
    with stopped_slots(slots, "a0") as batch:
        slots.unload("a1")  # no batch uses it
        slots.load("new", graft.get_peft_model(Net(), graft.LoraConfig(r=2, target_modules=["first"])))
        unloads = Thread(lambda: slots.unload("a0"))
        until(lambda: "a0" not in slots.names)
        refuses(graft.RoutingError, "Unknown adapter", slots, X, adapter_names="a0")
        assert unloads.is_alive()
    assert torch.equal(batch.value(), expected) and unloads.value() is None
    assert "a0" not in slots.report().resident
    with stopped_slots(slots, "a2") as batch:
        removes = Thread(slots.remove)
        until(lambda: slots.gate.closed_by)
        assert removes.is_alive()
    assert isinstance(batch.value(), torch.Tensor) and isinstance(removes.value(), Net)


def another(seed=9):
    """An adapter for slots of `slots_of`."""
    with seeded(0):
        base = Net()
    with seeded(seed):
        return disturb(graft.get_peft_model(base, graft.LoraConfig(r=2, target_modules=["first"])), 0.5)


def test_a_name_is_taken_until_the_batches_of_its_adapter_have_ended():
    slots = slots_of(room=3)
    before = slots(X, adapter_names="a0")
    with stopped_slots(slots, "a0") as batch:
        unloads = Thread(lambda: slots.unload("a0"))
        until(lambda: "a0" not in slots.names)
        refuses(graft.AdapterNameError, "'a0'", slots.load, "a0", another())
    assert torch.equal(batch.value(), before) and unloads.value() is None
    slots.load("a0", another())
    slots.load("other", another())
    assert torch.equal(slots(X, adapter_names="a0"), slots(X, adapter_names="other"))


def test_what_a_batch_has_read_is_not_taken_for_a_later_adapter_of_that_name(tmp_path):
    slots = slots_of(room=1)
    another(8).save_pretrained(tmp_path)
    slots.load("new", tmp_path, keep=False)
    with stopped_slots(slots, "a0"):
        waits = Thread(lambda: slots(X, adapter_names="new"))
        until(lambda: slots._line)
        slots.unload("new")
        slots.load("new", another())
    slots.load("other", another())
    expected = slots(X, adapter_names="other")
    assert torch.equal(waits.value(), expected) and torch.equal(slots(X, adapter_names="new"), expected)


def test_slots_lose_patience():
    slots = slots_of(room=2, change_timeout=0.05)
    with stopped_slots(slots, ["a0", "a1"] * 3):
        with pytest.raises(graft.InUseError, match=r"A batch of \[a2\] waited 0.05 s.*'batch'.*max_adapters, now 2"):
            slots(X, adapter_names="a2")
        refuses(graft.InUseError, "unload", slots.unload, "a0")
        refuses(graft.InUseError, "remove", slots.remove)
        assert "a0" in slots.names
    slots(X, adapter_names="a2")


class Slow(dict):
    """Gives other threads time between the two steps that make an adapter the most recently used one."""

    def pop(self, *key):
        value = super().pop(*key)
        time.sleep(0.005)
        return value


def test_a_batch_finds_its_slots_while_another_makes_them_the_last_used():
    slots = slots_of()
    expected = slots(X, adapter_names="a0")
    slots._slots = Slow(slots._slots)
    assert not serve(slots, [lambda s: s(X, adapter_names="a0")], [[expected]], 4)


@pytest.mark.parametrize("keep_gathered", [True, False])
def test_eight_threads_share_slots_beside_loading_and_unloading(keep_gathered):
    slots = slots_of(room=3, keep_gathered=keep_gathered)
    batches = mixes()
    expected = [slots(X, adapter_names=mix) for mix in batches]
    requests = [lambda s, mix=mix: s(X, adapter_names=mix) for mix in batches]
    other = graft.get_peft_model(Net(), graft.LoraConfig(r=2, target_modules=["first"]))

    def come_and_go(i):
        slots.load("new", other)
        slots(X, adapter_names="new")
        slots.unload("new")

    assert not serve(slots, requests, [expected], ROUNDS, come_and_go)
    assert not (slots._using or slots._line or slots.gate.calls)
