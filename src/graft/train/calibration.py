# SPDX-License-Identifier: Apache-2.0
"""Prepare starts that are measured on data: CorDA (arXiv 2406.05223), LoRA-GA (2407.05000), LoRA-SB (2411.19557), and
SDT's short training (2410.09016), which finds the channels and states of a state space that train."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from graft import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    CordaConfig,
    LoraConfig,
    LoraXsConfig,
    Method,
    SdtConfig,
)
from graft.config.reading import read_weights
from graft.core.errors import join_some
from graft.inject.inject import find_methods
from graft.inject.parts import check_no_pieces, use_mode
from graft.io.files import write_torch_file

Key = TypeVar("Key", bound="str | tuple[str, str]")


def find_linear_methods(
    model: nn.Module, config: LoraConfig | LoraXsConfig, how: str, field: str = "init_lora_weights"
) -> dict[str, Method]:
    """Return by path the methods that an injection of `config` would put on the linear layers of `model`.

    Neither model nor config changes.

    Args:
        how: the initialisation that `field` of the config must have.

    Raises:
        ConfigError: the config has another initialisation, or targets no linear layer.
        UnsupportedLayerError: this process has only a piece of a linear layer.
        as `get_peft_model`, for a config that does not fit.
    """
    methods = find_methods(model, config)
    if (init := getattr(config, field, None)) != how:
        raise ConfigError(f"This prepares {field}='{how}', and the config says {init!r}.")
    linear = {key: m for key, m in methods.items() if m.site.op.linear}
    if not linear:
        kinds = ", ".join(sorted({m.site.type_name for m in methods.values()}))
        raise ConfigError(
            f"No supported layers found for {field}='{how}': it begins with data of linear layers, and "
            f"target_modules={config.target_modules} names {kinds}. Name linear layers."
        )
    check_no_pieces(((key, m.site) for key, m in linear.items()), f"{field}='{how}' measures data")
    return linear


@contextmanager
def watch_calls(layers: Mapping[str, nn.Module], see: Callable[[str, Any, Any], object]) -> Iterator[None]:
    """Within the block, call see(key, positional arguments, output) after each call of these layers, by forward hooks.

    The result of `see` is ignored. The hooks are removed at the end, also after an error.
    """

    def pass_on(key: str, _: nn.Module, args: Any, y: Any) -> None:
        """Call `see`, and return None: another result would replace the output."""
        see(key, args, y)

    with ExitStack() as hooks:
        for key, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(pass_on, key)))
        yield


def check_measured(keys: Collection[str], seen: Collection[str], what: str) -> None:
    """Raise CalibrationError, with some of the names, unless all of `keys` are in `seen`.

    what: the missing thing in the text, such as "gradient".
    """
    missing = [key for key in keys if key not in seen]
    if missing:
        raise CalibrationError(
            f"The data gave no {what} for {len(missing)} of {len(list(keys))} layers: {join_some(missing)}. "
            "Pass data that reaches them."
        )


def check_ranks(ranks: Mapping[str, tuple[int, int]], limit_text: str) -> None:
    """Raise ConfigError for the first layer with a rank above its limit: path → (rank, limit).

    `limit_text` ends the error's first sentence, with a place for the limit: "inputs have {} components".
    """
    for key, (r, most) in ranks.items():
        if r > most:
            raise ConfigError(
                f"The rank of layer '{key}' is {r}, and its {limit_text.format(most)}. Choose a smaller r, or a "
                "rank_pattern."
            )


def read_or_measure(
    path: str | None, names: Mapping[Key, str], measure: Callable[[], Mapping[Key, Tensor]]
) -> Mapping[Key, Tensor]:
    """Return tensors by key from a cache file.

    Without a path, or if the file is missing or empty, return those of `measure`, and write them to the path, if there
    is one. The file is written whole or not at all, and its folder is made.

    Args:
        names: key → name in the file.

    Raises:
        CheckpointError: the file is damaged or lacks a name. The text says to delete it.
    """
    if path is None or not os.path.isfile(path) or not os.path.getsize(path):
        measured = measure()
        if path is not None:
            write_torch_file(path, {name: measured[key] for key, name in names.items()})
        return measured
    try:
        cached = read_weights(path, "The cache")
    except CheckpointError as e:
        raise CheckpointError(f"{e} Or delete it, and graft makes it again.") from e
    if absent := [name for name in names.values() if name not in cached]:
        raise CheckpointError(
            f"{path} lacks '{absent[0]}': it was made for another model or other target_modules. Delete it, and graft "
            "makes it again."
        )
    return {key: cached[name] for key, name in names.items()}


# CorDA


NAMES = ("S_WC", "U_WC", "V_WC")
DAMP, GOOD_ENOUGH = 0.01, 0.05


@dataclass
class CordaEigens:
    """r singular triples of W C, with C⁻¹ multiplied back: W ≈ U diag(S) Vᵀ on inputs like those behind C."""

    S_WC: Tensor  # (r,)
    U_WC: Tensor  # (out, r)
    V_WC: Tensor  # (in, r)


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], object] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Measure the start of init_lora_weights="corda". Then call `get_peft_model` with the same model and config.

    Each targeted linear layer gets an attribute `eigens`, which the initialisation uses and removes. Files that the
    config names are read if they exist, and written otherwise: `cache_file` has the results, `covariance_file` the
    covariances.

    Args:
        run_model: runs the model on the data; not needed if a file of the config exists.
        hooked_model: the model that `run_model` runs, if it is another one with the same names.

    Raises:
        CalibrationError: no `run_model`, or data that leave a layer without a finite covariance.
        ConfigError: the config is not of CorDA, or a rank is above the dimensions of its layer.
        CheckpointError: a file is damaged, or of another model.
        UnsupportedLayerError: this process has only a piece of a layer.
    """
    from tqdm import tqdm

    methods = find_linear_methods(model, lora_config, "corda")
    cfg = cast(CordaConfig, lora_config.corda_config)
    ranks = {key: (m.cfg.r, min(m.site.shape)) for key, m in methods.items()}
    check_ranks(ranks, "weight has {} singular triples")

    def measure_eigens() -> dict[tuple[str, str], Tensor]:
        """Return the tensors of each layer's `CordaEigens` by path and field, from covariances that are read or
        measured. Shows a bar if the config is `verbose`.
        """
        calls = partial(measure_covariances, model, methods, cfg, run_model, hooked_model)
        covariances = read_or_measure(cfg.covariance_file, {key: key for key in methods}, calls)
        tensors = {}
        for key, m in tqdm(methods.items(), desc="Collecting eigens", disable=not cfg.verbose):
            W = m.site.weight.canon().detach()
            eigens = eigens_of(W, covariances[key].to(W.device), m.cfg.r, cfg.corda_method, key)
            tensors.update({(key, n): getattr(eigens, n) for n in NAMES})
        return tensors

    names = {(key, n): f"{key}.{m.base_mark}.{n}" for key, m in methods.items() for n in NAMES}
    tensors = read_or_measure(cfg.cache_file, names, measure_eigens)
    for key, m in methods.items():
        m.leave_on_base(CordaEigens(*(tensors[key, n] for n in NAMES)))


