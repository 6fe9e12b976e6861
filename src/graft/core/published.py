# SPDX-License-Identifier: Apache-2.0
"""What a method's source says of training it."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """The learning rates with which a method's authors trained it.

    Attributes:
        low, high: the least and the largest; equal where the source has one.
        source: paper (arXiv id) or code, where in it, and the optimizer unless it is Adam or AdamW.
    """

    low: float
    high: float
    source: str


COMPARISON = "PEFT's method comparison, on MetaMathQA with Llama 3.2 3B"
