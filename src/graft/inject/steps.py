# SPDX-License-Identifier: Apache-2.0
"""The steps of an injection that are methods of the tuner's class, which other packages replace.

An injection calls a step only if it was replaced, before anything is built. The replacement calls the original for each
module that it wants adapted, with a config. The original only records that call; graft makes the layers.

Four methods of the tuner's class are steps, as in PEFT. Whether they were replaced is compared once per injection
(`names_of_replaced`). A call of the original records a module or parameter and the config that was passed; `find`
makes sites of the records. If a replacement puts another module into the model, the old one is put back and the
injection is refused. A replaced `inject_adapter` is called around the whole injection, a replaced `load_adapter` after
`from_pretrained` has loaded the adapter. An error in either takes the adapter off again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from torch import nn

from graft.config.base import PeftConfig
from graft.core.errors import NoMatchingPeftModuleError, UnsupportedLayerError, describe_function
from graft.core.method import Tuner
from graft.core.site import Site
from graft.inject.job import InjectionJob
from graft.inject.match import Verdict, find_unmatched
from graft.inject.parts import get_registry
from graft.inject.report import Skipped
from graft.inject.survey import ModuleTree, get_site, get_type_name, skip_empty_carriers
from graft.inject.targets import UnmatchedEntries, find_named_parameters, resolve_parameter
from graft.storage.find import innermost

CHECK, CREATE = "_check_target_module_exists", "_create_and_replace"
PARAMETERS, CAST = "_inject_parameters", "_cast_adapter_dtype"
INJECT = "inject_adapter"  # the injection as a whole, around the steps of it
F = TypeVar("F", bound=Callable[..., object])
STEPS: dict[str, list[Callable[..., object]]] = {}  # steps of an injection: graft's own functions, by name
OF_METHODS: dict[object, type] = {}  # tuner classes by method; None: that of any


def mark_step(function: F) -> F:
    """Record a function of a tuner, in the list of its name in `STEPS`, as graft's own form of a step that packages may
    replace. Return it unchanged.
    """
    STEPS.setdefault(function.__name__, []).append(function)
    return function


def names_of_replaced(tuner: nn.Module, method: object) -> list[str]:
    """Return the names of the steps (`STEPS`) that are replaced on a tuner, its class, or the tuner class of a method,
    in the order of `STEPS`. A class counts if its attribute is none of graft's functions for that step.
    """
    classes = (type(tuner), OF_METHODS.get(method, type(tuner)))
    return [n for n, steps in STEPS.items() if n in tuner.__dict__ or any(getattr(c, n) not in steps for c in classes)]


class SiteConfig(NamedTuple):
    """The path and config that a replaced step gave for one site."""

    target: str  # its path for the config's patterns
    cfg: PeftConfig | None  # None: the adapter's, unchanged


class ReplacedSteps:
    """The replaced steps of one injection, and the sites that they choose."""

    job: InjectionJob

    def __init__(self, tuner: Tuner, replaced: list[str]):
        """Begin without an injection; `swap_config` gives one.

        Args:
            replaced: names of the replaced methods of the tuner.
        """
        self.tuner, self.replaced = tuner, replaced
        self.target = ""  # the target that a step is called for
        self.asked: list[str] = []
        self.noted: dict[str, SiteConfig] = {}  # by key of the site
        self.refused: Exception | None = None
        self.cast = False

    @contextmanager
    def swap_config(self, job: InjectionJob) -> Iterator[None]:
        """Let the steps of the tuner run for `job` within the block: its registry has the job's config and these steps.

        Afterwards the registry has its own configs again.

        At the end of the block a replaced `_cast_adapter_dtype` decides `job.options.upcast`. If the block raises,
        modules that a replacement put into the model are taken out.

        Raises:
            UnsupportedLayerError: a replacement put another module into the model.
        """
        self.job, self.paths = job, map_paths(job.tree)
        places = [(parent, name, parent._modules[name]) for parent, name in job.tree.places.values()]
        registry = get_registry(self.tuner)
        configs = dict(registry.peft_config)
        registry.peft_config[job.adapter], registry.steps = job.cfg, self
        try:
            yield
            if CAST in self.replaced:
                self._ask(CAST, adapter_name=job.adapter, autocast_adapter_dtype=job.options.upcast)
                job.options = replace(job.options, upcast=self.cast)
            self._check_intact(places)
        except BaseException:
            for parent, name, module in places:
                parent._modules[name] = module
            raise
        finally:
            registry.steps = None
            if job.adapter in configs:
                registry.peft_config[job.adapter] = configs[job.adapter]
            else:
                del registry.peft_config[job.adapter]

    def _ask(self, step: str, *args: object, **kwargs: object) -> object:
        """Call a step of the tuner and return its answer.

        Raises the error in `refused`, which `record_call` noted, even if the replacement caught it.
        """
        answer = getattr(self.tuner, step)(*args, **kwargs)
        if self.refused is not None:  # also if the replacement caught the error
            raise self.refused
        return answer

    def describe_step(self, step: str) -> str:
        """Return "<class of the tuner>.<step>, replaced by <function>" for error texts, the function as
        `describe_function` names it.
        """
        return f"{type(self.tuner).__name__}.{step}, replaced by {describe_function(getattr(self.tuner, step))}"

    def describe_steps(self) -> str:
        """Return the descriptions of all replaced steps, joined by "and"."""
        return " and ".join(map(self.describe_step, self.replaced))

    def _check_intact(self, places: Iterable[tuple[nn.Module, str, nn.Module | None]]) -> None:
        """Raise UnsupportedLayerError if one of the places (parent, name, module) holds another module now, or none.

        The text names the replaced steps, the new type and the path.
        """
        for parent, name, module in places:
            if (now := parent._modules.get(name)) is not module:
                where = name if module is None else self.paths.get(module, name)
                raise UnsupportedLayerError(
                    f"{self.describe_steps()}, put a {type(now).__name__} in the place of '{where}': "
                    f"graft makes the layers of adapter '{self.job.adapter}' itself. For another layer type write an "
                    "Op, for other mathematics a graft.Method (docs/architecture.md)."
                )

    # modules

    def decide(self, path: str, config_verdict: Verdict) -> Verdict:
        """Return the verdict about a path after the replaced `_check_target_module_exists`.

        If its truth value agrees with `config_verdict`, or it is not replaced, that is returned. Else the outcome is
        "matched" for True and "left" for False.
        """
        if CHECK not in self.replaced:
            return config_verdict
        answer = self._ask(CHECK, self.job.cfg, path)
        if bool(answer) == (config_verdict.outcome == "matched"):
            return config_verdict
        return Verdict("matched", config_verdict.entry or path) if answer else Verdict("left", config_verdict.entry)

    def adapt_modules(self) -> None:
        """Call the replaced `_create_and_replace` for each site in `job.sites`, which is emptied first and then
        holds the sites that it chose. Keeps a copy of the config in `before`, to see later changes; without a
        replacement does only that.
        """
        self.before = copy.copy(self.job.cfg)
        if CREATE not in self.replaced:
            return
        targets, self.job.sites = self.job.sites, {}
        for path in targets:
            self._create(path)

    def adapt_tied_modules(self) -> None:
        """Call the replaced `_create_and_replace` for each module tied to a targeted embedding.

        Without a replacement does nothing.

        A module that it adapts stays in `targets.tied` and leaves `targets.sites`. One that it leaves out is removed
        from `targets.tied`, so that it does not follow the embedding.

        Raises:
            UnsupportedLayerError: it adapts another module for a tied one.
            NoMatchingPeftModuleError: it was asked for targets and has left out all.
        """
        if CREATE not in self.replaced:
            return
        job = self.job
        for path in [k for k, source in job.tied.items() if source in job.sites]:
            before = dict(self.noted)
            self._create(path)
            new = self.noted.keys() - before.keys()
            if new - {path}:
                raise UnsupportedLayerError(
                    f"{self.describe_step(CREATE)}, adapts {sorted(new)} for '{path}', which is tied to "
                    f"'{job.tied[path]}' and has its tensors: leave ensure_weight_tying off in the config "
                    f"of adapter '{job.adapter}'."
                )
            del (job.sites if new else job.tied)[path]
        if self.asked and not self.noted:
            raise NoMatchingPeftModuleError(
                f"Adapter '{job.adapter}' adapts nothing: {self.describe_step(CREATE)}, left out all "
                f"{len(self.asked)} targets, such as '{self.asked[0]}'. Name others in target_modules, or restore "
                "the step."
            )

    def _create(self, path: str, parameter: str | None = None, key: str | None = None, cfg: object = None) -> None:
        """Call the replaced `_create_and_replace` for a module, or with `parameter` for one of its parameters, at the
        path `key`. Notes the target in `target` and `asked`. The report's `skipped` gets the target if that call chose
        no site.

        Raises:
            UnsupportedLayerError: it put another module into the target's place, or chose a site that cannot be used.
        """
        job, self.target = self.job, key or path
        (parent, name), module, count = job.tree.places[path], job.tree.modules[path], len(self.noted)
        options = {} if parameter is None else {"parameter_name": parameter}
        self.asked.append(self.target)
        before = parent._modules[name]
        self._ask(CREATE, cfg or job.cfg, job.adapter, module, name, parent, current_key=self.target, **options)
        self._check_intact([(parent, name, before)])
        if len(self.noted) == count:
            kind = get_type_name(module) if parameter is None else "Parameter"
            job.report.skipped.append(Skipped(self.target, kind, f"left out by {self.describe_step(CREATE)}"))

    # parameters

    def adapt_parameters(self) -> tuple[dict[str, Site], UnmatchedEntries]:
        """Return the sites of the parameters that the steps adapt, by path, and the entries of `target_parameters` that
        match none.

        A replaced `_inject_parameters` decides if there is one; then the entries are all of them if it chose no site,
        else none. Without it each matching parameter goes through `_create_and_replace`.
        """
        job, before = self.job, set(self.noted)
        if PARAMETERS in self.replaced:
            names = {"peft_config": job.cfg, "model": job.model, "adapter_name": job.adapter}
            self._ask(PARAMETERS, **names, low_cpu_mem_usage=job.options.on_meta)
            idle = {} if len(self.noted) > len(before) else find_unmatched(job.cfg.target_parameters, set(), ())
        else:
            idle = self.adapt_named_parameters(job.cfg)[1]
        return {key: job.sites[key] for key in self.noted if key not in before}, idle

    def adapt_named_parameters(self, cfg: PeftConfig) -> tuple[list[str], UnmatchedEntries]:
        """Call the replaced `_create_and_replace` for each parameter that `cfg` names, in the model's order.

        Return the paths of all of them, and the entries that match none. The original `_inject_parameters` does this.
        Raises the errors of `find_named_parameters` and of `_create`.
        """
        matches, idle = find_named_parameters(cfg, skip_empty_carriers(self.job.model), self.job.tree, self.job.report)
        for key, path, name in matches:
            self._create(path, name, key, cfg)
        return [key for key, *_ in matches], idle

    # the work of the original steps

    def record_call(
        self, cfg: PeftConfig, adapter: str, target: Any, place: tuple[Any, str], key: str | None, parameter: str | None
    ) -> None:
        """Record a call of the original `_create_and_replace`. `place` is (parent, name there).

        The site of `target`, or of its parameter, goes to `job.sites`. The call's config goes to `noted`, as a copy if
        it differs from the adapter's, else as None.

        An error is kept in `refused` as well, so that `_ask` raises it if the replacement catches it.

        Raises:
            UnsupportedLayerError: another adapter or config class, no module of the model, another place than the
                module's, a site that is recorded already, or a parameter that cannot be adapted.
        """
        job, tree, why = self.job, self.job.tree, None
        path = self.paths.get(target, "") if isinstance(target, nn.Module) else ""
        try:
            if adapter != job.adapter:
                why = f"adapter '{adapter}' instead of '{job.adapter}', which is being injected"
            elif not isinstance(cfg, job.method.config):
                why = f"a {type(cfg).__name__} instead of the adapter's {job.method.config.__name__}, or a copy of it"
            elif path not in tree.places:
                why = f"a {type(target).__name__} that is no module of the model"
            # a place within the module's own layers is right, too
            elif tree.places[path] != place and self.paths.get(place[0]) != path:
                why = f"'{path}', and places it as '{place[1]}' of a {type(place[0]).__name__}, where it is not"
            else:
                site_key, site = path, get_site(path, tree.modules[path], tree)
                if parameter is not None:
                    site_key, site = resolve_parameter(path, parameter, tree, job.sites, job.adapter)
                if site_key in self.noted:
                    why = f"'{site_key}' twice: for '{self.noted[site_key].target}' already"
            if why is not None:
                raise UnsupportedLayerError(
                    f"For '{self.target}' {self.describe_steps()}, passes on {why}. Pass on the target, or another "
                    "module with its parent and its name there, each once; or nothing, to leave the target out."
                )
        except Exception as e:
            self.refused = e
            raise
        job.sites[site_key] = site
        self.noted[site_key] = SiteConfig(key or self.target, None if cfg == self.before else copy.copy(cfg))

    def get_site_config(self, key: str) -> tuple[PeftConfig, str]:
        """Return the config for the site at `key`, and the path that its patterns use.

        The config is the recorded one, else the adapter's: if a replacement changed that after the search, the copy
        from before. The path is the recorded one, also where it is recorded without a config; `key` if nothing is
        recorded.
        """
        noted = self.noted.get(key, SiteConfig(key, None))
        # a replacement may have changed it since
        adapter_config = self.job.cfg if self.job.cfg == self.before else self.before
        return adapter_config if noted.cfg is None else noted.cfg, noted.target


def map_paths(tree: ModuleTree) -> dict[nn.Module, str]:
    """Return {module: path} for a survey, as a new dict.

    Also has the empty carriers, with the path of the module beneath, the layers of parameters, and the modules within
    these. A module in several of these has the path of the last.
    """
    paths = dict(tree.paths)
    for path, base in tree.vacant.items():
        parent, name = tree.places[path]
        paths[parent._modules[name]] = paths[base]  # type: ignore[index]
    for path, nest in tree.nests.items():
        paths |= dict.fromkeys((*nest, innermost(tree.modules[path])), path)
    return paths
