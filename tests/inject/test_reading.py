# SPDX-License-Identifier: Apache-2.0
"""Layers whose weight the modules around them read, and do not call: adapters act there, too, or are refused."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.testing import assert_close
from transformers import CONFIG_MAPPING, FalconMambaConfig, JambaConfig, MambaConfig, MobileBertConfig, WavLMConfig

import graft
from graft.core.errors import RoutingError, UnsupportedLayerError
from graft.inject.survey import SETS_UP, SourceUses, Use, find_inner_uses
from tests.leaves_out import KERNELS_ON_CPUS
from tests.models import adapted, seeded
from tests.raised import refuses

MODELS = Path(transformers.__file__).parent / "models"
READ = re.compile(r"self\.[\w.\[\]]+\.(?:weight|bias)\b(?!\.(?:dtype|device|shape|size)\b)")
SSM = dict(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1, intermediate_size=32, time_step_rank=4)
JAMBA = dict(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_experts=2,
    num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
    use_mamba_kernels=False,  # without it transformers 4 refuses a CPU
)  # fmt: skip
WAVLM = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=[8], conv_stride=[4],
    conv_kernel=[8], num_feat_extract_layers=1, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
)  # fmt: skip
HEADS = dict(num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2)
SSD = dict(num_heads=4, head_dim=8, n_groups=1, chunk_size=4)
MIXED = dict(mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_chunk_size=4)
FAMILIES = {  # every model type with default targets for mixers that have a state
    "mamba": SSM,
    "falcon_mamba": SSM,
    "mamba2": SSM | SSD,
    "jamba": JAMBA,
    "bamba": HEADS | MIXED | dict(attn_layer_indices=[1], mamba_n_groups=1),
    "falcon_h1": HEADS | MIXED | dict(mamba_d_ssm=32),
    "zamba": HEADS | dict(
        num_hidden_layers=3, attention_head_dim=16, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
        layers_block_type=["mamba", "hybrid", "hybrid"],
    ),
    "zamba2": HEADS | dict(
        mamba_ngroups=1, n_mamba_heads=4, mamba_headdim=8, mamba_d_state=4, chunk_size=4, num_mem_blocks=1,
        layers_block_type=["mamba", "hybrid"], hybrid_layer_ids=[1],
    ),
    "granitemoehybrid": HEADS | MIXED | dict(
        layer_types=["mamba", "attention"], num_local_experts=2, num_experts_per_tok=1, shared_intermediate_size=16
    ),
    "lfm2": HEADS | dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": HEADS | dict(layer_types=["conv", "full_attention"], num_experts=2, moe_intermediate_size=16),
    "qwen3_next": HEADS | dict(
        layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
}  # fmt: skip
BERT = dict(
    vocab_size=32, hidden_size=16, embedding_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    intra_bottleneck_size=8, tie_word_embeddings=False,
)  # fmt: skip
IDS = torch.arange(12).view(2, 6)
BASES = {
    "mamba": lambda: transformers.MambaForCausalLM(MambaConfig(**SSM)),
    "falcon_mamba": lambda: transformers.FalconMambaForCausalLM(FalconMambaConfig(**SSM)),
    "jamba": lambda: transformers.JambaForCausalLM(JambaConfig(**JAMBA)),
    "wavlm": lambda: transformers.WavLMModel(WavLMConfig(**WAVLM)),
    "mobilebert": lambda: transformers.MobileBertForMaskedLM(MobileBertConfig(**BERT)),
}
MIXERS = [(name, target) for name in ("mamba", "falcon_mamba", "jamba") for target in ("dt_proj", "x_proj", "out_proj")]
OTHERS = [("wavlm", t) for t in ("q_proj", "k_proj", "v_proj", "out_proj")]
OTHERS += [("mobilebert", "predictions.decoder"), ("mobilebert", "predictions.dense")]


def base(name):
    with seeded(0):
        return BASES[name]().eval()


def output(model, name):
    if name == "wavlm":
        return model(torch.linspace(-3, 3, 400).sin().view(2, 200)).last_hidden_state
    return model(IDS).logits


def with_target(name, target, **options):
    config = graft.LoraConfig(r=2, lora_alpha=8, target_modules=[target], init_lora_weights=False, **options)
    return adapted(base(name), config, scale=0)


@pytest.mark.differs(
    "an adapter on another layer whose weight the modules around it read: `dt_proj`, `x_proj` and `out_proj` of "
    "Mamba and its kin, WavLM's projections, MobileBERT's head, queries of DETR and its kin"
)
@pytest.mark.parametrize("name, target", MIXERS + OTHERS)
def test_forward_is_merged_and_all_gets_gradients(name, target):
    model = with_target(name, target)
    plain, out = output(base(name), name), output(model, name)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert not torch.equal(out, plain)
    with model.disable_adapter():
        assert_close(output(model, name), plain)
    assert_close(output(model.merge_and_unload(), name), out)


def kernel(x, conv, conv_bias, x_proj, dt_proj, out_proj, out_bias, *args, **kwargs):
    """Use all weights, as a fused kernel of Mamba does."""
    z = F.linear(F.linear(x.transpose(1, 2)[..., : x_proj.shape[1]], x_proj)[..., : dt_proj.shape[1]], dt_proj)
    return F.linear(z, out_proj, out_bias)


@KERNELS_ON_CPUS
@pytest.mark.parametrize("target", ["x_proj", "dt_proj", "out_proj"])
@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_a_kernel_gets_the_adapted_weights(name, target, monkeypatch):
    modeling = getattr(transformers.models, name)
    monkeypatch.setattr(getattr(modeling, f"modeling_{name}"), "mamba_inner_fn", kernel)
    model = with_target(name, target, use_dora=True)
    model.config.use_cache = False
    model.train()
    plain, out = output(base(name).train(), name), output(model, name)
    assert (out - plain).abs().max() > 1e-3
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert_close(output(model.merge_and_unload().train(), name), out)


def scan(x, *args, outproj_weight, outproj_bias, **kwargs):
    """Use the last weight, as the fused kernel of Mamba 2 does."""
    return F.linear(x[..., : outproj_weight.shape[1]], outproj_weight, outproj_bias)


def missing(name):
    reason = f"transformers {transformers.__version__} has no {name}"
    return pytest.mark.skipif(name not in CONFIG_MAPPING, reason=reason)


def family(name):
    small = dict(vocab_size=32, hidden_size=16, intermediate_size=32)
    with seeded(0):
        return transformers.AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**small | FAMILIES[name])).eval()


@pytest.mark.parametrize("name", [pytest.param(name, marks=missing(name)) for name in FAMILIES])
def test_mixers_have_default_targets(name):
    model = family(name)
    plain = model(IDS).logits
    with seeded(1):
        model = graft.get_peft_model(model, graft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False))
    assert {"mixer", "mamba", "conv", "linear_attn"} & {
        part for key in model.targeted_module_names for part in key.split(".")
    }
    out = model(IDS).logits
    assert not torch.equal(out, plain)
    assert_close(model.merge_and_unload()(IDS).logits, out)


WITHOUT_WEIGHT = {  # methods that act where a layer is called, and have no weight for a kernel: what their calls need
    "EWORA": (lambda: graft.EworaConfig(r=2), {}),
    "MOELORA": (lambda: graft.MoeLoraConfig(r=2), {}),
    "MTLLORA": (lambda: graft.MtlLoraConfig(r=2, n_tasks=2), dict(task_ids=torch.tensor([0, 1]))),
    "LILY": (lambda: graft.LilyConfig(r=2), {}),
    "POLY": (lambda: graft.PolyConfig(r=2, n_tasks=2, n_skills=2), dict(task_ids=torch.tensor([0, 1]))),
    "ALORA": (lambda: graft.LoraConfig(r=2, task_type="CAUSAL_LM", alora_invocation_tokens=[3]), {}),
}


@KERNELS_ON_CPUS
@pytest.mark.filterwarnings("ignore:The invocation tokens")
@pytest.mark.parametrize("name", [pytest.param(name, marks=missing(name)) for name in FAMILIES])
@pytest.mark.parametrize("method", WITHOUT_WEIGHT)
def test_defaults_leave_out_what_a_kernel_may_take(method, name, tmp_path):
    """A first training step runs, and the file says which layers have the adapter."""
    make, more = WITHOUT_WEIGHT[method]
    with seeded(1):
        model = graft.get_peft_model(family(name), make()).train()
    model(input_ids=IDS, labels=IDS, **more).loss.backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    assert trained and any(g is not None for g in trained)
    read = name not in ("jamba", "lfm2", "lfm2_moe", "qwen3_next", "zamba")  # others may hand it to a kernel
    assert ("out_proj" in model.peft_config["default"].target_modules) != read
    model.save_pretrained(tmp_path)
    again = graft.PeftModel.from_pretrained(family(name), tmp_path)
    assert again.targeted_module_names == model.targeted_module_names


@KERNELS_ON_CPUS
@pytest.mark.parametrize("name", ["mamba2", "bamba", "falcon_h1", "zamba2", "granitemoehybrid"])
def test_the_kernel_of_mamba_2_gets_the_adapted_weight(name, monkeypatch):
    model = family(name)
    modeling = importlib.import_module(type(model).__module__)
    monkeypatch.setattr(modeling, "mamba2_split_conv1d_scan_combined", scan)
    plain = model.train()(IDS, use_cache=False).logits
    model = graft.get_peft_model(model, graft.LoraConfig(r=2, target_modules=["out_proj"], init_lora_weights=False))
    out = model(IDS, use_cache=False).logits
    assert (out - plain).abs().max() > 1e-3
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert_close(model.merge_and_unload()(IDS, use_cache=False).logits, out)


@KERNELS_ON_CPUS
def test_what_has_no_weight_to_give_out_is_refused():
    invoked = dict(task_type="CAUSAL_LM", alora_invocation_tokens=[3])
    refuses(UnsupportedLayerError, r"dt_proj.*default", with_target, "mamba", "dt_proj", **invoked)
    model = with_target("jamba", "dt_proj", **invoked)  # is called where the model is quantized
    refuses(UnsupportedLayerError, r"dt_proj.*default", model, IDS % 6)


@KERNELS_ON_CPUS
def test_rows_of_a_mixed_batch_are_refused_where_the_weight_is_read():
    model = with_target("mamba", "dt_proj")
    assert_close(model(IDS, adapter_names=["default"] * 2).logits, model(IDS).logits)
    refuses(RoutingError, "dt_proj", model, IDS, adapter_names=["default", "__base__"])
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        base = model(IDS).logits
    assert_close(model(IDS, adapter_names=["default", "__base__"]).logits, base)


class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, 16).view(4, 4))


class Shared(nn.Module):
    """Computes with a parameter of a child, and with the weight of an embedding that it also calls."""

    def __init__(self):
        super().__init__()
        self.held, self.tokens, self.last, self.head = Held(), nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, ids):
        x = self.tokens(ids).to(self.held.table.dtype)
        assert self.held.table.shape == (4, 4) and self.tokens.weight.device == ids.device
        x = F.linear(x, self.head.weight.T.mT) if self.head.weight.dtype == x.dtype else x
        return F.linear(self.last(F.linear(x, self.held.table)), self.tokens.weight)


BESIDE = dict(target_modules=["last"], init_lora_weights=False)


@pytest.mark.parametrize(
    "options",
    [
        dict(target_parameters=["held.table"]),
        dict(trainable_token_indices={"tokens": [1, 2]}),
        dict(modules_to_save=["head"]),
    ],
)
def test_a_weight_that_is_read_is_that_of_the_rows_of_the_call(options):
    config = graft.LoraConfig(**BESIDE, **options)
    with seeded(0):
        model = graft.get_peft_model(Shared(), config, "u")
        model.add_adapter("v", config)
        for name, p in model.named_parameters():
            if "delta" in name or "modules_to_save" in name:
                p.data.normal_()
    ids, want = torch.tensor([[1, 2], [2, 3]]), {}
    for name in ("v", "u"):
        model.set_adapter(name)
        want[name] = model(ids)
    with model.disable_adapter():
        want["__base__"] = model(ids)
    for name, expected in want.items():
        assert_close(model(ids, adapter_names=[name] * 2), expected)
    refuses(RoutingError, r"held|tokens|head", model, ids, adapter_names=["u", "v"])
    model.base_model.disable_adapter_layers()
    assert_close(model(ids, adapter_names=["u", "v"]), want["__base__"])


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.called, self.heads = nn.LayerNorm(4), nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])
        self.direct = nn.Linear(4, 4)

    def forward(self, x):
        x = x.to(self.called.weight.dtype) if isinstance(self.called.weight, nn.Parameter) else x
        if self.direct.bias is not None:
            x = F.layer_norm(x, (4,), self.norm.weight, self.norm.bias) @ self.direct.weight
        self.called.weight.data.clamp_(-1, 1)
        for head in self.heads:
            x = F.linear(x, head.weight)
        return self.norm(self.called(x))


class Inherits(Reader):
    pass


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.reader, self.last = Inherits(), nn.Linear(4, 4)

    def forward(self, x):
        last = self.last
        return F.linear(self.reader(x), last.weight) @ self.reader.called.weight


class HandsOn(Reader):
    def forward(self, x):
        return self.processor(self, x)

    def fuse(self):
        return torch.cat([self.direct.weight, self.called.weight])


def test_what_gets_the_module_may_call_all_within():
    """As diffusers' attentions: `direct` is read by a method, and called by their processors."""
    assert find_inner_uses(HandsOn)["direct",] == find_inner_uses(HandsOn)["called",] == Use(True, True)


