# SPDX-License-Identifier: Apache-2.0
"""Merging into checkpoints whose weights compressed-tensors has quantized, and reads."""

from tests.files.test_merging_quantized import plain, test_compressed_tensors

__all__ = ["plain", "test_compressed_tensors"]
