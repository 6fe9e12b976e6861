# SPDX-License-Identifier: Apache-2.0
"""Several prompts on one base, of different lengths and with heads of their own; prompts on half-precision bases."""

import pickle
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

import graft
from tests.covering import Case, law
from tests.pair import LIBS, close_dicts, outcome
from tests.prompts.samples import (
    EMBEDS,
    MODEL,
    SAMPLES,
    adapt,
    added,
    batch,
    both,
    each,
    first,
    forward,
    make,
    randomize,
    run,
    without,
)

ONE_OF_EACH = each(MODEL)
SEVERAL = ONE_OF_EACH + each("t5", methods=("P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING"))
SEVERAL += each("bert-seq", methods=EMBEDS)


def longer(sample, by=2):
    """The same method with more tokens."""
    if sample.method != "CPT":
        return replace(sample, kwargs={**sample.kwargs, "num_virtual_tokens": sample.kwargs["num_virtual_tokens"] + by})
    more = {"cpt_token_ids": [4, 8], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 4]}
    return replace(sample, kwargs={**sample.kwargs, **{k: v + sample.kwargs[k] for k, v in more.items()}})


def add(name, by=2):
    return lambda lib, model, sample: model.add_adapter(name, longer(sample, by).config(lib))


def switch(name, **options):
    return lambda lib, model, sample: model.set_adapter(name, **options)


def delete(name):
    return lambda lib, model, sample: model.delete_adapter(name)


SCRIPTS = {
    "add_switch": [add("b"), switch("b"), switch("default"), add("c", 1), switch("c"), switch("b")],
    "delete_inactive": [add("b"), delete("b"), add("b", 1), switch("b")],
    "delete_active": [add("b"), switch("b"), delete("b")],
    "delete_first": [add("b"), switch("b"), delete("default"), add("default", 0), switch("default")],
    "inference_mode": [add("b"), switch("b", inference_mode=True), switch("default", inference_mode=True)],
    "odd_names": [add("b c"), switch("b c"), add("ünï", 1), switch("ünï")],
}


def observe(model, sample):
    """What both libraries agree on, and the output."""
    with torch.no_grad():
        seen = forward(model, batch(sample, "left"))
        bare = forward(model, without(batch(sample, "none"), "labels")) if sample.model != "t5" else {}
    state = {
        "active": list(model.active_adapters),
        "configs": {k: c.num_virtual_tokens for k, c in model.peft_config.items()},
        "parameters": {n: tuple(p.shape) for n, p in model.named_parameters()},
    }
    return {**seen, **{f"bare {k}": v for k, v in bare.items()}}, state


# PEFT's loss of CPT needs an adapter named "default"
RUNS = [Case((s, script)) for s in SEVERAL for script in SCRIPTS if (s.method, script) != ("CPT", "delete_first")]


@law("sample, script", RUNS, lambda case: [str(case[0]), (case[0].method, case[1]), (case[0].model, case[1])])
def test_scripts(sample, script):
    pair = both(sample)
    for step in [lambda *_: None, *SCRIPTS[script]]:
        for lib, model in zip(LIBS, pair):
            step(lib, model, sample)
            randomize(model).eval()  # values depend on names, so a new adapter differs from the old ones
        (ours, state), (theirs, expected) = (observe(m, sample) for m in pair)
        assert state == expected
        close_dicts(ours, theirs)


@pytest.mark.differs("prompts: `set_requires_grad`")
@pytest.mark.graft_only
@pytest.mark.parametrize("sample", SEVERAL, ids=str)
def test_only_the_active_adapter_trains(sample):
    """In PEFT all prompts do, and an optimizer with weight decay changes those that do not run."""
    model = adapt(graft, sample)
    alone = {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("b", longer(sample).config(graft))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == alone
    model.set_adapter("b")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n.replace("default", "b") for n in alone}
    model.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad(["default", "b"])
    both_names = alone | {n.replace("default", "b") for n in alone}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == both_names


@pytest.mark.parametrize("sample", SEVERAL, ids=str)
def test_gradients_of_the_second_adapter(sample):
    results = []
    for lib, model in zip(LIBS, both(sample)):
        model.add_adapter("b", longer(sample).config(lib))
        randomize(model).eval().set_adapter("b")
        for name, p in added(model).items():
            p.requires_grad_(p.requires_grad and ".b." in name)  # all of PEFT's do
        results.append(run(model, batch(sample, "right")))
    for ours, theirs in zip(*results):
        close_dicts(ours, theirs)


@pytest.mark.parametrize("sample", SEVERAL, ids=str)
def test_second_adapter_starts_with_the_same_values(sample):
    """Drawn after the first one's from the same generator."""
    values = []
    for lib in LIBS:
        model = adapt(lib, sample)
        model.add_adapter("b", longer(sample).config(lib))
        values.append(added(model))
    close_dicts(*values, 0)


@pytest.mark.parametrize("lib", LIBS, ids=lambda lib: lib.__name__)
@pytest.mark.parametrize("sample", [s for s in SEVERAL if s.model != "bert-seq"], ids=str)
def test_disabled_in_a_block(sample, lib):
    disabled(randomize(adapt(lib, sample)).eval(), sample)


