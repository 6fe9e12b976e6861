# SPDX-License-Identifier: Apache-2.0
"""Files with experts as servers have them, in the verbs on files: merged and converted they do what the adapter did."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.testing import assert_close

import graft
from graft.files.bases import open_base
from graft.files.convert import convert_adapter_file
from graft.files.errors import BaseNeededError
from graft.files.formats import read
from graft.files.inspect import inspect_adapter
from graft.files.lint import lint_adapter
from graft.files.serving import check_servers
from tests.families import base
from tests.leaves_out import FUSED_EXPERTS
from tests.model.test_adapter_tensors import logits, shared, with_experts

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
    model = with_experts(family)
    model = shared(model) if layout in SHARED else model
    expected = logits(model)
    graft.adapter_tensors(model, layout=layout).save(tmp_path / "a")
    graft.merge_files(tmp_path / "base", [tmp_path / "a"], tmp_path / "merged")
    assert_close(logits(type(base(family)).from_pretrained(tmp_path / "merged").eval()), expected, rtol=1e-4, atol=1e-4)
    convert_adapter_file(tmp_path / "a", "peft", tmp_path / "b", tmp_path / "base")
    assert_close(logits(graft.PeftModel.from_pretrained(base(family), tmp_path / "b")), expected)
    assert_close(logits(graft.load_adapter(base(family), tmp_path / "a").eval()), expected)


def test_a_file_of_sglang_needs_its_base(tmp_path):
    model = with_experts("qwen3_moe")
    graft.adapter_tensors(model, layout="sglang").save(tmp_path)
    with pytest.raises(BaseNeededError, match="--base"):
        read(tmp_path)
    base("qwen3_moe").save_pretrained(tmp_path / "base")
    known = open_base(tmp_path / "base")
    adapter = read(tmp_path, known)
    assert "experts" not in {f.condition for f in check_servers(adapter, ["sglang"], known)}
    model.save_pretrained(tmp_path / "plain")
    assert "experts" in {f.condition for f in check_servers(read(tmp_path / "plain"), ["sglang"])}
    assert torch.isfinite(torch.tensor([held.scale for held in adapter.low_rank.values()])).all()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_file_of_tinker(family, tmp_path):
    """By construction, as its cookbook reads them: gate and up have a factor each that all experts share, down one."""
    model = base(family)
    model.save_pretrained(tmp_path / "base")
    n, r, alpha = 4, 3, 6
    block = model.model.layers[1].mlp.experts
    hidden, inner = model.config.hidden_size, block.down_proj.shape[1 if family == "gpt_oss" else 2]
    vocabulary, rng = model.config.vocab_size, np.random.default_rng(0)

    def some(*shape):
        return (0.1 * rng.normal(size=shape)).astype("f4")

    experts = {"w1": (some(1, r, hidden), some(n, inner, r)), "w3": (some(1, r, hidden), some(n, inner, r)),
               "w2": (some(n, r, inner), some(1, hidden, r))}  # fmt: skip
    head = some(r, hidden), some(vocabulary, r)
    o = model.model.layers[1].self_attn.o_proj
    out = some(r, o.in_features), some(o.out_features, r)
    start, attention = "base_model.model.model", "attn" if family == "gpt_oss" else "self_attn"
    tensors = {f"{start}.layers.1.mlp.experts.{name}.lora_{side}.weight": t
               for name, pair in experts.items() for side, t in zip("AB", pair, strict=True)}  # fmt: skip
    for stem, pair in (("unembed_tokens", head), (f"layers.1.{attention}.o_proj", out)):
        tensors |= {f"{start}.{stem}.lora_{side}.weight": t for side, t in zip("AB", pair, strict=True)}
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": "all-linear"}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))

    def change(pair):
        return torch.from_numpy(alpha / r * pair[1] @ pair[0])

    changed = base(family)
    own = changed.model.layers[1].mlp.experts
    gate, up, down = (change(experts[name]) for name in ("w1", "w3", "w2"))
    with torch.no_grad():
        if family == "gpt_oss":  # rows of gate and up in turn, and (in, out)
            own.gate_up_proj += torch.stack([gate, up], 2).flatten(1, 2).mT
            own.down_proj += down.mT
        else:
            own.gate_up_proj += torch.cat([gate, up], 1)
            own.down_proj += down
        changed.model.layers[1].self_attn.o_proj.weight += change(out)
        if changed.config.tie_word_embeddings:
            changed.lm_head.weight = torch.nn.Parameter(changed.lm_head.weight.clone())
        changed.lm_head.weight += change(head)
    expected = logits(changed.eval())
    assert_close(logits(graft.load_adapter(base(family), tmp_path / "a").eval()), expected, rtol=1e-4, atol=1e-5)
    graft.merge_files(tmp_path / "base", [tmp_path / "a"], tmp_path / "merged")
    assert_close(logits(type(model).from_pretrained(tmp_path / "merged").eval()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_verbs_that_compare_with_the_base_take_its_stacks(family, tmp_path):
    """Mixtral's files have a matrix for each expert, gpt-oss's have stacks (in, out)."""
    model = base(family)
    model.save_pretrained(tmp_path / "base")
    with_experts(family).save_pretrained(tmp_path / "a")
    known = open_base(tmp_path / "base")
    adapter = read(tmp_path / "a", known)
    assert [f for f in lint_adapter(adapter, known) if f.severity == "error"] == []
    compared = {m["module"]: m.get("relative") for m in inspect_adapter(adapter, known)["modules"]}
    assert all(compared[p] is not None for p in compared if "experts" not in p or family == "gpt_oss")


@pytest.mark.parametrize("layout, refused", [("sglang", True), ("sglang-shared", True), ("vllm-2d", False)])
def test_vllm_does_not_take_sglangs_layouts(layout, refused, tmp_path):
    base("qwen3_moe").save_pretrained(tmp_path / "base")
    model = with_experts("qwen3_moe")
    graft.adapter_tensors(shared(model) if layout in SHARED else model, layout=layout).save(tmp_path / "a")
    known = open_base(tmp_path / "base")
    found = {f.condition: f for f in check_servers(read(tmp_path / "a", known), ["vllm", "sglang"], known)}
    assert ("stacks_of_sglang" in found) == refused
    if refused:
        assert found["stacks_of_sglang"].verdict == "refused" and "experts" in found["stacks_of_sglang"].what