def measure_covariances(
    model: nn.Module,
    methods: dict[str, Method],
    cfg: CordaConfig,
    run_model: Callable[[], object] | None,
    hooked_model: nn.Module | None,
) -> dict[str, Tensor]:
    """Return C (in, in) of each layer: the mean over calls of xᵀ x.

    x (tokens, in) is divided by the absolute value of its largest entry. It is float32 unless the config has
    `use_float16_for_covariance`, which keeps its dtype.

    Calls `run_model` with hooks on the layers, and with `hooked_model` (else `model`) in eval mode meanwhile.

    Raises:
        CalibrationError: there is no `run_model`, or a layer gets no input or one that is not finite or all zeros.
    """
    if run_model is None:
        raise CalibrationError("run_model must be specified when covariance file and cache file aren't built.")
    sums: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def add_covariance(key: str, args: tuple[Tensor, ...], output: object) -> None:
        """Add xᵀ x to a layer's sum, and count the call. x is the first argument as rows, divided by |its largest
        number|; it is float32, unless the config has `use_float16_for_covariance`.

        Raise CalibrationError if the product is not finite.
        """
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
        calls[key] += 1

    watched = hooked_model if hooked_model is not None else model
    modules = dict(watched.named_modules())
    with watch_calls({key: modules[key] for key in methods.keys() & modules}, add_covariance), use_mode(watched, False):
        run_model()
    check_measured(methods, sums, "input")
    return {key: sums[key] / calls[key] for key in methods}


