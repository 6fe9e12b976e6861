# SPDX-License-Identifier: Apache-2.0
"""Norms of DoRA that are kept between calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class DoraCaching:
    """Keep DoRA's norms from call to call, in eval mode. They cost a product with each weight in every call.

        with DoraCaching():
            model.generate(…)

        caching = DoraCaching(enabled=False)
        caching(enabled=True)  # from here on, in all models and threads

    A layer computes its norms anew in training, when the base weight, A, B or the scaling is another one, and when
    torch counts another version of one of them, as after optimizers and loads. It does not see what is written to
    `tensor.data`: switch off and on then. Compiled code computes norms in every call.
    """

    on = False
    switched = 0  # how often it has been: norms from before count no more

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.before: list[bool] = []

    def __enter__(self) -> DoraCaching:
        self.before.append(DoraCaching.on)
        self(self.enabled)
        return self

    def __exit__(self, *error: Any) -> None:
        self(self.before.pop())

    def __call__(self, enabled: bool = True) -> None:
        if enabled != DoraCaching.on:
            DoraCaching.on = enabled
            DoraCaching.switched += 1


class Kept:
    """A norm, and the state of the tensors from which it was computed."""

    def __init__(self, norm: Tensor, of: Sequence[Tensor], scaling: float):
        self.norm, self.of, self.state = norm, of, state_of(of, scaling)

    def holds(self, of: Sequence[Tensor], scaling: float) -> bool:
        return all(a is b for a, b in zip(of, self.of)) and self.state == state_of(of, scaling)


def state_of(tensors: Sequence[Tensor], scaling: float) -> list[Any]:
    """Return what changes with the values of tensors."""
    state: list[Any] = [DoraCaching.switched, scaling]
    for t in tensors:
        if is_traceable_wrapper_subclass(t):  # shards, say, whose versions are not counted here: never the same
            state.append(object())
        else:
            state += [t.data_ptr(), 0 if t.is_inference() else t._version]
    return state
