# SPDX-License-Identifier: Apache-2.0
"""What becomes of the labels of a call that has a prompt in front of its input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from graft.core.method import as_it_is
from graft.prompts.base import IGNORED_LABEL, Prompt, shift_tokens_right
from graft.prompts.stack import Stack

PADDED = ("CAUSAL_LM", "TOKEN_CLS")  # tasks with a label per token; the prompt's tokens have none


def put(
    model: Any,
    main: Stack,
    cfg: Any,
    prompt: Prompt,
    both: bool,
    kwargs: dict[str, Any],
    arguments: dict[str, Any],
) -> Callable[[Any], Any]:
    """Give the tokens of a prompt of embeddings labels in `kwargs`; return a function for the output of the call.

    Args:
        main: the stack that the prompt enters; the encoder's, if there are two.
        both: it enters the decoder's as well, and the labels are the decoder's.
        arguments: of the call that are the prompt's own.
    """
    labels, P = kwargs["labels"], cfg.num_virtual_tokens
    if prompt.has_own_loss:
        del kwargs["labels"]
        return lambda output: with_loss(output, partial(prompt.own_loss, labels=labels, **arguments))
    if both or cfg.task_type in PADDED:
        if both:
            put_decoder_inputs(model, labels, kwargs)
        kwargs["labels"] = nn.functional.pad(labels, (P, 0), value=IGNORED_LABEL)
        mask = kwargs.get("attention_mask")
        if cfg.task_type == "TOKEN_CLS" and isinstance(mask, Tensor) and mask.shape == labels.shape:
            # some losses leave out masked tokens
            kwargs["attention_mask"] = nn.functional.pad(mask, (P, 0), value=1)
            main.now.covered = True
    return as_it_is


def put_decoder_inputs(model: Any, labels: Tensor, kwargs: dict[str, Any]) -> None:
    """Make decoder inputs from the labels as the model would, before the prompt's labels join them."""
    if kwargs.get("decoder_input_ids") is None and kwargs.get("decoder_inputs_embeds") is None:
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            ids = model.prepare_decoder_input_ids_from_labels(labels=labels)
        else:  # M2M100, Blenderbot and others do it in their forward only
            ids = shift_tokens_right(labels, model.config.pad_token_id, model.config.decoder_start_token_id)
        kwargs["decoder_input_ids"] = ids


def with_loss(output: Any, loss: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, tuple):
        return loss(output[0]), *output
    return type(output)(**{"loss": loss(output.logits), **{k: v for k, v in output.items() if k != "loss"}})
