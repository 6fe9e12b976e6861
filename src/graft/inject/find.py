# SPDX-License-Identifier: Apache-2.0
"""The first step of an injection: find the sites, methods, heads, token rows and biases of an adapter, without a change
to the model. All errors about targets are raised here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from graft.config.base import PeftConfig
from graft.config.fields import Targeted
from graft.core.carrier import carrier_of
from graft.core.each import stack_method_class
from graft.core.effect import Rewrite
from graft.core.errors import (
    ConfigError,
    DistributedError,
    NoMatchingPeftModuleError,
    PeftWarning,
    UnsupportedLayerError,
    warn,
)
from graft.core.folding import why_not_in_weight
from graft.core.method import Method
from graft.core.site import Site
from graft.core.wrappers import MANAGED, is_bias
from graft.inject import beside, experts
from graft.inject.beside import Head, HeadConfig
from graft.inject.experts import UnreachedTargets
from graft.inject.job import InjectionJob
from graft.inject.match import WHY, Matcher, Verdict, find_unmatched, format_hint
from graft.inject.report import InjectReport, Skipped
from graft.inject.stage import ProcessTeam, add_remote_sites, find_absent_modules
from graft.inject.survey import (
    ModuleTree,
    get_site,
    get_type_name,
    list_read_children,
    skip_empty_carriers,
    why_not_attention,
)
from graft.inject.targets import (
    DUMMY,
    expand_tied_targets,
    find_embedding_path,
    find_named_parameters,
    find_tied_modules,
    resolve_parameter,
    resolve_targets,
)
from graft.methods.trainable_tokens import TrainableTokens, TrainableTokensConfig
from graft.storage.codes import has_loose_bias
from graft.storage.find import innermost
from graft.storage.shared_work import why_no_adapter

MOST_WARNINGS = 100  # most warnings about entries of one field


def resolve_job(job: InjectionJob) -> None:
    """Fill in the fields of `job` that say where and how the adapter acts: `report`, `sites`, `along`, `tied`,
    `methods`, `order`, `biases`, and the heads and token rows.

    The model is not changed. Of the tree, `ops` is set to the config's custom modules, and `absent` to the modules that
    other pipeline stages have. Rewrites `job.cfg` in place: expert names, default targets, tied modules, and by the
    method's `prepare`.

    Default targets lose modules if others read their weight. Companion sites of the method are added. Tied modules get
    the config of their source and note its method. Ranks are split by the method's `split_budget`; `lenders` are set
    for shared tensors. On a pipeline stage `order` has methods for other stages' targets, too. Biases are listed unless
    `bias` is "none".

    Warns of entries that match nothing. With `job.keys` the adapter gets exactly those paths; then no target is
    resolved or reported.

    Raises:
        NoMatchingPeftModuleError: no module matches.
        UnsupportedLayerError, ConfigError: the adapter cannot adapt a target, a head or token rows.
        DistributedError: FSDP1 manages the model, and the adapter would train. It would not in inference mode, or with
            a checkpoint without tensors.
    """
    tree, cfg, method, adapter, model = job.tree, job.cfg, job.method, job.adapter, job.model
    tree.ops = getattr(cfg, "_custom_modules", None) or {}
    unreached = UnreachedTargets()
    if job.keys is None:
        if hasattr(cfg, "target_parameters"):
            file_keys = None if job.options.values is None else job.options.values.names
            unreached = experts.convert_expert_targets(cfg, model, tree, file_keys)
        named = cfg.target_modules is not None
        resolve_targets(cfg, method, model, tree.modules)
        if not named and isinstance(cfg.target_modules, set) and tree.readers:
            drop_read_targets(cfg, method, adapter, tree)
    method.prepare(cfg, model)
    if job.keys is None:
        job.tied = expand_tied_targets(cfg, method, model, tree)
    job.report = InjectReport(adapter, cfg.peft_type.value, base_parameters=tree.parameters)
    tree.absent = find_absent_modules(tree.modules) if job.several else {}
    match_modules(job, unreached)
    for key in method.find_companions(cfg, model, list(job.sites)):
        job.sites.setdefault(key, get_site(key, tree.modules[key], tree))
    if job.steps is not None:
        job.steps.adapt_tied_modules()
    tied = {key: source for key, source in job.tied.items() if source in job.sites}
    variant = method.variant(cfg)
    for key, site in (job.sites | {k: get_site(k, tree.modules[k], tree) for k in tied}).items():
        source = key.rpartition(".")[0] if key in job.along else job.tied.get(key, key)
        method_config, source = (cfg, source) if job.steps is None else job.steps.get_site_config(source)
        kind = variant if method_config is cfg else method.variant(method_config)
        # patterns name the target
        method_on_site = job.methods[key] = make_method(site, kind, method_config.at(source), adapter)
        if source != key:
            method_on_site.config_path, method_on_site.via_container = source, key in job.along
        if key in tied:
            method_on_site.source = job.methods[tied[key]]
    everywhere = job.sites
    if tree.absent and job.keys is None:
        everywhere = add_remote_sites(job.sites, tree, Matcher(cfg), adapter)
    job.order = {k: job.methods.get(k) or make_method(s, variant, cfg.at(k), adapter) for k, s in everywhere.items()}
    in_order = list(job.order.values())
    variant.split_budget([m.matrix_method for m in (*in_order, *(job.methods[key] for key in tied))])
    check_sites(job.methods, tree, job.mixed)
    if not cfg.inference_mode and (job.options.values is None or job.options.values.names):
        check_not_fsdp1(tree.modules.items(), adapter, job.team)
    if in_order and in_order[0].layer_keys:
        assign_lenders(in_order)
    saved = find_modules_to_save(job, names) if (names := getattr(cfg, "modules_to_save", None)) else []
    if saved or job.options.heads:
        job.beside |= make_heads(job, saved)
    if getattr(cfg, "trainable_token_indices", None):
        rows = make_token_rows(job)
        check_rows(job, rows, saved)
        job.beside |= rows
    if getattr(cfg, "bias", "none") != "none":
        targeted = [tree.modules[key] for key in job.methods if key in tree.modules]
        job.biases = list_trained_biases(cfg, model, targeted, saved)
    job.report.other_trainable = sum(getattr(b, "bias", b).numel() for b in job.biases)


def drop_read_targets(cfg: Targeted, method: type[Method], adapter: str, tree: ModuleTree) -> None:
    """Take names out of `cfg.target_modules`, in place, if the modules around them read the weight and the method has
    no form for that. The caller passes only default targets.

    The first module with a name decides for it; a name without a module stays. If no name would stay, all stay.
    """
    kind, read, names = method.variant(cfg), set(), set(cfg.target_modules or ())
    for name in names:
        key = next((key for key in tree.modules if f".{key}".endswith(f".{name}")), None)
        site = None if key is None else get_site(key, tree.modules[key], tree)
        if site is None or not site.is_read:
            continue
        if why_not_in_weight(make_method(site, kind, cfg.at(site.key), adapter)) is not None:
            read.add(name)
    cfg.target_modules = names - read or names


def make_method(site: Site, kind: Any, cfg: PeftConfig, adapter: str) -> Method:
    """Return a new method of class `kind` for a site.

    For a parameter with more than two dimensions it is a `StackMethod`, which has one method for each matrix; unless
    the class lays out stacks itself.
    """
    kind = stack_method_class(kind) if site.is_stack and not kind.lays_out_stacks else kind
    return kind(site, cfg, adapter)  # type: ignore[no-any-return]


def match_modules(job: InjectionJob, unreached: UnreachedTargets) -> None:
    """Put the sites of all modules and parameters that the config targets into `job.sites`.

    With `job.keys` exactly those paths match, and all others get an entry in `skipped`. Modules that are absent from
    this stage are passed over. Replaced steps of the tuner have the last word on each module, but not with `job.keys`.
    A module tied to the embedding gets the outcome "tied" and no site here.

    The report gets modules that another field takes out (`skipped`), and counts by type of other modules without
    children (`untargeted`). An attention brings its `out_proj` along, before itself, noted in `job.along`. Warns of
    entries that match nothing, of experts out of reach, and on a pipeline stage if nothing matches there.

    Raises:
        ConfigError: `target_parameters` together with `job.keys`; this comes first.
        NoMatchingPeftModuleError: no module or parameter matches, on a model that is not a stage.
    """
    cfg, report, tree = job.cfg, job.report, job.tree
    chosen, matcher = set(job.keys or ()), Matcher(cfg) if job.keys is None else None
    outcomes: dict[str, Verdict] = {}
    for key, module in tree.modules.items():
        if key in tree.absent:
            continue
        if matcher is None:
            verdict = Verdict("matched" if key in chosen else "untargeted", key)
        else:
            verdict = matcher(key) if job.steps is None else job.steps.decide(key, matcher(key))
        if key in job.tied and verdict.outcome == "matched":  # by a regex; `adapt_tied_modules` adapts it later
            verdict = Verdict("tied", verdict.entry)
        outcomes[key] = verdict
        if verdict.outcome == "matched":
            job.sites[key] = get_site(key, module, tree)
        elif verdict.entry is not None:
            report.skipped.append(Skipped(key, get_type_name(module), verdict.why))
        elif not module._modules:
            report.untargeted[get_type_name(module)] += 1
    if job.steps is not None:
        job.steps.adapt_modules()
    for key in [key for key, site in job.sites.items() if site.op.opaque and site.path == key]:
        site = job.sites.pop(key)
        for path in (f"{key}.{child}" for child in list_read_children(site.module)):
            job.sites[path] = get_site(path, tree.modules[path], tree)
            job.along.add(path)
        job.sites[key] = site
    parameters: dict[str, Site] = {}
    if getattr(cfg, "target_parameters", None):
        if job.keys is not None:
            raise ConfigError(
                "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`: leave "
                f"state_dict out (adapter '{job.adapter}'), and load the values afterwards."
            )
        if job.steps is not None:
            parameters, idle = job.steps.adapt_parameters()
        else:
            named_parameters, idle = find_named_parameters(cfg, skip_empty_carriers(job.model), tree, report)
            parameters = dict(
                resolve_parameter(path, name, tree, job.sites, job.adapter) for _, path, name in named_parameters
            )
        warn_unmatched("target_parameters", idle, report, of=None if parameters else cfg.target_parameters)
        job.sites |= parameters
    if tree.absent:
        if not (job.sites or job.prompt) and job.keys is None:
            warn(
                f"Adapter '{job.adapter}' adapts nothing on this stage of the pipeline: none of the modules that it "
                "targets is here.",
                PeftWarning,
            )
    elif job.options.state_dict is not None and not job.sites:
        raise NoMatchingPeftModuleError(
            f"The state dict has no tensor of adapter '{job.adapter}' for a module of this model. Pass that of the "
            "adapter, with the model's names, or none."
        )
    elif matcher is not None:
        report_matches(job, matcher, outcomes, parameters, unreached)
        if unreached.stacks or unreached.layers or unreached.whole_text:
            warn_of_unreached(unreached, tree, report)


def warn_of_unreached(unreached: UnreachedTargets, tree: ModuleTree, report: InjectReport) -> None:
    """Warn (PeftWarning) of expert stacks and layers that the config does not reach, and of stacks adapted whole.

    The report gets each stack and layer that is not reached in `skipped`, with the remedy.
    """
    for text in filter(None, (unreached.experts_text, unreached.layers_text, unreached.whole_text)):
        warn(f"{text} Adapter '{report.adapter}'.", PeftWarning)
    how = "an expert's matrix is no module: name {} in target_parameters"
    report.skipped += [Skipped(s.path, "Parameter", how.format(s.parameter)) for s in unreached.stacks]
    how = "left out next to experts, as PEFT does: name its weight in target_parameters"
    report.skipped += [Skipped(path, get_type_name(tree.modules[path]), how) for path in unreached.layers]


def assign_lenders(methods: Sequence[Method]) -> None:
    """Set `lenders` of each method that has a tensor in common with an earlier one.

    The first method of each key lends. The first method's `layer_keys` has for each container a function that returns
    the keys of all methods. `lenders` is a new dict.
    """
    for container, keys_of in methods[0].layer_keys.items():
        first: dict[Hashable, Method] = {}
        for method, key in zip(methods, keys_of(methods)):
            lender = first.setdefault(key, method)
            if lender is not method:
                method.lenders = {**method.lenders, container: lender}


def check_sites(methods: dict[str, Method], tree: ModuleTree, mixed: bool) -> None:
    """Raise UnsupportedLayerError, with a remedy, for the first site that its method cannot adapt.

    Reasons: the module's `why_not_adapted`, an attention of an unsupported form, a parallel layer, the method's
    `check`, or a weight that no call uses. These come after any of the following: the module trains whole or in rows,
    its layer has an adapter of that name, or another method while `mixed` is False.
    """
    for key, method in methods.items():
        site, adapter = method.site, method.name
        why = getattr(site.module, "why_not_adapted", None)
        if isinstance(site.module, nn.MultiheadAttention):
            why = why or why_not_attention(site.module)
        why = why or why_not_parallel(method) or method.check()
        why = why or (why_not_uncalled(method) if site.adapts_tensor else None)
        existing = tree.layers.get(key)
        if existing is not None and adapter in existing.methods:
            why = f"It already carries an adapter called '{adapter}': choose another name, or call unload() before"
        elif existing is not None and method.config not in existing.kinds and not mixed:
            why = f"It already carries {type(next(iter(existing.methods.values()))).__name__} adapters"
        wrapper = tree.wrappers.get(key)
        if wrapper is not None:
            why = f"It is {wrapper.how} of adapter(s) {wrapper.adapters}"
        if why is not None:
            what, remedy = "Target parameter", "name other target_parameters"
            if key in tree.modules:
                what, remedy = "Target module", "take the module out with exclude_modules, or name other target_modules"
            raise UnsupportedLayerError(
                f"{what} {key} ({site.type_name}) is not supported. {why}. Adapter '{adapter}' "
                f"({type(method).__name__}): {remedy}."
            )


def why_not_parallel(method: Method) -> str | None:
    """Return why a method cannot adapt a module that several processes hold in pieces, as a sentence; None if it can.

    The reason of `why_no_adapter` comes first. Else a `Rewrite` effect that folds or has a `post` is refused where the
    module leaves its bias to its caller.
    """
    site, effect = method.site, method.effect
    inside = effect.whole or effect.input_of is not None or site.op.opaque
    why = why_no_adapter(site.module, site.op, inside)
    alters = isinstance(effect, Rewrite) and (effect.folds or effect.post is not None)
    if why is None and alters and site.piece is not None and site.piece.leaves_bias(site.module):
        return f"{type(method).__name__} acts on the output with its bias, which the module leaves to its caller to add"
    return why


def check_not_fsdp1(modules: Iterable[tuple[str, nn.Module]], adapter: str, team: ProcessTeam | None) -> None:
    """Raise DistributedError if FSDP1 manages one of the modules, since no process would average the gradients of a new
    adapter. Without a process group, and with a base that FSDP2 has sharded, nothing is checked.

    Args:
        modules: all modules of the model, with their paths.
        team: the processes that hold the model together.
    """
    is_sharded = team is not None and team.sharding is not None
    if is_sharded or not (dist.is_available() and dist.is_initialized()):
        return
    key = next((key for key, module in modules if MANAGED in module.__dict__), None)
    if key is not None:
        raise DistributedError(
            f"Adapter '{adapter}' would train on a model with FullyShardedDataParallel around '{key}' already: nobody "
            "would average its gradients. Inject adapters before FullyShardedDataParallel, or use fully_shard; for "
            "inference set inference_mode=True."
        )


def why_not_uncalled(method: Method) -> str | None:
    """Return why a method cannot adapt a weight that modules read without calling the layer; None if it can.

    Causes, in this order: the effect needs the whole call; `why_not_in_weight` gives a reason; the weight cannot be
    read. The last one rules out every method, also one that reads no weight.
    """
    site, effect = method.site, method.effect
    if effect.whole:
        return f"The weight is used without a call of the layer, so that {type(method).__name__} would have no effect"
    if (reason := why_not_in_weight(method)) is not None:
        return reason
    why = site.weight.why_unreadable()
    return None if why is None else f"{type(method).__name__} needs its weight, and {why}"


def find_modules_to_save(job: InjectionJob, names: list[str]) -> list[str]:
    """Return the paths of the modules that `names`, the config's `modules_to_save`, mean, in the model's order, without
    those on another pipeline stage.

    A name means each path that ends so, even within a part. Warns of names without a module on any stage, except for
    those in the config's `_default_heads`, and notes them in the report.
    """
    tree, defaults = job.tree, getattr(job.cfg, "_default_heads", ())
    everywhere = [key for key in tree.modules if beside.find_saved_entry(key, names) is not None]
    missing = [n for n in names if n not in defaults and not any(key.endswith(n) for key in everywhere)]
    warn_unmatched("modules_to_save", find_unmatched(missing, set(), tree.modules), job.report)
    return [key for key in everywhere if key not in tree.absent]


def warn_unmatched(
    name: str, entries: dict[str, list[tuple[str, int]]], report: InjectReport, of: object = None
) -> None:
    """Warn (PeftWarning) of entries of the config's field `name` that match nothing, with similar names as hints.

    All entries are noted in `report.unmatched_targets`, with "<name>: " before each unless the field is
    `target_modules`. At most 100 get a warning each; one more counts the rest. With `of` and entries there is a single
    RuntimeWarning instead.

    Args:
        entries: each with similar names and their counts.
        of: the field's value, if none of its entries matched although another field's did.
    """
    first = list(entries.items())[:MOST_WARNINGS]
    if of and entries:
        close = "".join(f" '{entry}'{format_hint(similar)}" for entry, similar in first if similar)
        kind = name.removeprefix("target_").removesuffix("s")
        text = f"{name}={of} were set but no {kind} was matched.{close} Adapter '{report.adapter}' is without them."
        warn(text, RuntimeWarning)
    else:
        for entry, similar in first:
            warn(f"{name} entry '{entry}' matched nothing{format_hint(similar)}", PeftWarning)
        if len(entries) > MOST_WARNINGS:
            warn(f"{name}: {len(entries) - MOST_WARNINGS} more entries matched nothing", PeftWarning)
    prefix = "" if name == "target_modules" else f"{name}: "
    report.unmatched_targets.update({prefix + entry: similar for entry, similar in entries.items()})


def make_heads(job: InjectionJob, saved: list[str]) -> dict[str, Head]:
    """Return a new `Head` for each path in `saved`, and for each module tied to one of them, which gets that head as
    `source`. A head takes the caller's module of `job.options.heads`, if there is one, and else copies the base's.

    Raises:
        UnsupportedLayerError: a module cannot train whole.
        ConfigError: the caller's modules do not fit (`choose_heads`).
    """
    chosen = choose_heads(job, saved) if job.options.heads else {}
    new_heads, tree, tied = dict[str, Head](), job.tree, job.tied
    for key in [*saved, *(k for k, source in tied.items() if source in saved)]:
        inside = [k for k in (*tree.layers, *tree.wrappers) if k.startswith(f"{key}.")]
        beside.check_can_train_whole(key, tree.modules[key], inside, job.adapter)
        new_heads[key] = Head(beside.get_head_site(key, tree.modules[key]), HeadConfig(chosen.get(key)), job.adapter)
        if key not in saved:
            new_heads[key].source = new_heads[tied[key]]
    return new_heads


def choose_heads(job: InjectionJob, saved: list[str]) -> dict[str, nn.Module]:
    """Return the caller's modules in `job.options.heads`, by the full path of the entry in `saved` that each name means
    (the path or its end).

    Raises:
        ConfigError: `heads` is no mapping, or a name means none or several of `saved`. Or a value is no module, shares
            a module with the model, or has other `in_features` than the module it replaces. Widths are compared only if
            both have that attribute.
    """
    heads: Any = job.options.heads
    if not isinstance(heads, Mapping):
        raise ConfigError(f"heads must be modules by name, as {{'classifier': …}}, got {type(heads).__name__}.")
    chosen: dict[str, nn.Module] = {}
    model_ids = {id(m) for m in job.model.modules()}
    for name, module in heads.items():
        paths = [key for key in saved if key == name or key.endswith(f".{name}")]
        if len(paths) != 1:
            raise ConfigError(
                f"heads['{name}'] must name one of the modules in modules_to_save, which are {saved or 'none'}."
            )
        if not isinstance(module, nn.Module):
            raise ConfigError(f"heads['{name}'] must be an nn.Module, got {type(module).__name__}.")
        if any(id(m) in model_ids for m in module.modules()):
            raise ConfigError(f"heads['{name}'] is in the model already, and would train there too: give a copy of it.")
        widths = [getattr(m, "in_features", None) for m in (innermost(job.tree.modules[paths[0]]), module)]
        if None not in widths and widths[0] != widths[1]:
            raise ConfigError(
                f"heads['{name}'] takes {widths[1]} features, and '{paths[0]}' has {widths[0]}. Pass one of that width."
            )
        chosen[paths[0]] = module
    return chosen


def read_bias_option(cfg: PeftConfig) -> str:
    """Return the config's `bias`: "none", "all", or any text that ends with "_only".

    A config without the field has "none".

    Raises:
        NotImplementedError: `bias` has another value.
    """
    bias: str = getattr(cfg, "bias", "none")
    if bias not in ("none", "all") and not bias.endswith("_only"):
        raise NotImplementedError(
            f"Requested bias: {bias}, is not implemented. Use none, all, or {cfg.peft_type.value.lower()}_only."
        )
    return bias


def list_trained_biases(
    cfg: PeftConfig, model: nn.Module, adapted: list[nn.Module], whole: list[str]
) -> list[nn.Parameter | nn.Module]:
    """Return the biases of the base that train.

    With `bias="all"` these are the model's, except within modules in `whole`; else those of the `adapted` modules or
    their base layers. Last are packed layers with a bias that is no Parameter yet, each once.

    Raises:
        NotImplementedError: `bias` is none of its values.
    """
    if read_bias_option(cfg) == "all":
        inside = tuple(f"{key}." for key in whole)
        parameters = [p for name, p in model.named_parameters() if is_bias(name) and not name.startswith(inside)]
        layers = [m for name, m in model.named_modules() if not f"{name}.".startswith(inside)]
    else:  # "<method>_only": those of the adapted layers
        layers = [getattr(module, "base_layer", module) for module in adapted]
        parameters = [b for m in layers if isinstance(b := getattr(m, "bias", None), nn.Parameter)]
    return [*parameters, *dict.fromkeys(m for m in layers if has_loose_bias(m))]


def check_rows(job: InjectionJob, rows: dict[str, TrainableTokens], saved: list[str]) -> None:
    """Raise unless each of the token rows can train.

    Raises:
        ValueError: the module is in `modules_to_save` as well.
        UnsupportedLayerError: the module is in `target_modules` as well, or its carrier does not take rows.
        ConfigError: the method's `check` refuses, such as for an index that the embedding lacks.
    """
    for key, method in rows.items():
        module, source, adapter = job.tree.modules[key], method.source, method.name
        name = f"'{key}'" + (f", which follows '{source.site.key}' as it shares its weight" if source else "")
        if key in saved:
            raise ValueError(
                f"The embedding layer is already marked to be trained fully, either specify `trainable_token_indices` "
                f"or `modules_to_save` for {name}, not both. Adapter '{adapter}'."
            )
        why = None
        if key in job.methods:
            why = f"adapter '{adapter}' has it in target_modules as well: take it out of one of the two"
        elif (carrier := carrier_of(module)) is not None and not carrier.takes_rows:
            why = f"it {carrier.claim} adapter(s) {carrier.adapters}: load '{adapter}' into another model"
        if why is not None:
            raise UnsupportedLayerError(
                f"trainable_token_indices cannot be applied to modules of type {type(module)}, {name}: {why}."
            )
        if (why := method.check()) is not None:
            raise ConfigError(f"trainable_token_indices cannot be applied to '{key}': {why}.")


def report_matches(
    job: InjectionJob, matcher: Matcher, outcomes: dict[str, Verdict], parameters: Iterable[str], left: UnreachedTargets
) -> None:
    """Warn of each entry of the config that matches nothing, and note it in `report.unmatched_targets`.

    The fields are `target_modules`, `exclude_modules`, `layers_to_transform` and the patterns. Names in `left` get no
    warning.

    - A regex in `target_modules`, if only parameters match: a RuntimeWarning, no note.
    - `exclude_modules` that takes out no module: one warning and one note for the whole field. Else, unless it is a
      regex, each entry that is no path and no end of a path.
    - Each index of `layers_to_transform` without a matched module.
    - `target_modules` as a list: each entry that no module uses and that is no path or end of one. If no module matched
      at all, there is one warning for the field.
    - Each field of patterns: one RuntimeWarning for its keys that reach no matched module or parameter.

    Raises:
        NoMatchingPeftModuleError: no module and no parameter matches, unless "dummy-target-modules" is a target. The
            text is that of `left` or `explain_no_match`.
    """
    cfg, report, verdicts = job.cfg, job.report, outcomes.values()
    outcome_kinds, targets = {v.outcome for v in verdicts}, cfg.target_modules
    excluded = bool(outcome_kinds & {"excluded", "saved"})
    entries = targets if isinstance(targets, (set, list)) else (targets,)
    if "matched" not in outcome_kinds and not parameters and DUMMY not in entries:
        why = left.experts_text or explain_no_match(cfg, outcomes, excluded)
        raise NoMatchingPeftModuleError(f"{why} Adapter '{report.adapter}'.")
    if isinstance(targets, str) and "matched" not in outcome_kinds and targets != DUMMY:
        text = f"target_modules={targets} were set but no module was matched. A string is a regular expression that has"
        warn(f"{text} to fit a whole path. Adapter '{report.adapter}' has its target_parameters alone.", RuntimeWarning)
    exclude = getattr(cfg, "exclude_modules", None)
    if exclude and not excluded:
        warn(
            f"You have passed exclude_modules={cfg.exclude_modules} but no modules were excluded. "
            "Names are whole paths or their last parts."
        )
        report.unmatched_targets[f"exclude_modules: {cfg.exclude_modules}"] = []
    elif exclude and not isinstance(exclude, str):
        warn_unmatched("exclude_modules", find_unmatched(exclude, set(), outcomes), report)
    if matcher.indices:
        reached = {matcher.layer_of(k) for k, v in outcomes.items() if v.outcome == "matched"}
        warn_unmatched("layers_to_transform", {str(i): [] for i in sorted(matcher.indices - reached)}, report)
    known = {v.entry for v in verdicts} | left.names
    if isinstance(targets, (set, list)) and DUMMY not in targets and (free := find_unmatched(targets, known, outcomes)):
        warn_unmatched("target_modules", free, report, of=None if "matched" in outcome_kinds else targets)
    for name in getattr(cfg, "patterns", {}):
        matched = [*(k for k, v in outcomes.items() if v.outcome == "matched"), *parameters]
        idle = sorted(p for p in getattr(cfg, name) or () if not any(cfg.reaches(p, k, name) for k in matched))
        if idle:
            text = f"The following {name} keys did not match any targeted module and were ignored: {idle}."
            warn(text, RuntimeWarning)
            report.unmatched_targets.update({f"{name}: {pattern}": [] for pattern in idle})


def explain_no_match(cfg: Any, outcomes: dict[str, Verdict], excluded: bool) -> str:
    """Return the error's text for a config that targets no module.

    The first case that holds decides: no modules in the model; modules that a replaced step left out; all excluded;
    some excluded; no targets; names that are not in the model. The last text explains a regex, or names similar modules
    for each entry of a list that is no path and no end of one. It also names `layers_to_transform` and `layers_pattern`
    where those are set.
    """
    targets = cfg.target_modules
    if not outcomes:
        return (
            "The model has no modules in it that an adapter could replace. If it is a layer, put that into a module, "
            "as torch.nn.Sequential(layer)."
        )
    if any(v.outcome == "left" for v in outcomes.values()):
        return f"The {len(outcomes)} modules of the model, of which the config targets some, were all {WHY['left']}."
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
    if isinstance(targets, str):
        text += " A string is a regular expression that has to fit a whole path: pass a list for the ends of paths."
    else:
        for entry, similar in find_unmatched(targets, set(), outcomes).items():
            if similar:
                text += f" '{entry}' matched nothing{format_hint(similar)}"
    if getattr(cfg, "layers_to_transform", None) is not None:
        text += f" Note: You specified 'layers_to_transform': {cfg.layers_to_transform}."
        if cfg.layers_pattern is not None:
            text += f" You also specified 'layers_pattern': {cfg.layers_pattern}."
        text += " Make sure the indices exist, and that the layers are numbered directly below that name."
    return text


def make_token_rows(job: InjectionJob) -> dict[str, TrainableTokens]:
    """Return the `TrainableTokens` methods by path: first of the modules that the config names, then of those tied to
    them. A tied module has its source as lender, so that it borrows the rows.
    """
    tokens, tree = resolve_token_indices(job), job.tree
    tied, new_rows = find_tied_tokens(job, tokens), dict[str, TrainableTokens]()
    for key in [*(key for key in tokens if key not in tied), *tied]:
        config = TrainableTokensConfig(token_indices=tokens[tied.get(key, key)])
        method = new_rows[key] = TrainableTokens(get_site(key, tree.modules[key], tree), config, job.adapter)
        if key in tied:
            method.source = new_rows[tied[key]]
            method.lenders = dict.fromkeys(method.layer_names, method.source)
    return new_rows


def resolve_token_indices(job: InjectionJob) -> dict[str, list[int]]:
    """Return the rows that train by the config's `trainable_token_indices`, by full path of the module.

    A name in a mapping means each module with that path or that end of it. A plain list means the input embedding, or
    "embed_tokens" if the model has none. Modules of other pipeline stages are left out.

    Raises:
        NoMatchingPeftModuleError: no module has a name.
    """
    named, tree = job.cfg.trainable_token_indices, job.tree
    if not isinstance(named, Mapping):
        named = {find_embedding_path(job.model, tree) or "embed_tokens": named}
    out: dict[str, list[int]] = {}
    for name, indices in named.items():
        paths = [k for k in tree.modules if k == name or k.endswith(f".{name}")]
        if not paths:
            raise NoMatchingPeftModuleError(
                f"Target modules {{'{name}'}} not found in the base model. Please check the target modules and try "
                f"again (trainable_token_indices). Adapter '{job.adapter}'."
            )
        out |= {path: list(indices) for path in paths if path not in tree.absent}
    return out


def find_tied_tokens(job: InjectionJob, tokens: dict[str, list[int]]) -> dict[str, str]:
    """Return {path: embedding's path} of the modules tied to the embedding, if the embedding's rows train; else {}.

    A tied module follows if `tokens` lacks it or has equal rows for it. With different rows it is left out.

    Raises:
        ValueError: a tied module has other rows than the embedding, or the embedding has none, and the config sets
            `ensure_weight_tying`.
    """
    embedding, tied = find_tied_modules(job.model, job.tree) if tokens else (None, [])
    embedding_rows = tokens.get(embedding or "")
    following = [k for k in tied if embedding_rows is not None and tokens.get(k) in (None, embedding_rows)]
    conflicting = [k for k in tied if k in tokens and k not in following]
    if conflicting and getattr(job.cfg, "ensure_weight_tying", False):
        raise ValueError(
            "Cannot ensure weight tying when different token indices are specified for tied layers. "
            f"Conflicting layers: {[embedding, *conflicting]}."
        )
    return dict.fromkeys(following, embedding or "")
