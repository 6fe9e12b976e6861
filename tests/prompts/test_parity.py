# SPDX-License-Identifier: Apache-2.0
"""Parameters, configs, initial values, outputs and gradients of the prompt methods are PEFT's."""

import inspect
import json
from copy import deepcopy
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

import graft
from tests import models
from tests.covering import Case, law
from tests.pair import LIBS, close, close_dicts, outcome, trainable
from tests.prompts.samples import (
    CAUSAL,
    EMBEDS,
    HOLD_KEYS,
    MODEL,
    PAIRED,
    SAMPLES,
    adapt,
    added,
    batch,
    both,
    each,
    first,
    forward,
    make,
    measured,
    on,
    randomize,
    run,
    task,
    tokenizer,
    without,
)

PADDING = pytest.mark.parametrize("padding", ["none", "left", "right"])


def padded(samples):
    """Decorate a test with samples, and with each padding for each method and each model."""
    return law(
        "sample, padding",
        [Case((s, padding)) for s in samples for padding in ("none", "left", "right")],
        lambda case: [str(case[0]), (case[0].method, case[1]), (case[0].model, case[1])],
    )


MEMORY = SAMPLES + each("t5", "bert-seq", "bert-qa", "gpt2")


def shapes(model):
    return {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}


# in memory


@pytest.fixture(scope="module", params=MEMORY, ids=str)
def pair(request):
    return both(request.param)


def test_parameters(pair):
    ours, theirs = pair
    assert shapes(ours) == shapes(theirs)
    # PEFT lists the base's word embeddings twice
    held = [{k for k in m.state_dict() if not k.startswith("word_embeddings.")} for m in pair]
    assert held[0] == held[1]


def test_trainable_parameters(pair):
    ours, theirs = pair
    assert trainable(ours) == trainable(theirs)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    order = [[n for n, p in m.named_parameters() if p.requires_grad] for m in pair]
    assert order[0] == order[1]  # optimizer states go by position


SIZES = ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules", "encoder_hidden_size")


def sizes(config):
    return {name: getattr(config, name) for name in SIZES if name in {f.name for f in fields(config)}}


def values(config):
    """The fields as they stand in JSON. PEFT names modules to save twice."""
    out = {k: v for k, v in json.loads(json.dumps(config.to_dict())).items() if k != "peft_version"}
    return {**out, "modules_to_save": out["modules_to_save"] and sorted(set(out["modules_to_save"]))}


def test_completed_configs(pair):
    ours, theirs = (m.peft_config["default"] for m in pair)
    assert sizes(ours) == sizes(theirs)
    mine = values(ours)
    assert {k: mine[k] for k in values(theirs)} == values(theirs)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_config_files(sample, tmp_path):
    """Of a config that is complete, and of one that is not; each library reads both."""
    for step in ("new", "complete"):
        files = []
        for lib, name in zip(LIBS, ("ours", "theirs")):
            folder = tmp_path / step / name
            config = sample.config(lib) if step == "new" else adapt(lib, sample).peft_config["default"]
            config.save_pretrained(folder)
            files.append(json.loads((folder / "adapter_config.json").read_text()))
            files[-1].pop("peft_version", None)
        assert files[0] == files[1]
        loaded = [lib.PeftConfig.from_pretrained(tmp_path / step / name) for lib in LIBS for name in ("ours", "theirs")]
        assert {type(c).__name__ for c in loaded} == {type(sample.config(LIBS[1])).__name__}
        expected = values(loaded[3])
        for config in loaded:
            assert {k: values(config)[k] for k in expected} == expected


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_sizes_given_by_hand(sample):
    """Given sizes stay, but those of keys and of CPT, which are the model's."""
    given = replace(sample, kwargs={**sample.kwargs, "num_layers": 2, "num_attention_heads": 4, "token_dim": 24})
    ours, theirs = both(given)
    assert sizes(ours.peft_config["default"]) == sizes(theirs.peft_config["default"])
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.method != "CPT"], ids=str)
def test_one_submodule_of_two(sample):
    one = on(sample, "t5")
    ours, theirs = both(replace(one, kwargs={**one.kwargs, "num_transformer_submodules": 1}))
    assert shapes(ours) == shapes(theirs)
    assert ours.peft_config["default"].num_transformer_submodules == 1


