# SPDX-License-Identifier: Apache-2.0
"""Several adapters on one base: a script of calls runs on both libraries and is compared after each call."""

import pytest
import torch

from tests import models
from tests.covering import Case, Sometimes, law
from tests.pair import LIBS, adapt, both, close, close_dicts, common, gradients, outcome, output, randomize
from tests.samples import SAMPLES, alike, each, first, mergeable, over

ONE_OF_EACH = each(models="mlp")
# methods with which several adapters can be active; of C3A, PEFT gives the second the output of the first
SUM = [s for s in ONE_OF_EACH if s.method not in ("LN_TUNING", "C3A") and "several" not in s.unlike]


def observe(model, sample):
    with torch.no_grad():
        y = output(model, sample)
    seen = {
        "active": list(model.active_adapters),
        "configs": list(model.peft_config),
        "trainable": {n for n, p in model.named_parameters() if p.requires_grad},
        "tensors": set(common(model.state_dict())),
        "output": y,
    }
    if not model.get_model_status().enabled:
        del seen["trainable"]  # PEFT freezes what it disables: test_status.py
    return seen


def compare(steps, sample):
    """Run the steps on both libraries and look after each."""
    pair = both(sample)
    for step in [lambda *_: None, *steps]:
        for lib, model in zip(LIBS, pair):
            step(lib, model, sample)
            randomize(model, sample).eval()  # values depend on names, so a new adapter differs from the old ones
        ours, theirs = (observe(m, sample) for m in pair)
        close(ours.pop("output"), theirs.pop("output"))
        assert ours == theirs


def add(name):
    def step(lib, model, sample):
        models.seed(2)
        model.add_adapter(name, sample.config(lib))

    return step


def switch(name, **options):
    return lambda lib, model, sample: model.set_adapter(name, **options)


def activate(*names):
    return lambda lib, model, sample: model.base_model.set_adapter(list(names))


def delete(name):
    return lambda lib, model, sample: model.delete_adapter(name)


def require(names, value):
    return lambda lib, model, sample: model.set_requires_grad(names, requires_grad=value)


def merge(*names):
    return lambda lib, model, sample: model.merge_adapter(adapter_names=list(names) or None)


def unmerge(lib, model, sample):
    model.unmerge_adapter()


def disable(lib, model, sample):
    model.base_model.disable_adapter_layers()


def enable(lib, model, sample):
    model.base_model.enable_adapter_layers()


SCRIPTS = {
    "add_switch": [add("b"), switch("b"), switch("default"), add("c"), switch("c")],
    "delete_inactive": [add("b"), delete("b"), add("b"), switch("b")],
    "delete_active": [add("b"), switch("b"), delete("b")],
    # after a deletion the adapter that becomes active trains
    "inference_mode": [add("b"), *[switch(n, inference_mode=True) for n in ("b", "default")], delete("default")],
    "requires_grad": [add("b"), require("b", True), require(["default", "b"], False), require("default", True)],
    "disable": [disable, enable, add("b"), disable, switch("b"), enable],
    "odd_names": [add("b c"), switch("b c"), add("b-1"), add("ünï"), switch("ünï"), delete("b c")],
}


def scripts(table, samples):
    """Cells of scripts and samples: each of both, and each script with a sixth of the methods."""
    return law(
        "script, sample",
        [Case((script, sample)) for script in table for sample in samples],
        lambda case: [case[0], case[1].method, (case[1].name, case[1].model), Sometimes((case[0], case[1].method), 6)],
    )


@scripts(SCRIPTS, ONE_OF_EACH + each("head", "mlp") + each("tokens", "gpt2"))
def test_scripts(script, sample):
    compare(SCRIPTS[script], sample)


TOGETHER = {
    "two_active": [add("b"), activate("default", "b"), activate("b"), activate("b", "default")],
    "three_active": [add("b"), add("c"), activate("c", "default", "b")],
    "delete_one_of_active": [add("b"), add("c"), activate("b", "c"), require(["b", "c"], False), delete("c")],
}


@scripts(TOGETHER, SUM + each(models="conv2d embedding conv1D"))
def test_several_active(script, sample):
    compare(TOGETHER[script], sample)


MERGED = {
    "switch_while_merged": [add("b"), merge(), switch("b")],
    "disable_while_merged": [merge(), disable, enable],
    "merge_two_then_unmerge": [add("b"), merge("default"), unmerge, merge("b"), unmerge],
}


@scripts(MERGED, mergeable(SUM))
def test_while_merged(script, sample):
    pair = [randomize(m, sample).eval() for m in both(sample)]
    for step in MERGED[script]:
        for lib, model in zip(LIBS, pair):
            step(lib, model, sample)
            model.eval()
        ours, theirs = (observe(m, sample) for m in pair)
        close(ours.pop("output"), theirs.pop("output"))
        assert ours == theirs


# PEFT's merge of two OFT adapters disagrees with its own forward: test_differences.py
@over([s for s in mergeable(SUM) if s.method != "OFT"])
def test_merge_two_active(sample):
    outputs = []
    for lib, model in zip(LIBS, both(sample)):
        model.add_adapter("b", sample.config(lib))
        randomize(model, sample).eval().base_model.set_adapter(["default", "b"])
        merged = model.merge_and_unload()
        outputs.append((dict(merged.state_dict()), output(merged, sample)))
    close_dicts(outputs[0][0], outputs[1][0])
    close(outputs[0][1], outputs[1][1])


@over(ONE_OF_EACH)
def test_second_adapter_starts_with_the_same_values(sample):
    """Drawn after the first adapter from the same generator."""
    values = []
    for lib in LIBS:
        model = adapt(lib, sample)
        model.add_adapter("b", sample.config(lib))
        values.append(dict(model.state_dict()))
    close_dicts(*values, 0)


