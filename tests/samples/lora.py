# SPDX-License-Identifier: Apache-2.0
"""Samples of LoRA."""

from dataclasses import replace

import graft
from graft.core.errors import ConfigError, UnsupportedLayerError
from tests.samples.laws import Sample, kinds
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, EXCLUDE, LAYERS, TARGETS, row

_lora = dict(r=3, lora_alpha=5)
_lin = ["lin0", "fc1"]  # layers of "mlp" that have a bias
_velora = dict(num_groups=4, scale=0.7, init_type="random")  # what a batch gives depends on its rows
_monte = dict(num_samples=3, sample_scaler=0.2, kl_loss_weight=0.3, use_entropy=True, buffer_size=1)


def _blocks(side, nblocks=2, patterns=("layer", "0", "2")):
    return {f"target_modules_bd_{side}": list(patterns), "nblocks": nblocks}


def _corda(base, cfg, x):
    graft.preprocess_corda(base, cfg, lambda: base(x))


def _loraga(base, cfg, x):
    graft.preprocess_loraga(base, cfg, lambda: base(x).square().sum().backward())


def _eva(base, cfg, x):
    run = dict(forward_fn=lambda model, inputs: model(**inputs), prepare_model_inputs_fn=None)
    return lambda model: graft.initialize_lora_eva_weights(
        model, [{"x": x}], prepare_layer_inputs_fn=None, show_progress_bar=False, **run
    )


def _invoked(x):
    """From the last position on, or from three before the end."""
    return {"alora_offsets": (1 + 2 * kinds(x)).tolist()}


def _start(how, prepare=None, **more):
    """An initialisation that takes its part out of the base; a second adapter would take it out of the rest."""
    config = dict(r=3, lora_alpha=5, init_lora_weights=how, **more)
    flags = dict(subtracts=True, shifts=True, prepare=prepare)
    return Sample("LORA", how, config, dict(init_lora_weights=True), **flags)


