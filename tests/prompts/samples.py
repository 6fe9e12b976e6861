# SPDX-License-Identifier: Apache-2.0
"""The prompt methods as data: configurations, the models and tasks they are tried on, and batches for those.

`SAMPLES` has every configuration on one causal model; `on(sample, model)` moves one to another model, with its task.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tests import models, pair
from tests.models import VOCAB, TinyModel, transformer
from tests.pair import LIBS
from tests.samples import Sample

BATCH, LENGTH = 3, models.LENGTH
MODEL = "llama"  # has grouped keys, so that a layer's keys are narrower than its input

_llama = dict(
    hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=32, initializer_range=models.STD, **models._decoder,
)  # fmt: skip
_bart = dict(
    vocab_size=VOCAB, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=36, decoder_ffn_dim=36, max_position_embeddings=32, init_std=models.STD,
    dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip
_roberta = {**models._bert, "pad_token_id": 0}
_deberta = dict(
    relative_attention=True, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", share_att_key=True,
    position_buckets=8, **models._bert,
)  # fmt: skip


def tiny(config: str, model: str, task: str, **settings: Any) -> TinyModel:
    return TinyModel(transformer(f"{config}Config", f"{config}{model}", **settings), models.tokens, task)


MODELS = {
    **models.MODELS,
    "gemma": tiny("Gemma", "ForCausalLM", "CAUSAL_LM", head_dim=8, tie_word_embeddings=False, **_llama),
    "llama-seq": tiny("Llama", "ForSequenceClassification", "SEQ_CLS", num_labels=3, **_llama),
    "llama-model": tiny("Llama", "Model", "FEATURE_EXTRACTION", **_llama),
    "bart": tiny("Bart", "ForConditionalGeneration", "SEQ_2_SEQ_LM", **_bart),
    "bart-causal": tiny("Bart", "ForCausalLM", "CAUSAL_LM", **_bart),
    "roberta-seq": tiny("Roberta", "ForSequenceClassification", "SEQ_CLS", num_labels=3, **_roberta),
    "roberta-tok": tiny("Roberta", "ForTokenClassification", "TOKEN_CLS", num_labels=4, **_roberta),
    "roberta-qa": tiny("Roberta", "ForQuestionAnswering", "QUESTION_ANS", **_roberta),
    "deberta-tok": tiny("DebertaV2", "ForTokenClassification", "TOKEN_CLS", num_labels=4, **_deberta),
    "deberta-qa": tiny("DebertaV2", "ForQuestionAnswering", "QUESTION_ANS", **_deberta),
}
CAUSAL = ("llama", "gpt2", "opt", "gemma", "gemma3", "neox", "bart-causal")
PAIRED = ("t5", "bart")

# types: two examples of input template, input, output template and label
_CPT = dict(
    cpt_token_ids=[5, 9, 11, 30, 6, 12, 7, 31],
    cpt_mask=[1] * 8,
    cpt_tokens_type_mask=[1, 2, 3, 4, 5, 6, 7, 8],
    opt_projection_epsilon=3.1,
    opt_projection_format_epsilon=1.7,
)
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "PROMPT_TUNING": {
        "random": dict(num_virtual_tokens=3),
        "vocab": dict(num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB"),
    },
    "P_TUNING": {
        "mlp": dict(num_virtual_tokens=3, encoder_hidden_size=10),
        "lstm": dict(
            num_virtual_tokens=4, encoder_hidden_size=9, encoder_reparameterization_type="LSTM", encoder_num_layers=3
        ),
    },
    "PREFIX_TUNING": {
        "plain": dict(num_virtual_tokens=3),
        "projection": dict(num_virtual_tokens=4, encoder_hidden_size=10, prefix_projection=True),
        "zero": dict(num_virtual_tokens=3, init_weights="zero"),
        "zero_projection": dict(num_virtual_tokens=3, prefix_projection=True, init_weights="zero"),
    },
    "MULTITASK_PROMPT_TUNING": {"random": dict(num_virtual_tokens=3, num_tasks=3, num_ranks=2)},
    "CPT": {"plain": _CPT, "decay": dict(**_CPT, opt_weighted_loss_type="decay", opt_loss_decay_factor=0.7)},
    "CARTRIDGE": {
        "plain": dict(num_virtual_tokens=4, num_frozen_tokens=2),
        "none_frozen": dict(num_virtual_tokens=3, num_frozen_tokens=0),
    },
}
SAMPLES = [
    Sample(method, name, MODEL, {"task_type": "CAUSAL_LM", **config})
    for method, rows in METHODS.items()
    for name, config in rows.items()
]
HOLD_KEYS = ("PREFIX_TUNING", "CARTRIDGE")  # the others hold embeddings
EMBEDS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")


def first(method: str, name: str | None = None, **changes: Any) -> Sample:
    """One sample, by default the method's first, with changes to its config."""
    found = next(s for s in SAMPLES if s.method == method and name in (None, s.name))
    return replace(found, kwargs={**found.kwargs, **changes})


