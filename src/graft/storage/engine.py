# SPDX-License-Identifier: Apache-2.0
"""The store of weights that Transformer Engine holds as 8-bit floats; its tensors have a method `dequantize`."""

from __future__ import annotations

from torch import Tensor, nn

from graft.core.wrappers import find_offload_hooks
from graft.storage.dense import Dense


class Engine(Dense):
    """The store of Transformer Engine's weights of 8-bit floats: read by `dequantize`, never written."""

    name, live, exact, copies = "transformer engine", False, False, "all"

    def why_unreadable(self, m: nn.Module, name: str = "weight") -> str | None:
        """Return "its weight is offloaded" if accelerate offloads the module, for any name; None otherwise."""
        return "its weight is offloaded" if find_offload_hooks(m) else None

    def read(self, m: nn.Module, name: str = "weight") -> Tensor:
        """Return the tensor of a module; a weight that has `dequantize`, as every torch tensor has, is dequantized:
        plain bfloat16 becomes float32.
        """
        t = getattr(m, name)
        return t.dequantize() if hasattr(t, "dequantize") and name == "weight" else t

    def why_unwritable(self, m: nn.Module, name: str = "weight") -> str | None:
        """Return why merging cannot write: always a reason for `weight`; for other tensors that of plain ones,
        or None.
        """
        if name != "weight":
            return super().why_unwritable(m, name)
        return "its weight holds 8-bit floats, whose scales Transformer Engine keeps: load the base model in bfloat16"


def why_no_engine_adapter(m: nn.Module) -> str | None:
    """Return why no adapter can act on a layer of Transformer Engine, or None if one can or the layer is another
    package's.

    There are two reasons: `tp_size` above 1, so that a process has a piece; and `return_bias`, which makes the output a
    tuple.
    """
    if not any(cls.__module__.startswith("transformer_engine.") for cls in type(m).__mro__):
        return None
    if getattr(m, "tp_size", 1) > 1:
        return f"its parallel_mode '{getattr(m, 'parallel_mode', None)}' leaves a process a piece of the weight"
    return "it returns its bias next to the output" if getattr(m, "return_bias", False) else None
