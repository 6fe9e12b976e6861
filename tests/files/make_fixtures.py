# SPDX-License-Identifier: Apache-2.0
"""Make the files in `fixtures/`: adapters written by the libraries themselves, and what each does to every weight.

`python -m tests.files.make_fixtures FOLDER NAME…`; the packages that a name needs are in
`tests/formats/`. Beside an adapter's folder stands `NAME.delta.safetensors`: the path of a module → W' − W,
by that library's own merge, or by its own forward pass where its merge is wrong.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections import defaultdict
from functools import partial

import torch
from safetensors.torch import load_file, save_file
from torch import nn

LLAMA = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=32, hidden_size=16, intermediate_size=24,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=64,
    rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=10000.0,
)  # fmt: skip


class Block(nn.Module):
    """Names with underscores of their own, and a convolution, as UNets have."""

    def __init__(self):
        super().__init__()
        self.proj_in = nn.Conv2d(6, 8, 3, padding=1)
        self.to_q = nn.Linear(8, 12)
        self.to_out = nn.ModuleList([nn.Linear(12, 8)])
        self.norm_out = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm_out(self.to_out[0](self.to_q(self.proj_in(x).mean((2, 3)))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        return sum(block(x) for block in self.down_blocks)


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def clear(folder: str) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    return folder


def fill(parameters) -> None:
    """Give parameters values that are far from where they start."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


def differences(folder: str, before: dict, after: dict) -> None:
    found = {
        name.removesuffix(".weight"): (after[name].double() - before[name].double()).float().contiguous()
        for name in before
        if name.endswith(".weight") and not torch.equal(before[name], after[name])
    }
    assert found
    save_file(found, f"{folder}.delta.safetensors")


def base_llama(folder: str) -> None:
    """A model with config.json and model.safetensors, that the other functions read."""
    clear(folder)
    generator = torch.Generator().manual_seed(3)
    c = LLAMA
    kv = c["num_key_value_heads"] * c["head_dim"]
    shapes = {"model.embed_tokens": (32, 16), "lm_head": (32, 16), "model.norm": (16,)}
    for i in range(c["num_hidden_layers"]):
        stem = f"model.layers.{i}"
        shapes |= {
            f"{stem}.self_attn.q_proj": (16, 16), f"{stem}.self_attn.k_proj": (kv, 16),
            f"{stem}.self_attn.v_proj": (kv, 16), f"{stem}.self_attn.o_proj": (16, 16),
            f"{stem}.mlp.gate_proj": (24, 16), f"{stem}.mlp.up_proj": (24, 16), f"{stem}.mlp.down_proj": (16, 24),
            f"{stem}.input_layernorm": (16,), f"{stem}.post_attention_layernorm": (16,),
        }  # fmt: skip
    tensors = {
        f"{name}.weight": torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.2
        for name, shape in shapes.items()
    }
    save_file(tensors, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(LLAMA, f, indent=1, sort_keys=True)


def llama_weights(folder: str) -> dict:
    return load_file(os.path.join(os.path.dirname(folder), "base_llama", "model.safetensors"))


def base_net(folder: str) -> None:
    clear(folder)
    save_file(net().state_dict(), os.path.join(folder, "model.safetensors"), {"format": "pt"})


def lycoris(folder: str, **options) -> None:
    from lycoris import create_lycoris

    clear(folder)
    model = net()
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=6.0, **options)
    network.apply_to()  # before which it has no parameters
    fill([p for name, p in network.named_parameters() if "dora_scale" not in name])
    for name, p in network.named_parameters():
        if "dora_scale" in name:
            p.data.mul_(1.1)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, os.path.join(folder, "adapter.safetensors"))
    after = dict(before)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            after[f"{name}.weight"] = weight_in_forward(module)
    if options["algo"] == "dylora":  # whose forward pass takes ranks at random
        for lora in network.loras:
            name = next(n for n, m in model.named_modules() if n.replace(".", "_") == lora.lora_name[len("lycoris_") :])
            after[f"{name}.weight"] = (
                before[f"{name}.weight"] + lora.get_diff_weight(rank=lora.lora_dim - 1)[0].detach()
            )
    differences(folder, before, after)


@torch.no_grad()
def weight_in_forward(module: nn.Module) -> torch.Tensor:
    """Return the weight that a layer computes with, by what it makes of impulses."""
    if isinstance(module, nn.Linear):
        return (module(torch.eye(module.in_features)) - module(torch.zeros(1, module.in_features))).T
    n, k = module.in_channels, module.kernel_size[0]
    impulses = torch.zeros(n, n, 5, 5)
    impulses[range(n), range(n), 2, 2] = 1
    y = module(impulses) - module(torch.zeros_like(impulses))  # y[p, q] = W[3 - p, 3 - q] with k = 3 and padding 1
    assert k == 3
    return torch.stack([torch.stack([y[:, :, 3 - i, 3 - j] for j in range(3)], -1) for i in range(3)], -2).transpose(
        0, 1
    )


