# SPDX-License-Identifier: Apache-2.0
"""Between a model with adapters and a dict of tensors, every key accounted for."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from graft.checkpoint.files import Loaded
from graft.checkpoint.fingerprint import difference, fingerprint, same_values
from graft.checkpoint.keys import Entry, entries, find, without_wrappers
from graft.config.base import PeftConfig
from graft.config.targets import EMBEDDING_NAMES
from graft.core.errors import AdapterKeyError, AdapterNotFoundError, BaseModelMismatchError, PeftWarning, warn
from graft.core.layer import AdapterLayer
from graft.core.merging import unmerged
from graft.inject.inject import Parts, add_adapter
from graft.inject.saved import ModulesToSaveWrapper, matches
from graft.inject.survey import survey, uncovered
from graft.storage import standalone
from graft.storage.sharded import spread_as

WRAPPED, PROMPT_WRAPPED = "base_model.model.", "base_model."  # what keys of a PeftModel begin with


@dataclass
class LoadReport:
    """What happened to every key of a checkpoint and every tensor of an adapter."""

    loaded: list[str] = field(default_factory=list)
    base: list[str] = field(default_factory=list)  # tensors of the base model that the checkpoint brought along
    missing_keys: list[str] = field(default_factory=list)  # tensors of the adapter that it does not hold
    unexpected_keys: list[str] = field(default_factory=list)  # keys that fit nothing
    mismatched_keys: list[str] = field(default_factory=list)  # other shape, left out as asked

    def __iter__(self):  # as torch's load_state_dict: missing, unexpected = report
        return iter((self.missing_keys, self.unexpected_keys))


# from a model


def account_of(model: Any) -> Any:
    """What keeps account of the adapters of a PeftModel; None of another model."""
    return model.__dict__.get("tuner")


def parts_of(model: Any, adapter: str) -> tuple[Parts, str, Any]:
    """What carries an adapter, the prefix of its keys, and the base model."""
    model = getattr(model, "_orig_mod", model)
    tuner = account_of(model)
    if tuner is not None:
        tuner.check_known([adapter])
        parts = tuner.parts_of(adapter)
        return parts, parts.prefix, tuner.model
    if hasattr(model, "parts_of"):  # a tuner itself
        return model.parts_of(adapter), "model.", model.model
    tree = survey(model)
    layers = {k: layer for k, layer in tree.layers.items() if adapter in layer.methods}
    wrappers = {k: w for k, w in tree.wrappers.items() if adapter in w.adapters}
    if not layers and not wrappers:
        raise AdapterNotFoundError(f"Adapter {adapter} not found: no layer of the model carries it.")
    return Parts(layers, wrappers), "", model


def config_of(model: nn.Module, adapter: str) -> Any:
    return (getattr(model, "peft_config", None) or {}).get(adapter)


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter by file key.

    Args:
        state_dict: take the values from here (gathered by FSDP or DeepSpeed), not from the model.
        save_embedding_layers: True, False, or "auto": when they are targeted or were resized.

    Raises:
        AdapterNotFoundError: no such adapter.
        AdapterKeyError: `state_dict` lacks one of its tensors.
    """
    parts, prefix, base = parts_of(model, adapter_name)
    given = None if state_dict is None else {without_wrappers(k): v for k, v in state_dict.items()}
    config = config_of(getattr(model, "_orig_mod", model), adapter_name)
    if given is not None and parts.prompt is not None:
        parts, given = with_values(parts, given, adapter_name), None
    out: dict[str, Tensor] = {}
    for entry in entries(parts, adapter_name, prefix):
        if given is not None and entry.memory not in given:
            raise AdapterKeyError(f"The state dict lacks '{entry.memory}' of adapter '{adapter_name}'.")
        value = entry.tensor if given is None else given[entry.memory]
        if entry.layer is not None:
            value = entry.layer.methods[adapter_name].exported(entry.layer, entry.container, value, config)
        out[entry.file] = value
    for name, tensor in base_tensors(base, parts, config, save_embedding_layers).items():
        out[f"{prefix}{name}"] = tensor if given is None else given.get(f"{prefix}{name}", tensor)
    return out


