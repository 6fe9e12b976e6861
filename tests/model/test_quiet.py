# SPDX-License-Identifier: Apache-2.0
"""Plain use warns of nothing: neither does graft, nor a package below that graft calls by an outdated name.

pyproject lets through what PEFT makes transformers say; here nothing comes through.
"""

from __future__ import annotations

import pytest
import torch

import graft
from tests import models
from tests.pair import adapt
from tests.prompts import samples as prompts
from tests.samples import each

pytestmark = [pytest.mark.graft_only, pytest.mark.filterwarnings("error")]
ASKS = ("OFT",)  # whose sample asks for blocks that do not divide the layers


def live(model, base, batch: dict, folder) -> None:
    """Train a step, generate, save, load and switch an adapter off."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    models.checkpoint(model.train())
    model.enable_input_require_grads()
    model(**batch).loss.backward()
    optimizer.step()
    model.eval()
    if hasattr(model.get_base_model(), "generate"):
        asked = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "task_ids")}
        assert model.generate(**asked, max_new_tokens=3).shape[0] == len(batch["input_ids"])
    model.save_pretrained(folder)
    loaded = graft.PeftModel.from_pretrained(base, folder).eval()
    torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss)
    with loaded.disable_adapter():
        assert not torch.equal(loaded(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize("sample", [s for s in each(models="llama") if s.method not in ASKS], ids=str)
def test_an_adapters_life(sample, tmp_path):
    ids = torch.randint(3, models.VOCAB, (2, 6))
    model = adapt(graft, sample)
    live(model, models.make("llama"), dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids), tmp_path)
    model.set_adapter("default")
    assert not model.unload().training


def test_preparing_a_quantized_model():
    model = models.make("llama")
    model.is_loaded_in_4bit = True
    graft.prepare_model_for_kbit_training(model)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


@pytest.mark.parametrize("sample", prompts.each("llama", "t5", "bert-seq"), ids=str)
def test_a_prompts_life(sample, tmp_path):
    live(prompts.adapt(graft, sample), prompts.make(sample.model), prompts.batch(sample), tmp_path)
