# SPDX-License-Identifier: Apache-2.0
"""A small training script, as `accelerate launch` starts it on several processes; it knows nothing of graft.

launched.py folder
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, is_peft_model, set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader

from tests.clients import tiny


def main(folder: Path) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)
    model = get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-2)
    ids = torch.tensor([tiny.tokenizer()(text)["input_ids"] for text in tiny.sentences(32)])
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(ids, batch_size=4))
    assert is_peft_model(model)
    losses = []
    for step, batch in enumerate(loader):
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()[None]).tolist())
        if step == 1:
            accelerator.save_state(str(folder / "state"))
    trained = accelerator.unwrap_model(model)
    trained.save_pretrained(folder / "saved", is_main_process=accelerator.is_main_process)
    values = {name: t.tolist() for name, t in tiny.adapter(trained).items()}
    everyone = gather_object([values])
    accelerator.load_state(str(folder / "state"))
    back = tiny.adapter(accelerator.unwrap_model(model))
    accelerator.wait_for_everyone()
    read = PeftModel.from_pretrained(tiny.llama(), folder / "saved")
    if accelerator.is_main_process:
        found = {
            "kind": [accelerator.distributed_type.value, accelerator.num_processes, type(model).__name__],
            "losses": losses, "trains": {name: torch.tensor(v) for name, v in values.items()}, "back": back,
            "equal on all": [other == values for other in everyone],
            "logits": read.eval()(ids[:2]).logits.detach(),
        }  # fmt: skip
        torch.save(found, folder / "found.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # a thread of gloo that is still there aborts an ordinary exit, now and then
