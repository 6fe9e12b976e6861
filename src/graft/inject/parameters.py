# SPDX-License-Identifier: Apache-2.0
"""The parameters that are targets themselves (`target_parameters`), and modules adapted along with a parameter."""

from __future__ import annotations

from typing import Any

from torch import nn

from graft.core.carrier import carrier_of
from graft.core.errors import ConfigError, UnsupportedLayerError
from graft.core.ops import find_op
from graft.core.site import Site
from graft.inject.match import Matcher, unmatched
from graft.inject.report import Skipped
from graft.inject.survey import COMPOSED, kind_of, parameter_site, site_of, uncovered
from graft.storage import DENSE, find_store, innermost


def children_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's children whose weights are adapted along with its own."""
    composed = COMPOSED.find(type(module))
    return () if composed is None else composed.children


def why_not_composed(module: nn.Module) -> str | None:
    """Say why a module whose weights are a parameter and those of children cannot be adapted; None for any other."""
    composed = COMPOSED.find(type(module))
    return None if composed is None else composed.why_not(module)


Found = list[tuple[str, str, str]]  # path of a parameter, path of its module, its name there
Idle = dict[str, list[tuple[str, int]]]  # entries of a config that name nothing, each with similar names


def parameters_of(job: Any) -> tuple[dict[str, Site], Idle]:
    """Return the sites of the parameters that `target_parameters` names, by path; and the entries that name none."""
    if job.steps is not None:
        return job.steps.parameters(job)  # type: ignore[no-any-return]
    found, idle = search_parameters(job, job.cfg)
    return dict(parameter_target(job, path, name) for _, path, name in found), idle


def search_parameters(job: Any, cfg: Any) -> tuple[Found, Idle]:
    """Return the parameters that a config names, in the model's order; and the entries that name none."""
    if job.keys is not None:
        raise ConfigError(
            "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`: leave "
            f"state_dict out (adapter '{job.adapter}'), and load the values afterwards."
        )
    matcher = Matcher(cfg, parameters=True)
    for name in uncovered(job.model)._parameters:  # type: ignore[union-attr]
        if matcher.targets.find(name) is not None:
            raise ConfigError(
                f"Targeting an nn.Parameter on the top-level module is not supported (parameter '{name}'). Adapter "
                f"'{job.adapter}': put the module into another one."
            )
    found: Found = []
    used: set[str] = set()
    paths: list[str] = []
    for key, module in job.tree.modules.items():
        base = innermost(module)
        names = [*base._parameters, *getattr(base, "parametrizations", ())]
        for name in names:
            path = f"{key}.{name}"
            verdict = matcher(path)
            paths.append(path)
            if verdict.entry is None:
                continue
            used.add(verdict.entry)
            if verdict.outcome != "matched":
                why = verdict.why.replace("target_modules", "target_parameters")
                job.report.skipped.append(Skipped(path, "Parameter", why))
                continue
            found.append((path, key, name))
    return found, unmatched(cfg.target_parameters, used, paths)


def parameter_target(job: Any, key: str, name: str) -> tuple[str, Site]:
    """Return the site of a parameter of the module at path `key`, and the path that it stands under.

    Raises:
        UnsupportedLayerError: the parameter cannot be adapted by itself.
    """
    module, path = job.tree.modules[key], f"{key}.{name}"
    base = innermost(module)
    if is_packed_layer(base, name):
        return key, site_of(key, module, job.tree)
    check_parameter(job, path, key, module, name)
    return path, parameter_site(key, base, name, job.tree)


def is_packed_layer(base: nn.Module, name: str) -> bool:
    """Return True if a parameter is the packed weight of a linear layer, which is adapted as a layer: the sum is the
    same, and nobody can put W + ΔW in its place."""
    return name == "weight" and find_op(base).linear and find_store(base) is not DENSE


def check_parameter(job: Any, path: str, key: str, module: nn.Module, name: str) -> None:
    """Raise UnsupportedLayerError unless the parameter can be adapted by itself."""
    base: Any = innermost(module)
    why = None
    if (carrier_of(module) is not None and key not in job.tree.nests) or key in job.sites:
        kind = kind_of(module)
        why = (
            f"Trying to wrap an `nn.Parameter` of layer '{key}' of type {kind}, which is not a valid target: the "
            "module itself is adapted or trained whole. Take it out of target_modules, or its parameter out of "
            "target_parameters"
        )
    elif name not in base._parameters:
        why = (
            f"Parameter '{path}' is parametrized, so that it is computed anew in each call: make it one of its own "
            "first, with torch.nn.utils.parametrize.remove_parametrizations"
        )
    elif base._parameters[name] is None or base._parameters[name].dim() not in (2, 3):
        dims = 0 if base._parameters[name] is None else base._parameters[name].dim()
        why = f"Parameter '{path}' has {dims} dimensions, but only 2d and 3d are supported by target_parameters"
    if why is not None:
        raise UnsupportedLayerError(f"{why}. Adapter '{job.adapter}'.")
