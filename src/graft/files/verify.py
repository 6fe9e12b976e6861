# SPDX-License-Identifier: Apache-2.0
"""A test of a running server: does it apply an adapter? Its log-probabilities are compared with graft's, on the same
weights.

graft computes the correct answer, and the answers after typical mistakes of servers: no adapter, one kind of module
missing, one scale for all modules, a scale that is off by a factor k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graft import BaseModelMismatchError
from graft.config.reading import Json
from graft.files.ask import Connection, LogProbabilities, ask_log_probabilities, identify_server
from graft.files.errors import OptionError
from graft.files.load import find_adapter_layers
from graft.files.names import last_name

# server's dtype → root mean square difference of log-probabilities
TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
OF_NOISE = 3  # a tolerance is at least this multiple of the noise on the base
ANOTHER_BASE = 10  # tolerances
GRID = [2.0**n for n in range(-6, 7)]  # first values of k in the search
APPLIED, UNDECIDED = "applied", "too small to tell"
NOT_APPLIED, OFF, MISSING, PATTERNS, ALPHAS, ROOTS, ANOTHER, LEAKED = FAULTS = (
    "not applied", "scale off", "missing", "patterns not read", "alpha_pattern not read", "use_rslora not read",
    "another adapter", "in the base too",
)  # fmt: skip


class Scale(NamedTuple):
    """The scaling of a layer, and the scalings of servers that read only a part of its config."""

    actual: float
    plain: float  # lora_alpha / r for all layers
    one_alpha: float  # lora_alpha / the layer's rank
    rootless: float  # the layer's alpha / the layer's rank


@dataclass(frozen=True)
class Verdict:
    """The result of the test.

    Attributes:
        verdict: "applied", "not applied", "scale off", "missing", "patterns not read", "alpha_pattern not read",
            "use_rslora not read", "another adapter", "too small to tell", or "in the base too".
        text: the same as a sentence.
        tolerance: root mean square difference of log-probabilities that counts as equal.
        effect: root mean square change of log-probabilities by the adapter.
        noise: root mean square difference of server and graft on the base.
        deviations: possible explanation → root mean square difference to the server's adapter.
        scale: k, for "scale off".
    """

    verdict: str
    text: str
    tolerance: float
    effect: float
    noise: float
    deviations: dict[str, float] = field(default_factory=dict)
    scale: float | None = None

    @property
    def ok(self) -> bool:
        """True if the server applies the adapter."""
        return self.verdict == APPLIED


def make_prompts(vocabulary: int, number: int = 4, length: int = 16) -> list[list[int]]:
    """Return `number` fixed prompts of `length` token ids, spread over the vocabulary by a quadratic function modulo
    its size; the same at each call.
    """
    return [
        [(7919 * i * i + 104729 * i + 13) % vocabulary for i in range(n, n + length)]
        for n in range(1, 977 * number, 977)
    ]


def verify_server(
    connection: Connection,
    base: nn.Module,
    load: Callable[[nn.Module], nn.Module],
    name: str,
    base_name: str,
    dtype: str = "float32",
    tolerance: float | None = None,
    server: str | None = None,
) -> Verdict:
    """Ask a server for log-probabilities of its base and its adapter, and compare them with those of a local model.

    The noise is the difference on the base. Up to 10 tolerances of noise are accepted, and the tolerance rises to 3
    times the noise. With more, the verdict is "in the base too" if the server's base equals the local model with the
    adapter, or with one kind of its modules.

    Args:
        base: the base model in eval mode, with the server's weights.
        load: puts the adapter onto the base and returns the model; it may change the base's weights, as initialisations
            do.
        name: the adapter's name on the server.
        base_name: the base's name on the server.
        dtype: the server's, which gives the least tolerance: "float32" 1e-3, "float16" 1e-2, "bfloat16" 5e-2.
        tolerance: use exactly this one.
        server: a name that `identify_server` returns, if the server does not say it.

    Raises:
        BaseModelMismatchError: the server's base has other weights or another vocabulary.
        ServerError: a request fails.
        OptionError: `dtype`, `tolerance` or `server` is invalid.
    """
    check_verify_options(dtype, tolerance)
    server = identify_server(connection, server)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    asked = make_prompts(vocabulary)
    of_base = ask_log_probabilities(connection, server, base_name, asked, is_base=True)
    of_adapter = ask_log_probabilities(connection, server, name, asked, is_base=False)
    places = list_common_places(of_base, of_adapter, vocabulary)
    before, now = stack_values(of_base, places), stack_values(of_adapter, places)
    own_base = compute_log_probabilities(base, asked, places)
    noise = root_mean_square(before - own_base)
    floor = TOLERANCES[dtype] if tolerance is None else tolerance
    allowed = max(floor, OF_NOISE * noise) if tolerance is None else tolerance
    model = load(base)

    layers = {path: layer for path, layer in find_adapter_layers(model).items() if getattr(layer, "scaling", None)}

    def compute(factor: Callable[[str], float] | None = None) -> Tensor:
        """Return the local log-probabilities with the adapter.

        `factor` multiplies the scaling of the layer at a path, for this call; without layers that have a scaling it has
        no effect.
        """
        with nullcontext() if factor is None or not layers else rescale_layers(layers, factor):
            return compute_log_probabilities(model, asked, places)

    scales = list_scales(model, layers)
    if noise <= ANOTHER_BASE * floor:
        return judge_answers(now, before, own_base, compute, scales, allowed, noise)
    for part in ("all", *sorted({last_name(path) for path in scales})):
        alone = compute({path: float(part in ("all", last_name(path))) for path in scales}.__getitem__)
        if root_mean_square(before - alone) <= floor:
            text = f"The server's base answers with the adapter, too ({part} of it): it mixes up the two names."
            effect, deviation = (root_mean_square(compute() - values) for values in (own_base, now))
            return Verdict(LEAKED, text, floor, effect, noise, {APPLIED: deviation})
    raise BaseModelMismatchError(
        f"The server's base {base_name!r} differs from this base model by {noise:.2g} in log-probabilities, and "
        f"{dtype} explains {floor:.2g}. Give the server's weights, or its dtype (--dtype)."
    )


@contextmanager
def rescale_layers(layers: Mapping[str, Any], factor: Callable[[str], float]) -> Iterator[None]:
    """Multiply the scalings of all adapters of each layer by `factor(path)` within the block.

    Afterwards, also after an error, each layer has its former dict of scalings. Calls of other threads are not waited
    for.
    """
    before = {path: layer.scaling for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            layer.scaling = {name: value * factor(path) for name, value in layer.scaling.items()}
        yield
    finally:
        for path, layer in layers.items():
            layer.scaling = before[path]


def check_verify_options(dtype: str, tolerance: float | None) -> None:
    """Raise OptionError if `dtype` is neither "float32", "float16" nor "bfloat16", or `tolerance` is negative, infinite
    or NaN.

    None is allowed.
    """
    if dtype not in TOLERANCES:
        raise OptionError(f"dtype={dtype!r} is unknown. Give the server's: one of {', '.join(TOLERANCES)}.")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise OptionError(f"tolerance={tolerance} is not possible. Give a number of 0 or more.")


def judge_answers(
    now: Tensor, before: Tensor, own_base: Tensor, compute: Callable[..., Tensor],
    scales: dict[str, Scale], tolerance: float, noise: float,
) -> Verdict:  # fmt: skip
    """Return the verdict that explains the server's log-probabilities: the first explanation that they are within
    `tolerance` of, as a root mean square.

    The order is "too small to tell" (the effect is below two tolerances), "applied", "not applied", and one kind of
    module "missing" (lm_head first, others sorted). Then come patterns, use_rslora or alpha_pattern not read; each is
    skipped if it multiplies all scales by one factor. Last come "scale off" by a fitted k, and otherwise "another
    adapter", with the nearest explanation. The verdict has the distances of all that were tested.

    Args:
        now: the server's values with the adapter.
        before: the server's values of its base.
        own_base: graft's values without the adapter.
        compute: returns graft's values with the adapter, with layer scalings multiplied by a function of the path.
        scales: by path of the layer; {} for methods without scalings, which skips the tests of modules and scales.
        noise: is only copied into the verdict.
    """
    right = compute()
    effect = root_mean_square(right - own_base)
    near = {APPLIED: root_mean_square(now - right), NOT_APPLIED: root_mean_square(now - before)}

    def verdict(which: str, text: str, k: float | None = None) -> Verdict:
        """Return a Verdict of this kind, with the common numbers."""
        return Verdict(which, text, tolerance, effect, noise, near, k)

    if effect < 2 * tolerance:
        return verdict(
            UNDECIDED,
            f"The adapter changes log-probabilities by {effect:.2g} only, less than two tolerances. Has it been "
            "trained? A server in float32 is more exact.",
        )
    if near[APPLIED] <= tolerance:
        return verdict(APPLIED, "The server applies the adapter.")
    if near[NOT_APPLIED] <= tolerance:
        return verdict(NOT_APPLIED, "The server answers as its base: it loaded the adapter and does not apply it.")
    for part in sorted({last_name(path) for path in scales}, key=lambda name: (name != "lm_head", name)):
        near[f"{part} {MISSING}"] = root_mean_square(
            now - compute(lambda path, part=part: float(last_name(path) != part))
        )
        if near[f"{part} {MISSING}"] <= tolerance:
            return verdict(MISSING, f"{part} {MISSING}: the server applies all of the adapter but that.")
    for which, attribute, each in (
        (PATTERNS, "plain", "lora_alpha / r for all modules"),
        (ROOTS, "rootless", "each module's alpha / rank"),
        (ALPHAS, "one_alpha", "lora_alpha / rank of each module"),
    ):
        factors = {path: getattr(s, attribute) / s.actual if s.actual else 1.0 for path, s in scales.items()}
        if len({round(f, 6) for f in factors.values()}) > 1:  # an equal factor for all layers is "scale off"
            near[which] = root_mean_square(now - compute(factors.__getitem__))
            if near[which] <= tolerance:
                return verdict(which, f"{which}: the server takes {each} as the scale.")
    if scales:
        k = fit_scale_factor(lambda k: compute(lambda path: k) - now)
        near[f"scale × {k:.4g}"] = root_mean_square(now - compute(lambda path: k))
        if near[f"scale × {k:.4g}"] <= tolerance:
            return verdict(OFF, f"scale off by {k:.4g}{explain_factor(k, scales)}.", k)
    least = min(near, key=near.__getitem__)
    return verdict(
        ANOTHER,
        f"another adapter: the server's answers are {near[least]:.2g} from the nearest of its possible mistakes "
        f"({least}). It has other values, or the server loaded an earlier adapter of this name.",
    )


def explain_factor(k: float, scales: dict[str, Scale]) -> str:
    """Return a reason for a wrong scale by the factor k, as the end of a sentence; "" if neither fits to 1 % on every
    layer.

    Reasons are that the server takes lora_alpha / r (no use_rslora), or 1 (no config).
    """
    if all(math.isclose(k * s.actual, s.plain, rel_tol=1e-2) for s in scales.values()):
        return ": the server takes lora_alpha / r, and does not read use_rslora"
    if all(math.isclose(k * s.actual, 1, rel_tol=1e-2) for s in scales.values()):
        return ": the server takes 1, and does not read the config"
    return ""


def fit_scale_factor(residual: Callable[[float], Tensor]) -> float:
    """Return the k with the least root mean square of `residual(k)`.

    It is the best power of 2 from 2⁻⁶ to 2⁶, then up to 8 Gauss-Newton steps, each kept within k / 2 and 2 k. The first
    step that does not improve it ends the search.
    """
    best = min(GRID, key=lambda k: root_mean_square(residual(k)))
    k, r = best, residual(best)
    for _ in range(8):
        h = 1e-2 * k
        slope = (residual(k + h) - r) / h
        step = float(slope @ r / (slope @ slope).clamp(min=1e-30))
        new = min(max(k - step, k / 2), 2 * k)
        new_residual = residual(new)
        if root_mean_square(new_residual) >= root_mean_square(r):
            break
        k, r = new, new_residual
    return k


# graft's own


@torch.no_grad()
def compute_log_probabilities(
    model: nn.Module, asked: Sequence[Sequence[int]], places: Sequence[tuple[int, int, int]]
) -> Tensor:
    """Run the model on the prompts, and return its log-probabilities at (prompt, position, token), in float64 on the
    CPU, without gradients. They are read from the logits at position - 1; the ids go to the device of the first
    parameter.
    """
    ids = torch.tensor(asked, device=next(model.parameters()).device)
    logits = model(input_ids=ids).logits.double().log_softmax(-1).cpu()
    which, position, token = torch.tensor(places, device="cpu").T
    return logits[which, position - 1, token]


def list_scales(model: nn.Module, layers: Json) -> dict[str, Scale]:
    """Return the scales of each layer by path, for the first adapter of the layer.

    They are its scaling, lora_alpha / r of the config, lora_alpha / the layer's rank, and the layer's alpha / rank. If
    the config lacks r or lora_alpha, all four are the layer's scaling.
    """
    scales = {}
    for path, layer in layers.items():
        (name, scaling), *_ = layer.scaling.items()
        cfg = model.peft_config[name]
        layer_config = layer.methods[name].cfg
        rates: tuple[float, ...] = (scaling,) * 3
        if hasattr(cfg, "lora_alpha") and hasattr(cfg, "r"):
            alpha, r = cfg.lora_alpha, layer_config.r
            rates = alpha / cfg.r, alpha / r, layer_config.lora_alpha / r
        scales[path] = Scale(float(scaling), *map(float, rates))
    return scales


# figures


def list_common_places(
    a: list[LogProbabilities], b: list[LogProbabilities], vocabulary: int
) -> list[tuple[int, int, int]]:
    """Return the (prompt, position, token) with a log-probability in both answers, in the order of the prompts and
    sorted within a prompt.

    Raises BaseModelMismatchError if there are none, or a token is outside the vocabulary, that is below 0 or from
    `vocabulary` on.
    """
    places = [
        (n, *place) for n, (first, second) in enumerate(zip(a, b)) for place in sorted(first.keys() & second.keys())
    ]
    if not places:
        raise BaseModelMismatchError(
            "The server gives no token's log-probability for both models. Check the two names."
        )
    if strange := [token for *_, token in places if not 0 <= token < vocabulary]:
        raise BaseModelMismatchError(
            f"The server has a token {strange[0]}, the base model {vocabulary}. Give its base."
        )
    return places


def stack_values(seen: list[LogProbabilities], places: Sequence[tuple[int, int, int]]) -> Tensor:
    """Return the log-probabilities at these places as a float64 tensor on the CPU."""
    return torch.tensor([seen[n][position, token] for n, position, token in places], dtype=torch.float64, device="cpu")


def root_mean_square(t: Tensor) -> float:
    """Return the root mean square of a tensor's values."""
    return float(t.square().mean().sqrt())
