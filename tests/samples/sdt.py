# SPDX-License-Identifier: Apache-2.0
"""Samples of SDT away from state spaces; those of a Mamba are in methods/test_sdt.py."""

from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample

LAWS = [Sample("SDT", config=dict(r=3, lora_alpha=5), subtracts=True)]
REFUSED = [("SDT", "grouped", UnsupportedLayerError, "no factors for a convolution with groups")]
