# SPDX-License-Identifier: Apache-2.0
"""The three axes of the matrix as tables: tasks (`TASKS`), models (`MODELS`), methods (`METHODS`).

A cell is a model and a method; what graft refuses stands in `REFUSED` with the text of the refusal.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

import graft
from graft.config.fields import LORA
from graft.methods import IN_PEFT
from tests.covering import Sometimes
from tests.models import LENGTH, STD, VOCAB, TinyModel, clone, pairs, seed, seeded, tokens, transformer
from tests.models import MODELS as TINY
from tests.samples import LAWS

TOKENS = 3  # virtual ones of each prompt
STEPS = 8  # tokens to generate
LABELS = 4  # of the classifiers

# tasks


@dataclass(frozen=True)
class Task:
    """Labels for a batch of rows, and the loss that logits without a prompt's positions have under them."""

    labels: Callable[[int], dict[str, Tensor]]
    loss: Callable[[Any, dict[str, Tensor]], Tensor]


def sequence_labels(batch: int) -> dict[str, Tensor]:
    return {"labels": torch.randint(0, LABELS, (batch,))}


def token_labels(batch: int) -> dict[str, Tensor]:
    return {"labels": torch.randint(0, LABELS, (batch, LENGTH)).index_fill(1, torch.tensor([2]), -100)}


def next_tokens(batch: int) -> dict[str, Tensor]:
    return {"labels": torch.randint(3, VOCAB, (batch, LENGTH)).index_fill(1, torch.tensor([2]), -100)}


def target_tokens(batch: int) -> dict[str, Tensor]:
    return {"labels": torch.randint(3, VOCAB, (batch, 5)).index_fill(1, torch.tensor([4]), -100)}


def spans(batch: int) -> dict[str, Tensor]:
    return {"start_positions": torch.randint(0, 3, (batch,)), "end_positions": torch.randint(3, LENGTH, (batch,))}


def span_loss(out: Any, at: dict[str, Tensor]) -> Tensor:
    starts = cross_entropy(out.start_logits, at["start_positions"])
    return (starts + cross_entropy(out.end_logits, at["end_positions"])) / 2


def causal_loss(out: Any, at: dict[str, Tensor]) -> Tensor:
    n = min(LENGTH, out.logits.shape[1] - 1)  # a prompt's last token predicts the first of the input
    return cross_entropy(out.logits[:, -n - 1 : -1].flatten(0, 1), at["labels"][:, -n:].flatten())


def per_token(out: Any, at: dict[str, Tensor]) -> Tensor:
    labels = at["labels"]
    return cross_entropy(out.logits[:, -labels.shape[1] :].flatten(0, 1), labels.flatten())


def similarity(out: Any, at: dict[str, Tensor]) -> Tensor:
    """Of each row's mean and the next row's, as sentence embeddings are trained."""
    means = out.last_hidden_state.mean(1)
    return cosine_similarity(means, means.roll(1, 0)).mean()


TASKS = {
    "CAUSAL_LM": Task(next_tokens, causal_loss),
    "SEQ_2_SEQ_LM": Task(target_tokens, per_token),
    "SEQ_CLS": Task(sequence_labels, lambda out, at: cross_entropy(out.logits, at["labels"])),
    "TOKEN_CLS": Task(token_labels, per_token),
    "QUESTION_ANS": Task(spans, span_loss),
    "FEATURE_EXTRACTION": Task(lambda batch: {}, similarity),
}

# models

_sizes = dict(hidden_size=24, num_hidden_layers=2, max_position_embeddings=32, vocab_size=VOCAB, pad_token_id=0)
_decoder = dict(**_sizes, intermediate_size=36, num_attention_heads=4, bos_token_id=1, eos_token_id=2)
_grouped = dict(**_decoder, num_key_value_heads=2, initializer_range=STD)
_encoder = dict(
    **_sizes, intermediate_size=36, num_attention_heads=3, initializer_range=STD, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)  # fmt: skip
