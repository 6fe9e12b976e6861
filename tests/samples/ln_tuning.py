# SPDX-License-Identifier: Apache-2.0
"""Samples of LN tuning."""

from tests.samples.laws import Sample
from tests.samples.parity import DEFAULT_TARGETS, row

LAWS = [Sample("LN_TUNING", together=False)]
PARITY = [
    *row("plain", "mlp", target_modules=["norm"]),
    *row("plain", "llama", target_modules=["input_layernorm", "norm"]),
    # PEFT leaves the wrappers of modules_to_save in the merged model
    *row("classify", "bert-seq", "merge", target_modules=["LayerNorm"], task_type="SEQ_CLS"),
    *row("default_targets", "llama gpt2 t5", **DEFAULT_TARGETS),
    *row("regex", "llama", target_modules=r".*\.1\..*norm"),
    *row("exclude", "llama", target_modules=["input_layernorm", "norm"], exclude_modules=["layers.0.input_layernorm"]),
    *row("linear", "mlp conv1D embedding conv2d"),
    *row("head", "mlp", "merge", target_modules=["norm"], modules_to_save=["head"]),
]
