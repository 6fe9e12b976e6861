# SPDX-License-Identifier: Apache-2.0
"""What layers of one category share: the basis V of their inputs, and the places of the entries that train."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from graft.core.errors import ConfigError
from graft.core.site import Site


def category(key: str) -> str:
    """Return the name of the layers with which one at this path shares V: its last two parts, without an index."""
    parts = key.split(".")
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return parts[-1] if len(parts) == 1 or parts[-2].isdigit() else "_".join(parts[-2:])


def width(name: str, sites: Sequence[Site]) -> int:
    """Return the number of inputs that the layers of a category have.

    Raises:
        ConfigError: it is not the same for all.
    """
    found = {site.fan_in for site in sites}
    if len(found) > 1:
        raise ConfigError(
            f"FRoD gives one V to all layers of the category '{name}', and they have {sorted(found)} inputs: such as "
            f"{', '.join(repr(site.key) for site in sites[:4])}. Adapt them by adapters of their own."
        )
    return found.pop()


def order(key: str) -> int:
    """Return the number of the block that a layer is in: after `layers`, or the first in its path."""
    parts = key.split(".")
    after = [b for a, b in pairwise(parts) if a == "layers"]
    return next((int(part) for part in (*after, *parts) if part.isdigit()), 0)


def basis(sites: Sequence[Site], n: int, alpha: float) -> Tensor:
    """Return V (n, n) of a category: by which all its weights have columns that are as orthogonal as can be."""
    V = torch.empty(n, n)
    if V.is_meta or any(site.on_meta for site in sites):
        return V.to("meta")
    last = {order(site.key): site for site in sites}  # of an encoder and a decoder PEFT takes the decoder's alone
    weights = [site.op.canon(site.store.read(site.module, site.parameter)) for _, site in sorted(last.items())]
    stack = torch.cat([W.detach().flatten(1).to("cpu", torch.float32) for W in weights])
    if len(stack) < n:
        Vh: Tensor = torch.linalg.svd(stack, full_matrices=True).Vh
        return Vh.T.contiguous()
    Q, R = torch.linalg.qr(stack)
    eye = alpha * torch.eye(n, device=stack.device)
    parts = Q.split([len(W) for W in weights])
    T = sum(torch.linalg.inv(part.T @ part + eye) for part in parts) / len(parts)
    basis: Tensor = R.T @ torch.linalg.eigh(T).eigenvectors
    return basis


def entries(n: int, rate: float) -> int:
    """Return how many entries of S (n, n) train."""
    count = min(int(n * n * rate), n * n - n)
    return max(count, min(1, n * n - n)) if rate > 0 else count


def support(n: int, rate: float, generator: torch.Generator) -> Tensor:
    """Draw the entries of S, beside its diagonal: their rows and columns, (2, entries)."""
    out = torch.empty(2, entries(n, rate), dtype=torch.int64)
    if out.is_meta:
        return out
    place = torch.randperm(n * n - n, generator=generator)[: out.shape[1]]
    rows, columns = place // (n - 1), place % (n - 1)
    return torch.stack((rows, columns + (columns >= rows)))
