# SPDX-License-Identifier: Apache-2.0
"""A base that every server runs, and adapters broken on purpose."""

from __future__ import annotations

import json
import shutil

from graft.files.tensors import read_header, write_safetensors
from tests.files import adapters
from tests.models import seeded

OPTIONS = adapters.LORA | {
    "qalora": dict(use_qalora=True, qalora_group_size=16), "high": dict(r=4, rank_pattern={"up_proj": 65}),
}  # fmt: skip


def model():
    """A base that vLLM's kernels for CPUs take: heads of 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    with seeded(0):
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=512, max_position_embeddings=256, initializer_range=0.08, **sizes)
        ).eval()


def words(n):
    """A tokenizer of n words, which servers want to see."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", bos_token="w1", eos_token="w2")


def broken(tmp_path, path, change_config=None, change_name=None, change=None):
    """Return a copy of an adapter with another config, names or tensors."""
    out = tmp_path / "broken"
    shutil.copytree(path, out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | (change_config or {})))
    tensors, _ = read_header(out / "adapter_model.safetensors")
    tensors = {(change_name or str)(name): t for name, t in tensors.items() if change is None or change(name)}
    write_safetensors(str(out / "adapter_model.safetensors"), tensors, {"format": "pt"})
    return out
