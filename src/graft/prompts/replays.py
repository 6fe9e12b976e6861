# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a prompt under gradient checkpointing: layers get no cache, and run again in the backward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graft.core.gate import ForkSafeLock
from graft.kernels.eager import Context
from graft.prompts import kv_prefix

NAMES = ("cache", "layer_past", "past_key_values", "past_key_value")  # names that layers have for their cache argument
RUN = "_gradient_checkpointing_func"
TURNS = ForkSafeLock()  # calls that change shared layers take turns


class Replays:
    """Passes a prompt's cache to the checkpointed layers of a stack: transformers gives them none."""

    def __init__(self, stack: Any):
        """Start without a lock, notes or hook. Nothing is changed yet."""
        self.stack, self._in_turn = stack, False
        self._before: list[tuple[nn.Module, str, object]] = []
        self._handle: RemovableHandle | None = None

    def layers(self) -> list[nn.Module]:
        """Return the modules of the stack with `gradient_checkpointing` switched on and a
        `_gradient_checkpointing_func` in their `__dict__`, in the order of `modules()`, [] without any.
        """
        modules = self.stack.module.modules()
        return [m for m in modules if getattr(m, "gradient_checkpointing", False) and RUN in m.__dict__]

    def prepare_checkpointing(self) -> bool:
        """Return True if the backward pass will run layers again, so that they need the cache then.

        Return False in evaluation mode, and without gradients. In training, a stack with checkpointing functions waits
        for and takes a lock of all models until `clear`; once taken it is not taken again. Without gradients, it also
        switches the layers' checkpointing off until `clear`, since that hides the cache from layers.
        """
        if not self.stack.module.training:
            return False
        if not self._in_turn and any(RUN in m.__dict__ for m in self.stack.module.modules()):
            TURNS.lock.acquire()  # until `clear`
            self._in_turn = True
        layers = self.layers()
        if torch.is_grad_enabled():
            return bool(layers)
        for layer in layers:
            self._set(layer, "gradient_checkpointing", False)
        return False

    def start(self, cache: object) -> None:
        """Pass `cache` to the layers whenever they run, now and in the backward pass: replaces their checkpointing
        functions until `clear`.

        Layers without a cache argument, and the stack's module itself, stay.

        Raises:
            ValueError: no layer here takes a cache, so that the prompt would have no effect.
        """
        module = self.stack.module
        layers = (layer for layer in self.layers() if layer is not module)
        places = {layer: place for layer in layers if (place := find_cache_argument(layer))}
        if not places:
            raise ValueError(
                f"Gradient checkpointing of {type(module).__name__} leaves keys and values of a prompt out. Call "
                "gradient_checkpointing_disable()."
            )
        for layer, place in places.items():
            self._set(layer, RUN, with_cache(layer.__dict__[RUN], cache, *place))

    def _set(self, layer: nn.Module, name: str, value: object) -> None:
        """Set an entry of a layer's `__dict__`, and note the old value for `clear`.

        Raises KeyError if the layer itself has none.
        """
        self._before.append((layer, name, layer.__dict__[name]))
        layer.__dict__[name] = value

    def clear(self) -> None:
        """Restore the layers' attributes, the last change first; remove the hook on the word embeddings, and release
        the lock, if they are set. A second call does nothing.
        """
        for layer, name, value in reversed(self._before):
            layer.__dict__[name] = value
        self._before = []
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._in_turn:
            TURNS.lock.release()
            self._in_turn = False

    def detach_if_reentrant(self, value: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return `value`, or under reentrant checkpointing a leaf tensor of the same values.

        Reentrant checkpointing runs one backward pass per layer, and the graph below `value` allows only one. The leaf
        collects the gradients, and `_HandOver` passes them on with the gradient of the embeddings, which comes last. It
        is put on `inputs_embeds` in `arguments`, or by a hook on the word embeddings. A value without gradient is
        returned as it is.
        """
        runs = [layer.__dict__[RUN] for layer in self.layers()]
        if not any(getattr(run, "keywords", {}).get("use_reentrant") for run in runs) or not value.requires_grad:
            return value
        leaf = value.detach().requires_grad_()

        def hand_over(_module: object, _args: object, output: Tensor) -> Tensor:
            """Return the embeddings with a backward pass that also passes the leaf's gradient to `value`."""
            return _HandOver.apply(output, value, [leaf])

        if arguments.get("inputs_embeds") is not None:
            arguments["inputs_embeds"] = hand_over(None, None, arguments["inputs_embeds"])
        else:
            self._handle = self.stack.words.register_forward_hook(hand_over)
        return leaf


def find_cache_argument(layer: nn.Module) -> tuple[str, int] | None:
    """Return name and position of the cache argument in the signature of a layer's forward; None if it has none.

    It is the first of "cache", "layer_past", "past_key_values" and "past_key_value".
    """
    names = list(inspect.signature(layer.forward).parameters)
    name = next((n for n in NAMES if n in names), None)
    return None if name is None else (name, names.index(name))


def with_cache(run: Callable[..., object], cache: object, name: str, index: int) -> Callable[..., object]:
    """Return a checkpointing function that runs `run` with `cache` as an argument of the layer, also in the backward
    pass.

    Each run of the layer gets a fresh copy of an encoder-decoder cache, and `cache` itself otherwise.

    name, index: of the layer's cache argument.
    """

    def run_checkpointed(function: Callable[..., object], *args: object, **options: object) -> object:
        """Run a layer's function through the old checkpointing function, with the cache put in, and return its output.

        Other arguments and options are passed on.
        """

        def with_prompt(*inputs: object) -> object:
            """Call the layer's function with the cache at its position, in place of the argument there, or by keyword.

            Each run gets a fresh copy of an encoder-decoder cache.
            """
            prompt = kv_prefix.copy_for_run(cache)
            if len(inputs) > index:
                return function(*inputs[:index], prompt, *inputs[index + 1 :])
            return function(*inputs, **{name: prompt})

        return run(with_prompt, *args, **options)

    return run_checkpointed


class _HandOver(torch.autograd.Function):
    """The identity on the embeddings. Its backward pass, the last, also passes on the gradients of the leaf."""

    @staticmethod
    def forward(ctx: Context, hidden: Tensor, value: Tensor, leaf: list[Tensor]) -> Tensor:
        """Return a view of the embeddings, and keep the leaf.

        `leaf` is a list that holds the leaf; `ctx.leaf` is its element.
        """
        ctx.leaf = leaf[0]
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[object, object, None]:
        """Return the gradient unchanged, and the gradient that the leaf has collected for `value`."""
        return grad, ctx.leaf.grad, None
