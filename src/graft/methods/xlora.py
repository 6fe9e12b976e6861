# SPDX-License-Identifier: Apache-2.0
"""X-LoRA: Mixture of Low-Rank Adapter Experts, arXiv 2402.07148.

Every call runs the model twice. The hidden states of the first pass tell the classifier how much each expert counts at
each token; these are the gates of the second. The experts are LoRA adapters, which know nothing of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from graft.config.base import PeftConfig
from graft.config.bounds import Bound
from graft.config.fields import FRACTION, POSITIVE
from graft.config.hub import fetch_file
from graft.config.pair import CONFIG_NAME
from graft.core.call import Call, in_this_thread
from graft.core.errors import ConfigError, RoutingError, warn
from graft.core.method import AdaptedLayers, Layer, Method, return_unchanged
from graft.core.rows import BASE, Finish, Rows, Run, find_cache, name_arguments

DEPTH = Bound(POSITIVE.allows, "X-LoRA depth must be strictly positive.")


@dataclass(kw_only=True)
class XLoraConfig(PeftConfig):
    """X-LoRA (arXiv 2402.07148): a classifier on the base model's hidden states weighs LoRA adapters, the experts.

    Raises:
        ConfigError: a value out of range.
    """

    peft_type: str = "XLORA"
    hidden_size: Annotated[int | None, POSITIVE] = None  # of the base model's hidden states; None: 4096
    adapters: dict[str, str] | None = None  # name of an expert → folder or hub repository
    enable_softmax: bool = True  # over the experts
    enable_softmax_topk: bool = False  # over those that are kept
    layerwise_scalings: bool = False  # each layer has its own weights
    xlora_depth: Annotated[int, DEPTH] = 1  # linear layers of the classifier
    xlora_size: Annotated[int, POSITIVE] = 2048  # its width, if it has several layers
    xlora_dropout_p: Annotated[float, FRACTION] = 0.2  # in the classifier
    use_trainable_adapters: bool = False  # experts train as well
    softmax_temperature: Annotated[float, POSITIVE] = 1.0
    top_k_lora: int | None = None  # so many experts act on a token; None: all
    scaling_pass_value: float = 0.0  # weight of every expert in the pass that the classifier reads
    global_scaling_weight: float = 1.0  # times every weight

    load_options = frozenset({"adapters"})

    def __post_init__(self) -> None:
        """Validate the fields; set `hidden_size` to 4096 and `adapters` to {} where they are None, with a warning each.

        Warns of top-k options that contradict each other, and of `top_k_lora` below 1. Starts without saved experts;
        `note_source` records them.
        """
        super().__post_init__()
        # expert → (where this config was read, sub-folder there, keywords for the hub)
        self.beside: dict[str, tuple[str, str, dict[str, object]]] = {}
        if self.hidden_size is None:
            warn(
                "No value was provided for `hidden_size`. This will be set to 4096 by default, please ensure that "
                "this is correct."
            )
            self.hidden_size = 4096
        if self.adapters is None:
            warn("No value was provided for `adapters`. This will be set to empty, please ensure that this is correct.")
            self.adapters = {}
        if self.enable_softmax_topk and self.top_k_lora is None:
            warn("`enable_softmax_topk` enabled `top_k_lora` is not set")
        if self.enable_softmax_topk and self.enable_softmax:
            warn("`enable_softmax_topk` and `enable_softmax` are both enabled. This will result in worse performance.")
        if self.top_k_lora is not None and self.top_k_lora < 1:
            warn("`top_k_lora` value must be at least 1.")

    def to_json(self, auto_mapping_dict: dict[str, object] | None = None) -> str:
        """Return the text of adapter_config.json, indented by 2, without a newline at the end. "adapters" has the
        experts in their order, which is that of the classifier's outputs.
        """
        values = json.loads(super().to_json(auto_mapping_dict))
        return json.dumps({**values, "adapters": self.adapters}, indent=2)

    def take_load_options(self, options: dict[str, Any]) -> None:
        """Replace the experts by `options["adapters"]`, if it is there, and forget the folders of the former ones.

        `options` stays as it is.
        """
        if "adapters" in options:
            self.adapters, self.beside = dict(options["adapters"]), {}

    def note_source(self, where: str, subfolder: str | None = None, **hub: object) -> None:
        """Record the places of the experts that are saved with this config, in sub-folders with their names.

        An expert without a config file in its sub-folder is not recorded. If all names are digits, in the order of text
        as PEFT sorts them, `adapters` is first put in the order of numbers: that of the classifier's outputs. Looking
        may download the config files from the Hub.
        """
        names = list(self.adapters or ())
        if names == sorted(names) and all(name.isdigit() for name in names):
            self.adapters = {name: self.adapters[name] for name in sorted(names, key=int)}  # type: ignore[index]
        for name in self.adapters or {}:
            folder = os.path.join(subfolder or "", name)
            if fetch_file(where, CONFIG_NAME, subfolder=folder, **hub) is not None:
                self.beside[name] = (where, folder, hub)


@dataclass(eq=False)
class Scalings:
    """The weights of experts at each token of a call, as the gates of its layers."""

    weights: Tensor  # (batch, tokens, layers, experts)
    layers: dict[str, int]  # path → place in `weights`
    experts: dict[str, int]  # adapter → place in `weights`

    def apply(self, layer: Layer, adapter: str, part: Tensor) -> Tensor:
        """Return an adapter's part of a layer's output, (batch, tokens, features), times its weight at each token.

        The weights (batch, tokens) get one trailing dimension, and move to the part's device; dtypes follow torch's
        promotion.

        Raises:
            RoutingError: the part has other samples or tokens than the weights.
        """
        w = self.weights[:, :, self.layers[layer.site.key], self.experts[adapter]]
        if part.shape[:2] != w.shape:
            raise RoutingError(
                f"layer '{layer.site.key}' computes {tuple(part.shape[:2])} (samples, tokens), and X-LoRA weighs "
                f"experts at {tuple(w.shape)}. Leave the layer out of the experts' target_modules."
            )
        return part * w[..., None].to(part.device)

    def of_tokens(self, layer: Layer, adapter: str, tokens: int) -> Tensor:
        """Return an adapter's weights on a layer that computes a flat list of `tokens` tokens, (tokens,).

        Raises:
            RoutingError: there are not as many weights.
        """
        w = self.weights[:, :, self.layers[layer.site.key], self.experts[adapter]]
        if w.numel() != tokens:
            raise RoutingError(
                f"layer '{layer.site.key}' computes {tokens} tokens, and X-LoRA weighs experts at {tuple(w.shape)}. "
                "Leave the layer out of the experts' target_parameters."
            )
        return w.flatten()

    def rows(self, index: Tensor) -> Scalings:
        """Return the scalings of the rows `index`, in that order, on the device of the weights."""
        return Scalings(self.weights[index.to(self.weights.device)], self.layers, self.experts)


def chosen(scalings: Tensor, cfg: XLoraConfig) -> Tensor:
    """Return the weights that act: the `top_k_lora` largest of each token and layer (others 0; all act for None), times
    `global_scaling_weight`.

    With `enable_softmax_topk` a softmax over the nonzero ones comes before that factor; weights of 0 stay 0.
    """
    if cfg.top_k_lora is not None:
        largest = scalings.topk(cfg.top_k_lora, dim=-1).indices
        scalings = scalings * torch.zeros_like(scalings).scatter(-1, largest, 1)
    if cfg.enable_softmax_topk:
        out = scalings == 0
        scalings = scalings.masked_fill(out, -torch.inf).softmax(-1).masked_fill(out, 0)
    return scalings * cfg.global_scaling_weight


class XLoraClassifier(nn.Module):
    """Linear layers with ReLU and dropout between them, and a softmax over the experts.

    Attributes:
        log_scalings: the weights of the calls since logging was turned on, (batch, tokens, layers, experts) each.
    """

    config: XLoraConfig

    def __init__(self, config: Any, n_classes: int, n_layers: int, where: dict[str, Any]):
        """Make `xlora_depth` linear layers, hidden_size → xlora_size … → experts, with ReLU and dropout between them
        (none for 0); `where` has device and dtype for them.

        With `layerwise_scalings` there are experts · layers outputs. Logging is off.
        """
        super().__init__()
        self.config, self.n_classes, self.n_layers = config, n_classes, n_layers
        self.log_scalings: list[Tensor] = []
        self.scalings_logging = False
        self.latest: Tensor | None = None
        outputs = n_classes * (n_layers if config.layerwise_scalings else 1)
        widths = [config.hidden_size, *[config.xlora_size] * (config.xlora_depth - 1), outputs]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            if i:
                layers.append(nn.ReLU())
                if config.xlora_dropout_p > 0:
                    layers.append(nn.Dropout(config.xlora_dropout_p))
            layers.append(nn.Linear(before, after, **where))
        self.layers = nn.Sequential(*layers)

    def __getstate__(self) -> dict[str, object]:
        """Return the state without the latest weights: they are a part of a graph, which cannot be copied."""
        return {**self.__dict__, "latest": None}  # a part of a graph, which cannot be copied

    def forward(self, hidden: Tensor) -> Tensor:
        """Return weights (batch, tokens, layers, experts) for hidden states (batch, tokens, width); a softmax over
        experts with `enable_softmax`.

        Hidden states are first cast to the classifier's dtype and device. Without `layerwise_scalings` all layers share
        the same weights. Stores them as `latest`, with their graph, and with logging on appends a detached copy to
        `log_scalings`.

        Raises:
            RoutingError: the width is not `hidden_size`.
        """
        if hidden.shape[-1] != self.config.hidden_size:
            raise RoutingError(
                f"X-LoRA's classifier reads hidden states of width {self.config.hidden_size}, and the base model's "
                f"have {hidden.shape[-1]}. Set XLoraConfig.hidden_size to that."
            )
        logits = self.layers(hidden.to(self.layers[0].weight))
        logits = logits.unflatten(-1, (-1, self.n_classes))
        if self.config.enable_softmax:
            logits = (logits / self.config.softmax_temperature).softmax(-1)
        scalings: Tensor = logits.expand(-1, -1, self.n_layers, -1)
        self.latest = scalings
        if self.scalings_logging:
            self.log_scalings.append(scalings.detach())
        return scalings

    def constant(self, like: Tensor, value: float) -> Tensor:
        """Return weights (batch, tokens, layers, experts) that are all `value`, for inputs (batch, tokens, …), in the
        classifier's dtype.
        """
        shape = *like.shape[:2], self.n_layers, self.n_classes
        return torch.full(shape, value, device=like.device, dtype=self.layers[0].weight.dtype)


def set_topk_lora(tuner: Any, value: int | None) -> None:
    """Let only `value` experts act on each token; None: all of them.

    Writes `top_k_lora` of the classifier's config. Values below 1 are not refused. A tuner without a classifier gives
    an AttributeError.

    Raises:
        ConfigError: there are fewer experts.
    """
    check_top_k(value, tuner.classifier.n_classes)
    tuner.classifier.config.top_k_lora = value


def set_global_scaling_weight(tuner: Any, weight: float) -> None:
    """Set the factor of all experts' updates, `global_scaling_weight` of the classifier's config, to any number.

    A tuner without a classifier gives an AttributeError.
    """
    tuner.classifier.config.global_scaling_weight = weight


def get_global_scaling_weight(tuner: Any) -> float:
    """Return the factor of all experts' updates. A tuner without a classifier gives an AttributeError."""
    return tuner.classifier.config.global_scaling_weight


