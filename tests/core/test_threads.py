# SPDX-License-Identifier: Apache-2.0
"""`disable_adapter` is of the thread that is in it: what others compute stays as it is."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import graft
from graft.core.call import Call
from tests import models
from tests.looks import get_registry, layers, merged
from tests.models import adapted, disturb, seeded
from tests.threads import at_once

pytestmark = pytest.mark.filterwarnings("ignore:This thread was started while another thread:graft.PeftWarning")
X = torch.linspace(-1, 1, 18).view(6, 3)


class Net(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        self.first, self.second, self.head, self.reentrant = (
            nn.Linear(3, 3),
            nn.Linear(3, 3),
            nn.Linear(3, 2),
            reentrant,
        )

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if self.reentrant is not None:
            h = checkpoint(self.second, h, use_reentrant=self.reentrant)
        else:
            h = self.second(h)
        return self.head(h)


CONFIGS = {
    "LORA": graft.LoraConfig(r=2, target_modules=["first", "second"], modules_to_save=["head"]),
    "HRA": graft.HRAConfig(r=2, target_modules=["first", "second"]),
    "LN_TUNING": graft.LNTuningConfig(target_modules=["first", "second"]),
}


def base(**options):
    with seeded(0):
        return Net(**options)


def two_adapters(method="LORA", **options):
    names = "a" if method == "LN_TUNING" else "ab"
    model = adapted(base(**options), dict.fromkeys(names, CONFIGS[method]))
    if method == "LORA":
        model.base_model.model.head.modules_to_save["a"].weight.data.add_(1)
    return model


def in_thread(function):
    """What a function returns or raises in another thread."""
    found = []

    def run():
        try:
            found.append(function())
        except Exception as e:
            found.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    return found[0]


@pytest.mark.parametrize("method", CONFIGS)
def test_other_threads_keep_their_adapters(method):
    model = two_adapters(method)
    on, off = model(X), base()(X)
    assert (on - off).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(X), off) and torch.equal(model.base_model.model(X), off)
        assert torch.equal(in_thread(lambda: model(X)), on)
        assert torch.equal(in_thread(lambda: model.base_model.model(X)), on)
        layer = layers(model)["first"]
        assert layer.disable_adapters and not in_thread(lambda: layer.disable_adapters)
        with model.disable_adapter():
            assert torch.equal(model(X), off)
        assert torch.equal(model(X), off)
        assert not model.has_active_enabled_adapter and in_thread(lambda: model.has_active_enabled_adapter)
    assert torch.equal(model(X), on) and not get_registry(model).call.open


@pytest.mark.differs("`disable_adapter()` and threads")
def test_a_thread_that_may_have_been_started_for_the_block_is_told():
    model = two_adapters()
    asked, entered = threading.Event(), threading.Event()
    early = threading.Thread(target=lambda: (asked.wait(10), model(X), entered.set()))
    early.start()
    with model.disable_adapter():
        with pytest.warns(graft.PeftWarning, match="For the base model, open a block in this thread"):
            in_thread(lambda: model(X))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            asked.set()
            assert entered.wait(10)
    early.join()


def test_the_block_and_the_switch_are_apart():
    model = two_adapters()
    on, off = model(X), base()(X)
    model.base_model.disable_adapter_layers()
    assert torch.equal(in_thread(lambda: model(X)), off), "a switch is of the model"
    with model.disable_adapter():
        model.base_model.enable_adapter_layers()
        assert torch.equal(model(X), off) and torch.equal(in_thread(lambda: model(X)), on)
    assert torch.equal(model(X), on)


def test_a_block_that_another_thread_leaves():
    model = two_adapters()
    on, block = model(X), model.disable_adapter()
    block.__enter__()
    in_thread(lambda: block.__exit__(None, None, None))
    assert torch.equal(model(X), on) and torch.equal(in_thread(lambda: model(X)), on)


def test_many_threads_at_once():
    model = two_adapters()
    on, off = model(X), base()(X)
    wrong = []

    def plain():
        for _ in range(120):
            if not torch.equal(model(X), on):
                wrong.append("on")

    def block():
        for _ in range(60):
            with model.disable_adapter():
                if not torch.equal(model(X), off):
                    wrong.append("off")
            if not torch.equal(model(X), on):
                wrong.append("on again")

    at_once(plain, block, block, plain)
    assert not wrong and not get_registry(model).call.open


def test_token_rows_and_what_reads_the_weight_follow_the_thread():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(9, 4)

        def forward(self, ids):
            return self.emb(ids) @ self.emb.weight.T

    ids, plain = torch.arange(9), None
    with seeded(0):
        net = Words()
    plain = net(ids)
    model = disturb(
        graft.get_peft_model(net, graft.TrainableTokensConfig(token_indices=[1, 4], target_modules=["emb"]))
    )
    on = model(ids)
    with model.disable_adapter():
        assert torch.equal(model(ids), plain) and torch.equal(in_thread(lambda: model(ids)), on)
    assert (on - plain).abs().max() > 1e-3


def test_prompts_follow_the_thread():
    config = graft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = graft.get_peft_model(models.make("llama"), config).eval()
    batch = models.inputs("llama", 2)
    on, off = models.output(model, batch), models.output(models.make("llama").eval(), batch)
    with model.disable_adapter():
        assert_close(models.output(model, batch), off)
        assert torch.equal(in_thread(lambda: models.output(model, batch)), on)


def test_a_mixed_batch_in_a_block_runs_the_base_and_one_beside_it_its_adapters():
    model, names = two_adapters(), ["a", "b", "a", "b", "__base__", "a"]
    mixed, off = model(X, adapter_names=names), base()(X)
    with model.disable_adapter():
        assert torch.equal(model(X, adapter_names=names), off)
        assert torch.equal(in_thread(lambda: model(X, adapter_names=names)), mixed)
    assert torch.equal(model(X, adapter_names=names), mixed)


def test_an_adapter_that_comes_within_a_block_is_enabled_after_it():
    model = two_adapters()
    with model.disable_adapter():
        model.add_adapter("c", copy.deepcopy(CONFIGS["LORA"]))
        assert torch.equal(model(X), base()(X))
    model.set_adapter("c")
    assert not any(layer.disable_adapters for layer in layers(model).values())


def test_a_copy_is_in_no_block():
    model = two_adapters()
    on = model(X)
    with model.disable_adapter():
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert not any(get_registry(twin).call.open for twin in twins)
        for twin in twins:
            assert torch.equal(twin(X), on)
    assert not pickle.loads(pickle.dumps(Call())).open


# merged


def test_a_block_takes_out_what_is_merged_if_nobody_else_runs():
    model = two_adapters()
    on, off = model(X), base()(X)
    model.merge_adapter(["a"])
    with model.disable_adapter():
        assert_close(model(X), off)
        assert not merged(model)
        assert_close(in_thread(lambda: model(X)), on)
        error = in_thread(model.merge_adapter)
        assert isinstance(error, ValueError) and "which may be another thread's" in str(error)
    assert_close(model(X), on)


def test_a_block_waits_for_others_that_run_what_is_merged():
    model = two_adapters()
    model.merge_adapter(["a"])
    on, off, entered, leave = model(X), base()(X), threading.Event(), threading.Event()

    def wait(*_):
        entered.set()
        leave.wait(10)

    def block():
        with model.disable_adapter():
            return model(X)

    handle = model.base_model.model.second.base_layer.register_forward_pre_hook(wait)
    found = []
    threads = [threading.Thread(target=lambda: found.append(model(X)))]
    threads[0].start()
    entered.wait(10)
    handle.remove()
    threads.append(threading.Thread(target=lambda: found.append(block())))
    threads[1].start()
    while get_registry(model).call.gate.closed_by is None:
        pass
    assert merged(model) == ["a"]
    leave.set()
    for thread in threads:
        thread.join(10)
    assert torch.equal(found[0], on) and not merged(model)
    assert_close(found[1], off)
    assert_close(model(X), on)


# what a backward pass runs again


def gradients(model, before, within):
    """Of the input, for a call before a block or in it, and its backward pass within the block or after it."""
    x = X.clone().requires_grad_()
    loss = model(x).square().sum() if before else None
    with model.disable_adapter():
        if not before:
            loss = model(x).square().sum()
        if within:
            loss.backward()
    if not within:
        loss.backward()
    assert not get_registry(model).call.open
    return x.grad


@pytest.mark.differs("`disable_adapter()` and gradient checkpointing")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("before", [False, True], ids=["disabled", "enabled"])
@pytest.mark.parametrize("within", [False, True], ids=["backward after the block", "backward in the block"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["one thread", "backward in another"])
def test_layers_that_run_again_are_those_of_their_call(reentrant, before, within, elsewhere, monkeypatch):
    expected = gradients(two_adapters(), before, within)
    if elsewhere:  # as on a GPU
        backward = torch.Tensor.backward
        monkeypatch.setattr(torch.Tensor, "backward", lambda t: in_thread(lambda: backward(t)))
    assert_close(gradients(two_adapters(reentrant=reentrant), before, within), expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_one_backward_pass_of_a_disabled_call_and_another_is_refused_where_layers_run_again(reentrant):
    model = two_adapters(reentrant=reentrant)
    x = X.clone().requires_grad_()
    with model.disable_adapter():
        loss = model(x).sum()
    with pytest.raises(graft.RoutingError, match="gates or disabled adapters"):
        (loss + model(x).square().sum()).backward()
    x.grad = None
    model(x).square().sum().backward()
    assert_close(x.grad, gradients(two_adapters(), True, False))


def test_a_backward_pass_and_the_calls_of_another_thread():
    """A thread that runs the model meanwhile neither gets the rows of a backward pass nor takes them away."""
    model, names = two_adapters(reentrant=False), ["a", "b", "a", "b", "__base__", "a"]
    plain, expected, seen = model(X), [], []
    for made, watch in ((two_adapters(), False), (model, True)):
        x = X.clone().requires_grad_()
        y = made(x, adapter_names=names)
        if watch:
            y.register_hook(lambda _g: seen.append(in_thread(lambda: model(X))))
        y.square().sum().backward()
        expected.append(x.grad)
    assert torch.equal(seen[0], plain)
    assert_close(expected[1], expected[0])


# compiled


def test_compiled_code_is_of_its_thread_as_well():
    torch._dynamo.reset()
    model = two_adapters()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    on, off = model(X), base()(X)
    assert_close(compiled(X), on)
    with model.disable_adapter():
        assert_close(compiled(X), off)
        assert_close(in_thread(lambda: compiled(X)), on)
        assert_close(compiled(X), off)
    assert_close(compiled(X), on)
