# SPDX-License-Identifier: Apache-2.0
"""Tuner: a model with adapters on its layers, PEFT's `base_model`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from importlib import import_module
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from graft.config.base import PeftConfig, check_config
from graft.core.base_config import model_config
from graft.core.errors import ConfigError, warn
from graft.core.method import Method
from graft.core.rows import Run
from graft.inject.job import Options
from graft.inject.match import Matcher, is_targeted
from graft.inject.parts import HOLDER, get_registry, unwrap_model
from graft.inject.steps import INJECT, OF_METHODS, STEPS, ReplacedSteps, mark_step, names_of_replaced
from graft.inject.survey import ModuleTree, survey_model
from graft.methods import METHODS, PROMPTS, method_of
from graft.model.audit import warn_at_first_gradient
from graft.model.checkpoints import cast_adapter_dtype, fill_adapter
from graft.model.registry import Registry


def delegate_to_registry(name: str) -> Callable[..., object]:
    """Return a tuner's method that calls the method `name` of the tuner's registry, with its signature and
    docstring.
    """

    @wraps(getattr(Registry, name))
    def run(self: nn.Module, *args: object, **kwargs: object) -> object:
        """Call the registry's method, of whatever class the registry is, and return its result."""
        return getattr(self.__dict__[HOLDER], name)(*args, **kwargs)

    return run


NAMES = (  # methods of PEFT's tuners that make layers; graft's tuners lack them
    "_check_new_adapter_config _create_and_replace_parameter _create_new_module _get_adapter_state_dict "
    "_mark_only_adapters_as_trainable _prepare_adapter_config _prepare_model _remap_adapter_state_dict_for_load "
    "_replace_module _unload_and_optionally_merge"
)
INTERNALS = frozenset(NAMES.split())
OVERRIDES: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()  # names that bodies of classes override
INSTEAD = (
    "graft.plan() shows what an adapter is put on; for new mathematics write a graft.Method, for a new layer type an "
    "Op (docs/architecture.md); for a tuner written for PEFT use PEFT itself"
)


def describe_missing(name: str, holder: str) -> str:
    """Return the error for a function of PEFT's tuners that graft lacks, with its remedies."""
    return f"{holder}.{name} is not in graft, which makes layers in other ways: {INSTEAD}."


class TunerType(type):
    """The metaclass of tuners, which refuses patches and subclasses that PEFT's tuners obey and graft's do not.

    PEFT's tuners make layers one by one, in methods that subclasses override and other packages replace. Four of these
    steps are in graft (`inject/steps.py`). Any other override would never run. Defining a class with an override is no
    error, since packages do so on import; making an instance of it is.
    """

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, object], **options: object) -> TunerType:
        """Make the class; record in `OVERRIDES` the functions of PEFT that its body overrides, and in `OF_METHODS` its
        method, if the body has `_method`.

        Overrides are all functions in `INTERNALS`, and those in `STEPS` that are not graft's own.
        """
        cls = super().__new__(mcs, name, bases, namespace, **options)
        functions = {n: getattr(value, "__func__", value) for n, value in namespace.items()}
        OVERRIDES[cls] = frozenset(n for n, f in functions.items() if n in INTERNALS or f not in STEPS.get(n, [f]))
        if "_method" in namespace:
            OF_METHODS[namespace["_method"]] = cls
        return cls

    def __getattr__(cls, name: str) -> object:
        """Raise AttributeError, with a remedy for functions of PEFT's tuners that graft lacks."""
        if name in INTERNALS:
            raise AttributeError(describe_missing(name, cls.__name__))
        raise AttributeError(f"type object '{cls.__name__}' has no attribute '{name}'")

    def __setattr__(cls, name: str, value: object) -> None:
        """Set an attribute of the class.

        Raises AttributeError for functions of PEFT's tuners that graft never calls.
        """
        if name in INTERNALS:
            raise AttributeError(
                f"setting {cls.__name__}.{name} would change nothing, as graft never calls it: {INSTEAD}."
            )
        super().__setattr__(name, value)

    def __call__(cls, *args: object, **kwargs: object) -> Any:
        """Make an instance as usual.

        Raises TypeError, with the remedy, if the class or a base overrides functions that graft never calls
        (`OVERRIDES`); nothing is made then.
        """
        overridden = sorted({name for c in cls.__mro__ for name in OVERRIDES.get(c, ())})
        if overridden:
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(overridden)}, which graft never calls: that code would not "
                f"run. Instead: {INSTEAD}."
            )
        return super().__call__(*args, **kwargs)


