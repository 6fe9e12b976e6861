# SPDX-License-Identifier: Apache-2.0
"""Files for a base whose modules had other names, or another size, and bases that carry the adapter already."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.io.fingerprint import check_fingerprint, choose_sampled_names
from tests import models
from tests.models import seeded
from tests.raised import refuses, warns


class Renamed(nn.Module):
    _checkpoint_conversion_mapping = {r"^blocks": "model.blocks"}

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 8)])})

    def forward(self, x):
        return self.model["blocks"][0](x)


def test_modules_that_were_renamed(tmp_path):
    """The fingerprint follows the names of the tensors."""
    new = Renamed()
    old = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 8)])})
    old.load_state_dict(new.model.state_dict())
    made = graft.get_peft_model(old, graft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    made.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(new, tmp_path)
    mine, theirs = (dict(graft.get_peft_model_state_dict(m)) for m in (made, loaded))
    assert_close([*mine.values()], [*theirs.values()])
    warns(graft.PeftWarning, "with other weights", graft.PeftModel.from_pretrained, Renamed(), tmp_path)


def test_sizes_that_are_ignored(tmp_path):
    make = lambda n: nn.Sequential(nn.Embedding(n, 4), nn.Linear(4, 4))
    made = graft.get_peft_model(make(10), graft.LoraConfig(target_modules=["0", "1"], init_lora_weights=False))
    made.save_pretrained(tmp_path)
    refuses(graft.BaseModelMismatchError, None, graft.PeftModel.from_pretrained, make(12), tmp_path)
    with pytest.warns(UserWarning, match="(?s)size mismatch|another base model"):
        loaded = graft.PeftModel.from_pretrained(make(12), tmp_path, ignore_mismatched_sizes=True)
    assert_close(loaded.base_model.model[1].lora_A["default"].weight, made.base_model.model[1].lora_A["default"].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_carries_the_adapter_already(dtype, tmp_path):
    """As transformers makes it of an adapter's folder: the adapter gets the file's values, and trains in float32."""
    made = graft.get_peft_model(models.make("llama"), graft.LoraConfig(r=2, init_lora_weights=False))
    made.save_pretrained(tmp_path)
    config = graft.PeftConfig.from_pretrained(tmp_path)
    bare = graft.inject_adapter_in_model(config, models.make("llama"), "default").to(dtype)
    bare.peft_config = {"default": config}
    loaded = graft.PeftModel.from_pretrained(bare, tmp_path, is_trainable=True)
    assert {p.dtype for n, p in loaded.named_parameters() if "lora_" in n and p.requires_grad} == {torch.float32}
    inputs = models.inputs("llama")
    close = dict(atol=1e-5, rtol=1e-5) if dtype is torch.float32 else dict(atol=0.1, rtol=0.1)
    assert_close(models.output(loaded.eval(), inputs).float(), models.output(made.eval(), inputs), **close)


def test_a_head_of_other_inputs_is_not_resized(tmp_path):
    """Only the number of labels may differ: a head of another width keeps the base's shape, or the load fails."""

    def make(width, labels):
        with seeded(0):
            return nn.ModuleDict({"lin": nn.Linear(4, 4), "head": nn.Linear(width, labels)})

    config = graft.LoraConfig(target_modules=["lin"], modules_to_save=["head"], r=2)
    graft.get_peft_model(make(6, 3), config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning):
        loaded = graft.PeftModel.from_pretrained(make(4, 3), tmp_path, ignore_mismatched_sizes=True)
    assert loaded.base_model.model["head"].modules_to_save["default"].weight.shape == (3, 4)
    refuses(RuntimeError, r"size mismatch .*head", graft.PeftModel.from_pretrained, make(4, 3), tmp_path)


def test_sampled_weights_are_spread_over_the_model():
    for n in (*range(1, 40), 64, 224):
        names = [f"{i:03}" for i in range(n)]
        sampled = [int(name) for name in choose_sampled_names(reversed(names))]
        gaps = [b - a for a, b in zip(sampled, [*sampled[1:], n])]
        assert sampled[0] == 0 and len(sampled) == min(n, 16) and min(gaps) >= 1, n
        assert 32 < n < 64 or max(gaps) - min(gaps) <= 1, n


FIELDS = {"n": 1, "shapes": "ab", "weights": {"a": [2, 3]}, "sample": {"a": [1, 0.5]}, "full": {"a": "ab"}}
WRONG = {
    "n": ["1", True], "shapes": [1], "weights": [[2], {"a": 2}, {"a": [1.5]}],
    "sample": [[2], {"a": ["b"]}, {"a": [float("nan")]}], "full": [["ab"], {"a": 1}, {"a": "b", "c": 1}],
}  # fmt: skip


def test_each_field_of_a_fingerprint_has_its_type():
    check_fingerprint(FIELDS, "f")
    for name, values in WRONG.items():
        for value in values:
            refuses(graft.CheckpointError, f"f has a field '{name}'", check_fingerprint, FIELDS | {name: value}, "f")
