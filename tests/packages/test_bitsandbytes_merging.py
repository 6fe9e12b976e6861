# SPDX-License-Identifier: Apache-2.0
"""Merging into checkpoints whose weights bitsandbytes has quantized, and reads."""

from tests.files.test_merging_quantized import plain, test_bitsandbytes

__all__ = ["plain", "test_bitsandbytes"]