_relative = dict(
    relative_attention=True, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", share_att_key=True,
    position_buckets=8,
)  # fmt: skip
_bart = dict(
    d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=3, decoder_attention_heads=3,
    encoder_ffn_dim=36, decoder_ffn_dim=36, max_position_embeddings=32, vocab_size=VOCAB, init_std=STD, dropout=0.0,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
)  # fmt: skip


def t5() -> nn.Module:
    """Its embeddings are small beside what layers add to them, or it repeats one token whatever an adapter does."""
    model: Any = transformer(
        "T5Config", "T5ForConditionalGeneration", vocab_size=VOCAB, d_model=24, d_kv=6, d_ff=36, num_layers=2,
        num_heads=4, dropout_rate=0.0, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, initializer_factor=2.0,
    )()  # fmt: skip
    model.shared.weight.data.mul_(0.3)
    return model


def causal(config_name: str, model_name: str, **config: Any) -> TinyModel:
    return TinyModel(transformer(config_name, model_name, **config), tokens, "CAUSAL_LM")


def with_heads(name: str, library_name: str, **config: Any) -> dict[str, TinyModel]:
    """A bidirectional encoder under each of the three heads."""
    heads = {
        "seq": ("SequenceClassification", "SEQ_CLS", {"num_labels": LABELS}),
        "tok": ("TokenClassification", "TOKEN_CLS", {"num_labels": LABELS}),
        "qa": ("QuestionAnswering", "QUESTION_ANS", {}),
    }
    return {
        f"{name}-{head}": TinyModel(
            transformer(f"{library_name}Config", f"{library_name}For{cls}", **_encoder, **config, **more), tokens, task
        )
        for head, (cls, task, more) in heads.items()
    }


MODELS: dict[str, TinyModel] = {
    **{name: TINY[name] for name in ("llama", "gpt2", "opt", "gemma3", "neox")},
    "qwen": causal("Qwen3Config", "Qwen3ForCausalLM", **_grouped, head_dim=6),
    "mixtral": causal(
        "MixtralConfig", "MixtralForCausalLM", **_grouped, num_local_experts=3, num_experts_per_tok=2
    ),
    "t5": TinyModel(t5, pairs, "SEQ_2_SEQ_LM"),
    "bart": TinyModel(transformer("BartConfig", "BartForConditionalGeneration", **_bart), pairs, "SEQ_2_SEQ_LM"),
    **with_heads("bert", "Bert"),
    **with_heads("roberta", "Roberta"),
    **with_heads("deberta", "DebertaV2", **_relative),
    "bert": TINY["bert"],
    "minilm": TinyModel(  # a BERT that is deeper and narrower
        transformer("BertConfig", "BertModel", **{**_encoder, "hidden_size": 12, "num_hidden_layers": 4}), tokens,
        "FEATURE_EXTRACTION",
    ),
}  # fmt: skip
GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@cache
def _original(name: str) -> nn.Module:
    with seeded(0):
        model = MODELS[name].build().eval()
    settings = getattr(model, "generation_config", None)
    if settings is not None:  # every row is to have all its steps
        settings.eos_token_id = settings.forced_eos_token_id = None
    return model


def make(name: str) -> nn.Module:
    """A fresh model in eval mode, with the same weights every time."""
    return clone(_original(name), {})


# methods


