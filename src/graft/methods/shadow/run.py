# SPDX-License-Identifier: Apache-2.0
"""A run of the shadow network before each forward pass of the model, and its loss after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.call import Call, in_this_thread
from graft.core.method import Tuner, return_unchanged
from graft.core.rows import CACHES, Run, name_arguments
from graft.methods.shadow.detached import empty, no_cache_for, shadow_loss, unpack, with_cache
from graft.storage.find import find_device_and_dtype
from graft.storage.fsdp2 import gather_module

FACT = "shadow"  # its name among the facts of a call


class States:
    """The current state (rows, tokens, hidden) of each adapter, for the rows that use it; selections of rows change
    nothing.
    """

    def __init__(self, seed: Callable[[str, Tensor], Tensor]):
        """Start without states.

        `seed` is called as (adapter, input of the first block) for the state before that block.
        """
        self.seed = seed  # (adapter, its rows at the first block) → state before that
        self.now: dict[str, Tensor] = {}  # (rows, tokens, hidden)
        # by adapter and block: the state before each of its runs, None where it was the seed, for blocks that run again
        self.before: dict[tuple[str, str], list[Tensor | None]] = {}

    def __getitem__(self, index: object) -> States:
        """Return the object itself for any index: each state is already that of its adapter's rows."""
        return self

    def repeat_interleave(self, repeats: int, dim: int) -> States:
        """Return the object itself for any number of repeats: each state is already that of its adapter's rows."""
        return self

    def take(self, adapter: str, block: str, h: Tensor) -> Tensor:
        """Return the state before a block with input h, and make it the adapter's current one: `seed` before the first
        block.

        With gradients, and not in compiled code, the state is also kept by block. A backward pass that runs the block
        again gets that one.

        Raises:
            NotImplementedError: a backward pass runs a block again that ran several times, or without gradients.
        """
        eager = not torch.compiler.is_compiling()
        if eager and torch._C._current_graph_task_id() != -1:
            runs = self.before.get((adapter, block), [])
            if len(runs) != 1:
                raise NotImplementedError(
                    f"A backward pass runs block '{block}' again, and SHADOW adapter '{adapter}' has no state for it. "
                    "Pass use_reentrant=False to gradient checkpointing, or checkpoint within the block."
                )
            before = runs[0]
        else:
            before = self.now.get(adapter)
            if eager and torch.is_grad_enabled():
                self.before.setdefault((adapter, block), []).append(before)
        self.now[adapter] = self.seed(adapter, h) if before is None else before
        return self.now[adapter]


TAKEN = ("attention_mask", "position_ids", "cache_position", "token_type_ids")  # arguments that the network gets, too


