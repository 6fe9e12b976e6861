# SPDX-License-Identifier: Apache-2.0
"""The shadow network as a separate model, which needs the base model no more."""

from __future__ import annotations

import copy
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.config.base import PeftConfig
from graft.core.errors import AdapterNotFoundError
from graft.core.rows import CACHES, count_cached_tokens

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel
    from transformers import PreTrainedConfig as Config

    from graft.core.method import Tuner


@cache
def find_cache_class() -> type:
    """Return the class ShadowCache, which derives from transformers' Cache; made at the first call, returned again
    later.

    A ShadowCache holds the base model's cache and a dict of shadow networks' caches by adapter. Its `layers` are those
    of all these caches; its length and all other attributes are the base cache's.
    """
    from transformers import Cache

    class ShadowCache(Cache):
        """The layers of the base model's cache, then those of the shadow networks, by adapter.

        Reordering, repeating, selecting or cutting rows acts on all layers.
        """

        __module__, __qualname__ = __name__, "ShadowCache"  # where `pickle` finds it

        def __init__(self, base: Cache, shadows: dict[str, Cache]):
            """Hold the base model's cache, and those of shadow networks by adapter."""
            self.base, self.shadows = base, shadows

        def __getattr__(self, name: str) -> Any:
            """Return the attribute of the base model's cache.

            Raises AttributeError for dunder names, `base` and `shadows`.
            """
            if name.startswith("__") or name in ("base", "shadows"):
                raise AttributeError(name)
            return getattr(self.base, name)

        @property
        def layers(self) -> list[object]:  # type: ignore[override]
            """The layers of the base model's cache, then those of all shadow networks."""
            return [layer for cache in (self.base, *self.shadows.values()) for layer in cache.layers]

        def __len__(self) -> int:
            """Return the length of the base model's cache."""
            return len(self.base)

    return ShadowCache


def unpack(model: nn.Module, kwargs: dict[str, object], use_cache: bool | None) -> dict[str, Cache] | None:
    """Return the shadow networks' caches, by adapter, from a call's arguments.

    A ShadowCache gives its own, and its base replaces it in `kwargs`.

    Without a cache among the arguments: {} if `use_cache`, or for None the model's config, wants one; else None. An
    empty cache of transformers gives {} and stays in `kwargs`. Whether the cache can be read is checked before its
    tokens.

    Raises:
        ValueError: the cache holds tokens that the shadow network has not seen.
        NotImplementedError: the cache does not tell its tokens.
    """
    name = next((n for n in CACHES if kwargs.get(n) is not None), None)
    if name is None:
        wanted = getattr(getattr(model, "config", None), "use_cache", False) if use_cache is None else use_cache
        return {} if wanted else None
    cache = kwargs[name]
    if isinstance(cache, find_cache_class()):
        kwargs[name] = cache.base  # type: ignore[attr-defined]
        return cache.shadows  # type: ignore[attr-defined]
    seen = count_cached_tokens(cache)
    if seen is None:
        raise NotImplementedError(
            f"SHADOW needs a Cache of transformers that holds tokens as `{name}`, and this {type(cache).__name__} does "
            "not. Pass use_cache=False."
        )
    if seen:
        raise ValueError(
            f"`{name}` holds tokens that the shadow network has not seen. Pass the cache in an output of this "
            "model, an empty one, or use_cache=False."
        )
    return {}


def with_cache(output: Any, shadows: dict[str, Cache]) -> object:
    """Return a model's output with each cache of transformers in it packed with `shadows`.

    A tuple gives a new tuple; another output is changed in place and returned. A `ShadowCache` is packed already and
    stays.
    """
    from transformers import Cache

    def pack_value(value: object) -> object:
        """Return a cache of transformers packed with the shadows; any other value, or a ShadowCache, as it is."""
        is_plain = isinstance(value, Cache) and not isinstance(value, find_cache_class())
        return find_cache_class()(value, shadows) if is_plain else value

    if isinstance(output, tuple):
        return tuple(pack_value(value) for value in output)
    for key, value in list(output.items()):
        if pack_value(value) is not value:
            output[key] = pack_value(value)
    return output


