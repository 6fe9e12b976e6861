# SPDX-License-Identifier: Apache-2.0
"""Samples of IA3."""

from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample
from tests.samples.parity import DEFAULT_TARGETS, row

LAWS = [
    Sample("IA3", config=dict(feedforward_modules=[])),
    Sample("IA3", "feedforward", dict(feedforward_modules=["layer"])),
]
REFUSED = [("IA3-feedforward", "embedding", UnsupportedLayerError, "embedding's input cannot be scaled")]
PARITY = [
    *row("plain", "llama", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    *row("plain", "mlp", target_modules=["lin0", "fc1", "fc2"], feedforward_modules=["fc2"]),
    *row("plain", "conv1D", feedforward_modules=["c_proj"]),
    *row("plain", "conv2d", target_modules=["conv", "point", "lin"], feedforward_modules=["point"]),
    *row("plain", "conv3d", target_modules=["conv", "point"], feedforward_modules=["point"]),
    *row("default_targets", "llama gpt2 opt neox t5 bert deberta", **DEFAULT_TARGETS),
    *row("none_feedforward", "mlp conv2d conv3d", feedforward_modules=[]),
    *row("all_feedforward", "mlp", feedforward_modules=r".*(lin0|fc\d)"),
    *row("all_feedforward", "conv2d conv3d", target_modules=["conv", "point"], feedforward_modules=["conv", "point"]),
    *row("grouped", "conv2d", target_modules=["grouped", "rect", "dilated"], feedforward_modules=["grouped"]),
    *row("grouped_out", "conv2d", target_modules=["grouped", "dilated"], feedforward_modules=["dilated"]),
    *row("random", "mlp gpt2", feedforward_modules=[], init_ia3_weights=False),
    *row("fan_in_fan_out", "conv1D", feedforward_modules=["c_proj"], fan_in_fan_out=True),
    *row("exclude", "llama", feedforward_modules=[], exclude_modules=["layers.0.self_attn.q_proj"]),
    *row("head", "mlp", feedforward_modules=["fc2"], modules_to_save=["head"]),
    *row("regex", "llama", target_modules=r".*\.1\..*_proj", feedforward_modules=r".*down_proj"),
    *row("classify", "bert-seq", feedforward_modules=[], task_type="SEQ_CLS"),
]