class Tuner(nn.Module, metaclass=TunerType):
    """The user's model as `.model`, with adapters on its layers. Attributes that PEFT's tuners lack are the model's.

    Its functions for adapters are those of its `Registry`, by the same names.

    `tuner_of` makes the subclasses (`LoraModel`, …) from the table of methods; they differ only in their method. A
    tuner leaves adapters in the base's dtype; a PeftModel trains them in float32.
    """

    _method: type[Method] | None  # None: adapters of any method
    _registry_class: type[Registry] = Registry
    uses_shared_state = False  # layers share tensors that stand here: `inject_adapter_in_model` refuses the method

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        *,
        options: Options | None = None,
        tree: ModuleTree | None = None,
    ):
        """Inject an adapter into `model`, in place, and make it active, trainable unless the config has
        `inference_mode`. `model.peft_config` becomes the registry's configs.

        If the model has layers with this adapter already (transformers loads so), only the values of `options.values`
        are put in.

        Args:
            peft_config: a config, or {adapter_name: config} of one.
            state_dict: adapt exactly the modules that it has tensors for.
            options: replace the three arguments before.
            tree: a survey of the model, if the caller made one.

        Raises:
            ConfigError: a dict has other adapters.
            Other errors: as `get_peft_model`; the model is then as before.
        """
        super().__init__()
        if isinstance(peft_config, dict):
            if list(peft_config) != [adapter_name]:
                raise ConfigError(
                    f"{type(self).__name__} begins with one adapter, '{adapter_name}', and got configs of "
                    f"{list(peft_config)}: pass one, then add_adapter() the others."
                )
            peft_config = peft_config[adapter_name]
        registry = attach_registry(self, model, tree)
        options = options or Options(upcast=False, on_meta=low_cpu_mem_usage, state_dict=state_dict)
        values: Any = options.values
        if values is not None and any(adapter_name in part.adapters for part in registry.carriers()):
            fill_adapter(self, values, False, options.upcast)  # transformers has loaded it into the model
            registry.peft_config[adapter_name].inference_mode = peft_config.inference_mode
        else:
            registry.add_adapter(adapter_name, peft_config, options)
        registry.set_adapter(adapter_name, inference_mode=registry.peft_config[adapter_name].inference_mode)
        model.peft_config = registry.peft_config  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that torch does not find on this module from the model.

        Raises:
            AttributeError: the model lacks it as well, or is not set, or the name begins with "__". Also for a function
                of PEFT's tuners that graft lacks (`INTERNALS`), even if the model has one; the text then has a remedy.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("__"):
                raise
            if name in INTERNALS:
                raise AttributeError(describe_missing(name, type(self).__name__)) from None
            return getattr(self.model, name)

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run the model as one call, with its adapters, and return its output.

        Arguments of the methods are taken out of `kwargs`.
        """
        registry = get_registry(self)
        own_arguments = {name: kwargs.pop(name) for name in registry.arguments if name in kwargs}
        with registry.calling("forward"), registry.enter_methods(Run(args, kwargs, own_arguments)) as finish:
            return finish(self.model(*args, **kwargs))

    # steps of an injection: their originals, which `inject/steps.py` describes

    @mark_step
    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str | None = None,
        *,
        parameter_name: str | None = None,
    ) -> None:
        """Record that the injection under way adapts a module, or a parameter of it, with this config.

        No layer is made here.

        Raises:
            RuntimeError: no injection is under way that asks replaced steps.
        """
        steps = steps_under_way(self, "_create_and_replace")
        steps.record_call(peft_config, adapter_name, target, (parent, target_name), current_key, parameter_name)

    @mark_step
    def _inject_parameters(
        self, peft_config: PeftConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool = False
    ) -> list[str]:
        """Record that the injection under way adapts the parameters in `target_parameters`; return their paths.

        Raises:
            RuntimeError: no injection is under way that asks replaced steps.
        """
        return steps_under_way(self, "_inject_parameters").adapt_named_parameters(peft_config)[0]

    @staticmethod
    @mark_step
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        """Return True if a config targets the module at path `key`."""
        return is_targeted(peft_config, key)

    @mark_step
    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Widen an adapter's half-precision tensors to float32, if `autocast_adapter_dtype`.

        While an injection asks replaced steps, only record the choice for it.
        """
        steps = get_registry(self).steps
        if steps is None:
            cast_adapter_dtype(self, adapter_name, autocast_adapter_dtype)
        else:
            steps.cast = autocast_adapter_dtype

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        """Do nothing: an injection refuses modules that it cannot adapt, once it knows them all."""

    # functions of the registry

    peft_config = property(attrgetter(f"{HOLDER}.peft_config"))
    active_adapters = property(attrgetter(f"{HOLDER}.active_adapters"))
    active_adapter = property(
        attrgetter(f"{HOLDER}.active_adapters"),
        lambda self, names: self.set_adapter(names),
        doc="The active adapters. Setting it is `set_adapter`.",
    )
    inject_adapter = mark_step(delegate_to_registry("inject_adapter"))

    # facts

    @property
    def target_module_mapping(self) -> Mapping[str, list[str] | str]:
        """The method's default target_modules by model_type; {} for a tuner of any method."""
        return {} if self._method is None else self._method.targets

    get_model_config = staticmethod(model_config)

    @property
    def targeted_module_names(self) -> list[str]:
        """The paths of the adapted modules.

        Layers of parameters are left out, and keys that are not the path of a module.
        """
        return [key for key, layer in get_registry(self).layers.items() if layer.site.path == key]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The paths of the adapted parameters, such as stacks of experts."""
        return [key for key, layer in get_registry(self).layers.items() if layer.site.path != key]

    @property
    def prefix(self) -> str:
        """The beginning of the names of the method's tensors, "lora_"; "" for a tuner of any method."""
        return "" if self._method is None else self._method.prefix