@torch.no_grad()
def eigens_of(W: Tensor, C: Tensor, r: int, method: str, key: str) -> CordaEigens:
    """Return r singular triples of W C with C's inverse multiplied back; W (out, in), C (in, in).

    The r largest for method "ipm", else the r smallest ("kpm"), in float32 and the order of an SVD. C's diagonal gets 1
    % of its mean added, doubled until the inverse is good (error < 0.05).

    Raises:
        CalibrationError: C is zero or not finite; `key` names the layer.
    """
    W, C = W.float(), C.float()
    mean = C.diagonal().mean()
    if not (C.isfinite().all() and mean > 0):
        raise CalibrationError(f"The inputs of layer '{key}' are all zero, or not finite. Pass other data.")
    one, damp = torch.eye(len(C), device=C.device), DAMP
    while True:
        damped = C + damp * mean * one
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, one) < GOOD_ENOUGH:
            break
        damp *= 2
    U, S, Vh = torch.linalg.svd(W @ damped, full_matrices=False)
    V = (Vh @ inverse).T
    cut = slice(r) if method == "ipm" else slice(len(S) - r, None)
    return CordaEigens(S[cut].clone(), U[:, cut].clone(), V[:, cut].clone())


# LoRA-GA


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], object], cache_file: str | None = None
) -> None:
    """Measure the start of init_lora_weights="lora_ga". Then call `get_peft_model` with the same model and config.

    Each targeted linear layer gets its gradient as an attribute `_peft_loraga_grad`, on the weight's device, which the
    initialisation uses and removes. A config without target_modules means those of the architecture.

    Args:
        train_step: runs forward and backward, once or more often: gradients are averaged. No optimizer step.
        cache_file: gradients are read from here if the file exists, and written otherwise.

    Raises:
        CalibrationError: a layer got no gradient, or one that is not finite.
        ConfigError: the config is not of LoRA-GA, or a layer is quantized.
        CheckpointError: the cache is damaged, or of another model.
        UnsupportedLayerError: this process has only a piece of a layer.
    """
    if isinstance(lora_config, LoraConfig) and lora_config.lora_ga_config is None:
        raise ConfigError(
            "If you want to use LoRA-GA, please initialize the LoraConfig with init_lora_weights='lora_ga' and "
            "lora_ga_config=LoraGAConfig(...)."
        )
    methods = find_linear_methods(model, lora_config, "lora_ga")
    refuse_quantized(methods, "LoRA-GA")
    names = {key: f"{key}.{m.base_mark}" for key, m in methods.items()}
    gradients = read_or_measure(cache_file, names, partial(measure_gradients, model, methods, train_step))
    for key, m in methods.items():
        m.leave_on_base(gradients[key].to(m.site.weight.where()[0]))


def preprocess_lorasb(model: nn.Module, config: LoraXsConfig, train_step: Callable[[], object], step: float) -> None:
    """Measure the start of init_weights="sb". Then call `get_peft_model` with the same model and config.

    Each targeted linear layer gets an attribute `_graft_lorasb_step` (out, in), which the initialisation uses and
    removes: -step · sign(G), AdamW's first step of the weight. The adapter begins with its best product of rank r.

    Args:
        train_step: runs forward and backward, once or more often, about 50 samples in all. No optimizer step.
        step: size of the first step, lr / (warmup_ratio · steps).

    Raises:
        CalibrationError: a layer got no gradient, or one that is not finite.
        ConfigError: the config is not of LoRA-SB, a layer is quantized, or the step is not positive and finite.
        UnsupportedLayerError: this process has only a piece of a layer.
    """
    if not 0 < step < float("inf"):
        raise ConfigError(f"`step` should be a positive number but the value passed is {step}.")
    methods = find_linear_methods(model, config, "sb", "init_weights")
    refuse_quantized(methods, "LoRA-SB")
    for key, G in measure_gradients(model, methods, train_step).items():
        methods[key].leave_on_base(-step * methods[key].site.op.canon(G).sign())


def refuse_quantized(methods: dict[str, Method], who: str) -> None:
    """Raise ConfigError, with `who` and the path, for the first layer with a quantized weight, which has no
    gradient.
    """
    for key, m in methods.items():
        if not m.site.store.exact:
            raise ConfigError(
                f"{who} does not support quantized models. Found quantized module: '{key}': it has no gradient."
            )


