# SPDX-License-Identifier: Apache-2.0
"""LN tuning: Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, arXiv 2312.11420."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.func import functional_call

from graft.config.fields import TARGETS, Targeted
from graft.core.each import copy_with_tensors
from graft.core.effect import Effect, Replace
from graft.core.method import Method
from graft.kernels.eager import cast
from graft.storage.codes import why_copy_cannot_train
from graft.storage.fsdp2 import standalone


@dataclass(kw_only=True)
class LNTuningConfig(Targeted):
    """LN tuning: a trainable copy of each layer (made for norms, works on any module) replaces it in forward passes."""

    peft_type: str = "LN_TUNING"


class LNTuning(Method[LNTuningConfig]):
    """LN tuning, arXiv 2312.11420: a trainable copy of the module that replaces it in forward passes."""

    prefix = "ln_tuning_"
    targets = TARGETS["LN_TUNING"]
    keeps_base_dtype = frozenset({"ln_tuning_layers"})  # the copy computes as the layer did

    ln_tuning_layers: nn.Module

    def check(self) -> str | None:
        """Return the reason why a copy of the module cannot train, else that of `Method.check`."""
        why = why_copy_cannot_train(self.site.module)
        return super().check() if why is None else f"LN tuning trains a copy of the layer, and {why}"

    def describe(self) -> Effect:
        """Return a `Replace`: the copy runs in place of the layer, in the layer's dtypes."""
        return Replace(self.get_copy)

    def build(self, shared: dict[str, object], device: torch.device | None = None) -> dict[str, object]:
        """Return `ln_tuning_layers`, a copy of the module without hooks, on the module's device whatever `device` is.

        Floating-point parameters of the copy train. Draws no random values.
        """
        clone = standalone(self.site.module)
        for p in clone.parameters():
            p.requires_grad = p.is_floating_point()
        return dict(ln_tuning_layers=clone)

    def get_copy(self) -> Any:
        """Return the copy, `ln_tuning_layers`, if its parameters have the dtypes of the layer's.

        If someone has cast it, return a shallow copy of it with parameters cast to the layer's dtypes, so that both
        compute alike. Gradients pass to the uncast parameters. Then buffers are cast as well, in place in
        `ln_tuning_layers`, since forward passes write them. Under torch.compile it is a function that runs
        `ln_tuning_layers` so.
        """
        trained, base = self.ln_tuning_layers, self.layer.base_module
        dtypes = find_dtypes(base.named_parameters())
        parameters = {n: cast(p, dtypes[n]) for n, p in trained.named_parameters() if dtypes.get(n, p.dtype) != p.dtype}
        if not parameters:
            return trained
        dtypes = find_dtypes(base.named_buffers())
        for name, b in trained.named_buffers():
            path, _, key = name.rpartition(".")
            trained.get_submodule(path)._buffers[key] = cast(b, dtypes.get(name, b.dtype))
        if is_dynamo_compiling():  # which follows no copy.copy
            return lambda *args, **kwargs: functional_call(trained, parameters, args, kwargs)
        return copy_with_tensors(trained, parameters)


def find_dtypes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, torch.dtype]:
    """Return name → dtype of a module's tensors, by their names without adapter layers within the module."""
    return {name.replace("base_layer.", ""): t.dtype for name, t in tensors}