# initial values


def same_start(sample, **options):
    """The values of fresh adapters and the state of the generator, bit for bit, are equal."""
    starts, states = [], []
    for lib in LIBS:
        starts.append(added(adapt(lib, sample, **options)))
        states.append(torch.get_rng_state())
    close_dicts(*starts, 0)
    assert torch.equal(*states)
    return starts[0]


@pytest.mark.parametrize("sample", MEMORY, ids=str)
def test_seeded_initial_values(sample):
    same_start(sample)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.method != "MULTITASK_PROMPT_TUNING"], ids=str)
def test_made_for_inference(sample):
    """Networks are left out, and initialisations."""
    frozen = replace(sample, kwargs={**sample.kwargs, "inference_mode": True})
    same_start(frozen)
    ours, theirs = both(frozen)
    assert shapes(ours) == shapes(theirs)


WORDS = ["<pad>", "<s>", "</s>", "say", "if", "this", "text", "is", "good", "or", "bad"]


TEXTS = {"shorter": "good or bad", "as_long": "say if this is good", "longer": "say if this text is good or bad"}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("model", [MODEL, "t5"])
@pytest.mark.parametrize("method", ["PROMPT_TUNING", "MULTITASK_PROMPT_TUNING"])
def test_initial_text(method, model, text, tmp_path):
    """Repeated or cut to length."""
    sample = on(
        first(
            method,
            num_virtual_tokens=5,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=TEXTS[text],
            tokenizer_name_or_path=tokenizer(tmp_path, WORDS, "<s>", "<pad>"),
            tokenizer_kwargs={"padding_side": "left", "trust_remote_code": False},
        ),
        model,
    )
    start = same_start(sample)["prompt_encoder.default.embedding.weight"]
    ids = [WORDS.index(word) for word in TEXTS[text].split()]
    expected = torch.tensor((ids * 4)[: len(start)])
    close(start, make(model).get_input_embeddings().weight[expected], 0)


def test_initial_vocabulary_of_a_half_precision_base():
    start = same_start(first("PROMPT_TUNING", "vocab"), base=None)
    for lib in LIBS:
        base = make(MODEL).bfloat16()
        half = added(adapt(lib, first("PROMPT_TUNING", "vocab"), base=base))
        for name, p in half.items():
            assert p.dtype == torch.float32
            close(p, start[name].bfloat16().float(), 0)


