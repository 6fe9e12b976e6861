# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # A diffusion model
#
# A small UNet from diffusers learns to draw handwritten digits of all kinds; LoRA then teaches it to draw one kind
# only. Switched off, it draws all of them again. (No package carries a small pretrained UNet, so this guide trains
# one.)

# %%
from examples.guides.start import OUT, QUICK, need

need("diffusers", "sklearn")

import torch
from diffusers import DDIMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from torch.nn import functional as F

import graft
from examples.demo.baselines import fit_probe
from examples.demo.display import progress

# %%
digits = load_digits()
labels = torch.tensor(digits.target)
images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None]  # (1797, 1, 8, 8), from -1 to 1
judge = fit_probe(images.flatten(1), labels, 10)  # says which digit a drawing shows
schedule = DDIMScheduler(200, beta_schedule="squaredcos_cap_v2")


def fit(model, images, steps, lr):
    """Train to tell the noise in noisy images; yield the loss of each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for _ in range(steps):
        clean = images[torch.randint(len(images), (64,))]
        noise, times = torch.randn_like(clean), torch.randint(200, (64,))
        loss = F.mse_loss(model(schedule.add_noise(clean, noise, times), times).sample, noise)
        loss.backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
        yield loss.item()


@torch.no_grad()
def draw(model, count):
    """Images from noise, in 25 steps."""
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    schedule.set_timesteps(25)
    for t in schedule.timesteps:
        x = schedule.step(model(x, t).sample, t, x).prev_sample
    return x


def show(name, drawings):
    """Four drawings as text, and the share of each digit among all of them."""
    print(f"\n{name}")
    for rows in zip(*drawings[:4, 0].tolist()):
        print("   ".join("".join(" .:*#"[min(4, max(0, int(2.5 * v + 2.5)))] * 2 for v in row) for row in rows))
    shares = judge(drawings.flatten(1)).argmax(-1).bincount(minlength=10) / len(drawings)
    print("  ".join(f"{digit}: {share:.2f}" for digit, share in enumerate(shares.tolist())))


# %%
torch.manual_seed(0)
steps, drawn = (3, 8) if QUICK else (500, 100)
down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
sizes = dict(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 64), layers_per_block=1)
unet = UNet2DModel(**sizes, down_block_types=down, up_block_types=up, norm_num_groups=8, attention_head_dim=8)
losses = progress(fit(unet, images, steps, 2e-3), "the UNet, all digits", steps)
show("without adapter", draw(unet, drawn))

# %% [markdown]
# LoRA on attention and convolutions, trained on the threes alone.

# %%
config = graft.LoraConfig(r=8, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"])
model = graft.get_peft_model(unet, config)
model.print_trainable_parameters()
steps = 3 if QUICK else 200
losses = progress(fit(model, images[labels == 3], steps, 2e-3), "an adapter, threes", steps)
show("with the adapter", draw(model, drawn))
with model.disable_adapter():
    show("with the adapter disabled", draw(model, drawn))
model.save_pretrained(OUT / "diffusion")
