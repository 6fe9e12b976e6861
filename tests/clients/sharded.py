# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer on two processes, with a base that transformers shards while it loads; it knows nothing of graft.

sharded.py folder
"""

import os
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from tests.clients import tiny
from tests.clients.test_trl import arguments, lora, texts


def main(folder: Path) -> None:
    from trl import SFTTrainer

    args = arguments(
        folder, "SFTConfig", max_length=32, gradient_accumulation_steps=2, max_grad_norm=0.3, save_only_model=True,
        per_device_train_batch_size=2,
    )  # fmt: skip
    rank = args.process_index
    if rank == 0:
        tiny.llama().save_pretrained("base")  # in the current folder: its path is in the adapter's config
    args.distributed_state.wait_for_everyone()
    base = AutoModelForCausalLM.from_pretrained("base", distributed_config=DistributedConfig(fsdp_size=2))
    sharded = [type(p.data).__name__ for p in base.parameters()]
    torch.manual_seed(5 + rank)
    trainer = SFTTrainer(
        base, args, train_dataset=texts(), processing_class=tiny.tokenizer(), peft_config=lora()
    )  # fmt: skip
    trainer.train()
    values = {name: t.tolist() for name, t in tiny.adapter(trainer.model).items()}
    everyone = gather_object([values])
    trainer.save_model(str(folder / "saved"))
    args.distributed_state.wait_for_everyone()
    if rank == 0:
        trained = {name: torch.tensor(v) for name, v in values.items()}
        found = {"sharded": sorted({*sharded}), "logged": tiny.losses(trainer), "trains": trained}
        found["equal on all"] = [other == values for other in everyone]
        torch.save(found, folder / "found.pt")
    args.distributed_state.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # a thread of gloo that is still there aborts an ordinary exit, now and then
