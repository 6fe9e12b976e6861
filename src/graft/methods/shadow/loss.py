# SPDX-License-Identifier: Apache-2.0
"""The loss of the shadow network by itself, which keeps its output meaningful."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def shadow_loss(tuner: Any, cfg: Any, name: str, s: Tensor, given: dict[str, Any]) -> Tensor | None:
    """Return the loss of what the model's head makes of s, (rows, tokens, hidden); None for tasks without one."""
    labels, model = given["labels"], tuner.model
    if cfg.task_type == "SEQ_CLS":
        head = tuner.shared.containers["shadow_head"][name]
        logits = pooled(head(s.to(dtype_of(head))), given.get("input_ids"), model.config.pad_token_id)
        return classification(model.config, logits, labels)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return None if head is None else next_token(head(s.to(dtype_of(head))), labels)


def dtype_of(head: Any) -> torch.dtype:
    dtype: torch.dtype = next(head.parameters()).dtype
    return dtype


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of each token's logits (rows, tokens, vocabulary) with the next label; -100 has none."""
    wanted = F.pad(labels, (0, 1), value=-100)[:, 1:].to(logits.device)
    return F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=-100)


def pooled(logits: Tensor, ids: Tensor | None, padding: int | None) -> Tensor:
    """Return the logits (rows, labels) at each row's last token that is no padding."""
    rows, tokens = logits.shape[:2]
    last = torch.full((rows,), tokens - 1, device=logits.device)
    if ids is not None and padding is not None:
        places = torch.arange(tokens, device=logits.device)
        last = (places * (ids != padding).to(logits.device)).argmax(-1)
    return logits[torch.arange(rows, device=logits.device), last]


def classification(config: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of logits (rows, labels) by the config's problem type, or what the labels say of it."""
    logits, labels, kind = logits.float(), labels.to(logits.device), config.problem_type
    if kind is None:
        kind = "regression" if logits.shape[-1] == 1 else ""
    if kind == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze().float())
    if kind == "multi_label_classification" or labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    return F.cross_entropy(logits, labels.view(-1))
