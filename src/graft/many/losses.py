# SPDX-License-Identifier: Apache-2.0
"""The loss of one adapter's rows: the model's, as its forward would compute it for these rows alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from graft import ConfigError, ModulesToSaveWrapper
from graft.config.base import TASK_HEADS

Loss = Callable[..., Tensor]  # of (the output of a run's rows, its batch): their mean, ()
Outputs = Mapping[str, Tensor]
SPANS = ("start_positions", "end_positions")
HEADS = {head for heads in TASK_HEADS.values() for head in heads}


def find_model_loss(
    model: nn.Module, wrappers: Mapping[str, ModulesToSaveWrapper], name: str, needed: bool
) -> Loss | None:
    """Return the function (output, batch, **items) → loss that a transformers model has for its task.

    It raises ConfigError for a batch without labels, or without start and end positions for spans.

    An encoder-decoder with the function `prepare_decoder_input_ids_from_labels` has the decoder's loss. Others have the
    entry of LOSSES for their `loss_type`; a class with "LMHead" in its name and a falsy type counts as "ForCausalLM".

    Args:
        wrappers: modules that the run's adapter trains whole; its head may have another number of labels than the
            model.
        name: of the run and adapter.
        needed: False: return None in place of the error.

    Raises:
        ConfigError: the model has no `loss_function` (an encoder-decoder needs none), or a loss that needs more than
            its output.
    """
    kind = getattr(model, "loss_type", None) or ("ForCausalLM" if "LMHead" in type(model).__name__ else None)
    loss = LOSSES.get(str(kind)) if hasattr(model, "loss_function") else None
    if hasattr(model, "prepare_decoder_input_ids_from_labels") and model.config.is_encoder_decoder:
        loss = compute_decoder_loss
    if loss is None and not needed:
        return None
    if loss is None:
        raise ConfigError(
            f"Run '{name}': {type(model).__name__} has no loss that graft can compute for some rows only. Give add() a "
            "loss(output, batch), which returns the mean over the run's rows."
        )
    labels, keys = count_head_labels(wrappers, name), SPANS if loss is compute_span_loss else ("labels",)

    def compute_loss(output: Outputs, batch: Outputs, **items: object) -> Tensor:
        """Return the loss of a batch.

        Raise ConfigError if the batch lacks `labels`, or the start and end positions of spans.
        """
        if missing := [key for key in keys if key not in batch]:
            raise ConfigError(
                f"Run '{name}': a batch has no {' and no '.join(missing)}, which the model's loss needs. Add them "
                "to the data, or give add() a loss(output, batch)."
            )
        return loss(model, labels, output, batch, **items)

    return compute_loss


def count_head_labels(wrappers: Mapping[str, ModulesToSaveWrapper], adapter: str) -> int | None:
    """Return the number of outputs of an adapter's head: rows of the last matrix in the first wrapped module that has
    matrices and a head's name in its path. None if it wraps no head.
    """
    for key, wrapper in wrappers.items():
        weights = [p for p in wrapper.parameters_of(adapter) if p.dim() == 2]
        if weights and HEADS & {*key.split(".")}:
            return len(weights[-1])
    return None


def compute_decoder_loss(_: nn.Module, __: int | None, output: Outputs, batch: Outputs, **___: object) -> Tensor:
    """Return the mean cross entropy of logits (rows, tokens, words) and `labels`, which are not shifted.

    Labels of -100 do not count.
    """
    logits = output["logits"]
    return cross_entropy(logits.view(-1, logits.shape[-1]), batch["labels"].view(-1))


def compute_token_loss(model: nn.Module, _: int | None, output: Outputs, batch: Outputs, **items: object) -> Tensor:
    """Return a language model's `loss_function` of logits, labels and vocabulary size, which is that of the logits.

    It gets `items`, such as `num_items_in_batch`.
    """
    logits = output["logits"]
    return model.loss_function(logits=logits, labels=batch["labels"], vocab_size=logits.shape[-1], **items)


def compute_classification_loss(
    model: nn.Module, labels: int | None, output: Outputs, batch: Outputs, **_: object
) -> Tensor:
    """Return the loss of a classifier of samples or of tokens.

    Only the first `labels` columns of the logits count, since others are of other heads. Without `labels` all count.
    The model's `loss_function` gets, in place of its config, a namespace of the number of columns left as `num_labels`
    and the config's `problem_type`.
    """
    logits = output["logits"]
    if labels is not None and logits.shape[-1] > labels:
        logits = logits[..., :labels].contiguous()
    config = SimpleNamespace(num_labels=logits.shape[-1], problem_type=model.config.problem_type)
    if model.loss_type == "ForTokenClassification":
        return model.loss_function(logits, batch["labels"], config)
    return model.loss_function(labels=batch["labels"], pooled_logits=logits, logits=logits, config=config)


def compute_span_loss(model: nn.Module, _: int | None, output: Outputs, batch: Outputs, **__: object) -> Tensor:
    """Return the model's loss of question answering: of start and end logits, then `start_positions` and
    `end_positions` of the batch.
    """
    return model.loss_function(output["start_logits"], output["end_logits"], *(batch[key] for key in SPANS))


LOSSES: dict[str, Loss] = {  # each of (model, number of the head's labels, output, batch)
    **dict.fromkeys(("ForCausalLM", "ForConditionalGeneration", "ForMaskedLM"), compute_token_loss),
    **dict.fromkeys(
        (f"For{task}Classification" for task in ("Sequence", "Image", "Audio", "Token")), compute_classification_loss
    ),
    "ForQuestionAnswering": compute_span_loss,
}