LAYER_METHODS: dict[str, dict[str, Any]] = {
    "LORA": dict(r=3, lora_alpha=5),
    "ADALORA": dict(init_r=4, target_r=2, lora_alpha=6, total_step=9),
    "IA3": {},
    "VERA": dict(r=5),
    "LOHA": dict(r=3, alpha=4),
    "OFT": dict(oft_block_size=4),
    "HRA": dict(r=4),
    "HIRA": dict(r=3),
    "MISS": dict(r=4),
    "VBLORA": dict(r=3, num_vectors=9, vector_length=12),
    "ROAD": dict(variant="road_2", group_size=4),
    "PVERA": dict(r=5, generator_seed=3),
    "RANDLORA": dict(r=5, randlora_alpha=7),
    "UNILORA": dict(r=3, theta_d_length=50),
    "TINYLORA": dict(u=7),
    "GRALORA": dict(r=4, alpha=5, hybrid_r=2),
    "DELORA": dict(r=2, delora_lambda=40),
    "C3A": dict(block_size=12),
    "FOURIERFT": dict(n_frequency=40, scaling=40),
    "LILY": dict(r=3),
    "ADAMSS": dict(r=7, num_subspaces=3),
    "WAVEFT": dict(n_frequency=60, scaling=2),
    "BEFT": {},
    "SHIRA": dict(r=1),
    "SUPERTUNING": dict(sparsity=0.97),
    "DEFT": dict(r=2),
    "BOFT": dict(boft_block_size=4),
    "PSOFT": dict(r=4),
    "OSF": dict(effective_rank=0.8),
    "LOKR": dict(r=2, alpha=3),
    "GLORA": dict(r=3, config_D_E="none"),  # D is a factor of biases, which are zero in fresh models
    "PEANUT": dict(r=4, depth=1, act_fn="tanh"),
    "FROD": dict(sparse_rate=0.1),
    "TRAINABLE_TOKENS": dict(token_indices=list(range(3, VOCAB, 3))),
    "LN_TUNING": {},
}
PROMPTS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": dict(num_virtual_tokens=TOKENS),
    "P_TUNING": dict(num_virtual_tokens=TOKENS, encoder_hidden_size=20),
    "PREFIX_TUNING": dict(num_virtual_tokens=TOKENS),
    "MULTITASK_PROMPT_TUNING": dict(num_virtual_tokens=TOKENS, num_tasks=3, num_ranks=2),
    "CPT": dict(cpt_token_ids=[5, 9, 7], cpt_tokens_type_mask=[1, 2, 4], opt_projection_epsilon=3.0),
    "CARTRIDGE": dict(num_virtual_tokens=TOKENS, num_frozen_tokens=1),
}
# those that PEFT lacks, by their first samples
LAYER_METHODS |= {s.method: s.config for s in LAWS[::-1] if s.method not in IN_PEFT}
METHODS = LAYER_METHODS | PROMPTS

SPREAD = {  # standard deviation of trained values, where it is not 0.4
    "C3A": 3.0,
    "OFT": 0.1,
    "VERA": 1.5,
    "HIRA": 0.8,
    "PEANUT": 0.2,
    "PVERA": 1.5,
    "UNILORA": 1.5,
    "SVFT": 4.0,  # its gates are saturated above
}

