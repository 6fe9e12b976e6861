# SPDX-License-Identifier: Apache-2.0
"""EVA: Explained Variance Adaptation, arXiv 2410.07170. Principal components of inputs, and who gets which rank.

torch has no incremental PCA, and scikit-learn's works on NumPy arrays of one process, so that the inputs of every layer
would leave the GPU at each batch. `torch.svd_lowrank` draws from the generator that all threads share.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

SEED = 42  # of the random projections: every process finds the same components


class Components:
    """The n largest principal components of rows that arrive batch by batch (Ross et al., IJCV 77, 2008).

    Each batch is decomposed together with the former result: its rows less their mean, the components times their
    singular values, and the shift of the mean.
    """

    mean: Tensor  # (in,), float64; this and the next three from the first rows on
    squares: Tensor  # (in,): sums of squared deviations, float64
    V: Tensor  # (n, in)
    S: Tensor  # (n,)

    def __init__(self, n: int, tau: float):
        """Start without rows.

        n: number of components; tau: the cosine similarity at which a component counts as converged.
        """
        self.n, self.tau = n, tau
        self.rows = 0
        self.converged = torch.zeros(n, dtype=torch.bool)

    def add(self, X: Tensor) -> None:
        """Update mean, squared deviations, components V (n, in) and singular values S (n,) with rows X (m, in), m ≥ n.

        The components are those of the centred rows; from the second batch on, of these with the former components
        times their singular values, and the shift of the mean. X is cast to float32; mean and squares are float64.

        From the second batch on, `converged` (n,) is True for components with a cosine similarity of tau or more to
        their former value.
        """
        m, seen = len(X), self.rows
        X = X.float()
        mean = X.mean(0, dtype=torch.float64)
        centred = X - mean.float()
        squares = centred.double().square().sum(0)
        if seen:
            apart = self.mean - mean
            weight = seen * m / (seen + m)
            squares = self.squares + squares + weight * apart.square()
            mean = mean + apart * (seen / (seen + m))
            centred = torch.cat([self.S[:, None] * self.V, centred, (weight**0.5 * apart).float()[None]])
        V, S = find_top_components(centred, self.n)
        if seen:
            self.converged = (torch.cosine_similarity(V, self.V) >= self.tau).cpu()
        self.rows, self.mean, self.squares, self.V, self.S = seen + m, mean, squares, V, S

    @property
    def variance_shares(self) -> Tensor:
        """The share of each component in the variance of all rows, (n,), float64 on the CPU: S² over the sum of squared
        deviations.
        """
        whole = self.squares.sum().clamp(min=torch.finfo(torch.float64).tiny)
        shares: Tensor = self.S.double().square() / whole
        return shares.cpu()


def find_top_components(X: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the n largest right singular vectors of X as rows (n, in), and singular values (n,), by a randomized SVD.

    Its 2 n random projections are those of a fixed seed on any device, and are refined by four subspace iterations.
    Global generators stay as they are. In each vector the number with the largest absolute value is positive.
    """
    A = X if len(X) >= X.shape[1] else X.T
    projections = torch.randn(A.shape[1], 2 * n, generator=Generator(device="cpu").manual_seed(SEED), device="cpu")
    Q = torch.linalg.qr(A @ projections.to(A)).Q
    for _ in range(4):
        Q = torch.linalg.qr(A @ torch.linalg.qr(A.T @ Q).Q).Q
    U, S, V = torch.linalg.svd(Q.T @ A, full_matrices=False)
    V = (V if A is X else (Q @ U).T)[:n]
    signs = V.gather(1, V.abs().argmax(1, keepdim=True)).sign()
    return V * signs, S[:n]


def distribute_ranks(
    components: dict[str, Components], owner: dict[str, str], most: dict[str, int], budget: int
) -> dict[str, int]:
    """Return the rank of each layer.

    A total of `budget` ranks goes to the components with the largest share of their layer's variance; of equal shares
    those of earlier layers in `owner`.

    A layer never gets more ranks than the layer that owns its components: else the two ranks are exchanged.

    Args:
        owner: layer → the layer with the same inputs that owns its components, maybe itself.
        most: the largest rank that a layer can have.
    """
    keys, shares = [], []
    for key, source in owner.items():
        shares_of_layer = components[source].variance_shares[: most[key]]
        keys += [key] * len(shares_of_layer)
        shares.append(shares_of_layer)
    order = torch.cat(shares).argsort(descending=True, stable=True)[:budget].tolist()
    ranks = dict.fromkeys(owner, 0)
    for i in order:
        ranks[keys[i]] += 1
    for key, source in owner.items():  # the components that are watched are those of the owner
        if ranks[source] < ranks[key]:
            ranks[source], ranks[key] = ranks[key], ranks[source]
    return ranks
