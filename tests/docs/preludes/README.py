# SPDX-License-Identifier: Apache-2.0
import torch

import graft
import tests.docs.preludes as tiny

fresh_base = tiny.language_model()
config = graft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
config2 = config
batch = {"input_ids": tiny.tokens(4)}


def fresh(text: str) -> dict:
    """Each block begins with a model of its own, of the architecture whose layers it names."""
    if "nn.Linear(384, 5)" in text:
        return {"base": wide_classifier()}
    base = tiny.classifier() if "query" in text else tiny.language_model()
    if "model = " in text:
        return {"base": base}
    adapted = graft.get_peft_model(tiny.language_model(), graft.HiraConfig(target_modules=["q_proj"]))
    return {"base": base, "model": adapted}


def wide_classifier():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**{**tiny.SIZES, "hidden_size": 384})).eval()
