# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' 4 bits, stored as floats, under FSDP2 in two processes: beside one process with the same base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import graft
from tests.models import seeded

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
FILE = "adapter_model.safetensors"
CONFIGS: dict[str, Callable[[], Any]] = {
    "LORA": lambda: graft.LoraConfig(r=4, target_modules=TARGETS),
    "DORA": lambda: graft.LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
    "IA3": lambda: graft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "ADALORA": lambda: graft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=TARGETS),
    "OFT": lambda: graft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS),
    "VERA": lambda: graft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "LOHA": lambda: graft.LoHaConfig(r=4, target_modules=TARGETS),
    "HIRA": lambda: graft.HiraConfig(r=4, target_modules=TARGETS),
}


def base() -> Any:
    import bitsandbytes as bnb
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=64)
    with seeded(0):
        model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in TARGETS:
            sizes = module.in_features, module.out_features, False, torch.float32
            made = bnb.nn.Linear4bit(*sizes, quant_type="nf4", quant_storage=torch.float32)
            made.load_state_dict(module.state_dict())
            setattr(model.get_submodule(parent), last, made.to("cpu"))
    return model


def with_method(name: str, sharded: bool) -> Any:
    from torch.distributed.fsdp import fully_shard

    with seeded(1):
        model = graft.get_peft_model(base(), CONFIGS[name]())
    if sharded:
        for block in model.get_base_model().model.layers:
            fully_shard(block)
        fully_shard(model)
    return model


def trained(model: Any) -> torch.Tensor:
    with seeded(2):
        ids = torch.randint(0, 64, (4, 8))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def law(folder: Path, name: str) -> None:
    """The same losses, the same files; and the codes are in parts."""
    one, here = with_method(name, False), with_method(name, True)
    mine, ours = folder / f"{name}-{dist.get_rank()}", folder / name
    one.save_pretrained(mine / "start")
    here.save_pretrained(ours / "start")
    dist.barrier()
    before = [load_file(path / "start" / FILE) for path in (mine, ours)]
    assert before[0].keys() == before[1].keys() and all(torch.equal(t, before[1][k]) for k, t in before[0].items())
    codes = [p for name, p in here.named_parameters() if name.endswith("base_layer.weight")]
    assert codes and all(p.to_local().numel() == p.numel() / 2 for p in codes)
    assert_close(trained(here), trained(one), rtol=1e-6, atol=0)
    here.save_pretrained(ours / "end")
    dist.barrier()
    for key, t in graft.get_peft_model_state_dict(one).items():
        assert_close(load_file(ours / "end" / FILE)[key], t.detach(), rtol=1e-5, atol=1e-6)
    again = graft.PeftModel.from_pretrained(base(), ours / "end")
    assert_close(logits(again), logits(one), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(8)[None]).logits  # type: ignore[no-any-return]


def checks(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    for name in CONFIGS:
        yield name, partial(law, folder, name)
