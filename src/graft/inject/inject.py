# SPDX-License-Identifier: Apache-2.0
"""Put an adapter on a model, or say what that would do. One walk of the module tree; all or nothing."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from graft.config.base import matches_end
from graft.core.call import Call
from graft.core.errors import ConfigError, NoMatchingPeftModuleError, PeftWarning, UnsupportedLayerError, warn
from graft.core.layer import AdapterLayer
from graft.core.method import Method
from graft.core.shared import Shared
from graft.core.site import Site
from graft.inject import saved
from graft.inject.match import Matcher, Verdict, hint, unmatched
from graft.inject.report import InjectReport, Matched, Skipped
from graft.inject.saved import ModulesToSaveWrapper
from graft.inject.survey import Place, Tree, Wrapper, kind_of, never_called, site_of, survey
from graft.inject.targets import DUMMY, resolve_targets
from graft.inject.tied import expand, tied_to_embedding
from graft.inject.tokens import TrainableTokensWrapper, token_targets
from graft.methods.trainable_tokens import TrainableTokens, TrainableTokensConfig
from graft.prompts.base import Prompt


@dataclass
class Parts:
    """What carries one adapter: layers and wrappers by path, what all layers share, a prompt."""

    layers: dict[str, AdapterLayer]
    wrappers: dict[str, Wrapper]
    shared: Shared | None = None
    prompt: Prompt | None = None

    @property
    def prefix(self) -> str:
        """What keys of a PeftModel begin with: prompts are put into the model as it is, without a tuner around it."""
        return "base_model.model." if self.prompt is None else "base_model."


@dataclass
class Plan:
    """What an injection is about to do."""

    tree: Tree
    cfg: Any  # resolved: a copy of the user's config with targets and the like filled in
    sites: dict[str, Site]
    methods: dict[str, Method]  # one for each of them, and for those that follow
    saved: list[str]  # paths of modules_to_save
    report: InjectReport
    tokens: dict[str, list[int]]  # embeddings some of whose rows train
    followers: dict[str, str]  # modules on the embedding's weight that do as it does, and its path
    row_followers: dict[str, str]  # those of them in which the same rows train
    biases: list[nn.Parameter]  # of the base, that train

    def count_saved(self) -> None:
        """Note in the report the modules that would be trained whole."""
        for key in self.saved:
            module = self.tree.modules[key]
            size = sum(p.numel() for p in module.parameters())
            self.report.modules_to_save.append(Matched(key, type(module).__name__, size))


def survey_and_match(
    model: nn.Module,
    config: Any,
    method: type[Method],
    adapter: str,
    keys: Iterable[str] | None = None,
    tree: Tree | None = None,
) -> Plan:
    """Everything about an injection that can be known, and go wrong, before the model is touched."""
    tree = tree or survey(model)
    cfg = copy.copy(config)
    if keys is None:
        resolve_targets(cfg, method, model, tree.modules)
    method.prepare(cfg, model)
    followers = expand(cfg, method, model, tree.modules) if keys is None else {}
    report = InjectReport(adapter, cfg.peft_type.value, base_parameters=tree.parameters)
    outcomes: dict[str, Verdict] = {}
    chosen = set(keys) if keys is not None else None
    matcher = Matcher(cfg) if chosen is None else None
    sites: dict[str, Site] = {}
    for key, module in tree.modules.items():
        if matcher is not None:
            verdict = matcher(key)
        else:
            verdict = Verdict("matched" if key in chosen else "untargeted", key)  # type: ignore[operator]
        if key in followers and verdict.outcome == "matched":  # by a regex: it comes after its embedding
            verdict = Verdict("tied", verdict.entry)
        outcomes[key] = verdict
        if verdict.outcome == "matched":
            sites[key] = site_of(key, module, tree)
        elif verdict.entry is not None:
            report.skipped.append(Skipped(key, kind_of(module), verdict.why))
        elif not module._modules:
            report.untargeted[kind_of(module)] += 1
    if matcher is not None:
        report_on(cfg, matcher, outcomes, report)
    followed = {k: site_of(k, tree.modules[k], tree) for k, source in followers.items() if source in sites}
    adapted = {**sites, **followed}
    methods = {
        key: method.variant(cfg)(site, cfg.at(followers.get(key, key)), adapter) for key, site in adapted.items()
    }
    check_sites(methods, tree)
    wanted = modules_to_save_of(cfg, tree, report)
    for key in [*wanted, *(k for k, source in followers.items() if source in wanted)]:
        inside = [k for k in (*tree.layers, *tree.wrappers) if k.startswith(f"{key}.")]
        saved.refuse(key, tree.modules[key], inside, adapter)
    tokens = token_targets(cfg, model, tree.modules, adapter)
    row_followers = following_tokens(tokens, cfg, model, tree)
    check_tokens(tokens, row_followers, adapted, wanted, tree, adapter)
    biases = biases_of(cfg, model, [tree.modules[key] for key in adapted], wanted)
    report.other_trainable = sum(b.numel() for b in biases)
    return Plan(tree, cfg, sites, methods, wanted, report, tokens, followers, row_followers, biases)


def check_sites(methods: dict[str, Method], tree: Tree) -> None:
    """Raise unless all of these can be adapted."""
    for key, method in methods.items():
        site, adapter = method.site, method.name
        why = method.check() or never_called(key, tree)
        existing = tree.layers.get(key)
        if existing is not None and adapter in existing.methods:
            why = f"It already carries an adapter called '{adapter}': choose another name, or call unload() before"
        elif existing is not None and method.config not in existing.kinds:
            why = f"It already carries {type(next(iter(existing.methods.values()))).__name__} adapters"
        wrapper = tree.wrappers.get(key)
        if wrapper is not None:
            why = f"It is {wrapper.how} of adapter(s) {wrapper.adapters}"
        if why is not None:
            raise UnsupportedLayerError(
                f"Target module {key} ({site.type_name}) is not supported. {why}. Adapter '{adapter}' "
                f"({type(method).__name__}): take the module out with exclude_modules, or name other target_modules."
            )


def modules_to_save_of(cfg: Any, tree: Tree, report: InjectReport) -> list[str]:
    """The paths of the modules that are trained whole."""
    names = getattr(cfg, "modules_to_save", None) or ()
    wanted = [key for key in tree.modules if saved.matches(key, names) is not None] if names else []
    defaults = getattr(cfg, "_default_heads", ())
    missing = [n for n in names if n not in defaults and not any(key.endswith(n) for key in wanted)]
    say_unmatched("modules_to_save", unmatched(missing, set(), tree.modules), report)
    return wanted


def say_unmatched(name: str, entries: dict[str, list[tuple[str, int]]], report: InjectReport) -> None:
    """Warn of entries of a config's field that matched nothing, and note them in the report."""
    for entry, similar in entries.items():
        warn(f"{name} entry '{entry}' matched nothing{hint(similar)}", PeftWarning)
    prefix = "" if name == "target_modules" else f"{name}: "
    report.unmatched_targets.update({prefix + entry: similar for entry, similar in entries.items()})


