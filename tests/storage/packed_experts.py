# SPDX-License-Identifier: Apache-2.0
"""Small models of which the experts are packed, and twins that hold the same values dense."""

import copy

import torch
import transformers
from packaging.version import Version
from torch import nn

from graft.storage import float8, stacks
from tests.families import SIZES
from tests.models import seeded

WIDTH, EXPERTS = 64, 5
TWO = SIZES | dict(num_experts_per_tok=2)
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def gpt_oss(width=WIDTH):
    import transformers as t

    sizes = TWO | dict(hidden_size=width, intermediate_size=width // 2, num_local_experts=EXPERTS, head_dim=32)
    return t.GptOssForCausalLM(t.GptOssConfig(**sizes, swiglu_limit=0.5))


def mixtral(width=WIDTH):
    import transformers as t

    sizes = TWO | dict(hidden_size=width, intermediate_size=width // 2, num_local_experts=EXPERTS)
    return t.MixtralForCausalLM(t.MixtralConfig(**sizes))


def made(make, **sizes):
    """Make a model; its first experts are used, its last one not."""
    with seeded(0):
        model = make(**sizes)
        for n, p in model.named_parameters():
            if "experts" in n:
                nn.init.normal_(p, std=0.2)
                p.data *= torch.linspace(0.2, 1, p.shape[-1])
    return model.eval()


def blocks(model):
    """Yield path and module of each block of experts."""
    return [(n, m) for n, m in model.named_modules() if n.endswith("experts")]


def mxfp4(model):
    """Put transformers' experts of 4 bits in the place of those of gpt-oss, with codes by hand."""
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts, Mxfp4GptOssMLP

    for path, dense in blocks(model):
        experts = Mxfp4GptOssExperts(model.config)
        for name in ("gate_up_proj", "down_proj"):
            W = getattr(dense, name).detach().mT
            scale = (W.unflatten(2, (-1, 32)).abs().amax(3).log2().floor() - 2 + 127).to(torch.uint8)
            codes = torch.stack([float8.encode_fp4(w, float8.decode_scales(s))[0] for w, s in zip(W, scale)])
            setattr(experts, f"{name}_precision_config", Precision(scale))
            getattr(experts, name).data = codes
            getattr(experts, f"{name}_bias").data = getattr(dense, f"{name}_bias").detach().clone()
        parent = path.rpartition(".")[0]
        model.set_submodule(parent, Mxfp4GptOssMLP(model.get_submodule(parent).router, experts))
    return model


class Precision:
    """What is read of the settings of Triton's kernels."""

    def __init__(self, weight_scale):
        self.weight_scale = weight_scale


def fp8(model, block=(16, 24), expert_dtype="fp8", scale_fmt="float"):
    from transformers.integrations.finegrained_fp8 import FP8Experts

    for path, dense in blocks(model):
        options = {} if expert_dtype == "fp8" else {"expert_dtype": expert_dtype}
        experts = FP8Experts(model.config, block, scale_fmt=scale_fmt, **options)
        for name in ("gate_up_proj", "down_proj"):
            getattr(experts, f"{name}_scale_inv").data.fill_(0.03 if expert_dtype == "fp8" else 0.125)
            W = getattr(dense, name).detach()
            held = stacks.find_matrices(experts, name).remake(W.__getitem__)
            held.put(experts, name)
        model.set_submodule(path, experts)
    return model


def dense_twin(model, make):
    """Return a dense model with the values of a packed one."""
    twin = make()
    state = {n: p for n, p in model.state_dict().items() if "experts" not in n}
    missing, _ = twin.load_state_dict(state, strict=False)
    assert all("experts" in n for n in missing)
    for (_, dense), (_, packed) in zip(blocks(twin), blocks(model)):
        for name in ("gate_up_proj", "down_proj"):
            held = stacks.find_matrices(packed, name)
            W = held.dense(range(held.shape[0]), torch.float32)
            getattr(dense, name).data = (W.mT if getattr(dense, "is_transposed", False) else W).contiguous()
            if hasattr(dense, f"{name}_bias"):
                getattr(dense, f"{name}_bias").data = getattr(packed, f"{name}_bias").detach().clone()
    return twin.eval()


def fp4_experts(model):
    return fp8(model, expert_dtype="fp4")


def powers(model):
    return fp8(model, scale_fmt="ue8m0")


KINDS = {
    "mxfp4": (gpt_oss, mxfp4),
    "fp8": (mixtral, fp8),
    "fp8-powers": (mixtral, powers),
    "fp4": (mixtral, fp4_experts),
}
if Version(transformers.__version__) < Version("5.24"):  # whose class of MXFP4 has another name; FP8's takes no FP4
    del KINDS["mxfp4"], KINDS["fp4"]
if not hasattr(torch, "float8_e8m0fnu"):  # torch 2.6
    del KINDS["fp8-powers"]


def both(kind):
    """Return a packed model and its dense twin."""
    make, pack = KINDS[kind]
    packed = pack(made(make))
    return packed, dense_twin(copy.deepcopy(packed), make)
