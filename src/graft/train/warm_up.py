# SPDX-License-Identifier: Apache-2.0
"""SDT's short training, after which it is known which channels and states of a state space train: arXiv 2410.09016."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from graft import CalibrationError, ConfigError, SdtConfig, method_of
from graft.core.errors import some
from graft.inject.inject import Injection
from graft.methods.sdt import A_LOG, CHANGE, SDT, X_PROJ
from graft.model.modes import training_only


def preprocess_sdt(model: nn.Module, config: SdtConfig, train: Callable[[list[nn.Parameter]], object]) -> None:
    """Find by training which channels and states `get_peft_model` shall train; call it with the same model and config.

    A_log of the mixers that the config targets trains whole, and gets its values back. Each mixer keeps the change in
    an attribute, which the initialisation uses up.

    Args:
        train: trains these parameters, A_log of each mixer (channels, states), with its own optimizer; 250 to
            500 steps in the paper.

    Raises:
        ConfigError: the config is not of SDT, or targets no state space.
        CalibrationError: A_log of a mixer has not changed, or has values that are not finite.
        as `get_peft_model`, for what would not fit.
    """
    if not isinstance(config, SdtConfig):
        raise ConfigError(f"preprocess_sdt prepares a SdtConfig, got a {type(config).__name__}.")
    methods = Injection(model, config, method_of(config.peft_type), "default").find().methods
    ends = [key for key, m in methods.items() if isinstance(m, SDT) and m.mixer is not None]
    mixers = {path: model.get_submodule(path) for path in dict.fromkeys(key.rpartition(".")[0] for key in ends)}
    if not mixers:
        raise ConfigError(f"The config targets no {A_LOG} or {X_PROJ} of a Mamba's mixer: there is nothing to find.")
    parameters = {path: mixer.get_parameter(A_LOG) for path, mixer in mixers.items()}
    before = {path: p.detach().clone() for path, p in parameters.items()}
    try:
        with training_only(model, parameters.values()), torch.enable_grad():
            train(list(parameters.values()))
        changes = {path: p.detach() - before[path] for path, p in parameters.items()}
    finally:
        with torch.no_grad():
            for path, p in parameters.items():
                p.copy_(before[path])
    still = [path for path, change in changes.items() if not (change.isfinite().all() and change.any())]
    if still:
        raise CalibrationError(
            f"The training left {A_LOG} of {some(still)} unchanged, or not finite: have an optimizer of the parameters "
            "that it gets take steps."
        )
    for path, mixer in mixers.items():
        for module in (mixer, mixer.get_submodule(X_PROJ)):
            setattr(module, CHANGE, changes[path])
