# SPDX-License-Identifier: Apache-2.0
"""Tiny stand-ins for the models and adapters that PEFT's tests take from the hub: `python hub.py FOLDER`, with PEFT.

True architectures with random weights, in the layout of the hub's cache, so that `from_pretrained("org/name")` finds
them. hub.toml lists them; what it cannot say stands here. PEFT itself writes the adapters.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tomllib

OWNERS = {"peft": "peft-internal-testing", "hf": "hf-internal-testing", "trl": "trl-internal-testing"}
SALT = {"peft-internal-testing/tiny-random-OPTForCausalLM": "b"}  # another seed: with this one no greedy outputs tie
LISTED: dict[str, Any] = tomllib.loads(Path(__file__).with_name("hub.toml").read_text())


def config_of(shared: str, own: dict[str, Any]) -> dict[str, Any]:
    config = dict(own)
    for name in reversed(shared.split()):
        config = LISTED["configs"][name] | config
    return {field: None if value == "null" else value for field, value in config.items()}


def model(to: Path, kind: str, words: str, shared: str, config: dict[str, Any]) -> None:
    import torch
    import transformers

    name, *facts = kind.split()
    cls = getattr(transformers, name)
    made = cls(cls.config_class(**config_of(shared, config))).eval()
    if "three-tokens" in facts:  # a test compares generations of one length
        made.generation_config.min_new_tokens = made.generation_config.max_new_tokens = 3
    if "bfloat16" in facts:
        made = made.to(torch.bfloat16)
    made.save_pretrained(to)
    if words:
        TOKENIZERS[words]().save_pretrained(to)


def corpus() -> list[str]:
    """Lines of the documentation of Python's own modules."""
    found = []
    for module in (argparse, collections, json, os, pathlib, random):
        found += [module.__doc__ or "", *(getattr(vars(module)[n], "__doc__", "") or "" for n in sorted(vars(module)))]
    found.append(
        "hello world, this is a test. Classify whether the tweet is a complaint or not. "
        "Python is a programming language. "
    )
    return [line.strip() for text in found if isinstance(text, str) for line in text.splitlines() if line.strip()]


def bpe(
    specials: str, template: str = "", pair: str = "", inputs: str = "input_ids attention_mask", **roles: str
) -> Any:
    """A byte-level BPE tokenizer of 900 tokens, with the special tokens first, in this order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE(byte_fallback=False))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=specials.split(),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words.train_from_iterator(corpus(), trainer)
    if template:
        ids = [(s, words.token_to_id(s)) for s in specials.split()]
        words.post_processor = processors.TemplateProcessing(
            single=template, pair=pair or f"{template} $B", special_tokens=ids
        )
    roles = {f"{role}_token": token for role, token in roles.items()}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=inputs.split(), **roles)


def wordpiece() -> Any:
    """BERT's kind, its vocabulary counted here: the trainer breaks ties at random."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    count = collections.Counter(w for line in corpus() for w in re.findall(r"[a-z]+|[^\sa-z]", line.lower()))
    letters = sorted({c for w in count for c in w if ord(c) < 128})
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    often = [w for w, _ in sorted(count.items(), key=lambda found: (-found[1], found[0])) if len(w) > 1]
    entries += often[: 1000 - len(entries)]
    words = Tokenizer(models.WordPiece({w: i for i, w in enumerate(entries)}, unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    ends = [(s, words.token_to_id(s)) for s in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=inputs, **roles)


def opt(extra: int = 0) -> Any:
    words = bpe("<s> <pad> </s> <unk>", "</s> $A", bos="</s>", eos="</s>", unk="</s>", pad="<pad>")
    words.add_tokens([f"<extra_{i}>" for i in range(extra)])
    return words


def llama(extra: str = "") -> Any:
    return bpe(f"<unk> <s> </s> {extra}", "<s> $A", bos="<s>", eos="</s>", unk="<unk>")


def pixels() -> Any:
    from transformers import ConvNextImageProcessor

    return ConvNextImageProcessor(size={"shortest_edge": 128}, crop_pct=0.875)


END = "<|endoftext|>"
BART_ROLES = dict(bos="<s>", eos="</s>", unk="<unk>", pad="<pad>", mask="<mask>", cls="<s>", sep="</s>")
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "opt": opt,
    "gpt2": lambda: bpe(END, bos=END, eos=END, unk=END),
    "llama": llama,
    "gemma": lambda: bpe("<pad> <eos> <bos> <unk>", "<bos> $A", bos="<bos>", eos="<eos>", unk="<unk>", pad="<pad>"),
    "qwen": lambda: bpe(f"{END} <|im_start|> <|im_end|>", eos=END, pad=END),
    "bart": lambda: bpe("<s> <pad> </s> <unk> <mask>", "<s> $A </s>", "<s> $A </s> </s> $B </s>", **BART_ROLES),
    "t5": lambda: bpe("<pad> </s> <unk>", "$A </s>", eos="</s>", unk="<unk>", pad="<pad>"),
    "bert": wordpiece,
    "pixels": pixels,
}


def llava(to: Path) -> None:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    words = llama("<image> <pad>")
    words.pad_token = "<pad>"
    sees = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, projection_dim=16)
    how = dict(vision_feature_select_strategy="default")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **sees),
        text_config=LlamaConfig(**config_of("gqa llama", dict(pad_token_id=4))),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        image_seq_length=4,
        **how,
    )
    LlavaForConditionalGeneration(config).eval().save_pretrained(to)
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    marks = dict(num_additional_image_tokens=1, image_token="<image>")
    LlavaProcessor(image_processor=images, tokenizer=words, patch_size=14, **how, **marks).save_pretrained(to)


