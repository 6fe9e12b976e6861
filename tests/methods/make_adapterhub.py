# SPDX-License-Identifier: Apache-2.0
"""Make `fixtures/adapterhub`: adapters of AdapterHub's library on tiny models, and what it computes with them.

`make test-oracles` makes them anew. For each model a folder with the base. `adapters.safetensors` has the tensors of
all adapters and their configs, as the library saves them (three of them in folders of their own), `outputs.safetensors`
inputs and the library's outputs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

WHOLE = {("bert", "houlsby"), ("bert", "compacter"), ("llama", "loreft")}
WHOLLY = ("bert", "roberta", "llama", "gpt2", "t5", "vit")  # models with adapters of all kinds
PICTURES = ("vit", "beit", "clip_vision_model")
TWOFOLD = ("t5", "mt5", "bart", "mbart", "plbart", "whisper")
SIZES = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)


def models():
    import transformers as t

    torch.manual_seed(0)
    bert = dict(vocab_size=17, max_position_embeddings=16, type_vocab_size=2, pad_token_id=0, **SIZES)
    llama = dict(vocab_size=17, max_position_embeddings=16, num_key_value_heads=1, tie_word_embeddings=False, **SIZES)
    gpt2 = dict(
        vocab_size=17, n_embd=8, n_layer=2, n_head=2, n_positions=16, n_inner=12, bos_token_id=0, eos_token_id=0
    )
    t5 = dict(vocab_size=17, d_model=8, d_ff=12, d_kv=4, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ids = dict(bos_token_id=1, eos_token_id=2)
    speech = ids | dict(
        vocab_size=17, d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, pad_token_id=0,
        decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, decoder_start_token_id=1,
    )  # fmt: skip
    bart = dict(max_position_embeddings=16, forced_eos_token_id=2, **speech)
    image = dict(image_size=8, patch_size=4, num_channels=1, **SIZES)
    gemma = dict(head_dim=4, pad_token_id=0, **ids, **llama)
    return {
        "bert": t.BertModel(t.BertConfig(**bert)),
        "roberta": t.RobertaModel(t.RobertaConfig(**bert)),
        "llama": t.LlamaModel(t.LlamaConfig(**llama)),
        "gpt2": t.GPT2Model(t.GPT2Config(**gpt2)),
        "t5": t.T5ForConditionalGeneration(t.T5Config(**t5)),
        "vit": t.ViTModel(t.ViTConfig(**image)),
        # with fewer adapters: see `configs`
        "albert": t.AlbertModel(t.AlbertConfig(embedding_size=6, **bert)),
        "bart": t.BartModel(t.BartConfig(**bart)),
        "mbart": t.MBartModel(t.MBartConfig(**bart)),
        "plbart": t.PLBartModel(t.PLBartConfig(**bart)),
        "beit": t.BeitModel(t.BeitConfig(layer_scale_init_value=0.5, **image)),
        "bert-generation": t.BertGenerationEncoder(t.BertGenerationConfig(**ids, **bert)),
        "clip_text_model": t.CLIPTextModel(
            t.CLIPTextConfig(
                vocab_size=17, max_position_embeddings=16, bos_token_id=0, eos_token_id=2, projection_dim=8, **SIZES
            )
        ),
        "clip_vision_model": t.CLIPVisionModel(t.CLIPVisionConfig(projection_dim=8, **image)),
        "deberta-v2": t.DebertaV2Model(
            t.DebertaV2Config(
                relative_attention=True, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", share_att_key=True,
                position_buckets=8, **bert,
            )
        ),
        "distilbert": t.DistilBertModel(
            t.DistilBertConfig(vocab_size=17, dim=8, n_layers=2, n_heads=2, hidden_dim=12, max_position_embeddings=16)
        ),
        "electra": t.ElectraModel(t.ElectraConfig(embedding_size=6, **bert)),
        "gemma2": t.Gemma2Model(t.Gemma2Config(**gemma)),
        "gemma3_text": t.Gemma3TextModel(t.Gemma3TextConfig(**gemma)),
        "gptj": t.GPTJModel(
            t.GPTJConfig(
                vocab_size=17, n_embd=8, n_layer=2, n_head=2, n_positions=16, n_inner=12, rotary_dim=2, bos_token_id=0,
                eos_token_id=0,
            )
        ),
        "mistral": t.MistralModel(t.MistralConfig(**llama)),
        "mt5": t.MT5ForConditionalGeneration(t.MT5Config(**t5)),
        "phi": t.PhiModel(t.PhiConfig(**ids, **llama)),
        "qwen2": t.Qwen2Model(t.Qwen2Config(**llama)),
        "qwen3": t.Qwen3Model(t.Qwen3Config(head_dim=4, **llama)),
        "whisper": t.WhisperModel(
            t.WhisperConfig(
                num_mel_bins=4, max_source_positions=8, max_target_positions=16, suppress_tokens=None,
                begin_suppress_tokens=None, **speech,
            )
        ),
        "xlm-roberta": t.XLMRobertaModel(t.XLMRobertaConfig(**bert)),
    }  # fmt: skip


def configs(name: str):
    import adapters as a

    same = dict(reduction_factor=2)
    made = {
        "houlsby": a.DoubleSeqBnConfig(**same),
        "pfeiffer": a.SeqBnConfig(reduction_factor={"0": 4, "default": 2}),
        "parallel": a.ParBnConfig(**same),
        "plus": a.AdapterPlusConfig(stochastic_depth=0.0, **same),
        "gated": a.DoubleSeqBnConfig(use_gating=True, ln_before=True, scaling="learned", leave_out=[1], **same),
        "compacter": a.CompacterConfig(**same),
        "compacterpp": a.CompacterPlusPlusConfig(**same),
        "loreft": a.LoReftConfig(r=2, prefix_positions=2, suffix_positions=1),
        "noreft": a.NoReftConfig(r=2, prefix_positions=1, suffix_positions=1, tied_weights=True),
        "direft": a.DiReftConfig(r=2, prefix_positions=3, non_linearity="gelu"),
    }
    if name not in PICTURES:
        made["invertible"] = a.SeqBnInvConfig(**same)
    if name in TWOFOLD:  # whose decoder ReFT gives the positions of the encoder
        made = {label: config for label, config in made.items() if not label.endswith("reft")}
        made["cross"] = a.DoubleSeqBnConfig(cross_adapter=True, **same)
    if name == "phi":  # at which the library itself raises
        del made["parallel"]
    few = ("houlsby", "pfeiffer", "parallel", "invertible", "loreft", "cross")
    return made if name in WHOLLY else {label: config for label, config in made.items() if label in few}


@torch.no_grad()
def fill(model, seed: int, scale: float = 0.4) -> None:
    torch.manual_seed(seed)
    for name, p in sorted(model.items()):
        if "original" in name and "parametrizations" in name:
            continue  # has to stay orthonormal
        p.add_(torch.randn(p.shape) * scale)


def inputs(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    if name in PICTURES:
        return dict(pixel_values=torch.randn(2, 1, 8, 8))
    if name == "whisper":
        return dict(input_features=torch.randn(2, 4, 16), decoder_input_ids=torch.randint(1, 17, (2, 5)))
    ids = torch.randint(1, 17, (2, 6))
    mask = torch.ones_like(ids)
    if name in ("bert", "roberta", "t5", "albert", "bart", "electra", "xlm-roberta"):
        mask[1, 4:] = 0
    out = dict(input_ids=ids, attention_mask=mask)
    if name in TWOFOLD:
        out["decoder_input_ids"] = torch.randint(1, 17, (2, 5))
    return out


def main(out: Path) -> None:
    import adapters

    assert adapters.__version__ == "1.3.0", adapters.__version__
    for name, model in models().items():
        fill(dict(model.named_parameters()), 1, 0.2)
        model.eval()
        folder = out / "adapterhub" / name
        model.save_pretrained(folder, safe_serialization=True)
        given = inputs(name)
        held = {f"in.{k}": v for k, v in given.items()}
        tensors: dict[str, torch.Tensor] = {}
        said = {}
        adapters.init(model)
        for label, config in configs(name).items():
            model.add_adapter(label, config=config)
            model.eval()  # it makes layers that drop
            fill({k: p for k, p in model.named_parameters() if f".{label}." in k}, 2)  # A of Compacter too
            model.set_active_adapters(label)
            with torch.no_grad():
                y = model(**given)
            held[label] = y.logits if "logits" in y else y.last_hidden_state
            saved = folder / label
            model.save_adapter(str(saved), label, with_head=False)
            written = torch.load(saved / "pytorch_adapter.bin")
            written |= {
                k: p.detach() for k, p in model.named_parameters() if k.endswith("phm_rule")
            }  # which it leaves out
            tensors |= {f"{label}/{key}": t.clone() for key, t in written.items()}
            said[label] = json.loads((saved / "adapter_config.json").read_text())
            if label == "direft":  # which it does not say
                said[label]["config"]["subtract_projection"] = False
            if (name, label) not in WHOLE:
                shutil.rmtree(saved)
            model.set_active_adapters(None)
            model.delete_adapter(label)
        save_file(tensors, folder / "adapters.safetensors", {"configs": json.dumps(said)})
        save_file({k: v.contiguous() for k, v in held.items()}, folder / "outputs.safetensors")


HEADS = {  # of the library, for the models of `main`
    "bert-pooled": lambda model: model.add_classification_head("a", num_labels=3, layers=1, use_pooler=True),
    "bert-tagging": lambda model: model.add_tagging_head("a", num_labels=3),
    "bert-answers": lambda model: model.add_qa_head("a"),
    "bert-plain": lambda model: model.add_classification_head("a", num_labels=3),
    "roberta-plain": lambda model: model.add_classification_head("a", num_labels=3),
}


def heads(out: Path) -> None:
    """Make `fixtures/adapterhub_heads`: a head of each kind with a bottleneck, and what the library computes."""
    import adapters

    for label, add_head in HEADS.items():
        folder = out / "adapterhub_heads" / label
        folder.mkdir(parents=True)
        model = adapters.AutoAdapterModel.from_pretrained(out / "adapterhub" / label.partition("-")[0])
        add_head(model)
        model.add_adapter("a", config=adapters.SeqBnConfig(reduction_factor=2))
        model.eval()
        fill({k: p for k, p in model.named_parameters() if ".a." in k}, 2)
        model.set_active_adapters("a")
        model.active_head = "a"
        model.save_adapter(str(folder), "a")
        for file in folder.glob("*.json"):
            file.write_text(
                json.dumps(json.loads(file.read_text()) | {"model_name": ""}, indent=2, sort_keys=True) + "\n"
            )
        given = inputs("bert")
        with torch.no_grad():
            y = model(**given)
        logits = y.logits if "logits" in y else torch.stack([y.start_logits, y.end_logits])
        save_file({f"in.{k}": v for k, v in given.items()} | {"y": logits}, folder / "outputs.safetensors")
