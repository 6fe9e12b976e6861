# SPDX-License-Identifier: Apache-2.0
"""Checks of a LoraConfig's values, and what they complete."""

from __future__ import annotations

from typing import Any

from torch import nn

from graft.config.fields import sub_config
from graft.core.errors import ConfigError, warn
from graft.core.ops import OPS, Op
from graft.methods.lora.choices import CONVERTED, SETTINGS, TITLES
from graft.methods.lora.start_configs import LoftQConfig


def ops_of(mapping: dict[type[nn.Module], Any]) -> dict[type[nn.Module], Op]:
    """Return the ops for types of modules; raise TypeError where a value tells of none."""
    found: dict[type[nn.Module], Op] = {}
    for kind, how in mapping.items():
        op = how if isinstance(how, Op) else OPS.find(how)
        if op is None:
            raise TypeError(
                f"{how!r} does not say how {kind.__name__} uses its weight: give a type that graft knows (nn.Linear, "
                "nn.Embedding, nn.Conv1d to 3d) or a graft.core.ops.Op. Adapter layers written for PEFT do not run "
                "here; an Op of about 20 lines does the work of one."
            )
        found[kind] = op
    return found


def check_invocation(cfg: Any) -> None:
    """Raise ConfigError for invocation tokens that cannot occur."""
    tokens = cfg.alora_invocation_tokens
    if tokens is None:
        return
    if not tokens or min(tokens) < 0:
        raise ConfigError(
            f"`alora_invocation_tokens` must be the ids of one token or more, got {tokens}: aLoRA begins to act "
            "where they stand. Leave it None for an adapter that always acts."
        )
    if cfg.task_type != "CAUSAL_LM":
        warn("aLoRA is currently only supported for CAUSAL_LM task.")


def check_loftq(cfg: Any) -> None:
    """Make the settings of LoftQ a dict, as in files."""
    if cfg.init_lora_weights == "loftq":
        if not cfg.loftq_config:
            raise ConfigError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
        cfg.loftq_config = vars(sub_config(cfg.loftq_config, LoftQConfig)).copy()
    elif cfg.loftq_config:
        warn("`loftq_config` specified but will be ignored when `init_lora_weights` is not 'loftq'.")
        cfg.loftq_config = {}


def check_start(cfg: Any) -> None:
    """Complete the settings of the initialisation; raise ConfigError where options contradict it."""
    if str(cfg.init_lora_weights).lower() == "olora":  # which PEFT takes in any spelling
        cfg.init_lora_weights = "olora"
    init = cfg.init_lora_weights
    for name, (how, cls) in SETTINGS.items():
        setattr(cfg, name, sub_config(getattr(cfg, name), cls))
        if getattr(cfg, name) is not None and init != how:
            warn(f"`{name}` specified but will be ignored when `init_lora_weights` is not '{how}'.")
        elif getattr(cfg, name) is None and init == how:
            title = TITLES[how]
            warn(f"`init_lora_weights` is '{how}' but `{name}` is not specified. Using default {title} config.")
            setattr(cfg, name, cls())
    check_loftq(cfg)
    if cfg.kasa_config and isinstance(init, str) and init.startswith(("pissa_niter", "corda", "lora_ga")):
        raise ConfigError(
            f"kasa_config cannot stand with init_lora_weights={init!r}: loading makes KaSA's base anew, which "
            "takes an initialisation that gives the same values each time."
        )
    if cfg.lora_bias and not isinstance(init, bool):
        raise ConfigError(
            "The argument lora_bias=True is only supported with the plain initialisations, True and False, not "
            f"with init_lora_weights={init!r}."
        )
    if cfg.lora_bias and cfg.use_dora:
        raise ConfigError("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False.")
    patterned = cfg.rank_pattern or cfg.alpha_pattern
    if cfg.use_rslora and patterned and isinstance(init, str) and init.startswith(CONVERTED):
        warn(
            "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion of "
            "modified base weights: the saved adapter cannot be converted to plain LoRA."
        )
