# SPDX-License-Identifier: Apache-2.0
"""Loading: from a dict of tensors into a model with adapters, with a report on every key."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor, nn

from graft.config.base import PeftConfig
from graft.core.errors import AdapterKeyError, BaseModelMismatchError, PeftWarning, warn
from graft.inject.build import put
from graft.inject.parts import Parts
from graft.io.entries import PROMPT_WRAPPED, WRAPPED, Entry, entries, find, renamed
from graft.io.files import Loaded
from graft.io.fingerprint import difference, fingerprint, same_values
from graft.io.save import changes_base, config_of, parts_of
from graft.storage import standalone
from graft.storage.parallel import spread_as


@dataclass
class LoadReport:
    """The report of a load: every key of the checkpoint, and every tensor of the adapter."""

    loaded: list[str] = field(default_factory=list)
    base: list[str] = field(default_factory=list)  # tensors of the base model that the checkpoint brought along
    missing_keys: list[str] = field(default_factory=list)  # tensors of the adapter that it does not hold
    unexpected_keys: list[str] = field(default_factory=list)  # keys that fit nothing
    mismatched_keys: list[str] = field(default_factory=list)  # keys of another shape, with ignore_mismatched_sizes

    def __iter__(self):  # as torch's load_state_dict: missing, unexpected = report
        return iter((self.missing_keys, self.unexpected_keys))


class BaseEntry(NamedTuple):
    """A tensor of the base model that a checkpoint brings along."""

    tensor: Tensor

    def assign(self, value: Tensor) -> None:
        self.tensor.data.copy_(spread_as(self.tensor, value))


class Values:
    """The values of one checkpoint, for the carriers of an adapter. `report` lists every key."""

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        adapter: str,
        loaded: Loaded,
        strict: bool = True,
        key_mapping: dict[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
    ):
        if key_mapping is None:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        self.model, self.config, self.adapter = model, config, adapter
        self.tensors = renamed(loaded.tensors, key_mapping)
        self.path, self.fingerprint, self.strict = loaded.path, loaded.fingerprint, strict
        self.ignore_mismatched_sizes = ignore_mismatched_sizes
        self.report = LoadReport()
        self._by_layer: dict[str, set[str]] | None = None

    def head(self, key: str, module: nn.Module) -> nn.Module | None:
        """Return a copy of a module to save with the checkpoint's first dimension (its labels), if that differs."""
        prefix = PROMPT_WRAPPED if self.config.is_prompt_learning else WRAPPED
        original: Any = getattr(module, "original_module", module)
        shapes = {n: p.shape for n, p in original.named_parameters()}
        stored = {n: self.tensors[k].shape for n in shapes if (k := f"{prefix}{key}.{n}") in self.tensors}
        other = {n: s for n, s in stored.items() if s != shapes[n] and s[1:] == shapes[n][1:]}
        return resized(original, other) if other else None

    def of(self, parts: Parts, adapter: str) -> list[tuple[Any, Tensor]]:
        """Return every entry of the adapter (and tensor of the base in the same file) with its value, all checked.

        Raises:
            AdapterKeyError, BaseModelMismatchError: the checkpoint does not fit.
        """
        self.check_base(parts)
        names = set(self.tensors)
        bare = not any(n.startswith("base_model.") for n in names)
        found: list[tuple[Entry, str]] = []
        mismatched = []
        used: set[str] = set()
        prefix = "" if bare else parts.prefix
        for layer, group in groupby(entries(parts, self.adapter, prefix), lambda entry: entry.layer):
            held = [(entry, find(entry, names)) for entry in group]
            if layer is not None:
                held = self._restored(layer, held, names, used)
            for entry, name in held:
                if name is None:
                    self.report.missing_keys.append(entry.file)
                elif self.tensors[name].shape != entry.tensor.shape:
                    mismatched.append((name, self.tensors[name].shape, entry.tensor.shape))
                else:
                    found.append((entry, name))
        used |= {name for _, name in found} | {name for name, _, _ in mismatched}
        base = self.base_tensors(names - used, "" if bare else parts.prefix, mismatched)
        self.report.unexpected_keys = sorted(names - used - set(base))
        self._complain(mismatched)
        self.report.loaded = sorted(name for _, name in found)
        self.report.base = sorted(base)
        own: list[tuple[Any, Tensor]] = [(entry, self.tensors[name]) for entry, name in found]
        return own + [(BaseEntry(target), self.tensors[name]) for name, target in base.items()]

    def _restored(
        self, layer: Any, held: list[tuple[Entry, str | None]], names: set[str], used: set[str]
    ) -> list[tuple[Entry, str | None]]:
        """Put the values that a layer's method restores into `tensors`; return its entries and their names there."""
        method = layer.methods[self.adapter]
        places = {(entry.container, entry.path): name for entry, name in held if name is not None}
        if len(places) < len(held):  # the file may hold other tensors, from which the method restores missing ones
            stem = held[0][0].stem.removesuffix(held[0][0].container)
            for other in self._below(stem) - set(places.values()):
                container, _, path = other.removeprefix(stem).partition(".")
                places[container, path] = other
        values = method.restored({place: self.tensors[name] for place, name in places.items()}, self.config)
        out: list[tuple[Entry, str | None]] = []
        for entry, name in held:
            place = entry.container, entry.path
            if name is None and place in values:
                name = entry.file
                used |= {n for p, n in places.items() if p not in values}
            if name is not None:
                self.tensors[name] = values[place]
            out.append((entry, name))
        return out

    def _below(self, stem: str) -> set[str]:
        """Return the file's keys below a layer, but for those of its base layer."""
        if self._by_layer is None:
            self._by_layer = defaultdict(set)
            for name in self.tensors:
                owner, dot, _ = name.rpartition(".")
                while dot:
                    self._by_layer[f"{owner}."].add(name)
                    owner, dot, _ = owner.rpartition(".")
        return {n for n in self._by_layer.get(stem, ()) if not n.startswith(f"{stem}base_layer.")}

    def base_tensors(self, names: set[str], prefix: str, mismatched: list) -> dict[str, Tensor]:
        """Return the base model's parameters that `names` name; add those of another shape to `mismatched`."""
        if not names:
            return {}
        held: dict[str, Tensor] = {}
        for path, p in self.model.named_parameters(remove_duplicate=False):
            held[prefix + path] = p
            if ".base_layer." not in path:  # the injection may be about to wrap the layer
                stem, _, leaf = path.rpartition(".")
                held[f"{prefix}{stem}.base_layer.{leaf}"] = p
        out = {n: held[n] for n in names if n in held}
        for name in [n for n in out if out[n].shape != self.tensors[n].shape]:
            mismatched.append((name, self.tensors[name].shape, out.pop(name).shape))
        return out

    def check_base(self, parts: Parts) -> None:
        if not self.fingerprint:
            return
        now = fingerprint(parts.layers, with_values=not changes_base(parts, self.adapter))
        differs = difference(self.fingerprint, now)
        if differs:
            text = (
                f"Adapter '{self.adapter}' from {self.path} was made for another base model: {differs}. Load the base "
                f"that it was trained on ({self.config.base_model_name_or_path or 'its name was not recorded'})."
            )
            if self.strict:
                raise BaseModelMismatchError(text)
            warn(text, PeftWarning)
        elif not same_values(self.fingerprint, now):
            warn(
                f"Adapter '{self.adapter}' from {self.path} was trained on a base model of the same architecture but "
                "with other weights: expect other outputs than in training.",
                PeftWarning,
            )

    def _complain(self, mismatched: list) -> None:
        report = self.report
        if mismatched:
            lines = [
                f"size mismatch for {n}: {tuple(a)} in the checkpoint, {tuple(b)} in the model"
                for n, a, b in mismatched
            ]
            if not self.ignore_mismatched_sizes:
                raise AdapterKeyError(
                    f"Error(s) in loading adapter '{self.adapter}' from {self.path}: {some(lines)}. Use the config it "
                    "was saved with, or pass ignore_mismatched_sizes=True to leave these out."
                )
            report.mismatched_keys = [n for n, _, _ in mismatched]
            warn(
                f"Some weights of adapter '{self.adapter}' were not initialized from the model checkpoint and are "
                f"being ignored because you passed `ignore_mismatched_sizes=True`: {some(lines)}"
            )
        parts = []
        if report.missing_keys:
            parts.append(f"Found missing adapter keys while loading the checkpoint: {some(report.missing_keys)}.")
        if report.unexpected_keys:
            parts.append(f"Found keys that fit nothing in the adapter: {some(report.unexpected_keys)}.")
        if not parts:
            return
        text = f"{' '.join(parts)} Adapter '{self.adapter}', checkpoint {self.path}."
        if self.strict:
            raise AdapterKeyError(f"{text} Pass strict=False to load what fits.")
        warn(text)


