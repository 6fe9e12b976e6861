# SPDX-License-Identifier: Apache-2.0
"""Several adapters on one small model that has a layer of every kind."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn

from tests import models

LAYERS = ("lin", "out", "c1d", "emb", "conv", "point", "grouped")
UNGROUPED = LAYERS[:-1]


class Kinds(nn.Module):
    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.emb = nn.Embedding(13, 10)
        self.lin = nn.Linear(10, 12)
        self.out = nn.Linear(12, 9)
        self.c1d = Conv1D(7, 9)
        self.conv = nn.Conv2d(3, 5, (3, 2))
        self.point = nn.Conv2d(5, 6, 1)
        self.grouped = nn.Conv2d(6, 4, (1, 2), groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, ids, image):
        x = self.c1d(torch.tanh(self.out(self.lin(self.emb(ids)).tanh()))).mean(1)
        y = self.grouped(self.point(self.conv(image).tanh())).mean((-1, -2))
        return self.head(y) + x[:, :3]


def base() -> nn.Module:
    with models.seeded(0):
        return Kinds().eval()


def batch() -> dict[str, Tensor]:
    with models.seeded(7):
        return dict(ids=torch.randint(0, 13, (3, 5)), image=torch.randn(3, 3, 5, 4))


def lora(lib: Any, targets: Any = UNGROUPED, r: int = 2, lora_alpha: float = 2.74, **options: Any) -> Any:
    targets = targets if isinstance(targets, str) else list(targets)
    return lib.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=targets, **options)


@torch.no_grad()
def randomize(
    model: nn.Module, marks: tuple[str, ...] = ("lora_", "hada_", "ia3_", "ranknum", "modules_to_save", "tokens_delta")
):
    """Values of everything that an adapter added, which depend on nothing but its name."""
    for name, p in model.named_parameters():
        if any(m in name for m in marks) and "ranknum" not in name:
            g = torch.Generator().manual_seed(zlib.crc32(name.removeprefix("base_model.model.").encode()))
            p.copy_(torch.randn(p.shape, generator=g).to(p))
    return model


def build(lib: Any, configs: dict[str, Any], model: nn.Module | None = None) -> Any:
    """A model with these adapters: {name: config}."""
    model = base() if model is None else model
    made = None
    for name, config in configs.items():
        if made is None:
            made = lib.get_peft_model(model, config, name)
        else:
            made.add_adapter(name, config)
    return randomize(made).eval()


def loras(lib: Any, **options: Any) -> Any:
    """Three LoRA adapters with scalings of their own."""
    return build(lib, {name: lora(lib, lora_alpha=a, **options) for name, a in (("x", 2.74), ("y", 5.5), ("z", 1.1))})


def layer(model: Any, key: str) -> Any:
    return model.get_submodule(f"base_model.model.{key}")


def factors(model: Any, key: str, name: str) -> tuple[Tensor, Tensor]:
    """A and B of an adapter as they are stored."""
    here = layer(model, key)
    if name in here.lora_A:
        return here.lora_A[name].weight.detach(), here.lora_B[name].weight.detach()
    return here.lora_embedding_A[name].detach(), here.lora_embedding_B[name].detach()


def delta(model: Any, key: str, name: str) -> Tensor:
    return layer(model, key).get_delta_weight(name).detach()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}