def on(sample: Sample, model: str) -> Sample:
    return replace(sample, model=model, kwargs={**sample.kwargs, "task_type": MODELS[model].task})


def each(*names: str, methods: Sequence[str] = tuple(METHODS)) -> list[Sample]:
    """The first sample of each method on these models, where the two go together."""
    rows = [on(first(method), model) for model in names for method in methods]
    no_cache = [s for s in rows if s.method in HOLD_KEYS and "deberta" in s.model]
    return [s for s in rows if s not in no_cache and (s.method != "CPT" or task(s) == "CAUSAL_LM")]


def task(sample: Sample) -> str:
    return sample.kwargs["task_type"]


# models


@cache
def _original(model: str) -> nn.Module:
    with models.seeded(0):
        return MODELS[model].build().eval()


def make(model: str) -> nn.Module:
    """A fresh base model in eval mode, with the same weights every time."""
    return models.clone(_original(model), {})


def adapt(lib, sample: Sample, adapter: str = "default", *, base: nn.Module | None = None, **options):
    return pair.adapt(lib, sample, adapter, base=make(sample.model) if base is None else base, **options)


def both(sample: Sample, **options) -> tuple[nn.Module, nn.Module]:
    ours, theirs = (adapt(lib, sample, **options) for lib in LIBS)
    return ours, theirs


def added(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the adapters: of encoders, and of modules that train beside them."""
    kinds = ("prompt_encoder.", ".modules_to_save.")
    return {name: p for name, p in model.named_parameters() if any(kind in f".{name}" for kind in kinds)}


@torch.no_grad()
def randomize(model: nn.Module, spread: float = 0.6) -> nn.Module:
    """Give every parameter of the adapters a value that depends on nothing but its name."""
    for name, p in added(model).items():
        g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        p.copy_(torch.randn(p.shape, generator=g) * spread)
    return model


# batches


def without(inputs: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {k: v for k, v in inputs.items() if k not in names}


def batch(sample: Sample, padding: str = "right", labels: bool = True) -> dict[str, Tensor]:
    """Inputs for a forward pass.

    Args:
        padding: "none" (and no attention_mask), "left" or "right".
    """
    g = torch.Generator().manual_seed(11)
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=g)
    out = {"input_ids": ids}
    if padding != "none":
        short = torch.tensor([0, 2, 3])[:, None]
        place = torch.arange(LENGTH)
        real = place < LENGTH - short if padding == "right" else place >= short
        out = {"input_ids": ids * real, "attention_mask": real.long()}
    if sample.method == "MULTITASK_PROMPT_TUNING":
        out["task_ids"] = torch.tensor([2, 0, 1])
    if MODELS[sample.model].task == "SEQ_2_SEQ_LM" and not labels:
        out["decoder_input_ids"] = torch.randint(3, VOCAB, (BATCH, 5), generator=g)
    return {**out, **(targets(sample, g) if labels else {})}


def targets(sample: Sample, g: torch.Generator) -> dict[str, Tensor]:
    kind = task(sample)
    if kind == "CAUSAL_LM":
        labels = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=g)
        labels[1, :3] = -100
        return {"labels": labels}
    if kind == "SEQ_2_SEQ_LM":
        labels = torch.randint(3, VOCAB, (BATCH, 5), generator=g)
        labels[2, 3:] = -100
        return {"labels": labels}
    if kind == "SEQ_CLS":
        return {"labels": torch.tensor([0, 2, 1])}
    if kind == "TOKEN_CLS":
        return {"labels": torch.randint(0, 4, (BATCH, LENGTH), generator=g)}
    if kind == "QUESTION_ANS":
        return {"start_positions": torch.tensor([1, 4, 0]), "end_positions": torch.tensor([3, 6, 5])}
    return {}


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss and output of a forward pass. The inputs are copies: PEFT writes into some."""
    out = model(**{k: v.clone() for k, v in inputs.items()})
    return {k: out[k] for k in ("loss", "logits", "start_logits", "end_logits", "last_hidden_state") if k in out}


def measured(seen: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> tuple[dict, dict]:
    """Values of a forward pass, and gradients of the loss plus the outputs under a weight for each number."""
    g = torch.Generator().manual_seed(3)
    total = sum((y * torch.randn(y.shape, generator=g)).mean() for y in seen.values())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    grads = dict(zip(trained, torch.autograd.grad(total, list(trained.values()))))
    return {k: y.detach() for k, y in seen.items()}, grads


def run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[dict, dict]:
    """Values of a forward pass, and gradients of all that trains."""
    return measured(forward(model, inputs), added(model))


def tokenizer(folder, words, unknown, padding, split="Whitespace"):
    """Write a tokenizer of whole words, whose ids are their places, and return its folder."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    made.pre_tokenizer = getattr(pre_tokenizers, split)()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token=unknown, pad_token=padding).save_pretrained(folder)
    return str(folder)