def biases_of(cfg: Any, model: nn.Module, adapted: list[nn.Module], whole: list[str]) -> list[nn.Parameter]:
    """The base's biases that train. Those of modules trained whole do so in the adapter's copy."""
    bias = getattr(cfg, "bias", "none")
    if bias == "none":
        return []
    if bias == "all":
        inside = tuple(f"{key}." for key in whole)
        return [p for name, p in model.named_parameters() if "bias" in name and not name.startswith(inside)]
    # "<method>_only": those of the adapted layers
    layers = [getattr(module, "base_layer", module) for module in adapted]
    return [b for layer in layers if (b := getattr(layer, "bias", None)) is not None]


def check_tokens(
    tokens: dict[str, list[int]],
    followers: dict[str, str],
    adapted: dict[str, Site],
    saved_paths: list[str],
    tree: Tree,
    adapter: str,
) -> None:
    """Raise unless single rows of these modules, and of those that follow them, can train."""
    for key in dict.fromkeys((*tokens, *followers)):
        module = tree.modules[key]
        name = f"'{key}'" if key in tokens else f"'{key}', which follows '{followers[key]}' as it shares its weight"
        if key in saved_paths:
            raise ValueError(
                f"The embedding layer is already marked to be trained fully, either specify `trainable_token_indices` "
                f"or `modules_to_save` for {name}, not both. Adapter '{adapter}'."
            )
        why = None
        if key in adapted:
            why = f"adapter '{adapter}' has it in target_modules as well: take it out of one of the two"
        elif isinstance(module, AdapterLayer):
            why = f"it carries adapter(s) {module.adapters}: load '{adapter}' into another model"
        elif isinstance(module, ModulesToSaveWrapper):
            why = f"it is {module.how} of adapter(s) {module.adapters}: load '{adapter}' into another model"
        if why is not None:
            raise UnsupportedLayerError(
                f"trainable_token_indices cannot be applied to modules of type {type(module)}, {name}: {why}."
            )
    for key, indices in tokens.items():
        cfg = TrainableTokensConfig(token_indices=indices)
        why = TrainableTokens(site_of(key, tree.modules[key], tree), cfg, adapter).check()
        if why is not None:
            raise ConfigError(f"trainable_token_indices cannot be applied to '{key}': {why}.")


