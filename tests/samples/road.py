# SPDX-License-Identifier: Apache-2.0
"""Samples of RoAd."""

from graft.core.errors import ConfigError
from tests.samples.laws import Sample
from tests.samples.parity import DEFAULT_TARGETS, row

LAWS = [
    Sample("ROAD", config=dict(group_size=2)),
    Sample("ROAD", "road_2", dict(group_size=2, variant="road_2")),
    Sample("ROAD", "road_4", dict(group_size=6, variant="road_4")),
]
REFUSED = [
    ("ROAD", "odd-out", ConfigError, "must be divisible by group_size"),
    ("ROAD-road_4", "uneven", ConfigError, "must be divisible by group_size"),
]
UNMERGEABLE = [("ROAD", "torn", NotImplementedError, "in two groups")]  # of the convolution
PARITY = [
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
]
