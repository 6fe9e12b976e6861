# SPDX-License-Identifier: Apache-2.0
"""A sweep in one process, or divided over several: the same table, to the bit.

    python examples/sweep.py
    torchrun --standalone --nproc-per-node=2 examples/sweep.py

A tiny random Llama learns to count; yours comes from_pretrained("…"), and your data from a DataLoader. For several
machines start torchrun on each, with its --rdzv-endpoint and a folder that all see.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import graft

VOCABULARY, LENGTH = 32, 8


def load() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))


def rows(n: int, seed: int) -> list[dict[str, torch.Tensor]]:
    starts = torch.randint(VOCABULARY, (n, 1), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids, "labels": ids} for ids in (starts + torch.arange(LENGTH)) % VOCABULARY]


def settings(quick: bool, out: str) -> dict[str, Any]:
    """Return what to try, on what."""
    return dict(
        config=graft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"]),
        space={"r": [2, 8], "lr": [1e-3, 3e-3, 1e-2, 3e-2]},
        data=DataLoader(rows(512, 1), batch_size=16, shuffle=True),
        valid=DataLoader(rows(64, 2), batch_size=32),
        steps=16 if quick else 160,
        folder=out,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default="out/sweep", help="folder for table and adapters")
    parser.add_argument("--quick", action="store_true", help="a few steps")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # another number of threads may round otherwise
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    found = graft.sweep(load(), **settings(args.quick, args.out))
    if not dist.is_initialized() or dist.get_rank() == 0:
        Console(width=100).print(found.table())
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
