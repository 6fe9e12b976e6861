# SPDX-License-Identifier: Apache-2.0
"""AutoPeftModel: base model and adapter from the adapter's folder alone."""

from __future__ import annotations

import importlib
import os
from typing import Any, ClassVar

from graft.config.base import PeftConfig
from graft.config.hub import fetch, hub_keywords
from graft.core.errors import CheckpointError, ConfigError, PeftWarning, shortened, warn
from graft.model.peft_model import PeftModel
from graft.model.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

ALLOWED_LIBRARIES = ("diffusers", "lerobot", "megatron-core", "transformers")


class AutoPeftModel:
    """A loader of adapters and of the base model that their config names."""

    task: ClassVar[str | None] = None
    auto_class: ClassVar[str | None] = None  # transformers' class of the base model

    def __init__(self, *args: Any, **kwargs: Any):
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
        """Load the base model at the revision the config records, and the adapter on it.

        Args:
            import_allowlist: libraries that the config's `auto_mapping` may import the base model's class from.
            kwargs: for the base model's from_pretrained. `trust_remote_code` (False) is for its tokenizer, too;
                `allow_nonfinite`, `check_digest` and `expert_layout` for the adapter.

        Raises:
            ValueError: the adapter is for another task, or its config does not tell the base model.
            ConfigError: its `auto_mapping` names no class that can be loaded.
        """
        hub = hub_keywords(kwargs)
        if revision is not None:
            hub["revision"] = revision
        stored = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        if stored.base_model_name_or_path is None:
            raise ValueError(
                f"The config at '{pretrained_model_name_or_path}' does not name its base model: load that yourself."
            )
        base_class = cls._base_class(stored, import_allowlist)
        trusted = kwargs.get("trust_remote_code", False)
        if base_class.__module__.partition(".")[0] == "transformers":  # which would ask the user otherwise
            kwargs["trust_remote_code"] = trusted
        own = {k: kwargs.pop(k) for k in ("allow_nonfinite", "check_digest", "expert_layout") if k in kwargs}
        base = base_class.from_pretrained(stored.base_model_name_or_path, revision=stored.revision, **kwargs)
        cls._fit_vocabulary(base, pretrained_model_name_or_path, trusted, hub)
        target = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(cls.task, PeftModel)
        return target.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config=config, **own, **hub
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, allowlist: list[str] | None) -> Any:
        if config.task_type is None:
            return cls._recorded_class(config, allowlist)
        if cls.auto_class is None:
            raise ValueError(
                "Cannot use `AutoPeftModel` with a task type, please use a specific class for your task type: the "
                f"adapter is for {config.task_type}, so AutoPeftModelFor… of that task, or PeftModel."
            )
        expected = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type)
        mine = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[cls.task]
        if expected is not mine:
            wanted = expected.__name__ if expected else "PeftModel"
            raise ValueError(
                f"Expected target PEFT class: {wanted}, but you have asked for: {mine.__name__}. The adapter is for "
                f"{config.task_type}: use the AutoPeftModel class of that task."
            )
        import transformers

        return getattr(transformers, cls.auto_class)

    @staticmethod
    def _recorded_class(config: PeftConfig, allowlist: list[str] | None) -> Any:
        """Return the class that an adapter without a task type recorded of its base."""
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
                f"parent_library; it is {shortened(repr(mapping))}."
            )
        allowed = allowlist if allowlist is not None else list(ALLOWED_LIBRARIES)
        if not any(library == a or library.startswith(f"{a}.") for a in allowed):
            raise ValueError(
                f"The base model class is to be imported from '{library}', which is not in the import allowlist "
                f"{allowed}. If you trust it, pass import_allowlist."
            )
        try:
            found = getattr(importlib.import_module(library), name, None)
        except (ImportError, ValueError, TypeError) as e:
            raise ConfigError(f"auto_mapping: the library '{shortened(library)}' cannot be imported: {e}") from e
        if not (isinstance(found, type) and hasattr(found, "from_pretrained")):
            raise ConfigError(f"auto_mapping: '{shortened(name)}' of '{library}' is no class of models to load.")
        return found

    @staticmethod
    def _fit_vocabulary(base: Any, where: str, trust_remote_code: bool, hub: dict[str, Any]) -> None:
        """Resize the embeddings if the adapter's folder, or its repository on the hub, holds a larger tokenizer."""
        from transformers import AutoTokenizer

        options = {name: value for name, value in hub.items() if name != "repo_type"}
        try:
            if fetch(where, "tokenizer_config.json", **hub) is None:
                return
            size = len(AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **options))
        except Exception as e:  # of many types, where files of a tokenizer are damaged
            if isinstance(e, OSError) and not os.path.isdir(where):  # a hub out of reach, whose adapter is in the cache
                unknown = f"Whether '{where}' has a tokenizer with more tokens than the base model is not known: {e}"
                warn(unknown, PeftWarning)
                return
            raise CheckpointError(
                f"The tokenizer beside the adapter in '{where}' cannot be loaded ({e}). If it brings code that you "
                "trust, pass trust_remote_code=True; or load the base model yourself."
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
