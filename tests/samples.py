# SPDX-License-Identifier: Apache-2.0
"""Sample configurations per method that PEFT has, too, as data. A new one adds a block here, and is then compared with
PEFT everywhere.

A row is `row(name, models, **config)`; it stands for one `Sample` per model. `target_modules` comes from `TARGETS`
unless the row gives it. `unlike` names the aspects in which PEFT is not the oracle for that row ("forward",
"gradients", "merge", "init", "rng"): tests of graft alone in test_differences.py take the place of those comparisons.
Scalings are never powers of two, so that a lost, doubled or misplaced scaling shows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

TARGETS = {
    "mlp": ["lin0", "fc1", "fc2"],
    "conv1D": ["c_fc", "c_proj"],
    "embedding": ["emb"],
    "conv1d": ["conv", "point"],
    "conv2d": ["conv", "point", "lin"],
    "conv3d": ["conv"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "opt": ["q_proj", "fc2"],
    "neox": ["query_key_value", "dense_4h_to_h"],
    "gemma3": ["q_proj", "up_proj"],
    "t5": ["q", "v", "wo"],
    "bert": ["query", "value", "output.dense"],
    "bert-seq": ["query", "value"],
    "bert-tok": ["query", "value"],
    "bert-qa": ["query", "intermediate.dense"],
    "deberta": ["query_proj", "value_proj"],
}


@dataclass(frozen=True)
class Sample:
    method: str
    name: str
    model: str
    kwargs: dict[str, Any] = field(hash=False)
    unlike: frozenset[str] = frozenset()

    @property
    def spread(self) -> float:
        """Standard deviation of random adapter values: large enough to matter, small enough to be well conditioned."""
        return {"OFT": 0.1}.get(self.method, 0.3)

    def __str__(self) -> str:
        return f"{self.method}-{self.name}-{self.model}"

    def config(self, lib, **overrides):
        """The configuration as an object of `lib` (graft or peft)."""
        cls = lib.PEFT_TYPE_TO_CONFIG_MAPPING[self.method]
        return cls(**copy.deepcopy({**self.kwargs, **overrides}))


def row(name: str, models: str, unlike: str = "", **config) -> list[tuple]:
    return [
        (name, model, {"target_modules": TARGETS[model], **config}, frozenset(unlike.split()))
        for model in models.split()
    ]


LAYERS = [  # fields that every method with `layers_to_transform` shares
    *row("layer", "llama", layers_to_transform=1),
    *row("layers", "mlp", target_modules=["fc1", "fc2"], layers_to_transform=[0, 2], layers_pattern="layers"),
    *row("layers_pattern", "t5", layers_to_transform=[1], layers_pattern=["block"]),
]
CHOICE = [  # ways to choose modules
    *row("regex", "llama mlp", target_modules=r".*\.(1|lin0)\..*(k_proj|gate_proj|fc2)|lin0"),
    *row("all-linear", "llama bert-seq mlp", target_modules="all-linear"),
    *row("head", "mlp", modules_to_save=["head"]),
    *row("lm_head", "llama", modules_to_save=["lm_head", "embed_tokens"]),
    *row("save_by_ending", "llama", modules_to_save=["head"]),
    *row("norms", "bert-seq", modules_to_save=["LayerNorm", "classifier"]),
    *row("classify", "bert-seq deberta", task_type="SEQ_CLS"),
    *row("inference", "mlp", inference_mode=True),
]
EXCLUDE = [
    *row("exclude", "mlp", exclude_modules=["layers.1.fc1", "lin0"]),
    *row("exclude_regex", "llama", exclude_modules=r".*\.0\..*proj"),
]
DEFAULT_TARGETS = dict(target_modules=None)


def sized(rows: list[tuple], **config) -> list[tuple]:
    """Rows with more fields, for methods whose default sizes are too large for the tiny models."""
    return [(name, model, {**config, **own}, unlike) for name, model, own, unlike in rows]


_lora = dict(r=3, lora_alpha=5)
_lin = ["lin0", "fc1"]  # layers of "mlp" that have a bias

METHODS: dict[str, list[tuple]] = {
    "LORA": [
        *row("plain", " ".join(TARGETS), **_lora),
        *row("default_targets", "llama gpt2 opt neox t5 bert deberta gemma3", **DEFAULT_TARGETS),
        *row("tasks", "llama gpt2", **_lora, task_type="CAUSAL_LM"),
        *row("tasks", "t5", **_lora, task_type="SEQ_2_SEQ_LM"),
        *row("tasks", "bert-tok", **_lora, task_type="TOKEN_CLS"),
        *row("tasks", "bert-qa", **_lora, task_type="QUESTION_ANS"),
        *row("tasks", "bert", **_lora, task_type="FEATURE_EXTRACTION"),
        *row("rslora", "mlp conv2d embedding", r=5, lora_alpha=7, use_rslora=True),
        *row("float_alpha", "mlp", r=3, lora_alpha=4.11),
        *row("dropout", "mlp conv1D conv1d conv2d embedding llama", **_lora, lora_dropout=0.3),
        *row(
            "patterns",
            "llama",
            **_lora,
            rank_pattern={r"layers\.1\.self_attn\.q_proj": 5, "down_proj": 2},
            alpha_pattern={"^model.layers.0.self_attn.v_proj": 11, "q_proj": 7},
        ),
        *row("patterns", "conv2d", **_lora, rank_pattern={"point": 4}, alpha_pattern={"conv": 7}),
        *row("patterns", "embedding", **_lora, rank_pattern={"emb": 5}, alpha_pattern={"emb": 3.3}),
        *row("bias_all", "mlp opt conv2d", **_lora, bias="all"),
        *row("bias_lora_only", "mlp bert gpt2", **_lora, bias="lora_only"),
        *row("lora_bias", "mlp", **_lora, target_modules=_lin, lora_bias=True),
        *row("lora_bias", "conv1D conv2d conv1d", **_lora, lora_bias=True),
        *row("init_false", "mlp conv1D embedding conv1d conv2d conv3d", **_lora, init_lora_weights=False),
        *row("gaussian", "mlp conv1D embedding conv2d conv3d", **_lora, init_lora_weights="gaussian"),
        *row("orthogonal", "mlp conv1D", r=4, lora_alpha=5, init_lora_weights="orthogonal"),
        *row("dora", "mlp conv1D embedding conv1d conv2d conv3d llama gpt2 t5 bert", **_lora, use_dora=True),
        *row("dora_dropout", "mlp conv1D", **_lora, use_dora=True, lora_dropout=0.3),
        *row("dora_pissa", "mlp", **_lora, use_dora=True, init_lora_weights="pissa"),
        *row("kasa", "mlp llama t5 bert", **_lora, kasa_config={}),
        *row("kasa_dropout", "mlp", **_lora, lora_dropout=0.3, kasa_config=dict(beta=0.3, gamma=0.01)),
        *row(
            "kasa_patterns", "llama", **_lora, kasa_config={}, rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 7}
        ),
        *row("kasa_rslora", "mlp", **_lora, kasa_config={}, use_rslora=True, init_lora_weights="gaussian"),
        *row("kasa_lora_bias", "mlp", **_lora, kasa_config={}, target_modules=_lin, lora_bias=True),
        *row("kasa_pissa", "mlp", **_lora, kasa_config={}, init_lora_weights="pissa"),
        *row("kasa_random", "mlp", **_lora, kasa_config={}, init_lora_weights=False, modules_to_save=["head"]),
        *row("pissa", "mlp conv1D llama embedding", **_lora, init_lora_weights="pissa"),
        *row("pissa_niter", "mlp conv1D", **_lora, init_lora_weights="pissa_niter_4"),
        *row("pissa_rslora", "mlp", **_lora, init_lora_weights="pissa", use_rslora=True),
        *row("olora", "mlp llama", **_lora, init_lora_weights="olora"),
        *row("fan_in_fan_out", "gpt2 conv1D", **_lora, fan_in_fan_out=True),
        *row("grouped", "conv1d conv2d", r=4, lora_alpha=5, target_modules=["grouped"]),
        # PEFT takes a 1x1x1 kernel for a 1x1 kernel and cannot merge it
        *row("point", "conv3d", "merge", **_lora, target_modules=["point"]),
        *row("rect", "conv2d", **_lora, target_modules=["rect", "point"]),
        *row("tokens", "llama gpt2 opt", **_lora, trainable_token_indices=[3, 5, 8]),
        *row("tokens_by_name", "llama", **_lora, trainable_token_indices={"embed_tokens": [2, 9]}),
        *row(
            "tokens_two",
            "embedding",
            **_lora,
            target_modules=["lin"],
            trainable_token_indices={"emb": [4], "pos": [1, 2]},
        ),
        *row("embed", "llama gemma3", **_lora, target_modules=["embed_tokens", "q_proj"]),
        *row("lm_head", "llama", **_lora, target_modules=["lm_head"]),
        *row("head_mixed", "mlp", **_lora, target_modules=["fc1", "head"], modules_to_save=["lin0", "norm"]),
        # PEFT builds a linear layer for the tied head and throws it away
        *row("tied_save", "opt", "rng", **_lora, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        # PEFT initialises the shared factors a second time through the head, and merges them twice
        *row(
            "tied_target",
            "opt",
            "init rng merge",
            **_lora,
            target_modules=["embed_tokens", "q_proj"],
            ensure_weight_tying=True,
        ),
        *row("replicated", "llama", "merge", **_lora, layer_replication=[(0, 2), (0, 1), (1, 2)]),
        *LAYERS,
        *CHOICE,
        *EXCLUDE,
    ],
    "IA3": [
        *row("plain", "llama", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        *row("plain", "mlp", target_modules=["lin0", "fc1", "fc2"], feedforward_modules=["fc2"]),
        *row("plain", "conv1D", feedforward_modules=["c_proj"]),
        *row("plain", "conv2d", target_modules=["conv", "point", "lin"], feedforward_modules=["point"]),
        *row("plain", "conv3d", target_modules=["conv", "point"], feedforward_modules=["point"]),
        *row("default_targets", "llama gpt2 opt neox t5 bert deberta", **DEFAULT_TARGETS),
        *row("none_feedforward", "mlp conv2d conv3d", feedforward_modules=[]),
        *row("all_feedforward", "mlp", feedforward_modules=r".*(lin0|fc\d)"),
        *row(
            "all_feedforward", "conv2d conv3d", target_modules=["conv", "point"], feedforward_modules=["conv", "point"]
        ),
        *row("grouped", "conv2d", target_modules=["grouped", "rect", "dilated"], feedforward_modules=["grouped"]),
        *row("grouped_out", "conv2d", target_modules=["grouped", "dilated"], feedforward_modules=["dilated"]),
        *row("random", "mlp gpt2", feedforward_modules=[], init_ia3_weights=False),
        *row("fan_in_fan_out", "conv1D", feedforward_modules=["c_proj"], fan_in_fan_out=True),
        *row("exclude", "llama", feedforward_modules=[], exclude_modules=["layers.0.self_attn.q_proj"]),
        *row("head", "mlp", feedforward_modules=["fc2"], modules_to_save=["head"]),
        *row("regex", "llama", target_modules=r".*\.1\..*_proj", feedforward_modules=r".*down_proj"),
        *row("classify", "bert-seq", feedforward_modules=[], task_type="SEQ_CLS"),
    ],
    "VERA": [
        *row("plain", "mlp conv1D llama gpt2 t5", r=5),
        *row("default_targets", "llama gpt2 bert", r=5, **DEFAULT_TARGETS),
        *row("key", "mlp llama", r=5, projection_prng_key=3),
        *row("unsaved", "mlp llama", r=5, save_projection=False),
        *row("dropout", "mlp conv1D", r=5, vera_dropout=0.3),
        *row("d_initial", "mlp", r=5, d_initial=0.37),
        *row("random", "mlp", r=5, init_weights=False),
        *row("bias_all", "mlp", r=5, bias="all"),
        *row("bias_vera_only", "bert", r=5, bias="vera_only"),
        *row("fan_in_fan_out", "gpt2", r=5, fan_in_fan_out=True),
        *LAYERS,
        *CHOICE,
    ],
    "LOHA": [
        *row("plain", "mlp conv1d conv2d llama t5 bert-qa", r=3, alpha=4),
        *row("default_targets", "llama opt", **DEFAULT_TARGETS),
        # PEFT takes the gradient of w1_a through the factors of w2_a, and the other way round
        *row("effective", "conv2d conv1d", "gradients", r=3, alpha=4, use_effective_conv2d=True),
        *row("grouped", "conv2d", r=3, alpha=4, target_modules=["grouped", "rect", "dilated"]),
        *row("grouped", "conv1d", r=3, alpha=4, target_modules=["grouped"]),
        *row(
            "grouped_effective",
            "conv2d",
            "gradients",
            r=3,
            alpha=4,
            target_modules=["grouped", "rect"],
            use_effective_conv2d=True,
        ),
        *row("rank_dropout", "mlp conv2d", r=3, alpha=4, rank_dropout=0.4),
        *row("module_dropout", "mlp", r=3, alpha=4, module_dropout=0.4),
        *row("random", "mlp conv2d", r=3, alpha=4, init_weights=False),
        *row(
            "random_effective",
            "conv2d conv1d",
            "gradients",
            r=3,
            alpha=4,
            init_weights=False,
            use_effective_conv2d=True,
        ),
        *row("patterns", "llama", r=3, alpha=4, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.0\..*v_proj": 7}),
        *LAYERS,
        *CHOICE,
        *EXCLUDE,
    ],
    "OFT": [
        *row("plain", "mlp llama t5", r=0, oft_block_size=4),
        *row("plain", "embedding", oft_block_size=3),
        *row("plain", "conv2d", oft_block_size=3, target_modules=["point", "lin"]),
        *row("default_targets", "llama opt", **DEFAULT_TARGETS),
        *row("by_r", "mlp llama", r=2, oft_block_size=0),
        *row("adjusted", "mlp", oft_block_size=7),
        *row("adjusted_r", "llama", r=5, oft_block_size=0),
        *row("exact", "mlp embedding", oft_block_size=4, use_cayley_neumann=False),
        *row("terms_2", "mlp", oft_block_size=4, num_cayley_neumann_terms=2),
        *row("terms_3", "mlp", oft_block_size=4, num_cayley_neumann_terms=3),
        *row("terms_4", "mlp", oft_block_size=4, num_cayley_neumann_terms=4),
        *row("terms_8", "mlp", oft_block_size=4, num_cayley_neumann_terms=8),
        *row("coft", "mlp", oft_block_size=4, coft=True, eps=0.07),
        *row("coft_exact", "embedding", oft_block_size=4, coft=True, eps=0.07, use_cayley_neumann=False),
        *row("block_share", "mlp embedding", oft_block_size=4, block_share=True),
        *row("block_share_coft", "mlp", oft_block_size=2, block_share=True, coft=True, eps=0.3),
        *row("dropout", "mlp", oft_block_size=4, module_dropout=0.3),
        *row("random", "mlp embedding", oft_block_size=4, init_weights=False),
        *row("bias_all", "mlp", oft_block_size=4, bias="all"),
        *row("bias_oft_only", "bert", oft_block_size=4, bias="oft_only"),
        # PEFT folds the rotated patches back by summing overlaps, which changes even a fresh adapter's output
        *row("kernel", "conv2d", "forward merge", oft_block_size=9, target_modules=["conv"]),
        *row("fan_in_fan_out", "mlp", oft_block_size=4, fan_in_fan_out=True),
        *LAYERS,
        *CHOICE,
        *EXCLUDE,
    ],
    "HRA": [
        *row("plain", "mlp conv2d llama t5", r=4),
        *row("default_targets", "llama opt", **DEFAULT_TARGETS),
        *row("odd", "mlp", r=3),
        *row("gram_schmidt", "mlp conv2d", r=4, apply_GS=True),
        *row("gram_schmidt_random", "mlp", r=3, apply_GS=True, init_weights=False),
        *row("random", "mlp conv2d", r=4, init_weights=False),
        *row("bias_all", "mlp conv2d", r=4, bias="all"),
        *row("bias_hra_only", "bert", r=4, bias="hra_only"),
        # PEFT ignores the dilation
        *row("dilated", "conv2d", "forward", r=4, target_modules=["dilated"]),
        *LAYERS,
        *CHOICE,
        *EXCLUDE,
    ],
    "HIRA": [
        *row("plain", "mlp embedding conv1d conv2d conv3d llama t5 bert", r=3),
        # else graft corrects it in the config, and PEFT only says so
        *row("plain", "conv1D gpt2", r=3, fan_in_fan_out=True),
        *row("default_targets", "llama opt bert", r=3, **DEFAULT_TARGETS),
        *row("default_targets", "gpt2", r=3, fan_in_fan_out=True, **DEFAULT_TARGETS),
        *row("dropout", "mlp conv1d conv2d embedding llama", r=3, hira_dropout=0.3),
        *row("random", "mlp conv2d embedding", r=3, init_weights=False),
        *row("none", "mlp conv1d", r=3, init_weights=None),
        *row("gaussian", "mlp embedding", r=3, init_weights="gaussian"),
        # PEFT takes the other initialisation there
        *row("gaussian", "conv2d", "init rng", r=3, init_weights="gaussian"),
        *row("dilated", "conv2d", r=3, target_modules=["dilated", "rect"]),
        # PEFT's update of the embedding lacks the factor of the embedding
        *row("embed", "gemma3", "forward merge", r=3, target_modules=["embed_tokens", "q_proj"]),
        *LAYERS,
        *CHOICE,
        *EXCLUDE,
    ],
    "MISS": [
        *row("plain", "mlp llama t5 bert-qa", r=4),
        *row("default_targets", "llama opt t5", r=4, **DEFAULT_TARGETS),
        *row("uneven", "mlp llama", r=7),
        *row("mini", "mlp llama", r=4, mini_r=3, target_modules=["fc2", "v_proj"], init_weights="mini"),
        *row("mini_1", "mlp", r=5, init_weights="mini"),
        *row("bat", "mlp llama t5", r=2, init_weights="bat"),
        *row("dropout", "mlp llama", r=2, miss_dropout=0.3),
        *row("random", "mlp llama", r=4, init_weights=False),
        *row("bias_all", "mlp", r=4, bias="all"),
        *row("bias_miss_only", "bert", r=4, bias="MiSS_only"),
        *sized([*LAYERS, *CHOICE, *EXCLUDE], r=4),
    ],
    "VBLORA": [
        *row("plain", "mlp conv1D", r=3, num_vectors=9, vector_length=2),
        *row("plain", "llama gpt2 t5 bert", r=2, num_vectors=7, vector_length=12, topk=3),
        *row("default_targets", "llama opt gpt2 bert", num_vectors=7, vector_length=12, **DEFAULT_TARGETS),
        *row("topk_saved", "mlp", num_vectors=9, vector_length=2, save_only_topk_weights=True),
        *row("topk_saved", "llama", num_vectors=300, vector_length=6, topk=3, save_only_topk_weights=True),
        *row("dropout", "mlp conv1D", r=3, num_vectors=9, vector_length=2, vblora_dropout=0.3),
        *row("wide", "mlp", num_vectors=9, vector_length=2, init_vector_bank_bound=0.7, init_logits_std=1.3),
        *row("bias_all", "mlp", num_vectors=9, vector_length=2, bias="all"),
        *row("bias_vblora_only", "bert", num_vectors=9, vector_length=4, bias="vblora_only"),
        *row("fan_in_fan_out", "gpt2", num_vectors=9, vector_length=12, fan_in_fan_out=True),
        *sized([*LAYERS, *CHOICE, *EXCLUDE], num_vectors=9, vector_length=1),
    ],
    "ROAD": [
        *row("plain", "mlp llama t5 bert", group_size=4),
        *row("default_targets", "llama opt", **DEFAULT_TARGETS, group_size=12),
        *row("road_2", "mlp", group_size=12, variant="road_2", target_modules=["lin0", "fc2"]),
        *row("road_2", "llama bert-qa", group_size=6, variant="road_2"),
        *row("road_4", "mlp llama", group_size=4, variant="road_4"),
        *row("pairs", "mlp", group_size=2, variant="road_4"),
        *row("random", "mlp llama", group_size=4, init_weights=False),
        *row("random_4", "mlp", group_size=4, init_weights=False, variant="road_4"),
        *row("regex", "llama", group_size=6, target_modules=r".*\.1\..*(k_proj|gate_proj)"),
        *row("all-linear", "llama", group_size=12, target_modules="all-linear"),
        *row("head", "mlp", group_size=4, modules_to_save=["head"]),
        *row("classify", "bert-seq", group_size=4, task_type="SEQ_CLS"),
        *row("inference", "mlp", group_size=4, inference_mode=True),
    ],
    "LN_TUNING": [
        *row("plain", "mlp", target_modules=["norm"]),
        *row("plain", "llama", target_modules=["input_layernorm", "norm"]),
        # PEFT leaves the wrappers of modules_to_save in the merged model
        *row("classify", "bert-seq", "merge", target_modules=["LayerNorm"], task_type="SEQ_CLS"),
        *row("default_targets", "llama gpt2 t5", **DEFAULT_TARGETS),
        *row("regex", "llama", target_modules=r".*\.1\..*norm"),
        *row(
            "exclude", "llama", target_modules=["input_layernorm", "norm"], exclude_modules=["layers.0.input_layernorm"]
        ),
        *row("linear", "mlp conv1D embedding conv2d"),
        *row("head", "mlp", "merge", target_modules=["norm"], modules_to_save=["head"]),
    ],
    "TRAINABLE_TOKENS": [
        *row("rows", "embedding", token_indices=[3, 1, 7]),
        *row("rows", "llama", token_indices=[3, 1, 7], target_modules=["embed_tokens"]),
    ],
}
ELSEWHERE = {  # compared with PEFT in tests of their own: one adapter trains at a time, targets are attentions
    "ADALORA": "methods/test_adalora.py",
    "ADAPTION_PROMPT": "methods/test_adaption_prompt.py",
}

SAMPLES = [
    Sample(method, name, model, config, unlike)
    for method, rows in METHODS.items()
    for name, model, config, unlike in rows
]


def each(name: str = "plain", models: str = "mlp llama") -> list[Sample]:
    """The samples of that name on those models, every method: for what needs no variety of configurations."""
    return [s for s in SAMPLES if s.name in name.split() and s.model in models.split()]


def first(method: str, model: str = "mlp", name: str = "plain") -> Sample:
    return next(s for s in SAMPLES if (s.method, s.name, s.model) == (method, name, model))


def alike(aspect: str) -> list[Sample]:
    """The samples in which PEFT is the oracle for that aspect."""
    return [s for s in SAMPLES if aspect not in s.unlike]
