# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # A vision model
#
# EfficientNet-Lite0 (4.7 M parameters) has learned ImageNet's thousand classes. LoRA on its convolutions teaches it
# handwritten digits from 300 images, and a linear probe on its frozen features says what can be had without.

# %%
from examples.guides.start import OUT, QUICK, need

need("sklearn")

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import graft
from examples.demo.baselines import fit_probe
from examples.demo.display import progress
from examples.guides.efficientnet import load

# %%
digits = load_digits()
labels = torch.tensor(digits.target)
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]  # (1797, 1, 8, 8), from 0 to 1
pixels = F.interpolate(images, (64, 64), mode="bilinear").expand(-1, 3, -1, -1)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train, test = order[:300], order[300 : 400 if QUICK else None]


@torch.no_grad()
def run(function):
    """The outputs for all images to train on and to test on."""
    return [torch.cat([function(pixels[part]) for part in rows.split(128)]) for rows in (train, test)]


def right(logits):
    return (logits.argmax(-1) == labels[test]).float().mean().item()


# %% [markdown]
# Without an adapter: a linear classifier on what ImageNet's network says about the digits.

# %%
model = load()
seen, held_out = run(model.features)
probe = right(fit_probe(seen, labels[train], 10)(held_out))

# %% [markdown]
# With one: LoRA on the 1×1 convolutions, which hold nine tenths of the weights, and a new head. The network stays in
# evaluation mode, so its batch norms keep ImageNet's statistics.

# %%
torch.manual_seed(0)
model._fc = torch.nn.Linear(1280, 10)
config = graft.LoraConfig(
    r=4, lora_alpha=8, target_modules=["_expand_conv", "_project_conv", "_conv_head"], modules_to_save=["_fc"]
)
model = graft.get_peft_model(model, config).eval()
model.print_trainable_parameters()
steps = 3 if QUICK else 100


def fit():
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        rows = train[torch.randperm(len(train))[:32]]
        loss = F.cross_entropy(model(pixels[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()


losses = progress(fit(), "digits", steps)
adapted = run(model)[1]
print(f"{len(test)} held-out digits: linear probe {probe:.3f}, adapter {right(adapted):.3f}")

# %% [markdown]
# Merged, the adapter is gone and the convolutions are as fast as before.

# %%
model.save_pretrained(OUT / "vision")
merged = model.merge_and_unload()
print(f"merged: logits differ by at most {(run(merged)[1] - adapted).abs().max().item():.0e}")