SOURCES = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@pytest.mark.parametrize("model", [MODEL, "t5"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("source", SOURCES)
def test_initial_multitask_source(source, safe, model, tmp_path):
    """From the file that either library wrote of a prompt for three tasks."""
    trained = on(first("MULTITASK_PROMPT_TUNING"), model)
    tasks = {} if source == "ONLY_SOURCE_SHARED" else {"num_tasks": 1}
    for writer in LIBS:
        folder = tmp_path / writer.__name__
        origin = randomize(adapt(writer, trained))
        origin.save_pretrained(folder, safe_serialization=safe)
        sample = on(
            first(
                "MULTITASK_PROMPT_TUNING",
                prompt_tuning_init=source,
                prompt_tuning_init_state_dict_path=str(folder / f"adapter_model.{'safetensors' if safe else 'bin'}"),
                prompt_tuning_init_task=1,
                **tasks,
            ),
            model,
        )
        start = same_start(sample)
        before = added(origin)
        close(*(v["prompt_encoder.default.embedding.weight"] for v in (start, before)), 0)
        for part in ("cols", "rows"):
            name = f"prompt_encoder.default.prefix_task_{part}"
            if source == "AVERAGE_SOURCE_TASKS":
                close(start[name], before[name].mean(0, keepdim=True), 1e-6)
            elif source == "EXACT_SOURCE_TASK":
                close(start[name], before[name][1:2], 0)


# outputs and gradients


def same(ours, theirs, tolerance=1e-5):
    """Values of a forward pass, and gradients."""
    for mine, other in zip(ours, theirs):
        close_dicts(mine, other, tolerance)


def compare(sample, inputs):
    """Random values in both libraries; gives the results of PEFT."""
    ours, theirs = (run(randomize(m).eval(), inputs) for m in both(sample))
    same(ours, theirs)
    assert all(g.abs().max() > 1e-6 for g in theirs[1].values())  # or the comparison would say nothing
    return theirs


@padded(SAMPLES + each(*CAUSAL[1:]))
def test_causal(sample, padding):
    seen, grads = compare(sample, batch(sample, padding))
    P = 0 if sample.method in HOLD_KEYS else sample.kwargs.get("num_virtual_tokens", 8)
    assert seen["logits"].shape == (3, P + models.LENGTH, models.VOCAB) and grads


@padded(each(*PAIRED))
def test_sequence_to_sequence(sample, padding):
    compare(sample, batch(sample, padding))


@pytest.mark.parametrize("sample", each(*PAIRED), ids=str)
def test_sequence_to_sequence_with_a_decoder_mask(sample):
    inputs = batch(sample, "left")
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, 3:] = 0
    compare(sample, {**inputs, "decoder_attention_mask": mask})


@pytest.mark.parametrize("sample", each(*PAIRED, methods=("PROMPT_TUNING", "P_TUNING", *HOLD_KEYS)), ids=str)
def test_sequence_to_sequence_with_decoder_input(sample):
    compare(sample, batch(sample, "right", labels=False))


@pytest.mark.graft_only
@pytest.mark.parametrize("model", PAIRED)
def test_multitask_with_decoder_input(model):
    """PEFT takes only its embeddings."""
    sample = on(first("MULTITASK_PROMPT_TUNING"), model)
    inputs = batch(sample, "left", labels=False)
    embeds = make(model).get_decoder().get_input_embeddings()(inputs["decoder_input_ids"]).detach()
    ours, theirs = (randomize(m).eval() for m in both(sample))
    expected = run(theirs, {**without(inputs, "decoder_input_ids"), "decoder_inputs_embeds": embeds})
    same(run(ours, inputs), expected)


@pytest.mark.parametrize("model", PAIRED)
def test_multitask_in_the_encoder_alone(model):
    sample = on(first("MULTITASK_PROMPT_TUNING", num_transformer_submodules=1), model)
    seen, _ = compare(sample, batch(sample, "left"))
    assert seen["logits"].shape[1] == 5


READERS = ("bert-seq", "roberta-seq", "deberta", "bert-qa", "roberta-qa", "deberta-qa")
FEATURES = ("bert", "llama-model")
HEADS = [s for s in each(*READERS, "llama-seq", methods=EMBEDS) if s not in each(*READERS[3:], methods=EMBEDS[2:])]
HEADS += each(*FEATURES, methods=("PROMPT_TUNING", "P_TUNING", *HOLD_KEYS))


@padded([s for s in HEADS if s.model != "llama-seq"])
def test_heads_and_features(sample, padding):
    compare(sample, batch(sample, padding))


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("sample", each("llama-seq", methods=EMBEDS), ids=str)
def test_head_on_the_last_token(sample, padding):
    compare(sample, batch(sample, padding))


@pytest.mark.differs("SEQ_CLS on decoders with padding on the right")
@pytest.mark.graft_only
@pytest.mark.parametrize("sample", each("llama-seq", methods=EMBEDS), ids=str)
def test_head_on_the_last_token_before_padding(sample):
    """Each row is as PEFT has it without its padding: there PEFT pools some other token."""
    ours, theirs = (randomize(m).eval() for m in both(sample))
    inputs = batch(sample, "right", labels=False)
    logits = ours(**inputs).logits
    for i, length in enumerate(inputs["attention_mask"].sum(1)):
        row = {k: v[i : i + 1, :length] if v.dim() == 2 else v[i : i + 1] for k, v in inputs.items()}
        close(logits[i : i + 1], theirs(**row).logits)


def types(inputs):
    return {**inputs, "token_type_ids": (torch.arange(models.LENGTH) > 3).long().expand(3, -1)}


@PADDING
@pytest.mark.parametrize("sample", each("bert-seq", "bert-tok", methods=EMBEDS), ids=str)
def test_token_types(sample, padding):
    """The prompt's are zeros."""
    compare(sample, types(batch(sample, padding, labels=task(sample) == "SEQ_CLS")))


@pytest.mark.differs("prompts: `token_type_ids` for language models and feature extraction")
@pytest.mark.graft_only
@PADDING
@pytest.mark.parametrize("sample", each("bert", "bert-qa", methods=("PROMPT_TUNING", "P_TUNING")), ids=str)
def test_token_types_where_peft_drops_them(sample, padding):
    """As the base with the prompt in front of its embeddings."""
    ours = randomize(adapt(graft, sample)).eval()
    inputs = types(batch(sample, padding))
    base, prompt = hand_made(ours, sample), ours.prompt_encoder["default"]().expand(3, -1, -1)
    wide = {"inputs_embeds": torch.cat([prompt, base.get_input_embeddings()(inputs["input_ids"])], dim=1)}
    for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
        if name in inputs:
            wide[name] = nn.functional.pad(inputs[name], (prompt.shape[1], 0), value=value)
    expected = forward(base, {**without(inputs, "input_ids"), **wide})
    same(run(ours, inputs), measured(expected, added(ours)))


def hand_made(ours, sample):
    """A base model without prompts that has the adapter's head."""
    base = make(sample.model)
    for name in ("classifier", "score", "qa_outputs"):
        if hasattr(base, name):
            setattr(base, name, getattr(ours.get_base_model(), name).modules_to_save["default"])
    return base


@pytest.mark.differs("prompts: TOKEN_CLS with labels")
@pytest.mark.graft_only
@PADDING
@pytest.mark.parametrize("sample", each("bert-tok", "roberta-tok", "deberta-tok", methods=EMBEDS), ids=str)
def test_token_classification(sample, padding):
    """Logits are PEFT's, which fails with labels: those are of the input's tokens."""
    ours, theirs = (randomize(m).eval() for m in both(sample))
    inputs = batch(sample, padding)
    seen = forward(theirs, without(inputs, "labels"))
    own = seen["logits"][:, -models.LENGTH :]
    loss = nn.functional.cross_entropy(own.flatten(0, 1), inputs["labels"].flatten())
    same(run(ours, inputs), measured({"loss": loss, **seen}, added(theirs)))


@pytest.mark.differs("prefix tuning of encoders (BERT, RoBERTa) under transformers ≥ 5.2x")
@pytest.mark.graft_only
@PADDING
@pytest.mark.parametrize("sample", each(*READERS, "bert-tok", "roberta-tok", "llama-seq", methods=HOLD_KEYS), ids=str)
def test_keys_in_models_with_heads(sample, padding):
    """PEFT refuses these: the backbone is called with a cache that was filled by hand."""
    ours = randomize(adapt(graft, sample)).eval()
    inputs = batch(sample, padding)
    expected = measured(with_cache(hand_made(ours, sample), ours.prompt_encoder["default"](), inputs), added(ours))
    same(run(ours, inputs), expected)


def with_cache(base, prompt, inputs):
    """What a model with a head computes behind keys and values: (tokens, 2 · layers · heads · size)."""
    from transformers import DynamicCache

    config, cache = base.config, DynamicCache(config=base.config)
    P, L = len(prompt), config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    for layer, (k, v) in enumerate(prompt.view(P, L, 2, heads, -1).permute(1, 2, 3, 0, 4)):
        cache.update(k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), layer)
    mask = inputs.get("attention_mask", torch.ones(3, models.LENGTH, dtype=torch.long))
    backbone = getattr(base, base.base_model_prefix)
    name = "cache" if "cache" in inspect.signature(backbone.forward).parameters else "past_key_values"
    out = backbone(inputs["input_ids"], attention_mask=nn.functional.pad(mask, (P, 0), value=1), **{name: cache})
    hidden = out.last_hidden_state
    if "start_positions" in inputs:
        logits = dict(zip(("start_logits", "end_logits"), base.qa_outputs(hidden).unbind(-1)))
        ends = inputs["start_positions"], inputs["end_positions"]
        loss = sum(nn.functional.cross_entropy(y, t) for y, t in zip(logits.values(), ends)) / 2
        return {"loss": loss, **logits}
    if hasattr(base, "score"):
        last = (mask * torch.arange(models.LENGTH)).argmax(1)
        logits = base.score(hidden)[torch.arange(3), last]
    elif type(base.classifier) is not nn.Linear:  # RoBERTa's looks for the first token itself
        logits = base.classifier(hidden)
    else:
        logits = base.classifier(out.pooler_output if inputs["labels"].dim() == 1 else hidden)
    loss = nn.functional.cross_entropy(logits.flatten(0, -2), inputs["labels"].flatten())
    return {"loss": loss, "logits": logits}


