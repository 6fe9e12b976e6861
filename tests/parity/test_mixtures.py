# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts of transformers, side by side with PEFT: targets by the names that experts had as modules.

Tiny models are made from the configs of all families; the default run takes a few of them, GRAFT_TESTS=all takes all.
"""

import contextlib
import copy
import functools
import tempfile
import warnings

import peft
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import graft
from graft.inject.experts import ExpertStacks
from tests.conformance.stores import held
from tests.covering import EVERYTHING
from tests.leaves_out import CONVERSIONS
from tests.models import seeded

pytestmark = CONVERSIONS
SIZES = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=4, num_local_experts=4, n_routed_experts=4,
    moe_num_experts=4, num_experts_per_tok=2, moe_topk=2, moe_k=2, first_k_dense_replace=1, n_group=1, topk_group=1,
    num_dense_layers=1, moe_layer_start_index=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=4,
    v_head_dim=8, max_position_embeddings=64, n_shared_experts=1, num_shared_experts=1, moe_num_shared_experts=1,
    shared_expert_intermediate_size=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, ffn_hidden_size=24,
    expert_ffn_hidden_size=8, zero_expert_num=0, num_layers=1, intermediate_size_mlp=24, decoder_sparse_step=1,
    index_n_heads=2, index_head_dim=8, index_topk=4,
)  # fmt: skip
IDS = torch.arange(24).view(2, 12) % 29 + 3
LLAMA, MIXTRAL = ["gate_proj", "up_proj", "down_proj"], ["w1", "w2", "w3"]
SAMPLE = ["mixtral", "qwen3_moe", "deepseek_v3", "qwen2_moe", "gpt_oss", "phimoe"]  # in the default run


OWN = {  # of single families
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"], mamba_n_heads=4, mamba_d_head=8),
    "mimo_v2_flash": dict(swa_num_attention_heads=2, swa_num_key_value_heads=2),
}
ODD = ("inkling2_text", "inkling2_loop_text", "dots3_note_text", "gemma4_text", "mimo_v2_flash", "zaya")  # other sizes


PEFT_LOSES = ("laguna",)  # PEFT does not find the shared experts of its own file, by transformers' renaming


def config_of(kind):
    config = transformers.AutoConfig.for_model(kind)
    given = {k: v for k, v in SIZES.items() if hasattr(config, k)} | OWN.get(kind, {})
    return type(config)(**given)


@functools.cache
def made(kind):
    with seeded(0):
        model = transformers.AutoModelForCausalLM.from_config(config_of(kind))
        for n, p in model.named_parameters():
            if p.dim() > 1 and "experts" in n:
                torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def base(kind):
    return copy.deepcopy(made(kind))


def with_experts():
    """The model types of language models that may have experts."""
    found = []
    for kind in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with contextlib.suppress(StrictDataclassError, ValueError):  # no config without arguments
            config = transformers.AutoConfig.for_model(kind)
            if kind not in ODD and any("expert" in field for field in config.to_dict()):
                found.append(kind)
    return found


FAMILIES = pytest.mark.parametrize("kind", with_experts() if EVERYTHING else SAMPLE)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def with_lora(lib, kind, targets, **config):
    config = lib.LoraConfig(**dict(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False) | config)
    with seeded(1):
        return lib.get_peft_model(base(kind), config), config


def trained(model):
    return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}


def outcome(run):
    """Return what a call returns, and the warnings; or the error."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return run(), [str(w.message) for w in said]
        except ValueError as e:
            return e, []


def targets_of(kind):
    """The old names of a family's experts, those of others, and one beside them."""
    model = base(kind)
    names = ExpertStacks(model).names
    there = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    found = [name for name in ("q_a_proj", "q_proj", "in_proj_qkvz", "in_proj_qkv", "in_proj") if name in there]
    beside = found[0] if found else "q_proj"  # which graft says is nowhere
    return [*(MIXTRAL if "w1" in names else LLAMA), beside]


@pytest.mark.differs(
    "targets by names that experts had (`gate_proj`, …), where PEFT turns them into stacks (Qwen3-MoE, DeepSeek V2 "
    "and V3, GLM-4 MoE and 20 others)"
)
@FAMILIES
def test_experts_are_targets_by_their_old_names(kind):
    """graft trains what PEFT trains, the layers that PEFT drops, and says what both leave out."""
    model, targets = base(kind), targets_of(kind)
    if not ExpertStacks(model).stacks:
        pytest.skip("no layer of so small a model has experts")
    (theirs, _), (ours, said) = (outcome(lambda lib=lib: with_lora(lib, kind, targets)) for lib in (peft, graft))
    if isinstance(theirs, ValueError):
        if isinstance(ours, ValueError):
            assert "target_parameters" in str(ours)
        else:  # the names mean nothing but experts
            assert any(".experts." in name for name in trained(ours[0]))
        return
    by_peft, by_graft = trained(theirs[0]), trained(ours[0])
    assert {name: by_graft.get(name) for name in by_peft} == by_peft
    converted = theirs[1].target_parameters or set()
    assert set(ours[1].target_parameters or ()) >= set(converted)
    assert {k: v for k, v in ours[1].rank_pattern.items() if converted} == theirs[1].rank_pattern
    assert {k: v for k, v in ours[1].alpha_pattern.items() if converted} == theirs[1].alpha_pattern
    dropped = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    dropped = {n for n in dropped if n.rpartition(".")[2] in targets}
    adapted_here = {n.removeprefix("base_model.model.").partition(".lora_")[0] for n in by_graft}
    assert dropped <= adapted_here
    of_experts = [name for name in by_graft if ".experts." in name and ".shared_experts." not in name]
    assert of_experts or any("leaves the experts out" in text and "target_parameters=['" in text for text in said)


