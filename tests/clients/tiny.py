# SPDX-License-Identifier: Apache-2.0
"""Tiny models, tokenizers and data, made on the spot, and what a folder of files holds."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Any

import torch

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDS = [*NUMBERS, "plus", "minus", "is", "not", "good", "bad", "very", "the", "a"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHAT = "{% for m in messages %}<s> {{ m['content'] }} </s>{% endfor %}{% if add_generation_prompt %}<s> {% endif %}"


def tokenizer(**options: Any) -> Any:
    """Return a fast tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made = PreTrainedTokenizerFast(tokenizer_object=words, **tokens, model_max_length=64, **options)
    made.chat_template = CHAT
    return made


SIZES = dict(
    vocab_size=len(SPECIAL) + len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, pad_token_id=0, initializer_range=0.2,  # outputs that a few steps change
)  # fmt: skip


def llama(cls: str = "LlamaForCausalLM", seed: int = 0, **options: Any) -> Any:
    """Return a Llama of two layers, by default for causal language modelling."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **{**SIZES, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64, **options}
    )
    return getattr(transformers, cls)(config)


def bert(cls: str = "BertForSequenceClassification", seed: int = 0, **options: Any) -> Any:
    """Return a BERT of two layers, by default for two classes."""
    import transformers

    torch.manual_seed(seed)
    return getattr(transformers, cls)(transformers.BertConfig(**SIZES, max_position_embeddings=64, **options))


def sentences(n: int, seed: int = 0, words: int = 6) -> list[str]:
    g = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=g)) for _ in range(n)]


def losses(trainer: Any) -> dict[str, list[float]]:
    """Return what a trainer logged, by name, without times."""
    logged: dict[str, list[float]] = {}
    for line in trainer.state.log_history:
        for name, value in line.items():
            timing = name.endswith(("runtime", "per_second", "_flos", "_time")) or "/time" in name
            if isinstance(value, (int, float)) and not timing:
                logged.setdefault(name, []).append(float(value))
    return logged


def held(folder: Path | str) -> dict[str, Any]:
    """Return the names of all files below a folder, and what adapter files and their configs hold."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted(Path(folder).rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            found[name] = load_file(file)
        elif file.name == "adapter_config.json":
            config = json.loads(file.read_text())
            config.pop("peft_version", None)
            found[name] = plain(config)
        elif file.is_file():
            found[name] = "a file"
    assert found, f"{folder} holds no files"
    return found


def plain(value: Any) -> Any:
    """Sort lists of names, each once: PEFT writes sets in arbitrary order, and some of `modules_to_save` twice."""
    if isinstance(value, (list, set)):
        return sorted({str(v) for v in value})
    if isinstance(value, Enum):
        return value.value
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def adapter(model: Any) -> dict[str, torch.Tensor]:
    """Return copies of all that trains, by name in memory."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def randomized(model: Any, seed: int = 1) -> Any:
    """Give all that trains small random values, so that an adapter acts."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            p[1].copy_(torch.randn(p[1].shape, generator=g) * 0.2)
    return model


def tensors(model: Any, part: str) -> dict[str, torch.Tensor]:
    """Return copies of the parameters whose names contain `part`."""
    found = {name: p.detach().clone() for name, p in model.named_parameters() if part in name}
    assert found, f"no parameter with {part} in its name"
    return found


def library() -> str:
    """Return whose `peft` is imported: "graft" or "peft"."""
    import peft

    return peft.LoraConfig.__module__.partition(".")[0]