@pytest.mark.graft_only
@pytest.mark.parametrize("sample", each(*READERS[3:], *FEATURES, methods=EMBEDS[2:]), ids=str)
def test_multitask_where_peft_has_no_task_ids(sample):
    """Row by row PEFT's prompt tuning, with the product that the row's task has as its prompt."""
    ours = randomize(adapt(graft, sample)).eval()
    theirs = adapt(LIBS[1], on(first("PROMPT_TUNING"), sample.model)).eval()
    for name, p in added(theirs).items():
        if ".modules_to_save." in name:
            p.data = added(ours)[name].data
    inputs = batch(sample, "left")
    for i in range(3):
        row = {k: v[i : i + 1] for k, v in inputs.items()}
        prompt = ours.prompt_encoder["default"](task_ids=row["task_ids"])[0]
        theirs.prompt_encoder["default"].embedding.weight.data = prompt.detach()
        seen, grads = run(theirs, without(row, "task_ids"))
        mine, own = run(ours, row)
        close_dicts(mine, seen)
        encoder = dict(ours.prompt_encoder.named_parameters(prefix="prompt_encoder"))
        passed = torch.autograd.grad(
            prompt, list(encoder.values()), grads.pop("prompt_encoder.default.embedding.weight")
        )
        close_dicts(own, {**grads, **dict(zip(encoder, passed))})


