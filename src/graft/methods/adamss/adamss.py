# SPDX-License-Identifier: Apache-2.0
"""AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning, openreview.net/forum?id=8ZdWmpYxT0."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from graft.config.targets import ADAMSS
from graft.core.containers import Transient
from graft.core.effect import Factors, Product
from graft.core.errors import UnsupportedLayerError
from graft.core.merging import unmerged_bias
from graft.core.method import Method, Tensors
from graft.methods.adamss.allocator import PARTS, update_and_allocate
from graft.methods.adamss.clusters import clusters
from graft.methods.adamss.config import AdamssConfig

ROWS = ("adamss_clusters", "")


class Shifted(NamedTuple):
    """A factor with a bias."""

    call: Callable[[Tensor], Tensor]  # the product, with the bias
    weight: Tensor  # (out, r)
    bias: Tensor  # (out,)

    def __call__(self, z: Tensor) -> Tensor:
        return self.call(z)


class AdaMSS(Method):
    """Rows of Δ[W | b] in cluster j: B_j A_j N, with the right singular vectors N of [W | b], which stay."""

    config = AdamssConfig
    prefix = "adamss_"
    targets = ADAMSS
    tuner_methods: ClassVar[dict[str, Any]] = {"update_and_allocate": update_and_allocate}

    adamss_A: nn.ParameterList  # (rank, R) of each cluster
    adamss_B: nn.ParameterList  # (rows, rank) of each cluster
    adamss_newB: Tensor  # N (R, in), or (R, in + 1) if the layer has a bias
    adamss_clusters: Tensor  # (out,) the cluster of each row; PEFT's files lack it
    adamss_places: Tensor  # (out,) the place of each row when they stand cluster by cluster

    def build(self, shared: dict[str, Any], device: torch.device | None = None) -> dict[str, Any]:
        if self.layer is None:  # nobody has the weight at hand
            with device or nullcontext():
                return self.at_most()
        if device is not None:
            return self.emptied(shared, device)
        if self.site.on_meta:
            raise UnsupportedLayerError(
                f"AdaMSS finds clusters in the weight of layer '{self.site.key}', which is on the meta device: adapt "
                "the model when it has its values."
            )
        bias = unmerged_bias(self.layer)
        found = clusters(self.layer.W0.flatten(1), bias, self.cfg)
        return dict(
            adamss_newB=found.space,
            adamss_A=nn.ParameterList([nn.Parameter(A) for A in found.downs]),
            adamss_B=nn.ParameterList([nn.Parameter(B) for B in found.ups]),
            adamss_clusters=found.rows,
            adamss_places=Transient(places(found.rows)),
        )

    def emptied(self, shared: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """Return tensors of the shapes that the weight gives, without values."""
        with torch.random.fork_rng(devices=[]):
            values = self.build(shared)
        self.rows = values["adamss_clusters"]  # for files that do not say
        values["adamss_places"] = Transient(values["adamss_places"].tensor.to(device))
        return {name: v if isinstance(v, Transient) else v.to(device) for name, v in values.items()}

    def at_most(self) -> dict[str, Any]:
        """Return tensors as large as those of any weight of this shape, and as many as those of most."""
        cfg, out = self.cfg, self.site.out_features
        columns = self.site.fan_in + (getattr(self.site.module, "bias", None) is not None)
        R, count = min(cfg.r, out, columns), min(cfg.num_subspaces, out)
        return dict(
            adamss_newB=torch.empty(R, columns),
            adamss_A=nn.Parameter(torch.empty(count * cfg.subspace_rank, R)),
            adamss_B=nn.Parameter(torch.empty(out, cfg.subspace_rank)),
        )

    def inits_from_weight(self) -> bool:
        return True

    def inits_before_load(self) -> bool:
        return False

    def loaded(self) -> None:
        self.__dict__.pop("rows", None)
        self.adamss_places.copy_(places(self.adamss_clusters))

    def factors(self) -> Factors:
        n, op, base = self.site.fan_in, self.site.op, self.layer.base_layer
        inner = torch.cat([*self.adamss_A])  # (Σ ranks, R)
        down = inner @ self.adamss_newB  # (Σ ranks, in), or with a column for the bias
        up = torch.block_diag(*self.adamss_B).index_select(0, self.adamss_places)  # (out, Σ ranks)
        A: Any = down[:, :n]
        if self.site.takes_vectors:  # two products, of which the backward pass keeps R numbers per row instead of x
            A = Product(lambda x: linear(linear(x.to(self.dtype), self.adamss_newB[:, :n]), inner), A)
        if down.shape[1] == n:
            return Factors(A, up)
        shift = up @ down[:, n]
        return Factors(A, Shifted(lambda z: op.up(base, z, up) + op.channels(shift), up, shift))

    def restored(self, stored: Tensors, cfg: AdamssConfig) -> Tensors:
        """Take the clusters of the file and their sizes, as another device may find others; PEFT's files lack them."""
        here = self.adamss_clusters
        if ROWS not in stored:
            return {**stored, ROWS: self.rows if here.is_meta else here}
        shapes = {(part, j): p.shape for part in PARTS for j, p in getattr(self, part).named_parameters()}
        given = {place: stored[place].shape for place in shapes.keys() & stored.keys()}
        if here.is_meta and given.keys() == shapes.keys() and fit(stored[ROWS], given, here.shape, self.adamss_newB):
            for (part, j), shape in given.items():
                held = getattr(self, part)._parameters
                held[j] = nn.Parameter(held[j].new_empty(shape))
        return stored


def fit(rows: Tensor, shapes: dict[tuple[str, str], torch.Size], like: torch.Size, space: Tensor) -> bool:
    """Return True if A and B of these shapes, by (container, cluster), are for clusters with these rows."""
    count = len(shapes) // 2
    if rows.shape != like or rows.is_floating_point() or not ((rows >= 0) & (rows < count)).all():
        return False
    sizes = torch.bincount(rows, minlength=count).tolist()
    pairs = [(shapes[PARTS[0], str(j)], shapes[PARTS[1], str(j)]) for j in range(count)]
    return all((n, A[0]) == B and A[1:] == space.shape[:1] for (A, B), n in zip(pairs, sizes))


def places(rows: Tensor) -> Tensor:
    """Return where each row stands when they are sorted by cluster, in their order within it."""
    return rows.argsort(stable=True).argsort()
