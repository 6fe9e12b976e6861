# SPDX-License-Identifier: Apache-2.0
"""Checks for all that LoRA cannot do, before anything tries it."""

from __future__ import annotations

from graft.config.fields import COUNT
from graft.core.errors import ConfigError, PeftWarning, warn_of_layer
from graft.core.site import Site
from graft.methods.lora.config import LoraConfig


def check_site(site: Site, cfg: LoraConfig) -> None:
    """Raise ConfigError, in this order: if r < 1; if `check_parameter` refuses a parameter (an opaque op); if
    `lora_bias` meets an embedding; if the groups of a known convolution do not divide r.
    """
    COUNT.check("r", cfg.r)
    if site.op.opaque:
        check_parameter(site, cfg)
    if cfg.lora_bias and site.op.takes_ids:
        raise ConfigError(f"lora_bias=True is not supported for Embedding (layer '{site.key}').")
    groups = site.op.count_groups(site.module) if site.op.known else 1
    if cfg.r % groups:
        raise ConfigError(
            f"Targeting a {site.type_name} with groups={groups} and rank {cfg.r}. Currently, support is limited to "
            "conv layers where the rank is divisible by groups. Either choose a different rank or do not target this "
            f"specific layer: '{site.key}'."
        )


def check_parameter(site: Site, cfg: LoraConfig) -> None:
    """Raise ConfigError for options that do not work on a parameter which its own module uses (an opaque op).

    These are `lora_bias`, `fan_in_fan_out` and all variants but DoRA; for a stack of matrices also DoRA and any named
    initialisation but "gaussian", in any case. The text names MultiheadAttention if the site is a module, else
    ParamWrapper.
    """
    what = "MultiheadAttention" if site.path == site.key else "ParamWrapper"
    options = {name: getattr(cfg, name) for name in ("lora_bias", "fan_in_fan_out")}
    options |= {name: True for name in cfg.variants if name != "use_dora" or len(site.shape) > 2}
    how = cfg.init_lora_weights
    if len(site.shape) > 2 and isinstance(how, str) and how.lower() != "gaussian":
        options[f"init_lora_weights={how!r}"] = True
    wrong = [name for name, on in options.items() if on]
    if wrong:
        raise ConfigError(
            f"lora.{what} does not work with {', '.join(wrong)} (layer '{site.key}'). Leave it out, or that layer."
        )


def only_linear(site: Site, what: str) -> str | None:
    """Return a reason that begins with the given clause if the layer's type is known and not linear; else None."""
    return None if site.op.linear or not site.op.known else f"{what}: it adapts linear layers only"


def plain_start(site: Site, cfg: LoraConfig, option: str) -> None:
    """Raise ConfigError for a named initialisation other than "gaussian" and "orthogonal", in any case.

    True and False pass.

    The others need A (r, in) and B (out, r), and the variant of `option` has another shape.
    """
    how = cfg.init_lora_weights
    if isinstance(how, str) and how.lower() not in ("gaussian", "orthogonal"):
        raise ConfigError(
            f"With {option}, A or B of layer '{site.key}' has a shape that init_lora_weights={how!r} cannot fill. "
            "Choose True, False, 'gaussian' or 'orthogonal'."
        )


def unmergeable(site: Site, cfg: LoraConfig) -> str | None:
    """Return the reason why an adapter has no merged form: a known convolution with groups > 1, or `lora_bias` on a
    layer without bias. None if it has one.
    """
    if site.op.known and site.op.count_groups(site.module) > 1:
        return "Merging is not supported for _ConvNd layers with groups > 1! A mixes the groups"
    if cfg.lora_bias and getattr(site.module, "bias", None) is None:
        return "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias"
    return None


def warn_unmergeable(site: Site, cfg: LoraConfig) -> None:
    """Warn (`warn_of_layer`, gathered over layers) of each reason: `lora_bias` on a layer without bias, a convolution
    with groups > 1.
    """
    if cfg.lora_bias and getattr(site.module, "bias", None) is None:
        text = f"`lora_bias=True` was passed but the targeted layer of type {site.type_name} has no bias."
        warn_of_layer(site.key, f"{text} Adapter weights of {{}} cannot be merged.", PeftWarning)
    if site.op.count_groups(site.module) > 1:
        warn_of_layer(site.key, "LoRA adapter added to ConvNd layer with groups > 1. Merging is not supported.")