SETTLED = {f.name for f in fields(PeftConfig)} | {  # fields that the tensors settle, or that have no effect later
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
}  # fmt: skip


def say_kept(adapter: str, path: str, here: Any, there: Any) -> None:
    """Warn where a file's config differs from that of an adapter which takes only the values from the file."""
    ours, theirs = here.saved_dict(), there.saved_dict()
    left = SETTLED | set(here.results)  # these come from the file
    names = [n for n in ours if n not in left and "init" not in n and (ours[n] or None) != (theirs[n] or None)]
    if names:
        differ = ", ".join(f"{n} ({ours[n]!r}, in the file {theirs[n]!r})" for n in names)
        warn(
            f"Adapter '{adapter}' gets the values of {path} and keeps its own config, which differs: {differ}. To take "
            "that over as well, delete_adapter() it before loading, or use hotswap_adapter() (LoRA).",
            PeftWarning,
        )


def some(items: list[str], most: int = 8) -> str:
    """Return a list as text: in full, or its beginning and how many more there are."""
    shown = ", ".join(items[:most])
    return f"[{shown}]" if len(items) <= most else f"[{shown}, … and {len(items) - most} more]"


def resized(module: nn.Module, shapes: dict[str, Any]) -> nn.Module:
    """Return a copy of `module` with parameters of other `shapes` (by name), uninitialised."""
    made = standalone(module)
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        owner = made.get_submodule(path)
        old = getattr(owner, leaf)
        setattr(owner, leaf, nn.Parameter(old.data.new_empty(shape)))
        for attribute in ("out_features", "num_embeddings"):
            if leaf == "weight" and hasattr(owner, attribute):
                setattr(owner, attribute, shape[0])
    return made


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    strict: bool = False,
) -> LoadReport:
    """Put tensors by file key into an adapter that the model has.

    Raises:
        AdapterKeyError: a shape differs or, with `strict`, a key is missing or left over.
        AdapterNotFoundError: no such adapter.
    """
    model = getattr(model, "_orig_mod", model)
    parts, _, base = parts_of(model, adapter_name)
    loaded = Loaded(dict(peft_model_state_dict), "the given state dict")
    values = Values(base, config_of(model, adapter_name), adapter_name, loaded, strict, None, ignore_mismatched_sizes)
    put(parts, adapter_name, values.of(parts, adapter_name))
    return values.report