def report_on(cfg: Any, matcher: Matcher, outcomes: dict[str, Verdict], report: InjectReport) -> None:
    """Say what matched nothing: raise if that is everything, else warn and note it in the report."""
    verdicts = outcomes.values()
    found = {v.outcome for v in verdicts}
    targets = cfg.target_modules
    excluded = bool(found & {"excluded", "saved"})
    if "matched" not in found and DUMMY not in (targets if isinstance(targets, (set, list)) else (targets,)):
        raise NoMatchingPeftModuleError(f"{nothing_matched(cfg, outcomes, excluded)} Adapter '{report.adapter}'.")
    exclude = getattr(cfg, "exclude_modules", None)
    if exclude and not excluded:
        warn(
            f"You have passed exclude_modules={cfg.exclude_modules} but no modules were excluded. "
            "Names are whole paths or their last parts."
        )
    elif exclude and not isinstance(exclude, str):
        idle = [e for e in exclude if not any(k == e or k.endswith(f".{e}") for k in outcomes)]
        say_unmatched("exclude_modules", unmatched(idle, set(), outcomes), report)
    if matcher.indices:
        reached = {matcher.layer_of(k) for k, v in outcomes.items() if v.outcome == "matched"}
        idle = [str(i) for i in sorted(matcher.indices) if i not in reached]
        say_unmatched("layers_to_transform", {i: [] for i in idle}, report)
    if isinstance(targets, (set, list)) and DUMMY not in targets:
        used = {v.entry for v in verdicts if v.entry is not None}
        # an entry may be hidden behind a longer one that names the same modules
        left = [t for t in targets if t not in used and not any(k == t or k.endswith(f".{t}") for k in outcomes)]
        say_unmatched("target_modules", unmatched(left, used, outcomes), report)
    for name in getattr(cfg, "patterns", {}):
        matched = [k for k, v in outcomes.items() if v.outcome == "matched"]
        idle = sorted(p for p in getattr(cfg, name) or () if not any(matches_end(p, k) for k in matched))
        if idle:
            text = f"The following {name} keys did not match any targeted module and were ignored: {idle}."
            warn(text, RuntimeWarning)


def nothing_matched(cfg: Any, outcomes: dict[str, Verdict], excluded: bool) -> str:
    targets = cfg.target_modules
    left = any(v.outcome in ("untargeted", "layer") for v in outcomes.values())
    if excluded and not left:
        return (
            "All modules were excluded. This is likely unintended. "
            "Check your `target_modules`, `exclude_modules` and `modules_to_save` configuration."
        )
    if excluded:
        return (
            "No modules were targeted for adaptation. This might be caused by a combination of `target_modules` that "
            f"name nothing else and `exclude_modules` or `modules_to_save` that take out the rest. Targets: {targets}."
        )
    if not targets:
        return (
            "No `target_modules` passed but also no `target_parameters` found. "
            "Please check the values for these arguments."
        )
    text = f"Target modules {targets} not found in the base model. Please check the target modules and try again."
    if not isinstance(targets, str):
        for entry, similar in unmatched(targets, set(), outcomes).items():
            if similar:
                text += f" '{entry}' matched nothing{hint(similar)}"
    if getattr(cfg, "layers_to_transform", None) is not None:
        text += f" Note: You specified 'layers_to_transform': {cfg.layers_to_transform}."
        if cfg.layers_pattern is not None:
            text += f" You also specified 'layers_pattern': {cfg.layers_pattern}."
        text += " Make sure the indices exist, and that the layers are numbered directly below that name."
    return text


