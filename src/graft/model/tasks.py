# SPDX-License-Identifier: Apache-2.0
"""The PeftModel class for each task type: named arguments for the base model, and heads that train with the adapter."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from graft.config.targets import TASK_HEADS
from graft.inject.beside import add_task_heads
from graft.inject.parts import registry_of
from graft.model.peft_model import OF_TASKS, PeftModel


class _WithHead(PeftModel):
    """A model with a task head, of which each adapter has its own."""

    task: str

    def _extend_config(self, config: Any) -> None:
        add_task_heads(config)

    @property
    def cls_layer_name(self) -> str | None:
        names = TASK_HEADS[self.task]
        return next((n for n, _ in self.get_base_model().named_children() if any(h in n for h in names)), None)


class _Classification(_WithHead):
    """A classifier that keeps its config's number of labels, which the loss reads, in step with the active head."""

    def __init__(self, *args: Any, **kwargs: Any):
        model = args[0] if args else kwargs["model"]
        labels = _labels(model), getattr(getattr(model, "config", None), "problem_type", None)
        super().__init__(*args, **kwargs)
        self._base_labels, self._problem_type = labels
        self._heads_changed()

    def _heads_changed(self) -> None:
        self._set_labels(self._width(self._head()))

    @contextmanager
    def _calling(self, what: str, names: Sequence[str] | None) -> Iterator[None]:
        """Have a call alone that has another number of labels: all calls read the model's."""
        with super()._calling(what, names):
            if not self._has_other_labels(names):
                yield
                return
        with self._registry.call.gate.change(f"{what} of a head with other labels", ()), super()._calling(what, names):
            yield

    def _has_other_labels(self, names: Sequence[str] | None) -> bool:
        if names is None and not self._registry.call.open:
            return False
        n, now = self._labels_of(names), _labels(self.get_base_model())
        return n is not None and now is not None and n != now[0]

    @contextmanager
    def _heads_of(self, names: Sequence[str] | None) -> Iterator[None]:
        """Set the labels to those of the head that runs."""
        if not self._has_other_labels(names):
            yield
            return
        self._set_labels(self._labels_of(names))
        try:
            yield
        finally:
            self._heads_changed()

    def _labels_of(self, names: Sequence[str] | None) -> int | None:
        """Return the labels of the head that runs, of the widest one in a mixed batch, as wide as its logits."""
        head = self._head()
        if names is None:
            return self._width(head)
        copies = getattr(head, "modules_to_save", {})
        widths = [self._width(copies[n] if n in copies else getattr(head, "original_module", head)) for n in set(names)]
        known = [w for w in widths if w is not None]
        return max(known) if known else None

    def _head(self) -> nn.Module | None:
        model = self.get_base_model()
        return next((m for n in TASK_HEADS[self.task] if isinstance(m := getattr(model, n, None), nn.Module)), None)

    def _width(self, head: nn.Module | None) -> int | None:
        """Return the number of labels of a head: the rows of its last weight."""
        if head is None:
            return None
        head = getattr(head, "active", head)
        weights = [p for p in head.parameters() if p.dim() == 2]
        return weights[-1].shape[0] if weights else None

    def _set_labels(self, n: int | None) -> None:
        model, before = self.get_base_model(), self._base_labels
        if n is None or before is None or _labels(model) is None:
            return
        now = _labels(model)
        assert now is not None
        if n == now[0]:
            return
        with self._registry.call.gate.change(f"setting num_labels to {n}", ()):
            config: Any = model.config
            config.num_labels = n
            config.problem_type = self._problem_type  # transformers sets it from labels of another head
            if n == before[0]:
                config.id2label, config.label2id = before[1], before[2]
            if hasattr(model, "num_labels"):
                model.num_labels = n  # type: ignore[assignment]


def _labels(model: nn.Module) -> tuple[int, Any, Any] | None:
    config = getattr(model, "config", None)
    n = getattr(config, "num_labels", None)
    return None if n is None else (n, getattr(config, "id2label", None), getattr(config, "label2id", None))


FIRST = "input_ids attention_mask"
LAST = "output_attentions output_hidden_states return_dict task_ids"


def _forward(names: str) -> Any:
    """Return a `forward` with these arguments, which tell transformers' Trainer the columns of a data set to keep."""
    arguments, kind = names.split(), inspect.Parameter
    own = [kind(name, kind.POSITIONAL_OR_KEYWORD, default=None) for name in arguments]
    signature = inspect.Signature([kind("self", kind.POSITIONAL_OR_KEYWORD), *own, kind("kwargs", kind.VAR_KEYWORD)])

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        """Run the base model's forward with the arguments that the caller passed: it need not know the others."""
        given = dict(zip(arguments, args))
        if len(args) > len(arguments) or not given.keys().isdisjoint(kwargs):
            signature.bind(self, *args, **kwargs)  # raises TypeError
        given |= kwargs
        ours = {"task_ids"} - registry_of(self).arguments
        passed = {name: given[name] for name in arguments if given.get(name) is not None and name not in ours}
        return self._call(self.get_base_model(), (), passed | {k: v for k, v in given.items() if k not in arguments})

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


class PeftModelForSequenceClassification(_Classification):
    """The PeftModel for task type SEQ_CLS. `classifier` or `score` trains with the adapter."""

    task = "SEQ_CLS"
    forward = _forward(f"{FIRST} inputs_embeds labels {LAST} token_type_ids position_ids")


class PeftModelForTokenClassification(_Classification):
    """The PeftModel for task type TOKEN_CLS. `classifier` or `score` trains with the adapter."""

    task = "TOKEN_CLS"
    forward = PeftModelForSequenceClassification.forward


class PeftModelForCausalLM(PeftModel):
    """The PeftModel for task type CAUSAL_LM."""

    forward = PeftModelForSequenceClassification.forward

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[operator]


class PeftModelForSeq2SeqLM(PeftModel):
    """The PeftModel for task type SEQ_2_SEQ_LM."""

    prepare_inputs_for_generation = PeftModelForCausalLM.prepare_inputs_for_generation

    forward = _forward(
        f"{FIRST} inputs_embeds decoder_input_ids decoder_attention_mask decoder_inputs_embeds labels {LAST}"
    )


class PeftModelForQuestionAnswering(_WithHead):
    """The PeftModel for task type QUESTION_ANS. `qa_outputs` trains with the adapter."""

    task = "QUESTION_ANS"
    forward = _forward(f"{FIRST} token_type_ids position_ids inputs_embeds start_positions end_positions {LAST}")


class PeftModelForFeatureExtraction(PeftModel):
    """The PeftModel for task type FEATURE_EXTRACTION."""

    forward = _forward(f"{FIRST} inputs_embeds {LAST} token_type_ids position_ids")


MODEL_TYPE_TO_PEFT_MODEL_MAPPING = OF_TASKS
MODEL_TYPE_TO_PEFT_MODEL_MAPPING |= {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}
