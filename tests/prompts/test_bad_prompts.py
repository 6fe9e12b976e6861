# SPDX-License-Identifier: Apache-2.0
"""Bad input for prompt methods: a specific exception that names the field or adapter and the remedy, and no change."""

import copy
import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import graft
from graft.prompts.replays import RUN, Replays
from tests import models
from tests.looks import get_registry
from tests.prompts.samples import (
    HOLD_KEYS,
    METHODS,
    SAMPLES,
    adapt,
    batch,
    first,
    forward,
    make,
    on,
    randomize,
    tokenizer,
)

pytestmark = pytest.mark.graft_only

FIRSTS = [first(method) for method in METHODS]
EMBEDDED = [s for s in FIRSTS if s.method not in HOLD_KEYS]
KEYS = [s for s in FIRSTS if s.method in HOLD_KEYS]
LORA = dict(task_type="CAUSAL_LM", target_modules=["q_proj"], r=3)
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def each(samples):
    return pytest.mark.parametrize("sample", samples, ids=str)


def config_of(sample, **changes):
    """The sample's config with some fields changed."""
    return graft.PEFT_TYPE_TO_CONFIG_MAPPING[sample.method](**{**copy.deepcopy(sample.kwargs), **changes})


def facts(config):
    return copy.deepcopy(vars(config))


def snapshot(model, configs):
    base_config = getattr(model, "config", None)
    adapters = getattr(model, "peft_config", {})
    return {
        "identity": {n: id(p) for n, p in model.named_parameters()},
        "trainable": {n: p.requires_grad for n, p in model.named_parameters()},
        "gradients": [n for n, p in model.named_parameters() if p.grad is not None],
        "modules": {n: (type(m), m.training) for n, m in model.named_modules()},
        "hooks": {n: [list(getattr(m, h)) for h in HOOKS] for n, m in model.named_modules()},
        "forwards": {n: "forward" in vars(m) for n, m in model.named_modules()},
        "base_config": base_config.to_dict() if hasattr(base_config, "to_dict") else None,
        "adapters": {name: (id(c), facts(c)) for name, c in adapters.items()},
        "active": list(model.active_adapters) if adapters else None,
        "modules_to_save": copy.copy(getattr(model, "modules_to_save", None)),
        "configs": [facts(c) for c in configs],
    }


@contextmanager
def refused(model, error, *words, configs=(), inputs=None):
    """The block raises `error` with all the words in its text, and nothing has changed.

    Nothing: tensors and their identity, what trains, modules, hooks, configs (the base model's, those of its adapters
    and those that were passed), adapters, and what the model makes of `inputs`.
    """
    before, tensors = snapshot(model, configs), {k: v.clone() for k, v in model.state_dict().items()}
    seen = None if inputs is None else forward(model, inputs)
    with pytest.raises(error) as raised:
        yield
    text = str(raised.value)
    assert all(word in text for word in words), text
    after = {k: v for k, v in model.state_dict().items()}
    assert after.keys() == tensors.keys() and all(torch.equal(v, tensors[k]) for k, v in after.items())
    now = snapshot(model, configs)
    for aspect, value in before.items():
        assert now[aspect] == value, aspect
    if inputs is not None:
        again = forward(model, inputs)
        assert all(torch.equal(again[k], v) for k, v in seen.items())


def inputs_of(sample):
    return batch(sample, labels=False)


# configs that cannot be

