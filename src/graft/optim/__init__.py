# SPDX-License-Identifier: Apache-2.0
"""Optimizers that treat LoRA's A and B in different ways."""

from graft.optim.lorafa import LoraFAOptimizer, create_lorafa_optimizer
from graft.optim.loraplus import create_loraplus_optimizer
from graft.optim.riemannian import create_riemannian_optimizer

__all__ = [
    "LoraFAOptimizer",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
]
