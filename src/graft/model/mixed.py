# SPDX-License-Identifier: Apache-2.0
"""PeftMixedModel: adapters of several methods on one model, active at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graft.config.base import PeftConfig
from graft.core.carrier import check_not_merged
from graft.core.errors import ConfigError
from graft.inject.parts import HOLDER, get_registry
from graft.inject.steps import mark_step
from graft.methods import METHODS, method_of
from graft.model.compose import Composition
from graft.model.peft_model import PeftModel
from graft.model.tuner import Tuner, as_tuner_method, tuner_of

if TYPE_CHECKING:
    from graft.combine.weighted import WeightedReport


class MixedModel(Tuner):
    """A tuner with adapters of any methods on its model's layers.

    On a layer each adapter acts on the layer that the ones before it made. Methods act in the order of their first
    adapters there, adapters of one method in the order of `active_adapters`.
    """

    _method = None

    def __getattr__(self, name: str) -> Any:
        """Return a method or property that a loaded adapter's method adds to its tuners (`timestep` of T-LoRA); else
        the attribute of a tuner.

        Submodules, and any name before a registry exists, are read as on a tuner, too. If several methods define a
        function of that name, a call runs all and returns the first result. Such a call raises ConfigError if an
        argument names an adapter with a method that lacks the function. Of a property, the first adapter's counts.
        """
        registry = self.__dict__.get(HOLDER)
        if registry is None or name in self._modules:
            return super().__getattr__(name)
        owners = {n: method_of(config.peft_type) for n, config in registry.peft_config.items()}
        functions = list(dict.fromkeys(m.tuner_methods[name] for m in owners.values() if name in m.tuner_methods))
        if not functions:
            return super().__getattr__(name)
        bound = [as_tuner_method(function) for function in functions]
        if isinstance(bound[0], property):
            return bound[0].__get__(self)

        def run(*args: object, **kwargs: object) -> object:
            """Call the functions of that name in the order of the adapters; return the first result.

            Raises ConfigError, before any runs, if an argument names an adapter with a method that has no such
            function.
            """
            for value in (*args, *kwargs.values()):
                if isinstance(value, str) and value in owners and name not in owners[value].tuner_methods:
                    kind = registry.peft_config[value].peft_type.value
                    raise ConfigError(
                        f"Adapter '{value}' is {kind}, which has no `{name}`. Name an adapter of a method that has it."
                    )
            results = [function(self, *args, **kwargs) for function in bound]
            return results[0]

        return run

    @mark_step
    def _create_and_replace(self, peft_config: PeftConfig, *args: object, **kwargs: object) -> None:
        """Call `_create_and_replace` of the tuner class of the config's method, which another package may have
        replaced.
        """
        tuner_of(peft_config.peft_type)._create_and_replace(self, peft_config, *args, **kwargs)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: object, **kwargs: object
    ) -> WeightedReport:
        """Add an adapter, inactive and frozen, that combines others, and return a report of it.

        Adapters of one method that can hold a sum (LoRA, AdaLoRA, LoHa, IA3) give one of that method. All others with a
        ΔW give a plain LoRA adapter. Further arguments are those of `add_weighted_adapter` of a model of one method.

        Raises:
            NotImplementedError: an adapter has no ΔW. Nothing has changed.
        """
        from graft.combine.weighted import add_weighted_mixed  # not needed to import graft

        return add_weighted_mixed(get_registry(self), adapters, weights, adapter_name, *args, **kwargs)


class PeftMixedModel(PeftModel):
    """A base model with adapters of different methods; several can be active: `set_adapter(["a", "b"])`.

    Every method that acts on layers can be active together with every other. A method that replaces a module (LN
    tuning) must be alone on it while active.

    Raises:
        ConfigError: the method acts on no layers, such as a prompt.
    """

    _mixed_tuner = MixedModel

    def set_adapter(self, adapter_name: str | Sequence[str] | Composition, inference_mode: bool = False) -> None:
        """Make these adapters active, in this order or as a composition says, and trainable unless `inference_mode`.

        Raises:
            AdapterNotFoundError: one of them is not loaded.
            ValueError: two of them cannot be active together.
            RoutingError: as `PeftModel.set_adapter`.
        """
        self._registry.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove one adapter or several, each once.

        Raises:
            AdapterNotFoundError, ValueError: one is not loaded, or is merged. Nothing has changed then.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        self._registry.check_known(names)
        check_not_merged(names, self._registry.merged_adapters)
        for name in names:
            self._registry.delete_adapter(name)


PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[str, type[MixedModel]] = dict.fromkeys(METHODS, MixedModel)
