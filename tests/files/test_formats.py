# SPDX-License-Identifier: Apache-2.0
"""Files that other libraries wrote (`make_fixtures.py`): graft reads the change of weights that they compute by them,
writes them in every format that can hold them, and reads that back."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from graft.core.errors import CheckpointError, LossError
from graft.files import formats
from graft.files.base import BaseDescription
from graft.files.bases import open_base
from graft.files.convert import convert_adapter_file
from graft.files.errors import BaseNeededError, PackageNeededError
from graft.files.formats import gguf, kohya, peft
from graft.files.inspect import compare_adapters
from graft.files.resize import resize_adapter
from tests.files.dense import changes

FIXTURES = Path(__file__).parent / "fixtures"
BASES = {"lycoris": "net", "mlx": "llama", "torchtune": "llama", "litgpt": "llama", "adapterhub": "bert",
         "diffusers": "pipeline", "kohya": "pipeline"}  # fmt: skip
WRITTEN = {  # format → what stands in it on the way there and back
    "peft": set(BASES), "kohya": set(BASES), "diffusers": {"diffusers", "kohya"}, "mlx": set(BASES),
    "adapterhub": {"adapterhub"},
}  # fmt: skip
CANNOT = {  # by design: what the page of formats says
    ("lycoris_loha", "mlx"), ("lycoris_lokr", "mlx"), ("lycoris_locon", "mlx"), ("lycoris_tucker", "mlx"),
    ("lycoris_full", "mlx"), ("lycoris_dora", "mlx"), ("lycoris_dylora", "mlx"), ("diffusers_new", "mlx"),
    ("diffusers_old", "mlx"), ("kohya_sd", "mlx"), ("lycoris_full", "kohya"),
    ("adapterhub_ia3", "kohya"), ("adapterhub_ia3", "mlx"),
}  # fmt: skip
NAMES = sorted(p.name.removesuffix(".delta.safetensors") for p in FIXTURES.glob("*.delta.safetensors"))
NAMES = [name for name in NAMES if name != "gguf_llama"]  # which needs a package: tests/formats


def base_for(name):
    return open_base(FIXTURES / f"base_{BASES[name.partition('_')[0]]}")


def wanted(name):
    return {path: d.astype("f8") for path, d in load_file(FIXTURES / f"{name}.delta.safetensors").items()}


def assert_same(found, wanted, tolerance=2e-6):
    found = {path: d for path, d in found.items() if np.abs(d).max() > 0}
    assert found.keys() == wanted.keys()
    for path, d in found.items():
        assert d.shape == wanted[path].shape, path
        assert np.abs(d - wanted[path]).max() <= tolerance * max(1.0, np.abs(wanted[path]).max()), path


@pytest.mark.parametrize("name", NAMES)
def test_reads_the_change_of_weights_that_the_library_computes(name):
    base = base_for(name)
    adapter = formats.read(FIXTURES / name, base)
    assert adapter.format == ("kohya" if name.startswith("lycoris") else name.partition("_")[0])
    assert adapter.unknown_keys == []
    assert_same(changes(adapter, base), wanted(name))


PAIRS = [(name, to) for name in NAMES for to, of in WRITTEN.items() if name.partition("_")[0] in of]


@pytest.mark.parametrize("name, to", sorted({*PAIRS, *CANNOT}))
def test_there_and_back(tmp_path, name, to):
    base = base_for(name)
    if (name, to) in CANNOT:
        with pytest.raises(LossError, match=r"hold (all|nothing) of"):
            convert_adapter_file(FIXTURES / name, to, tmp_path / "out", base)
        assert [*tmp_path.iterdir()] == []
        return
    made = convert_adapter_file(FIXTURES / name, to, tmp_path / "out", base)
    assert made.lost == [] and made.rounding < 2e-7
    back = read_back(Path(made.path), to, base)
    assert_same(changes(back, base), wanted(name))


def read_back(path, to, base):
    if path.is_file() and to == "kohya" and path.suffix != ".safetensors":
        path = path.rename(path.with_suffix(".safetensors"))
    adapter = formats.read(path, base)
    assert adapter.format == to
    return adapter


@pytest.mark.parametrize("field", [{"alora_invocation_tokens": [5, 7]}, {"layer_replication": [[0, 1], [0, 2]]}])
@pytest.mark.parametrize("to", ["mlx", "kohya"])
def test_what_a_config_has_factors_do_otherwise_is_not_lost(tmp_path, to, field):
    base = base_for("mlx_lora")
    convert_adapter_file(FIXTURES / "mlx_lora", "peft", tmp_path / "peft", base)
    path, weights = tmp_path / "peft" / "adapter_config.json", tmp_path / "peft" / "adapter_model.safetensors"
    path.write_text(json.dumps(json.loads(path.read_text()) | field))
    save_file(load_file(weights), weights)  # without the notes of graft, which know the config as it was
    with pytest.raises(LossError, match=re.escape(f"{next(iter(field.values()))}")):
        convert_adapter_file(tmp_path / "peft", to, tmp_path / "out", base)
    assert convert_adapter_file(tmp_path / "peft", to, tmp_path / "out", base, lossy=True).lost
    again = convert_adapter_file(tmp_path / "peft", "peft", tmp_path / "again", base)
    assert again.lost == [] and field.items() <= json.loads((tmp_path / "again" / path.name).read_text()).items()


@pytest.mark.parametrize("name, to, modules", [("mlx_dora", "adapterhub", 3), ("torchtune_dora", "adapterhub", 8),
                                               ("lycoris_dora", "mlx", 4), ("kohya_sd", "adapterhub", 1)])  # fmt: skip
def test_a_conversion_counts_the_modules_that_it_wrote(tmp_path, name, to, modules):
    base = base_for(name)
    done = convert_adapter_file(FIXTURES / name, to, tmp_path / "out", base, lossy=True)
    assert done.lost and done.modules == modules == len(formats.read(tmp_path / "out", base).modules)


@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_magnitudes_of_some_modules_only(tmp_path, to):
    """Which kohya's files can have; where all modules have one or none, the norm of W + ΔW changes nothing."""
    base, rng, tensors = base_for("mlx_lora"), np.random.default_rng(0), {}
    for name, has_one in (("q_proj", True), ("o_proj", False)):
        stem = f"lycoris_model_layers_0_self_attn_{name}"
        tensors |= {f"{stem}.lora_down.weight": rng.normal(size=(2, 16)).astype("f4")}
        tensors |= {f"{stem}.lora_up.weight": rng.normal(size=(16, 2)).astype("f4"), f"{stem}.alpha": np.array(6, "f4")}
        tensors |= {f"{stem}.dora_scale": rng.uniform(1, 2, (16, 1)).astype("f4")} if has_one else {}
    source = tmp_path / "a.safetensors"
    save_file(tensors, source)
    convert_adapter_file(source, to, tmp_path / "out", base)
    back = formats.read(tmp_path / "out", base)
    assert all(module.magnitude is not None for module in back.low_rank.values())
    assert_same(changes(back, base), changes(formats.read(source, base), base), 5e-6)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((FIXTURES / "base_llama" / "config.json").read_text())
    with pytest.raises(LossError, match=r"'model\.layers\.0\.self_attn\.o_proj' of .* lacks one. Give the base model"):
        convert_adapter_file(source, to, tmp_path / "again", bare)


