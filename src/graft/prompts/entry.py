# SPDX-License-Identifier: Apache-2.0
"""The hooks by which a prompt enters the stack: they rewrite its arguments, and cut the prompt from its output."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from graft.prompts.arguments import put_embeddings, put_keys, widen, widen_encoded
from graft.prompts.kv_prefix import is_static, length
from graft.prompts.stack import NEW_CACHE, OLD_CACHE, Stack, first_of

ORDERS = ("perm_mask", "target_mapping")  # XLNet's arguments, which have no place for a prompt


def attach(stack: Stack) -> None:
    """Put the hooks on the stack's modules, once."""
    if stack.attached:
        return
    stack.module.register_forward_pre_hook(partial(enter, stack), with_kwargs=True)
    stack.module.register_forward_hook(partial(leave, stack))
    if stack.outer is not stack.module:
        stack.outer.register_forward_pre_hook(partial(step, stack), with_kwargs=True)
    stack.attached = True


def enter(
    stack: Stack, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]] | None:
    """Put the prompt into the arguments: the hook before `module`."""
    if not stack.now.tokens and not stack.now.encoded:
        return None
    stack.now.visited = True
    arguments = _by_name(stack, stack.names, args, kwargs)
    if stack.now.encoded:
        widen_encoded(stack, arguments)
    if stack.now.tokens:
        _enter(stack, arguments)
    return (), arguments


def step(
    stack: Stack, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]] | None:
    """Widen masks and positions before `outer` in later steps: the hook on it."""
    arguments = _by_name(stack, stack.outer_names, args, kwargs)
    first, seen = first_of(arguments), length(arguments.get(stack.cache_name or ""))
    stack.now.widened_outside = bool(stack.now.tokens and seen and first is not None)
    if not stack.now.widened_outside:
        return None
    widen(stack, arguments, first.shape[1] + seen, 0, len(first))
    return (), arguments


def _by_name(stack: Stack, names: list[str], args: tuple[object, ...], kwargs: dict[str, object]) -> dict[str, object]:
    """Return a call's arguments by name; a cache under the new name even if it came under the old one."""
    arguments = {**dict(zip(names, args)), **kwargs}
    if stack.cache_name == NEW_CACHE and arguments.get(NEW_CACHE) is None and arguments.get(OLD_CACHE) is not None:
        arguments[NEW_CACHE] = arguments.pop(OLD_CACHE)
    return arguments


def leave(stack: Stack, module: nn.Module, args: tuple[object, ...], output: Any) -> object:
    """Cut the prompt, or a cache that holds nothing else, from the output: the hook after `module`."""
    if stack.now.strips and stack.now.entered:
        if isinstance(output, tuple):
            return output[0][:, stack.now.tokens :], *output[1:]
        output.last_hidden_state = output.last_hidden_state[:, stack.now.tokens :]
    lent, stack.now.lent = stack.now.lent, None
    if lent is None:
        return None
    if isinstance(output, tuple):
        return tuple(part for part in output if part is not lent)
    return type(output)(**{name: part for name, part in output.items() if part is not lent})


def _enter(stack: Stack, arguments: dict[str, object]) -> None:
    first = first_of(arguments)
    if first is None:
        return  # the module's own error names the missing argument
    if arguments.get("input_ids") is not None and arguments.get("inputs_embeds") is not None:
        raise ValueError("Pass either input_ids or inputs_embeds: they are the same input.")
    if first.dim() < 2:
        raise ValueError(f"The input must be (batch, tokens), got {tuple(first.shape)}: pass input_ids[None].")
    order = next((name for name in ORDERS if arguments.get(name) is not None), None)
    if order is not None:
        raise ValueError(
            f"{order} has no place for the prompt's tokens: {type(stack.module).__name__} cannot generate with a "
            "prompt, which forward() can be used with."
        )
    batch, new = first.shape[:2]
    cache = arguments.get(stack.cache_name) if stack.cache_name else None
    seen = length(cache)
    stack.now.entered = not seen
    if not seen and is_static(cache):
        raise ValueError(
            f"A {type(cache).__name__} has no room for a prompt of {stack.now.tokens} tokens: leave it out, or pass "
            "cache_implementation='dynamic' to generate()."
        )
    total = new + (seen or stack.now.tokens)
    if stack.positions is not None and total > stack.positions:
        raise ValueError(
            f"{total - stack.now.tokens} tokens and a prompt of {stack.now.tokens} need {total} positions, and "
            f"{type(stack.module).__name__} has {stack.positions}: {total - stack.positions} too many."
        )
    before = 0
    if stack.now.entered and stack.now.embeddings is not None:
        before = stack.now.tokens
        put_embeddings(stack, arguments, batch)
    elif stack.now.entered:
        put_keys(stack, arguments, cache, batch)
    if not stack.now.widened_outside:
        widen(stack, arguments, total, before, batch)
    stack.now.widened_outside = False