def set_scaling_pass_value(tuner: Any, value: float | None) -> None:
    """Set the weight of every expert in the first pass, `scaling_pass_value` of the classifier's config; None: 1 /
    number of experts. No value is refused. A tuner without a classifier gives an AttributeError.
    """
    tuner.classifier.config.scaling_pass_value = 1 / tuner.classifier.n_classes if value is None else value


def get_latest_scalings(tuner: Any) -> Tensor | None:
    """Return the classifier's last output, (batch, tokens, layers, experts), before top-k; None before the first call.

    A tuner without a classifier gives an AttributeError.
    """
    return tuner.classifier.latest


def get_scalings_log(tuner: Any) -> list[Tensor]:
    """Return the logged weights, (batch, tokens, layers, experts) for each call while logging was on, in a new list.

    A tuner without a classifier gives an AttributeError.
    """
    return list(tuner.classifier.log_scalings)


def enable_scalings_logging(tuner: Any) -> None:
    """Turn logging on: each call of the classifier appends its weights to the log.

    Old entries stay. A tuner without a classifier gives an AttributeError.
    """
    tuner.classifier.scalings_logging = True


def disable_scalings_logging(tuner: Any) -> None:
    """Turn logging off, and keep the log. A tuner without a classifier gives an AttributeError."""
    tuner.classifier.scalings_logging = False


