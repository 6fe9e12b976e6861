# SPDX-License-Identifier: Apache-2.0
"""The guides in a hurry, their notebooks, and the weights that one of them reads.

Most guides need packages beyond the test extra, and all take their time: `make examples` installs what they need and
sets GRAFT_EXAMPLES. Without it one runs, from its notebook.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from torch.nn import functional as F

from examples import notebooks
from examples.demo.data import DemoError, digest
from examples.guides import efficientnet
from tests import fresh

ROOT = Path(__file__).parents[2]
SAYS = {  # what each shows when all went well
    "classification": "spam 0.",
    "diffusion": "with the adapter disabled",
    "dpo": "a second model as reference: False",
    "instruction_tuning": "exactly right, of 10 held-out dates",
    "merging": "as LoRA of rank 64: accuracy",
    "quantized_base": "merged into Linear ",
    "reinforcement": "policy-v3-",
    "serving": "of 10 adapters say their word",
    "two_tasks": "topics: accuracy",
    "vision": "merged: logits differ by at most",
}


def run(*arguments: str, cwd: Path) -> CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environ = os.environ | {"PYTHONPATH": paths}
    return fresh.run(*arguments, cwd=cwd, env=environ, timeout=600)


def test_every_guide_is_known_here():
    names = {path.stem for path in notebooks.scripts()}
    assert names == set(SAYS)


@pytest.mark.skipif("GRAFT_EXAMPLES" not in os.environ, reason="make examples")
@pytest.mark.parametrize("name", SAYS)
def test_a_guide_runs_through(name, tmp_path):
    done = run("-m", f"examples.guides.{name}", "--quick", cwd=tmp_path)  # it writes where it runs
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert SAYS[name] in done.stdout, done.stdout[-2000:]


@pytest.mark.parametrize("name", SAYS)
def test_a_guide_fits_a_page_or_two(name):
    assert len((notebooks.GUIDES / f"{name}.py").read_text("utf-8").splitlines()) <= 100


def test_a_missing_package_comes_with_its_remedy():
    ask = "from examples.guides.start import need; need('json', 'no_such_package')"
    done = run("-c", ask, cwd=ROOT)
    assert done.returncode == 1
    assert "needs no_such_package: run `make examples`" in done.stderr


# notebooks


@pytest.mark.parametrize("name", SAYS)
def test_a_notebook_is_in_step_with_its_script(name):
    script = (notebooks.GUIDES / f"{name}.py").read_text("utf-8")
    written = (notebooks.NOTEBOOKS / f"{name}.ipynb").read_text("utf-8")
    assert written == notebooks.notebook(script), "run: python -m examples.notebooks"
    if find_spec("nbformat"):
        import nbformat

        nbformat.validate(nbformat.reads(written, as_version=4))


def test_cells():
    text = "# licence\n# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1\n\n\ndef f():\n    return x\n"
    title, first, code = json.loads(notebooks.notebook(text))["cells"]
    assert "".join(title["source"]) == "# Title\n\nText." and title["cell_type"] == "markdown"
    assert "chdir" in "".join(first["source"])
    assert "".join(code["source"]) == "x = 1\n\n\ndef f():\n    return x" and code["outputs"] == []


def test_no_notebook_is_left_over():
    assert {path.stem for path in notebooks.NOTEBOOKS.iterdir()} == set(SAYS)


@pytest.mark.slow
def test_a_notebook_runs_where_it_lies(tmp_path):
    """Its cells, one after the other, in a folder two below one with the examples."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "a" / "b").mkdir(parents=True)
    cells = json.loads((notebooks.NOTEBOOKS / "two_tasks.ipynb").read_text("utf-8"))["cells"]
    code = "\n\n".join("".join(one["source"]) for one in cells if one["cell_type"] == "code")
    script = tmp_path / "a" / "b" / "cells.py"
    script.write_text(f"import sys\nsys.path.insert(0, '')\n{code}\n")
    done = run(str(script), "--quick", cwd=script.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    assert SAYS["two_tasks"] in done.stdout and (tmp_path / "out" / "guides" / "two_tasks").is_dir()


# the weights of EfficientNet


def test_efficientnet_knows_a_palace_and_a_daisy():
    from sklearn.datasets import load_sample_images

    model = efficientnet.load()
    for image, expected in zip(load_sample_images().images, (698, 985), strict=True):
        pixels = torch.tensor(image).permute(2, 0, 1)[None].float() / 255
        height, width = pixels.shape[2:]
        left = (width - height) // 2
        square = F.interpolate(pixels[..., left : left + height], (224, 224), mode="bilinear", antialias=True)
        with torch.no_grad():
            assert model(square).argmax().item() == expected


def test_altered_weights_are_refused(tmp_path, monkeypatch):
    (tmp_path / efficientnet.FILE).write_bytes(b"altered")
    assert digest(tmp_path, efficientnet.FILE) != efficientnet.SHA256

    class Installed:
        def locate_file(self, folder: str) -> Path:
            return tmp_path

    monkeypatch.setattr("examples.demo.data.metadata.distribution", lambda name: Installed())
    with pytest.raises(DemoError, match=r"(?s)altered.*guides/carriers\.txt"):
        efficientnet.load()
