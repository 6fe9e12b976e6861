# SPDX-License-Identifier: Apache-2.0
"""Tied weights, new sizes and heads: changes that follow in other weights, and in the merged model's config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from graft.config.reading import Json
from graft.files.merging.folds import TensorChange
from graft.files.neutral import AdapterFile
from graft.files.tensors import Tensor, are_equal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Groups = list[list[str]]


def find_tied_groups(
    model: Callable[[], PreTrainedModel | None], config: Mapping[str, object], shapes: Mapping[str, object]
) -> Groups:
    """Return the groups of parameter names that are one tensor, each with at least two; [] if config.json has
    tie_word_embeddings false.

    The model from `model` tells the groups; its `tie_weights` is called before. If it is None, the config tells them:
    the only embedding (embed_tokens, wte or word_embeddings) and "lm_head.weight" if tie_word_embeddings is true.
    Without that, or with several embeddings, the result is [].
    """
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
    """The ties of a checkpoint, looked up only if an adapter may make tied tensors differ.

    Attributes:
        shapes: the checkpoint's, and those of tied tensors that it leaves out.
        untied: a merge gives tied tensors different values.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], groups: Callable[[], Groups]):
        """Keep shapes and the function that returns the groups; it is not called yet."""
        self.shapes = dict(shapes)
        self.names = set(shapes)
        self.groups_of = groups
        self.groups: Groups | None = None
        self.sources: dict[str, str] = {}  # tensor that the checkpoint leaves out → the one that it is
        self.untied = False

    def look_at(self, adapter: AdapterFile) -> None:
        """Look the ties up, once, if an adapter may change tied tensors: embeddings, rows, whole tensors, heads (such
        as lm_head, score and classifier), methods other than LoRA, or tensors that the checkpoint lacks. Otherwise, or
        if they are known, nothing happens.

        Sets `groups`. Tied tensors that the checkpoint leaves out are added to `shapes` and `sources`, with the first
        name of the group that it has. Groups without any such name are skipped.
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
        """Return the checkpoint's tensor that `key` is tied to, if the checkpoint leaves `key` out; else `key`."""
        return self.sources.get(key, key)

    def spread(self, found: list[TensorChange], adapter: AdapterFile) -> list[TensorChange]:
        """Return a new list of the changes, followed by copies of those of tied tensors for the other names of the
        group. Names outside the checkpoint, or with a change of the same kind, get none.

        Changes of rows are copied, and those of biases if the config trains biases; all others only if the config has
        `ensure_weight_tying`.
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
        """Decide for each group of tied tensors with a change whether they stay one.

        Return a sentence for the user about each group that does not; [] if all stay tied or nothing was looked up.

        With the same changes they stay tied, and names that the checkpoint lacks are deleted from `changed`. With
        different ones `untied` is set. Then all tied tensors of all groups are added to `changed`, those without
        changes with an empty list, so that each is written.
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
        if self.untied:  # all tensors that the config ties, since one field ties them all
            for group in self.groups or ():
                for name in group:
                    if name in self.shapes:
                        changed.setdefault(name, [])
        return notes

    def mark(self, config: dict[str, object]) -> None:
        """Set tie_word_embeddings to False in the config and in its parts that have it true, if a merge has untied
        tensors.
        """
        if not self.untied:
            return
        config["tie_word_embeddings"] = False
        for name, part in config.items():
            if isinstance(part, dict) and part.get("tie_word_embeddings"):
                config[name] = {**part, "tie_word_embeddings": False}


HEADS = ("lm_head", "embed_out", "output", "decoder", "score", "classifier")  # last names of tensors that may be tied


def are_alike(a: list[TensorChange], b: list[TensorChange]) -> bool:
    """Return True if two lists of changes have the same number, shapes and source values, in the same order."""
    return len(a) == len(b) and all(
        x.shape == y.shape and len(x.of) == len(y.of) and all(map(is_same_value, x.of, y.of)) for x, y in zip(a, b)
    )


def is_same_value(a: object, b: object) -> bool:
    """Return True for equal values; tensors are equal if shape, dtype and bytes are. May read both tensors."""
    return are_equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def resize_vocabulary(
    config: dict[str, object], changed: Mapping[str, list[TensorChange]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Set `vocab_size` of the config, in place, to the new number of rows where a changed tensor has another number
    than before, and `vocab_size` was the old one. Dicts directly in the config that have the old number are replaced by
    copies with the new one. New tensors, and names without changes, are skipped.
    """
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
    """Return a copy of the config with the class of an adapter's new head in `architectures`; the last adapter with a
    known class counts.

    For a classification of sequences or tokens also set id2label and label2id. The labels are LABEL_0 …, one for each
    row of the first new weight by name. The config itself is returned if no adapter brings new tensors, or all classes
    are unknown.
    """
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
    """Return the name of the model class that an adapter was trained on; None if unknown, or without transformers.

    The class of the adapter's `auto_mapping` counts, even if the base has another. Without it the task (SEQ_CLS,
    TOKEN_CLS, QUESTION_ANS) and the base's model type tell it; of several classes the first.
    """
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
