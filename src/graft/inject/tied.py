# SPDX-License-Identifier: Apache-2.0
"""Modules tied to the input embedding (they share its weight), and how a config adapts them together."""

from __future__ import annotations

from typing import Any

from torch import nn

from graft.core import merging
from graft.core.carrier import carrier_of, layer_in
from graft.core.errors import warn
from graft.core.method import Method
from graft.inject.match import Names
from graft.inject.saved import matches
from graft.inject.survey import Tree, uncovered


def weight_of(module: nn.Module) -> nn.Parameter | None:
    """Return the weight of a module, also of one beneath adapter layers and wrappers."""
    layer, carrier = layer_in(module), carrier_of(module)
    if layer is not None and (left := merging.tied_weight(layer)) is not None:
        return left
    if carrier is not None:
        return weight_of(carrier.base_module)
    return module._parameters.get("weight")


def embedding_path(model: Any, tree: Tree) -> str | None:
    """Return the path of a model's input embedding; None if the model does not tell."""
    if not hasattr(model, "get_input_embeddings"):
        return None
    try:
        embedding = uncovered(model.get_input_embeddings())
    except NotImplementedError:
        return None
    return None if embedding is None else tree.paths.get(embedding)


def tied_to_embedding(model: Any, tree: Tree) -> tuple[str | None, list[str]]:
    """Return the path of the input embedding, and those of the other modules that hold its weight."""
    path, modules = embedding_path(model, tree), tree.modules
    embedding = modules.get(path) if path else None
    weight = weight_of(embedding) if embedding is not None else None
    if weight is None:
        return path, []
    head = None
    ties = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if ties and hasattr(model, "get_output_embeddings"):
        head = uncovered(model.get_output_embeddings())
        own = None if head is None else weight_of(head)
        if not weight.is_meta and (own is None or own.device == weight.device):
            head = None  # a move to meta, or to several devices, unties weights that a model on one device shares
    return path, [k for k, m in modules.items() if k != path and (m is head or weight_of(m) is weight)]


def expand(cfg: Any, method: type[Method], model: nn.Module, tree: Tree) -> dict[str, str]:
    """Rewrite a config so that it names the embedding itself. Return the tied modules: {path: embedding's path}.

    Tied modules leave target_modules and modules_to_save: they follow the embedding.
    """
    ensure = getattr(cfg, "ensure_weight_tying", False)
    embedding, tied = tied_to_embedding(model, tree)
    if not tied or embedding is None:
        if ensure:
            text = "You have requested `ensure_weight_tying`, but no tied modules were found in the model"
            if getattr(cfg, "trainable_token_indices", None):
                text += ": ensure_weight_tying=True but the model does not have tied weights; token rows train apart"
            warn(text)
        return {}
    group = [embedding, *tied]
    targets = Names(cfg.target_modules)
    targeted = any(targets.find(k) is not None for k in group)
    names = list(getattr(cfg, "modules_to_save", None) or ())
    saved = any(matches(k, names) is not None for k in group)
    if not ensure and not (method.always_tied and targets.find(embedding) is not None):
        if targeted or saved:
            can = hasattr(cfg, "ensure_weight_tying")
            why = "`ensure_weight_tying` is not set to True" if can else "no implementation exists to tie the adapters"
            warn(
                f"Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but {why}. Merging "
                "will give the tied layers different weights."
            )
        return {}
    if not (targeted or saved):
        warn(
            "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` or "
            "`target_modules`"
        )
        return {}
    if saved:
        kept = [n for n in names if not any(k.endswith(n) for k in tied)]
        cfg.modules_to_save = kept + [embedding] * (embedding not in kept)
    if targeted:
        if isinstance(cfg.target_modules, str):
            cfg.target_modules = (
                f"(?:{cfg.target_modules}|^{embedding}$)" if targets.find(embedding) is None else cfg.target_modules
            )
        else:
            kept_targets = {t for t in cfg.target_modules if not any(k == t or k.endswith(f".{t}") for k in tied)}
            cfg.target_modules = kept_targets | {embedding}
    return {k: embedding for k in tied}
