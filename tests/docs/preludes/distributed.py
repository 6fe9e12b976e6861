# SPDX-License-Identifier: Apache-2.0
"""A group of one process, which has all of each layer; and the second stage of two, which somebody else has saved.

What the page says of several processes tests/distributed checks with several.
"""

import os

import torch
from torch import nn

import graft
from tests.docs.preludes import language_model

os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT="0", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
path, folder, rank, stages = "base", "saved", 0, 2
language_model().save_pretrained(path)


def half(own: int):
    """A stage of the model: one block, and an identity in the other's place."""
    model = language_model()
    for i, _ in enumerate(model.model.layers):
        if i != own:
            model.model.layers[i] = nn.Identity()
    return model


def fresh(text: str) -> dict:
    if "stage" not in text:
        return {}
    torch.manual_seed(0)
    other = graft.get_peft_model(half(1), graft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    other.save_pretrained(f"{folder}/stage1")
    return {"stage": half(0)}