@pytest.mark.parametrize("model", ["deberta", "deberta-tok", "deberta-qa"])
@pytest.mark.parametrize("method", HOLD_KEYS)
def test_keys_need_a_cache(method, model):
    """PEFT says so in the first forward pass."""
    sample = on(first(method), model)
    refused = outcome(lambda: adapt(graft, sample)(**batch(sample)))
    assert refused.kind is ValueError
    assert "Model does not support past key values which are required for prefix tuning" in str(refused.error)


# forms of input and output

FORMS = each(MODEL, "gpt2", "t5", "bart") + [
    s for s in HEADS if s.model in ("bert-seq", "bert-qa", "bert", "llama-seq")
]


@pytest.mark.parametrize("sample", FORMS, ids=str)
def test_without_labels(sample):
    inputs = without(batch(sample, "left"), "labels", "start_positions", "end_positions")
    if task(sample) == "SEQ_2_SEQ_LM":
        inputs = batch(sample, "left", labels=sample.method == "MULTITASK_PROMPT_TUNING")
    compare(sample, inputs)


@pytest.mark.parametrize("sample", FORMS, ids=str)
def test_embeddings_as_input(sample):
    inputs = batch(sample, "left")
    if sample.model == "llama-seq":  # no ids in which to look for padding
        inputs = without(batch(sample, "none"), "attention_mask")
    embeds = make(sample.model).get_input_embeddings()(inputs["input_ids"]).detach()
    compare(sample, {**without(inputs, "input_ids"), "inputs_embeds": embeds})


def tensors(output):
    """All tensors of a tuple, and of tuples in it."""
    for part in output:
        if isinstance(part, torch.Tensor):
            yield part
        elif isinstance(part, tuple):
            yield from tensors(part)


# PEFT's loss of CPT needs names in the output
@pytest.mark.parametrize("sample", [s for s in FORMS if s.method != "CPT"], ids=str)
def test_tuples_and_hidden_states(sample):
    results = []
    for model in (randomize(m).eval() for m in both(sample)):
        inputs = batch(sample, "left")
        results.append(model(**inputs, return_dict=False, output_hidden_states=True))
    ours, theirs = (list(tensors(r)) for r in results)
    assert len(ours) == len(theirs) > 2
    for mine, other in zip(ours, theirs):
        close(mine, other)