def inject(
    model: nn.Module,
    config: Any,
    method: type[Method],
    adapter: str,
    *,
    call: Call | None = None,
    shared: Shared | None = None,
    others: dict[str, Any] | None = None,
    upcast: bool = True,
    on_meta: bool = False,
    fill: Callable[[Parts], None] | None = None,
    keys: Iterable[str] | None = None,
    heads: dict[str, nn.Module] | None = None,
    tree: Tree | None = None,
) -> tuple[InjectReport, Parts]:
    """Put `adapter` on `model`, in place, inactive and frozen.

    Args:
        shared: what all layers share; filled in by methods that have such.
        others: configs of the adapters already there.
        upcast: train half-precision adapters in float32.
        on_meta: leave the adapter's tensors on the meta device.
        fill: loads the values, in place of initial ones. If it raises, nothing has happened.
        keys: adapt exactly these paths, whatever the config targets.
        heads: modules to use (instead of copies of the base's) for `modules_to_save`, by name.
        tree: a survey of the model, if one was just made.

    Returns:
        The account of what was done, and what now carries the adapter.

    Raises:
        NoMatchingPeftModuleError, UnsupportedLayerError, ConfigError: the model is as it was before the call.
    """
    shared = Shared() if shared is None else shared
    with collector_paused(), restructured(model, config, method) as changed:
        plan = survey_and_match(model, config, method, adapter, keys, None if changed else tree)
        parts = make(plan, method, adapter, call, shared, others or {}, upcast, on_meta, fill, heads)
        commit(plan, parts)
        config.__dict__.update(plan.cfg.__dict__)
        return plan.report, parts


@contextmanager
def restructured(model: nn.Module, config: Any, method: type[Method]) -> Iterator[bool]:
    """What the method changes in the model itself, undone if the block raises. Gives whether there is such."""
    undo = method.restructure(config, model)
    try:
        yield undo is not None
    except BaseException:
        if undo is not None:
            undo()
        raise


