# SPDX-License-Identifier: Apache-2.0
"""Losses that adapters add to the model's, from values that their layers noted in a run, such as the balance of
routers.

Layers note values (`call.note`) while a run with gradients collects them. At the end of the run
`Method.compute_auxiliary_loss` makes one loss for each adapter, without padded tokens. Layers that a backward pass runs
again note nothing, and no part of the loss is computed within a checkpointed block. If the call passes
`num_items_in_batch`, the tokens of an optimizer step, its loss counts with the call's share of these.
"""

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
    """Return the losses of a run, scalars, by adapter.

    Each is multiplied by the run's share: of the copies of a Parallel that use the adapter, and of the step's tokens.
    """
    return {
        name: methods[name].compute_auxiliary_loss(configs[name], [make_tokens(one, run, model) for one in values])
        * run.share(name, model)
        for name, values in noted.items()
    }


def add_to_loss(output: Any, more: Any) -> object:
    """Return the model's output with `more`, moved to the loss's device, added to its loss; None if the output has no
    loss with a gradient.

    The loss is the output itself, the first item of a tuple, or `loss` of a dict or an object. Plain tuples and dicts
    are copied; the attribute of an object (and of subclasses of the two) is overwritten and the object returned.
    """
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
    """Return True for a tensor without dimensions that requires gradients."""
    return isinstance(value, Tensor) and not value.dim() and value.requires_grad


def make_tokens(noted: AuxiliaryValue, run: Run, model: nn.Module) -> NotedTokens:
    """Return a noted value, (rows, tokens, …), flattened to (tokens, width), with 1 for real tokens and 0 for padding.

    The call's mask of padding is cut to the value's rows, and has the value's dtype and device. It is None if the call
    has none, or one of another shape; a value that is flat already may fit, too.
    """
    value, real = noted.value, padding_mask(noted.layer, run, model)
    if real is not None and noted.rows is not None:
        real = real.to(noted.rows.device)[noted.rows]
    if real is not None and value.shape[: value.dim() - 1] in (real.shape, (real.numel(),)):
        return NotedTokens(noted.layer, value.flatten(0, -2), real.to(value.device, value.dtype).flatten())
    return NotedTokens(noted.layer, value.flatten(0, -2), None)


def padding_mask(layer: str, run: Run, model: nn.Module) -> Tensor | None:
    """Return the call's attention mask for a layer, (rows, tokens), bool; None if the call has none of two dimensions.

    Layers with "decoder." in their path, in a model with `is_encoder_decoder`, get `decoder_attention_mask`. A mask of
    numbers is True where it is not 0.
    """
    of_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder." in layer
    mask = run.find_argument("decoder_attention_mask" if of_decoder else "attention_mask", model)
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
