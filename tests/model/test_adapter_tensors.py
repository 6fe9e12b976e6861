# SPDX-License-Identifier: Apache-2.0
"""Adapters as tensors for servers: each layout of experts says the same, and comes back."""

import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import graft
from graft.core.errors import LossError
from tests.families import FAMILIES, IDS, base
from tests.leaves_out import FUSED_EXPERTS
from tests.looks import layers
from tests.models import adapted, make, seeded
from tests.raised import refuses

pytestmark = FUSED_EXPERTS
LAYOUTS = ["peft", "vllm", "vllm-2d", "vllm-3d", "sglang"]
KINDS = ["qwen3_moe", "mixtral", "gpt_oss", "llama4", "nemotron_h", "granitemoe"]  # one of each way to hold experts
BOTH, UP, DOWN = ("gate_up_proj", "down_proj"), ("gate_up_proj",), ("down_proj",)


def with_experts(family, stacks=BOTH, lib=graft, **options):
    ungated, output = family == "nemotron_h", "out_proj" if family == "lfm2_moe" else "o_proj"
    given = dict(
        r=2, lora_alpha=3, init_lora_weights=False, target_modules=[output], rank_pattern={output: 3},
        target_parameters=[f"experts.{s.replace('gate_up', 'up') if ungated else s}" for s in stacks],
    )  # fmt: skip
    return adapted(base(family), lib.LoraConfig(**given | options), lib=lib, scale=0)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def shared(model):
    """Give all experts one A for the input and one B for the output."""
    for name, p in model.named_parameters():
        if "experts" in name and ("base_layer.lora_A" in name):
            p.data.copy_(p.data.view(4, -1, p.shape[1])[:1].expand(4, -1, -1).reshape(p.shape))
        if "experts.lora_B" in name:
            p.data.copy_(p.data.view(p.shape[0], -1, 4)[..., :1].expand(-1, -1, 4).reshape(p.shape))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layout_comes_back(family, tmp_path):
    model = with_experts(family)
    expected = logits(model)
    assert not torch.allclose(logits(base(family)), expected, atol=1e-2)
    for layout in LAYOUTS if family in KINDS else ["vllm", "sglang"]:
        if (family, layout) == ("llama4", "vllm-3d"):
            continue
        made = graft.adapter_tensors(model, layout=layout)
        made.save(tmp_path / layout)
        back = graft.PeftModel.from_pretrained(base(family), tmp_path / layout)
        assert_close(logits(back), expected, msg=lambda text, at=layout: f"{at}: {text}")
        ranks = {name: p.shape for name, p in back.named_parameters() if "experts" in name and "lora_A" in name}
        assert all(shape[0] == 4 * (3 if layout == "sglang" else 2) for shape in ranks.values())


@pytest.mark.parametrize("stacks", [UP, DOWN], ids=["up", "down"])
@pytest.mark.parametrize("family", KINDS)
def test_one_stack_of_two(family, stacks, tmp_path):
    """Servers want both: the other one is zeros there, and is gone when it comes back."""
    model = with_experts(family, stacks)
    for layout in LAYOUTS:
        if (family, layout) == ("llama4", "vllm-3d"):
            continue
        graft.adapter_tensors(model, layout=layout).save(tmp_path / layout)
        back = graft.PeftModel.from_pretrained(base(family), tmp_path / layout)
        assert_close(logits(back), logits(model))
        assert {n for n, _ in back.named_parameters() if "lora" in n} == {
            n for n, _ in model.named_parameters() if "lora" in n
        }


@pytest.mark.parametrize("layout", ["vllm-shared", "sglang-shared"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "llama4", "nemotron_h"])
def test_factors_that_all_experts_share(family, layout, tmp_path):
    model = with_experts(family)
    if family != "llama4":  # with A and B exchanged here
        made = graft.adapter_tensors(shared(model), layout=layout)
        outs = ("w2", "down_proj")
        for key, t in made.tensors.items():
            part, side = re.search(r"experts\.(\w+)\.lora_([AB])", key).groups() if "experts" in key else ("", "")
            assert t.dim() == (3 if part else 2)
            assert not part or len(t) == (1 if (part in outs) == (side == "B") else 4)
        made.save(tmp_path)
        assert_close(logits(graft.PeftModel.from_pretrained(base(family), tmp_path)), logits(model))
    refuses(LossError, "the experts' A of the input differ", graft.adapter_tensors, with_experts(family), layout=layout)


