# SPDX-License-Identifier: Apache-2.0
"""Make what a trainer of images trains: `python pictures.py FOLDER` writes a Stable Diffusion XL and pictures."""

import json
import random
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

ENDS = ("<|startoftext|>", "<|endoftext|>")
SIDE = 64  # pixels, of which the VAE makes an eighth
COLOURS = ("red", "green", "blue", "grey")


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Return one that knows bytes, and has learned no merges."""
    folder.mkdir(parents=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *ENDS]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def pipeline(folder: Path) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    words = tokenizer(folder / "words")
    text = CLIPTextConfig(
        **dict(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
        **dict(bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id),
        projection_dim=32,
    )
    small = dict(layers_per_block=1, norm_num_groups=4)
    unet = UNet2DConditionModel(
        **dict(sample_size=SIDE // 8, block_out_channels=(16, 32), attention_head_dim=4, cross_attention_dim=64),
        **dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), transformer_layers_per_block=1, **small),
        **dict(up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True),
        # the pooled text and six sizes, each in eight numbers
        **dict(addition_embed_type="text_time", addition_time_embed_dim=8),
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    vae = AutoencoderKL(
        **dict(sample_size=SIDE, block_out_channels=(8,) * 4, latent_channels=4),
        **dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **small),
    )
    return StableDiffusionXLPipeline(
        **dict(unet=unet, vae=vae, tokenizer=words, tokenizer_2=words, scheduler=DDPMScheduler()),
        **dict(text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text)),
    )


def pictures(folder: Path) -> None:
    """Write pictures of noise about a colour, which their names tell."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for number in range(8):
        middle = [draw.randrange(64, 192) for _ in range(3)]
        noise = (max(0, min(255, round(draw.gauss(m, 32)))) for _ in range(SIDE * SIDE) for m in middle)
        name = f"a {COLOURS[number % len(COLOURS)]} wall {number}.png"
        Image.frombytes("RGB", (SIDE, SIDE), bytes(noise)).save(folder / name)


def main(folder: Path) -> None:
    pipeline(folder).save_pretrained(folder / "model")
    pictures(folder / "pictures")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
