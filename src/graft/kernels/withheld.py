# SPDX-License-Identifier: Apache-2.0
"""A tensor with shape, dtype and device only: every other operation raises a given error."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from torch import Tensor
from torch._C import DisableTorchFunctionSubclass

from graft.kernels.summed import FACTS


class Withheld(Tensor):
    """A tensor without values: facts such as its shape are readable; each operation raises the error that `error`
    returns.
    """

    error: Callable[[], Exception]

    @staticmethod
    def __new__(cls, like: Tensor, error: Callable[[], Exception]) -> Withheld:
        """Return a tensor without values that keeps `error`, with the shape, strides, dtype and device of `like`."""
        tensor: Withheld = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        tensor.error = error
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Withheld({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Return a fact of the tensor, such as its shape.

        For every other function raise the error of the first `Withheld`.
        """
        if function in FACTS:
            with DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        raise_first_error(args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: object, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> NoReturn:
        """Raise the error of the first `Withheld` among the arguments, for every operation below autograd."""
        raise_first_error(args, kwargs)


def raise_first_error(args: tuple[object, ...], kwargs: dict[str, object] | None) -> NoReturn:
    """Raise the error of the first `Withheld` among the arguments of an operation, keyword arguments last.

    Lists and tuples are searched after the arguments themselves. Raises TypeError if there is none.
    """
    values: list[object] = [*args, *(kwargs or {}).values()]
    while values:
        value = values.pop(0)
        if isinstance(value, Withheld):
            raise value.error()
        if isinstance(value, (list, tuple)):
            values += value
    raise TypeError("an operation on a tensor that is withheld")
