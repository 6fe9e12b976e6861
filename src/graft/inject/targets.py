# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""The meaning of a config's targets in a model: defaults by architecture, "all-linear", tied modules, parameters.

A parameter of a module with a forward of an unknown kind (a stack of experts, `in_proj_weight` of an attention) is a
target with an op that cannot look inside. While the module runs, a tensor for W + ΔW replaces the parameter
(`kernels/summed.py`). Rows of a mixed batch are refused there, and dropout drops the same inputs for all rows, since
the module's use of its inputs is not known. If modules around a layer read its weight (`inject/survey.py` finds that in
their sources), they read the weight with the adapters' updates.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from graft.config.base import PeftConfig
from graft.config.fields import MIXERS, Targeted
from graft.core import merging
from graft.core.base_config import input_embeddings, model_type
from graft.core.carrier import carrier_of, layer_in
from graft.core.errors import ConfigError, UnsupportedLayerError, warn
from graft.core.method import Method
from graft.core.ops import find_op
from graft.core.site import Site
from graft.inject.beside import find_saved_entry
from graft.inject.match import COMPRESS_FROM, Matcher, TargetNames, find_unmatched, minimize_names
from graft.inject.report import InjectReport, Skipped
from graft.inject.survey import ModuleTree, get_site, get_type_name, is_linear, make_parameter_site, skip_empty_carriers
from graft.storage.experts import ExpertBlock
from graft.storage.find import DENSE, find_store, innermost

ALL_LINEAR = "all-linear"
DUMMY = "dummy-target-modules"  # inject into no module
EMBEDDING_NAMES = ("embed_tokens", "lm_head")
HEAD_NAMES = ("score", "classifier")