def measure_gradients(
    model: nn.Module, methods: dict[str, Method], train_step: Callable[[], object]
) -> dict[str, Tensor]:
    """Return the gradient of each weight, in the layer's layout, divided by the number of the layer's calls that had a
    backward pass.

    `train_step` runs in training mode, with gradients for these weights only; hooks count the calls and are removed.
    Afterwards all parameters have their `requires_grad` and `grad` of before, and modules their mode.

    Raises:
        CalibrationError: a weight has no gradient, or one that is not finite.
    """
    weights = {key: getattr(m.site.module, m.site.parameter) for key, m in methods.items()}
    calls: Counter[str] = Counter()

    def watch_output(key: str, args: object, output: Tensor) -> None:
        """Register a hook that counts backward passes on a layer's output that requires gradients; leave any other
        output alone.
        """
        if output.requires_grad:  # not in a first pass under reentrant checkpointing
            output.register_hook(lambda _: calls.update([key]))

    modules = {key: m.site.module for key, m in methods.items()}
    with watch_calls(modules, watch_output), restrict_training(model, weights.values()):
        with use_mode(model, True), torch.enable_grad():
            train_step()
        seen = [key for key, W in weights.items() if W.grad is not None and calls[key]]
        check_measured(methods, seen, "gradient")
        gradients = {key: W.grad.detach() / calls[key] for key, W in weights.items()}
    broken = [key for key, G in gradients.items() if not G.isfinite().all()]
    if broken:
        raise CalibrationError(f"The gradient of layer '{broken[0]}' is not finite. Check the data and the loss.")
    return gradients


@contextmanager
def restrict_training(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block, only these parameters of a model require gradients, and no parameter has one at first.

    Afterwards `requires_grad` and `grad` of all are as before.
    """
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    ids = {id(p) for p in parameters}
    try:
        for p, *_ in before:
            p.requires_grad, p.grad = id(p) in ids, None
        yield
    finally:
        for p, requires, grad in before:
            p.requires_grad, p.grad = requires, grad


# SDT


A_LOG, X_PROJ = "A_log", "x_proj"  # of Mamba's mixers


def preprocess_sdt(model: nn.Module, config: SdtConfig, train: Callable[[list[nn.Parameter]], object]) -> None:
    """Find by training which channels and states of state spaces `get_peft_model` shall train.

    Then call it with the same model and config.

    A_log of the mixers that the config targets trains whole, with gradients for it only, and gets its values back, also
    after an error. Each mixer and its x_proj keep the change in an attribute `_graft_sdt_change`, which the
    initialisation uses and removes.

    Args:
        train: trains these parameters, A_log of each mixer (channels, states), with its own optimizer; 250 to 500 steps
            in the paper.

    Raises:
        ConfigError: the config is not of SDT, or targets no state space.
        CalibrationError: A_log of a mixer has not changed, or its change is not finite. No mixer keeps a change then.
        as `get_peft_model`, for a config that does not fit.
    """
    if not isinstance(config, SdtConfig):
        raise ConfigError(f"preprocess_sdt prepares a SdtConfig, got a {type(config).__name__}. Pass a SdtConfig.")
    methods = find_methods(model, config)
    ends = [key for key, m in methods.items() if getattr(m, "mixer", None) is not None]
    mixers = {path: model.get_submodule(path) for path in dict.fromkeys(key.rpartition(".")[0] for key in ends)}
    if not mixers:
        raise ConfigError(f"The config targets no {A_LOG} or {X_PROJ} of a Mamba's mixer. Name them in target_modules.")
    parameters = {path: mixer.get_parameter(A_LOG) for path, mixer in mixers.items()}
    before = {path: p.detach().clone() for path, p in parameters.items()}
    try:
        with restrict_training(model, parameters.values()), torch.enable_grad():
            train(list(parameters.values()))
        changes = {path: p.detach() - before[path] for path, p in parameters.items()}
    finally:
        with torch.no_grad():
            for path, p in parameters.items():
                p.copy_(before[path])
    still = [path for path, change in changes.items() if not (change.isfinite().all() and change.any())]
    if still:
        raise CalibrationError(
            f"The training left {A_LOG} of {join_some(still)} unchanged, or not finite. Let `train` step "
            "an optimizer of the parameters that it gets."
        )
    for path, mixer in mixers.items():
        for module in (mixer, mixer.get_submodule(X_PROJ)):
            setattr(module, methods[ends[0]].base_mark, changes[path])