FIELDS = {
    "PROMPT_TUNING": [
        (dict(num_virtual_tokens=0), graft.ConfigError, ["`num_virtual_tokens`", "positive", "0"]),
        (dict(num_virtual_tokens=-3), graft.ConfigError, ["`num_virtual_tokens`", "positive", "-3"]),
        (dict(num_virtual_tokens="3"), graft.ConfigTypeError, ["num_virtual_tokens", "int", "'3'"]),
        (dict(num_virtual_tokens=2.5), graft.ConfigTypeError, ["num_virtual_tokens", "int", "2.5"]),
        (dict(num_virtual_tokens=True), graft.ConfigTypeError, ["num_virtual_tokens", "int", "True"]),
        (dict(token_dim=0), graft.ConfigError, ["`token_dim`", "positive", "0"]),
        (dict(num_layers=-1), graft.ConfigError, ["`num_layers`", "positive", "-1"]),
        (dict(num_attention_heads=0), graft.ConfigError, ["`num_attention_heads`", "positive"]),
        (dict(num_transformer_submodules=0), graft.ConfigError, ["`num_transformer_submodules`", "must be 1, or 2"]),
        (dict(num_transformer_submodules=3), graft.ConfigError, ["`num_transformer_submodules`", "3", "2"]),
        (dict(task_type="LM"), graft.ConfigError, ["task type", "'LM'", "CAUSAL_LM", "SEQ_2_SEQ_LM"]),
        (dict(modules_to_save="lm_head"), graft.ConfigTypeError, ["modules_to_save", "list", "'lm_head'"]),
        (dict(prompt_tuning_init="XAVIER"), graft.ConfigError, ["prompt_tuning_init", "'XAVIER'", "SAMPLE_VOCAB"]),
        (dict(prompt_tuning_init="random"), graft.ConfigError, ["prompt_tuning_init", "'random'", "RANDOM"]),
        (dict(prompt_tuning_init="NONE"), graft.ConfigError, ["prompt_tuning_init", "NONE", "RANDOM"]),
        (
            dict(prompt_tuning_init="TEXT", prompt_tuning_init_text="say this"),
            graft.ConfigError,
            ["When prompt_tuning_init='TEXT', tokenizer_name_or_path can't be None."],
        ),
        (
            dict(prompt_tuning_init="TEXT", tokenizer_name_or_path="somewhere"),
            graft.ConfigError,
            ["When prompt_tuning_init='TEXT', prompt_tuning_init_text can't be None."],
        ),
        (
            dict(tokenizer_kwargs={"padding_side": "left"}),
            graft.ConfigError,
            ["tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'."],
        ),
    ],
    "P_TUNING": [
        (dict(encoder_reparameterization_type="GRU"), graft.ConfigError, ["encoder type", "MLP", "LSTM", "'GRU'"]),
        (dict(encoder_reparameterization_type="None"), graft.ConfigError, ["encoder type", "MLP", "LSTM", "None"]),
        (dict(encoder_hidden_size=0), graft.ConfigError, ["`encoder_hidden_size`", "positive", "0"]),
        (dict(encoder_num_layers=0), graft.ConfigError, ["`encoder_num_layers`", "positive", "0"]),
        (dict(encoder_dropout=1.5), graft.ConfigError, ["`encoder_dropout`", "between 0 and 1", "1.5"]),
        (dict(encoder_dropout=-0.1), graft.ConfigError, ["`encoder_dropout`", "between 0 and 1", "-0.1"]),
    ],
    "PREFIX_TUNING": [
        (dict(num_virtual_tokens=0), graft.ConfigError, ["`num_virtual_tokens`", "positive", "0"]),
        (dict(init_weights="one"), graft.ConfigTypeError, ["init_weights", "'zero'", "'one'"]),
        (dict(prefix_projection="yes"), graft.ConfigTypeError, ["prefix_projection", "bool", "'yes'"]),
        (dict(encoder_hidden_size=-4), graft.ConfigError, ["`encoder_hidden_size`", "positive", "-4"]),
    ],
    "MULTITASK_PROMPT_TUNING": [
        (dict(num_tasks=0), graft.ConfigError, ["`num_tasks`", "positive", "0"]),
        (dict(num_ranks=-1), graft.ConfigError, ["`num_ranks`", "positive", "-1"]),
        (dict(prompt_tuning_init="SAMPLE_VOCAB"), graft.ConfigError, ["'SAMPLE_VOCAB'", "EXACT_SOURCE_TASK"]),
        (dict(prompt_tuning_init="TEXT"), graft.ConfigError, ["'TEXT'", "tokenizer_name_or_path"]),
    ],
    "CPT": [
        (dict(cpt_token_ids=[]), graft.ConfigError, ["must have the same length", "0, 8 and 8"]),
        (dict(cpt_token_ids=[1, 2]), graft.ConfigError, ["must have the same length", "2, 8 and 8"]),
        (dict(cpt_mask=[1]), graft.ConfigError, ["must have the same length", "8, 1 and 8"]),
        (dict(cpt_tokens_type_mask=[1] * 9), graft.ConfigError, ["must have the same length", "8, 8 and 9"]),
        (dict(cpt_token_ids=[1.5] * 8), graft.ConfigTypeError, ["cpt_token_ids", "list[int]", "1.5"]),
        (dict(opt_weighted_loss_type="sum"), graft.ConfigTypeError, ["opt_weighted_loss_type", "'decay'", "'sum'"]),
        (dict(opt_projection_epsilon=-0.1), graft.ConfigError, ["`opt_projection_epsilon`", "negative", "-0.1"]),
        (dict(opt_projection_format_epsilon=-1.0), graft.ConfigError, ["`opt_projection_format_epsilon`", "-1"]),
        (
            dict(opt_weighted_loss_type="decay", opt_loss_decay_factor=-1.0),
            graft.ConfigError,
            ["`opt_loss_decay_factor`", "-1"],
        ),
        *(
            (dict(task_type=task), graft.ConfigError, ["CPTConfig only supports task_type = CAUSAL_LM."])
            for task in ("SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", None)
        ),
    ],
    "CARTRIDGE": [
        (dict(num_virtual_tokens=-1), graft.ConfigError, ["`num_virtual_tokens`", "positive", "-1"]),
        (dict(num_frozen_tokens=-1), graft.ConfigError, ["`num_frozen_tokens`", "`num_virtual_tokens`", "-1", "4"]),
        (dict(num_frozen_tokens=5), graft.ConfigError, ["`num_frozen_tokens` must be <= `num_virtual_tokens`", "=5"]),
        (dict(num_frozen_tokens="1"), graft.ConfigTypeError, ["num_frozen_tokens", "int", "'1'"]),
    ],
}  # fmt: skip
ROWS = [(method, *row) for method, rows in FIELDS.items() for row in rows]


