# SPDX-License-Identifier: Apache-2.0
"""Samples of BEFT. On layers without a bias there is nothing to merge into: see methods/test_beft.py."""

from tests.samples.laws import Sample
from tests.samples.parity import DEFAULT_TARGETS, row

TARGETS = ["lin0", "fc1"]

LAWS = [Sample("BEFT", "bias")]
UNMERGEABLE = [("BEFT", "no-bias", NotImplementedError, "Base layer has no bias")]
PARITY = [
    *row("plain", "mlp", target_modules=TARGETS),
    *row("plain", "bert opt"),
    *row("default_targets", "opt bert deberta", **DEFAULT_TARGETS),
    *row("random", "mlp", target_modules=TARGETS, init_weights=False),
    *row("regex", "mlp", target_modules=r"lin0|.*\.1\.fc1"),
    *row("head", "mlp", target_modules=TARGETS, modules_to_save=["head"]),
    *row("classify", "bert-seq", task_type="SEQ_CLS"),
    *row("inference", "mlp", target_modules=TARGETS, inference_mode=True),
]
