# SPDX-License-Identifier: Apache-2.0
"""A plugin for vLLM 0.32, whose kernels for LoRA on experts are for GPUs: the same on a CPU, in plain torch, slowly.

Everything else is vLLM's: its loaders, what they put into the buffers of a slot, which token uses which, its router. It
finds this folder, with experts_on_cpu-0.dist-info, on PYTHONPATH.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def register() -> None:
    """Have vLLM use `apply` (its plugins' entry point)."""
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    TritonExperts.apply = apply


def apply(
    self: Any, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    *others: Any, **options: Any,
) -> None:  # fmt: skip
    """Compute gated experts with SiLU, gate above up, and their adapters: in place of kernels."""
    context = self._lora_context
    slots = context.punica_wrapper.token_lora_indices.tolist()
    slots += [-1] * (len(hidden_states) - len(slots))  # padding

    def matrix(W: Tensor, part: str, slot: int, expert: int) -> Tensor:
        if slot < 0 or not context.adapter_enabled[slot]:
            return W[expert]
        A, B = (getattr(context, f"{part}_lora_{side}_stacked") for side in "ab")
        return W[expert] + torch.cat([b[slot, expert] @ a[slot, expert] for a, b in zip(A, B)])

    output.zero_()
    for n, x in enumerate(hidden_states):
        for weight, expert in zip(topk_weights[n], topk_ids[n].tolist()):
            gate, up = (matrix(w1, "w13", slots[n], expert) @ x).chunk(2)
            output[n] += weight.to(x.dtype) * (matrix(w2, "w2", slots[n], expert) @ (F.silu(gate) * up))