@pytest.mark.parametrize("method, changes, error, words", ROWS, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_fields(method, changes, error, words):
    with pytest.raises(error) as raised:
        config_of(first(method), **changes)
    assert type(raised.value) is error and all(word in str(raised.value) for word in words), raised.value


def test_the_least_and_the_most_that_can_be():
    """The fields beside those that are refused."""
    for sample in (
        first("PROMPT_TUNING", num_virtual_tokens=1),
        first("CARTRIDGE", num_frozen_tokens=4),
        first("CARTRIDGE", num_frozen_tokens=0),
        first("CPT", cpt_token_ids=[40] * 8, opt_projection_epsilon=0),
        first("P_TUNING", encoder_dropout=1, encoder_num_layers=1),
        first("PREFIX_TUNING", num_virtual_tokens=31),
    ):
        assert forward(adapt(graft, sample), inputs_of(sample))["logits"].isfinite().all()


# configs and models that do not go together


def cannot_be_added(sample, config, error, *words, base=None):
    """Neither as the first adapter of a model nor beside another."""
    model = make(sample.model) if base is None else base
    with refused(model, error, *words, configs=[config]):
        graft.get_peft_model(model, config)
    if base is None:
        adapted = ready(first(sample.method))
        with refused(adapted, error, *words, configs=[config], inputs=inputs_of(sample)):
            adapted.add_adapter("second", config)


@each([s for s in FIRSTS if s.method != "CPT"])
def test_no_length(sample):
    config = config_of(sample, num_virtual_tokens=None)
    cannot_be_added(sample, config, graft.ConfigError, sample.method, "num_virtual_tokens")


@each([s for s in FIRSTS if s.method != "CPT"])
def test_no_task(sample):
    cannot_be_added(
        sample, config_of(sample, task_type=None), graft.ConfigError, sample.method, "task_type", "CAUSAL_LM"
    )


@each([s for s in FIRSTS if s.method != "CPT"])
def test_two_stacks_of_one(sample):
    config = config_of(sample, task_type="SEQ_2_SEQ_LM")
    cannot_be_added(sample, config, graft.ConfigError, "SEQ_2_SEQ_LM", "LlamaForCausalLM", "CAUSAL_LM")


@pytest.mark.parametrize("model", ["t5", "bart"])
@each(EMBEDDED)
def test_a_causal_prompt_before_an_encoder(sample, model):
    words = ("CAUSAL_LM", type(make(model)).__name__, "SEQ_2_SEQ_LM")
    cannot_be_added(sample, config_of(sample), graft.ConfigError, *words, base=make(model))


@pytest.mark.parametrize("model", ["bert", "bert-seq", "deberta"])
@each(EMBEDDED)
def test_a_causal_prompt_for_a_model_that_generates_nothing(sample, model):
    words = ("CAUSAL_LM", type(make(model)).__name__, "FEATURE_EXTRACTION")
    cannot_be_added(sample, config_of(sample), graft.ConfigError, *words, base=make(model))


def long(sample, n):
    """The sample with a prompt of n tokens."""
    lists = dict(cpt_token_ids=[5] * n, cpt_mask=[1] * n, cpt_tokens_type_mask=[4] * n)
    changes = lists if sample.method == "CPT" else dict(num_virtual_tokens=n)
    return replace(sample, kwargs={**sample.kwargs, **changes})


@pytest.mark.parametrize("n, over", [(32, 1), (40, 9)])
@each(FIRSTS)
def test_a_prompt_longer_than_the_positions(sample, n, over):
    words = (f"num_virtual_tokens={n}", "32 positions", f"{over} too few")
    for base in (None, make("gpt2"), make("opt")):
        cannot_be_added(sample, config_of(long(sample, n)), graft.ConfigError, *words, base=base)


@pytest.mark.differs("prefix tuning, cartridges of a model without a cache (DeBERTa)")
@pytest.mark.parametrize("given", [{}, dict(num_layers=2, token_dim=24, num_attention_heads=3)], ids=["none", "sizes"])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
@each(KEYS)
def test_keys_for_a_model_without_a_cache(sample, task, given):
    model = make({"SEQ_CLS": "deberta", "TOKEN_CLS": "deberta-tok", "QUESTION_ANS": "deberta-qa"}[task])
    words = ("past key values", "DebertaV2Model", sample.method, "PROMPT_TUNING")
    config = config_of(sample, task_type=task, **given)
    with refused(model, graft.ConfigError, *words, configs=[config]):
        graft.get_peft_model(model, config)


def failing(case):
    """A model with a name, and a config that does not fit it."""
    model = make("deberta")
    model.name_or_path = "somebody/deberta"
    if case == "LORA":
        config = graft.LoraConfig(task_type="SEQ_CLS", target_modules=["nothing"], r=3)
    else:
        config = config_of(first(case), task_type="SEQ_CLS")
    return model, config


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["LORA", "PREFIX_TUNING", "CARTRIDGE"])
def test_a_failed_call_leaves_the_config_as_it_was(case, tmp_path):
    """Name and revision of the base, heads that train by default, and the mode are written into it before it fails."""
    model, config = failing(case)
    config.base_model_name_or_path = "somebody/else"
    error = graft.NoMatchingPeftModuleError if case == "LORA" else graft.ConfigError
    with refused(model, error, configs=[config]):
        graft.get_peft_model(model, config, revision="v2")
    with refused(model, error, configs=[config]):
        graft.PeftModelForSequenceClassification(model, config)
    with refused(model, graft.CheckpointError, "adapter_model", configs=[config]):
        graft.PeftModel.from_pretrained(model, tmp_path, config=config)
    if case == "LORA":
        adapted = graft.get_peft_model(model, graft.LoraConfig(task_type="SEQ_CLS", target_modules=["query_proj"], r=3))
        with refused(adapted, error, configs=[config]):
            adapted.add_adapter("second", config)


def test_a_call_that_succeeds_completes_the_config():
    model, config = make("llama"), config_of(first("PREFIX_TUNING"))
    model.name_or_path = "somebody/llama"
    graft.get_peft_model(model, config, revision="v2")
    assert (config.base_model_name_or_path, config.revision) == ("somebody/llama", "v2")
    assert (config.num_layers, config.token_dim, config.num_attention_heads) == (2, 12, 2)