def test_uses_of_a_class():
    assert find_inner_uses(Reader) == find_inner_uses(Inherits)
    reads = {path: use for path, use in find_inner_uses(Reader).items() if use.reads}
    assert reads == {("norm",): Use(True, True), ("direct",): Use(True, False), ("heads", "[]"): Use(True, False)}
    assert {path for path, use in find_inner_uses(Around).items() if use.reads} == {("last",), ("reader", "called")}


@pytest.mark.parametrize("target", ["direct", "heads.0", "last", "called"])
def test_whoever_reads_the_weight(target):
    x = torch.linspace(-1, 1, 12).view(3, 4)
    with seeded(0):
        model = graft.get_peft_model(Around(), graft.LoraConfig(target_modules=[target], init_lora_weights=False))
    before = model(x)
    assert_close(model.merge_and_unload()(x), before)


def test_a_norm_that_is_read_and_called():
    x = torch.linspace(-1, 1, 12).view(3, 4)
    model = graft.get_peft_model(Around(), graft.LNTuningConfig(target_modules=["norm"]))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.5
    before = model(x)
    assert_close(model.merge_and_unload()(x), before)


FACTS = {"dtype", "device", "shape", "size", "requires_grad"}


def children(function):
    """Return the paths of all modules of which a function computes with the weight or bias."""
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(function):
        if not isinstance(node, ast.Attribute) or node.attr not in ("weight", "bias"):
            continue
        path = re.sub(r"\[.*?\]", ".[]", ast.unparse(node.value))
        around = parents[node]
        if isinstance(around, ast.Attribute) and around.attr == "data":
            around = parents[around]
        fact = isinstance(around, ast.Attribute) and (around.attr in FACTS or re.search("[a-z]_$", around.attr))
        fact = fact or isinstance(around, ast.Compare) or isinstance(node.ctx, ast.Store)
        fact = fact or (
            isinstance(around, ast.Call) and ast.unparse(around.func).split(".")[-1] in ("isinstance", "to")
        )
        if path.startswith("self.") and not fact:
            yield tuple(path.split(".")[1:])


def test_no_model_of_transformers_reads_a_weight_unseen():
    """An independent reading of all models' sources finds nothing that `SourceUses` does not."""
    seen, unseen = [], []
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        text = file.read_text()
        lines = {text.count("\n", 0, match.start()) + 1 for match in READ.finditer(text)}
        for cls in (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)) if lines else ():
            for function in (node for node in cls.body if isinstance(node, ast.FunctionDef)):
                if SETS_UP.match(function.name) or lines.isdisjoint(range(function.lineno, function.end_lineno + 1)):
                    continue
                if not (found := set(children(function))):
                    continue
                source = SourceUses("self")
                source.visit(function)
                seen += [f"{cls.name}.{'.'.join(path)}" for path in found]
                unseen += [f"{cls.name}.{'.'.join(path)}" for path in found - source.reads]
    assert not unseen
    assert {"MambaMixer.dt_proj", "WavLMAttention.q_proj", "SamPromptEncoder.point_embed.[]"} <= set(seen)
    assert len(set(seen)) > 100
