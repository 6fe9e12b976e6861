# SPDX-License-Identifier: Apache-2.0
"""A frozen copy of an adapter, such as the reference policy of a training that has its policy on the same base."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graft.combine.adding import find_start_change
from graft.config.base import PeftConfig
from graft.core.errors import ConfigError
from graft.inject.job import Options
from graft.inject.parts import get_registry
from graft.io.files import LoadedWeights
from graft.io.load import CheckpointValues
from graft.io.save import get_peft_model_state_dict


class Reference:
    """A frozen copy of an adapter. Calling it runs the model with the copy instead of the active adapters.

        reference = model.reference("default")
        before = reference(input_ids=ids).logits

    The copy is an inactive adapter of the model, by the name `name`. Rows of a batch may use it next to others
    (`adapter_names`). It never trains, whatever is called, and `save_pretrained` leaves it out unless it is selected.
    """

    def __init__(self, model: nn.Module, name: str):
        """Keep the model and the name of the copy."""
        self.model, self.name = model, name

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Run the model with the copy on all rows, without gradients, and return the output.

        The mode of the model stays; `adapter_names` among the arguments is a TypeError.

        The number of rows is the length of the first argument that is a tensor with dimensions.

        Raises:
            ConfigError: no argument is such a tensor.
        """
        rows = next((len(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()), None)
        if rows is None:
            raise ConfigError(f"Reference '{self.name}' is called without a tensor that tells the number of rows.")
        with torch.no_grad():
            return self.model(*args, adapter_names=[self.name] * rows, **kwargs)

    def remove(self) -> None:
        """Delete the copy from the model, by `delete_adapter`. A second call raises AdapterNotFoundError."""
        self.model.delete_adapter(self.name)


def make_reference(
    model: nn.Module, adapter_name: str, name: str | None, add: Callable[[str, PeftConfig, Options], None]
) -> Reference:
    """Copy an adapter, frozen and inactive, and return its Reference.

    `PeftModel.reference` has the arguments and errors. The name is "<adapter>-reference" if None. The copy is in the
    registry's `frozen`: it never trains, and is saved only if selected. Waits until no call runs. Sharded tensors are
    gathered, so all processes call this.

    If the adapter changed the base at its start (PiSSA), the copy has `init_lora_weights=True` and no `lora_shift`: the
    base has changed already.

    Args:
        add: adds an adapter with this name, config and options to the model.
    """
    registry = get_registry(model)
    registry.check_known([adapter_name])
    name = f"{adapter_name}-reference" if name is None else name
    config = copy.deepcopy(registry.peft_config[adapter_name])
    config.inference_mode = True
    with registry.call.gate.call(f"reference({adapter_name!r})"):
        tensors = get_peft_model_state_dict(model, None, adapter_name, save_embedding_layers=False)
        state = {key: t.detach().clone() for key, t in tensors.items()}
    if find_start_change(config):  # the base has changed already, so the copy is plain
        config.init_lora_weights = True
        state = {key: t for key, t in state.items() if ".lora_shift." not in key}
    loaded = LoadedWeights(state, f"adapter '{adapter_name}'", finite=True)
    with registry.call.gate.change(f"reference({adapter_name!r})", (), late=True):
        values = CheckpointValues(model.get_base_model(), config, name, loaded)
        add(name, config, Options(values=values))
        registry.frozen.add(name)
        registry.set_requires_grad(name, False)
    return Reference(model, name)