lycoris_locon = partial(lycoris, algo="locon", conv_dim=3, conv_alpha=2.0)
lycoris_tucker = partial(lycoris_locon, use_tucker=True)
lycoris_dora = partial(lycoris, algo="locon", dora_wd=True)
lycoris_loha = partial(lycoris, algo="loha")
lycoris_lokr = partial(lycoris, algo="lokr", factor=4)
lycoris_dylora = partial(lycoris, algo="dylora", block_size=1)  # so alpha / r is what training scales the full rank by
lycoris_full = partial(lycoris, algo="full")


def mlx(folder: str, kind: str = "lora") -> None:
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.utils import linear_to_lora_layers

    clear(folder)
    model = Model(ModelArgs(**{k: v for k, v in LLAMA.items() if k != "architectures"}))
    weights = llama_weights(folder)
    model.load_weights([(k, mx.array(v.numpy())) for k, v in weights.items()])
    model.freeze()
    names = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": names}
    linear_to_lora_layers(model, 1, parameters, use_dora=kind == "dora")
    mx.random.seed(5)
    trained = {
        k: v * 1.1 if k.endswith(".m") else mx.random.normal(v.shape) * 0.3
        for k, v in tree_flatten(model.trainable_parameters())
    }
    model.update(tree_unflatten(list(trained.items())))
    mx.save_safetensors(os.path.join(folder, "adapters.safetensors"), trained)
    with open(os.path.join(folder, "adapter_config.json"), "w") as f:
        json.dump(
            {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": parameters, "model": "tiny"}, f, indent=1
        )
    fused = [(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))
    after = {k: torch.from_numpy(np.array(v)) for k, v in tree_flatten(model.parameters())}
    differences(folder, weights, {k: after[k] for k in weights})


mlx_lora, mlx_dora = mlx, partial(mlx, kind="dora")


def gguf_llama(folder: str) -> None:
    """An adapter in llama.cpp's names; what transformers, which reads models of GGUF, makes of s · B A in them."""
    import gguf
    import numpy as np
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    clear(folder)
    rng = np.random.default_rng(11)
    shapes = dict(attn_q=(16, 16), attn_k=(8, 16), attn_output=(16, 16), ffn_gate=(24, 16), ffn_down=(16, 24))
    writer = gguf.GGUFWriter(os.path.join(folder, "adapter.gguf"), "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 6.0)
    dense = os.path.join(folder, "dense.gguf")
    model = gguf.GGUFWriter(dense, "llama")
    for key, value in dict(
        context_length=64, embedding_length=16, block_count=2, feed_forward_length=24, head_count=4, head_count_kv=2
    ).items():
        getattr(model, f"add_{key}")(value)
    for block in range(2):
        for name, (rows, columns) in shapes.items():
            a, b = (rng.standard_normal(s).astype("f4") * 0.3 for s in ((4, columns), (rows, 4)))
            stem = f"blk.{block}.{name}.weight"
            writer.add_tensor(f"{stem}.lora_a", a)
            writer.add_tensor(f"{stem}.lora_b", b)
            model.add_tensor(stem, (6.0 / 4 * b.astype("f8") @ a).astype("f4"))
    for out in (writer, model):
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        named = LlamaForCausalLM(LlamaConfig(**LLAMA))
    read = load_gguf_checkpoint(dense, return_tensors=True, model_to_load=named)["tensors"]
    os.remove(dense)
    save_file({k.removesuffix(".weight"): v.contiguous() for k, v in read.items()}, f"{folder}.delta.safetensors")


def torchtune(folder: str, dora: bool = False) -> None:
    from torchtune.models import convert_weights
    from torchtune.models.llama2 import lora_llama2
    from torchtune.modules.peft import get_adapter_params, get_merged_lora_ckpt

    clear(folder)
    c = LLAMA
    heads = dict(num_heads=4, num_kv_heads=2, dim=16)
    model = lora_llama2(
        ["q_proj", "k_proj", "output_proj"], apply_lora_to_mlp=True, apply_lora_to_output=True, vocab_size=32,
        num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=16, intermediate_dim=24, max_seq_len=64, lora_rank=4,
        lora_alpha=6, use_dora=dora, norm_eps=c["rms_norm_eps"],
    )  # fmt: skip
    weights = llama_weights(folder)
    model.load_state_dict(convert_weights.hf_to_tune(weights, **heads), strict=False)
    if dora:
        for module in model.modules():
            if hasattr(module, "initialize_dora_magnitude"):
                module.initialize_dora_magnitude()
    trained = get_adapter_params(model)
    fill([p for k, p in trained.items() if "magnitude" not in k])
    for k, p in trained.items():
        if "magnitude" in k:
            p.data.mul_(torch.linspace(0.8, 1.3, p.numel()))
    torch.save({k: v.detach().clone() for k, v in trained.items()}, os.path.join(folder, "adapter_model.pt"))
    config = {
        "r": 4, "lora_alpha": 6, "peft_type": "LORA",
        "target_modules": ["q_proj", "k_proj", "output_proj", "w1", "w2", "w3", "output"],
    }  # fmt: skip
    with open(os.path.join(folder, "adapter_config.json"), "w") as f:
        json.dump(convert_weights.tune_to_peft_adapter_config(config), f)
    merged = get_merged_lora_ckpt({k: v.detach().clone() for k, v in model.state_dict().items()}, rank=4, alpha=6)
    differences(folder, weights, convert_weights.tune_to_hf(merged, **heads))


torchtune_lora, torchtune_dora = torchtune, partial(torchtune, dora=True)


def litgpt_lora(folder: str) -> None:
    import yaml
    from litgpt.lora import GPT, Config, lora_filter, merge_lora_weights
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama

    clear(folder)
    own = dict(
        name="tiny", block_size=64, vocab_size=32, padded_vocab_size=32, n_layer=2, n_head=4, n_embd=16,
        n_query_groups=2, head_size=4, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=24,
    )  # fmt: skip
    run = dict(
        lora_r=4, lora_alpha=6, lora_dropout=0.0, lora_query=True, lora_key=False, lora_value=True,
        lora_projection=True, lora_mlp=True, lora_head=True,
    )  # fmt: skip
    config = Config(**own, **run)
    model = GPT(config)
    weights, theirs = llama_weights(folder), {}
    copy_weights_hf_llama(
        config, defaultdict(lambda: defaultdict(dict)), theirs, {k: v.clone() for k, v in weights.items()}
    )
    missing = model.load_state_dict(theirs, strict=False).missing_keys
    fill([p for k, p in model.named_parameters() if "lora_" in k])
    kept = {k: v.clone() for k, v in model.state_dict().items() if lora_filter(k, v)}
    torch.save({"model": kept}, os.path.join(folder, "lit_model.pth.lora"))
    for name, fields in (("hyperparameters", run), ("model_config", own)):
        with open(os.path.join(folder, f"{name}.yaml"), "w") as f:
            yaml.safe_dump(fields, f)
    assert all("lora_" in k or "linear" in k for k in missing), missing
    merge_lora_weights(model)
    merged = {k.replace("linear.", ""): v for k, v in model.state_dict().items() if not lora_filter(k, v)}
    after: dict = {}
    copy_weights_llama(config, after, merged)
    differences(folder, weights, {k: after[k] for k in weights})


def adapterhub(folder: str, config) -> None:
    import adapters
    import transformers

    clear(folder)
    torch.manual_seed(2)
    bert = transformers.BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=8,
    )  # fmt: skip
    model = transformers.BertModel(bert)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapters.init(model)
    model.add_adapter("own", config=config)
    fill([p for k, p in model.named_parameters() if ".loras." in k])
    model.save_adapter(folder, "own", with_head=False)
    model.merge_adapter("own")
    after = {k: v for k, v in model.state_dict().items() if ".loras." not in k}
    differences(folder, before, after)
    base = clear(f"{os.path.dirname(folder)}/base_bert")
    save_file(before, os.path.join(base, "model.safetensors"), {"format": "pt"})
    with open(os.path.join(base, "config.json"), "w") as f:
        json.dump(bert.to_diff_dict() | {"architectures": ["BertModel"]}, f, indent=1, sort_keys=True)


def adapterhub_lora(folder: str) -> None:
    from adapters import LoRAConfig

    adapterhub(folder, LoRAConfig(r=4, alpha=6, attn_matrices=["q", "v"], intermediate_lora=True, output_lora=True))


def adapterhub_ia3(folder: str) -> None:
    from adapters import IA3Config

    adapterhub(folder, IA3Config())


def pipeline():
    """A pipeline of Stable Diffusion, without what LoRA has nothing to do with."""
    import transformers.integrations.peft
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    transformers.integrations.peft.check_peft_version = lambda **_: None  # 5.24 asks for more than there is
    torch.manual_seed(4)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2,
    )  # fmt: skip
    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    text = CLIPTextModel(CLIPTextConfig(**sizes, max_position_embeddings=8))
    rest = dict.fromkeys(("vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(unet=unet, text_encoder=text, requires_safety_checker=False, **rest)


def base_pipeline(folder: str) -> None:
    """Names and shapes of the pipeline: its weights are zeros, of which git makes nothing."""
    clear(folder)
    pipe = pipeline()
    with open(os.path.join(folder, "model_index.json"), "w") as f:
        json.dump({"_class_name": "StableDiffusionPipeline"}, f)
    for name, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        model = getattr(pipe, name)
        os.makedirs(os.path.join(folder, name))
        zeros = {k: torch.zeros_like(v, dtype=torch.bfloat16) for k, v in model.named_parameters()}
        save_file(zeros, os.path.join(folder, name, f"{file}.safetensors"), {"format": "pt"})
        with open(os.path.join(folder, name, "config.json"), "w") as f:
            json.dump({"_class_name": type(model).__name__}, f)


def diffusers_file(folder: str, save) -> None:
    """Have a pipeline with adapters save them by `save`, and another load and fuse what it wrote."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    clear(folder)
    pipe = pipeline()
    before = {f"{p}.{k}": v.clone() for p in ("unet", "text_encoder") for k, v in getattr(pipe, p).state_dict().items()}
    configs = {
        "unet": LoraConfig(
            r=4, lora_alpha=6, target_modules=["attn1.to_q", "attn2.to_k", "to_out.0", "conv1"],
            rank_pattern={"attn2.to_k": 3}, alpha_pattern={"attn1.to_q": 10},
        ),
        "text_encoder": LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "out_proj"]),
    }  # fmt: skip
    states = {}
    for part, config in configs.items():
        model = getattr(pipe, part)
        model.add_adapter(config)
        fill([p for k, p in model.named_parameters() if "lora_" in k])
        states[part] = {k: v.detach().clone() for k, v in get_peft_model_state_dict(model).items()}
    save(folder, states, configs)
    other = pipeline()
    other.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    other.fuse_lora(components=["unet", "text_encoder"])
    after = {}
    for part in configs:
        for k, v in getattr(other, part).state_dict().items():
            if "lora_" not in k:
                after[f"{part}.{k.replace('.base_layer', '')}"] = v
    differences(folder, before, {k: after[k] for k in before})


def diffusers_new(folder: str) -> None:
    from diffusers import StableDiffusionPipeline

    def save(where, states, configs):
        StableDiffusionPipeline.save_lora_weights(
            where, unet_lora_layers=states["unet"], text_encoder_lora_layers=states["text_encoder"],
            unet_lora_adapter_metadata=configs["unet"].to_dict(),
            text_encoder_lora_adapter_metadata=configs["text_encoder"].to_dict(),
        )  # fmt: skip

    diffusers_file(folder, save)


def diffusers_old(folder: str) -> None:
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    def save(where, states, configs):
        states = {part: convert_state_dict_to_diffusers(state) for part, state in states.items()}
        old = {"lora_A": "lora.down", "lora_B": "lora.up"}  # which that function leaves in names of convolutions
        states["unet"] = {re.sub("lora_[AB]", lambda m: old[m[0]], k): v for k, v in states["unet"].items()}
        StableDiffusionPipeline.save_lora_weights(
            where, unet_lora_layers=states["unet"], text_encoder_lora_layers=states["text_encoder"]
        )

    diffusers_file(folder, save)


def kohya_sd(folder: str) -> None:
    """By diffusers' own writer of kohya's names, whose alpha is the rank, with another alpha put in."""
    from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya

    def save(where, states, configs):
        out = {}
        for part in ("unet", "text_encoder"):
            state = {f"{part}.{k}": v for k, v in states[part].items()}
            out |= convert_state_dict_to_kohya(convert_all_state_dict_to_peft(state))
        alphas = [k for k in out if k.endswith(".alpha")]
        # one for all modules: of several, diffusers 0.42 takes one for all linear layers (ranks differ, so scales do)
        out |= {k: torch.tensor(3.0) for k in alphas}
        save_file(
            {k: v.contiguous() for k, v in out.items()}, os.path.join(where, "pytorch_lora_weights.safetensors"),
            {"ss_network_module": "networks.lora"},
        )  # fmt: skip

    diffusers_file(folder, save)


if __name__ == "__main__":
    where, *names = sys.argv[1:]
    for name in names:
        globals()[name](os.path.join(os.path.abspath(where), name))
        print(name, sorted(os.listdir(os.path.join(where, name))))