VERBS = (  # functions of a registry that its tuner has as well
    "set_adapter delete_adapter set_requires_grad enable_adapter_layers disable_adapter_layers merge_adapter "
    "unmerge_adapter merge_and_unload unload auxiliary_loss supports_lora_conversion"
)
for verb in VERBS.split():
    setattr(Tuner, verb, delegate_to_registry(verb))


def attach_registry(tuner: Tuner, model: nn.Module, tree: ModuleTree | None = None) -> Registry:
    """Make a registry for a tuner and a model, without changing the model; return it.

    Its class is `tuner._registry_class`, called with the model, `tuner._method`, `tree` (also None) and the tuner. The
    tuner keeps it as `_graft`, and the model becomes `tuner.model`.
    """
    registry = tuner.__dict__[HOLDER] = tuner._registry_class(model, tuner._method, tree, tuner)
    tuner.model = model
    return registry


def find_replaced_steps(model: nn.Module, config: PeftConfig) -> ReplacedSteps | None:
    """Return the replaced steps that an injection into a model would ask; None if no client replaced one.

    For a model without a registry an empty tuner of the method's class is made, and attached to the model if it has
    such steps. Otherwise the result has the registry's tuner. The injection step itself does not count.
    """
    method, registry = method_of(config.peft_type), get_registry(unwrap_model(model))
    if registry is None:
        tuner = Tuner.__new__(tuner_of(config.peft_type))
        nn.Module.__init__(tuner)
    else:
        tuner = registry.holder
    steps = [name for name in names_of_replaced(tuner, method) if name != INJECT]
    if steps and registry is None:
        attach_registry(tuner, model)
    return ReplacedSteps(tuner, steps) if steps else None


def make_target_test(tuner: Tuner, config: PeftConfig) -> Callable[[str], bool]:
    """Return a function that is passed a path and returns True if the config targets it: a client's replacement of the
    step, else graft's.
    """
    is_replaced = "_check_target_module_exists" in names_of_replaced(tuner, None)
    check = partial(tuner._check_target_module_exists, config)
    matcher = Matcher(config)
    return check if is_replaced else lambda path: matcher(path).outcome == "matched"


def steps_under_way(tuner: Tuner, step: str) -> ReplacedSteps:
    """Return the Steps of the injection under way. Raises RuntimeError, with the name of `step`, if there is none."""
    steps: ReplacedSteps | None = get_registry(tuner).steps
    if steps is None:
        raise RuntimeError(
            f"{type(tuner).__name__}.{step} makes no layer: a replaced step calls it, within an injection, to choose "
            "targets. Call add_adapter() with a config that names the layer."
        )
    return steps


_CLASSES: dict[str, type[Tuner]] = {}  # no cache of a function: two threads would make two classes


