# SPDX-License-Identifier: Apache-2.0
"""Bottlenecks, ReFT and steering vectors in diffusers' models: at their attentions and MLPs, or refused."""

import pytest
import torch

import graft
from graft.core.errors import UnsupportedLayerError

pytest.importorskip("diffusers")

from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DModel

from tests.clients.test_diffusers import flux
from tests.clients.test_timesteps import dit, inputs, unet
from tests.looks import layers

pytestmark = pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")


def pixart():
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        patch_size=2, norm_num_groups=2, cross_attention_dim=16, caption_channels=16,
    ).eval()  # fmt: skip


def run_pixart(model, x, text, t):
    sizes = dict(resolution=None, aspect_ratio=None)
    return model(x, text, t.expand(len(x)), added_cond_kwargs=sizes, return_dict=False)[0]


BASES = {  # model, blocks, attentions to a text in each, and its call
    "unet": (unet, 4, 1, lambda model, x, text, t: model(x, t, text).sample),
    "dit": (dit, 1, 0, lambda model, x, _, t: model(x, t.expand(len(x)), torch.arange(len(x))).sample),
    "pixart": (pixart, 1, 1, run_pixart),
}
DOUBLE = graft.BottleneckConfig.preset("double_seq_bn", reduction_factor=2)
CROSS = graft.BottleneckConfig.preset("double_seq_bn", reduction_factor=2, cross_adapter=True)
CONFIGS = {  # config → places in a block
    "seq_bn": (graft.BottleneckConfig.preset("seq_bn", reduction_factor=2), lambda _: 1),
    "double_seq_bn": (DOUBLE, lambda _: 2),
    "cross": (CROSS, lambda crosses: 2 + crosses),
    "par_bn": (graft.BottleneckConfig.preset("par_bn"), lambda _: 2),
    "adapter_plus": (graft.BottleneckConfig.preset("adapter_plus", reduction_factor=2), lambda _: 1),
    "reft": (graft.ReftConfig(), lambda _: 1),
    "steering": (graft.SteeringConfig(), lambda _: 1),
}


@pytest.mark.parametrize("label", CONFIGS)
@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_adapters_stand_in_each_block(name, label):
    (make, blocks, crosses, run), (config, count) = BASES[name], CONFIGS[label]
    x, text = inputs()
    t = torch.tensor(5)
    plain = run(make(), x, text, t)
    model = graft.get_peft_model(make(), config).eval()
    assert len(layers(model)) == blocks * count(crosses)
    at_text = [path for path in layers(model) if ".attn2." in path]
    assert len(at_text) == (blocks * crosses if label == "cross" else 0)
    for path, p in model.named_parameters():
        if any(part in path for part in ("bottleneck_", "reft_", "steering_")):
            p.add_(torch.randn_like(p) * 0.3)
    assert (run(model, x, text, t) - plain).abs().max() > 1e-3


def sd3():
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
    )  # fmt: skip


def images():
    return UNet2DModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, attention_head_dim=4, norm_num_groups=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


@pytest.mark.parametrize("label", CONFIGS)
@pytest.mark.parametrize("make", [lambda: flux().transformer, sd3, images], ids=["flux", "sd3", "unet2d"])
def test_blocks_of_two_streams_or_of_convolutions_are_refused(make, label):
    with pytest.raises(UnsupportedLayerError, match="its first output is no sum"):
        graft.get_peft_model(make(), CONFIGS[label][0])
