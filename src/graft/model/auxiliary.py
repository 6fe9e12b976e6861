# SPDX-License-Identifier: Apache-2.0
"""Losses that adapters add to the model's: of what their layers noted in a run, such as the balance of routers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from torch import Tensor, nn

from graft.core.call import AuxiliaryValue
from graft.core.method import Method, NotedTokens
from graft.core.rows import Run


def compute_losses(
    noted: Mapping[str, Sequence[AuxiliaryValue]],
    methods: Mapping[str, type[Method]],
    configs: Mapping[str, object],
    run: Run,
    model: nn.Module,
) -> dict[str, Tensor]:
    """Return the losses of a run, (), by adapter. Of a Parallel each counts as its adapter's copies of the batch do."""
    return {
        name: methods[name].compute_auxiliary_loss(configs[name], [make_tokens(one, run, model) for one in values])
        * run.share(name, model)
        for name, values in noted.items()
    }


def add_to_loss(output: Any, more: Any) -> object:
    """Return an output with more in its loss: `loss`, the first number of a tuple, or itself; None if it has none."""
    if is_loss(output):
        return output + more.to(output.device)
    if type(output) is tuple:
        has_loss = bool(output) and is_loss(output[0])
        return (output[0] + more.to(output[0].device), *output[1:]) if has_loss else None
    loss = output.get("loss") if type(output) is dict else getattr(output, "loss", None)
    if not is_loss(loss):
        return None
    loss = loss + more.to(loss.device)
    if type(output) is dict:
        return output | {"loss": loss}
    output.loss = loss
    return output


def is_loss(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and not value.dim() and value.requires_grad


def make_tokens(noted: AuxiliaryValue, run: Run, model: nn.Module) -> NotedTokens:
    """Return the tokens of a value (rows, tokens, …), and which of them are no padding, as the call's mask says."""
    value, real = noted.value, padding_mask(noted.layer, run, model)
    if real is not None and noted.rows is not None:
        real = real.to(noted.rows.device)[noted.rows]
    if real is not None and value.shape[: value.dim() - 1] in (real.shape, (real.numel(),)):
        return NotedTokens(noted.layer, value.flatten(0, -2), real.to(value.device, value.dtype).flatten())
    return NotedTokens(noted.layer, value.flatten(0, -2), None)


def padding_mask(layer: str, run: Run, model: nn.Module) -> Tensor | None:
    """Return the mask of padding of the tokens that a layer sees, (rows, tokens); None if the call has none."""
    of_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder." in layer
    mask = run.find_argument("decoder_attention_mask" if of_decoder else "attention_mask", model)
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