def empty(network: nn.Module) -> Cache:
    """Return an empty DynamicCache for a shadow network, with the kinds of its layers from its config.

    A network with `decoder_layers` in its config, as a decoder of an encoder-decoder has, gets one without kinds.
    """
    from transformers import DynamicCache

    if hasattr(network.config, "decoder_layers"):  # which num_hidden_layers does not count there
        return DynamicCache()
    return DynamicCache(config=network.config)


def no_cache_for(network: Any, model: Any) -> str | None:
    """Return the reason why a shadow network next to `model` cannot run with a cache, and the remedy; None if it can.

    Reasons: the model has a cache of another class than transformers' dynamic one; it is an encoder-decoder; no layer
    of the network counts tokens, while one of the model does.
    """
    kind, plain = type(network).__name__, "Pass use_cache=False."
    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        return f"{kind} has a cache that transformers makes for it alone. {plain}"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return f"{kind} stands for the decoder of an encoder-decoder, whose cache it does not share. {plain}"
    if count_cached_tokens(empty(network)) is None and count_cached_tokens(empty(model)) is not None:
        return (
            f"none of the layers of its {kind} is one of attention, which counts the tokens. Pass use_cache=False, or "
            "take a network of more layers (shadow_num_hidden_layers)."
        )
    return None


def shadow_loss(tuner: Tuner, cfg: PeftConfig, name: str, s: Tensor, inputs: dict[str, Any]) -> Tensor | None:
    """Return the loss of the head's output for the shadow state s (rows, tokens, hidden), (), with `inputs["labels"]`.

    For SEQ_CLS it is the classification by the shadow's own head at each row's last token, found by `input_ids` and the
    model's `pad_token_id`. Else it is the cross entropy of the next token by the model's output embeddings; None if the
    model has none. The state is cast to the head's dtype.
    """
    labels, model = inputs["labels"], tuner.model
    if cfg.task_type == "SEQ_CLS":
        head = tuner.common_tensors.containers["shadow_head"][name]
        logits = pool_logits(head(s.to(find_head_dtype(head))), inputs.get("input_ids"), model.config.pad_token_id)
        return classification(model.config, logits, labels)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return None if head is None else next_token(head(s.to(find_head_dtype(head))), labels)


def find_head_dtype(head: nn.Module) -> torch.dtype:
    """Return the dtype of the head's first parameter."""
    return next(head.parameters()).dtype


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of each token's logits (rows, tokens, vocabulary) with the next label, in float32;
    label -100 has none.
    """
    wanted = F.pad(labels, (0, 1), value=-100)[:, 1:].to(logits.device)
    return F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=-100)


def pool_logits(logits: Tensor, ids: Tensor | None, padding: int | None) -> Tensor:
    """Return the logits (rows, labels) of (rows, tokens, labels) at each row's last token that is no padding.

    Without ids or a padding id that is the last position. A row of padding alone gives its first position.
    """
    rows, tokens = logits.shape[:2]
    last = torch.full((rows,), tokens - 1, device=logits.device)
    if ids is not None and padding is not None:
        places = torch.arange(tokens, device=logits.device)
        last = (places * (ids != padding).to(logits.device)).argmax(-1)
    return logits[torch.arange(rows, device=logits.device), last]


def classification(config: Config, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of logits (rows, labels), in float32: mean squared error, binary cross entropy, or cross entropy.

    The error is for the config's `problem_type` "regression", or for None and one logit. Binary cross entropy is for
    "multi_label_classification", and for floating-point labels unless it is a regression. All else is cross entropy.
    Labels are moved to the logits' device.
    """
    kind: str | None = config.problem_type
    logits, labels = logits.float(), labels.to(logits.device)
    if kind is None:
        kind = "regression" if logits.shape[-1] == 1 else ""
    if kind == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze().float())
    if kind == "multi_label_classification" or labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    return F.cross_entropy(logits, labels.view(-1))


NAME = "DetachedShadowModel"