@contextmanager
def collector_paused() -> Iterator[None]:
    """Nothing that an injection makes is garbage: looking for some takes longer than the injection itself."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def make(
    plan: Plan,
    method: type[Method],
    adapter: str,
    call: Call | None,
    shared: Shared,
    others: dict[str, Any],
    upcast: bool,
    on_meta: bool,
    fill: Callable[[Parts], None] | None,
    heads: dict[str, nn.Module] | None,
) -> Parts:
    """All that carries the adapter, apart from the model."""
    tree, cfg, report = plan.tree, plan.cfg, plan.report
    chosen = choose_heads(plan, heads)
    if call is None:
        existing = next(iter((*tree.layers.values(), *tree.wrappers.values())), None)
        call = existing.call if existing is not None else Call()
    before = list(shared.containers)
    layers: dict[str, AdapterLayer] = {}
    orient(cfg, plan.sites.values())
    try:
        declare_shared(method, list(plan.sites.values()), cfg, adapter, shared, others, upcast)
        attached = shared.attached()
        for key, site in plan.sites.items():
            layer = tree.layers.get(key) or AdapterLayer(site, call)
            layers[key] = layer
            m = plan.methods[key]
            nowhere = (on_meta or fill is not None or site.on_meta) and not m.inits_from_weight()
            size = add_adapter(layer, m, attached, on_meta=nowhere, upcast=upcast)
            report.matched.append(Matched(key, site.type_name, size))
        wrappers: dict[str, Wrapper] = {
            key: tree.wrappers.get(key) or ModulesToSaveWrapper(tree.modules[key], key, call) for key in plan.saved
        }
        for key, wrapper in wrappers.items():
            wrapper.add(adapter, chosen.get(key))
            size = sum(p.numel() for p in wrapper.parameters_of(adapter))
            report.modules_to_save.append(Matched(key, type(wrapper.modules_to_save[adapter]).__name__, size))
        wrappers |= add_tokens(plan, adapter, call, upcast)
        ties = follow(plan, adapter, layers, wrappers, call, method, shared, upcast)
        parts = Parts(layers, wrappers, shared)
        if fill is not None:
            fill(parts)
        for tied, source in ties:
            tied.tie(source)
    except BaseException:
        for layer in layers.values():
            layer.rollback()
            layer.forget(adapter)
        for wrapper in tree.wrappers.values():
            wrapper.forget(adapter)
        shared.forget(adapter)
        shared.take_out(set(shared.containers) - set(before))
        raise
    return parts


def add_adapter(layer: AdapterLayer, method: Method, shared: dict[str, Any], *, on_meta: bool, upcast: bool) -> int:
    """Make an adapter on a layer, frozen. Returns how many of its numbers can train."""
    layer.add(method, (method.placeholders if on_meta else method.build)(shared))
    if not on_meta:
        method.init()
    return layer.place(method.name, upcast)


def add_tokens(plan: Plan, adapter: str, call: Call, upcast: bool) -> dict[str, Wrapper]:
    """Wrap the embeddings of which single rows train, and the heads on their weight."""
    made: dict[str, Wrapper] = {}
    followers = plan.row_followers
    for key in [*(k for k in plan.tokens if k not in followers), *followers]:
        wrapper: Any = plan.tree.wrappers.get(key)
        if wrapper is None:
            layer = AdapterLayer(site_of(key, plan.tree.modules[key], plan.tree), call)
            wrapper = TrainableTokensWrapper(layer, key)
        indices = plan.tokens[followers.get(key, key)]
        method = TrainableTokens(wrapper.token_adapter.site, TrainableTokensConfig(token_indices=indices), adapter)
        size = add_adapter(wrapper.token_adapter, method, {}, on_meta=False, upcast=upcast)
        if key in followers:
            source: Any = made[followers[key]]
            wrapper.token_adapter.methods[adapter].tie(source.token_adapter.methods[adapter])
            wrapper.tied.add(adapter)
        else:
            plan.report.modules_to_save.append(Matched(key, f"{len(indices)} tokens", size))
        made[key] = wrapper
    return made


def following_tokens(tokens: dict[str, list[int]], cfg: Any, model: nn.Module, tree: Tree) -> dict[str, str]:
    """The modules on the embedding's weight that train the rows which it trains: {path: embedding's path}."""
    embedding, tied = tied_to_embedding(model, tree.modules) if tokens else (None, [])
    own = tokens.get(embedding or "")
    following = [k for k in tied if own is not None and tokens.get(k) in (None, own)]
    other = [k for k in tied if k in tokens and k not in following]
    if other and getattr(cfg, "ensure_weight_tying", False):
        raise ValueError(
            "Cannot ensure weight tying when different token indices are specified for tied layers. "
            f"Conflicting layers: {[embedding, *other]}."
        )
    return dict.fromkeys(following, embedding or "")


def follow(
    plan: Plan,
    adapter: str,
    layers: dict[str, AdapterLayer],
    wrappers: dict[str, Wrapper],
    call: Call,
    method: type[Method],
    shared: Shared,
    upcast: bool,
) -> list[tuple[Method, Method]]:
    """Adapt the modules that share the embedding's weight. Returns the pairs to tie once values are there."""
    pairs = []
    for key, source in plan.followers.items():
        if source in layers:
            site = site_of(key, plan.tree.modules[key], plan.tree)
            layer = plan.tree.layers.get(key) or AdapterLayer(site, call)
            size = add_adapter(layer, plan.methods[key], shared.attached(), on_meta=False, upcast=upcast)
            layers[key] = layer
            plan.report.matched.append(Matched(key, site.type_name, 0 if method.always_tied else size))
            pairs.append((layer.methods[adapter], layers[source].methods[adapter]))
        if source in wrappers:
            wrapper = plan.tree.wrappers.get(key) or ModulesToSaveWrapper(plan.tree.modules[key], key, call)
            wrapper.add(adapter)
            wrapper.modules_to_save[adapter].weight = wrappers[source].modules_to_save[adapter].weight
            wrappers[key] = wrapper
    return pairs