@FAMILIES
def test_files_go_both_ways(kind, tmp_path):
    """The same tensors and the same output, whichever library wrote the file and whichever reads it."""
    targets = targets_of(kind)
    for lib, other in ((graft, peft), (peft, graft)):
        (made, _), folder = outcome(lambda lib=lib: with_lora(lib, kind, targets))[0:2], tmp_path / lib.__name__
        if isinstance(made, ValueError):
            continue
        model = made[0].eval()
        if other is peft and kind in PEFT_LOSES:
            other = graft
        model.save_pretrained(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's
            warnings.simplefilter("error", graft.PeftWarning)
            warnings.filterwarnings(
                "ignore", "target_(modules|parameters) entry '.*' matched nothing"
            )  # the family has others
            read = other.PeftModel.from_pretrained(base(kind), folder).eval()
        assert not torch.equal(logits(model), logits(base(kind)))
        assert_close(logits(read), logits(model), rtol=1e-4, atol=1e-4)
        read.save_pretrained(folder / "again")
        tensors, again = (load_file(f / "adapter_model.safetensors") for f in (folder, folder / "again"))
        assert tensors.keys() == again.keys() and all(torch.equal(t, again[k]) for k, t in tensors.items())


def old_file(folder, kind, targets, model, **config):
    """Write a file from before experts were fused; return W + ΔW of each parameter that it changes."""
    experts, tensors, changed = ExpertStacks(model), {}, {}
    scale = config.get("lora_alpha", 3) / (2**0.5 if config.get("use_rslora") else 2)

    def add(path, weight):
        A, B = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
        tensors[f"base_model.model.{path}.lora_A.weight"], tensors[f"base_model.model.{path}.lora_B.weight"] = A, B
        return weight + scale * B @ A

    with seeded(7), torch.no_grad():
        for stack in experts.stacks:
            rows = model.get_parameter(stack.path).chunk(len(stack.parts), 1)
            block = experts.find_old_path(stack.module)
            new = [
                torch.cat([add(f"{block}.{e}.{part}", W[e]) for part, W in zip(stack.parts, rows, strict=True)])
                for e in range(stack.size)
            ]
            changed[stack.path] = torch.stack(new)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in targets:
                changed[f"{name}.weight"] = add(name, module.weight)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    peft.LoraConfig(**dict(r=2, lora_alpha=3, target_modules=targets) | config).save_pretrained(folder)
    return changed


@pytest.mark.differs("a checkpoint of experts one by one (Qwen2-MoE and its like)")
@FAMILIES
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@torch.no_grad()
def test_old_files(kind, rslora, tmp_path):
    """Experts one by one, dense layers and shared experts beside them: all of it acts as it did."""
    expected, targets = base(kind), targets_of(kind)
    if not any(stack.parts for stack in ExpertStacks(expected).stacks):
        with pytest.raises(ValueError, match=r"adapter keys|not found|target_parameters"):
            old = {"base_model.model.model.layers.0.mlp.experts.0.w9.lora_A.weight": torch.ones(2, 16)}
            (tmp_path / "none").mkdir()
            save_file(old, tmp_path / "none/adapter_model.safetensors")
            peft.LoraConfig(target_modules=["w9"]).save_pretrained(tmp_path / "none")
            graft.PeftModel.from_pretrained(expected, tmp_path / "none")
        return
    changed = old_file(tmp_path / "old", kind, targets, expected, use_rslora=rslora)
    read = graft.PeftModel.from_pretrained(base(kind), tmp_path / "old")
    for name, value in changed.items():
        expected.get_parameter(name).copy_(value)
    assert_close(logits(read), logits(expected), rtol=1e-3, atol=1e-3)
    read.save_pretrained(tmp_path / "new")
    lib = graft if kind in PEFT_LOSES else peft
    again = lib.PeftModel.from_pretrained(base(kind), tmp_path / "new").eval()
    assert_close(logits(again), logits(expected), rtol=1e-3, atol=1e-3)


def test_the_rest_of_such_names_can_be_packed():
    """PEFT could not load an adapter on packed weights by their names: they are left out, unless named so."""
    model = base("deepseek_v3")
    dense = model.model.layers[0].mlp
    dense.gate_proj = held(dense.gate_proj)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = graft.plan(model, graft.LoraConfig(target_modules=LLAMA))
        graft.get_peft_model(copy.deepcopy(model), graft.LoraConfig(target_modules=LLAMA))
    path = "model.layers.0.mlp.gate_proj"
    assert path in {s.name for s in report.skipped} and path not in {m.name for m in report.matched}
    assert any(path in str(w.message) and "target_parameters" in str(w.message) for w in said)
    config = graft.LoraConfig(target_modules=LLAMA, target_parameters=[f"{path}.weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = graft.get_peft_model(model, config)
    assert f"base_model.model.{path}.lora_A.default.weight" in trained(made)


@pytest.mark.differs(
    "targets by names that experts had, where PEFT leaves the experts out (Qwen2-MoE, gpt-oss, Granite-MoE, Llama 4, …)"
)
def test_plans_name_the_experts_that_are_left_out():
    report = graft.plan(base("gpt_oss"), graft.LoraConfig(target_modules=[*LLAMA, "q_proj"]))
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"} <= {
        s.name for s in report.skipped if "target_parameters" in s.why
    }
    with pytest.raises(
        graft.NoMatchingPeftModuleError, match=r"target_parameters=\['experts.down_proj', 'experts.gate"
    ):
        graft.get_peft_model(base("gpt_oss"), graft.LoraConfig(target_modules=LLAMA))


@pytest.mark.differs(
    "targets by names that experts had, and that say more (`mlp.gate_proj`, a regex, `layers_to_transform`, rank "
    "patterns)"
)
@pytest.mark.parametrize("targets, stacked, dense", [
    ("all-linear", 1, {"0.mlp", "1.mlp.shared_experts"}),
    (r".*\.layers\.1\..*(gate_proj|up_proj|down_proj|o_proj)", 1, {"1.mlp.shared_experts"}),
    (r".*shared_experts\.\w+_proj", 0, {"1.mlp.shared_experts"}),
    (["shared_experts.up_proj", "o_proj"], 0, {"1.mlp.shared_experts"}),
    (["layers.0.mlp.up_proj"], 0, {"0.mlp"}),
], ids=("all-linear", "pattern", "shared", "names", "layer"))  # fmt: skip
def test_targets_mean_what_they_meant(targets, stacked, dense, tmp_path):
    """Whether as a list of paths, as a regex or as "all-linear"; and PEFT finds the same in the file."""
    made, _ = with_lora(graft, "deepseek_v3", targets)
    names = {n.removeprefix("base_model.model.model.layers.").partition(".lora_")[0] for n in trained(made)}
    assert {n for n in names if ".experts" in n} == {
        f"{i}.mlp.experts{s}" for i in [1] * stacked for s in ("", ".base_layer")
    }
    assert {n.rpartition(".")[0] for n in names if n.endswith("up_proj")} == dense
    made.eval().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = peft.PeftModel.from_pretrained(base("deepseek_v3"), tmp_path).eval()
    assert trained(made).keys() == {n for n, _ in read.named_parameters() if ".lora_" in n}
    assert_close(logits(read), logits(made), rtol=1e-4, atol=1e-4)


def test_ranks_by_old_names():
    """A stack has the sum over its parts, a weight what its layer has."""
    patterns = dict(rank_pattern={r"experts\.\d+\.gate_proj": 3, "mlp.up_proj": 5}, alpha_pattern={"down_proj": 7})
    made, _ = with_lora(graft, "deepseek_v3", LLAMA, **patterns)
    layers = {
        n.removeprefix("base_model.model.model.layers."): m for n, m in made.named_modules() if hasattr(m, "lora_A")
    }
    of = {name: (layer.r["default"], layer.lora_alpha["default"]) for name, layer in layers.items()}
    assert of["1.mlp.experts.base_layer"] == (3 + 2, 3 + 3) and of["1.mlp.experts"] == (2, 7)
    assert of["0.mlp.up_proj"] == (5, 3) and of["0.mlp.gate_proj"] == (2, 3) and of["0.mlp.down_proj"] == (2, 7)
    assert of["1.mlp.shared_experts.up_proj"] == (2, 3)


def test_files_of_dense_layers_alone():
    """Adapters that were made before experts were targets hold the dense layers by their old names."""
    old = {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.randn(2, 16),
           "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": torch.randn(24, 2)}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        save_file(old, f"{folder}/adapter_model.safetensors")
        peft.LoraConfig(r=2, target_modules=["mlp.up_proj"]).save_pretrained(folder)
        made = graft.PeftModel.from_pretrained(base("deepseek_v3"), folder)
    assert not torch.allclose(logits(made), logits(base("deepseek_v3")), atol=1e-3)