def with_values(parts: Parts, given: dict[str, Tensor], adapter: str) -> Parts:
    """The prompt and modules to save of an adapter with the values that a state dict has for them."""
    here = copy.deepcopy(parts)
    owners: dict[str, nn.Module] = {f"{here.prompt.prefix}.{adapter}": here.prompt}  # type: ignore[union-attr,dict-item]
    owners |= {f"{here.prefix}{key}": w for key, w in here.wrappers.items()}
    for path, owner in owners.items():
        for name, tensor in owner.state_dict(keep_vars=True).items():
            key = f"{path}.{name}"
            if key in given:
                tensor.data = given[key].detach()
            elif f".{adapter}." in f"{key}.":
                raise AdapterKeyError(f"The state dict lacks '{key}' of adapter '{adapter}'.")
    return here


def base_tensors(base: nn.Module, parts: Parts, config: Any, save_embedding_layers: str | bool) -> dict[str, Tensor]:
    """Tensors of the base model that are saved with an adapter: trained biases and changed embeddings."""
    out: dict[str, Tensor] = {}
    bias = getattr(config, "bias", "none")
    if bias == "all":
        out |= {name: p for name, p in base.named_parameters() if "bias" in name and not _is_added(name, parts)}
        out |= {name: b for name, b in _biases(parts).items() if name in out}
    elif bias != "none":
        out |= _biases(parts)
    return out | embeddings(base, config, save_embedding_layers)


def _biases(parts: Parts) -> dict[str, Tensor]:
    """Biases of the adapted layers, as they are without what is merged."""
    biases = {f"{key}.base_layer.bias": unmerged(layer)[1] for key, layer in parts.layers.items()}
    return {name: b for name, b in biases.items() if b is not None}


def _is_added(name: str, parts: Parts) -> bool:
    return any(name.startswith(f"{key}.") and not name.startswith(f"{key}.base_layer.") for key in parts.layers)


def embeddings(base: nn.Module, config: Any, save: str | bool) -> dict[str, Tensor]:
    targets = getattr(config, "target_modules", None)
    targeted = False
    if isinstance(targets, str) and targets != "all-linear":
        targeted = any(k.endswith(EMBEDDING_NAMES) and re.fullmatch(targets, k) for k, _ in base.named_modules())
    elif targets and not isinstance(targets, str):
        targeted = any(name in targets for name in EMBEDDING_NAMES)
    if save == "auto":
        tokens = any(getattr(config, f, None) is not None for f in ("trainable_token_indices", "token_indices"))
        if targeted and not tokens:
            warn("Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.")
            save = True
        else:
            save = resized_vocabulary(base, config)
    if not save:
        return {}
    if not hasattr(base, "get_input_embeddings"):
        warn("Could not identify embedding layer(s) because the model is not a 🤗 transformers model.")
        return {}
    model: Any = base
    layers = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    out: dict[str, Tensor] = {}
    for key, module in base.named_modules():
        if isinstance(module, AdapterLayer):
            if any(module is m or module.base_layer is m for m in layers):
                out |= {f"{key}.base_layer.{n}": p for n, p in module.base_layer.named_parameters()}
                out[f"{key}.base_layer.weight"] = unmerged(module)[0]
        elif not targeted and any(module is m for m in layers):
            out |= {f"{key}.{n}": p for n, p in module.named_parameters()}
    return out


def resized_vocabulary(base: nn.Module, config: Any) -> bool:
    """Whether the vocabulary differs from that of a local copy of the model's origin. Never asks the network."""
    import json
    import os

    origin = getattr(config, "base_model_name_or_path", None) or base.__dict__.get("name_or_path")
    size = getattr(getattr(base, "config", None), "vocab_size", None)
    path = os.path.join(origin, "config.json") if origin else ""
    if size is None or not os.path.isfile(path):
        return False
    with open(path) as f:
        before = json.load(f).get("vocab_size")
    if before is None or before == size:
        return False
    warn("Setting `save_embedding_layers` to `True`: the vocabulary has another size than the base model's had.")
    return True


def base_fingerprint(model: nn.Module, adapter: str) -> dict:
    parts, _, _ = parts_of(model, adapter)
    return fingerprint(parts.layers, with_values=not changes_base(parts, config_of(model, adapter)))


