# SPDX-License-Identifier: Apache-2.0
"""transformers' own `model.load_adapter` puts tensors where PeftModel does."""

import pytest

from tests.compat.test_compat import run

pytest.importorskip("transformers.core_model_loading", reason="transformers before 5 loads adapters through PEFT")

START = """
import graft.compat.peft
graft.compat.peft.install()
import json, tempfile, torch, transformers, warnings, graft
from pathlib import Path
from safetensors.torch import load_file, save_file

def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 13)[None]).logits

def same(make, folder):
    own, base = make(), logits(make())
    report = own.load_adapter(folder)
    assert not report.missing_keys and not report.unexpected_keys and not report.mismatched_keys, report
    expected = logits(graft.PeftModel.from_pretrained(make(), folder))
    torch.testing.assert_close(logits(own), expected)
    assert not torch.allclose(expected, base, atol=1e-3)

SIZES = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=1, num_experts_per_tok=2, initializer_range=0.3)

def make():
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=3))

def on_stacks():
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = graft.LoraConfig(r=2, target_modules=[], target_parameters=names, init_lora_weights=False)
    return graft.get_peft_model(make(), config)
"""


def run_script(text):
    """Run a text after `START`."""
    run(START + text)


@pytest.mark.differs("DoRA through transformers' own `model.load_adapter`")
def test_dora():
    """Files leave ".weight" out of the names of magnitudes."""
    run_script("""
def make():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))

model = graft.get_peft_model(make(), graft.LoraConfig(target_modules=["q_proj", "up_proj"], use_dora=True))
for name, p in model.named_parameters():
    if p.requires_grad:
        p.data += torch.rand(p.shape)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    same(make, folder)
""")


@pytest.mark.parametrize("parts", ["w1 w2 w3", "w2", "w1 w3"])
def test_experts_of_old_files(parts):
    """An adapter on experts that were modules, on one stack or on both."""
    run_script(f"""
parts = {parts.split()!r}

names = [f"block_sparse_moe.experts.{{e}}.{{part}}" for e in range(3) for part in parts]
tensors = {{}}
for name in names:
    out, into = (8, 12) if name.endswith("w2") else (12, 8)
    stem = f"base_model.model.model.layers.0.{{name}}"
    tensors[f"{{stem}}.lora_A.weight"], tensors[f"{{stem}}.lora_B.weight"] = torch.randn(2, into), torch.randn(out, 2)
with tempfile.TemporaryDirectory() as folder:
    save_file(tensors, f"{{folder}}/adapter_model.safetensors")
    config = dict(peft_type="LORA", r=2, lora_alpha=4, target_modules=parts)
    Path(folder, "adapter_config.json").write_text(json.dumps(config))
    same(make, folder)
""")


@pytest.mark.parametrize("by", ["part", "expert"])
@pytest.mark.parametrize("rslora", [False, True])
def test_experts_whose_alphas_differ(by, rslora):
    """Each part of each expert acts with its own alpha / r; by transformers and by PeftModel."""
    run_script(f"""
pattern = {{"part": {{"w1": 9}}, "expert": {{r"experts\\.1\\.w1": 9}}}}[{by!r}]

tensors, expected = {{}}, make()
experts = expected.model.layers[0].mlp.experts
for e in range(3):
    for i, part in enumerate(("w1", "w3")):
        stem = f"base_model.model.model.layers.0.block_sparse_moe.experts.{{e}}.{{part}}"
        A, B = torch.randn(2, 8), torch.randn(12, 2)
        tensors[f"{{stem}}.lora_A.weight"], tensors[f"{{stem}}.lora_B.weight"] = A, B
        alpha = 9 if part == "w1" and ({by!r} == "part" or e == 1) else 4
        experts.gate_up_proj.data[e, 12 * i : 12 * i + 12] += alpha / {"2**0.5" if rslora else "2"} * B @ A
with tempfile.TemporaryDirectory() as folder:
    save_file(tensors, f"{{folder}}/adapter_model.safetensors")
    config = dict(peft_type="LORA", r=2, lora_alpha=4, target_modules=["w1", "w3"], alpha_pattern=pattern,
                  use_rslora={rslora})
    Path(folder, "adapter_config.json").write_text(json.dumps(config))
    same(make, folder)
    loaded = graft.PeftModel.from_pretrained(make(), folder)
    torch.testing.assert_close(logits(loaded), logits(expected), atol=1e-4, rtol=1e-4)
""")


@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", "0.21.2"])
def test_stacks_of_old_releases(version):
    """A and B of stacks that stand for each other, square or not."""
    run_script(f"""
SIZES["intermediate_size"] = 8
model = on_stacks()
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    tensors = load_file(f"{{folder}}/adapter_model.safetensors")
    if {version!r} != "0.21.2":
        for stem in {{k.partition(".lora_")[0] for k in tensors}}:
            a, b = f"{{stem}}.lora_A.weight", f"{{stem}}.lora_B.weight"
            A, B = tensors[a].view(3, 2, -1), tensors[b].view(-1, 2, 3).permute(2, 0, 1)
            A, B = B.mT, A.mT
            tensors[a], tensors[b] = A.reshape(6, -1).contiguous(), B.permute(1, 2, 0).reshape(-1, 6).contiguous()
    save_file(tensors, f"{{folder}}/adapter_model.safetensors")
    path = Path(folder, "adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(peft_version={version!r})))
    same(make, folder)
    torch.testing.assert_close(logits(graft.PeftModel.from_pretrained(make(), folder)), logits(model))
""")


def test_the_layout_that_unsloth_notes():
    """Columns of B by expert, which the config's `lora_B_layout` says; without it, a warning."""
    run_script("""
model = on_stacks()
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = tensors[name].view(-1, 2, 3).transpose(1, 2).reshape(-1, 6).contiguous()
    save_file(tensors, f"{folder}/adapter_model.safetensors")
    path = Path(folder, "adapter_config.json")
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | dict(auto_mapping=dict(unsloth_fixed=True))))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make().load_adapter(folder)
    (text,) = [text for w in caught if "trained by Unsloth" in (text := str(w.message))]
    assert text.startswith("Adapter 'default' (load it by PeftModel.from_pretrained)"), text
    path.write_text(json.dumps(fields | dict(lora_B_layout="grouped_by_expert")))
    same(make, folder)
    loaded = graft.PeftModel.from_pretrained(make(), folder)
    torch.testing.assert_close(logits(loaded), logits(model))
    loaded.save_pretrained(folder)
    assert "lora_B_layout" not in json.loads(path.read_text())
    torch.testing.assert_close(logits(graft.PeftModel.from_pretrained(make(), folder)), logits(model))
""")
