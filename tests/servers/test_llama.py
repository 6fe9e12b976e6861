# SPDX-License-Identifier: Apache-2.0
"""A real llama.cpp server: GGUF files that graft writes it applies, those of its own converter do what `check` says.

make test-serving
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import graft
from examples.start import wait_for_server
from graft import ServerError, UnknownModelError
from graft.core.errors import LossError
from graft.files import formats
from graft.files.ask import Connection, ask_log_probabilities
from graft.files.base import read_base_files
from graft.files.convert import convert_adapter_file
from graft.files.export import export_adapter_file
from graft.files.serving import check_servers
from graft.files.tensors import make_tensor, read_header, write_safetensors
from graft.files.verify import (
    compute_log_probabilities,
    list_common_places,
    make_prompts,
    root_mean_square,
    stack_values,
    verify_server,
)
from tests.files import adapters
from tests.models import seeded
from tests.servers.common import broken, model

HOME = Path(os.environ.get("GRAFT_LLAMA", "."))
pytestmark = pytest.mark.skipif("GRAFT_LLAMA" not in os.environ, reason="needs llama.cpp, built: make test-serving")
APPLIED = ["scaled", "regex", "paths", "one layer", "lm_head", "embedding"]
EXPORTED = [*APPLIED, "patterns", "rslora", "pissa", "olora", "velora", "monteclora", "qalora", "bdlora", "kasa"]
BY_THEIRS = {  # their converter on graft's folder → the verdict of the server that loads what it writes
    **dict.fromkeys(["scaled", "regex", "paths", "one layer", "lm_head"], "applied"),
    "patterns": "alpha_pattern not read", "rslora": "scale off",
}  # fmt: skip
REFUSED = ["dora", "bias", "rows", "velora", "kasa", "pissa", "whole head", "qalora", "bdlora"]  # by their converter


@pytest.fixture(scope="session")
def words(base, tmp_path_factory):
    """The folder of the base with a tokenizer of sentencepiece, which their converter wants."""
    import sentencepiece

    at = tmp_path_factory.mktemp("llama")
    draw = random.Random(0)
    made = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(3000)]
    text = at / "text.txt"
    text.write_text("\n".join(" ".join(draw.choices(made, k=12)) for _ in range(2000)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(at / "tokenizer"), vocab_size=512, model_type="bpe", minloglevel=2
    )
    for file in Path(base).iterdir():
        if not file.name.startswith("tokenizer"):
            (at / file.name).symlink_to(file)
    return at


@pytest.fixture(scope="session")
def gguf(words):
    """The base as llama.cpp has it."""
    theirs("convert_hf_to_gguf.py", words, "--outfile", words / "base.gguf", "--outtype", "f32")
    return words / "base.gguf"


def theirs(script, *given):
    run = subprocess.run(
        [sys.executable, HOME / "llama.cpp" / script, *given], capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise RuntimeError(run.stderr)


def converted(folder, words, out):
    theirs("convert_lora_to_gguf.py", folder, "--base", words, "--outfile", out, "--outtype", "f32")
    return out


@contextmanager
def running(gguf, *loras, control=None):
    """A server with these adapters, all at rest until asked for, and with a control vector."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    exact = ["-fa", "off", "-ctk", "f32", "-ctv", "f32"]  # its cache is float16 by itself
    words = [HOME / "build/bin/llama-server", "-m", gguf, "--host", "127.0.0.1", "--port", str(port), "-t", "1"]
    words += ["-c", "512", "-np", "1", "--lora-init-without-apply", *exact]
    for lora in loras:
        words += ["--lora", lora]
    if control is not None:
        words += ["--control-vector", control]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            wait_for_server(process, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def verdict(gguf, lora, path, name=None):
    """What the server does with a file, for an adapter of graft's."""
    own = lambda base: adapters.quietly(graft.PeftModel.from_pretrained, base, str(path)).eval()
    with running(gguf, lora) as url:
        return verify_server(Connection(url, 600), model(), own, name or Path(lora).name, "base")


@pytest.mark.parametrize("name", APPLIED)
def test_what_convert_writes(name, base, gguf, folder, tmp_path):
    convert_adapter_file(
        folder(name), "gguf", tmp_path / "a.gguf", base, lossy=name in ("lm_head", "embedding")
    )  # its base weight
    found = verdict(gguf, tmp_path / "a.gguf", folder(name))
    assert found.ok and found.deviations["applied"] < 1e-4 < 0.1 < found.effect


@pytest.mark.parametrize("name", EXPORTED)
def test_what_export_writes(name, base, gguf, folder, tmp_path):
    held = read_base_files(base)
    export_adapter_file(formats.read(folder(name), held), "llama.cpp", held, str(tmp_path / "a.gguf"))
    found = verdict(gguf, tmp_path / "a.gguf", folder(name))
    assert found.ok and found.deviations["applied"] < 1e-4 < 0.1 < found.effect


def test_a_steering_vector_is_a_control_vector(base, gguf, tmp_path):
    steered = graft.get_peft_model(model(), graft.SteeringConfig(layers=[1], coefficient=2.0)).eval()
    with torch.no_grad(), seeded(3):
        for name, p in steered.named_parameters():
            p.normal_(std=0.3) if "steering_vector" in name else None
    steered.save_pretrained(tmp_path / "peft")
    convert_adapter_file(tmp_path / "peft", "gguf", tmp_path / "vector.gguf", base)
    asked = make_prompts(512)
    seen = []
    for control in (None, tmp_path / "vector.gguf"):
        with running(gguf, control=control) as url:
            seen.append(ask_log_probabilities(Connection(url, 600), "llama.cpp", "base", asked, is_base=True))
    places = list_common_places(*seen, 512)
    own, (plain, theirs) = (
        compute_log_probabilities(steered, asked, places),
        (stack_values(one, places) for one in seen),
    )
    assert root_mean_square(theirs - own) < 1e-4 < 0.1 < root_mean_square(plain - own)


def test_what_convert_reads(base, words, gguf, folder, tmp_path):
    """A file of their converter, as an adapter of graft's."""
    converted(folder("scaled"), words, tmp_path / "theirs.gguf")
    convert_adapter_file(tmp_path / "theirs.gguf", "peft", tmp_path / "back", base)
    assert verdict(gguf, tmp_path / "theirs.gguf", tmp_path / "back").ok


@pytest.mark.parametrize("name", BY_THEIRS)
def test_what_check_says_of_their_converter(name, base, words, gguf, folder, tmp_path):
    found = {f.verdict for f in check_servers(formats.read(folder(name)), ["llama.cpp"], read_base_files(base))} - {
        "ok"
    }
    known = {f.condition for f in check_servers(formats.read(folder(name)), ["llama.cpp"], read_base_files(base))}
    expected = BY_THEIRS[name]
    assert "another_format" in known and ("wrong" in found) == (expected != "applied")
    assert verdict(gguf, converted(folder(name), words, tmp_path / "a.gguf"), folder(name)).verdict == expected


@pytest.mark.parametrize("name", REFUSED)
def test_what_check_says_is_refused(name, base, words, gguf, folder, tmp_path):
    found = check_servers(formats.read(folder(name)), ["llama.cpp"], read_base_files(base))
    assert [f for f in found if f.verdict == "refused" and f.condition != "another_format"]
    with (  # their converter does, or else the server
        pytest.raises((RuntimeError, ServerError)),
        running(gguf, converted(folder(name), words, tmp_path / "a.gguf")),
    ):
        raise AssertionError("it is loaded")


@pytest.mark.parametrize("name", ["dora", "bias", "rows", "whole head", "whole norm"])
def test_what_no_file_holds(name, base, folder, tmp_path):
    held = read_base_files(base)
    with pytest.raises(LossError):
        export_adapter_file(formats.read(folder(name), held), "llama.cpp", held, str(tmp_path / "a.gguf"))
    assert not any(tmp_path.iterdir())


# broken on purpose


def changed(tmp_path, path, base, change=None, **options):
    """A GGUF file of a copy of an adapter, broken."""
    out = broken(tmp_path, path, **options)
    if change is not None:
        tensors, _ = read_header(out / "adapter_model.safetensors")
        write_safetensors(str(out / "adapter_model.safetensors"), change(tensors), {"format": "pt"})
    convert_adapter_file(out, "gguf", tmp_path / "broken.gguf", base)
    return tmp_path / "broken.gguf"


def test_an_adapter_before_training(base, gguf, folder, tmp_path):
    zero = lambda t: {n: make_tensor(0 * v.read()) if "lora_B" in n else v for n, v in t.items()}
    path = changed(tmp_path, folder("scaled"), base, zero)
    assert verdict(gguf, path, folder("scaled")).verdict == "not applied"


def test_a_scale_that_is_off(base, gguf, folder, tmp_path):
    found = verdict(gguf, changed(tmp_path, folder("scaled"), base, change_config={"lora_alpha": 24}), folder("scaled"))
    assert found.verdict == "scale off" and found.scale == pytest.approx(4, rel=1e-3)


def test_lm_head(base, gguf, folder, tmp_path):
    without = lambda t: {n: v for n, v in t.items() if "lm_head" not in n}
    path = changed(tmp_path, folder("lm_head"), base, without, change_config={"target_modules": ["q_proj", "v_proj"]})
    found = verdict(gguf, path, folder("lm_head"))
    assert found.verdict == "missing" and found.text.startswith("lm_head missing")


def test_patterns_that_are_not_read(base, gguf, folder, tmp_path):
    path = changed(tmp_path, folder("patterns"), base, change_config={"alpha_pattern": {}})
    assert verdict(gguf, path, folder("patterns")).verdict == "alpha_pattern not read"


def test_another_adapter(base, gguf, folder, tmp_path):
    with seeded(9):
        other = graft.PeftModel.from_pretrained(model(), folder("scaled"))
        for p in other.parameters():
            p.data.add_(torch.randn(p.shape), alpha=0.2) if 4 in (p.shape[0], p.shape[-1]) else None
    other.save_pretrained(tmp_path, for_server="llama.cpp")
    assert verdict(gguf, tmp_path / "adapter.gguf", folder("scaled")).verdict == "another adapter"


def test_a_name_that_is_unknown(base, gguf, folder, tmp_path):
    convert_adapter_file(folder("scaled"), "gguf", tmp_path / "a.gguf", base)
    with pytest.raises(UnknownModelError, match="no adapter 'nobody'"):
        verdict(gguf, tmp_path / "a.gguf", folder("scaled"), "nobody")
