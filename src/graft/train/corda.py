# SPDX-License-Identifier: Apache-2.0
"""Prepare CorDA (arXiv 2406.05223): covariances of the layers' inputs, and singular triples of W C."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.errors import CalibrationError, ConfigError
from graft.methods.lora.corda import EIGENS, CordaEigens, eigens_of
from graft.train.calibration import in_mode, linear_methods, of_file, require_all, store, stored

NAMES = ("S_WC", "U_WC", "V_WC")


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Measure what `get_peft_model` with init_lora_weights="corda" begins with; call it with the same model and config.

    Each targeted linear layer gets an attribute `eigens`, which the initialisation uses up.

    Args:
        run_model: runs the model on the data; not needed if the config names a file that is there already.
        hooked_model: the model that `run_model` runs, if it is another one with the same names.

    Raises:
        CalibrationError: no `run_model`, or data that leave a layer without a finite covariance.
        ConfigError: the config is not of CorDA, or a rank is above the dimensions of its layer.
        CheckpointError: a file is damaged, or of another model.
    """
    methods = linear_methods(model, lora_config, "corda")
    cfg = lora_config.corda_config
    for key, m in methods.items():
        if m.cfg.r > min(m.site.shape):
            raise ConfigError(
                f"The rank of layer '{key}' is {m.cfg.r}, and its weight has {min(m.site.shape)} singular triples: "
                "choose a smaller r."
            )
    found = stored(cfg.cache_file)
    if found is not None:
        made = {
            key: CordaEigens(*(of_file(found, f"{key}.{EIGENS}.{n}", cfg.cache_file) for n in NAMES)) for key in methods
        }
    else:
        covariances = covariances_of(model, methods, cfg, run_model, hooked_model)
        items: Iterable[tuple[str, Any]] = methods.items()
        if cfg.verbose:
            from tqdm import tqdm

            items = tqdm(items, desc="Collecting eigens")
        made = {}
        for key, m in items:
            W = m.site.op.canon(m.site.store.read(m.site.module, m.site.parameter)).detach()
            made[key] = eigens_of(W, covariances[key].to(W.device), m.cfg.r, cfg.corda_method, key)
        store(cfg.cache_file, {f"{key}.{EIGENS}.{n}": getattr(e, n) for key, e in made.items() for n in NAMES})
    for key, m in methods.items():
        setattr(m.site.module, EIGENS, made[key])


def covariances_of(
    model: nn.Module,
    methods: dict[str, Any],
    cfg: Any,
    run_model: Callable[[], Any] | None,
    hooked_model: nn.Module | None,
) -> dict[str, Tensor]:
    """Return C (in, in) of each layer: the mean over calls of xᵀ x, x (tokens, in) divided by its largest value."""
    found = stored(cfg.covariance_file)
    if found is not None:
        return {key: of_file(found, key, cfg.covariance_file) for key in methods}
    if run_model is None:
        raise CalibrationError("run_model must be specified when covariance file and cache file aren't built.")
    sums: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def watch(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = args[0].detach().flatten(0, -2)
            x = x if cfg.use_float16_for_covariance else x.float()
            x = x / x.max().abs()
            C = x.T @ x
            if not C.isfinite().all():
                raise CalibrationError(
                    f"Invalid value found in the inputs of layer '{key}': NaN, infinite, or zero throughout. Check the "
                    "data."
                )
            sums[key] = sums[key] + C if key in sums else C
            calls[key] = calls.get(key, 0) + 1

        return hook

    watched = hooked_model if hooked_model is not None else model
    modules = dict(watched.named_modules())
    hooks = [modules[key].register_forward_hook(watch(key)) for key in methods if key in modules]
    try:
        with in_mode(watched, False):
            run_model()
    finally:
        for handle in hooks:
            handle.remove()
    require_all(methods, sums, "input")
    means = {key: sums[key] / calls[key] for key in methods}
    store(cfg.covariance_file, means)
    return means