@pytest.mark.parametrize("name", ["lycoris_loha", "lycoris_lokr"])
def test_an_alpha_of_0_stays_one(tmp_path, name):
    base = base_for(name)
    adapter = formats.read(FIXTURES / name, base)
    adapter.modules = {path: replace(m, scale=0.0, tensors={k: t for k, t in m.tensors.items() if k != "alpha"})
                       for path, m in adapter.modules.items()}  # fmt: skip
    kohya.write(adapter, str(tmp_path / "a.safetensors"), base)
    back = changes(formats.read(tmp_path / "a.safetensors", base), base)
    assert back and not any(change.any() for change in back.values())


def test_a_magnitude_for_each_token_is_none_for_each_output(tmp_path):
    """mlx-lm's DoRA of an embedding normalizes rows of the table, PEFT's its columns."""
    base, rng = base_for("mlx_lora"), np.random.default_rng(0)
    sizes = {"lora_a": (32, 2), "lora_b": (2, 16), "m": (32,)}
    tensors = {f"model.embed_tokens.{k}": rng.uniform(1, 2, size).astype("f4") for k, size in sizes.items()}
    mlx, own = tmp_path / "mlx", tmp_path / "peft"
    mlx.mkdir()
    save_file(tensors, mlx / "adapters.safetensors")
    (mlx / "adapter_config.json").write_text('{"fine_tune_type": "dora", "lora_parameters": {"rank": 2, "scale": 2.0}}')
    with pytest.raises(LossError, match=r"MLX DoRA of an embedding on model\.embed_tokens"):
        convert_adapter_file(mlx, "peft", own, base)
    sizes = {"lora_embedding_A": (2, 32), "lora_embedding_B": (16, 2), "lora_magnitude_vector": (16,)}
    stem = "base_model.model.model.embed_tokens"
    own.mkdir()
    save_file(
        {f"{stem}.{k}": rng.uniform(1, 2, size).astype("f4") for k, size in sizes.items()}, own / peft.pair.SAFETENSORS
    )
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": True, "target_modules": ["embed_tokens"]}
    (own / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(LossError, match=r"for each token there: model\.embed_tokens"):
        convert_adapter_file(own, "mlx", tmp_path / "out", base)


def test_names_of_a_first_release(tmp_path):
    """As ComfyUI has them for Wan: `diffusers` itself knows which module is meant, with the folder of the pipeline."""
    rng, tensors = np.random.default_rng(0), {}
    for name, theirs in (("self_attn.q", "attn1.to_q"), ("cross_attn.o", "attn2.to_out.0")):
        A, B = (rng.normal(size=size).astype("f4") for size in ((3, 24), (24, 3)))
        stem = f"diffusion_model.blocks.0.{name}"
        tensors |= {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": np.array(6, "f4")}
        tensors[theirs] = 2 * B @ A
    wanted = {name: tensors.pop(name) for name in ("attn1.to_q", "attn2.to_out.0")}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(BaseNeededError, match="first release"):
        formats.read(tmp_path / "a.safetensors")
    diffusers = pytest.importorskip("diffusers")
    sizes = dict(num_attention_heads=2, attention_head_dim=12, num_layers=1, ffn_dim=16, in_channels=4, out_channels=4,
                 text_dim=8, freq_dim=8)  # fmt: skip
    diffusers.WanTransformer3DModel(**sizes).save_pretrained(tmp_path / "pipe" / "transformer")
    (tmp_path / "pipe" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    adapter = formats.read(tmp_path / "a.safetensors", open_base(tmp_path / "pipe"))
    found = changes(adapter, open_base(tmp_path / "pipe"))
    assert_same(found, {f"transformer.blocks.0.{name}": d for name, d in wanted.items()})


@pytest.mark.parametrize("name", ["kohya_sd", "diffusers_new"])
def test_folders_of_a_pipelines_parts_are_an_adapter(name, tmp_path):
    """What `convert --to peft` makes of a pipeline's file, every verb takes again."""
    base = base_for(name)
    made = convert_adapter_file(FIXTURES / name, "peft", tmp_path / "parts", base)
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"unet", "text_encoder"}
    whole = formats.read(tmp_path / "parts")
    assert len(whole.modules) == made.modules and whole.is_pipeline
    assert_same(changes(whole, base), wanted(name))
    for to in ("kohya", "diffusers", "peft"):
        back = convert_adapter_file(tmp_path / "parts", to, tmp_path / f"back-{to}", base)
        assert_same(changes(formats.read(back.path, base), base), wanted(name))
    cut, _ = resize_adapter(whole, rank=1)
    peft.write(cut, str(tmp_path / "cut"))
    assert {m.rank for m in formats.read(tmp_path / "cut").low_rank.values()} == {1}


def test_modules_that_are_called_as_a_part_of_a_pipeline_are_none(tmp_path):
    """GPT-2's names begin with "transformer."."""
    from transformers import GPT2Config, GPT2LMHeadModel

    import graft

    sizes = dict(vocab_size=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    model.save_pretrained(tmp_path / "base")
    config = graft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    graft.get_peft_model(model, config).save_pretrained(tmp_path / "a")
    for to in ("peft", "kohya"):
        made = convert_adapter_file(tmp_path / "a", to, tmp_path / f"a-{to}", tmp_path / "base")
        convert_adapter_file(made.path, "peft", tmp_path / f"{to}-peft", tmp_path / "base")
        assert (tmp_path / f"{to}-peft" / "adapter_config.json").exists()
        assert compare_adapters(formats.read(tmp_path / "a"), formats.read(tmp_path / f"{to}-peft"))["equal"]
    for known in (None, tmp_path / "base"):
        with pytest.raises(BaseNeededError, match="which part of a pipeline"):
            convert_adapter_file(tmp_path / "a", "diffusers", tmp_path / "d.safetensors", known)


@pytest.mark.parametrize("to", ["kohya", "mlx"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adalora_becomes_lora(to, dtype, tmp_path):
    import torch

    import graft
    from tests.files.test_load import llama

    model = graft.get_peft_model(llama(), graft.AdaLoraConfig(total_step=9, target_modules=["q_proj", "up_proj"]))
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape).to(getattr(torch, dtype))
    exact = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, graft.AdapterLayer):
            A, B, E = (getattr(layer, f"lora_{x}")["default"].detach().double().numpy() for x in "ABE")
            exact[name] = layer.scaling["default"] / (12 + 1e-5) * B @ (E * A)
    model.save_pretrained(tmp_path / "a")
    base = base_for("mlx_lora")
    made = convert_adapter_file(tmp_path / "a", to, tmp_path / "out", base)
    assert made.lost == [] and made.modules == len(exact)
    assert_same(changes(formats.read(made.path, base), base), exact, 2e-6 + made.rounding)


def test_what_no_format_but_pefts_holds_is_said_once(tmp_path):
    base = base_for("mlx_lora")
    (tmp_path / "a").mkdir()
    tensors = {f"base_model.model.model.layers.0.self_attn.q_proj.hada_w{i}_{s}": np.ones((2, 2), "f4")
               for i in (1, 2) for s in "ab"}  # fmt: skip
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LOHA", "r": 2, "alpha": 2, "target_modules": r".*layers\.0\..*q_proj"}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LossError, match=r"can hold nothing of .*convert_to_lora"):
        convert_adapter_file(tmp_path / "a", "mlx", tmp_path / "out", base)


@pytest.mark.parametrize("name", gguf.ARCHITECTURES)
def test_an_architecture_of_gguf_by_the_type_of_the_model(name):
    import transformers

    config = getattr(transformers, name).config_class
    type_alone, of_class = ({"model_type": config.model_type}, {"architectures": [name]})
    assert gguf.arch_of(BaseDescription("base", type_alone)) == gguf.arch_of(BaseDescription("base", of_class))


def test_an_architecture_of_gguf_that_nothing_says():
    with pytest.raises(LossError, match=r"weights of bert \(base\)"):
        gguf.arch_of(BaseDescription("base", {"model_type": "bert"}))
    with pytest.raises(BaseNeededError, match=r"base has no config\.json that names its architecture"):
        gguf.arch_of(BaseDescription("base", {}))


@pytest.mark.parametrize(
    "key, says",
    [
        ("module.decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight", "NeMo"),
        ("model.decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight", "NeMo"),
        ("adapter_query.weight", "LLaMA-Adapter"),
    ],
)
def test_formats_that_are_known_and_not_read(key, says, tmp_path):
    import torch

    save_file({key: np.zeros((2, 2), "f4")}, tmp_path / "a.safetensors")
    torch.save({key: torch.zeros(2, 2)}, tmp_path / "a.pth")
    (tmp_path / "folder").mkdir()
    torch.save({key: torch.zeros(2, 2)}, tmp_path / "folder" / "a.ckpt")
    for place in ("a.safetensors", "a.pth", "folder"):
        with pytest.raises(CheckpointError, match=f"an adapter of .*{says}.* does not read"):
            formats.read(tmp_path / place)
    if says == "NeMo":
        for name in ("x/a.nemo", "y/adapter_metadata.json"):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_bytes(b"")
            with pytest.raises(CheckpointError, match="NeMo"):
                formats.read(tmp_path / name[0])


@pytest.mark.parametrize("module", [None, ModuleType("gguf")], ids=["absent", "another's"])
def test_gguf_without_its_package(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, "gguf", module)
    with pytest.raises(PackageNeededError, match=r"pip install 'gguf>=0\.10'\."):
        convert_adapter_file(FIXTURES / "mlx_lora", "gguf", tmp_path / "a.gguf", base_for("mlx_lora"))
    assert [*tmp_path.iterdir()] == []


def test_names_of_a_format_and_of_the_model_are_not_compared(tmp_path):
    """Without the base nothing says which are the same."""
    base = base_for("mlx_lora")
    convert_adapter_file(FIXTURES / "mlx_lora", "kohya", tmp_path / "a.safetensors", base)
    pair = [formats.read(path) for path in (FIXTURES / "mlx_lora", tmp_path / "a.safetensors")]
    for one, other in (pair, pair[::-1]):
        with pytest.raises(BaseNeededError, match=r"a\.safetensors names modules as its format does.*--base"):
            compare_adapters(one, other)
    assert compare_adapters(pair[1], pair[1])["equal"]
    named = [formats.read(path, base) for path in (FIXTURES / "mlx_lora", tmp_path / "a.safetensors")]
    assert compare_adapters(*named)["equal"]
