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


def find_model_loss(model: nn.Module, wrappers: Mapping[str, ModulesToSaveWrapper], name: str) -> Loss:
    """Return the function (output, batch, **items) → loss that a transformers model has for its task.

    It raises ConfigError for a batch without labels.

    Args:
        wrappers: modules that the run's adapter trains whole; its head may have another number of labels than the
            model.
        name: of the run and adapter.

    Raises:
        ConfigError: the model has no loss, or one that needs more than its output.
    """
    kind = getattr(model, "loss_type", None) or ("ForCausalLM" if "LMHead" in type(model).__name__ else None)
    make_loss = LOSSES.get(str(kind)) if hasattr(model, "loss_function") else None
    if hasattr(model, "prepare_decoder_input_ids_from_labels") and model.config.is_encoder_decoder:
        make_loss = make_decoder_loss
    if make_loss is None:
        raise ConfigError(
            f"Run '{name}': {type(model).__name__} has no loss that graft can compute for some rows only. Give add() a "
            "loss(output, batch), which returns the mean over the run's rows."
        )
    loss = make_loss(model, count_head_labels(wrappers, name))
    keys = SPANS if make_loss is make_span_loss else ("labels",)

    def compute_loss(output: Outputs, batch: Outputs, **items: object) -> Tensor:
        """Return the loss of a batch.

        Raise ConfigError if the batch lacks `labels`, or the start and end positions of spans.
        """
        if missing := [key for key in keys if key not in batch]:
            raise ConfigError(
                f"Run '{name}': a batch has no {' and no '.join(missing)}, which the model's loss needs. Add them "
                "to the data, or give add() a loss(output, batch)."
            )
        return loss(output, batch, **items)

    return compute_loss


def count_head_labels(wrappers: Mapping[str, ModulesToSaveWrapper], adapter: str) -> int | None:
    """Return the number of outputs of an adapter's head: rows of the last matrix in a wrapped module with a head's
    name. None if it wraps no head.
    """
    for key, wrapper in wrappers.items():
        weights = [p for p in wrapper.parameters_of(adapter) if p.dim() == 2]
        if weights and HEADS & {*key.split(".")}:
            return len(weights[-1])
    return None


def make_decoder_loss(_: nn.Module, __: int | None) -> Loss:
    """Return the loss of encoder-decoders: the mean cross entropy of all tokens, without shifting the labels.

    Both arguments are ignored.
    """

    def compute_loss(output: Outputs, batch: Outputs, **_: object) -> Tensor:
        """Return the mean cross entropy of logits (rows, tokens, words) and `labels`; labels of -100 do not count."""
        logits = output["logits"]
        return cross_entropy(logits.view(-1, logits.shape[-1]), batch["labels"].view(-1))

    return compute_loss


def make_token_loss(model: nn.Module, _: int | None) -> Loss:
    """Return the loss of a language model: its `loss_function` of logits, labels and vocabulary size, with `items` such
    as `num_items_in_batch`.
    """

    def compute_loss(output: Outputs, batch: Outputs, **items: object) -> Tensor:
        """Return the model's loss of the logits; its vocabulary size is that of the logits."""
        logits = output["logits"]
        return model.loss_function(logits=logits, labels=batch["labels"], vocab_size=logits.shape[-1], **items)

    return compute_loss


def make_classification_loss(model: nn.Module, labels: int | None) -> Loss:
    """Return the loss of a classifier of samples or of tokens.

    If the logits have more columns than `labels`, those of other heads are cut off.
    """
    tokens = model.loss_type == "ForTokenClassification"

    def compute_loss(output: Outputs, batch: Outputs, **_: object) -> Tensor:
        """Return the model's loss of the logits; if they have more than `labels` columns, of the first `labels` of
        them.

        Without `labels` nothing is cut. The loss gets the number of columns left as `num_labels`, in a namespace in
        place of the model's config, which stays unchanged.
        """
        logits = output["logits"]
        if labels is not None and logits.shape[-1] > labels:
            logits = logits[..., :labels].contiguous()
        config = SimpleNamespace(num_labels=logits.shape[-1], problem_type=model.config.problem_type)
        if tokens:
            return model.loss_function(logits, batch["labels"], config)
        return model.loss_function(labels=batch["labels"], pooled_logits=logits, logits=logits, config=config)

    return compute_loss


def make_span_loss(model: nn.Module, _: int | None) -> Loss:
    """Return the loss of question answering: the model's, of start and end logits and positions."""

    def compute_loss(output: Outputs, batch: Outputs, **_: object) -> Tensor:
        """Return the model's loss of both logits and both positions in the batch."""
        logits = output["start_logits"], output["end_logits"]
        return model.loss_function(*logits, *(batch[key] for key in SPANS))

    return compute_loss


LOSSES: dict[str, Callable[[nn.Module, int | None], Loss]] = {
    "ForCausalLM": make_token_loss,
    "ForConditionalGeneration": make_token_loss,
    "ForMaskedLM": make_token_loss,
    "ForSequenceClassification": make_classification_loss,
    "ForImageClassification": make_classification_loss,
    "ForAudioClassification": make_classification_loss,
    "ForTokenClassification": make_classification_loss,
    "ForQuestionAnswering": make_span_loss,
}
