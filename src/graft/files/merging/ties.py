# SPDX-License-Identifier: Apache-2.0
"""Tied weights, new sizes and heads: effects of changes on other weights, and on a merged model's config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from graft.config.reading import Json
from graft.files.merging.folds import TensorChange
from graft.files.neutral import AdapterFile
from graft.files.tensors import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Groups = list[list[str]]


def find_tied_groups(
    model: Callable[[], PreTrainedModel | None], config: Mapping[str, object], shapes: Mapping[str, object]
) -> Groups:
    """Return the names of parameters that are one, by the model; without one, by its config."""
    if config.get("tie_word_embeddings") is False:
        return []
    empty_model = model()
    if empty_model is None:
        known = [n for n in shapes if n.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight"))]
        return [[known[0], "lm_head.weight"]] if len(known) == 1 and config.get("tie_word_embeddings") else []
    if hasattr(empty_model, "tie_weights"):
        empty_model.tie_weights()
    same: dict[int, list[str]] = {}
    for name, p in empty_model.named_parameters(remove_duplicate=False):
        same.setdefault(id(p), []).append(name)
    return [names for names in same.values() if len(names) > 1]


class Tied:
    """The ties of a checkpoint, looked at only where an adapter may pull one apart.

    Attributes:
        shapes: the checkpoint's, and those of tied tensors that it leaves out.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], groups: Callable[[], Groups]):
        self.shapes = dict(shapes)
        self.names = set(shapes)
        self.groups_of = groups
        self.groups: Groups | None = None
        self.sources: dict[str, str] = {}  # tensor that the checkpoint leaves out → the one that it is
        self.untied = False

    def look_at(self, adapter: AdapterFile) -> None:
        """Find the ties, if an adapter changes tensors that may be tied: embeddings, whole tensors, tensors that seem
        missing.
        """
        touched = [path for path, lora in adapter.low_rank.items() if lora.kind != "experts"]
        may = adapter.rows or adapter.full or len(touched) < len(adapter.modules)
        may = may or any(lora.kind == "embedding" for lora in adapter.low_rank.values())
        may = may or any(f"{path}.weight" not in self.names or path.rpartition(".")[2] in HEADS for path in touched)
        if self.groups is not None or not may:
            return
        self.groups = self.groups_of()
        for group in self.groups:
            present = [name for name in group if name in self.names]
            for name in group if present else ():
                if name not in self.names:
                    self.shapes[name], self.sources[name] = self.shapes[present[0]], present[0]

    def source(self, key: str) -> str:
        return self.sources.get(key, key)

    def spread(self, found: list[TensorChange], adapter: AdapterFile) -> list[TensorChange]:
        """Return the changes, with those of one tied tensor on all where the adapter means all.

        Trained rows and biases of the base are those of all, since training had the one tensor; others are if the
        config says `ensure_weight_tying`.
        """
        result = list(found)
        together = bool(adapter.config.get("ensure_weight_tying"))
        biases = adapter.config.get("bias") not in (None, "none")
        for group in self.groups or ():
            for change in found:
                one = together or change.of[:1] == ("rows",) or (biases and change.key.endswith(".bias"))
                if change.key in group and one:
                    missing = [n for n in group if not any(c.key == n and c.of[:1] == change.of[:1] for c in found)]
                    result += [replace(change, key=name, param=name) for name in missing if name in self.shapes]
        return result

    def locate_all(self, changed: dict[str, list[TensorChange]]) -> list[str]:
        """Decide for each group of tied tensors whether to write one or all of them. Return sentences for the user.

        Members with the same changes stay tied.
        """
        notes = []
        for group in self.groups or ():
            names = [name for name in group if name in self.shapes]
            if not any(name in changed for name in names):
                continue
            if all(are_alike(changed.get(names[0], []), changed.get(name, [])) for name in names[1:]):
                for name in names:
                    if name not in self.names:
                        changed.pop(name, None)
                continue
            self.untied = True
            one = ", ".join(f"'{name}'" for name in names)
            notes.append(
                f"{one} are one tensor in the base and differ now: each is written, tie_word_embeddings=false."
            )
        if self.untied:  # of all that the config ties
            for group in self.groups or ():
                for name in group:
                    if name in self.shapes:
                        changed.setdefault(name, [])
        return notes

    def mark(self, config: dict[str, object]) -> None:
        """Set the config's fields for untied embeddings, if a merge has untied them."""
        if not self.untied:
            return
        config["tie_word_embeddings"] = False
        for name, part in config.items():
            if isinstance(part, dict) and part.get("tie_word_embeddings"):
                config[name] = {**part, "tie_word_embeddings": False}


HEADS = ("lm_head", "embed_out", "output", "decoder", "score", "classifier")  # last names of tensors that may be tied


def are_alike(a: list[TensorChange], b: list[TensorChange]) -> bool:
    """Return True if two lists of changes have the same source values."""
    return len(a) == len(b) and all(
        x.shape == y.shape and len(x.of) == len(y.of) and all(map(is_same_value, x.of, y.of)) for x, y in zip(a, b)
    )


def is_same_value(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or ((a.shape, a.dtype) == (b.shape, b.dtype) and bytes(a.load()) == bytes(b.load()))
    return bool(a == b)


def resize_vocabulary(
    config: dict[str, object], changed: Mapping[str, list[TensorChange]], shapes: Mapping[str, tuple[int, ...]]
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


def name_architecture(
    config: dict[str, object], changed: Mapping[str, list[TensorChange]], adapters: Sequence[AdapterFile]
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