@cache
def find_model_class() -> type[PreTrainedModel]:
    """Return the class DetachedShadowModel, which derives from transformers' PreTrainedModel; made at the first call.

    The class can generate (GenerationMixin), supports gradient checkpointing and all kinds of attention, and holds
    network, projection and head. Its forward returns logits and loss as the base model's class does.
    """
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

        def __init__(
            self, config: Config, backbone: nn.Module, projection: nn.Module, head: nn.Module, classifies: bool
        ):
            """Hold the network, projection and head as they are; `classifies` tells a head of SEQ_CLS from output
            embeddings.
            """
            super().__init__(config)
            self.backbone, self.shadow_hidden_projection, self.head = backbone, projection, head
            self.classifies = classifies

        def get_input_embeddings(self) -> Any:
            """Return the network's word embeddings."""
            return self.backbone.get_input_embeddings()

        def get_output_embeddings(self) -> nn.Module | None:
            """Return the head; None if it classifies."""
            return None if self.classifies else self.head

        def forward(
            self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any
        ) -> object:
            """Return logits, and with labels the loss (else None), as the base model's class does.

            A classifier returns a SequenceClassifierOutput with the logits of each row's last token before padding
            (`pool_logits`). Others return a CausalLMOutputWithPast with the network's cache, if it returned one. Its
            next-token logits are of all positions, or of `logits_to_keep`: the last n, or the positions in a tensor.
            `return_dict` is ignored; other arguments reach the network.
            """
            kwargs.pop("return_dict", None)
            tail: Any = kwargs.pop("logits_to_keep", 0)
            out = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            hidden: Tensor = self.shadow_hidden_projection(out.last_hidden_state)
            if self.classifies:
                logits = pool_logits(self.head(hidden), input_ids, self.config.pad_token_id)
                loss = None if labels is None else classification(self.config, logits, labels)
                return SequenceClassifierOutput(loss=loss, logits=logits)
            logits = self.head(hidden[:, -tail:] if isinstance(tail, int) else hidden[:, tail])
            loss = None if labels is None else next_token(logits, labels)
            name = next((n for n in CACHES if n in out), None)
            return CausalLMOutputWithPast(loss=loss, logits=logits, **({name: out[name]} if name else {}))

    return DetachedShadowModel


def __getattr__(name: str) -> type:
    """Return the class "ShadowCache" or "DetachedShadowModel", which `pickle` finds here.

    Raises AttributeError for other names.
    """
    makes = {"ShadowCache": find_cache_class, NAME: find_model_class}.get(name)
    if makes is None:
        raise AttributeError(name)
    return makes()


def unload(tuner: Tuner, adapter_name: str | None = None, copy: bool = False) -> object:
    """Return the shadow network of an adapter (None: the first active one) as a separate model, with the base's head.

    Args:
        copy: True: it gets copies of the modules; False: it shares them with this model.

    Raises:
        AdapterNotFoundError: there is no such adapter, or none is active.
        KeyError: the named adapter is of another method.
    """
    shadows = (name for name in tuner.active_adapters if tuner.peft_config[name].peft_type == "SHADOW")
    name = next(shadows, None) if adapter_name is None else adapter_name
    if name is None:
        raise AdapterNotFoundError(
            f"No shadow adapter is active. Name a loaded adapter: {', '.join(tuner.peft_config)}."
        )
    tuner.check_known([name])
    return detach(tuner, name, copy)


def detach(tuner: Tuner, name: str, separate: bool) -> object:
    """Return a DetachedShadowModel of adapter `name`: network, projection and a head, in the base model's training
    mode.

    An adapter of another method is a KeyError. The head is the shadow's own for SEQ_CLS, else the base's output
    embeddings. A network without embeddings gets the base's. `separate`: all modules are copied; else shared, and the
    adapter's network stays without embeddings. The config is a copy of the network's; for a classifier with the base's
    `num_labels` and `problem_type`.
    """
    model, containers = tuner.model, tuner.common_tensors.containers
    network, projection = containers["shadow_backbone"][name], containers["shadow_projection"][name]
    classifies = "shadow_head" in containers and name in containers["shadow_head"]
    head = containers["shadow_head"][name] if classifies else model.get_output_embeddings()
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
    return find_model_class()(config, network, projection, head, classifies).train(model.training)
