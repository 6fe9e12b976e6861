# SPDX-License-Identifier: Apache-2.0
"""PeftMixedModel: adapters of several methods on one model, active at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graft.config.base import PeftConfig
from graft.core.carrier import check_not_merged
from graft.core.errors import ConfigError
from graft.inject.parts import HOLDER, get_registry
from graft.methods import METHODS, method_of
from graft.model.compose import Composition
from graft.model.peft_model import PeftModel
from graft.model.tuner import Tuner, as_tuner_method, tuner_of
from graft.model.tuner_type import mark_step

if TYPE_CHECKING:
    from graft.combine.weighted import WeightedReport


class MixedModel(Tuner):
    """A tuner with adapters of any methods on its model's layers, side by side.

    Each adapter acts on the layer that those before it made: methods in the order in which they came to the layer,
    adapters of one method in the order in which they are active.
    """

    _method = None

    def __getattr__(self, name: str) -> Any:
        """Return the method or the property that the model class of a loaded adapter's method has (`timestep` of
        T-LoRA); else the attribute of a tuner. Where methods have different ones, they run one after the other."""
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
            """Call the function, or all of that name. Raises ConfigError for an adapter whose method has none."""
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
        """Do what the tuner class of the config's method does."""
        tuner_of(peft_config.peft_type)._create_and_replace(self, peft_config, *args, **kwargs)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: object, **kwargs: object
    ) -> WeightedReport:
        """Add an adapter, inactive and frozen, that combines others: those of one method that can hold a sum (LoRA,
        AdaLoRA, LoHa, IA3) into one of their kind, all others with a ΔW into a plain LoRA adapter.

        Arguments are those of `add_weighted_adapter` of a model of one method.

        Raises:
            NotImplementedError: an adapter has no ΔW. Nothing has changed.
        """
        from graft.combine.weighted import add_weighted_mixed  # not needed to import graft

        return add_weighted_mixed(get_registry(self), adapters, weights, adapter_name, *args, **kwargs)


class PeftMixedModel(PeftModel):
    """A base model with adapters of different methods, of which several can be active: `set_adapter(["a", "b"])`.

    Every method that acts on layers can stand beside every other. A module that stands in for a layer (LN tuning) is
    alone on it while it is active.

    Raises:
        ConfigError: the method acts on no layers, such as a prompt.
    """

    _mixed_tuner = MixedModel

    def _extend_config(self, config: PeftConfig) -> None:
        if config.is_prompt_learning:
            raise ConfigError(
                f"The provided `peft_type` '{config.peft_type.value}' is not compatible with the `PeftMixedModel`: it "
                "acts on no layers. Leave out mixed=True."
            )

    def set_adapter(self, adapter_name: str | Sequence[str] | Composition, inference_mode: bool = False) -> None:
        """Make these adapters active, in this order, and trainable unless for inference.

        Raises:
            AdapterNotFoundError: one of them is not loaded.
            ValueError: two of them cannot be active together.
        """
        self._registry.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove one adapter or several.

        Raises:
            ValueError: one is not loaded, or is merged. Nothing has changed then.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        self._registry.check_known(names)
        check_not_merged(names, self._registry.merged_adapters)
        for name in names:
            self._registry.delete_adapter(name)


PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[str, type[MixedModel]] = dict.fromkeys(METHODS, MixedModel)