def clear_scalings_log(tuner: Any) -> None:
    """Remove all entries of the log, in place.

    Logging stays on or off. A tuner without a classifier gives an AttributeError.
    """
    tuner.classifier.log_scalings.clear()


def get_bucketed_scalings_log(tuner: Any) -> dict[int, tuple[list[int], list[Tensor]]]:
    """Return the log by number of tokens: {tokens: (indices in the log, their weights)}.

    A tuner without a classifier gives an AttributeError.
    """
    buckets: dict[int, tuple[list[int], list[Tensor]]] = {}
    for i, scalings in enumerate(tuner.classifier.log_scalings):
        places, values = buckets.setdefault(scalings.shape[1], ([], []))
        places.append(i)
        values.append(scalings)
    return buckets


def check_top_k(value: int | None, experts: int) -> None:
    """Raise ConfigError if `value` is above the number of experts; None, 0 and negative numbers pass."""
    if value is not None and value > experts:
        raise ConfigError(f"top_k_lora={value} is more than the {experts} experts. Choose fewer.")


API = {
    function.__name__: function
    for function in (
        set_topk_lora,
        set_global_scaling_weight,
        get_global_scaling_weight,
        set_scaling_pass_value,
        get_latest_scalings,
        get_scalings_log,
        enable_scalings_logging,
        disable_scalings_logging,
        clear_scalings_log,
        get_bucketed_scalings_log,
    )
}