@pytest.mark.graft_only
@pytest.mark.parametrize("sample", each("bert-seq", "bert-qa", "bert", methods=EMBEDS), ids=str)
def test_disabled_in_a_block_without_generation(sample):
    """PEFT looks for prepare_inputs_for_generation. The base's head is back as well."""
    disabled(randomize(adapt(graft, sample)).eval(), sample)


def disabled(model, sample):
    inputs = batch(sample, "left")
    plain, on = without(inputs, "task_ids"), forward(model, inputs)
    with model.disable_adapter():
        off = forward(model, plain)
    close_dicts(off, forward(make(sample.model), plain))
    close_dicts(forward(model, inputs), on)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    close_dicts(forward(model, inputs), on)


@pytest.mark.graft_only
def test_deleting_one_of_three_with_heads():
    """PEFT sets both others active and refuses that."""
    sample = each("bert-seq", methods=["PROMPT_TUNING"])[0]
    model = adapt(graft, sample)
    for name in ("b", "c"):
        model.add_adapter(name, longer(sample).config(graft))
    randomize(model).eval().set_adapter("c")
    expected = forward(model, batch(sample))
    model.delete_adapter("b")
    assert model.active_adapters == ["c"] and not any(".b." in name for name in added(model))
    close_dicts(forward(model, batch(sample)), expected, 0)


@pytest.mark.parametrize("sample", ONE_OF_EACH, ids=str)
def test_extra_modules(sample):
    """Given by name: trained, and switched with their adapter."""
    named = replace(sample, kwargs={**sample.kwargs, "modules_to_save": ["lm_head"]})
    results = []
    for lib, model in zip(LIBS, both(named)):
        model.add_adapter("b", longer(sample).config(lib))  # without a head
        randomize(model).eval().set_adapter("default")  # PEFT has frozen its head
        for name, p in added(model).items():
            p.requires_grad_(p.requires_grad and ".b." not in name)  # all prompts of PEFT's do
        seen, grads = run(model, batch(sample, "right"))
        assert "base_model.lm_head.modules_to_save.default.weight" in grads
        model.set_adapter("b")
        results.append([seen, grads, forward(model, batch(sample, "right"))])
    for ours, theirs in zip(*results):
        close_dicts(ours, theirs)


@pytest.mark.differs("word embeddings in `modules_to_save`")
@pytest.mark.graft_only
@pytest.mark.parametrize("sample", ONE_OF_EACH, ids=str)
def test_trained_word_embeddings(sample):
    """The adapter's own are what runs: PEFT goes on with the base's, where prompts are embeddings."""
    named = replace(sample, kwargs={**sample.kwargs, "modules_to_save": ["embed_tokens"]})
    model = randomize(adapt(graft, named)).eval()
    base = make(MODEL)
    base.set_input_embeddings(deepcopy(model.base_model.model.embed_tokens.modules_to_save["default"]))
    other = adapt(graft, sample, base=base).eval()
    other.prompt_encoder.load_state_dict(model.prompt_encoder.state_dict())
    inputs = batch(sample, "left")
    close_dicts(forward(model, inputs), forward(other, inputs))
    _, grads = run(model, inputs)
    assert grads["base_model.model.embed_tokens.modules_to_save.default.weight"].abs().max() > 0


@pytest.mark.graft_only
@pytest.mark.parametrize("sample", SEVERAL, ids=str)
def test_deleting_the_last_adapter_leaves_the_base(sample):
    """PEFT's forward fails with a KeyError then."""
    model = randomize(adapt(graft, sample)).eval()
    model.delete_adapter("default")
    assert not model.peft_config and not added(model)
    inputs = without(batch(sample, "left"), "task_ids")
    close_dicts(forward(model, inputs), forward(make(sample.model), inputs))
    model.add_adapter("again", sample.config(graft))
    model.set_adapter("again")
    fresh = randomize(adapt(graft, sample, "again")).eval()
    close_dicts(forward(randomize(model).eval(), batch(sample)), forward(fresh, batch(sample)), 0)


@pytest.mark.graft_only
def test_cpt_losses_of_two_adapters():
    """Each has its own; PEFT takes that of the adapter named "default" for all."""
    plain, decay = first("CPT"), first("CPT", "decay")
    model = adapt(graft, plain)
    model.add_adapter("b", decay.config(graft))
    randomize(model).eval().set_adapter("b")
    alone = adapt(LIBS[1], decay)
    alone.prompt_encoder["default"].load_state_dict(model.prompt_encoder["b"].state_dict())
    inputs = batch(plain)
    close_dicts(forward(model, inputs), forward(alone, inputs))
    model.set_adapter("default")
    assert abs(forward(model, inputs)["loss"] - forward(alone, inputs)["loss"]) > 1e-3


# the base