class Lookup(nn.Module):
    """No model of transformers, though it has word embeddings."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(23, 12)
        self.head = nn.Linear(12, 23)

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids):
        return self.head(self.words(input_ids))


@pytest.mark.parametrize("base", ["mlp", "conv1d", Lookup])
@each(FIRSTS)
def test_plain_modules(sample, base):
    """Even if all sizes are given (CPT takes none)."""
    model = base() if base is Lookup else models.make(base)
    config = config_of(sample, num_layers=2, token_dim=12, num_attention_heads=2)
    words = {
        "CPT": ("num_layers", "has no config"),
        "PREFIX_TUNING": ("cache", "PREFIX_TUNING"),
        "CARTRIDGE": ("cache", "CARTRIDGE"),
    }.get(sample.method, ("inputs_embeds", sample.method, type(model).__name__))
    cannot_be_added(sample, config, graft.ConfigError, *words, base=model)


UNNAMED = {
    "num_layers": ["num_hidden_layers", "num_layers", "n_layer"],
    "token_dim": ["hidden_size", "n_embd", "d_model"],
    "num_attention_heads": ["num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"],
}


class Nameless:
    """The config of a model, without some of its fields."""

    def __init__(self, config, without):
        self.values = {k: v for k, v in config.to_dict().items() if k not in without}

    def to_dict(self):
        return dict(self.values)

    def __getattr__(self, name):
        if name in vars(self).get("values", {}):
            return self.values[name]
        raise AttributeError(name)


@pytest.mark.parametrize("field", UNNAMED)
@each(FIRSTS)
def test_sizes_that_the_model_does_not_tell(sample, field):
    model = make("llama")
    model.config = Nameless(model.config, UNNAMED[field])
    if field == "token_dim" and sample.method not in HOLD_KEYS:  # embeddings tell their width themselves
        config = config_of(sample)
        graft.get_peft_model(model, config)
        assert config.token_dim == 24
        return
    words = (f"Please specify `{field}` in `peft_config`", *UNNAMED[field])
    cannot_be_added(sample, config_of(sample), graft.ConfigError, *words, base=model)
    if sample.method != "CPT":  # whose sizes are always the model's
        given = {"num_layers": 2, "token_dim": 24, "num_attention_heads": 4}[field]
        adapted = graft.get_peft_model(model, config_of(sample, **{field: given}))
        assert forward(adapted, inputs_of(sample))["logits"].isfinite().all()


@each([s for s in EMBEDDED if s.method != "CPT"])
def test_embeddings_of_another_width(sample):
    words = ("token_dim=12", "24", "LlamaModel")
    cannot_be_added(sample, config_of(sample, token_dim=12), graft.ConfigError, *words)


@pytest.mark.parametrize("model", ["llama", "gpt2", "t5", "bart"])
@each(KEYS)
def test_keys_for_fewer_layers(sample, model):
    config = config_of(on(sample, model), num_layers=1)
    cannot_be_added(sample, config, graft.ConfigError, "num_layers=1", "has 2", base=make(model))


@each(KEYS)
def test_keys_that_heads_do_not_divide(sample):
    words = ("token_dim=24", "num_attention_heads=5")
    config = config_of(sample, num_attention_heads=5)
    cannot_be_added(sample, config, graft.ConfigError, *words, base=make("gpt2"))


@each(FIRSTS)
def test_modules_to_save_that_cannot_be(sample):
    cannot_be_added(sample, config_of(sample, modules_to_save=["layers"]), TypeError, "layers", "ModuleList")


# texts and tokens


def numbered(folder, size):
    """A tokenizer of the words w0, w1, … with those ids."""
    return tokenizer(folder, [f"w{i}" for i in range(size)], "w0", "w0", "WhitespaceSplit")


TEXTS = [s for s in FIRSTS if s.method in ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING")]


def text_config(sample, path, text):
    return config_of(sample, prompt_tuning_init="TEXT", prompt_tuning_init_text=text, tokenizer_name_or_path=str(path))


@each(TEXTS)
def test_another_models_tokenizer(sample, tmp_path):
    """Its last token is one more than the model knows; tokens that are cut away count for nothing."""
    path = numbered(tmp_path / "tokenizer", 60)
    words = ("tokenizer_name_or_path", path, "token 41", "41 tokens", "the base model's tokenizer")
    cannot_be_added(sample, text_config(sample, path, "w3 w41"), graft.ConfigError, *words)
    model = graft.get_peft_model(make("llama"), text_config(sample, path, "w3 w40 w5 w41"))
    words = model.get_base_model().get_input_embeddings().weight
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, words[[3, 40, 5]])


@each(TEXTS)
def test_a_text_without_tokens(sample, tmp_path):
    path = numbered(tmp_path / "tokenizer", 41)
    cannot_be_added(sample, text_config(sample, path, " "), graft.ConfigError, "prompt_tuning_init_text", "no tokens")


@each(TEXTS)
def test_no_such_tokenizer(sample, tmp_path):
    path = tmp_path / "nowhere"
    cannot_be_added(sample, text_config(sample, path, "w3"), OSError, "tokenizer_name_or_path", str(path))


@pytest.mark.parametrize("token", [-1, 41, 977])
def test_tokens_of_examples_that_the_model_does_not_know(token):
    config = config_of(first("CPT"), cpt_token_ids=[1, 2, token, 3, 4, 5, 6, 7])
    cannot_be_added(
        first("CPT"), config, graft.ConfigError, "cpt_token_ids", f"token {token},", "41 tokens", "tokenizer"
    )


# multitask prompts from others

MULTITASK = first("MULTITASK_PROMPT_TUNING")
SOURCES = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
WHOLE = {
    "prompt_embeddings": torch.ones(3, 24),
    "prefix_task_cols": torch.ones(2, 3, 2),
    "prefix_task_rows": torch.ones(2, 2, 24),
}


def source_config(init, path=None, **changes):
    given = dict(prompt_tuning_init=init, prompt_tuning_init_state_dict_path=path and str(path), num_tasks=1)
    return config_of(MULTITASK, **{**given, **changes})


@pytest.mark.parametrize("init", SOURCES)
def test_source_that_is_not_there(init, tmp_path):
    cannot_be_added(
        MULTITASK,
        source_config(init),
        graft.ConfigError,
        "prompt_tuning_init_state_dict_path needs to be specified",
        init,
    )
    for name in ("none.safetensors", "none.bin"):
        config = source_config(init, tmp_path / name)
        cannot_be_added(
            MULTITASK, config, FileNotFoundError, "prompt_tuning_init_state_dict_path", str(tmp_path / name)
        )


@pytest.mark.parametrize("name", ["bad.safetensors", "bad.bin"])
@pytest.mark.parametrize("init", SOURCES)
def test_source_that_is_damaged(init, name, tmp_path):
    (tmp_path / name).write_bytes(b"\x00nothing")
    config = source_config(init, tmp_path / name)
    words = ("prompt_tuning_init_state_dict_path", str(tmp_path / name), "cannot be read")
    cannot_be_added(MULTITASK, config, graft.CheckpointError, *words)


@pytest.mark.parametrize("init", SOURCES)
def test_source_of_a_compiled_model(init, tmp_path):
    path = tmp_path / "compiled.safetensors"
    save_file({f"_orig_mod.{name}": value for name, value in WHOLE.items()}, path)
    tasks = {"num_ranks": 2} if init != "ONLY_SOURCE_SHARED" else {}
    model = graft.get_peft_model(make("llama"), source_config(init, path, **tasks))
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, torch.ones(3, 24))


@pytest.mark.parametrize("init", SOURCES)
def test_source_that_is_no_multitask_prompt(init, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(3)}, path)
    cannot_be_added(MULTITASK, source_config(init, path), graft.CheckpointError, str(path), "prompt_embeddings")
    save_file({"prompt_embeddings": torch.ones(3, 24)}, path)
    if init == "ONLY_SOURCE_SHARED":
        model = graft.get_peft_model(make("llama"), source_config(init, path))
        assert torch.equal(model.prompt_encoder["default"].embedding.weight, torch.ones(3, 24))
    else:
        words = (str(path), "prefix_task_cols", "prefix_task_rows")
        cannot_be_added(MULTITASK, source_config(init, path), graft.CheckpointError, *words)


UNFIT = {
    "length": (dict(num_virtual_tokens=4), SOURCES, ["prompt_embeddings", "(3, 24)", "(4, 24)", "num_virtual_tokens"]),
    "ranks": (dict(num_ranks=3), SOURCES[:2], ["prefix_task_cols", "(1, 3, 2)", "(1, 3, 3)", "num_ranks"]),
    "tasks": (dict(num_tasks=3), SOURCES[:2], ["prefix_task_cols", "(1, 3, 2)", "(3, 3, 2)", "num_tasks 1 (it is 3)"]),
    "which": (dict(prompt_tuning_init_task=2), SOURCES[1:2], ["prompt_tuning_init_task=2", "2 tasks"]),
    "negative": (dict(prompt_tuning_init_task=-1), SOURCES[1:2], ["prompt_tuning_init_task=-1", "2 tasks"]),
}


@pytest.mark.parametrize("case", UNFIT)
def test_source_of_another_size(case, tmp_path):
    changes, inits, words = UNFIT[case]
    path = tmp_path / "source.safetensors"
    save_file(WHOLE, path)
    for init in SOURCES:
        config = source_config(init, path, **changes)
        if init in inits:
            cannot_be_added(MULTITASK, config, graft.ConfigError, str(path), *words)
        else:
            assert graft.get_peft_model(make("llama"), config).peft_config["default"] is config


# in a forward pass


def ready(sample, spread=0.6, base=None):
    model = randomize(adapt(graft, sample, base=base), spread).eval()
    return settled(model)


def settled(model):
    """CPT draws what is out of its radius back into it, in place: have all within it before."""
    for prompt in model.prompt_encoder.values():
        if isinstance(prompt, graft.CPTEmbedding):
            prompt.project()
            prompt.delta_embedding.weight.data.mul_(0.5)
    return model


def calls(model, inputs, **changes):
    """A forward pass and a generation with arguments that the model refuses."""
    given = {k: v for k, v in {**inputs, **changes}.items() if v is not None}
    return {"forward": lambda: model(**given), "generate": lambda: model.generate(**given, max_new_tokens=2)}


CALLS = pytest.mark.parametrize("call", ["forward", "generate"])


@pytest.mark.parametrize("task_ids", [
    [0, 1, 3], [-1, 0, 1], [0.0, 1.0, 2.0], [True, False, True], [[0], [1], [2]], [0, 1], [0, 1, 2, 0], None,
], ids=str)  # fmt: skip
@CALLS
def test_tasks(call, task_ids):
    model, inputs = ready(MULTITASK), inputs_of(MULTITASK)
    given = None if task_ids is None else torch.tensor(task_ids)
    words = ["task_ids"]
    if task_ids is None:
        words += ["cannot be None", "remove_unused_columns=False"]
    elif len(task_ids) != 3:
        words += [f"{len(task_ids)} numbers", "3 samples"]
    else:
        words += ["from 0 to 2", "one for each sample"]
    with refused(model, ValueError, *words, inputs=inputs):
        calls(model, inputs, task_ids=given)[call]()


@each(FIRSTS)
def test_more_tokens_than_positions(sample):
    """The sum is what counts, and it is said how many are too many."""
    sample = on(sample, "gpt2")
    model = ready(sample)
    P = model.peft_config["default"].num_virtual_tokens
    inputs = {k: v for k, v in inputs_of(sample).items() if k != "attention_mask"}
    fits, over = (torch.randint(3, 41, (3, 32 - P + n), generator=torch.Generator().manual_seed(n)) for n in (0, 2))
    assert forward(model, {**inputs, "input_ids": fits})["logits"].isfinite().all()
    words = (f"{34 - P} tokens", f"prompt of {P}", "34 positions", "has 32", "2 too many")
    for call in calls(model, inputs, input_ids=over).values():
        with refused(model, ValueError, *words, inputs=inputs):
            call()
    with refused(model, ValueError, "33 positions", "1 too many", inputs=inputs):
        model.generate(**inputs, max_new_tokens=30, min_new_tokens=30)
    assert model.generate(**{**inputs, "input_ids": fits[:, :-1]}, max_new_tokens=1).shape == (3, 32 - P)


@each(FIRSTS)
def test_rows_of_several_adapters(sample):
    model = adapt(graft, sample)
    model.add_adapter("b", config_of(sample))
    settled(randomize(model))
    for names in (["default", "b", "b"], ["__base__"] * 3, ["default"] * 3):
        for call in calls(model, inputs_of(sample), adapter_names=names).values():
            with refused(model, graft.RoutingError, "adapter_names", "set_adapter", inputs=inputs_of(sample)):
                call()
    with refused(model, graft.RoutingError, "nope", "default", "b", inputs=inputs_of(sample)):
        model(**inputs_of(sample), adapter_names=["default", "nope", "b"])


@each(FIRSTS)
def test_rows_of_several_adapters_in_beams(sample):
    """PeftModel.generate: the prompt must not be left out without a word."""
    model = ready(sample)
    with refused(model, graft.RoutingError, "adapter_names", "set_adapter", inputs=inputs_of(sample)):
        model.generate(**inputs_of(sample), adapter_names=["default"] * 3, num_beams=2, max_new_tokens=2)


@each(FIRSTS)
def test_a_cache_without_room(sample):
    model = ready(sample)
    with refused(model, ValueError, "cache_implementation='static'", "Leave it out", inputs=inputs_of(sample)):
        model.generate(**inputs_of(sample), max_new_tokens=2, cache_implementation="static")


@pytest.mark.differs("both `input_ids` and `inputs_embeds` with soft prompts")
@each(FIRSTS)
def test_no_input_and_twice_the_input(sample):
    model, inputs = ready(sample), inputs_of(sample)
    embeds = model.get_base_model().get_input_embeddings()(inputs["input_ids"]).detach()
    with refused(model, ValueError, "input_ids", "inputs_embeds", inputs=inputs):
        calls(model, inputs, input_ids=None, attention_mask=None)["forward"]()
    with refused(model, ValueError, "input_ids", "inputs_embeds", inputs=inputs):
        calls(model, inputs, inputs_embeds=embeds)["forward"]()


@each(FIRSTS)
def test_an_input_without_a_batch(sample):
    model, inputs = ready(sample), inputs_of(sample)
    tasks = {"task_ids": torch.tensor(0)} if "task_ids" in inputs else {}
    with refused(model, ValueError, "(batch, tokens)", "(7,)", "input_ids[None]", inputs=inputs):
        model(input_ids=inputs["input_ids"][0], **tasks)


@pytest.mark.differs("CPT with types that make no token a label")
@pytest.mark.parametrize("name, shape", [("labels", (3, 6)), ("labels", (2, 7)), ("input_type_mask", (3, 8))])
def test_labels_and_types_of_examples(name, shape):
    sample = first("CPT")
    model = ready(sample)
    given = {**batch(sample), name: torch.full(shape, 4)}
    with refused(model, ValueError, f"{name} must be (3, 7)", str(shape), inputs=batch(sample)):
        model(**given)


def test_examples_without_a_label():
    """The types of the input count on from those of the examples."""
    sample = first("CPT", cpt_tokens_type_mask=[1] * 8)
    model = ready(sample)
    with refused(model, ValueError, "No token is a label", "cpt_tokens_type_mask", "multiple of 4"):
        model(**batch(sample))


@each(FIRSTS)
def test_an_error_in_the_model_leaves_no_prompt_behind(sample):
    model = ready(sample)
    alone = make(sample.model)
    layer = model.get_base_model().model.layers[1]
    expected = forward(model, inputs_of(sample))["logits"]
    handle = layer.register_forward_hook(lambda *_: 1 / 0)
    for call in calls(model, inputs_of(sample)).values():
        with pytest.raises(ZeroDivisionError):
            call()
    handle.remove()
    ids = {"input_ids": inputs_of(sample)["input_ids"]}
    assert torch.equal(model.get_base_model()(**ids).logits, alone(**ids).logits)
    assert torch.equal(forward(model, inputs_of(sample))["logits"], expected)


# several adapters


@each(FIRSTS)
def test_another_method(sample):
    model = ready(sample)
    other = first("P_TUNING" if sample.method != "P_TUNING" else "PREFIX_TUNING")
    for config in (config_of(other), graft.LoraConfig(**LORA)):
        words = ("Cannot combine adapters with different peft types", sample.method, config.peft_type.value)
        with refused(model, graft.ConfigError, *words, configs=[config], inputs=inputs_of(sample)):
            model.add_adapter("b", config)
    lora, config = graft.get_peft_model(make(sample.model), graft.LoraConfig(**LORA)), config_of(sample)
    with refused(lora, graft.ConfigError, "LORA", sample.method, configs=[config], inputs=inputs_of(first("CPT"))):
        lora.add_adapter("b", config)


NAMES = {
    "a.b": ["a.b", '"."'], "": ["non-empty"], "a/b": ["a/b", "folders"], "../up": ["."], "keys": ["'keys'", "another"],
    "__base__": ["__base__"], 3: ["string", "3"], None: ["string", "None"],
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=repr)
@each(FIRSTS)
def test_names(sample, name):
    base, config = make(sample.model), config_of(sample)
    model = ready(sample)
    with refused(model, graft.AdapterNameError, *NAMES[name], configs=[config], inputs=inputs_of(sample)):
        model.add_adapter(name, config)
    if isinstance(name, str):
        with refused(base, graft.AdapterNameError, *NAMES[name], configs=[config]):
            graft.get_peft_model(base, config, name)


@each(FIRSTS)
def test_a_name_that_is_taken(sample):
    model, config = ready(sample), config_of(sample)
    words = ("'default'", "already exists", "delete_adapter")
    with refused(model, graft.AdapterNameError, *words, configs=[config], inputs=inputs_of(sample)):
        model.add_adapter("default", config)


@each(FIRSTS)
@pytest.mark.parametrize("call", ["set_adapter", "delete_adapter", "set_requires_grad"])
def test_unknown_adapters(sample, call):
    model = ready(sample)
    with refused(model, graft.AdapterNotFoundError, "nope", "default", inputs=inputs_of(sample)):
        getattr(model, call)("nope")


def two(sample):
    model = adapt(graft, sample)
    model.add_adapter("b", config_of(sample))
    return settled(randomize(model).eval())


@each(FIRSTS)
def test_two_prompts_at_once(sample):
    model = two(sample)
    words = ("Only one prompt", "default", "b", "set_adapter()")
    with refused(model, ValueError, *words, inputs=inputs_of(sample)):
        get_registry(model).set_adapter(["default", "b"])


@each(FIRSTS)
def test_two_prompts_at_once_by_the_model(sample):
    """The base model has a set_adapter of its own, of transformers: nobody should be sent there."""
    model = two(sample)
    with refused(model, (TypeError, ValueError), "one", "default", inputs=inputs_of(sample)):
        model.set_adapter(["default", "b"])
    with pytest.raises((TypeError, ValueError)) as seen:
        model.set_adapter(["default", "b"])
    assert "base_model.set_adapter" not in str(seen.value)


# around and inside other PeftModels


@each(FIRSTS)
def test_a_prompt_around_a_prompt(sample):
    model = ready(sample)
    for name in ("default", "second"):
        config = config_of(sample)
        words = ("PeftModel", "add_adapter", "get_base_model")
        with refused(model, graft.AlreadyInjectedError, *words, inputs=inputs_of(sample)):
            graft.get_peft_model(model, config, name)


@each(FIRSTS)
def test_a_prompt_around_lora(sample):
    lora = randomize(graft.get_peft_model(make(sample.model), graft.LoraConfig(**LORA)))
    for model in (lora, lora.get_base_model()):
        with refused(lora, graft.AlreadyInjectedError, "second time", "add_adapter", inputs=inputs_of(first("CPT"))):
            graft.get_peft_model(model, config_of(sample))


@pytest.mark.differs("another method around a PeftModel with a prompt")
@pytest.mark.parametrize("name", ["default", "second"])
@each(FIRSTS)
def test_lora_around_a_prompt(sample, name):
    model = ready(sample)
    with refused(model, graft.AlreadyInjectedError, "PeftModel", inputs=inputs_of(sample)):
        graft.get_peft_model(model, graft.LoraConfig(**LORA), name)


@each(FIRSTS)
def test_lora_in_the_base_of_a_prompt(sample):
    """The base model itself is free: nothing of the prompt is left when it is called alone."""
    model = ready(sample)
    expected = forward(model, inputs_of(sample))
    ids = {"input_ids": inputs_of(sample)["input_ids"]}
    lora = graft.get_peft_model(model.get_base_model(), graft.LoraConfig(**LORA))
    alone = graft.get_peft_model(make(sample.model), graft.LoraConfig(**LORA))
    assert torch.equal(lora(**ids).logits, alone(**ids).logits)
    assert {n for n, p in lora.named_parameters() if p.requires_grad} == {
        n for n, p in alone.named_parameters() if p.requires_grad
    }
    assert torch.equal(forward(model, inputs_of(sample))["logits"], expected["logits"])  # LoRA begins with nothing


@each(FIRSTS)
def test_two_prompts_around_one_base(sample):
    """Each acts when its own model is called, and only then."""
    one = ready(sample)
    expected = forward(one, inputs_of(sample))["logits"]
    other, alone = ready(sample, 1.1, base=one.get_base_model()), ready(sample, 1.1)
    assert torch.equal(forward(other, inputs_of(sample))["logits"], forward(alone, inputs_of(sample))["logits"])
    assert torch.equal(forward(one, inputs_of(sample))["logits"], expected)


@each(FIRSTS)
def test_injection_without_a_peft_model(sample):
    """A prompt acts on calls, which a base model alone does not pass on."""
    model, config = make(sample.model), config_of(sample)
    with refused(model, ValueError, sample.method, "get_peft_model", configs=[config]):
        graft.inject_adapter_in_model(config, model)


# what prompts do not have


@pytest.mark.parametrize(
    "name", ["merge_and_unload", "merge_adapter", "unmerge_adapter", "unload", "add_weighted_adapter"]
)
@each(FIRSTS)
def test_what_only_weights_have(sample, name):
    """As in PEFT, hasattr says so."""
    model = ready(sample)
    assert not hasattr(model, name)
    with refused(model, AttributeError, name, inputs=inputs_of(sample)):
        getattr(model, name)()


@pytest.mark.parametrize("name", ["get_layer_status", "get_model_status"])
@each(FIRSTS)
def test_status(sample, name):
    model = ready(sample)
    with refused(model, TypeError, name, "prompt", "peft_config", inputs=inputs_of(sample)):
        getattr(model, name)()


# files


def saved(sample, folder):
    ready(sample).save_pretrained(folder)
    return folder


def rewrite(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cannot_be_loaded(sample, folder, error, *words, base=None, taken=True, **options):
    model = make(sample.model) if base is None else base
    with refused(model, error, *words):
        graft.PeftModel.from_pretrained(model, folder, **options)
    adapted = ready(first(sample.method))
    for name in ("second", "default")[: 1 + taken]:
        with refused(adapted, error, *words, inputs=inputs_of(sample)):
            adapted.load_adapter(folder, name, **options)


@each(FIRSTS)
def test_loading_for_training(sample, tmp_path):
    """Not of a new adapter: see tests/prompts/test_files.py for one that is there."""
    words = ("Cannot set a prompt learning adapter to trainable when loading pretrained adapter.",)
    cannot_be_loaded(sample, saved(sample, tmp_path), ValueError, *words, taken=False, is_trainable=True)


@each(FIRSTS)
def test_a_file_of_another_length(sample, tmp_path):
    """The config says one thing, the tensors another; or both are not those of the adapter that is there."""
    saved(long(sample, 9), tmp_path)
    adapted = ready(sample)
    with refused(adapted, graft.AdapterKeyError, "'default'", "prompt_embeddings", "(9, ", inputs=inputs_of(sample)):
        adapted.load_adapter(tmp_path, "default")
    rewrite(tmp_path, **long(sample, 10).kwargs)
    model = make(sample.model)
    with refused(model, graft.AdapterKeyError, "prompt_embeddings", "(9, ", "(10, "):
        graft.PeftModel.from_pretrained(model, tmp_path)


SPOILT = {
    "other_tensors": (graft.AdapterKeyError, ["prompt_embeddings", "[weight]", "strict=False"]),
    "no_tensors": (graft.CheckpointError, ["adapter_model.safetensors"]),
    "no_length": (graft.ConfigError, ["`num_virtual_tokens`", "positive"]),
    "no_config": (graft.CheckpointError, ["adapter_config.json"]),
    "lora": (graft.ConfigError, ["LORA"]),
}


@pytest.mark.parametrize("case", SPOILT)
@each(FIRSTS)
def test_files_that_cannot_be_loaded(sample, case, tmp_path):
    error, words = SPOILT[case]
    saved(sample, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    if case == "other_tensors":
        save_file({"weight": torch.ones(2)}, weights)
    elif case == "no_tensors":
        weights.unlink()
    elif case == "no_length":
        rewrite(tmp_path, num_virtual_tokens=0)
    elif case == "no_config":
        (tmp_path / "adapter_config.json").unlink()
    else:
        graft.get_peft_model(make(sample.model), graft.LoraConfig(**LORA)).save_pretrained(tmp_path)
        adapted = ready(sample)
        for name in ("second", "default"):
            with refused(adapted, error, *words, sample.method, inputs=inputs_of(sample)):
                adapted.load_adapter(tmp_path, name)
        return
    cannot_be_loaded(sample, tmp_path, error, *words)


@each(FIRSTS)
def test_a_prompt_into_lora(sample, tmp_path):
    saved(sample, tmp_path)
    lora = randomize(graft.get_peft_model(make(sample.model), graft.LoraConfig(**LORA)))
    for name in ("second", "default"):
        with refused(lora, graft.ConfigError, "LORA", sample.method, inputs=inputs_of(first("CPT"))):
            lora.load_adapter(tmp_path, name)


@each(FIRSTS)
def test_a_prompt_of_another_base(sample, tmp_path):
    saved(sample, tmp_path)
    model = wide()
    with refused(model, (graft.ConfigError, graft.BaseModelMismatchError), "24", "36"):
        graft.PeftModel.from_pretrained(model, tmp_path)


def wide():
    """A llama of another width."""
    build = models.transformer(
        "LlamaConfig", "LlamaForCausalLM", hidden_size=36, intermediate_size=36, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, vocab_size=41,
    )  # fmt: skip
    return build().eval()


def test_samples_are_all_methods():
    assert {s.method for s in FIRSTS} == {s.method for s in SAMPLES} and len(FIRSTS) == 6


def test_layers_get_back_their_first_function():
    """Two calls of `start` replace the checkpointing functions twice."""
    stack = models.make("llama").model
    before = [torch.utils.checkpoint.checkpoint] * len(stack.layers)
    for layer in stack.layers:
        layer.gradient_checkpointing, layer.__dict__[RUN] = True, before[0]
    replays = Replays(SimpleNamespace(module=stack))
    replays.start(object())
    replays.start(object())
    assert all(layer.__dict__[RUN] not in before for layer in stack.layers)
    replays.clear()
    assert [layer.__dict__[RUN] for layer in replays.layers()] == before
