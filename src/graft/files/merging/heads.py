# SPDX-License-Identifier: Apache-2.0
"""What a merged model's config must say of new sizes and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graft.config.reading import Json
from graft.files.merging.folds import Change
from graft.files.neutral import AdapterFile


def resize(
    config: dict[str, object], changed: Mapping[str, list[Change]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Set the size of the vocabulary, in the part of the config that has the old one, where an adapter changed it."""
    for key, folds in changed.items():
        old, new = shapes.get(key), folds[-1].shape if folds else None
        if old is None or new is None or old == new or old[0] == new[0]:
            continue
        for name, part in [("", config), *config.items()]:
            if isinstance(part, dict) and part.get("vocab_size") == old[0]:
                if name:
                    config[name] = {**part, "vocab_size": new[0]}
                else:
                    config["vocab_size"] = new[0]


def architecture(
    config: dict[str, object], changed: Mapping[str, list[Change]], adapters: Sequence[AdapterFile]
) -> Json:
    """Name the class that has the heads which an adapter brought along, and its labels, if transformers knows it."""
    new = {key: folds[-1].shape for key, folds in changed.items() if folds and folds[0].new}
    if not new:
        return config
    for adapter in adapters:
        kind = head_class(config, adapter)
        if kind is None:
            continue
        labels = next((shape[0] for key, shape in sorted(new.items()) if key.endswith(".weight")), None)
        config = {**config, "architectures": [kind]}
        if labels is not None and kind.endswith(("SequenceClassification", "TokenClassification")):
            config["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
            config["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    return config


def head_class(config: Mapping[str, object], adapter: AdapterFile) -> str | None:
    """Return the class of the model that an adapter was trained on, as its config says: by name, or by its task."""
    named = (adapter.config.get("auto_mapping") or {}).get("base_model_class")
    task = adapter.config.get("task_type")
    try:
        from transformers.models.auto import modeling_auto
    except ImportError:
        return None
    tables = {
        "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    }
    if named is None and task in tables:
        named = getattr(modeling_auto, tables[task], {}).get(config.get("model_type"))
    return named[0] if isinstance(named, (list, tuple)) else named