def tuner_of(peft_type: str) -> Any:
    """Return the Tuner subclass of a peft_type (text or enum), named as PEFT's; for a prompt method, the class of its
    encoder.

    A class is made on first use and kept, one for each method. Functions that the method adds to tuners, and
    `add_weighted_adapter`, become its methods. Each class has a separate `_create_and_replace`, so that packages can
    replace it for one method. Raises ConfigError for an unknown type.
    """
    name = getattr(peft_type, "value", peft_type)
    method = method_of(name)
    if name in PROMPTS or name in _CLASSES:
        return _CLASSES.get(name, method)
    from graft.combine import weighted  # not needed to import graft

    module, base = METHODS[name].base.split(":")
    members = {"_method": method, "uses_shared_state": method.shares, "__module__": __name__, "__doc__": Tuner.__doc__}
    functions = {**method.tuner_methods, "add_weighted_adapter": weighted.choose_combination(name)}
    members |= {key: as_tuner_method(value) for key, value in functions.items()}
    members["_create_and_replace"] = Tuner._create_and_replace  # each has its own, to be replaced for its method alone
    new = type(METHODS[name].tuner, (getattr(import_module(f"graft.{module}"), base),), members)
    return _CLASSES.setdefault(name, new)


def as_tuner_method(function: Any) -> Any:
    """Return a method of a tuner that calls `function` with the tuner's registry in place of the tuner; a property
    becomes a read-only one.
    """
    if isinstance(function, property):
        read: Any = function.fget
        return property(lambda self: read(get_registry(self)))

    @wraps(function)
    def run(self: nn.Module, *args: object, **kwargs: object) -> object:
        """Call the function with the tuner's registry."""
        return function(get_registry(self), *args, **kwargs)

    return run


def __getattr__(name: str) -> Any:  # `pickle` finds the generated classes here
    """Return the tuner class of that name, made if needed; pickle finds the generated classes here.

    Raises AttributeError for another name.
    """
    for peft_type, row in METHODS.items():
        if row.tuner == name:
            return tuner_of(peft_type)
    raise AttributeError(name)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Inject an adapter, make it active, and return the same model, unwrapped: keys have no `base_model.model.` prefix.

    The adapter trains unless its config has `inference_mode`. `model.peft_config` becomes a dict of its configs.
    Adapters have the base's dtype, half precision too: only a PeftModel widens it. The first gradient gives a warning
    if the adapter has dropout and is in eval mode.

    Args:
        low_cpu_mem_usage: leave the adapter's tensors on the meta device.
        state_dict: adapt exactly the layers that it has tensors for; warn if the config targets others.

    Raises:
        ValueError: the method needs a PeftModel: prompts, and methods with tensors that layers share.
        NoMatchingPeftModuleError, UnsupportedLayerError, ConfigError: as `get_peft_model`; nothing has changed.
    """
    check_config(peft_config)
    method = method_of(peft_config.peft_type)
    if peft_config.is_prompt_learning:
        raise ValueError(
            f"{peft_config.peft_type.value} cannot be injected without a wrapper: prompts act on the calls that go "
            "through it. Please use `get_peft_model` instead."
        )
    if method.shares:
        raise ValueError(
            f"`inject_adapter_in_model` does not support {peft_config.peft_type} because it uses shared "
            "state stored on the tuner. Please use `get_peft_model` instead."
        )
    cls = tuner_of(peft_config.peft_type)
    tuner = cls(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
    if state_dict is not None:
        warn_other_targets(tuner, peft_config, adapter_name)
    model.peft_config = dict(tuner.peft_config)  # type: ignore[assignment]
    warn_at_first_gradient(get_registry(tuner).carriers(), tuner.peft_config, adapter_name)
    return model


def warn_other_targets(tuner: Tuner, config: PeftConfig, adapter_name: str) -> None:
    """Give a RuntimeWarning if the config targets other layers than the model has, as a state dict named them.

    It lists the layers of either side only.

    A config without `target_modules` gives no warning. Layers that the method adapts along with targets count as
    targeted.
    """
    if getattr(config, "target_modules", None) is None:
        return
    targets = make_target_test(tuner, config)
    wanted = {k for k in survey_model(tuner.model).modules if targets(k)}
    wanted |= set(method_of(config.peft_type).find_companions(config, tuner.model, sorted(wanted)))
    adapted = set(get_registry(tuner).layers)
    if wanted == adapted:
        return
    text = (
        "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the provided "
        "state_dict. The state_dict decides. "
    )
    if wanted - adapted:
        text += f"The PEFT config contained these additional target modules: {sorted(wanted - adapted)}. "
    if adapted - wanted:
        text += f"The state_dict contained these additional target modules: {sorted(adapted - wanted)}. "
    warn(text, RuntimeWarning)
