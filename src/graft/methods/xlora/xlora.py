# SPDX-License-Identifier: Apache-2.0
"""X-LoRA: Mixture of Low-Rank Adapter Experts, arXiv 2402.07148.

Every call runs the model twice. The hidden states of the first pass tell the classifier how much each expert counts at
each token; these are the gates of the second. The experts are LoRA adapters, which know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn

from graft.core.errors import ConfigError, RoutingError
from graft.core.method import Layers, Method
from graft.core.rows import BASE, Rows
from graft.core.run import Run
from graft.methods.xlora.api import API
from graft.methods.xlora.config import XLoraConfig
from graft.methods.xlora.gates import Scalings, chosen

CLASSIFIER = "internal_xlora_classifier"
CACHES = ("cache", "past_key_values")  # the argument in transformers from 5.2x on, and before


class XLora(Method):
    """It has no site of its own: its one tensor carrier is the classifier, on the tuner (`model/xlora.py`)."""

    config = XLoraConfig
    prefix = "xlora_"
    tuner_methods = API

    @classmethod
    def share(cls, layers: Layers) -> dict[str, Any]:
        raise ConfigError("X-LoRA adapts no layers itself: its experts do. Use get_peft_model.")

    @classmethod
    @contextmanager
    def around(cls, tuner: Any, call: Any, run: Run) -> Iterator[Callable[[Any], Any]]:
        """Weigh the experts: once before a forward pass, before each step of `generate`, which keeps no cache.

        Raises:
            RoutingError: rows use adapters of their own, or the model returns no hidden states.
        """
        with super().around(tuner, call, run) as finish:
            if tuner.disabled:
                yield finish
                return
            if run.rows is not None:
                raise RoutingError(
                    "adapter_names cannot name an X-LoRA adapter, which acts on the whole batch: name its experts, or "
                    "call set_adapter()."
                )
            if not run.generates:
                with call.giving(gates=weigh(tuner, call, run.inputs, run.kwargs)):
                    yield finish
                return
            run.kwargs["use_cache"] = False

            thread = get_ident()

            def step(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if get_ident() == thread:  # others may run the model as well
                    call.put(call.given._replace(gates=weigh(tuner, call, args, kwargs)))

            handle = tuner.model.register_forward_pre_hook(step, with_kwargs=True)
            try:
                with call.giving(gates=Scalings(torch.empty(0), {}, {})):  # until the first step
                    yield finish
            finally:
                handle.remove()


def weigh(tuner: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Scalings:
    """Return the gates for a forward pass with these arguments."""
    classifier, places = tuner.classifier, (tuner.places, tuner.expert_places)
    cfg = classifier.config
    if any(kwargs.get(name) is not None for name in CACHES):
        raise RoutingError("X-LoRA weighs experts by the whole text, and takes no cache: pass all tokens.")
    kwargs = {**kwargs, "output_hidden_states": True, "return_dict": True}
    kwargs.pop("labels", None)
    inputs = next(t for t in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if t is not None)
    with torch.no_grad():
        if cfg.scaling_pass_value == 0:
            given = call.given._replace(rows=Rows.of([BASE] * len(inputs), inputs.device), gates=None)
        else:
            dummy = classifier.constant(inputs, cfg.scaling_pass_value)
            given = call.given._replace(gates=Scalings(chosen(dummy, cfg), *places))
        before = call.put(given)
        try:
            output = tuner.model.forward(*args, **kwargs)
        finally:
            call.put(before)
    hidden = getattr(output, "hidden_states", None)
    if not hidden:
        raise RoutingError(
            f"X-LoRA reads the base model's hidden states, and {type(tuner.model).__name__} returns none: it needs a "
            "model that knows output_hidden_states."
        )
    scalings = classifier(hidden[-1])
    if not cfg.layerwise_scalings:
        scalings = chosen(scalings[:, :, :1], cfg).expand_as(scalings)
    else:
        scalings = chosen(scalings, cfg)
    return Scalings(scalings, *places)
