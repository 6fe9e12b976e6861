# SPDX-License-Identifier: Apache-2.0
"""Make what a trainer trains: `python tiny.py FOLDER` writes a model, its tokenizer and data."""

import json
import random
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return one that knows bytes and these special tokens, and has learned no merges."""
    letters = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=CHAT, model_max_length=512, **special)


def data(folder: Path) -> None:
    """Write sums to learn, a conversation a line, for SFT, DPO and KTO: `sft.jsonl` …"""
    draw = random.Random(0)
    with ExitStack() as stack:
        sft, dpo, kto = (stack.enter_context((folder / f"{name}.jsonl").open("w")) for name in ("sft", "dpo", "kto"))
        for _ in range(32):
            a, b = draw.randint(1, 99), draw.randint(1, 99)
            asked = {"role": "user", "content": f"What is {a} + {b}?"}
            right, wrong = ({"role": "assistant", "content": f"It is {c}."} for c in (a + b, a - b))
            sft.write(json.dumps({"messages": [asked, right]}) + "\n")
            pair = {"messages": [asked, right], "prompt": [asked], "chosen": right, "rejected": wrong}
            dpo.write(json.dumps(pair | {"rejected_response": wrong["content"]}) + "\n")
            for answer in (right, wrong):
                kto.write(json.dumps({"messages": [asked, answer], "label": answer is right}) + "\n")


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    words = tokenizer()
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    sizes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config = LlamaConfig(vocab_size=len(words), max_position_embeddings=512, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    data(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
