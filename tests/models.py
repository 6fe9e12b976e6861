# SPDX-License-Identifier: Apache-2.0
"""Tiny seeded base models by name: `make("llama")`, `inputs("llama")`, `output(model, batch)`; `adapted` with adapters.

Widths are never powers of two and weights are of order one, so that a wrong transpose, a wrong block or a missing
scale cannot hide behind symmetry or behind an absolute tolerance.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

import graft
from tests.looks import layers_of

VOCAB, LENGTH, STD = 41, 7, 0.25


@dataclass(frozen=True)
class TinyModel:
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict]  # batch size -> keyword arguments of forward
    task: str | None = None  # the PEFT task type the architecture belongs to


def seed(number: int) -> None:
    torch.default_generator.manual_seed(number)  # torch.manual_seed would visit every accelerator, 2 ms a call


@contextmanager
def seeded(number: int):
    """Run a block under a seed and leave the global generator as it was."""
    state = torch.get_rng_state()
    seed(number)
    yield
    torch.set_rng_state(state)


def adapted(
    base: nn.Module | Callable[[], nn.Module],
    configs: Any,
    *,
    lib: Any = graft,
    seed: int = 1,
    scale: float = 0.3,
    **options,
) -> Any:
    """A model in eval mode with an adapter for each config by name, all of which do something; the first is active.

    `configs` may be one config, of the adapter "default"; `base`, a function that builds the model under `seed`. With a
    `scale` of 0 adapters stay as they start. `options` are those of `get_peft_model`.
    """
    configs = configs if isinstance(configs, dict) else {"default": configs}
    with seeded(seed):
        base = base if isinstance(base, nn.Module) else base()
        (first, config), *others = configs.items()
        model = lib.get_peft_model(base, copy.deepcopy(config), first, **options)
        for name, config in others:
            model.add_adapter(name, copy.deepcopy(config))
    return (disturb(model, scale) if scale else model).eval()


@torch.no_grad()
def disturb(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Move every adapter parameter that can train away from where it is."""
    with seeded(3):
        for name in model.peft_config:
            for layer in layers_of(model, name):
                for p in trainable(layer, name):
                    p.add_((torch.randn(p.shape) * scale).to(p))
    return model


def trainable(layer: graft.AdapterLayer, adapter: str) -> list[nn.Parameter]:
    """The parameters of an adapter that are not frozen for good, those that it shares with other layers too."""
    shared = [getattr(layer, key) for key in layer.attached]
    own = [slot.tensor for slot in layer.slots(adapter) if slot.trains]
    held = [c[adapter] for c in shared if isinstance(c, (nn.ParameterDict, nn.ModuleDict)) and adapter in c]
    return own + [p for c in held for p in ([c] if isinstance(c, nn.Parameter) else c.parameters())]


@torch.no_grad()
def nudged(model: nn.Module) -> nn.Module:
    """The model in eval mode, its LoRA parameters moved by values that depend on their names only."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            with seeded(sum(map(ord, name))):
                p.add_(torch.randn(p.shape), alpha=0.3)
    return model.eval()


@cache
def _original(name: str) -> nn.Module:
    with seeded(0):
        return MODELS[name].build().eval()


def make(name: str) -> nn.Module:
    """A fresh model in eval mode, with the same weights every time."""
    return clone(_original(name), {})


PLAIN = (bool, int, float, str, type(None))


def clone(module: nn.Module, memo: dict) -> nn.Module:
    """`copy.deepcopy` of a module in a third of the time: most of what a module has are empty dictionaries."""
    if id(module) in memo:
        return memo[id(module)]
    memo[id(module)] = new = object.__new__(type(module))
    for key, value in vars(module).items():
        if key == "_modules":
            value = {name: None if child is None else clone(child, memo) for name, child in value.items()}
        elif type(value) in (dict, OrderedDict, set) and not value:
            value = type(value)()
        elif id(value) in memo:  # the config, of which every module has a reference
            value = memo[id(value)]
        elif key == "_parameters":
            value = {name: None if p is None else p.__deepcopy__(memo) for name, p in value.items()}
        elif type(value) not in PLAIN:
            value = copy.deepcopy(value, memo)
        new.__dict__[key] = value
    return new


@cache
def names(name: str) -> frozenset[str]:
    """Names of the model's parameters."""
    return frozenset(n for n, _ in make(name).named_parameters())