def resolve_targets(cfg: Targeted, method: type[Method], model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Complete `cfg.target_modules` in place.

    None becomes the model's defaults. With `target_parameters` it stays None, or becomes an empty set if PEFT's config
    of that method has no such field. "all-linear", in any case of letters, becomes the paths of all linear layers
    except the output head. Any other regex stays. 20 or more names become the shortest suffixes that select the same
    modules, if the method allows that (`compresses_targets`) and they are fewer.

    Raises:
        ConfigError: no targets, and no defaults for this model type.
    """
    if cfg.target_modules is None and getattr(cfg, "target_parameters", None):
        if "target_parameters" in cfg.beyond:
            cfg.target_modules = set()  # for a file without names PEFT would use its defaults
        return
    if cfg.target_modules is None:
        defaults = method.default_targets(model)
        # the one model with such mixers that PEFT's tables know
        if defaults is None and "nemotron_h" in method.targets:
            defaults = MIXERS.get(model_type(model))
        if defaults is None:
            known = hasattr(cfg, "target_parameters") and "target_parameters" not in cfg.beyond  # in PEFT's words
            what = "`target_modules` or `target_parameters`in" if known else "`target_modules` in"
            raise ConfigError(
                f"Please specify {what} `peft_config`: there are no defaults for model_type '{model_type(model)}'."
            )
        cfg.target_modules = defaults if isinstance(defaults, str) else set(defaults)
    if isinstance(cfg.target_modules, str):
        if cfg.target_modules.lower() != ALL_LINEAR:
            return
        cfg.target_modules = list_linear_layers(cfg, model, modules)
    if len(cfg.target_modules) >= COMPRESS_FROM and method.compresses_targets:
        ends = TargetNames(cfg.target_modules)
        shorter = minimize_names(cfg.target_modules, [k for k in modules if ends.find(k) is None])
        cfg.target_modules = min(cfg.target_modules, shorter, key=len)


def list_linear_layers(cfg: PeftConfig, model: object, modules: dict[str, nn.Module]) -> set[str]:
    """Return the paths of all linear layers except the output head, and except modules that wrap it.

    For SEQ_CLS, if the model has no output embeddings, the head is the first of `HEAD_NAMES` (`score`, `classifier`)
    that is a module of the model. A model without `get_output_embeddings` has no head: all linear layers are returned.
    """
    head: nn.Module | None = None
    if hasattr(model, "get_output_embeddings"):
        head = skip_empty_carriers(model.get_output_embeddings())
        if head is None and cfg.task_type == "SEQ_CLS":
            head = next((getattr(model, n) for n in HEAD_NAMES if isinstance(getattr(model, n, None), nn.Module)), None)
    return {key for key, m in modules.items() if is_linear(m) and all(inner is not head for inner in m.modules())}


def find_weight(module: nn.Module) -> nn.Parameter | None:
    """Return the weight Parameter of a module, from beneath layers and wrappers; None if it has none, or only a tensor
    that is no registered parameter.

    For a layer that a merge untied, it is the weight that it was tied to.
    """
    layer, carrier = layer_in(module), carrier_of(module)
    if layer is not None and (left := merging.find_tied_weight(layer)) is not None:
        return left
    if carrier is not None:
        return find_weight(carrier.base_module)
    return module._parameters.get("weight")


def find_embedding_path(model: object, tree: ModuleTree) -> str | None:
    """Return the path of a model's input embedding; None if the model does not say which it is, or the survey does not
    show it.
    """
    embedding = skip_empty_carriers(input_embeddings(model))
    return None if embedding is None else tree.paths.get(embedding)


def find_tied_modules(model: object, tree: ModuleTree) -> tuple[str | None, list[str]]:
    """Return the path of the input embedding, and the paths of all other modules with its weight tensor.

    Without an embedding, or if it has no weight, the list is empty. The output head also counts as tied if the config
    sets `tie_word_embeddings` and either the embedding is on the meta device or the head's weight is on another device.
    """
    path, modules = find_embedding_path(model, tree), tree.modules
    embedding = modules.get(path) if path else None
    weight = find_weight(embedding) if embedding is not None else None
    if weight is None:
        return path, []
    head = None
    ties = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if ties and hasattr(model, "get_output_embeddings"):
        head = skip_empty_carriers(model.get_output_embeddings())
        head_weight = None if head is None else find_weight(head)
        if not weight.is_meta and (head_weight is None or head_weight.device == weight.device):
            head = None  # a move to meta, or to several devices, unties weights that a model on one device shares
    return path, [k for k, m in modules.items() if k != path and (m is head or find_weight(m) is weight)]


def expand_tied_targets(cfg: Any, method: type[Method], model: nn.Module, tree: ModuleTree) -> dict[str, str]:
    """Rewrite a config in place so that it names the embedding instead of modules tied to it.

    Returns {tied path: embedding's path}. Tied modules leave `modules_to_save` or a list of `target_modules`, depending
    on the field that names one of the group, and the embedding is added. A regex that misses the embedding gets its
    path as an alternative.

    Returns {} and changes nothing in three cases:

    - There are no tied modules or no embedding. Warns if `ensure_weight_tying` is set; the text names token rows if the
      config has some.
    - The field is not set, and no method with `always_tied` targets the embedding. Warns if the config names one of the
      group.
    - The config names none of the group. Always warns.
    """
    ensure = getattr(cfg, "ensure_weight_tying", False)
    embedding, tied = find_tied_modules(model, tree)
    if not tied or embedding is None:
        if ensure:
            text = "You have requested `ensure_weight_tying`, but no tied modules were found in the model"
            if getattr(cfg, "trainable_token_indices", None):
                text += ": ensure_weight_tying=True but the model does not have tied weights; token rows train apart"
            warn(text)
        return {}
    group = [embedding, *tied]
    targets = TargetNames(cfg.target_modules)
    targeted = any(targets.find(k) is not None for k in group)
    names = list(getattr(cfg, "modules_to_save", None) or ())
    saved = any(find_saved_entry(k, names) is not None for k in group)
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
        other_names = [n for n in names if not any(k.endswith(n) for k in tied)]
        cfg.modules_to_save = other_names + [embedding] * (embedding not in other_names)
    if targeted:
        if isinstance(cfg.target_modules, str):
            if targets.find(embedding) is None:
                cfg.target_modules = f"(?:{cfg.target_modules}|^{embedding}$)"
        else:
            other_targets = {t for t in cfg.target_modules if not any(k == t or k.endswith(f".{t}") for k in tied)}
            cfg.target_modules = other_targets | {embedding}
    return {k: embedding for k in tied}


ParameterMatches = list[tuple[str, str, str]]  # path of a parameter, path of its module, its name there
UnmatchedEntries = dict[str, list[tuple[str, int]]]  # entries of a config that name nothing, each with similar names


def find_named_parameters(
    cfg: Any, root: Any, tree: ModuleTree, report: InjectReport
) -> tuple[ParameterMatches, UnmatchedEntries]:
    """Return the parameters that `target_parameters` names, as (path, module's path, name) in the model's order, and
    the entries that match none, with similar names.

    Parametrized tensors and packed expert stacks count as parameters. Parameters of layers around a module do not.

    Args:
        root: the model, without layers around it.
        report: gets the parameters that another field takes out, in `skipped`.

    Raises:
        ConfigError: it names a parameter of `root` itself.
    """
    matcher = Matcher(cfg, parameters=True)
    for name in root._parameters:
        if matcher.targets.find(name) is not None:
            raise ConfigError(
                f"Targeting an nn.Parameter on the top-level module is not supported (parameter '{name}'). Adapter "
                f"'{report.adapter}': put the module into another one."
            )
    matches: ParameterMatches = []
    used: set[str] = set()
    paths: list[str] = []
    for key, module in tree.modules.items():
        base = innermost(module)
        names = dict.fromkeys([*base._parameters, *getattr(base, "parametrizations", ()), *ExpertBlock(base).packed])
        for name in names:
            path = f"{key}.{name}"
            verdict = matcher(path)
            paths.append(path)
            if verdict.entry is None:
                continue
            used.add(verdict.entry)
            if verdict.outcome != "matched":
                why = verdict.why.replace("target_modules", "target_parameters")
                report.skipped.append(Skipped(path, "Parameter", why))
                continue
            matches.append((path, key, name))
    return matches, find_unmatched(cfg.target_parameters, used, paths)


def resolve_parameter(
    key: str, name: str, tree: ModuleTree, adapted: Collection[str], adapter: str
) -> tuple[str, Site]:
    """Return (path, site) for a parameter of the module at path `key`. The site is of the innermost base module there.

    The `weight` of a linear layer with another store than DENSE, such as a packed or sharded one, gives `key` and the
    site of the layer. This comes before any check.

    Args:
        adapted: paths of the modules that the adapter adapts.

    Raises:
        UnsupportedLayerError: the parameter cannot be adapted apart from its module (`why_not_parameter`). The module
            counts as taken if its path is in `adapted`, or if it is in a carrier and no key of `tree.nests`.
    """
    module, path = tree.modules[key], f"{key}.{name}"
    base = innermost(module)
    if name == "weight" and find_op(base).linear and find_store(base) is not DENSE:
        # packed, adapted as a layer: the sum is the same, and nobody can put W + ΔW in the place of codes
        return key, get_site(key, module, tree)
    is_taken = key in adapted or (carrier_of(module) is not None and key not in tree.nests)
    if (why := why_not_parameter(path, key, module, name, is_taken)) is not None:
        raise UnsupportedLayerError(f"{why}. Adapter '{adapter}'.")
    return path, make_parameter_site(key, base, name, tree)


def why_not_parameter(path: str, key: str, module: nn.Module, name: str, is_taken: bool) -> str | None:
    """Return why a parameter cannot be adapted, as a sentence without period; None if it can. The first case counts:

    - `is_taken`.
    - It is packed: None if graft knows how its module uses it, else a reason.
    - It is no parameter of the innermost module, so it is parametrized.
    - It is None or has not two or three dimensions.

    Args:
        is_taken: the module is adapted or trains whole.
    """
    base: nn.Module = innermost(module)
    if is_taken:
        kind = get_type_name(module)
        return (
            f"Trying to wrap an `nn.Parameter` of layer '{key}' of type {kind}, which is not a valid target: the "
            "module itself is adapted or trained whole. Take it out of target_modules, or its parameter out of "
            "target_parameters"
        )
    if name in (block := ExpertBlock(base)).packed:
        if block.can_run:
            return None
        return (
            f"The stack '{path}' is packed, and graft does not know how a {get_type_name(module)} uses it: load the "
            "base model dequantized"
        )
    if name not in base._parameters:
        return (
            f"Parameter '{path}' is parametrized, so that each call computes it anew: make it a plain Parameter "
            "first, with torch.nn.utils.parametrize.remove_parametrizations"
        )
    if (p := base._parameters[name]) is not None and p.dim() in (2, 3):
        return None
    dims = 0 if p is None else p.dim()
    return f"Parameter '{path}' has {dims} dimensions, but only 2d and 3d are supported by target_parameters"