@pytest.mark.parametrize("sample", SAMPLES + each("bert-seq", methods=EMBEDS) + each("t5", "gpt2"), ids=str)
def test_half_precision_base(sample):
    """Prompts in float32, which enter in the base's precision."""
    results = []
    for lib in LIBS:
        model = randomize(adapt(lib, sample, base=make(sample.model).bfloat16())).eval()
        assert {p.dtype for p in model.prompt_encoder.parameters()} == {torch.float32}
        dtypes = {name: p.dtype for name, p in added(model).items()}
        results.append((dtypes, *run(model, batch(sample, "left"))))
    ours, theirs = results
    assert ours[0] == theirs[0]
    close_dicts(ours[1], theirs[1], 1e-2)
    assert ours[2].keys() == theirs[2].keys()
    for name, grad in theirs[2].items():
        assert ours[2][name].dtype == grad.dtype
        assert (ours[2][name] - grad).norm() <= 0.02 * grad.norm(), name


@pytest.mark.parametrize("sample", ONE_OF_EACH, ids=str)
def test_all_in_half_precision(sample):
    """The model is cast with its prompts."""
    results = []
    for model in (randomize(m).eval().bfloat16() for m in both(sample)):
        with torch.no_grad():
            results.append(forward(model, batch(sample, "left")))
    close_dicts(*results, 1e-2)


@pytest.mark.differs("prompts: the base model")
@pytest.mark.parametrize("sample", SEVERAL, ids=str)
def test_base_is_untouched(sample):
    """It is wrapped in nothing, and of its modules only the head."""
    kinds = {n: type(m) for n, m in make(sample.model).named_modules()}
    for lib in LIBS:
        model = adapt(lib, sample)
        assert model.base_model is model.get_base_model()
        now = {n: type(m) for n, m in model.base_model.named_modules()}
        assert {n for n in kinds if now[n] is not kinds[n]} == {n for n in kinds if n == "classifier"}


@pytest.mark.graft_only
@pytest.mark.parametrize("sample", SEVERAL, ids=str)
def test_copies_and_pickles(sample):
    model = adapt(graft, sample)
    model.add_adapter("b", longer(sample).config(graft))
    randomize(model).eval()
    expected = forward(model, batch(sample, "left"))
    copied, thawed = deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (copied, thawed):
        close_dicts(forward(other, batch(sample, "left")), expected)
        other.set_adapter("b")
        switched = forward(other, batch(sample, "left"))
        assert not torch.equal(switched["loss"], expected["loss"])
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
    close_dicts(forward(model, batch(sample, "left")), expected)
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("sample", ONE_OF_EACH, ids=str)
def test_what_cannot_be_added(sample):
    """Another method, or a name that is taken: nothing changes."""
    other = first("P_TUNING" if sample.method != "P_TUNING" else "PROMPT_TUNING")
    for lib, model in zip(LIBS, both(sample)):
        names = set(added(model))
        mixed = outcome(lambda lib=lib, model=model: model.add_adapter("b", other.config(lib)))
        taken = outcome(lambda lib=lib, model=model: model.add_adapter("default", sample.config(lib)))
        assert mixed.kind is ValueError and "Cannot combine adapters with different peft types" in str(mixed.error)
        assert isinstance(taken.error, ValueError)
        assert "Adapter with name 'default' already exists" in str(taken.error)
        assert set(added(model)) == names and list(model.peft_config) == ["default"]


# what PEFT shows of prompts


@pytest.mark.parametrize(
    "sample", [*ONE_OF_EACH, *each("t5", methods=EMBEDS), *each("bert-seq", methods=EMBEDS)], ids=str
)
def test_prompts_are_shown_as_in_peft(sample):
    rows = 3
    tasks = {"task_ids": torch.zeros(rows, dtype=torch.long)} if "MULTITASK" in sample.method else {}
    ours, theirs = (randomize(m).eval() for m in both(sample))
    for model in (ours, theirs):
        assert model.prompt_tokens.keys() == {"default"}
    assert torch.equal(ours.prompt_tokens["default"], theirs.prompt_tokens["default"])
    assert torch.equal(ours.word_embeddings.weight, theirs.word_embeddings.weight)
    a, b = (m.get_prompt_embedding_to_save("default") for m in (ours, theirs))
    torch.testing.assert_close(a, b)
    a, b = (m.get_prompt(rows, **tasks) for m in (ours, theirs))
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b)
    else:
        assert len(a.layers) == len(b.layers)
        for mine, other in zip(a.layers, b.layers):
            torch.testing.assert_close(mine.keys, other.keys)
            torch.testing.assert_close(mine.values, other.values)


def test_models_without_prompts_say_so():
    model = graft.get_peft_model(make(MODEL), graft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for call in (lambda: model.get_prompt(1), lambda: model.get_prompt_embedding_to_save("default")):
        with pytest.raises(TypeError, match=r"is for prompt methods, such as PROMPT_TUNING, and .* are LORA"):
            call()
    assert not hasattr(model, "prompt_tokens") and not hasattr(model, "word_embeddings")
    with pytest.raises(graft.AdapterNotFoundError, match="nobody"):
        adapt(graft, first("PROMPT_TUNING")).get_prompt_embedding_to_save("nobody")
