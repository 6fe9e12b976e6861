# SPDX-License-Identifier: Apache-2.0
"""Whether an adapter file is whole: what its config says that it holds, against what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

from graft import CheckpointError, ConfigError
from graft.config.reading import Json
from graft.core.errors import some
from graft.files.base import Known
from graft.files.bases import fitted
from graft.files.names import kind_of
from graft.files.neutral import AdapterFile
from graft.inject.match import Matcher

HEADS = {"classifier", "score", "qa_outputs"}  # which PEFT adds to modules_to_save, of which a model has some


def check_whole(adapter: AdapterFile, base: Known | None = None) -> None:
    """Raise CheckpointError if an adapter lacks something, see `gaps`."""
    if lost := gaps(adapter, base):
        raise CheckpointError(
            f"{adapter.path} is not whole: it lacks {some(lost, 3)}. Save or download it again, or take what it lacks "
            "out of its adapter_config.json."
        )


def gaps(adapter: AdapterFile, base: Known | None = None) -> list[str]:
    """Return in words what an adapter lacks of what its config says; [] if it is whole, as far as can be seen.

    Args:
        base: tells which modules the config's targets select.
    """
    if not adapter.modules and not adapter.beside:
        return [] if adapter.unread else ["every tensor"]
    if "peft_type" not in adapter.config:
        return []
    known = None if base is None else fitted(base, adapter.modules)
    return [
        *of_factors(adapter),
        *of_whole_tensors(adapter, known),
        *([] if known is None else of_layers(adapter, known)),
    ]


def of_factors(adapter: AdapterFile) -> Iterator[str]:
    """Yield what modules lack beside A and B."""
    factors = {path: lora for path, lora in adapter.low_rank.items() if lora.kind != "experts"}
    if adapter.config.get("use_dora"):
        yield from (f"the magnitude of {path}" for path, lora in factors.items() if lora.magnitude is None)
    if adapter.config.get("lora_bias"):
        yield from (
            f"the bias of {path}" for path, lora in factors.items() if lora.bias is None and lora.kind != "embedding"
        )


def of_whole_tensors(adapter: AdapterFile, base: Known | None) -> Iterator[str]:
    """Yield the modules that were trained whole, the biases and the rows of embeddings that are not there."""
    config = adapter.config
    there = [f"{name}." for name in (*adapter.full, *adapter.modules)]
    saved = {name: any(f"{name}." in own for own in there) for name in config.get("modules_to_save") or ()}
    has_head = any(saved.get(name) for name in HEADS)
    for name in (name for name, found in saved.items() if not found):
        if base is None:
            is_there = not (name in HEADS and has_head)
        else:
            is_there = any(module.endswith(name) for module in base.modules)
        if is_there:
            yield f"the module {name} of modules_to_save"
    if config.get("trainable_token_indices") and not adapter.rows:
        yield "the rows of trainable_token_indices"
    which = str(config.get("bias") or "none")
    if base is not None and which != "none":
        modules = base.modules if which == "all" else adapter.modules
        yield from (n for m in modules if (n := f"{m}.bias") in base.shapes and n not in adapter.full)


def of_layers(adapter: AdapterFile, base: Known) -> Iterator[str]:
    """Yield the modules that targets select, like those that have factors or in the same blocks, and that have none."""
    here = {kind_of(path) for path in adapter.modules}
    blocks = {kind.partition("#")[0] for kind in here if "#" in kind}
    modules = [module for module in base.modules if f"{module}.weight" in base.shapes]
    for field, names in (("target_modules", modules), ("target_parameters", [*base.shapes])):
        selected = selection(adapter, field, names)
        used = {selected[path] for path in adapter.modules if path in selected}
        for path, entry in selected.items():
            start, number, _ = kind_of(path).partition("#")
            if path not in adapter.modules and (
                kind_of(path) in here or (number and start in blocks and entry not in used)
            ):
                yield path


def selection(adapter: AdapterFile, field: str, names: list[str]) -> dict[str, str | None]:
    """Return the names that a field of targets selects, with the entry that does."""
    config, targets = adapter.config, adapter.config.get(field)
    if "adapter_layers" in config or not (isinstance(targets, str) or (isinstance(targets, list) and targets)):
        return {}
    others = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    fields: Json = {name: config.get(name) for name in others}
    fields |= {"target_modules": None, "target_parameters": None, field: ".*" if targets == "all-linear" else targets}
    try:
        matcher = Matcher(SimpleNamespace(**fields), field == "target_parameters")
    except (ConfigError, TypeError):  # of which another error tells
        return {}
    verdicts = {name.removesuffix(".weight"): matcher(name) for name in names}
    return {name: verdict.entry for name, verdict in verdicts.items() if verdict.outcome == "matched"}
