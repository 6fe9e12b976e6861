# SPDX-License-Identifier: Apache-2.0
"""The PeftModel class for each task type, with its named arguments and heads; and loaders of a base with its
adapter.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import nn

from graft.config.base import TASK_HEADS, PeftConfig, add_task_heads
from graft.config.hub import fetch_file, select_hub_keywords
from graft.core.errors import CheckpointError, ConfigError, PeftWarning, shorten_text, warn
from graft.inject.parts import get_registry
from graft.model.peft_model import OF_TASKS, PeftModel


class _WithHead(PeftModel):
    """A model with a task head; each adapter has a copy of the head."""

    task: str

    def _extend_config(self, config: PeftConfig) -> None:
        """Add the names of the task's head to `modules_to_save` of the config."""
        add_task_heads(config)

    @property
    def cls_layer_name(self) -> str | None:
        """The name of the first child of the base that contains a head's name; None if there is none."""
        names = TASK_HEADS[self.task]
        return next((n for n, _ in self.get_base_model().named_children() if any(h in n for h in names)), None)


class _Classification(_WithHead):
    """A classifier.

    It keeps the number of labels in the model's config, which the loss reads, equal to the active head's.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        """Make the PeftModel, remember the base's labels and problem_type, and set the labels to the active head's."""
        model = args[0] if args else kwargs["model"]
        labels = _read_labels(model), getattr(getattr(model, "config", None), "problem_type", None)
        super().__init__(*args, **kwargs)
        self._base_labels, self._problem_type = labels
        self._heads_changed()

    def _heads_changed(self) -> None:
        """Set the base's number of labels to that of the active adapter's head, by `_set_labels`; a head of unknown
        width changes nothing.
        """
        self._set_labels(self._width(self._head()))

    @contextmanager
    def _begin_call(self, call_name: str, names: Sequence[str] | None) -> Iterator[None]:
        """Begin a call of the adapters `names` as the base class does.

        If it needs another number of labels than the model has, that call ends first. Then wait until no other call
        runs and begin again as the only one: all calls read the same config. Within that call the config has the number
        of the head that runs; at its end, also after an error, that of the active head.
        """
        with super()._begin_call(call_name, names):
            if not self._needs_other_labels(names):
                yield
                return
        with (
            self._registry.call.gate.change(f"{call_name} of a head with other labels", ()),
            super()._begin_call(call_name, names),
        ):
            self._set_labels(self._labels_of(names))
            try:
                yield
            finally:
                self._heads_changed()

    def _needs_other_labels(self, names: Sequence[str] | None) -> bool:
        """Return True if the call's head has another number of labels than the model now.

        False if unknown, or for an ordinary call while no call is mixed or disabled.
        """
        if names is None and not self._registry.call.open:
            return False
        n, now = self._labels_of(names), _read_labels(self.get_base_model())
        return n is not None and now is not None and n != now[0]

    def _labels_of(self, names: Sequence[str] | None) -> int | None:
        """Return the number of labels of the head that runs; of a mixed batch the largest, the width of its logits.

        A name without a copy has the base model's head. None if no width is known.
        """
        head = self._head()
        if names is None:
            return self._width(head)
        copies = getattr(head, "modules_to_save", {})
        widths = [self._width(copies[n] if n in copies else getattr(head, "original_module", head)) for n in set(names)]
        return max((w for w in widths if w is not None), default=None)

    def _head(self) -> nn.Module | None:
        """Return the head: of the task's names in order, the first that is a module of the base; None if there
        is none.
        """
        model = self.get_base_model()
        return next((m for n in TASK_HEADS[self.task] if isinstance(m := getattr(model, n, None), nn.Module)), None)

    def _width(self, head: nn.Module | None) -> int | None:
        """Return the number of labels of a head: the rows of its last parameter of two dimensions, in the active
        adapter's copy if it has copies. None without a head or such a parameter.
        """
        if head is None:
            return None
        head = getattr(head, "active", head)
        weights = [p for p in head.parameters() if p.dim() == 2]
        return weights[-1].shape[0] if weights else None

    def _set_labels(self, n: int | None) -> None:
        """Set `num_labels` of the base's config (and of the base, if it has the attribute) to `n`, and `problem_type`
        back to the user's.

        The base's names of labels come back with its original number; with any other number the config chooses them.
        Does nothing if `n` is None or there already, or the model has no labels. Waits until no other call runs.
        """
        model, before = self.get_base_model(), self._base_labels
        now = _read_labels(model)
        if n is None or before is None or now is None or n == now[0]:
            return
        with self._registry.call.gate.change(f"setting num_labels to {n}", ()):
            config = model.config
            config.num_labels = n
            config.problem_type = self._problem_type  # transformers sets it from labels of another head
            if n == before[0]:
                config.id2label, config.label2id = before[1], before[2]
            if hasattr(model, "num_labels"):
                model.num_labels = n  # type: ignore[assignment]


def _read_labels(model: nn.Module) -> tuple[int, object, object] | None:
    """Return (num_labels, id2label, label2id) of a model's config, None for a missing name table; None without
    num_labels.
    """
    config = getattr(model, "config", None)
    n = getattr(config, "num_labels", None)
    return None if n is None else (n, getattr(config, "id2label", None), getattr(config, "label2id", None))


FIRST = "input_ids attention_mask"
LAST = "output_attentions output_hidden_states return_dict task_ids"


def _make_forward(names: str) -> Callable[..., object]:
    """Return a `forward(self, …, **kwargs)` with the arguments in `names` (separated by spaces), all None by default.

    Its `__signature__` shows them: transformers' Trainer reads from it the columns of a data set to keep. It calls the
    base model with the arguments that the caller passed.
    """
    arguments, kind = names.split(), inspect.Parameter
    known = frozenset(arguments)
    parameters = [kind(name, kind.POSITIONAL_OR_KEYWORD, default=None) for name in arguments]
    signature = inspect.Signature(
        [kind("self", kind.POSITIONAL_OR_KEYWORD), *parameters, kind("kwargs", kind.VAR_KEYWORD)]
    )

    def forward(self: PeftModel, *args: object, **kwargs: object) -> object:
        """Run the base model's forward with the arguments that the caller passed, as keywords, and return its output.

        Positional arguments get the names of `names` in order. Named arguments that are None are left out; other
        keywords are passed even if None. `task_ids` is dropped if no loaded method takes it. Raises TypeError for too
        many or doubled positional arguments.
        """
        if args:
            positional = dict(zip(arguments, args))
            if len(args) > len(arguments) or any([name in kwargs for name in positional]):
                signature.bind(self, *args, **kwargs)  # raises TypeError
            kwargs = positional | kwargs
        if "task_ids" in kwargs and "task_ids" not in get_registry(self).arguments:
            del kwargs["task_ids"]
        passed = {name: value for name, value in kwargs.items() if value is not None or name not in known}
        return self._call_base(self.get_base_model(), (), passed)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


class PeftModelForSequenceClassification(_Classification):
    """The PeftModel for task type SEQ_CLS. `classifier` or `score` trains with the adapter."""

    task = "SEQ_CLS"
    forward = _make_forward(f"{FIRST} inputs_embeds labels {LAST} token_type_ids position_ids")


class PeftModelForTokenClassification(_Classification):
    """The PeftModel for task type TOKEN_CLS. `classifier` or `score` trains with the adapter."""

    task = "TOKEN_CLS"
    forward = PeftModelForSequenceClassification.forward


class PeftModelForCausalLM(PeftModel):
    """The PeftModel for task type CAUSAL_LM."""

    forward = PeftModelForSequenceClassification.forward

    def prepare_inputs_for_generation(self, *args: object, **kwargs: object) -> object:
        """Call the base model's own function."""
        return self.get_base_model().prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForSeq2SeqLM(PeftModel):
    """The PeftModel for task type SEQ_2_SEQ_LM."""

    prepare_inputs_for_generation = PeftModelForCausalLM.prepare_inputs_for_generation

    forward = _make_forward(
        f"{FIRST} inputs_embeds decoder_input_ids decoder_attention_mask decoder_inputs_embeds labels {LAST}"
    )


