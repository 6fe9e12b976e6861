# SPDX-License-Identifier: Apache-2.0
"""Initialisations that begin with the base weight and take their part out of it: which there are, and the rest.

PiSSA (arXiv 2404.02948) begins with its largest singular vectors, OLoRA (2406.01775) with a QR decomposition, CorDA
(2406.05223) with those that the inputs weigh, LoRA-GA (2407.05000) with those of a gradient. LoftQ has its own file.

Each start is a function of an adapter and W, which returns initial values and the product to subtract. Starts measured
on data with a running model are in `train/`.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graft.core.errors import CalibrationError, ConfigError, shorten_text
from graft.core.method import Method
from graft.methods.lora.sub_configs import TITLES

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STARTS = {  # init → "module:function" in this folder, called with the adapter and W (out, in) in float32
    "pissa": "start:pissa",
    "olora": "start:olora",
    "corda": "start:corda",
    "lora_ga": "start:loraga",
    "loftq": "loftq:start",
}
# init → `Method.base_mark`, as in PEFT
BASE_MARKS: dict[object, str] = {"corda": "eigens", "lora_ga": "_peft_loraga_grad"}


class Start(NamedTuple):
    """First values of A and B, and the product taken_B taken_A that is subtracted from the base weight for them; all
    float32.
    """

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    taken_A: Tensor  # (k, in)
    taken_B: Tensor  # (out, k)

    @classmethod
    def of(cls, A: Tensor, B: Tensor, scaling: float) -> Start:
        """Return the start with A and B that subtracts scaling · B A from W, so that the layer's outputs stay
        the same.
        """
        return cls(A, B, A, scaling * B)


def start_name(how: object) -> str | None:
    """Return the key of STARTS for `init_lora_weights`: "pissa" for each text that begins so, else an equal key; None
    for all other values.
    """
    if not isinstance(how, str):
        return None
    return "pissa" if how.startswith("pissa") else how if how in STARTS else None


@torch.no_grad()
def start_of(lora: Method, W: Tensor) -> Start:
    """Return the `Start` of an adapter on W (out, in): import the function in STARTS and call it with W in float32.

    No gradients.

    Raises:
        TypeError: W is of another dtype than float32, float16 and bfloat16.
        ConfigError: the rank (for LoRA-GA twice the rank) is larger than the weight's smaller side, or lora_alpha is
            not positive (`check_rank`).
        CalibrationError: the initialisation needs data, and this layer has none.
    """
    kind: Any = start_name(lora.cfg.init_lora_weights)
    if W.dtype not in FLOATS:
        raise TypeError(
            f"Please initialize {TITLES[kind]} under float32, float16, or bfloat16 (layer '{lora.site.key}' is "
            f"{W.dtype}). A quantized base can be quantized again afterwards."
        )
    check_rank(lora, 2 if kind == "lora_ga" else 1)
    module, name = STARTS[kind].split(":")
    return getattr(import_module(f"graft.methods.lora.{module}"), name)(lora, W.detach().float())


def check_rank(lora: Method, times: int) -> None:
    """Raise ConfigError if the scaling is not positive, or `times` · r is above the smaller side of the weight."""
    cfg, most = lora.cfg, min(lora.site.shape) // times
    if lora.scaling <= 0 or cfg.r > most:
        raise ConfigError(
            f"init_lora_weights={cfg.init_lora_weights!r} needs a positive lora_alpha and a rank that the weight of "
            f"'{lora.site.key}' can have, at most {most}: r={cfg.r}, lora_alpha={cfg.lora_alpha}."
        )


def pissa(lora: Method, W: Tensor) -> Start:
    """Return the start of PiSSA: A = √(S/s) Vᵀ and B = U √(S/s) of the r largest singular triples of W; s · B A is
    subtracted.

    "pissa" takes an exact SVD, "pissa_niter_N" a randomized one with N iterations.

    Raises:
        ConfigError: N has more than three digits, or the text has another form.
    """
    how, r, s = lora.cfg.init_lora_weights, lora.cfg.r, lora.scaling
    if how == "pissa":
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, Vh = U[:, :r], S[:r], Vh[:r]
    elif match := re.fullmatch(r"pissa_niter_(\d+)", how):
        if len(match[1]) > 3:
            raise ConfigError(f"init_lora_weights='{shorten_text(how)}' asks for too many iterations: 999 is the most.")
        U, S, V = torch.svd_lowrank(W, r, niter=int(match[1]))
        Vh = V.T
    else:
        raise ConfigError(
            f"init_lora_weights should be 'pissa' or 'pissa_niter_[number of iters]', got '{how}' instead."
        )
    root = (S / s).sqrt()
    return Start.of(root[:, None] * Vh, U * root, s)


def olora(lora: Method, W: Tensor) -> Start:
    """Return the start of OLoRA: A is the first r rows of R, B the first r columns of Q, with W = Q R; s · B A is
    subtracted.
    """
    Q, R = torch.linalg.qr(W)
    return Start.of(R[: lora.cfg.r], Q[:, : lora.cfg.r], lora.scaling)


def corda(lora: Method, W: Tensor) -> Start:
    """Return the start of CorDA: A = √(S/s) Vᵀ and B = U √(S/s), from the triples in the base layer's attribute
    `eigens`, cast to W's dtype and device. It removes the attribute.

    Raises:
        CalibrationError: `preprocess_corda` has left no triples; their shapes do not fit W and r; a value is not
            finite.
    """
    site, r, s = lora.site, lora.cfg.r, lora.scaling
    eigens = lora.take_from_base(
        f"`eigens` attribute not found for layer '{site.key}', please run `preprocess_corda` first, with this model "
        f"and config (adapter '{lora.name}').",
    )
    S, U, V = (t.to(W) for t in (eigens.S_WC, eigens.U_WC, eigens.V_WC))
    wanted = {"S": (r,), "U": (len(W), r), "V": (W.shape[1], r)}
    for name, t in dict(S=S, U=U, V=V).items():
        if t.shape != wanted[name]:
            raise CalibrationError(
                f"Matrix {name} size mismatch: {tuple(t.shape)} vs. {wanted[name]} on layer '{site.key}'. "
                "`preprocess_corda` and `get_peft_model` need the same model and rank; so does a cache file."
            )
        if not t.isfinite().all():
            raise CalibrationError(f"Invalid value found in matrix {name} for layer '{site.key}'. Pass other data.")
    root = (S / s).sqrt()
    return Start.of(root[:, None] * V.T, U * root, s)


def loraga(lora: Method, W: Tensor) -> Start:
    """Return the start of LoRA-GA from a randomized SVD (rank 4r at most) of the gradient G in the base layer's
    `_peft_loraga_grad`. It removes that attribute; s · B A is subtracted.

    A is vectors V of G, B vectors U times their singular values; `directions` picks r of the first 2r for each.
    `scale`: "stable" multiplies B by out^¼ / √stable_gamma, "weight_svd" by σ₁(W) / its first singular value (if above
    0), "gd_scale" divides both by s, "unit" does nothing. Values are rounded to the weight's dtype.

    Raises:
        CalibrationError: there is no gradient, or it has another shape than W.
    """
    site, r, s, cfg = lora.site, lora.cfg.r, lora.scaling, lora.cfg.lora_ga_config
    G = lora.take_from_base(
        f"There is no gradient for layer '{site.key}' (adapter '{lora.name}'). Call preprocess_loraga with this model "
        "and config before.",
    )
    G = site.op.canon(G).to(W)
    if G.shape != W.shape:
        raise CalibrationError(
            f"The gradient for layer '{site.key}' is {tuple(G.shape)}, and the weight {tuple(W.shape)}: it was "
            "estimated with another model. Call preprocess_loraga with this one."
        )
    U, S, V = torch.svd_lowrank(G, q=min(4 * r, *G.shape), niter=4)
    for_A, for_B = directions(cfg.direction, r)
    A, B = V.T[for_A], U[:, for_B] * S[for_B]
    if cfg.scale == "stable":
        B = B * (len(W) ** 0.25 / cfg.stable_gamma**0.5)
    elif cfg.scale == "weight_svd":
        largest = torch.svd_lowrank(W, q=r, niter=4)[1][0]
        first = S[for_B][0]
        B = B * (largest / first) if first > 0 else B
    elif cfg.scale == "gd_scale":
        A, B = A / s, B / s
    dtype = lora.layer.W0.dtype
    return Start.of(A.to(dtype).float(), B.to(dtype).float(), s)  # rounded as the adapter will be


def directions(how: str, r: int) -> tuple[Tensor, Tensor]:
    """Return two index tensors (r,) into 2r singular vectors: for A and for B. Another name raises KeyError.

    "ArBr": odd ones and even ones. "A2rBr": last r and first r. "ArB2r": first r and last r. "random": the same r
    random ones for both.
    """
    both = torch.arange(2 * r)
    if how == "random":
        chosen = torch.randperm(2 * r)[:r]
        return chosen, chosen
    return {"ArBr": (both[1::2], both[0::2]), "A2rBr": (both[r:], both[:r]), "ArB2r": (both[:r], both[r:])}[how]