def changes_base(parts: Parts, config: Any) -> bool:
    return any(layer.method.inits_from_weight(config) for layer in parts.layers.values())


# into a model


def renamed(tensors: dict[str, Tensor], mapping: dict[str, str] | None) -> dict[str, Tensor]:
    """Keys rewritten by the first {regex: replacement} that fits what follows the wrapper's prefix."""
    if not mapping:
        return tensors
    out = {}
    for key, tensor in tensors.items():
        prefix = next((p for p in (WRAPPED, PROMPT_WRAPPED) if key.startswith(p)), "")
        rest = key[len(prefix) :]
        for pattern, replacement in mapping.items():
            new, n = re.subn(pattern, replacement, rest)
            if n:
                rest = new
                break
        out[prefix + rest] = tensor
    return out


class Load:
    """One checkpoint on its way into a model. `fill` puts it into the parts that carry the adapter.

    Everything is checked before the first value is written.
    """

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

    def heads(self) -> dict[str, nn.Module]:
        """Modules to save whose first dimension differs from the base's: heads with another number of labels."""
        names = getattr(self.config, "modules_to_save", None)
        if not names:
            return {}
        made: dict[str, nn.Module] = {}
        prefix = PROMPT_WRAPPED if self.config.is_prompt_learning else WRAPPED
        for key, module in self.model.named_modules():
            if matches(key, names) is None or ".modules_to_save." in f".{key}.":
                continue
            bare: Any = uncovered(module)
            original = getattr(bare, "original_module", bare)
            shapes = {n: p.shape for n, p in original.named_parameters()}
            stored = {n: self.tensors[k].shape for n in shapes if (k := f"{prefix}{key}.{n}") in self.tensors}
            other = {n: s for n, s in stored.items() if s != shapes[n] and s[1:] == shapes[n][1:]}
            if other:
                made[key] = resized(original, other)
        return made

    def fill(self, parts: Parts) -> None:
        self._check_base(parts)
        names = set(self.tensors)
        bare = not any(n.startswith("base_model.") for n in names)
        found: list[tuple[Entry, str]] = []
        mismatched = []
        for entry in entries(parts, self.adapter, "" if bare else parts.prefix):
            name = find(entry, names)
            if name is None:
                self.report.missing_keys.append(entry.file)
                continue
            if self.tensors[name].shape != entry.tensor.shape and entry.layer is not None:
                self.tensors[name] = entry.layer.method.imported(
                    entry.layer, entry.container, entry.tensor, self.tensors[name], self.config
                )
            if self.tensors[name].shape != entry.tensor.shape:
                mismatched.append((name, self.tensors[name].shape, entry.tensor.shape))
            else:
                found.append((entry, name))
        used = {name for _, name in found} | {name for name, _, _ in mismatched}
        base = self._base_tensors(names - used, "" if bare else parts.prefix, mismatched)
        self.report.unexpected_keys = sorted(names - used - set(base))
        self._complain(mismatched)
        for entry, name in found:
            entry.assign(self.tensors[name])
        for name, target in base.items():
            target.data.copy_(spread_as(target, self.tensors[name]))
        self.report.loaded = sorted(name for _, name in found)
        self.report.base = sorted(base)
        complete(parts, self.adapter, self.config)

    def _base_tensors(self, names: set[str], prefix: str, mismatched: list) -> dict[str, Tensor]:
        """Those of `names` that are parameters of the base model."""
        if not names:
            return {}
        held: dict[str, Tensor] = {}
        for path, p in self.model.named_parameters(remove_duplicate=False):
            held[prefix + path] = p
            if ".base_layer." not in path:  # the layer may be about to be wrapped
                stem, _, leaf = path.rpartition(".")
                held[f"{prefix}{stem}.base_layer.{leaf}"] = p
        out = {n: held[n] for n in names if n in held}
        for name in [n for n in out if out[n].shape != self.tensors[n].shape]:
            mismatched.append((name, self.tensors[name].shape, out.pop(name).shape))
        return out

    def _check_base(self, parts: Parts) -> None:
        if not self.fingerprint:
            return
        now = fingerprint(parts.layers, with_values=not changes_base(parts, self.config))
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