def declare_shared(
    method: type[Method],
    sites: list[Site],
    cfg: Any,
    adapter: str,
    shared: Shared,
    others: dict[str, Any],
    upcast: bool,
) -> None:
    if not method.shares:
        return
    if not sites:
        raise ConfigError(
            f"No layers types compatible with {method.__name__} were found: it needs some to size what they share."
        )
    values = method.share(sites, cfg, shared.containers, others)
    shared.hold(adapter, values, sites[0].store.where(sites[0].module), upcast and method.upcast)


def orient(cfg: Any, sites: Iterable[Site]) -> None:
    """Correct `fan_in_fan_out`, which only restates what the layer type says."""
    if not hasattr(cfg, "fan_in_fan_out"):
        return
    for site in sites:
        if not site.op.known or site.op.takes_ids or len(site.shape) != 2 or cfg.fan_in_fan_out == site.op.transposed:
            continue
        kind = "Conv1D" if site.op.transposed else "torch.nn.Linear"
        warn(
            f"fan_in_fan_out is set to {cfg.fan_in_fan_out} but the target module is `{kind}`. "
            f"Setting fan_in_fan_out to {site.op.transposed}."
        )
        cfg.fan_in_fan_out = site.op.transposed


def choose_heads(plan: Plan, heads: dict[str, nn.Module] | None) -> dict[str, nn.Module]:
    """`heads` by full path."""
    chosen: dict[str, nn.Module] = {}
    for name, module in (heads or {}).items():
        paths = [key for key in plan.saved if key == name or key.endswith(f".{name}")]
        if len(paths) != 1:
            raise ConfigError(
                f"heads['{name}'] must name one of the modules in modules_to_save, which are {plan.saved or 'none'}."
            )
        if not isinstance(module, nn.Module):
            raise ConfigError(f"heads['{name}'] must be an nn.Module, got {type(module).__name__}.")
        chosen[paths[0]] = module
    return chosen


def commit(plan: Plan, parts: Parts) -> None:
    """Attach what was made; nothing here can fail."""
    tree = plan.tree
    first = not tree.layers and not tree.wrappers
    if first:
        for p in tree.owners:
            p.requires_grad = False
    for where, base in tree.vacant:
        attach(where, base)
    for key, layer in parts.layers.items():
        layer.settle()
        if key not in tree.layers:
            attach(tree.places[key], layer)
    for key, wrapper in parts.wrappers.items():
        if key not in tree.wrappers:
            wrapper.train(tree.modules[key].training)
            attach(tree.places[key], wrapper)
    for bias in plan.biases:
        bias.requires_grad = True


def attach(place: Place, module: nn.Module) -> None:
    parent, name = place
    if "activation_relu_or_gelu" in parent.__dict__:
        parent.activation_relu_or_gelu = 0  # type: ignore[assignment]  # torch's fast path in TransformerEncoderLayer would not call the layer
    parent._modules[name] = module  # setattr would only look the old one up again


def check_bias(cfg: Any, method: type[Method], others: Iterator[Any]) -> None:
    """Raise if the config's `bias` is unknown, or a second adapter wants to train biases."""
    bias = getattr(cfg, "bias", "none")
    if bias not in ("none", "all") and not bias.endswith("_only"):
        raise NotImplementedError(
            f"Requested bias: {bias}, is not implemented. Use none, all, or {method.__name__.lower()}_only."
        )
    others = list(others)  # type: ignore[assignment]
    if others and any(getattr(c, "bias", "none") != "none" for c in (cfg, *others)):
        raise ValueError(
            f"{method.__name__} supports only 1 adapter with bias. "
            "When using multiple adapters, set bias to 'none' for all adapters."
        )