def inputs(name: str, batch: int = 3) -> dict:
    return dict(_inputs(name, batch))  # tests take keys out


@cache
def _inputs(name: str, batch: int) -> dict:
    with seeded(7):
        return MODELS[name].inputs(batch)


def checkpoint(model, reentrant: bool = False) -> None:
    """Turn on gradient checkpointing, by the name that the installed transformers does not warn of."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def output(model: nn.Module, batch: dict) -> torch.Tensor:
    """The one tensor of a forward pass that tests compare."""
    y = model(**batch)
    if isinstance(y, torch.Tensor):
        return y
    if "start_logits" in y:
        return torch.stack([y["start_logits"], y["end_logits"]])
    return y["logits"] if "logits" in y else y["last_hidden_state"]


# plain torch


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.fc1 = nn.Linear(12, 20)
        self.fc2 = nn.Linear(20, 12, bias=False)

    def forward(self, x):
        return x + self.fc2(torch.tanh(self.fc1(self.norm(x))))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(10, 12)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.lin0(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Idle(nn.Module):
    """Two layers of which only the first runs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.a(x)


class HFConv1D(nn.Module):
    """transformers' Conv1D: a linear layer that stores its weight transposed."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.c_fc = Conv1D(18, 10)
        self.c_proj = Conv1D(6, 18)
        nn.init.normal_(self.c_fc.weight, std=STD)
        nn.init.normal_(self.c_proj.weight, std=STD)
        nn.init.normal_(self.c_fc.bias)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.c_proj(torch.tanh(self.c_fc(x))))


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(23, 12, padding_idx=0)
        self.pos = nn.Embedding(LENGTH, 12)
        self.lin = nn.Linear(12, 5)

    def forward(self, ids):
        return self.lin(torch.tanh(self.emb(ids) + self.pos.weight))


class Conv1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(6, 9, 3, stride=2, padding=1)
        self.point = nn.Conv1d(9, 10, 1, bias=False)
        self.grouped = nn.Conv1d(10, 6, 2, groups=2)
        self.lin = nn.Linear(6, 5)

    def forward(self, x):
        return self.lin(self.grouped(self.point(torch.tanh(self.conv(x)))).mean(-1))


class Conv2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 10, 1)
        self.grouped = nn.Conv2d(10, 6, 3, padding=1, groups=2)
        self.rect = nn.Conv2d(6, 6, (1, 3), bias=False)
        self.dilated = nn.Conv2d(6, 9, 3, padding=2, dilation=2)
        self.lin = nn.Linear(9, 5)

    def forward(self, x):
        x = self.grouped(self.point(torch.tanh(self.conv(x))))
        return self.lin(self.dilated(self.rect(x)).mean((-1, -2)))


class Conv3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 6, 3, padding=1, stride=(1, 2, 1))
        self.point = nn.Conv3d(6, 5, 1)
        self.lin = nn.Linear(5, 5)

    def forward(self, x):
        return self.lin(self.point(torch.tanh(self.conv(x))).mean((-1, -2, -3)))


# transformers, from configs


def transformer(config_name: str, model_name: str, **config) -> Callable[[], nn.Module]:
    def build():
        import transformers

        return getattr(transformers, model_name)(getattr(transformers, config_name)(**config))

    return build


_decoder = dict(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0)
_drop = dict(attention_dropout=0.0)

llama = transformer(
    "LlamaConfig", "LlamaForCausalLM", hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, initializer_range=STD, **_decoder,
)  # fmt: skip
gpt2 = transformer(
    "GPT2Config", "GPT2LMHeadModel", n_embd=24, n_layer=2, n_head=3, n_inner=36, n_positions=32, initializer_range=STD,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_decoder,
)  # fmt: skip
opt = transformer(
    "OPTConfig", "OPTForCausalLM", hidden_size=24, ffn_dim=36, num_hidden_layers=2, num_attention_heads=3,
    max_position_embeddings=32, word_embed_proj_dim=24, init_std=STD, dropout=0.0, **_decoder, **_drop,
)  # fmt: skip
neox = transformer(
    "GPTNeoXConfig", "GPTNeoXForCausalLM", hidden_size=24, intermediate_size=36, num_hidden_layers=2,
    num_attention_heads=3, max_position_embeddings=32, initializer_range=STD, **_decoder,
)  # fmt: skip
gemma3 = transformer(  # its embedding multiplies by `embed_scale`
    "Gemma3TextConfig", "Gemma3ForCausalLM", hidden_size=24, intermediate_size=36, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=6, max_position_embeddings=32, initializer_range=STD,
    tie_word_embeddings=False, **_decoder,
)  # fmt: skip
t5 = transformer(
    "T5Config", "T5ForConditionalGeneration", vocab_size=VOCAB, d_model=24, d_kv=6, d_ff=36, num_layers=2, num_heads=4,
    dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, initializer_factor=0.5,
)  # fmt: skip
_bert = dict(
    vocab_size=VOCAB, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=3,
    max_position_embeddings=32, initializer_range=STD, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
deberta = transformer(
    "DebertaV2Config", "DebertaV2ForSequenceClassification", relative_attention=True, pos_att_type=["p2c", "c2p"],
    norm_rel_ebd="layer_norm", share_att_key=True, position_buckets=8, num_labels=3, **_bert,
)  # fmt: skip


def floats(*shape: int) -> Callable[[int], dict]:
    return lambda batch: {"x": torch.randn(batch, *shape)}


def ids(batch: int) -> dict:
    return {"ids": torch.randint(0, 23, (batch, LENGTH))}


def tokens(batch: int) -> dict:
    """Token ids with right padding of a different length in each row."""
    input_ids = torch.randint(3, VOCAB, (batch, LENGTH))
    mask = torch.arange(LENGTH)[None] < LENGTH - torch.arange(batch)[:, None] % 3
    return {"input_ids": input_ids * mask, "attention_mask": mask.long()}


def pairs(batch: int) -> dict:
    return {**tokens(batch), "decoder_input_ids": torch.randint(3, VOCAB, (batch, 5))}


MODELS = {
    "mlp": TinyModel(MLP, floats(4, 10)),
    "conv1D": TinyModel(HFConv1D, floats(4, 10)),
    "embedding": TinyModel(Embedding, ids),
    "conv1d": TinyModel(Conv1d, floats(6, 11)),
    "conv2d": TinyModel(Conv2d, floats(3, 11, 9)),
    "conv3d": TinyModel(Conv3d, floats(3, 4, 5, 6)),
    "llama": TinyModel(llama, tokens, "CAUSAL_LM"),
    "gpt2": TinyModel(gpt2, tokens, "CAUSAL_LM"),
    "opt": TinyModel(opt, tokens, "CAUSAL_LM"),
    "neox": TinyModel(neox, tokens, "CAUSAL_LM"),
    "gemma3": TinyModel(gemma3, tokens, "CAUSAL_LM"),
    "t5": TinyModel(t5, pairs, "SEQ_2_SEQ_LM"),
    "bert": TinyModel(transformer("BertConfig", "BertModel", **_bert), tokens, "FEATURE_EXTRACTION"),
    "bert-seq": TinyModel(
        transformer("BertConfig", "BertForSequenceClassification", num_labels=3, **_bert), tokens, "SEQ_CLS"
    ),
    "bert-tok": TinyModel(
        transformer("BertConfig", "BertForTokenClassification", num_labels=4, **_bert), tokens, "TOKEN_CLS"
    ),
    "bert-qa": TinyModel(transformer("BertConfig", "BertForQuestionAnswering", **_bert), tokens, "QUESTION_ANS"),
    "deberta": TinyModel(deberta, tokens, "SEQ_CLS"),
}
