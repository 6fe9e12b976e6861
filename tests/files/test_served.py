# SPDX-License-Identifier: Apache-2.0
"""Files with experts as servers have them, in the verbs on files: merged and converted they do what the adapter did."""

import pytest
import torch
from torch.testing import assert_close

import graft
from graft.files.convert import convert
from graft.files.errors import BaseNeededError
from graft.files.formats import read
from graft.files.serving import check
from tests.families import base
from tests.leaves_out import FUSED_EXPERTS
from tests.model.test_adapter_tensors import adapted, logits, shared

pytestmark = FUSED_EXPERTS
SHARED = "sglang-shared", "vllm-shared"


@pytest.mark.parametrize(
    "family, layout",
    [("qwen3_moe", "sglang"), ("qwen3_moe", "vllm-2d"), ("qwen3_moe", "sglang-shared"), ("gpt_oss", "sglang"),
     ("gpt_oss", "vllm-3d"), ("gpt_oss", "vllm-shared"), ("mixtral", "sglang"), ("mixtral", "vllm-shared"),
     ("nemotron_h", "sglang")],
)  # fmt: skip
def test_it_is_merged_converted_and_loaded(family, layout, tmp_path):
    base(family).save_pretrained(tmp_path / "base")
    model = adapted(family)
    model = shared(model) if layout in SHARED else model
    expected = logits(model)
    graft.adapter_tensors(model, layout=layout).save(tmp_path / "a")
    graft.merge_files(tmp_path / "base", [tmp_path / "a"], tmp_path / "merged")
    assert_close(logits(type(base(family)).from_pretrained(tmp_path / "merged").eval()), expected, rtol=1e-4, atol=1e-4)
    convert(tmp_path / "a", "peft", tmp_path / "b", tmp_path / "base")
    assert_close(logits(graft.PeftModel.from_pretrained(base(family), tmp_path / "b")), expected)
    assert_close(logits(graft.load_adapter(base(family), tmp_path / "a").eval()), expected)


def test_a_file_of_sglang_needs_its_base(tmp_path):
    model = adapted("qwen3_moe")
    graft.adapter_tensors(model, layout="sglang").save(tmp_path)
    with pytest.raises(BaseNeededError, match="--base"):
        read(tmp_path)
    base("qwen3_moe").save_pretrained(tmp_path / "base")
    from graft.files.bases import base_of

    known = base_of(tmp_path / "base")
    adapter = read(tmp_path, known)
    assert "experts" not in {f.condition for f in check(adapter, ["sglang"], known)}
    model.save_pretrained(tmp_path / "plain")
    assert "experts" in {f.condition for f in check(read(tmp_path / "plain"), ["sglang"])}
    assert torch.isfinite(torch.tensor([held.scale for held in adapter.low_rank.values()])).all()