def stable_diffusion(to: Path) -> None:
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from tokenizers import pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = ["<|startoftext|>", END, *letters, *(c + "</w>" for c in letters)]
    wide = dict(block_out_channels=(32, 64))
    unet = UNet2DConditionModel(
        **wide,
        layers_per_block=2,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )
    ends = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    vae = AutoencoderKL(**wide, in_channels=3, out_channels=3, latent_channels=4, **ends)
    text = CLIPTextModel(CLIPTextConfig(**config_of("clip", dict(num_hidden_layers=5, intermediate_size=37)))).eval()
    steps = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True)
    StableDiffusionPipeline(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=text,
        tokenizer=CLIPTokenizer(vocab={w: i for i, w in enumerate(entries)}, merges=[], model_max_length=77),
        scheduler=PNDMScheduler(**steps),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(to)


def flux(to: Path) -> None:
    from diffusers import Flux2Transformer2DModel

    sizes = dict(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16
    )
    made = Flux2Transformer2DModel(
        patch_size=1, in_channels=4, timestep_guidance_channels=256, axes_dims_rope=(4, 4, 4, 4), **sizes
    )
    made.eval().save_pretrained(to / "transformer")


TINY = "peft/tiny-random-OPTForCausalLM"


def adapter(to: Path, kind: str, base: str, config: dict[str, Any], extra: int = 0, resize: bool = False) -> None:
    import transformers
    from peft import LoraConfig, get_peft_model

    loaded = getattr(transformers, kind).from_pretrained(whole(base))
    if resize:
        loaded.resize_token_embeddings(len(opt(extra)))
    saving = dict(save_embedding_layers=True) if extra else {}
    get_peft_model(loaded, LoraConfig(init_lora_weights=False, **config)).save_pretrained(to, **saving)
    (to / "README.md").unlink()
    if extra:
        opt(extra).save_pretrained(to)


def old_boft(to: Path) -> None:
    """What the test itself draws after torch.manual_seed(0), and the buffer that old releases saved."""
    import torch
    import transformers
    from peft import BOFTConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(whole(TINY)).eval()
    adapted = get_peft_model(base, BOFTConfig(init_weights=False))
    adapted.save_pretrained(to)
    (to / "README.md").unlink()
    file = to / "adapter_model.safetensors"
    values = load_file(file)
    values |= {n: b.detach().clone().contiguous() for n, b in adapted.named_buffers() if n.endswith("boft_P")}
    save_file(values, file, metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------------- the hub


def whole(name: str) -> str:
    owner, slash, rest = name.partition("/")
    return OWNERS.get(owner, owner) + slash + rest


def entries() -> Iterator[tuple[str, str, Callable[[Path], None]]]:
    """Return what stands on the hub: name, revision, and what writes it into a folder."""
    for names, how in LISTED["models"].items():
        for name in names.split():
            repo, _, revision = name.partition("@")
            yield whole(repo), revision or "main", lambda to, how=how: model(to, *how)
    for name in ("peft/tiny-LlavaForConditionalGeneration", "hf/tiny-random-LlavaForConditionalGeneration"):
        yield whole(name), "main", llava
    yield whole("hf/tiny-sd-pipe"), "main", stable_diffusion
    yield whole("hf/tiny-flux2"), "main", flux
    for name, how in LISTED["adapters"].items():
        repo, _, revision = name.partition("@")
        repo, _, below = repo.partition(":")
        yield whole(repo), revision or "main", lambda to, how=how, below=below: adapter(to / below, *how)
    here = whole("peft/tiny-opt-lora-revision")
    yield here, "main", lambda to: (to / "README.md").write_text("the adapter is in revision 'test'\n") and None
    lm = ("AutoModelForCausalLM", TINY, dict(task_type="CAUSAL_LM"))
    more = whole("peft/tiny-random-OPTForCausalLM-extended-vocab")  # 1000 tokens: the base has room for them
    yield more, "main", lambda to: adapter(to, *lm, extra=100)
    more = whole("peft/opt-tokenizer-revision")
    yield more, "main", lambda to: adapter(to, *lm, extra=150, resize=True)
    yield more, "my-revision", lambda to: adapter(to, *lm, extra=300, resize=True)
    yield whole("peft/boft-tiny-opt-peft-v0.12"), "main", old_boft


def seed(text: str) -> None:
    import numpy as np
    import torch

    number = zlib.crc32(text.encode()) & 0xFFFF
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def make(root: Path) -> None:
    for repo, revision, write in entries():
        seed(f"{repo}@{revision}{SALT.get(repo, '')}")
        commit = hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()
        folder = root / "hub" / ("models--" + repo.replace("/", "--"))
        snapshot, ref = folder / "snapshots" / commit, folder / "refs" / revision
        if snapshot.is_dir():
            continue
        print(repo, revision, flush=True)
        for needed in (snapshot.parent, ref.parent, folder / "blobs"):
            needed.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=root))
        write(unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(snapshot)
        ref.write_text(commit)
        shutil.rmtree(folder / ".no_exist", ignore_errors=True)  # what the cache noted while it was missing


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = dict(HF_HOME=str(folder), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONHASHSEED="0")
    if any(os.environ.get(name) != value for name, value in wanted.items()):  # these are read when Python starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
    import torch

    torch.set_num_threads(1)
    make(folder)
