# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by the names of their models, and the verbs that compare adapters with a base: every model whose files
have other names, stacks in pieces, or tensors that transformers computes anew."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import graft
from graft.core.errors import BaseModelMismatchError, LossError
from graft.files.base import read_base_files
from graft.files.bases import choose_names, open_base, view_by_model_names
from graft.files.convert import convert_adapter_file
from graft.files.errors import BaseNeededError
from graft.files.export import export_adapter_file
from graft.files.formats import read
from graft.files.inspect import compare_adapters, inspect_adapter
from graft.files.lint import lint_adapter
from graft.files.serving import check_servers
from graft.files.skeleton import name_by_model
from graft.files.tensors import Tensor
from tests.families import FAMILIES, RENAMED, base
from tests.leaves_out import FUSED_EXPERTS

pytestmark = [FUSED_EXPERTS, pytest.mark.filterwarnings("ignore")]
SOME = [*RENAMED, "mixtral", "qwen3_moe", "gpt_oss", "llama4", "granitemoe", "nemotron_h"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in SOME]


def saved(family, folder):
    model = base(family)
    model.save_pretrained(folder / "base")
    return model, read_base_files(folder / "base")


def adapter_of(model, folder, stacks=True):
    """Save an adapter of all linear layers and stacks; return what it makes of the model."""
    linear = [name for name, m in model.named_modules() if type(m) is nn.Linear and "lm_head" not in name]
    parameters = [name for name, p in model.named_parameters() if p.dim() == 3 and "experts" in name] if stacks else []
    config = graft.LoraConfig(r=2, target_modules=linear, target_parameters=parameters, init_lora_weights=False)
    made = graft.get_peft_model(model, config)
    made.save_pretrained(folder)
    return made.merge_and_unload().state_dict()


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        torch.testing.assert_close(found[name], t, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", [*SOME, *SLOW])
def test_each_tensor_has_its_parameters_name(family, tmp_path):
    model, files = saved(family, tmp_path)
    known, state = view_by_model_names(files), model.state_dict()
    tied = state.keys() - known.tensors.keys()
    assert all("lm_head" in name for name in tied) and set(known.modules) == {n for n, _ in model.named_modules() if n}
    assert family not in RENAMED or known.tensors.keys() != files.tensors.keys()
    for name, t in known.tensors.items():
        assert np.array_equal(t.read(), state[name].numpy()), name
        assert known.shapes[name] == t.shape


@pytest.mark.parametrize("family", [*SOME, *SLOW])
def test_the_verbs_find_the_base(family, tmp_path):
    model, files = saved(family, tmp_path)
    wanted = adapter_of(model, tmp_path / "a")
    again = type(model).from_pretrained
    adapter = read(tmp_path / "a", files)
    assert not [f for f in lint_adapter(adapter, files) if f.severity == "error"]
    assert all(m["relative"] is not None for m in inspect_adapter(adapter, files)["modules"])
    names = {f.condition for f in check_servers(adapter, ["vllm"], files)}
    assert not names & {"modules_missing", "layers_missing", "prefixes_differ"}
    convert_adapter_file(tmp_path / "a", "mlx", tmp_path / "mlx", tmp_path / "base")
    convert_adapter_file(tmp_path / "mlx", "peft", tmp_path / "back", tmp_path / "base")
    assert compare_adapters(read(tmp_path / "back", files), adapter)["equal"]
    loaded = graft.PeftModel.from_pretrained(again(tmp_path / "base"), tmp_path / "back")
    assert_same(loaded.merge_and_unload().state_dict(), wanted)
    if family == "gte":  # whose file has q, k and v in one
        with pytest.raises(LossError, match=r"from other tensors.*merge_and_unload"):
            graft.merge_files(tmp_path / "base", [tmp_path / "a"], tmp_path / "merged")
        return
    graft.merge_files(tmp_path / "base", [tmp_path / "a"], tmp_path / "merged")
    assert_same(again(tmp_path / "merged").state_dict(), wanted)


@pytest.mark.parametrize("family", [*RENAMED, "mixtral"])
def test_what_export_writes_is_loaded(family, tmp_path):
    model, files = saved(family, tmp_path)
    wanted = adapter_of(model, tmp_path / "a", stacks=False)
    report = export_adapter_file(read(tmp_path / "a", files), "vllm", files, str(tmp_path / "out"))
    loaded = graft.PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "out")
    assert_same(loaded.merge_and_unload().state_dict(), wanted)
    assert report.renamed == {}