LAWS = [
    Sample("LORA", config=dict(r=4, lora_alpha=6), subtracts=True),
    Sample("LORA", "bias", dict(r=4, lora_alpha=6, lora_bias=True), subtracts=True),
    Sample("LORA", "dora", dict(r=4, lora_alpha=6, use_dora=True)),
    Sample("LORA", "kasa", dict(r=4, lora_alpha=6, kasa_config={}), subtracts=True, identity=False, rewrites=True),
    Sample("LORA", "bdlora-a", dict(r=4, lora_alpha=6, use_bdlora=_blocks("a")), subtracts=True),
    Sample("LORA", "bdlora-b", dict(r=4, lora_alpha=6, use_bdlora=_blocks("b")), subtracts=True),
    Sample("LORA", "velora", dict(r=4, lora_alpha=6, velora_config=_velora), subtracts=True),
    Sample("LORA", "monteclora", dict(r=4, lora_alpha=6, monteclora_config=_monte), subtracts=True, draws=True),
    Sample("LORA", "dylora", dict(r=4, lora_alpha=6, use_dylora=True), subtracts=True, draws=True),
    Sample("LORA", "mica", dict(r=4, lora_alpha=6, init_lora_weights="mica"), subtracts=True),
    Sample("LORA", "qalora", dict(r=4, lora_alpha=6, use_qalora=True, qalora_group_size=5), subtracts=True),
    _start("pissa"),
    _start("olora"),
    _start("corda", _corda, corda_config={}),
    # the less it takes out, the less comes back rounded
    _start("lora_ga", _loraga, lora_ga_config=dict(stable_gamma=100)),
    replace(_start("loftq", loftq_config=dict(loftq_bits=4)), identity=False),
    replace(_start("eva", _eva, eva_config=dict(rho=1.0)), shifts=False),
]
CALLED = [Sample("LORA", "alora", dict(r=4, lora_alpha=6, alora_invocation_tokens=[3]), needs=_invoked)]
STARTS = " ".join(f"LORA-{how}" for how in ("pissa", "olora", "corda", "lora_ga", "loftq", "eva"))
REFUSED = [
    (STARTS, "grouped", ConfigError, "support is limited to conv layers where the rank is divisible"),
    *((STARTS, trait, ConfigError, "has no meaning") for trait in ("conv", "embedding")),
    *((f"LORA-{name}", trait, error, "adapts linear layers only") for trait in ("conv", "embedding")
      for name, error in (("bdlora-a", UnsupportedLayerError), ("bdlora-b", UnsupportedLayerError),
                          ("velora", UnsupportedLayerError), ("qalora", ConfigError))),
    *(("LORA-alora", trait, UnsupportedLayerError, "linear layers only") for trait in ("conv", "embedding")),
    ("LORA-mica", "grouped", UnsupportedLayerError, "a convolution with groups > 1 has one for each"),
    ("LORA-dylora", "grouped", UnsupportedLayerError, "this weight is several"),
    ("LORA-monteclora", "grouped", UnsupportedLayerError, "A mixes its groups"),
    ("LORA-bias", "embedding", ConfigError, "lora_bias=True is not supported for Embedding"),
    ("LORA-dora", "grouped", UnsupportedLayerError, "a convolution with groups > 1 has no ΔW"),
    *(("LORA-kasa", trait, UnsupportedLayerError, "adapts linear layers only") for trait in ("conv", "embedding")),
]  # fmt: skip
UNMERGEABLE = [
    ("LORA-alora", "", NotImplementedError, "aLoRA does not support merging"),
    ("LORA", "grouped", NotImplementedError, "groups > 1"),  # A sees all groups, a grouped weight cannot
    ("LORA-bias", "no-bias", RuntimeError, "the base layer has no bias"),
]
PARITY = [
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
    *row("patterns", "llama", **_lora, rank_pattern={r"layers\.1\.self_attn\.q_proj": 5, "down_proj": 2},
         alpha_pattern={"^model.layers.0.self_attn.v_proj": 11, "q_proj": 7}),
    *row("patterns", "conv2d", **_lora, rank_pattern={"point": 4}, alpha_pattern={"conv": 7}),
    *row("patterns", "embedding", **_lora, rank_pattern={"emb": 5}, alpha_pattern={"emb": 3.3}),
    *row("bias_all", "mlp opt conv2d t5", **_lora, bias="all"),
    *row("bias_lora_only", "mlp bert gpt2", **_lora, bias="lora_only"),
    *row("lora_bias", "mlp", **_lora, target_modules=_lin, lora_bias=True),
    *row("lora_bias", "conv1D conv2d conv1d", **_lora, lora_bias=True),
    *row("init_false", "mlp conv1D embedding conv1d conv2d conv3d", **_lora, init_lora_weights=False),
    *row("gaussian", "mlp conv1D conv2d conv3d", **_lora, init_lora_weights="gaussian"),
    *row("orthogonal", "mlp conv1D", r=4, lora_alpha=5, init_lora_weights="orthogonal"),
    *row("dora", "mlp conv1D embedding conv1d conv2d conv3d llama gpt2 t5 bert", **_lora, use_dora=True),
    *row("dora_dropout", "mlp conv1D", **_lora, use_dora=True, lora_dropout=0.3),
    *row("dora_pissa", "mlp", **_lora, use_dora=True, init_lora_weights="pissa"),
    *row("kasa", "mlp llama t5 bert", **_lora, kasa_config={}),
    *row("kasa_dropout", "mlp", **_lora, lora_dropout=0.3, kasa_config=dict(beta=0.3, gamma=0.01)),
    *row("kasa_patterns", "llama", **_lora, kasa_config={}, rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 7}),
    *row("kasa_rslora", "mlp", **_lora, kasa_config={}, use_rslora=True, init_lora_weights="gaussian"),
    *row("kasa_lora_bias", "mlp", **_lora, kasa_config={}, target_modules=_lin, lora_bias=True),
    *row("kasa_pissa", "mlp", **_lora, kasa_config={}, init_lora_weights="pissa"),
    *row("kasa_random", "mlp", **_lora, kasa_config={}, init_lora_weights=False, modules_to_save=["head"]),
    # the tokens are in two rows of three
    *row("alora", "llama gpt2", **_lora, task_type="CAUSAL_LM", alora_invocation_tokens=[11, 10]),
    *row("bdlora", "mlp llama", **_lora, use_bdlora=_blocks("a", 1, ("lin", "fc", "proj"))),
    *row("bdlora_a", "mlp", r=4, lora_alpha=5, use_bdlora=_blocks("a", 2, ("lin", "fc"))),
    *row("bdlora_b", "mlp", r=4, lora_alpha=5, lora_dropout=0.3, use_bdlora=_blocks("b", 2, ("lin", "fc"))),
    *row("bdlora_loose", "llama", **_lora, use_bdlora=_blocks("b", 3, ("down",)) | {"match_strict": False}),
    *row("bdlora_false", "mlp", **_lora, init_lora_weights=False, use_bdlora=_blocks("a", 1, ("lin", "fc"))),
    *row("velora", "mlp conv1D llama", **_lora, velora_config=dict(num_groups=5, scale=0.8)),
    *row("velora_random", "mlp", **_lora, velora_config=dict(num_groups=3, init_type="random")),
    *row("velora_once", "mlp", **_lora, velora_config=dict(num_groups=40, init_type="batch_average_once")),
    *row("velora_dropout", "mlp", **_lora, lora_dropout=0.3, velora_config={}),
    *row("velora_pissa", "mlp", **_lora, init_lora_weights="pissa", velora_config={}),
    *row("velora_bias", "mlp", **_lora, target_modules=_lin, lora_bias=True, velora_config={}),
    # PEFT draws ahead while it builds a layer, from other numbers in training: methods/test_monteclora.py
    *row("monteclora", "mlp conv1D", "gradients init rng", **_lora, monteclora_config=dict(buffer_size=1)),
    *row("mica", "mlp conv1D embedding llama", **_lora, init_lora_weights="mica"),
    *row("mica_patterns", "llama", **_lora, init_lora_weights="mica", rank_pattern={"q_proj": 5}, use_rslora=True),
    *row("pissa", "mlp conv1D llama", **_lora, init_lora_weights="pissa"),
    # PEFT draws it anew on loading, and so takes something else out of the base
    *row("pissa_niter", "mlp conv1D", "reload", **_lora, init_lora_weights="pissa_niter_4"),
    *row("pissa_rslora", "mlp", **_lora, init_lora_weights="pissa", use_rslora=True),
    *row("olora", "mlp llama", **_lora, init_lora_weights="olora"),
    *row("eva", "mlp conv1D", **_lora, init_lora_weights="eva", eva_config=dict(rho=1.5)),
    *row("fan_in_fan_out", "gpt2 conv1D", **_lora, fan_in_fan_out=True),
    *row("grouped", "conv1d conv2d", r=4, lora_alpha=5, target_modules=["grouped"]),
    # PEFT takes a 1x1x1 kernel for a 1x1 kernel and cannot merge it
    *row("point", "conv3d", "merge", **_lora, target_modules=["point"]),
    *row("rect", "conv2d", **_lora, target_modules=["rect", "point"]),
    *row("tokens", "llama gpt2 opt", **_lora, trainable_token_indices=[3, 5, 8]),
    *row("tokens_by_name", "llama", **_lora, trainable_token_indices={"embed_tokens": [2, 9]}),
    *row("tokens_two", "embedding", **_lora, target_modules=["lin"],
         trainable_token_indices={"emb": [4], "pos": [1, 2]}),
    *row("embed", "llama gemma3", **_lora, target_modules=["embed_tokens", "q_proj"]),
    *row("lm_head", "llama", **_lora, target_modules=["lm_head"]),
    *row("head_mixed", "mlp", **_lora, target_modules=["fc1", "head"], modules_to_save=["lin0", "norm"]),
    # PEFT builds a linear layer for the tied head and throws it away
    *row("tied_save", "opt", "rng", **_lora, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    # PEFT initialises the shared factors a second time through the head, and merges them twice
    *row("tied_target", "opt", "init rng merge", **_lora, target_modules=["embed_tokens", "q_proj"],
         ensure_weight_tying=True),
    *row("replicated", "llama", "merge", **_lora, layer_replication=[(0, 2), (0, 1), (1, 2)]),
    *LAYERS,
    *CHOICE,
    *EXCLUDE,
]  # fmt: skip