SETTLED = {f.name for f in fields(PeftConfig)} | {  # by the tensors that there are, or of no weight once they are there
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
}  # fmt: skip


def say_kept(adapter: str, path: str, here: Any, there: Any) -> None:
    """Warn of what a file's config says that an adapter of the model, which only gets its values, does not do."""
    ours, theirs = here.saved_dict(), there.saved_dict()
    left = SETTLED | set(here.results)  # which are taken over
    names = [n for n in ours if n not in left and "init" not in n and (ours[n] or None) != (theirs[n] or None)]
    if names:
        differ = ", ".join(f"{n} ({ours[n]!r}, in the file {theirs[n]!r})" for n in names)
        warn(
            f"Adapter '{adapter}' gets the values of {path} and keeps its own config, which differs: {differ}. To take "
            "that over as well, delete_adapter() it before loading, or use hotswap_adapter() (LoRA).",
            PeftWarning,
        )


def some(items: list[str], most: int = 8) -> str:
    """A list in full, or its beginning and how many more there are."""
    shown = ", ".join(items[:most])
    return f"[{shown}]" if len(items) <= most else f"[{shown}, … and {len(items) - most} more]"


def resized(module: nn.Module, shapes: dict[str, Any]) -> nn.Module:
    """A copy of `module` whose parameters of those names have those shapes, uninitialised."""
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


def complete(parts: Parts, adapter: str, config: Any) -> None:
    """Give initial values to what a checkpoint did not fill: tensors that are never saved, or were missing."""
    for key, layer in parts.layers.items():
        if not any([slot.tensor.is_meta for slot in layer.slots(adapter)]) or layer.site.on_meta:
            continue
        empty = [t for t in layer.tensors(adapter, transient=True) if t[-1].is_meta]
        spare = AdapterLayer(layer.site, layer.method, layer.routing)
        add_adapter(spare, adapter, config.at(key), parts.shared, on_meta=False, upcast=True)
        values = {(container, path): t for container, path, _, _, t in spare.tensors(adapter, transient=True)}
        for container, path, owner, attribute, tensor in empty:
            Entry("", "", (), owner, attribute, tensor, layer=layer).assign(values[container, path])


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
    load = Load(base, config_of(model, adapter_name), adapter_name, loaded, strict, None, ignore_mismatched_sizes)
    load.fill(parts)
    return load.report


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base model's tensors under their original names, without adapters."""
    return {original(k): v for k, v in _base(model).state_dict().items() if not is_added(_base(model), k)}


def set_base_model_state_dict(model: nn.Module, state_dict: dict[str, Tensor], strict: bool = True) -> Any:
    """Load tensors under their original names into the base model.

    Raises:
        RuntimeError: keys are missing or unexpected (if strict), or shapes differ.
    """
    base = _base(model)
    names = {original(k): k for k in base.state_dict() if not is_added(base, k)}
    missing = [k for k in names if k not in state_dict]
    unexpected = [k for k in state_dict if k not in names]
    if strict and (missing or unexpected):
        text = f"Missing key(s) in state_dict: {missing}. " if missing else ""
        text += f"Unexpected key(s) in state_dict: {unexpected}." if unexpected else ""
        raise RuntimeError(f"Error(s) in loading the base model: {text}")
    result = base.load_state_dict({names[k]: v for k, v in state_dict.items() if k in names}, strict=False)
    return type(result)(missing, unexpected)


def _base(model: nn.Module) -> nn.Module:
    model = getattr(model, "_orig_mod", model)
    tuner = account_of(model)
    return tuner.model if tuner is not None else model


def is_added(base: nn.Module, key: str) -> bool:
    """Whether a state dict key belongs to an adapter: the first adapter layer or wrapper on its path decides."""
    module: Any = base
    parts = key.split(".")
    for i, part in enumerate(parts):
        if isinstance(module, AdapterLayer):
            if part != "base_layer":
                return True
        elif isinstance(module, ModulesToSaveWrapper) and part != "original_module":
            return True
        if i == len(parts) - 1:
            return False
        module = module._modules.get(part)
        if module is None:
            return False
    return False


def original(key: str) -> str:
    return re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", key)
