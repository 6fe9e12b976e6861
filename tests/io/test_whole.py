# SPDX-License-Identifier: Apache-2.0
"""A folder of a whole model is no adapter, and is told as what it is."""

import json

import pytest
from safetensors.torch import save_file

import graft
from tests import models
from tests.raised import refuses

ADAPTER = dict(target_modules=["q_proj"], task_type="CAUSAL_LM")


@pytest.mark.graft_only
def test_a_whole_model_with_an_adapter_inside(tmp_path):
    model = graft.get_peft_model(models.make("llama"), graft.LoraConfig(**ADAPTER))
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.raises(graft.CheckpointError, match=r"whole model.*an adapter inside.*load_state_dict.*install") as e:
        graft.PeftModel.from_pretrained(models.make("llama"), tmp_path)
    assert "adapter_config.json" in str(e.value)
    refuses(graft.CheckpointError, "whole model", graft.load_peft_weights, tmp_path)


@pytest.mark.graft_only
def test_a_whole_model_without_one(tmp_path):
    models.make("llama").save_pretrained(tmp_path)
    with pytest.raises(graft.CheckpointError, match=r"whole model .*own class") as e:
        graft.PeftModel.from_pretrained(models.make("llama"), tmp_path)
    assert "inside" not in str(e.value)


@pytest.mark.graft_only
@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_file_that_cannot_be_read_is_a_whole_model_still(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    refuses(graft.CheckpointError, "whole model", graft.PeftConfig.from_pretrained, tmp_path)


@pytest.mark.graft_only
def test_a_model_in_parts(tmp_path):
    index = {"weight_map": {"base_model.model.x.lora_A.default.weight": "a"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(graft.CheckpointError, "adapter inside", graft.PeftConfig.from_pretrained, tmp_path)
