# SPDX-License-Identifier: Apache-2.0
"""Clusters of the rows of a weight, by their coordinates in the space of its singular vectors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from graft.core.random import seeded

KMEANS: dict[str, Any] = dict(init="random", n_init=1, max_iter=10, random_state=123456789)  # PEFT's


class Clusters(NamedTuple):
    """The start of an adapter on one layer."""

    space: Tensor  # (R, in), or (R, in + 1) with a bias: right singular vectors
    rows: Tensor  # (out,) the cluster of each row
    downs: list[Tensor]  # A of each cluster, (rank, R)
    ups: list[Tensor]  # B of each cluster, (its rows, rank)


def require_sklearn() -> Any:
    try:
        from sklearn.cluster import KMeans
    except ImportError as e:
        raise ImportError(
            "AdaMSS needs scikit-learn, by whose k-means it puts rows into clusters: pip install graft[methods]"
        ) from e
    return KMeans


def clusters(W: Tensor, bias: Tensor | None, cfg: Any) -> Clusters:
    """Find the clusters of W (out, in) with its bias (out,)."""
    dtype, W = W.dtype, W.detach().float()
    if bias is not None:
        W = torch.cat((W, bias.detach().float()[:, None]), 1)
    R = min(cfg.r, *W.shape)
    with seeded(cfg.random_seed):
        U, _, V = torch.svd_lowrank(W, q=R, niter=2)
    count = min(cfg.num_subspaces, len(W))
    found = require_sklearn()(n_clusters=count, **KMEANS).fit(U.cpu().numpy()).labels_
    rows = torch.from_numpy(found).long().to(W.device)
    downs, ups = [], []
    for j in range(count):
        own = U[rows == j]
        downs.append(start(own, cfg))
        shape = len(own), len(downs[-1])
        ups.append(torch.zeros(shape) if cfg.init_weights else torch.randn(shape).to(dtype) * 0.01)
    return Clusters(V.T.contiguous(), rows, downs, ups)


def start(U: Tensor, cfg: Any) -> Tensor:
    """Return A (rank, R) of a cluster with the coordinates U (n, R)."""
    gram, rank = U @ U.T, min(len(U), cfg.subspace_rank)
    if cfg.use_dynamic_rank:
        S = torch.svd_lowrank(gram, q=len(U), niter=2)[1]
        large = S.gt(S[0] * cfg.svd_threshold)
        rank = max(1, min(rank, int(large.sum())))
    left = torch.svd_lowrank(gram, q=rank, niter=2)[0]
    Q: Tensor = torch.linalg.qr(U.T @ left).Q
    return Q.T.contiguous()