# where there are no defaults: "model_type" of the config → target_modules
_norms = ["input_layernorm", "post_attention_layernorm", "norm"]
EXPLICIT: dict[str, dict[str, Any]] = {
    "ADALORA": {"mixtral": ["q_proj", "v_proj"]},
    "VBLORA": {"mixtral": ["q_proj", "v_proj"]},
    "BEFT": {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"]},
    "OSF": {  # else all linear layers, heads of PEFT's among them
        "bert": ["query", "value"],
        "roberta": ["query", "value"],
        "deberta-v2": ["query_proj", "value_proj"],
        "bart": ["q_proj", "v_proj"],
        "t5": ["q", "v"],
    },
    "LN_TUNING": {
        "opt": ["self_attn_layer_norm", "final_layer_norm"],
        "gpt_neox": ["input_layernorm", "post_attention_layernorm"],
        "mixtral": _norms,
        "bert": ["LayerNorm"],
        "roberta": ["LayerNorm"],
        "deberta-v2": ["LayerNorm"],
    },
}


@dataclass(frozen=True)
class Cell:
    model: str
    method: str

    def __str__(self) -> str:
        return f"{self.task}-{self.model}-{self.method}"

    @property
    def task(self) -> str:
        task = MODELS[self.model].task
        assert task is not None
        return task

    @property
    def features(self) -> list[Any]:
        """What a law meets in the default run: every method, every model, an eighth of the methods in each task."""
        return [self.method, self.model, Sometimes((self.task, self.method), 8)]

    def among(self, methods: str, where: str) -> bool:
        """Whether a row of a table is about this cell. `where`: models or tasks."""
        return self.method in methods.split() and bool({self.model, self.task} & set(where.split()))

    def config(self, lib: Any) -> Any:
        """The configuration as an object of `lib` (graft or peft)."""
        values: dict[str, Any] = {**copy.deepcopy(METHODS[self.method]), "task_type": self.task}
        kind = _original(self.model).config.model_type
        elsewhere = {} if self.method in IN_PEFT or kind in (graft.method_of(self.method).targets or {}) else LORA
        explicit = EXPLICIT.get(self.method, elsewhere).get(kind)
        if (self.method, self.task) == ("REFT", "SEQ_2_SEQ_LM"):
            values["prefix_positions"] = 1  # the decoder's prompt; of a whole target, more tokens would change
        if self.method == "REFT" and _original(self.model).config.model_type == "deberta-v2":
            explicit = ["intermediate.dense"]  # its projections also run on relative positions, which are no tokens
        if explicit is not None:
            values["target_modules"] = list(explicit)
        return lib.PEFT_TYPE_TO_CONFIG_MAPPING[self.method](**values)

    def fresh(self, lib: Any = graft) -> nn.Module:
        base = make(self.model)
        seed(1)
        return lib.get_peft_model(base, self.config(lib))

    def trained(self) -> nn.Module:
        """A model whose adapter does something."""
        model = self.fresh()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                    p.copy_(torch.randn(p.shape, generator=g) * SPREAD.get(self.method, 0.4))
        return model

    def frozen(self, name: str) -> bool:
        """Whether a parameter of the adapter never trains."""
        return FROZEN.get(self.method, " ") in name

    def inputs(self, batch: int = 3) -> dict[str, Tensor]:
        with seeded(7):
            given = MODELS[self.model].inputs(batch)
        return given | self.arguments(batch)

    def arguments(self, batch: int) -> dict[str, Tensor]:
        """What the method asks for beside the model's inputs."""
        return {"task_ids": torch.arange(batch) % 3} if self.method == "MULTITASK_PROMPT_TUNING" else {}

    def labels(self, batch: int = 3) -> dict[str, Tensor]:
        with seeded(8):
            return TASKS[self.task].labels(batch)

    def labelled(self) -> dict[str, Tensor]:
        """Inputs and labels. The labels make the inputs of a decoder."""
        labels = self.labels()
        return {k: v for k, v in self.inputs().items() if not (labels and k == "decoder_input_ids")} | labels

    def start(self) -> dict[str, Tensor]:
        """Where generating starts: two rows, one of them padded, for a decoder on the left."""
        rows = {k: v[:2] for k, v in self.inputs().items() if k != "decoder_input_ids"}
        turned = ("input_ids", "attention_mask") if self.task == "CAUSAL_LM" else ()
        return {k: v.flip(1) if k in turned else v for k, v in rows.items()}


FROZEN = {"ADALORA": "ranknum", "CARTRIDGE": ".frozen_embedding", "CPT": ".default.embedding."}

# methods, models or tasks → what graft says

REFUSED = [
    ("CPT", "SEQ_2_SEQ_LM SEQ_CLS TOKEN_CLS QUESTION_ANS FEATURE_EXTRACTION", "only supports task_type = CAUSAL_LM"),
    ("PREFIX_TUNING CARTRIDGE", "deberta-seq deberta-tok deberta-qa", "DebertaV2Model has no cache argument"),
]


def refusal(cell: Cell) -> str | None:
    found = (text for methods, where, text in REFUSED if cell.among(methods, where))
    return next(found, None)


PRODUCT = [Cell(model, method) for model in MODELS for method in METHODS]
CELLS = [cell for cell in PRODUCT if refusal(cell) is None]
