# SPDX-License-Identifier: Apache-2.0
"""diffusers' pipelines: LoRA's whole life on a UNet with a text encoder (Stable Diffusion) and a transformer (Flux)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.clients import tiny
from tests.clients.pair import scenario

UNET = dict(to_q="to_q", to_v="to_v", to_out="to_out.0", conv="conv1")


def autoencoder(channels: int):
    from diffusers import AutoencoderKL

    kinds = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    return AutoencoderKL(block_out_channels=[4, 8], latent_channels=channels, norm_num_groups=2, **kinds)


def stable_diffusion():
    """Return a tiny pipeline with a UNet and a text encoder; the same at every call."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=2,
    )  # fmt: skip
    config = CLIPTextConfig(**{**tiny.SIZES, "bos_token_id": 1, "eos_token_id": 2}, max_position_embeddings=64)
    return StableDiffusionPipeline(
        autoencoder(4), CLIPTextModel(config), tiny.tokenizer(), unet, DDIMScheduler(), None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def flux():
    """Return a tiny pipeline with a transformer; the same at every call."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), autoencoder(1), None, None, None, None, transformer)


def pictures(pipe: Any, scale: float | None = None):
    """Return latents that two steps make. With a scale: of all adapters, for this call."""
    import torch

    g = torch.Generator().manual_seed(3)
    options = dict(num_inference_steps=2, height=16, width=16, output_type="latent", generator=g)
    pipe.set_progress_bar_config(disable=True)
    if hasattr(pipe, "unet"):
        more = dict(prompt="one good two", guidance_scale=2.0, cross_attention_kwargs=scale and {"scale": scale})
    else:
        text = torch.randn(1, 5, 16, generator=g)
        more = dict(
            prompt_embeds=text, pooled_prompt_embeds=text[:, 0], joint_attention_kwargs=scale and {"scale": scale}
        )
    return pipe(**options, **more).images


def main_part(pipe: Any):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def trained(make, folder: Path, seed: int, **options) -> tuple[Path, list[float]]:
    """Train an adapter as diffusers' scripts do, save it as a pipeline's LoRA file; return where, and the losses."""
    import torch
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = make()
    model, name = main_part(pipe), "unet" if hasattr(pipe, "unet") else "transformer"
    targets = ["to_q", "to_v", "to_out.0", "conv1"] if name == "unet" else ["to_q", "to_v", "to_out.0", "proj_mlp"]
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(**{**dict(r=4, lora_alpha=8, target_modules=targets), **options}))
    parts = {name: model}
    if name == "unet" and seed == 0:
        pipe.text_encoder.requires_grad_(False)
        pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "out_proj"]))
        parts["text_encoder"] = pipe.text_encoder
    for part in parts.values():
        tiny.randomized(part.train(), seed)
    optimizer = torch.optim.AdamW([p for part in parts.values() for p in part.parameters() if p.requires_grad], 1e-2)
    losses = []
    for step in range(3):
        loss = denoising(pipe, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert len(set(losses)) == 3
    layers = {f"{p}_lora_layers": get_peft_model_state_dict(part) for p, part in parts.items()}
    pipe.save_lora_weights(folder / str(seed), **layers, **_collate_lora_metadata(parts))
    return folder / str(seed), losses


def denoising(pipe: Any, step: int):
    """A loss of the main part on random latents."""
    import torch

    g = torch.Generator().manual_seed(step)
    if hasattr(pipe, "unet"):
        ids = torch.randint(4, 20, (2, 7), generator=g)
        latents = torch.randn(2, 4, 8, 8, generator=g)
        text = pipe.text_encoder(ids)[0]
        out = pipe.unet(latents, torch.tensor([3, 90]), text).sample
    else:
        latents = torch.randn(2, 16, 4, generator=g)
        text, ids = torch.randn(2, 5, 16, generator=g), torch.zeros(16, 3)
        out = pipe.transformer(latents, text, text[:, 0], torch.tensor([0.1, 0.7]), ids, torch.zeros(5, 3)).sample
    return (out - latents).pow(2).mean()


def life(make, folder: Path) -> dict:
    """Two trained adapters: loaded, weighed, switched off, fused and unfused, deleted, saved again, unloaded."""
    import torch

    (one, losses), (two, _) = trained(make, folder, 0), trained(make, folder, 1, r=2, use_rslora=True)
    pipe = make()
    found: dict[str, Any] = {"losses": losses, "files": tiny.held(folder), "base": pictures(pipe)}
    pipe.load_lora_weights(one, adapter_name="one")
    found["one"] = pictures(pipe)
    assert not torch.allclose(found["one"], found["base"], atol=1e-3)
    found["one, at half scale"] = pictures(pipe, 0.5)
    pipe.load_lora_weights(two, adapter_name="two")
    found["both loaded"] = pictures(pipe)
    found["lists"] = [pipe.get_list_adapters(), pipe.get_active_adapters()]
    pipe.set_adapters(["one", "two"], [0.7, 0.3])
    found["weighed"] = pictures(pipe)
    pipe.set_adapters("two", 0.5)
    found["two, at half"] = pictures(pipe)
    pipe.disable_lora()
    torch.testing.assert_close(pictures(pipe), found["base"])
    pipe.enable_lora()
    torch.testing.assert_close(pictures(pipe), found["two, at half"])

    pipe.set_adapters(["one", "two"], [0.7, 0.3])
    pipe.fuse_lora(adapter_names=["one"], lora_scale=0.9)
    found["fused"], found["count"] = pictures(pipe), [pipe.num_fused_loras, sorted(pipe.fused_loras)]
    pipe.unfuse_lora()
    found["unfused"] = pictures(pipe)
    pipe.set_adapters(["one", "two"], [0.7, 0.3])
    torch.testing.assert_close(pictures(pipe), found["weighed"], rtol=1e-4, atol=1e-4)

    pipe.set_lora_device(["one"], "cpu")
    pipe.delete_adapters("two")
    found["after deleting"] = [pictures(pipe), pipe.get_list_adapters()]
    pipe.unload_lora_weights()
    torch.testing.assert_close(pictures(pipe), found["base"])
    assert not hasattr(main_part(pipe), "peft_config")

    fused = make()
    fused.load_lora_weights(one)
    fused.fuse_lora()
    fused.unload_lora_weights()
    torch.testing.assert_close(pictures(fused), found["one"], rtol=1e-4, atol=1e-4)
    found["names once fused and unloaded"] = sorted(main_part(fused).state_dict())
    return found


@scenario(tolerance=1e-4)
def test_unet(folder):
    return life(stable_diffusion, folder)


@scenario(tolerance=1e-4)
def test_transformer(folder):
    return life(flux, folder)


@scenario(tolerance=1e-4)
def test_weights_of_blocks(folder):
    """A weight for each block of the UNet."""
    pipe = stable_diffusion()
    pipe.load_lora_weights(trained(stable_diffusion, folder, 1)[0], adapter_name="one")
    pipe.set_adapters("one", {"unet": {"down": 0.2, "mid": 1.5, "up": {"block_0": 0.6}}})
    return {"pictures": pictures(pipe), "scalings": scalings(pipe)}


def scalings(pipe: Any) -> dict[str, dict[str, float]]:
    modules = main_part(pipe).named_modules()
    return {n: {k: float(v) for k, v in m.scaling.items()} for n, m in modules if hasattr(m, "scaling")}


def kohya(names: dict[str, tuple], folder: Path) -> Path:
    """Write a file as kohya's scripts do: for each layer two matrices, or convolutions, and an alpha."""
    import torch
    from safetensors.torch import save_file

    g, tensors = torch.Generator().manual_seed(5), {}
    for i, (name, (fan_out, fan_in, *kernel)) in enumerate(names.items()):
        rank = 2 + i % 2
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, fan_in, *kernel, generator=g) * 0.2
        tensors[f"{name}.lora_up.weight"] = torch.randn(fan_out, rank, *[1 for _ in kernel], generator=g) * 0.2
        tensors[f"{name}.alpha"] = torch.tensor(float(i % 3 + 1))
    save_file(tensors, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


def loaded(make, file: Path) -> dict:
    import torch

    pipe = make()
    base = pictures(pipe)
    pipe.load_lora_weights(file, adapter_name="kohya")
    configs = {n: tiny.plain({**c["kohya"].to_dict(), "peft_version": ""}) for n, c in configs_of(pipe).items()}
    found = {"pictures": pictures(pipe), "configs": configs, "scalings": scalings(pipe)}
    assert not torch.allclose(found["pictures"], base, atol=1e-3)
    found["tensors"] = tiny.tensors(main_part(pipe), ".kohya.")
    return found


def configs_of(pipe: Any) -> dict[str, Any]:
    return {n: m.peft_config for n, m in pipe.components.items() if hasattr(m, "peft_config")}


@scenario(tolerance=1e-4)
def test_kohya_unet(folder):
    block = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0"
    names = {
        f"{block}_attn1_to_q": (16, 16),
        f"{block}_attn2_to_k": (16, 16),
        f"{block}_ff_net_0_proj": (128, 16),
        "lora_unet_mid_block_resnets_0_conv1": (16, 16, 3, 3),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (16, 16),
        "lora_te_text_model_encoder_layers_1_mlp_fc1": (32, 16),
    }
    return loaded(stable_diffusion, kohya(names, folder))


@scenario(tolerance=1e-4)
def test_kohya_transformer(folder):
    """One product for q, k and v together, which diffusers takes apart."""
    names = {
        "lora_unet_double_blocks_0_img_attn_qkv": (48, 16),
        "lora_unet_double_blocks_0_img_attn_proj": (16, 16),
        "lora_unet_double_blocks_0_txt_mlp_0": (64, 16),
        "lora_unet_single_blocks_0_linear2": (16, 80),
        "lora_unet_single_blocks_0_modulation_lin": (48, 16),
    }
    return loaded(flux, kohya(names, folder))


def swapped(make, folder: Path, **compile) -> dict:
    """Adapters of two ranks and scalings, one in the other's place; compiled: once for both."""
    import torch
    from torch._dynamo.testing import CompileCounter

    seeds = (1, 2)  # the first also has a text encoder, which diffusers does not swap
    paths = [trained(make, folder, s, r=r, lora_alpha=a)[0] for s, r, a in zip(seeds, (4, 2), (8, 2))]
    pipe, count = make(), CompileCounter()
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(paths[0], adapter_name="it")
    main_part(pipe).compile(backend=count)
    first, compiled = pictures(pipe), count.frame_count
    assert compiled
    pipe.load_lora_weights(paths[1], adapter_name="it", hotswap=True)
    second = pictures(pipe)
    assert count.frame_count == compiled, "the swap compiled anew"
    for path, made in zip(paths, (first, second)):
        alone = make()
        alone.load_lora_weights(path)
        torch.testing.assert_close(pictures(alone), made, rtol=1e-4, atol=1e-4)
    return {"pictures": [first, second], "lists": pipe.get_list_adapters(), "scalings": scalings(pipe)}


@scenario(tolerance=1e-4)
def test_hotswap_unet(folder):
    return swapped(stable_diffusion, folder)


@scenario(tolerance=1e-4)
def test_hotswap_transformer(folder):
    return swapped(flux, folder)


@scenario(tolerance=1e-4)
def test_model_alone(folder):
    """A model without a pipeline: `load_lora_adapter`, `save_lora_adapter`, `fuse_lora` and `unload_lora`."""
    import torch

    path, _ = trained(flux, folder, 1)
    pipe = flux()
    model, base = pipe.transformer, pictures(pipe)
    model.load_lora_adapter(path, adapter_name="one", weight_name="pytorch_lora_weights.safetensors")
    found = {"one": pictures(pipe), "active": model.active_adapters()}
    model.save_lora_adapter(folder / "again", adapter_name="one")
    found["files"] = tiny.held(folder / "again")
    model.disable_adapters()
    torch.testing.assert_close(pictures(pipe), base)
    model.enable_adapters()
    model.fuse_lora(lora_scale=0.5)
    found["fused"] = pictures(pipe)
    model.unfuse_lora()
    found["unfused"] = pictures(pipe)  # still at half: diffusers scales the layers
    model.unload_lora()
    torch.testing.assert_close(pictures(pipe), base)
    return found


@scenario(tolerance=1e-4)
def test_other_files(folder):
    """DoRA as kohya writes it; a file without scalings, loaded with little memory."""
    import torch
    from safetensors.torch import load_file, save_file

    block, found = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0", {}
    file = kohya({f"{block}_attn1_to_q": (16, 16), f"{block}_attn2_to_out_0": (16, 16)}, folder)
    tensors = load_file(file)
    for name in (f"{block}_attn1_to_q", f"{block}_attn2_to_out_0"):
        tensors[f"{name}.dora_scale"] = torch.linspace(0.5, 2, 16)[:, None]
    save_file(tensors, folder / "dora.safetensors")
    found["dora"] = loaded(stable_diffusion, folder / "dora.safetensors")
    start = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    g = torch.Generator().manual_seed(0)
    plain = {
        f"{start}.lora_A.weight": torch.randn(3, 16, generator=g),
        f"{start}.lora_B.weight": torch.randn(16, 3, generator=g),
    }
    save_file(plain, folder / "plain.safetensors")
    pipe = stable_diffusion()
    pipe.load_lora_weights(folder, weight_name="plain.safetensors", low_cpu_mem_usage=True)
    found["plain"] = [pictures(pipe), pipe.get_list_adapters()]
    return found


@scenario(tolerance=1e-4)
def test_resumed_as_scripts_do(folder):
    """Hooks of accelerate's `save_state` write LoRA files of a UNet in half precision, and read them back."""
    import torch
    from accelerate import Accelerator
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import EMAModel, cast_training_params
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

    accelerator = Accelerator(cpu=True)
    pipe = stable_diffusion()
    unet = pipe.unet.requires_grad_(False).to(torch.bfloat16)
    unet.add_adapter(LoraConfig(r=4, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    cast_training_params(unet, dtype=torch.float32)
    found = {"dtypes": sorted({str(p.dtype) for p in unet.parameters() if p.requires_grad})}
    trains = [p for p in unet.parameters() if p.requires_grad]
    ema = EMAModel(trains)
    # no Adam, which makes much of the rounding of gradients that are nearly 0
    unet, optimizer = accelerator.prepare(tiny.randomized(unet), torch.optim.SGD(trains, 0.1))

    def write(models, weights, output):
        for model in models:
            StableDiffusionPipeline.save_lora_weights(output, unet_lora_layers=get_peft_model_state_dict(model))
            weights.pop()

    def read(models, source):
        model = models.pop()
        state, _ = StableDiffusionPipeline.lora_state_dict(source)
        state = convert_unet_state_dict_to_peft({k.removeprefix("unet."): v for k, v in state.items()})
        keys = set_peft_model_state_dict(model, state, adapter_name="default")
        assert not keys.unexpected_keys

    accelerator.register_save_state_pre_hook(write)
    accelerator.register_load_state_pre_hook(read)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    step = lambda: unet(latents, 3, torch.zeros(2, 5, 16).bfloat16()).sample.float().pow(2).mean()
    losses = []
    for i in range(4):
        if i == 2:
            accelerator.save_state(str(folder / "state"))
            kept = tiny.adapter(unet)
        loss = step()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(trains)
        losses.append(float(loss.detach()))
    accelerator.load_state(str(folder / "state"))
    for name, t in tiny.adapter(unet).items():
        torch.testing.assert_close(t, kept[name])
    assert float(step()) == losses[2]
    found.update(losses=losses, files=tiny.held(folder / "state"), ema=[t.clone() for t in ema.shadow_params])
    return found


@scenario
def test_errors(folder):
    """Types of what is raised, and what is left: names that are taken or unknown, a file for another model."""
    path, _ = trained(stable_diffusion, folder, 1)
    pipe = stable_diffusion()
    pipe.load_lora_weights(path, adapter_name="one")
    wrong = kohya({"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (24, 16)}, folder)
    calls = {
        "taken": lambda: pipe.load_lora_weights(path, adapter_name="one"),
        "unknown": lambda: pipe.set_adapters("two"),
        "deleted": lambda: pipe.delete_adapters("two"),
        "sizes": lambda: pipe.load_lora_weights(wrong, adapter_name="wrong"),
        "swap": lambda: pipe.load_lora_weights(path, adapter_name="three", hotswap=True),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing"
        except Exception as e:
            found[name] = next(t.__name__ for t in type(e).__mro__ if t.__module__ == "builtins")
        found[f"{name}, then"] = [pipe.get_list_adapters(), pictures(pipe)]
    return found