@pytest.mark.parametrize("sample", SAMPLES + each("t5") + each("bert-seq", methods=EMBEDS), ids=str)
def test_training(sample):
    """Some steps in training mode: losses and parameters."""
    results = []
    for model in (randomize(m).train() for m in both(sample)):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.5)
        losses = []
        for step in range(4):
            optimizer.zero_grad()
            loss = forward(model, batch(sample, ("left", "none")[step % 2]))["loss"]
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append({"losses": torch.stack(losses), **added(model)})
    close_dicts(*results, 1e-4)
    assert (results[0]["losses"].diff() != 0).all()


def test_dropout_of_the_lstm():
    """Under a seed the same masks."""
    sample, results = first("P_TUNING", "lstm", encoder_dropout=0.4), []
    for model in (randomize(m).train() for m in both(sample)):
        models.seed(5)
        results.append(run(model, batch(sample, "none")))
    same(*results)


# CPT

INPUT_TYPES = torch.tensor([[0, 0, 1, 2, 3, 4, 4], [1, 2, 2, 3, 4, 4, 4], [0, 1, 1, 2, 3, 4, 0]])
CPTS = [s for s in SAMPLES if s.method == "CPT"]


@PADDING
@pytest.mark.parametrize("sample", CPTS, ids=str)
def test_cpt_input_types(sample, padding):
    compare(sample, {**batch(sample, padding), "input_type_mask": INPUT_TYPES})


@pytest.mark.parametrize("sample", CPTS, ids=str)
def test_cpt_labels_that_are_ignored(sample):
    inputs = {**batch(sample, "right"), "input_type_mask": INPUT_TYPES}
    inputs["labels"][:, 4] = -100
    compare(sample, inputs)


def test_cpt_weights_of_examples():
    """The last labels count once, those before them by a factor more each."""
    losses = []
    for factor in (1.0, 0.5):
        sample = first("CPT", "decay", opt_loss_decay_factor=factor)
        seen, _ = compare(sample, {**batch(sample), "input_type_mask": INPUT_TYPES})
        losses.append(seen["loss"])
    assert losses[1] < losses[0]


@pytest.mark.parametrize("spread", [0.02, 0.6, 3.0])
def test_cpt_projection(spread):
    """A forward pass draws each row back to its radius: labels to none, the others by type."""
    sample, name = first("CPT"), "prompt_encoder.default.delta_embedding.weight"
    deltas = []
    for model in (randomize(m, spread).eval() for m in both(sample)):
        before = added(model)[name].detach().clone()
        forward(model, batch(sample))
        deltas.append(added(model)[name].detach())
    close(deltas[0], deltas[1], 1e-6)
    scale = (24 / 2048) ** 0.5
    radius = torch.tensor([1.7, 3.1, 1.7, 0.0] * 2) * scale
    assert (deltas[0].norm(dim=1) <= radius + 1e-6).all()
    inside = before.norm(dim=1) <= radius
    close(deltas[0][inside], before[inside], 1e-6)
    moved = deltas[0][~inside].norm(dim=1)
    close(moved, radius[~inside], 1e-6)


def test_cpt_is_shortened_once_by_two_threads(monkeypatch):
    """A second forward comes between the look at how long rows are and what is written."""
    prompt = randomize(adapt(LIBS[0], first("CPT")), 3.0).prompt_encoder["default"]
    alone = deepcopy(prompt)
    alone.project()
    radius = prompt.radius

    def meanwhile():
        monkeypatch.setattr(prompt, "radius", radius)
        prompt.project()
        return radius()

    monkeypatch.setattr(prompt, "radius", meanwhile)
    prompt.project()
    assert torch.equal(prompt.delta_embedding.weight, alone.delta_embedding.weight)


def test_cpt_gradient_of_labels():
    """Labels keep their embeddings."""
    sample, name = first("CPT"), "prompt_encoder.default.delta_embedding.weight"
    for model in both(sample):
        _, grads = run(randomize(model).eval(), batch(sample))
        assert [bool(row.any()) for row in grads[name]] == [True, True, True, False] * 2


def test_cpt_without_masks():
    """All tokens are then input templates, and the input is all labels."""
    defaults = dict(task_type="CAUSAL_LM", cpt_token_ids=[5, 9, 11], cpt_tokens_type_mask=[1, 2, 4])
    sample = replace(first("CPT"), kwargs=defaults)
    compare(sample, batch(sample))
