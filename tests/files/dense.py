# SPDX-License-Identifier: Apache-2.0
"""What an adapter in the neutral form does to each weight, by the formulas of the methods' papers, in float64."""

from __future__ import annotations

import numpy as np

from graft.files.neutral import AdapterFile, LowRank


def changes(adapter: AdapterFile, base) -> dict[str, np.ndarray]:
    """Return W' − W of each module, (out, in, *kernel); `base` has the weights that some methods need."""
    out = {}
    for path, held in adapter.modules.items():
        if isinstance(held, LowRank):
            d = product(held)
            if held.magnitude is not None:
                W = weight(base, path)
                V = W + d
                norm = np.sqrt((V.reshape(len(V), -1) ** 2).sum(1))
                m = held.magnitude.read().astype("f8")
                d = V * (m / norm).reshape(-1, *[1] * (V.ndim - 1)) - W
            out[path] = d
        else:
            out[path] = other(
                held.method, {k: v.read().astype("f8") for k, v in held.tensors.items()}, held.scale, base, path
            )
    for name, values in adapter.full.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight":
            out[path] = values.read().astype("f8") - weight(base, path)
    return out


def weight(base, path):
    return base.tensors[f"{path}.weight"].read().astype("f8")


def product(m: LowRank) -> np.ndarray:
    A, B = m.A.read().astype("f8"), m.B.read().astype("f8")
    if m.kind == "embedding":
        return m.scale * (B @ A).T
    B = B.reshape(B.shape[0], B.shape[1])
    if m.mid is not None:
        A = np.einsum("rs...,si->ri...", m.mid.read().astype("f8"), A.reshape(A.shape[0], A.shape[1]))
    return m.scale * np.einsum("or,r...->o...", B, A)


def other(method, t, scale, base, path):
    W = weight(base, path)
    if method == "LOHA":
        if "hada_t1" in t:
            one, two = (
                np.einsum("rskl,sd,rp->pdkl", t[f"hada_t{i}"], t[f"hada_w{i}_b"], t[f"hada_w{i}_a"]) for i in (1, 2)
            )
        else:
            one, two = t["hada_w1_a"] @ t["hada_w1_b"], t["hada_w2_a"] @ t["hada_w2_b"]
        return scale * (one * two).reshape(W.shape)
    if method == "LOKR":
        one = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        two = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"].reshape(len(t["lokr_w2_b"]), -1)
        return scale * np.kron(one.reshape(*one.shape, *[1] * (two.ndim - 2)), two).reshape(W.shape)
    if method == "IA3":
        return W * (t["ia3_l"].reshape(t["ia3_l"].shape[0], -1) - 1)
    if method == "LyCORIS full":
        return t["diff"]
    raise AssertionError(method)
