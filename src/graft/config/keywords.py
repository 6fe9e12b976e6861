# SPDX-License-Identifier: Apache-2.0
"""Keyword arguments for the hub, and a warning about those that no function takes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from graft.core.errors import PeftWarning, warn

HUB_KEYWORDS = {"revision", "cache_dir", "token", "force_download", "local_files_only", "proxies", "repo_type"}
LOADING = HUB_KEYWORDS | {"subfolder", "ignore_mismatched_sizes", "check_digest", "expert_layout"}
# PEFT's arguments for the device of loaded tensors; here an adapter goes to where its layers are
IDLE_LOADING = {"torch_device", "device_map", "max_memory", "offload_folder", "offload_dir", "offload_index"}
# arguments that transformers, Trainer and accelerate pass to every model's `save_pretrained`
IDLE_SAVING = {"save_function", "max_shard_size", "token", "variant", "save_peft_format"}


def hub_keywords(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return those of `kwargs` that are for the hub."""
    return {k: v for k, v in kwargs.items() if k in HUB_KEYWORDS}


def warn_unknown(function: Callable[..., Any], kwargs: Iterable[str], known: set[str]) -> None:
    """Warn of keyword arguments of `function` that have no effect: one may be a typing error."""
    for name in kwargs:
        if name not in known:
            close = difflib.get_close_matches(name, known | set(inspect.signature(function).parameters), n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            warn(f"{function.__name__}() knows no argument '{name}': it has no effect.{hint}", PeftWarning)