class PeftModelForQuestionAnswering(_WithHead):
    """The PeftModel for task type QUESTION_ANS. `qa_outputs` trains with the adapter."""

    task = "QUESTION_ANS"
    forward = _make_forward(f"{FIRST} token_type_ids position_ids inputs_embeds start_positions end_positions {LAST}")


class PeftModelForFeatureExtraction(PeftModel):
    """The PeftModel for task type FEATURE_EXTRACTION."""

    forward = _make_forward(f"{FIRST} inputs_embeds {LAST} token_type_ids position_ids")


MODEL_TYPE_TO_PEFT_MODEL_MAPPING = OF_TASKS
MODEL_TYPE_TO_PEFT_MODEL_MAPPING |= {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


# loaders of base model and adapter


ALLOWED_LIBRARIES = ("diffusers", "lerobot", "megatron-core", "transformers")


class AutoPeftModel:
    """A loader of adapters together with the base model that their config names. It has no instances."""

    task: ClassVar[str | None] = None
    auto_class: ClassVar[str | None] = None  # transformers' class of the base model

    def __init__(self, *args: object, **kwargs: object):
        """Raise OSError for any arguments: `from_pretrained` makes such models."""
        name = type(self).__name__
        raise OSError(
            f"{name} is designed to be instantiated using the "
            f"`{name}.from_pretrained(pretrained_model_name_or_path)` method."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model at the revision that the adapter's config records, and the adapter on it; return the
        PeftModel.

        If the adapter's folder has a tokenizer with more tokens than the base, the embeddings are enlarged.

        Args:
            import_allowlist: libraries that the config's `auto_mapping` may import the base model's class from.
            kwargs: for the base model's from_pretrained. `trust_remote_code` (False) is for its tokenizer, too;
                `subfolder`, `allow_nonfinite`, `check_digest` and `expert_layout` for the adapter.

        Raises:
            ValueError: the adapter is for another task, its library is not in the allowlist, or its config does not
                name the base model.
            ConfigError: its `auto_mapping` names no class that can be loaded.
            CheckpointError: the tokenizer next to the adapter cannot be loaded.
            OSError: there is no such base model.
        """
        from huggingface_hub.errors import HFValidationError

        hub = select_hub_keywords(kwargs)
        if revision is not None:
            hub["revision"] = revision
        place = hub | {"subfolder": kwargs.pop("subfolder", None)}
        cfg = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, **place)
        if cfg.base_model_name_or_path is None:
            raise ValueError(
                f"The config at '{pretrained_model_name_or_path}' does not name its base model: load that yourself."
            )
        base_class = cls._find_base_class(cfg, import_allowlist)
        trusted = kwargs.get("trust_remote_code", False)
        if base_class.__module__.partition(".")[0] == "transformers":  # without the keyword it would ask the user
            kwargs["trust_remote_code"] = trusted
        options = {k: kwargs.pop(k) for k in ("allow_nonfinite", "check_digest", "expert_layout") if k in kwargs}
        try:
            base = base_class.from_pretrained(cfg.base_model_name_or_path, revision=cfg.revision, **kwargs)
        except (OSError, HFValidationError) as e:  # such as a path of the machine that trained
            raise OSError(
                f"The base model '{cfg.base_model_name_or_path}', which the adapter at "
                f"'{pretrained_model_name_or_path}' names, cannot be loaded ({e}). Load it from where it is now, and "
                "the adapter by PeftModel.from_pretrained."
            ) from e
        cls._fit_vocabulary(base, pretrained_model_name_or_path, trusted, place)
        target = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(cls.task, PeftModel)
        return target.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config=config, **options, **place
        )

    @classmethod
    def _find_base_class(cls, config: PeftConfig, allowlist: list[str] | None) -> Any:
        """Return the class of the base: transformers' auto class of this task, or the recorded class if the config has
        no task type.

        The recorded class must be in the `allowlist`, and is imported.

        Raises:
            ValueError: AutoPeftModel itself gets a config with a task type, or the config's task has another PeftModel
                class than this one; or the errors of `_find_recorded_class`.
        """
        if config.task_type is None:
            return cls._find_recorded_class(config, allowlist)
        if cls.auto_class is None:
            raise ValueError(
                "Cannot use `AutoPeftModel` with a task type, please use a specific class for your task type: the "
                f"adapter is for {config.task_type}, so AutoPeftModelFor… of that task, or PeftModel."
            )
        expected = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type)
        target = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[cls.task]
        if expected is not target:
            wanted = expected.__name__ if expected else "PeftModel"
            raise ValueError(
                f"Expected target PEFT class: {wanted}, but you have asked for: {target.__name__}. The adapter is for "
                f"{config.task_type}: use the AutoPeftModel class of that task."
            )
        import transformers

        return getattr(transformers, cls.auto_class)

    @staticmethod
    def _find_recorded_class(config: PeftConfig, allowlist: list[str] | None) -> type:
        """Import and return the class of the base that the config's `auto_mapping` names.

        A submodule of an allowed library is allowed, too. The allowlist is checked before anything is imported.

        Raises:
            ValueError: there is no auto_mapping, or its library is not in the allowlist (None: diffusers, lerobot,
                megatron-core and transformers).
            ConfigError: a name in it is no str, the library cannot be imported, or it has no such class with
                `from_pretrained`.
        """
        mapping = config.auto_mapping
        if not mapping:
            raise ValueError(
                "Cannot infer the auto class from the config, which has neither a task type nor an auto_mapping: load "
                "the base model yourself, and the adapter with PeftModel.from_pretrained."
            )
        library, name = (mapping.get(key) for key in ("parent_library", "base_model_class"))
        if not (isinstance(library, str) and isinstance(name, str)):
            raise ConfigError(
                "The config's auto_mapping must name the base model's class and its library, as base_model_class and "
                f"parent_library; it is {shorten_text(repr(mapping))}."
            )
        allowed = allowlist if allowlist is not None else list(ALLOWED_LIBRARIES)
        if not any(library == a or library.startswith(f"{a}.") for a in allowed):
            raise ValueError(
                f"The base model class is to be imported from '{library}', which is not in the import allowlist "
                f"{allowed}. If you trust it, pass import_allowlist."
            )
        try:
            base_class = getattr(importlib.import_module(library), name, None)
        except (ImportError, ValueError, TypeError) as e:
            raise ConfigError(f"auto_mapping: the library '{shorten_text(library)}' cannot be imported: {e}") from e
        if not (isinstance(base_class, type) and hasattr(base_class, "from_pretrained")):
            raise ConfigError(f"auto_mapping: '{shorten_text(name)}' of '{library}' is no class of models to load.")
        return base_class

    @staticmethod
    def _fit_vocabulary(base: nn.Module, where: str, trust_remote_code: bool, place: dict[str, Any]) -> None:
        """Enlarge the base's embeddings if the adapter's folder or repository has a tokenizer with more tokens; never
        shrink them.

        Without a tokenizer_config.json in a sub-folder, that of the folder around it counts; without any nothing
        happens. If `where` is no folder and the hub's files cannot be read (OSError), warn and return.

        Raises:
            CheckpointError: the tokenizer cannot be loaded, for any other error.
        """
        from transformers import AutoTokenizer

        try:
            places = [place] if place.get("subfolder") is None else [place, place | {"subfolder": None}]
            source = next((p for p in places if fetch_file(where, "tokenizer_config.json", **p) is not None), None)
            if source is None:
                return
            options = {k: v for k, v in source.items() if k != "repo_type" and v is not None}
            size = len(AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **options))
        except Exception as e:  # of many types, where files of a tokenizer are damaged
            if isinstance(e, OSError) and not os.path.isdir(where):  # no hub; the adapter is in its cache
                unknown = f"Whether '{where}' has a tokenizer with more tokens than the base model is not known: {e}"
                warn(unknown, PeftWarning)
                return
            raise CheckpointError(
                f"The tokenizer of the adapter in '{where}' cannot be loaded ({e}). If it brings code that you trust, "
                "pass trust_remote_code=True; or load the base model yourself."
            ) from e
        if size > base.get_input_embeddings().num_embeddings:
            base.resize_token_embeddings(size)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """The AutoPeftModel for task type CAUSAL_LM."""

    task, auto_class = "CAUSAL_LM", "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """The AutoPeftModel for task type SEQ_2_SEQ_LM."""

    task, auto_class = "SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """The AutoPeftModel for task type SEQ_CLS."""

    task, auto_class = "SEQ_CLS", "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """The AutoPeftModel for task type TOKEN_CLS."""

    task, auto_class = "TOKEN_CLS", "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """The AutoPeftModel for task type QUESTION_ANS."""

    task, auto_class = "QUESTION_ANS", "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """The AutoPeftModel for task type FEATURE_EXTRACTION."""

    task, auto_class = "FEATURE_EXTRACTION", "AutoModel"
