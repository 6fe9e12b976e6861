# SPDX-License-Identifier: Apache-2.0
"""AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning, openreview.net/forum?id=8ZdWmpYxT0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from graft.config.bounds import must_be
from graft.config.fields import ADAMSS, COUNT, POSITIVE, LayerRange, Targets
from graft.core.containers import Transient
from graft.core.effect import Factors, Product
from graft.core.errors import ConfigError, UnsupportedLayerError
from graft.core.merging import find_unmerged_bias
from graft.core.method import COMPARISON, Method, PublishedRate, Tensors, Tuner, WeightUse
from graft.core.random import draw_from_seed
from graft.methods.adalora.allocator import Importance

SCHEDULE = (
    *("asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval"),
    *("asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent"),
)


@dataclass(kw_only=True)
class AdamssConfig(Targets, LayerRange):
    """AdaMSS: rows of the weight in clusters, and a small product in the space of singular vectors for each cluster.

    With `use_asa` call `model.base_model.update_and_allocate(step)` after each backward pass, before gradients are
    zeroed; or use `AdamssAsaCallback` (transformers' Trainer). Needs scikit-learn:
    `pip install scikit-learn`.
    """

    peft_type: str = "ADAMSS"
    r: Annotated[int, COUNT] = 100  # how many singular vectors span the space
    num_subspaces: Annotated[int, COUNT] = 5  # clusters of rows of each layer
    subspace_rank: Annotated[int, COUNT] = 1  # of the product of a cluster
    init_weights: Literal["orthogonal"] | bool | None = "orthogonal"  # None or False: B begins random, not 0
    use_asa: bool = False  # let fewer and fewer subspaces train
    asa_target_subspaces: int = 50  # how many do in the end, of all layers together
    init_warmup: int = 50  # steps before the number falls
    final_warmup: int = 1000  # the step at which it has reached the target
    mask_interval: int = 100  # steps between two choices
    asa_importance_beta: float = 0.85  # smoothing of the sensitivity
    asa_uncertainty_beta: float = 0.85  # smoothing of its uncertainty
    asa_schedule_exponent: float = 3.0  # the higher, the sooner the number falls
    use_dynamic_rank: bool = False  # a cluster has a rank for each singular value that is large enough
    svd_threshold: float = 0.1  # how large, compared with the largest
    random_seed: int = 0  # of the randomized SVD

    counters = ("random_seed", "init_warmup", "final_warmup", "mask_interval")

    def __post_init__(self) -> None:
        """Validate the fields.

        Without `use_asa`, null fields of the schedule become their defaults; `init_weights=False` becomes None.

        Raises:
            ConfigError: `init_weights` is neither "orthogonal" nor None; with `use_asa`, an interval, target or
                exponent that is not positive, or `init_warmup` ≥ `final_warmup`.
        """
        for name in SCHEDULE if not self.use_asa else ():  # nobody looks at these: files have null there
            if getattr(self, name) is None:
                setattr(self, name, type(self).__dataclass_fields__[name].default)
        super().__post_init__()
        if self.init_weights is False:
            self.init_weights = None
        if self.init_weights not in ("orthogonal", None):
            raise ConfigError(f"`init_weights` must be 'orthogonal' or None, got {self.init_weights!r}")
        if not self.use_asa:
            return
        for name in ("mask_interval", "asa_target_subspaces", "asa_schedule_exponent"):
            kind = "number" if name == "asa_schedule_exponent" else "integer"
            must_be(f"a positive {kind} when `use_asa=True`", POSITIVE.allows).check(name, getattr(self, name))
        if self.init_warmup >= self.final_warmup:
            raise ConfigError(
                f"`init_warmup` ({self.init_warmup}) must be less than `final_warmup` ({self.final_warmup}) when "
                "`use_asa` is set"
            )


KMEANS: dict[str, object] = dict(init="random", n_init=1, max_iter=10, random_state=123456789)  # PEFT's


def find_clusters(
    W: Tensor, bias: Tensor | None, cfg: AdamssConfig
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Return the start of an adapter on W (out, in) and its bias (out,), which becomes a last column: the right
    singular vectors N (R, in), the cluster of each row (out,), A (rank, R) and B (its rows, rank) of each cluster.

    A randomized SVD of rank R = min(r, sizes), seeded with `random_seed`, gives the space. K-means with a fixed seed,
    one random start and 10 iterations puts the rows of U into `num_subspaces` clusters, at most out. A of a cluster is
    `make_cluster_A`, B zeros, or normal with std 0.01 if `init_weights` is None. The seeded SVD leaves torch's
    generator as it was; A and a random B draw from it. N and A are float32; a random B has W's dtype.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as e:
        raise ImportError("AdaMSS needs k-means to find clusters of rows: pip install scikit-learn") from e
    dtype, W = W.dtype, W.detach().float()
    if bias is not None:
        W = torch.cat((W, bias.detach().float()[:, None]), 1)
    R = min(cfg.r, *W.shape)
    with draw_from_seed(cfg.random_seed):
        U, _, V = torch.svd_lowrank(W, q=R, niter=2)
    count = min(cfg.num_subspaces, len(W))
    labels = KMeans(n_clusters=count, **KMEANS).fit(U.cpu().numpy()).labels_
    rows = torch.from_numpy(labels).long().to(W.device)
    downs, ups = [], []
    for j in range(count):
        coordinates = U[rows == j]
        downs.append(make_cluster_A(coordinates, cfg))
        shape = len(coordinates), len(downs[-1])
        ups.append(torch.zeros(shape) if cfg.init_weights else torch.randn(shape).to(dtype) * 0.01)
    return V.T.contiguous(), rows, downs, ups


def make_cluster_A(U: Tensor, cfg: AdamssConfig) -> Tensor:
    """Return A (rank, R) of a cluster with the coordinates U (n, R): orthonormal rows, by QR of Uᵀ times the first
    `rank` singular vectors of U Uᵀ.

    rank = min(n, `subspace_rank`); with `use_dynamic_rank` at most the number of singular values of U Uᵀ above
    `svd_threshold` times the largest, at least 1. The randomized SVD draws from torch's generator.
    """
    gram, rank = U @ U.T, min(len(U), cfg.subspace_rank)
    if cfg.use_dynamic_rank:
        S = torch.svd_lowrank(gram, q=len(U), niter=2)[1]
        large = S.gt(S[0] * cfg.svd_threshold)
        rank = max(1, min(rank, int(large.sum())))
    left = torch.svd_lowrank(gram, q=rank, niter=2)[0]
    return torch.linalg.qr(U.T @ left).Q.T.contiguous()


PARTS = ("adamss_A", "adamss_B")


class Allocator(Importance):
    """The state of the allocation between two steps: the sensitivity of each parameter since the last choice."""

    to_new_mean = False

    @torch.no_grad()
    def of(self, methods: Mapping[str, object], spaces: list[tuple[str, int]]) -> list[float]:
        """Return the score of each subspace (layer, cluster): the sum of the mean scores of its A and B.

        The host waits once.
        """
        keys = ((key, part, j) for key, j in spaces for part in PARTS)
        means = [self.score(f"{key}.{part}.{j}", getattr(methods[key], part)[j]).mean() for key, part, j in keys]
        device = means[0].device
        scores = torch.stack([mean.to(device) for mean in means]).view(-1, len(PARTS)).tolist()
        return [sum(parts) for parts in scores]


def count_trained_subspaces(step: int, total: int, cfg: AdamssConfig) -> int:
    """Return the number of subspaces, of `total`, that train after a step.

    It falls from all at `init_warmup` to `asa_target_subspaces` at `final_warmup`: target + (total - target) · (share
    of the warm-up left) ^ `asa_schedule_exponent`, rounded down. The target is at most `total`. The step is not
    clamped: it must lie within the warm-up.
    """
    left = 1 - (step - cfg.init_warmup) / (cfg.final_warmup - cfg.init_warmup)
    target = min(cfg.asa_target_subspaces, total)
    return int(target + (total - target) * left**cfg.asa_schedule_exponent)


def update_and_allocate(tuner: Tuner, global_step: int) -> None:
    """Measure importance, and choose which subspaces train, for all active AdaMSS adapters.

    Call after backward(), before gradients are zeroed.

    Does nothing for adapters without `use_asa` or in inference mode, and outside of the warm-up. Without such adapters
    it is no error.

    Args:
        global_step: number of the step.

    Raises:
        ValueError: an adapter has no gradients.
    """
    for name in tuner.active_adapters:
        cfg = tuner.peft_config[name]
        if isinstance(cfg, AdamssConfig) and cfg.use_asa and not cfg.inference_mode:
            allocate(tuner, name, cfg, global_step)


def allocate(tuner: Tuner, name: str, cfg: AdamssConfig, step: int) -> None:
    """Measure importance for adapter `name` at a step; do nothing without layers, or outside of `init_warmup` to
    `final_warmup`, both included.

    Updates the `Allocator` in `tuner.states`, made if there is none, from all gradients. At each multiple of
    `mask_interval` also chooses the subspaces that train (`choose`), and stores a new Allocator.

    Raises:
        ValueError: no parameter has a gradient. It is raised before an Allocator is made.
    """
    if not cfg.init_warmup <= step <= cfg.final_warmup:
        return
    methods = {key: layer.methods[name] for key, layer in tuner.layers.items() if name in layer.methods}
    parameters = [
        (f"{key}.{part}.{j}", p) for key, m in methods.items() for part in PARTS for j, p in enumerate(getattr(m, part))
    ]
    if not parameters:
        return
    if all(p.grad is None for _, p in parameters):
        raise ValueError(
            f"update_and_allocate({step}): AdaMSS adapter '{name}' has no gradients to measure the importance of its "
            "subspaces. Call it after backward() and optimizer.step(), before zero_grad()."
        )
    state = tuner.states.setdefault(name, Allocator(cfg.asa_importance_beta, cfg.asa_uncertainty_beta))
    for path, p in parameters:
        state.update(path, p)
    if step % cfg.mask_interval == 0:
        choose(methods, state, step, cfg)
        tuner.states[name] = Allocator(cfg.asa_importance_beta, cfg.asa_uncertainty_beta)


def choose(methods: dict[str, Method], state: Allocator, step: int, cfg: AdamssConfig) -> None:
    """Let the most important subspaces train, `count_trained_subspaces` of them; among equal scores those that train
    now come first.

    Sets `requires_grad` of each A and B, and whether their slot may train. Parameters that stop lose their gradient.
    """
    spaces = [(key, j) for key, m in methods.items() for j in range(len(m.adamss_A))]
    scores = zip(spaces, state.of(methods, spaces))
    rank = {(key, j): (score, methods[key].adamss_A[j].requires_grad) for (key, j), score in scores}
    count = count_trained_subspaces(step, len(spaces), cfg)
    best = set(sorted(spaces, key=lambda space: rank[space], reverse=True)[:count])
    for key, m in methods.items():
        for slot in m.layer.slots(m.name):
            if slot.container in PARTS:  # `set_adapter` lets those train that may
                slot.trains = (key, int(slot.path)) in best
                slot.tensor.requires_grad = slot.trains
                slot.tensor.grad = slot.tensor.grad if slot.trains else None


ROWS = ("adamss_clusters", "")


class Shifted(NamedTuple):
    """A factor with a bias."""

    call: Callable[[Tensor], Tensor]  # the product, with the bias
    weight: Tensor  # (out, r)
    bias: Tensor  # (out,)

    def __call__(self, z: Tensor) -> Tensor:
        """Return the product with z, with the bias."""
        return self.call(z)


class AdaMSS(Method[AdamssConfig]):
    """AdaMSS, openreview 8ZdWmpYxT0: rows of Δ[W | b] in cluster j are B_j A_j N, with the frozen right singular
    vectors N of [W | b].
    """

    prefix = "adamss_"
    weight_use = WeightUse.STARTS
    published_lr = PublishedRate(1e-4, 1e-4, COMPARISON)
    targets = ADAMSS
    facts = ()
    tuner_methods = {"update_and_allocate": update_and_allocate}

    adamss_A: nn.ParameterList  # (rank, R) of each cluster
    adamss_B: nn.ParameterList  # (rows, rank) of each cluster
    adamss_newB: Tensor  # N (R, in), or (R, in + 1) if the layer has a bias
    adamss_clusters: Tensor  # (out,) the cluster of each row; PEFT's files lack it
    adamss_places: Tensor  # (out,) the place of each row when they stand cluster by cluster

    def build(self, shared: dict[str, object], device: torch.device | None = None) -> dict[str, Any]:
        """Return `adamss_newB` (N), lists `adamss_A` and `adamss_B` (a parameter for each cluster), `adamss_clusters`
        and `adamss_places`, from `find_clusters` of W₀ and b₀.

        Without a layer: `build_largest`. With a `device` (values come later): `build_empty`.

        Raises:
            UnsupportedLayerError: the weight is on the meta device.
        """
        if self.layer is None:  # nobody has the weight at hand
            with device or nullcontext():
                return self.build_largest()
        if device is not None:
            return self.build_empty(shared, device)
        if self.site.on_meta:
            raise UnsupportedLayerError(
                f"AdaMSS finds clusters in the weight of layer '{self.site.key}', which is on the meta device. Adapt "
                "the model when it has its values."
            )
        bias = find_unmerged_bias(self.layer)
        space, rows, downs, ups = find_clusters(self.layer.W0.flatten(1), bias, self.cfg)
        return dict(
            adamss_newB=space,
            adamss_A=nn.ParameterList([nn.Parameter(A) for A in downs]),
            adamss_B=nn.ParameterList([nn.Parameter(B) for B in ups]),
            adamss_clusters=rows,
            adamss_places=Transient(find_cluster_order(rows)),
        )

    def build_empty(self, shared: dict[str, object], device: torch.device) -> dict[str, Any]:
        """Call `build` and return its tensors on `device`; on the meta device they have no values.

        Keeps `adamss_clusters` in `self.rows`, for files that lack them. Torch's CPU generator stays as it was.
        """
        with torch.random.fork_rng(devices=[]):
            values = self.build(shared)
        self.rows = values["adamss_clusters"]  # for files that do not say
        values["adamss_places"] = Transient(values["adamss_places"].tensor.to(device))
        return {name: v if isinstance(v, Transient) else v.to(device) for name, v in values.items()}

    def build_largest(self) -> dict[str, object]:
        """Return empty tensors of the largest sizes that `build` can give for this shape of weight: `adamss_newB` (R,
        columns), and one `adamss_A` and one `adamss_B` for all clusters.
        """
        cfg, out = self.cfg, self.site.out_features
        columns = self.site.fan_in + (getattr(self.site.module, "bias", None) is not None)
        R, count = min(cfg.r, out, columns), min(cfg.num_subspaces, out)
        return dict(
            adamss_newB=torch.empty(R, columns),
            adamss_A=nn.Parameter(torch.empty(count * cfg.subspace_rank, R)),
            adamss_B=nn.Parameter(torch.empty(out, cfg.subspace_rank)),
        )

    def finish_load(self) -> None:
        """Delete the cached `self.rows`, and overwrite `adamss_places` by the order of the loaded clusters.

        Without a cached one, nothing is deleted.
        """
        self.__dict__.pop("rows", None)
        self.adamss_places.copy_(find_cluster_order(self.adamss_clusters))

    def factors(self) -> Factors:
        """Return factors of rank Σ ranks: A = [A_1; A_2; …] N, B = blockdiag(B_j) with its rows in the weight's order,
        both in the adapter's dtype.

        On layers that take vectors A is two products, which save memory in the backward pass. If N has a column for the
        bias, B also shifts the layer's bias.
        """
        n, op, base = self.site.fan_in, self.site.op, self.layer.base_layer
        dtype = self.dtype  # of N: FSDP casts parameters for a call, and leaves buffers as they are
        inner = torch.cat([*self.adamss_A]).to(dtype)  # (Σ ranks, R)
        down = inner @ self.adamss_newB  # (Σ ranks, in), or with a column for the bias
        up = torch.block_diag(*self.adamss_B).index_select(0, self.adamss_places).to(dtype)  # (out, Σ ranks)
        A: Any = down[:, :n]
        if self.site.multiplies_vectors:  # two products: the backward pass keeps R numbers per row instead of x
            A = Product(lambda x: linear(linear(x.to(dtype), self.adamss_newB[:, :n]), inner), A)
        if down.shape[1] == n:
            return Factors(A, up)
        shift = up @ down[:, n]
        return Factors(A, Shifted(lambda z: op.up(base, z, up) + op.channels(shift), up, shift))

    def from_file_tensors(self, tensors: Tensors, cfg: AdamssConfig) -> Tensors:
        """Return the file's tensors. A file of PEFT lacks the clusters: this adapter's own are added.

        If the adapter has no values yet (meta device) and the file's A, B and clusters fit each other
        (`match_clusters`), its parameters are replaced by ones of the file's shapes.
        """
        current = self.adamss_clusters
        if ROWS not in tensors:
            return {**tensors, ROWS: self.rows if current.is_meta else current}
        shapes = {(part, j): p.shape for part in PARTS for j, p in getattr(self, part).named_parameters()}
        sizes = {place: tensors[place].shape for place in shapes.keys() & tensors.keys()}
        if (
            current.is_meta
            and sizes.keys() == shapes.keys()
            and match_clusters(tensors[ROWS], sizes, current.shape, self.adamss_newB)
        ):
            for (part, j), shape in sizes.items():
                parameters = getattr(self, part)._parameters
                parameters[j] = nn.Parameter(parameters[j].new_empty(shape))
        return tensors


def match_clusters(rows: Tensor, shapes: dict[tuple[str, str], torch.Size], like: torch.Size, space: Tensor) -> bool:
    """Return True if the shapes of A and B, by (container, cluster), belong to the clusters in `rows`.

    `rows` must be integers in the shape `like`, from 0 to below the number of clusters. B_j has the rows of cluster j
    and the rank of A_j; A_j has the width of `space`.
    """
    count = len(shapes) // 2
    if rows.shape != like or rows.is_floating_point() or not ((rows >= 0) & (rows < count)).all():
        return False
    sizes = torch.bincount(rows, minlength=count).tolist()
    pairs = [(shapes[PARTS[0], str(j)], shapes[PARTS[1], str(j)]) for j in range(count)]
    return all((n, A[0]) == B and A[1:] == space.shape[:1] for (A, B), n in zip(pairs, sizes))


def find_cluster_order(rows: Tensor) -> Tensor:
    """Return, for each row, its position when rows are sorted by cluster, in their order within a cluster: (out,)."""
    return rows.argsort(stable=True).argsort()