def test_an_adapter_of_the_text_model_gets_the_names_of_the_class_that_is_served(tmp_path):
    model, files = saved("llava", tmp_path)
    adapter_of(model, tmp_path / "a", stacks=False)
    adapter = read(tmp_path / "a", files)
    text = {path: m for path, m in adapter.modules.items() if ".language_model." in path}
    adapter.modules = {path.replace(".language_model.", "."): m for path, m in text.items()}
    report = export_adapter_file(adapter, "vllm", files, str(tmp_path / "out"))
    assert {*report.renamed.values()} == {*text}
    graft.PeftModel.from_pretrained(base("llava"), tmp_path / "out")


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("less", [False, True])
def test_one_prefix_more_or_less(prefix, less, tmp_path):
    """A base model's adapter on the files of one with a head, and the reverse."""
    names = [f"{prefix}layers.{i}.fc.weight" for i in range(2)]
    save_file({name: torch.ones(4, 4) for name in names}, tmp_path / "model.safetensors")
    paths = [f"layers.{i}.fc" for i in range(2)]
    paths = [path if less else f"model.{path}" for path in paths]
    known = choose_names(read_base_files(tmp_path), paths)
    assert [known.shapes[f"{path}.weight"] for path in paths] == [(4, 4), (4, 4)]
    assert set(paths) <= set(known.modules) and set(known.tensors) == set(known.shapes)


def test_two_prefixes_that_fit_say_nothing(tmp_path):
    names = [f"{tower}.layers.0.fc.weight" for tower in ("question", "context")]
    save_file({name: torch.ones(4, 4) for name in names}, tmp_path / "model.safetensors")
    assert "layers.0.fc" not in set(choose_names(read_base_files(tmp_path), ["layers.0.fc"]).modules)


def test_square_weights_of_conv1d_are_turned(tmp_path):
    """GPT-2's square projections are stored (in, out): what DoRA changes of them is that of the turned weight."""
    from tests.models import make

    config = graft.LoraConfig(r=2, target_modules=["c_proj"], use_dora=True, init_lora_weights=False)
    model = graft.get_peft_model(make("gpt2"), config)
    make("gpt2").save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "a")
    before = {name: p.detach().clone() for name, p in make("gpt2").named_parameters()}
    after = dict(model.merge_and_unload().named_parameters())
    files = read_base_files(tmp_path / "base")
    for m in inspect_adapter(read(tmp_path / "a", files), files)["modules"]:
        name = f"{m['module']}.weight"
        assert m["norm"] == pytest.approx(float((after[name] - before[name]).norm()), rel=1e-4), name


def test_a_base_of_four_bits_is_compared_by_what_its_codes_stand_for(tmp_path, monkeypatch):
    """Its files have bytes of other shapes; lint and inspect called it another model."""
    from graft.files import skeleton as views
    from tests.models import make

    model = make("llama")
    model.save_pretrained(tmp_path / "base")
    adapter_of(model, tmp_path / "a", stacks=False)
    dense = read_base_files(tmp_path / "base")
    adapter = read(tmp_path / "a", dense)
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "x"}
    }
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    packed = read_base_files(tmp_path / "base")
    for name in [name for name in packed.tensors if name.endswith("proj.weight")]:
        packed.tensors[name] = Tensor((7, 1), "U8", lambda: bytes(7))
    assert not [f for f in lint_adapter(adapter, packed) if f.severity == "error"]
    with pytest.raises(BaseNeededError, match="only names of weights"):
        inspect_adapter(adapter, packed)

    class Weights:
        packed, shapes = {n: [n] for n in dense.tensors if n.endswith("proj.weight")}, dense.shapes
        read = staticmethod(lambda name: torch.from_numpy(dense.tensors[name].read().copy()))

    monkeypatch.setattr(views, "find_base_weights", lambda base: Weights)
    again = read_base_files(tmp_path / "base")
    assert inspect_adapter(adapter, again)["modules"] == inspect_adapter(adapter, dense)["modules"]


