# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with a PeftModel that it does not know for one: PEFT's name is not graft's here."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import graft


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x, labels):
        y = self.fc(x)
        return {"loss": nn.functional.cross_entropy(y, labels), "logits": y}


class Open(Net):
    def forward(self, x, labels, num_items_in_batch=None, **more):
        return super().forward(x, labels)


class Says(Open):
    accepts_loss_kwargs = False


@pytest.mark.parametrize("base, accepts", [(Net, False), (Open, True), (Says, False)])
def test_loss_keywords_go_to_a_base_that_takes_them(base, accepts, tmp_path):
    model = graft.get_peft_model(base(), graft.LoraConfig(target_modules=["fc"]))
    assert model.accepts_loss_kwargs is accepts
    before = model.base_model.model.fc.lora_B["default"].weight.clone()
    rows = [{"x": torch.ones(4), "labels": torch.tensor(1)}] * 4
    options = TrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", use_cpu=True, remove_unused_columns=False, save_strategy="no"
    )
    Trainer(model, options, train_dataset=rows).train()
    assert not torch.equal(model.base_model.model.fc.lora_B["default"].weight, before)