# plain LoRA


def plain(**options):
    with seeded(1):
        config = graft.LoraConfig(**dict(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False) | options)
        return graft.get_peft_model(make("llama"), config).eval()


def of_llama(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(12).view(2, 6)).logits


@pytest.mark.parametrize("layout", ["peft", "vllm", "sglang"])
@pytest.mark.parametrize(
    "options",
    [dict(lora_alpha=5), dict(use_rslora=True), dict(rank_pattern={"q_proj": 3}, alpha_pattern={"0.mlp.up_proj": 9}),
     dict(target_modules=r".*layers\.1.*(q|v)_proj"), dict(init_lora_weights="pissa"), dict(init_lora_weights="olora"),
     dict(target_modules=["embed_tokens", "v_proj"]), dict(target_modules=[], target_parameters=["q_proj.weight"]),
     dict(velora_config=graft.VeloraConfig())],
    ids=["alpha", "rslora", "patterns", "regex", "pissa", "olora", "embedding", "parameter", "velora"],
)  # fmt: skip
def test_what_plain_lora_is_there(layout, options, tmp_path):
    """PEFT's own loader, on a fresh base, says the same: the scale is 1, and what a start took out is subtracted."""
    model = plain(**options)
    for p in model.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(7)) / 5
    made = graft.adapter_tensors(model, layout=layout)
    assert made.config["lora_alpha"] == made.config["r"] and made.config["alpha_pattern"] == made.config["rank_pattern"]
    assert isinstance(made.config["target_modules"], list) and json.dumps(made.config)
    assert list(made.tensors) == sorted(made.tensors) and all(t.is_contiguous() for t in made.tensors.values())
    assert not any(t.requires_grad or t.data_ptr() in {p.data_ptr() for p in model.parameters()}
                   for t in made.tensors.values())  # fmt: skip
    made.save(tmp_path)
    assert_close(of_llama(peft.PeftModel.from_pretrained(make("llama"), tmp_path).eval()), of_llama(model))
    assert_close(of_llama(graft.PeftModel.from_pretrained(make("llama"), tmp_path)), of_llama(model))
    if layout == "sglang":
        assert len({t.shape[-2] for key, t in made.tensors.items() if "_A" in key}) == 1


def test_the_same_as_save_pretrained_where_there_is_nothing_to_change(tmp_path):
    model = plain(lora_alpha=2)
    model.save_pretrained(tmp_path)
    saved, made = load_file(tmp_path / "adapter_model.safetensors"), graft.adapter_tensors(model)
    assert saved.keys() == made.tensors.keys() and all(torch.equal(saved[key], made.tensors[key]) for key in saved)


def test_needs_digest_and_dtype():
    model = plain(r=12)
    made = graft.adapter_tensors(model, layout="vllm")
    assert made.needs == {
        "max_lora_rank": 16, "flags": ["--enable-lora", "--max-lora-rank", "16"], "is_3d_lora_weight": False,
    }  # fmt: skip
    assert made.digest == graft.adapter_tensors(model, layout="vllm").digest != graft.adapter_tensors(plain()).digest
    half = graft.adapter_tensors(model, dtype=torch.bfloat16).tensors
    assert {t.dtype for t in half.values()} == {torch.bfloat16}
    of = graft.adapter_tensors(with_experts("mixtral"), layout="vllm-3d").needs
    assert of["is_3d_lora_weight"] and "--enable-mixed-moe-lora-format" in of["flags"]
    of = graft.adapter_tensors(with_experts("gpt_oss"), layout="vllm").needs
    assert of["is_3d_lora_weight"] and "--enable-mixed-moe-lora-format" not in of["flags"]


