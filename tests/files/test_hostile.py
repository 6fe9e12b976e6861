# SPDX-License-Identifier: Apache-2.0
"""Files that are damaged, are not what they seem, or do not fit: a specific error, and nothing is written or run."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file

from graft.config import atomic
from graft.core.errors import BaseModelMismatchError, CheckpointError, LossError, NonFiniteError
from graft.files import formats
from graft.files.base import BaseDescription
from graft.files.bases import open_base
from graft.files.convert import convert_adapter_file
from graft.files.errors import BaseNeededError, OutputExistsError
from graft.files.inspect import compare_adapters, inspect_adapter
from graft.files.lint import lint_adapter
from graft.files.neutral import AdapterFile, LowRank
from graft.files.resize import resize_adapter
from graft.files.tensors import make_int64_tensor, make_tensor
from tests.files.dense import changes

FIXTURES = Path(__file__).parent / "fixtures"
LLAMA, NET = FIXTURES / "base_llama", FIXTURES / "base_net"
RAN = []


class Code:
    def __reduce__(self):
        return RAN.append, ("it ran",)


@pytest.fixture
def locon(tmp_path):
    path = tmp_path / "locon.safetensors"
    shutil.copy(FIXTURES / "lycoris_locon" / "adapter.safetensors", path)
    return path


def copied(tmp_path, name):
    return Path(shutil.copytree(FIXTURES / name, tmp_path / "a"))


def refused(error, match, source, to, out, *args, **options):
    before = sorted(out.parent.iterdir())
    with pytest.raises(error, match=match):
        convert_adapter_file(source, to, out, *args, **options)
    assert sorted(out.parent.iterdir()) == before


@pytest.mark.parametrize("name", ["adapter_model.pt", "lit_model.pth.lora", "pytorch_adapter.bin"])
def test_code_in_a_pickle_never_runs(tmp_path, name):
    source = {"adapter_model.pt": "torchtune_lora", "lit_model.pth.lora": "litgpt_lora"}.get(name, "adapterhub_lora")
    folder = copied(tmp_path, source)
    held = torch.load(folder / name)
    torch.save({**held, "more.lora_a.weight": Code()}, folder / name, pickle_module=pickle)
    base = LLAMA if source != "adapterhub_lora" else None
    refused(CheckpointError, "nothing of it has been run", folder, "peft", tmp_path / "out", base)
    assert RAN == []


def kohya_of_torch(path, **more):
    torch.save(
        {"lora_unet_a.lora_down.weight": torch.randn(2, 4), "lora_unet_a.lora_up.weight": torch.ones(4, 2)} | more, path
    )
    return path


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch, from 2.15 on
@pytest.mark.parametrize(
    "t", [torch.ones(2, 4).to_sparse(), torch.empty(2, 4, device="meta"), torch.ones(1, 4).expand(2, 4)]
)
def test_a_pickle_of_tensors_that_are_no_plain_ones(tmp_path, t):
    file = kohya_of_torch(tmp_path / "a.pt", **{"lora_unet_a.lora_down.weight": t})
    refused(CheckpointError, "lora_down.weight' in .*a.pt .*plain tensors", file, "kohya", tmp_path / "out.safetensors")


def test_a_pickle_of_floats_of_8_bits(tmp_path):
    A = torch.randn(2, 4).to(torch.float8_e4m3fn)
    convert_adapter_file(
        kohya_of_torch(tmp_path / "a.pt", **{"lora_unet_a.lora_down.weight": A}), "kohya", tmp_path / "b.safetensors"
    )
    found = load_torch_file(tmp_path / "b.safetensors")["lora_unet_a.lora_down.weight"]
    assert found.dtype == A.dtype and torch.equal(found.float(), A.float())


def test_a_pickle_that_grows(tmp_path):
    held = kohya_of_torch(tmp_path / "held.pt", **{"lora_unet_b.lora_down.weight": torch.zeros(2**20)})
    with zipfile.ZipFile(held) as old, zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refused(CheckpointError, "more than it has", tmp_path / "a.pt", "kohya", tmp_path / "out.safetensors")


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.99])
@pytest.mark.parametrize("name", ["mlx_lora", "lycoris_loha", "diffusers_new", "torchtune_lora", "litgpt_lora"])
def test_a_file_that_is_cut_off(tmp_path, name, keep):
    folder = copied(tmp_path, name)
    file = max(folder.iterdir(), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    refused(CheckpointError, f"{folder}", folder, "peft", tmp_path / "out", LLAMA)


def test_underscore_names_need_the_base(locon, tmp_path):
    refused(BaseNeededError, "--base", locon, "peft", tmp_path / "out")
    adapter = formats.read(locon)
    assert adapter.has_flat_names and "lycoris_down_blocks_0_to_q" in adapter.modules


def test_another_base(locon, tmp_path):
    refused(BaseModelMismatchError, "has no modules for", locon, "peft", tmp_path / "out", LLAMA)
    refused(BaseModelMismatchError, "has no modules for", FIXTURES / "mlx_lora", "peft", tmp_path / "out", NET)
    tensors = load_file(NET / "model.safetensors")
    tensors["down_blocks.1.to_q.weight"] = np.zeros((12, 9), "f4")
    (tmp_path / "wide").mkdir()
    save_file(tensors, tmp_path / "wide" / "model.safetensors")
    refused(BaseModelMismatchError, r"down_blocks\.1\.to_q", locon, "peft", tmp_path / "out", tmp_path / "wide")


def test_a_name_that_two_modules_have(locon):
    both = BaseDescription("both", {}, {}, ["down_blocks.0.to_q", "down_blocks.0.to.q", "down_blocks.1.to_q"])
    with pytest.raises(CheckpointError, match=r"down_blocks\.0\.to_q and down_blocks\.0\.to\.q"):
        formats.read(locon, both)


def test_two_paths_of_one_name_cannot_be_written(tmp_path):
    tensors = load_file(FIXTURES / "mlx_lora" / "adapters.safetensors")
    for leaf in ("lora_a", "lora_b"):
        tensors[f"model.layers.1.self.attn_q_proj.{leaf}"] = tensors[f"model.layers.1.self_attn.q_proj.{leaf}"]
    save_file(tensors, copied(tmp_path, "mlx_lora") / "adapters.safetensors")
    refused(CheckpointError, "would both be named", tmp_path / "a", "kohya", tmp_path / "out.safetensors")


def test_keys_that_nobody_knows(locon, tmp_path):
    tensors = load_file(locon)
    save_file(tensors | {"lycoris_down_blocks_0_to_q.something": np.ones(2, "f4")}, locon)
    refused(LossError, r"something.*--lossy", locon, "peft", tmp_path / "out", NET)
    done = convert_adapter_file(locon, "peft", tmp_path / "out", NET, lossy=True)
    assert done.lost == ["the key 'lycoris_down_blocks_0_to_q.something', which no reader knows"]
    base = open_base(NET)
    found, wanted = (changes(formats.read(p, base), base) for p in (tmp_path / "out", FIXTURES / "lycoris_locon"))
    assert found.keys() == wanted.keys()


def test_kohya_to_kohya_drops_nothing_in_silence(locon, tmp_path):
    convert_adapter_file(locon, "kohya", tmp_path / "same.safetensors")
    held, back = load_file(locon), load_file(tmp_path / "same.safetensors")
    assert held.keys() == back.keys() and all(np.array_equal(held[k], back[k]) for k in held)
    save_file(held | {"lycoris_down_blocks_0_to_q.something": np.ones(2, "f4")}, locon)
    refused(LossError, "something", locon, "kohya", tmp_path / "more.safetensors")


def test_a_head_that_shares_the_weight_of_an_embedding(tmp_path):
    """Its files have no tensor of the head; the model that its config describes has the module."""
    base = tmp_path / "tied"
    shutil.copytree(LLAMA, base)
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors")
    done = convert_adapter_file(FIXTURES / "torchtune_lora", "kohya", tmp_path / "a.safetensors", base)
    assert done.modules == 13
    back = formats.read(convert_adapter_file(tmp_path / "a.safetensors", "peft", tmp_path / "out", base).path)
    assert "lm_head" in back.modules


def put(end, t):
    """Replace the first tensor whose key ends so; None: remove it."""

    def change(held):
        key = next(key for key in held if key.endswith(end))
        held.pop(key)
        return held if t is None else held | {key: t}

    return change


def turn(held):
    return {key: np.ascontiguousarray(t.T) for key, t in held.items()}


@pytest.mark.parametrize("name, change, base, says", [
    ("lycoris_locon", put("alpha", np.ones(0, "f4")), NET, "down_blocks"),
    ("lycoris_dora", put("dora_scale", np.array(1, "f4")), NET, "down_blocks"),
    ("lycoris_loha", put("hada_w1_b", np.array(1, "f4")), NET, "down_blocks"),
    ("lycoris_lokr", put("lokr_w1", np.array(1, "f4")), NET, "down_blocks"),
    ("lycoris_lokr", put("lokr_w1", None), NET, "down_blocks"),
    ("mlx_dora", put(".m", np.array(1, "f4")), LLAMA, "q_proj|mlp"),
    ("mlx_lora", put("model.layers.1.mlp.down_proj.lora_b", None), None, "only one factor"),
    ("mlx_lora", turn, None, r"where MLX has \(in, 4\)"),  # factors that nobody transposed
])  # fmt: skip
def test_a_tensor_of_another_shape_or_none(tmp_path, name, change, base, says):
    folder = copied(tmp_path, name)
    (file,) = folder.glob("*.safetensors")
    save_file(change(load_file(file)), file)
    refused(CheckpointError, says, folder, "peft", tmp_path / "out", base)


@pytest.mark.parametrize(
    "name, field, value, says",
    [("mlx_lora", "lora_parameters", [1], "is no number"), ("adapterhub_lora", "name", None, "which no reader knows"),
     ("adapterhub_lora", "name", 3, "which no reader knows")],
)  # fmt: skip
def test_a_config_of_another_shape(tmp_path, name, field, value, says):
    config = copied(tmp_path, name) / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    refused((CheckpointError, LossError), says, tmp_path / "a", "kohya", tmp_path / "out.safetensors")


FIELDS = {"peft_type": [1], "target_parameters": 7, "modules_to_save": 7, "base_model_name_or_path": {"a": 1},
          "use_bdlora": 7, "auto_mapping": 7}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_another_kind(tmp_path, field):
    convert_adapter_file(FIXTURES / "mlx_lora", "peft", tmp_path / "a")
    weights, config = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    save_file(load_file(weights), weights)  # without the copy of the config
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: FIELDS[field]}))
    if field == "auto_mapping":  # which describes only
        assert [f for f in lint_adapter(formats.read(tmp_path / "a")) if f.rule == "orphan_key"] == []
        return
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {field} is"):
        lint_adapter(formats.read(tmp_path / "a"))


def test_a_vector_that_is_not_there(tmp_path):
    folder = copied(tmp_path, "adapterhub_ia3")
    file = folder / "pytorch_adapter.bin"
    tensors = torch.load(file, weights_only=True)
    name = next(name for name in tensors if name.endswith(".lora_B"))
    torch.save({k.replace("lora_B", "lora_A") if k == name else k: v for k, v in tensors.items()}, file)
    refused(CheckpointError, "has no vector for", folder, "peft", tmp_path / "out")


def test_sizes_of_another_run(tmp_path):
    folder = copied(tmp_path, "litgpt_lora")
    path = folder / "hyperparameters.yaml"
    path.write_text(path.read_text().replace("lora_key: false", "lora_key: true"))
    refused(CheckpointError, "of another run", folder, "peft", tmp_path / "out")
    path.write_text("!!python/object/apply:os.system ['true']")
    refused(CheckpointError, "more than plain values", folder, "peft", tmp_path / "out")


def test_heads_need_the_base(tmp_path):
    refused(BaseNeededError, "number of heads", FIXTURES / "torchtune_lora", "peft", tmp_path / "out")


@pytest.mark.parametrize("call, at", [("fsync", 1), ("rename", 2)], ids=["written", "named"])
def test_an_error_while_writing_leaves_what_was_there(call, at, tmp_path, locon, monkeypatch):
    monkeypatch.setattr(atomic, "swap_by_system", lambda *_: False)  # as where the system cannot
    out = tmp_path / "out"
    convert_adapter_file(locon, "peft", out, NET)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    original, calls = getattr(os, call), []

    def full(*args):
        calls.append(args)
        if len(calls) == at:
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space"):
        convert_adapter_file(locon, "peft", out, NET, force=True)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["locon.safetensors", "out"]


def test_a_dry_run_writes_nothing(tmp_path, locon):
    done = convert_adapter_file(locon, "peft", tmp_path / "deep" / "out", NET, dry_run=True)
    assert done.modules == 6 and [p.name for p in tmp_path.iterdir()] == ["locon.safetensors"]


def test_a_config_alone_has_the_names(tmp_path):
    (tmp_path / "base").mkdir()
    shutil.copy(LLAMA / "config.json", tmp_path / "base" / "config.json")
    convert_adapter_file(FIXTURES / "mlx_lora", "kohya", tmp_path / "a.safetensors")
    convert_adapter_file(tmp_path / "a.safetensors", "peft", tmp_path / "out", tmp_path / "base")
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    assert "model.layers.1.mlp.down_proj" in targets


def test_half_precision_is_rounded_once_and_says_so(tmp_path):
    folder = copied(tmp_path, "lycoris_locon")
    tensors = load_file(folder / "adapter.safetensors")
    names = [name for name in tensors if "proj_in" not in name]
    tensors = {name: tensors[name].astype("f2") for name in names}
    tensors["lycoris_down_blocks_0_to_q.alpha"] = np.array(7, "f2")
    save_file(tensors, folder / "adapter.safetensors")
    done = convert_adapter_file(folder, "mlx", tmp_path / "out", NET)
    assert 1e-5 < done.rounding < 2.0**-10
    found, wanted = (changes(formats.read(p, open_base(NET)), None) for p in (tmp_path / "out", folder))
    for path, d in wanted.items():
        assert np.abs(found[path] - d).max() < 2e-3 * np.abs(d).max(), path


def test_nobody_is_told_to_run_a_pickle(tmp_path):
    """torch's own error tells how to load the file all the same."""
    folder = copied(tmp_path, "torchtune_lora")
    for path in [*folder.glob("*.safetensors"), folder / "adapter_model.pt"]:
        path.unlink()
    weights = folder / "adapter_model.bin"
    torch.save({"base_model.model.a.lora_A.weight": Code()}, weights, pickle_module=pickle)
    with pytest.raises(CheckpointError, match=r"getattr .*nothing of it has been run") as raised:
        formats.read(folder)
    assert RAN == [] and "weights_only" not in str(raised.value)