@contextmanager
def surround(tuner: Tuner, call: Call, run: Run) -> Iterator[Callable[[object], object]]:
    """Run the shadow networks before a forward pass, or before each forward pass of `generate`, and show their `States`
    to the layers.

    A single pass yields its `Pass.finish`, which completes the output with loss and cache. In `generate` a pre-forward
    and a forward hook on the model do both for each step of this thread. They are removed at the end, also on errors;
    the yielded function then changes nothing.
    """
    names = run.adapters
    if not run.generates:
        one = Pass(tuner, call, names, run.inputs, run.kwargs, run)
        with call.extend_context(facts={FACT: one.states}):
            yield one.finish
        return
    passes: list[Pass] = []

    def before(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Start a `Pass` for a step of `generate`, keep it for `after`, and show its states to the layers.

        Return the arguments; the Pass has taken the shadow networks' caches out of `kwargs`.
        """
        one = Pass(tuner, call, names, args, kwargs, run)
        passes[:] = [one]
        call.swap_context(call.context._replace(facts={**call.context.facts, FACT: one.states}))
        return args, kwargs

    def after(_model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> object:
        """Return the output of the step, completed by its `Pass`, which is then forgotten."""
        return passes.pop().finish(output)

    starts = tuner.model.register_forward_pre_hook(in_this_thread(before), with_kwargs=True)
    with starts, tuner.model.register_forward_hook(in_this_thread(after), with_kwargs=True), call.extend_context():
        yield return_unchanged


class Pass:
    """One forward pass: its arguments, the states of its blocks, and the losses and caches that complete its output."""

    def __init__(
        self, tuner: Tuner, call: Call, names: Sequence[str], args: tuple[object, ...], kwargs: dict[str, Any], run: Run
    ):
        """Take the caches of the shadow networks out of `kwargs`, and run the networks if the call has ids or
        embeddings.

        If a network cannot run with a cache, the pass has none, unless the call sets `use_cache` or passes a cache.

        Raises:
            ValueError: a cache is passed by position, or holds tokens that the network has not seen.
            NotImplementedError: the call asks for a cache, and a network cannot run with one.
        """
        self.tuner, self.names, self.share = tuner, names, run.share
        self.rows = call.rows  # also when a backward pass runs a block again
        self.arguments = name_arguments(tuner.model, args, kwargs)
        if any(self.arguments.get(name) is not None and kwargs.get(name) is None for name in CACHES):
            raise ValueError(
                f"SHADOW adapters {list(names)} take a cache apart, and found one among the arguments without a name. "
                "Pass past_key_values by its name."
            )
        use_cache = self.arguments.get("use_cache")
        why = None if use_cache is False else self.why_no_cache()
        if why is not None and not use_cache and all(kwargs.get(name) is None for name in CACHES):
            use_cache = False
        self.shadows = unpack(tuner.model, kwargs, use_cache)
        if why is not None and self.shadows is not None:
            raise NotImplementedError(why)
        self.starts: dict[str, Tensor] = {}  # states before the first block, of all rows
        self.states = States(self.seed)
        if any(self.arguments.get(name) is not None for name in ("input_ids", "inputs_embeds")):
            for name in names:
                self.starts[name] = self.start(name)

    def why_no_cache(self) -> str | None:
        """Return the first reason why an adapter's network cannot run with a cache, with the remedy; None if all can.

        The reasons: a cache class of the model alone, an encoder-decoder, or no layer that counts tokens. The text
        names the adapter.
        """
        for name in self.names:
            network = self.tuner.common_tensors.containers["shadow_backbone"][name]
            why = no_cache_for(network, self.tuner.model)
            if why is not None:
                return f"SHADOW adapter '{name}' cannot run with a cache: {why}"
        return None

    def start(self, name: str, inputs_embeds: Tensor | None = None) -> Tensor:
        """Return the state before the first block, (rows, tokens, hidden): the network's output for the call's
        arguments, projected.

        The network gets those of the arguments in TAKEN (masks, positions, token types) that it takes and that are not
        None, on its device. Input embeddings, in its dtype, come from the argument or the call. Without these, a
        network with `needs_embeddings` gets those of the base model's embedding; others get the ids. A network that
        takes a cache gets `use_cache`: False without `self.shadows`, else True with its cache there, which is made if
        missing and extended.
        """
        containers = self.tuner.common_tensors.containers
        network, projection = containers["shadow_backbone"][name], containers["shadow_projection"][name]
        parameters = signature(network.forward).parameters
        device, dtype = find_device_and_dtype(network)
        call_arguments = {k: self.arguments[k] for k in TAKEN if k in parameters and self.arguments.get(k) is not None}
        ids = self.arguments.get("input_ids")
        if inputs_embeds is None:
            inputs_embeds = self.arguments.get("inputs_embeds")
        if inputs_embeds is None and hasattr(network, "needs_embeddings"):
            inputs_embeds = gather_module(self.tuner.model.get_input_embeddings())(ids)
        if inputs_embeds is not None:
            call_arguments["inputs_embeds"] = inputs_embeds.to(dtype)
        else:
            call_arguments["input_ids"] = ids
        call_arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in call_arguments.items()}
        cache_name = next((n for n in CACHES if n in parameters), None)
        if cache_name is not None:
            call_arguments["use_cache"] = self.shadows is not None
            if self.shadows is not None:
                call_arguments[cache_name] = self.shadows.setdefault(name, empty(network))
        return projection(network(**call_arguments).last_hidden_state)

    def seed(self, name: str, h: Tensor) -> Tensor:
        """Return the state before the first block for the adapter's rows; all rows if the call names no adapters by
        row.

        If the network has not run yet, run it on h as input embeddings, keep the result, and return it whole.
        """
        start = self.starts.get(name)
        if start is None:
            start = self.start(name, h)
            self.starts[name] = start
            return start
        index = None if self.rows is None else self.rows.to_device(start.device).index_of(name)
        return start if index is None else start.index_select(0, index)

    def finish(self, output: Any) -> object:
        """Return the model's output with the caches packed, if there are shadow networks' caches, and, if the call has
        labels, the losses of the shadow networks added.
        """
        if self.shadows:
            output = with_cache(output, self.shadows)
        for name in () if self.arguments.get("labels") is None else self.names:
            output = self.with_loss(output, name)
        return output

    def with_loss(self, output: Any, name: str) -> object:
        """Return the output with auxiliary_loss_weight · share · the loss of an adapter's network added to its loss.

        If the call names adapters for its rows, the loss is that of the adapter's rows. A tuple gives a new tuple with
        the sum first; another output is changed in place. The detached loss is stored in `tuner.states` and, unless the
        output is a tuple, as `output.shadow_loss`. Unchanged if `shadow_loss` gives None, as for models without a head.
        """
        cfg = self.tuner.peft_config[name]
        tensors: dict[str, Any] = {"state": self.starts[name]}
        tensors |= {key: self.arguments.get(key) for key in ("labels", "input_ids")}
        if self.rows is not None:
            index = {t.device: self.rows.to_device(t.device).index_of(name) for t in tensors.values() if t is not None}
            tensors = {key: t if t is None else t.index_select(0, index[t.device]) for key, t in tensors.items()}
        loss = shadow_loss(self.tuner, cfg, name, tensors.pop("state"), tensors)
        if loss is None:
            return output
        self.tuner.states[name] = loss.detach()
        weighed = cfg.auxiliary_loss_weight * self.share(name, self.tuner.model) * loss
        if isinstance(output, tuple):
            return (output[0] + weighed.to(output[0].device), *output[1:])
        output.loss = output.loss + weighed.to(output.loss.device)
        output.shadow_loss = loss.detach()
        return output