def test_another_model_is_another_model(tmp_path):
    _, files = saved("vit", tmp_path / "vit")
    model, _ = saved("gpt_neox", tmp_path)
    adapter_of(model, tmp_path / "a")
    adapter = read(tmp_path / "a", files)
    assert [f.rule for f in lint_adapter(adapter, files) if f.severity == "error"] == ["base-mismatch"]
    with pytest.raises(BaseModelMismatchError):
        inspect_adapter(adapter, files)
    with pytest.raises(BaseModelMismatchError, match="no modules for"):
        convert_adapter_file(tmp_path / "a", "peft", tmp_path / "out", tmp_path / "vit" / "base")


# parts of pipelines whose files have the names of transformers 4


def clip():
    import transformers

    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, max_position_embeddings=16))


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_a_text_encoder_whose_files_say_text_model(form, tmp_path):
    """Adapters of Stable Diffusion name `text_model.encoder`, which transformers 5 calls `encoder`."""
    model, tensors = clip(), {}
    wanted = {name: t.clone() for name, t in model.state_dict().items()}
    for i in range(2):
        A, B = torch.randn(2, 16), torch.randn(16, 2)
        stem = f"text_model.encoder.layers.{i}.self_attn.q_proj"
        wanted[f"encoder.layers.{i}.self_attn.q_proj.weight"] += B @ A
        if form == "kohya":
            stem = f"lora_te_{stem.replace('.', '_')}"
            tensors |= {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B}
        else:
            stem = f"text_encoder.{stem}"
            tensors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
    save_file(tensors, tmp_path / "a.safetensors")
    found = graft.load_adapter(model, tmp_path / "a.safetensors").merge_and_unload().state_dict()
    assert_same(found, wanted)
    pipe = tmp_path / "pipe" / "text_encoder"
    other = clip()
    other.save_pretrained(pipe)
    save_file(
        {f"text_model.{name}": t.contiguous() for name, t in other.state_dict().items()}, pipe / "model.safetensors"
    )
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert any("text_model" in name for name in open_base(tmp_path / "pipe").shapes)
    convert_adapter_file(tmp_path / "a.safetensors", "peft", tmp_path / "out", tmp_path / "pipe")
    assert all(path.startswith("encoder.") for path in read(tmp_path / "out" / "text_encoder").modules)
    graft.PeftModel.from_pretrained(clip(), tmp_path / "out" / "text_encoder")


@pytest.mark.slow
def test_every_class_of_transformers_by_names_and_shapes():
    """On the meta device, with what transformers itself would write."""
    import transformers
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.models.auto import modeling_auto

    kinds = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}
    names = {name for table in (modeling_auto.MODEL_MAPPING_NAMES, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
             for entry in table.values() for name in ([entry] if isinstance(entry, str) else entry)}  # fmt: skip
    looked_at = 0
    for name in sorted(names):
        try:
            kind = getattr(transformers, name)
            config = kind.config_class()
            shrink(config)
            with torch.device("meta"):
                model = kind(config)
            written = revert_weight_conversion(model, dict(model.state_dict()))
        except Exception:  # a class whose default config makes no model says nothing here
            continue
        state = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        if {*written} == {*state}:
            continue
        tensors = {n: Tensor(tuple(t.shape), kinds.get(t.dtype, "F16"), bytes) for n, t in written.items()}
        found = name_by_model(tensors, model)
        assert {n: t.shape for n, t in found.items()} == state, name
        looked_at += 1
    assert looked_at > 100


def shrink(config, depth=0):
    """Make a config one of two layers."""
    for key, value in [*vars(config).items()]:
        if key in ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "depth"):
            setattr(config, key, min(value, 2) if isinstance(value, int) else value)
        elif key in ("layer_types", "mlp_layer_types", "layers_block_type") and isinstance(value, list):
            setattr(config, key, value[:2])
        elif hasattr(value, "model_type") and depth < 4:
            shrink(value, depth + 1)