TWICE = [s for s in alike("gradients") if s.model == "llama" and s.name == "plain" and "several" not in s.unlike]


@over(TWICE)
def test_gradients_with_two_active(sample):
    results = []
    for lib, model in zip(LIBS, both(sample)):
        model.add_adapter("b", sample.config(lib))
        randomize(model, sample).eval()
        if sample.method == "LN_TUNING":
            model.set_adapter("b")
        else:
            model.base_model.set_adapter(["default", "b"])
        results.append(gradients(model, sample))
    close_dicts(*results)


@over(ONE_OF_EACH + each("head", "mlp"))
def test_disabled_in_a_block(sample):
    results = []
    for model in (randomize(m, sample).eval() for m in both(sample)):
        on = output(model, sample)
        with model.disable_adapter():
            off = output(model, sample)
        close(output(model, sample), on, 0)
        results.append(off)
    close(results[0], results[1])
    close(results[0], models.output(models.make(sample.model), models.inputs(sample.model)))


@over(ONE_OF_EACH)
def test_disabled_block_restores_what_was_disabled(sample):
    for model in both(sample):
        model.base_model.disable_adapter_layers()
        with model.disable_adapter():
            pass
        assert not model.get_model_status().enabled


def test_heads_switch_with_their_adapter():
    sample = first("LORA", "mlp", "head")
    compare([add("b"), switch("b"), disable, enable, delete("b")], sample)


def test_adapter_without_the_others_extra_modules():
    """The second adapter has no head of its own and sees the base's."""
    sample, plain = first("LORA", "mlp", "head"), first("LORA", "mlp")
    compare([lambda lib, model, _: model.add_adapter("b", plain.config(lib)), switch("b"), switch("default")], sample)


def test_different_targets_and_ranks():
    """A layer may carry only one of the adapters."""
    sample = first("LORA")
    other = lambda lib, model, _: model.add_adapter(
        "b", lib.LoraConfig(r=5, lora_alpha=7, target_modules=["fc2", "head"], lora_dropout=0.2)
    )
    compare([other, switch("b"), activate("default", "b"), delete("default")], sample)


def test_scaling_of_one_layer():
    """The LoRA layer's own scaling API."""
    sample = first("LORA")
    results = []
    for model in (randomize(m, sample).eval() for m in both(sample)):
        layer = model.base_model.model.lin0
        layer.set_scale("default", 0.7)
        results.append([output(model, sample)])
        layer.scale_layer(3.1)
        results[-1].append(output(model, sample))
        layer.unscale_layer(1.3)
        results[-1].append(output(model, sample))
        layer.unscale_layer()
        results[-1].append(output(model, sample))
    for ours, theirs in zip(*results):
        close(ours, theirs)


@pytest.mark.parametrize("lib", LIBS)
def test_deleting_the_active_adapter_says_which_follows(lib):
    sample = first("LORA")
    model = adapt(lib, sample)
    model.add_adapter("b", sample.config(lib))
    model.set_adapter("b")
    assert outcome(lambda: model.delete_adapter("b")).warned("Setting active adapter to default")


@pytest.mark.differs("deleting the last adapter")
@pytest.mark.graft_only
@over(ONE_OF_EACH + each("head", "mlp") + each("tokens", "gpt2"))
def test_deleting_the_last_adapter_leaves_the_base(sample):
    """PEFT's forward fails with a KeyError then."""
    model = randomize(adapt(LIBS[0], sample), sample).eval()
    model.delete_adapter("default")
    assert not model.peft_config and not model.active_adapters
    base = models.make(sample.model)
    close(output(model, sample), output(base, sample), 0)
    model.add_adapter("again", sample.config(LIBS[0]))
    model.set_adapter("again")
    close(
        output(randomize(model, sample).eval(), sample),
        output(randomize(adapt(LIBS[0], sample, "again"), sample).eval(), sample),
    )


@over([s for s in SAMPLES if s.method == "TRAINABLE_TOKENS" or s.kwargs.get("trainable_token_indices")])
def test_rows_of_the_base_that_token_rows_stand_for(sample):
    found = []
    for lib, model in zip(LIBS, both(sample)):
        add("b")(lib, model, sample)
        randomize(model, sample).merge_adapter()
        holders = {k: m for k, m in model.named_modules() if hasattr(m, "trainable_tokens_original")}
        seen = {f"{k}.{n}": t.clone() for k, m in holders.items() for n, t in m.trainable_tokens_original.items()}
        model.unmerge_adapter()
        for name in "default", "b":
            model.delete_adapter(name)
        assert holders and not any(len(m.trainable_tokens_original) for m in holders.values())
        found.append(seen)
    close_dicts(*found)


def test_a_token_that_is_named_several_times_trains_as_in_peft():
    ids, found = torch.tensor([[1, 2, 3]]), []
    for lib in LIBS:
        with models.seeded(0):
            base = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4))
            model = lib.get_peft_model(base, lib.TrainableTokensConfig(token_indices=[1, 3, 1], target_modules=["0"]))
        rows = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(rows, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(ids).square().sum().backward()
            optimizer.step()
        y = model(ids).detach()
        close(model.merge_and_unload()(ids), y)
        found.append({"rows": rows[0].detach(), "y": y})
    close_dicts(*found)


def test_a_token_that_is_named_several_times_begins_as_in_the_base():
    for lib in LIBS:
        base = torch.nn.Sequential(torch.nn.Embedding(5, 64)).bfloat16()
        rows = base(torch.arange(5)).detach()
        config = lib.TrainableTokensConfig(token_indices=[1, 3, 1, 1], target_modules=["0"])
        model = lib.get_peft_model(base, config, autocast_adapter_dtype=False)
        assert torch.equal(model(torch.arange(5)), rows)
