# SPDX-License-Identifier: Apache-2.0
"""The shadow network as a model of its own, which needs the base model no more."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from torch import Tensor, nn

from graft.core.errors import AdapterNotFoundError
from graft.methods.shadow.cache import NAMES
from graft.methods.shadow.loss import classification, next_token, pooled

NAME = "DetachedShadowModel"


@cache
def detached_class() -> Any:
    """Return the class of such a model, which derives from transformers' own."""
    from transformers import GenerationMixin, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

    class DetachedShadowModel(PreTrainedModel, GenerationMixin):
        """The network, the projection of its hidden states to the base model's width, and a head.

        Args:
            config: the network's.
            backbone: the network, with word embeddings.
            shadow_hidden_projection: Identity if the widths are equal.
            head: the base model's output embeddings, or the head of SEQ_CLS.
            classifies: whether it is the latter.
        """

        __module__, __qualname__ = __name__, NAME  # where `pickle` finds it
        base_model_prefix = "backbone"
        supports_gradient_checkpointing = True
        _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

        def __init__(self, config: Any, backbone: Any, projection: nn.Module, head: nn.Module, classifies: bool):
            super().__init__(config)
            self.backbone, self.shadow_hidden_projection, self.head = backbone, projection, head
            self.classifies = classifies

        def get_input_embeddings(self) -> Any:
            return self.backbone.get_input_embeddings()

        def get_output_embeddings(self) -> Any:
            return None if self.classifies else self.head

        def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
            """Return logits, and with labels the loss, as the base model's class does."""
            kwargs.pop("return_dict", None)
            kept: Any = kwargs.pop("logits_to_keep", 0)
            out = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            hidden: Tensor = self.shadow_hidden_projection(out.last_hidden_state)
            if self.classifies:
                logits = pooled(self.head(hidden), input_ids, self.config.pad_token_id)
                loss = None if labels is None else classification(self.config, logits, labels)
                return SequenceClassifierOutput(loss=loss, logits=logits)
            logits = self.head(hidden[:, -kept:] if isinstance(kept, int) else hidden[:, kept])
            loss = None if labels is None else next_token(logits, labels)
            name = next((n for n in NAMES if n in out), None)
            return CausalLMOutputWithPast(loss=loss, logits=logits, **({name: out[name]} if name else {}))

    return DetachedShadowModel


def __getattr__(name: str) -> Any:
    if name == NAME:
        return detached_class()
    raise AttributeError(name)


def unload(tuner: Any, adapter_name: str | None = None, copy: bool = False) -> Any:
    """Return the shadow network of an adapter (None: the active one) as a model of its own, with the base's head.

    Args:
        copy: give it modules of its own, and not those that this model has.

    Raises:
        AdapterNotFoundError: there is no such adapter, or none is active.
    """
    name = next(iter(tuner.active_adapters), None) if adapter_name is None else adapter_name
    if name is None:
        raise AdapterNotFoundError(f"No adapter is active: name one. Loaded adapters: {', '.join(tuner.peft_config)}.")
    tuner.check_known([name])
    return detach(tuner, name, copy)


def detach(tuner: Any, name: str, separate: bool) -> Any:
    model, held = tuner.model, tuner.shared.containers
    network, projection = held["shadow_backbone"][name], held["shadow_projection"][name]
    classifies = "shadow_head" in held and name in held["shadow_head"]
    head = held["shadow_head"][name] if classifies else model.get_output_embeddings()
    lacks = hasattr(network, "needs_embeddings")
    embeddings = model.get_input_embeddings() if lacks else None
    if separate:
        network, projection, head, embeddings = copy.deepcopy([network, projection, head, embeddings])
    elif lacks:  # another module with the same children, as this one stays without embeddings
        network, children = copy.copy(network), dict(network._modules)
        network._modules = children
    if lacks:
        network.set_input_embeddings(embeddings)
        del network.needs_embeddings
    config = copy.deepcopy(network.config)
    if classifies:
        config.num_labels, config.problem_type = model.config.num_labels, model.config.problem_type
    return detached_class()(config, network, projection, head, classifies).train(model.training)