@pytest.mark.parametrize("kind", ["peft", "kohya"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupt_between_the_names(kind, at, tmp_path, locon, monkeypatch):
    """What stood there comes back, or the new one is there, whole; also where the system cannot swap."""
    out, new = (tmp_path / f"{name}{'.safetensors' * (kind == 'kohya')}" for name in ("out", "new"))
    convert_adapter_file(FIXTURES / "lycoris_tucker", kind, out, NET)
    convert_adapter_file(locon, kind, new, NET)
    before, wanted = contents(out), contents(new)
    original, calls = os.rename, []

    def interrupted(*args, **options):
        original(*args, **options)
        calls.append(args)
        if len(calls) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "swap_by_system", lambda *_: False)
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_adapter_file(locon, kind, out, NET, force=True)
    monkeypatch.undo()
    assert contents(out) == (before if at == 1 else wanted)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["locon.safetensors", new.name, out.name]


@pytest.mark.skipif(sys.platform != "linux", reason="the system's call is Linux's")
@pytest.mark.parametrize("kind", ["peft", "kohya"])
def test_no_kill_finds_the_output_without_its_name(kind, tmp_path, locon, monkeypatch):
    """The old one and the new one change places in one call, not in two renames."""
    out, new = (tmp_path / f"{name}{'.safetensors' * (kind == 'kohya')}" for name in ("out", "new"))
    convert_adapter_file(FIXTURES / "lycoris_tucker", kind, out, NET)
    convert_adapter_file(locon, kind, new, NET)
    renamed = []
    monkeypatch.setattr(os, "rename", lambda *args: renamed.append(args))
    convert_adapter_file(locon, kind, out, NET, force=True)
    assert renamed == [] and contents(out) == contents(new)


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir()} if path.is_dir() else path.read_bytes()


