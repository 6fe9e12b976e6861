# SPDX-License-Identifier: Apache-2.0
"""The store of layers that compressed-tensors has taken over: torch's own, with a forward that also rounds inputs.

Their weights are compressed when a model is loaded, and plain tensors from the model's first call on.
"""

from __future__ import annotations

from torch import nn

from graft.storage.dense import Dense, strange_tensor
from graft.storage.straight import let_gradients_through


class Compressed(Dense):
    """The store of torch's layers that compressed-tensors has given a forward which also rounds inputs or outputs."""

    name = "compressed-tensors"
    exact = False  # kernels that do not call the layer would not round its inputs

    def waits(self, m: nn.Module, name: str) -> str | None:
        """Return why the weight cannot be used yet: it is compressed until the model's first call.

        None for other tensors, and for a weight that is a plain parameter already.
        """
        if name != "weight" or ("weight" in m._parameters and strange_tensor(m, name) is None):
            return None
        return (
            "its weight is compressed until the model is called: call the model once before, or load it with "
            "CompressedTensorsConfig(dequantize=True)"
        )

    def why_unreadable(self, m: nn.Module, name: str = "weight") -> str | None:
        """Return that the weight is compressed until the model's first call, else why a plain tensor could not be read.

        None if it can.
        """
        return self.waits(m, name) or super().why_unreadable(m, name)

    def why_unwritable(self, m: nn.Module, name: str = "weight") -> str | None:
        """Return that the weight is compressed until the model's first call, else why a plain tensor could not be
        written.

        None if it can.
        """
        return self.waits(m, name) or super().why_unwritable(m, name)

    def loses_gradient(self, m: nn.Module) -> bool:
        """Return True if `input_activations` or `output_activations` of the module's `quantization_scheme` is not None:
        compressed-tensors rounds these without a gradient.
        """
        scheme = m.quantization_scheme
        return scheme.input_activations is not None or scheme.output_activations is not None

    def ready(self, m: nn.Module) -> str | None:
        """Replace the forward of a layer that rounds inputs or outputs, so that it has a gradient for its input.

        Other layers do not change. Returns None: there is no warning.
        """
        if self.loses_gradient(m):
            let_gradients_through(m, self)
        return None


MARKS = {"quantization_scheme": Compressed()}