def test_all_reasons_at_once(monkeypatch):
    from graft.model import adapter_tensors as module

    def collect(*_, **__):
        raise AssertionError("it has begun to collect")

    monkeypatch.setattr(module.save, "get_peft_model_state_dict", collect)
    model = plain(use_dora=True, modules_to_save=["lm_head"], bias="none")
    with pytest.raises(LossError) as raised:
        graft.adapter_tensors(model, layout="vllm")
    assert "Dora does more than to add B A" in str(raised.value).replace("DoRA", "Dora")
    assert "lm_head" in str(raised.value)
    for options, text in (
        (dict(kasa_config=graft.KasaConfig()), "lora_diag"),
        (dict(use_qalora=True, qalora_group_size=4), "no whole matrices"),
        (dict(alora_invocation_tokens=[1], task_type="CAUSAL_LM"), "does more than to add B A"),
        (dict(trainable_token_indices=[1]), "embed_tokens"),
    ):
        refuses(LossError, text, graft.adapter_tensors, plain(**options))
    with pytest.raises(LossError, match="it is LOHA, and servers load LoRA: convert it"):
        graft.adapter_tensors(graft.get_peft_model(make("llama"), graft.LoHaConfig(target_modules=["q_proj"])))
    with pytest.raises(LossError, match="holds its stacks the other way round: take 'vllm-2d'"):
        graft.adapter_tensors(with_experts("llama4"), layout="vllm-3d")
    refuses(graft.ConfigError, r"layout='tgi': one of peft, vllm", graft.adapter_tensors, model, layout="tgi")


def test_save_pretrained_in_a_layout(tmp_path):
    model = with_experts("mixtral")
    model.save_pretrained(tmp_path, layout="vllm")
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.1.block_sparse_moe.experts.3.w3.lora_B.weight" in keys
    assert_close(logits(graft.PeftModel.from_pretrained(base("mixtral"), tmp_path)), logits(model))
    with pytest.raises(graft.ConfigError, match="give one of the two"):
        model.save_pretrained(tmp_path / "no", layout="vllm", for_server="vllm")
    assert not (tmp_path / "no").exists()


def test_experts_by_sglang_of_others(tmp_path):
    """A file with a scaling of its own, half precision and without a version."""
    model = with_experts("gpt_oss", lora_alpha=3)
    made = graft.adapter_tensors(model, layout="sglang", dtype=torch.bfloat16)
    config = made.lora_config
    config.lora_alpha *= 2  # B is half of what it was
    config.alpha_pattern, config.peft_version = {}, None
    halved = {key: t / 2 if "lora_B" in key else t for key, t in made.tensors.items()}
    graft.io.files.save_adapter(str(tmp_path), halved, config, True, {})
    found = graft.PeftModel.from_pretrained(base("gpt_oss"), tmp_path)
    assert_close(logits(found), logits(model), atol=3e-2, rtol=3e-2)
    assert {layer.scaling["default"] for layer in layers(found).values()} == {2.0}


def test_what_a_stack_is():
    """The servers' own reshapes of the flat layout give each expert its factors."""
    made = graft.adapter_tensors(with_experts("qwen3_moe"), layout="vllm-3d").tensors
    two = graft.adapter_tensors(with_experts("qwen3_moe"), layout="vllm-2d").tensors
    stem = "base_model.model.model.layers.0.mlp.experts"
    A, B = made[f"{stem}.lora_A.weight"], made[f"{stem}.lora_B.weight"]
    of_each = A.reshape(4, -1, A.shape[-1]), B.reshape(B.shape[0], -1, 4).permute(2, 0, 1)  # vLLM's lines
    for e in range(4):
        assert torch.equal(of_each[0][e], two[f"{stem}.{e}.down_proj.lora_A.weight"])
        assert torch.equal(of_each[1][e], two[f"{stem}.{e}.down_proj.lora_B.weight"])