CLASSIFIER = "internal_xlora_classifier"


class XLora(Method[XLoraConfig]):
    """X-LoRA, arXiv 2402.07148: LoRA experts, weighed at each token by a classifier.

    It has no site: its only tensors are the classifier's, on the tuner (`model/experts.py`).
    """

    prefix = "xlora_"
    tuner_methods = API

    @classmethod
    def share(cls, layers: AdaptedLayers) -> dict[str, object]:
        """Raise ConfigError: X-LoRA adapts no layers itself, and cannot be injected into a model."""
        raise ConfigError("X-LoRA adapts no layers itself: its experts do. Use get_peft_model.")

    @classmethod
    @contextmanager
    def surround_run(cls, tuner: Any, call: Call, run: Run) -> Iterator[Finish]:
        """Weigh the experts (`weigh`) and show the weights to the layers as gates: once for a forward pass, before each
        step of `generate`.

        For `generate` sets `use_cache` to False in the run's arguments, and puts a pre-forward hook on the model until
        the run's end, also on errors. The gates are empty until the first step. The hook does nothing while it weighs
        the experts itself. The finish is identity.

        Raises:
            RoutingError: the call names adapters for its rows; or, from `weigh`, the arguments have a cache or the
                model returns no hidden states.
        """
        if run.rows is not None:
            raise RoutingError(
                "adapter_names cannot name an X-LoRA adapter, which acts on the whole batch. Name its experts, or "
                "call set_adapter()."
            )
        if not run.generates:
            with call.extend_context(gates=weigh(tuner, call, run.inputs, run.kwargs)):
                yield return_unchanged
            return
        run.kwargs["use_cache"] = False

        weighing = [False]

        def step(_model: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
            """Weigh the experts for the step's arguments and set the gates of this thread's call.

            Do nothing in the extra pass of `weigh`, which calls the same model. If `weigh` fails, its error
            continues and the gates stay.
            """
            if not weighing[0]:
                weighing[0] = True
                try:
                    gates = weigh(tuner, call, args, kwargs)
                finally:
                    weighing[0] = False
                call.swap_context(call.context._replace(gates=gates))

        none = Scalings(torch.empty(0), {}, {})  # until the first step
        steps = tuner.model.register_forward_pre_hook(in_this_thread(step), with_kwargs=True)
        with steps, call.extend_context(gates=none):
            yield return_unchanged


def weigh(tuner: Any, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Scalings:
    """Return the gates for a forward pass with these arguments, from the last hidden states of an extra pass without
    gradients.

    In the extra pass all experts have the weight `scaling_pass_value`; for 0 all rows use the base. It runs without
    labels, returns all hidden states, and calls the model's `forward` past its hooks, unless FSDP2 needs them. The
    classifier then runs on the last ones, with gradients. Without `layerwise_scalings` its first layer's weights hold
    for all layers.

    Raises:
        RoutingError: the arguments have a cache or no input, or the model returns no hidden states.
    """
    classifier, places = tuner.classifier, (tuner.places, tuner.experts)
    cfg = classifier.config
    arguments = name_arguments(tuner.model, args, kwargs)
    if find_cache(arguments) is not None:
        raise RoutingError("X-LoRA weighs experts by the whole text, and takes no cache. Pass all tokens.")
    kwargs = {**kwargs, "output_hidden_states": True, "return_dict": True}
    kwargs.pop("labels", None)
    inputs = next((t for t in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if t is not None), None)
    if inputs is None:
        raise RoutingError(
            "X-LoRA weighs experts by the text: the call has neither input_ids nor inputs_embeds. Pass one."
        )
    with torch.no_grad():
        if cfg.scaling_pass_value == 0:
            context = call.context._replace(rows=Rows.from_names([BASE] * len(inputs), inputs.device))
        else:
            dummy = classifier.constant(inputs, cfg.scaling_pass_value)
            context = call.context._replace(gates=Scalings(chosen(dummy, cfg), *places))
        with call.use_context(context):
            run = tuner.model.forward if tuner.averager is None else tuner.model  # FSDP2 gathers weights by its hooks
            output = run(*args, **kwargs)
    hidden = getattr(output, "hidden_states", None)
    if not hidden:
        raise RoutingError(
            f"X-LoRA reads the base model's hidden states, and {type(tuner.model).__name__} returns none: it needs a "
            "model that knows output_hidden_states."
        )
    scalings = classifier(hidden[-1])
    weights = chosen(scalings if cfg.layerwise_scalings else scalings[:, :, :1], cfg)
    return Scalings(weights.expand_as(scalings), *places)