@pytest.mark.parametrize("kind, call", [("peft", "rename"), ("kohya", "link")])
def test_what_another_process_writes_at_the_last_moment_stays(kind, call, tmp_path, locon, monkeypatch):
    out, original = tmp_path / ("out" if kind == "peft" else "out.safetensors"), getattr(os, call)

    def late(*args, **options):
        if kind == "kohya":
            out.write_bytes(b"another's")
        else:
            out.mkdir()
            (out / "mine.txt").write_bytes(b"another's")
        original(*args, **options)

    monkeypatch.setattr(os, call, late)
    with pytest.raises(OutputExistsError, match="meanwhile"):
        convert_adapter_file(locon, kind, out, NET)
    monkeypatch.undo()
    assert (out if kind == "kohya" else out / "mine.txt").read_bytes() == b"another's"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["locon.safetensors", out.name]


def test_a_signal_ends_the_command_as_an_error_does(tmp_path):
    """SIGTERM in the middle of a write: nothing is left of it, and no traceback is printed."""
    code = """
import os, signal
original = os.fsync
def stopped(fd):
    original(fd)
    os.kill(os.getpid(), signal.SIGTERM)
os.fsync = stopped
from graft.command import main
main()
"""
    words = ["convert", str(FIXTURES / "mlx_lora"), "--to", "kohya", "-o", str(tmp_path / "deep" / "out.safetensors")]
    done = subprocess.run([sys.executable, "-c", code, *words, "--json"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + 15, "", "")
    assert os.listdir(tmp_path) == []


def test_two_adapters_differ_in_one_order():
    rows = {f"embed.{i}": (make_int64_tensor([1]), make_tensor(np.ones((1, 2), "f4"))) for i in "dbfaec"}
    a, b = (AdapterFile("peft", name, rows=rows) for name in "ab")
    assert [t["tensor"] for t in compare_adapters(a, b)["tensors"]] == sorted(rows)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["factors", "whole"])
def test_what_is_not_finite_equals_nothing_and_has_no_spectrum(where, value):
    def adapter(value):
        A, B, norm = np.ones((2, 5), "f4"), np.ones((6, 2), "f4"), np.ones(4, "f4")
        {"factors": B, "whole": norm}[where].flat[1] = value
        modules = {
            name: LowRank(make_tensor(A), make_tensor(np.ones_like(B) if name == "k" else B), 1.0) for name in "kq"
        }
        full = {"a_norm.weight": make_tensor(np.ones(4, "f4")), "norm.weight": make_tensor(norm)}
        return AdapterFile("peft", "it", modules=modules, full=full)

    good, bad = adapter(1), adapter(value)
    assert compare_adapters(good, adapter(1))["equal"]
    calls = (compare_adapters, (good, bad)), (compare_adapters, (bad, good)), (inspect_adapter, (bad, None, True))
    for act, args in (*calls, (resize_adapter, (bad, 1))):
        with pytest.raises(NonFiniteError, match=r"\[q\]" if where == "factors" else r"\[norm\.weight\]"):
            act(*args)
