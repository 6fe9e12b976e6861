# SPDX-License-Identifier: Apache-2.0
"""Files that other libraries wrote (`make_fixtures.py`): graft reads the change of weights that they compute by them,
writes them in every format that can hold them, and reads that back."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from graft.files import formats
from graft.files.bases import base_of
from graft.files.convert import convert
from graft.files.errors import BaseNeededError, LossError
from tests.files.dense import changes

FIXTURES = Path(__file__).parent / "fixtures"
BASES = {"lycoris": "net", "mlx": "llama", "torchtune": "llama", "litgpt": "llama", "adapterhub": "bert",
         "diffusers": "pipeline", "kohya": "pipeline"}  # fmt: skip
WRITTEN = {  # format → what stands in it on the way there and back
    "peft": set(BASES), "kohya": set(BASES), "diffusers": {"diffusers", "kohya"}, "mlx": set(BASES),
    "torchtune": {"mlx", "torchtune", "litgpt"}, "litgpt": {"mlx", "torchtune", "litgpt"}, "adapterhub": {"adapterhub"},
}  # fmt: skip
CANNOT = {  # by design: what the page of formats says
    ("lycoris_loha", "mlx"), ("lycoris_lokr", "mlx"), ("lycoris_locon", "mlx"), ("lycoris_tucker", "mlx"),
    ("lycoris_full", "mlx"), ("lycoris_dora", "mlx"), ("lycoris_dylora", "mlx"), ("diffusers_new", "mlx"),
    ("diffusers_old", "mlx"), ("kohya_sd", "mlx"), ("mlx_dora", "litgpt"), ("torchtune_dora", "litgpt"),
    ("lycoris_full", "kohya"),
    ("adapterhub_ia3", "kohya"), ("adapterhub_ia3", "mlx"),
}  # fmt: skip
NAMES = sorted(p.name.removesuffix(".delta.safetensors") for p in FIXTURES.glob("*.delta.safetensors"))
NAMES = [name for name in NAMES if name != "gguf_llama"]  # which needs a package: tests/formats


def base_for(name):
    return base_of(FIXTURES / f"base_{BASES[name.partition('_')[0]]}")


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
    assert adapter.unread == []
    assert_same(changes(adapter, base), wanted(name))


@pytest.mark.parametrize("to", WRITTEN)
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(tmp_path, name, to):
    if name.partition("_")[0] not in WRITTEN[to] and (name, to) not in CANNOT:
        return
    base = base_for(name)
    if (name, to) in CANNOT:
        with pytest.raises(LossError, match="cannot hold"):
            convert(FIXTURES / name, to, tmp_path / "out", base)
        assert [*tmp_path.iterdir()] == []
        return
    made = convert(FIXTURES / name, to, tmp_path / "out", base)
    assert made.lost == [] and made.rounding < 2e-7
    back = read_back(Path(made.path), to, base)
    assert_same(changes(back, base), wanted(name))


def read_back(path, to, base):
    from graft.files.convert import read_for

    if path.is_file() and to == "kohya" and path.suffix != ".safetensors":
        path = path.rename(path.with_suffix(".safetensors"))
    adapter = read_for(str(path), base, to)
    assert adapter.format == to
    return adapter


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
    adapter = formats.read(tmp_path / "a.safetensors", base_of(tmp_path / "pipe"))
    found = changes(adapter, base_of(tmp_path / "pipe"))
    assert_same(found, {f"transformer.blocks.0.{name}": d for name, d in wanted.items()})
