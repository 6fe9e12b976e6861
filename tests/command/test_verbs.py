# SPDX-License-Identifier: Apache-2.0
"""The verbs on files, as people and programs run them: what is printed, exit codes, what is written and what is not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import graft
from graft.command import app, change
from graft.files import inspect
from graft.files.errors import OptionError
from graft.files.formats import read
from tests import models
from tests.pair import adapt, close, output, randomize
from tests.samples import first

FIXTURES = Path(__file__).parents[1] / "files" / "fixtures"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, a tuned model, and adapters of several kinds."""
    made = tmp_path_factory.mktemp("files")
    base = models.make("llama")
    base.save_pretrained(made / "base")
    sample = first("LORA", "llama")
    model = randomize(adapt(peft, sample), sample)
    model.save_pretrained(made / "a")
    randomize(adapt(peft, first("LOHA", "llama")), first("LOHA", "llama")).save_pretrained(made / "loha")
    merged = model.merge_and_unload()
    merged.save_pretrained(made / "tuned")
    return made


def test_inspect(run, folder):
    code, out, err = run("inspect", folder / "a", "--json", "--spectrum", "--base", folder / "base")
    report = json.loads(out)
    assert code == 0 and not err and report["method"] == "LORA" and report["writer"].startswith("PEFT 0.")
    held, base = load_file(folder / "a" / WEIGHTS), load_file(folder / "base" / "model.safetensors")
    assert report["parameters"] == sum(t.numel() for t in held.values())
    assert report["bytes"] == sum(t.nbytes for t in held.values())
    for m in report["modules"]:
        A, B = (held[f"base_model.model.{m['module']}.lora_{x}.weight"].double() for x in "AB")
        W = base[f"{m['module']}.weight"].double()
        delta = m["scale"] * B @ A
        S = torch.linalg.svdvals(delta)[: m["rank"]]
        assert m["norm"] == pytest.approx(float(delta.norm()), rel=1e-6)
        assert m["relative"] == pytest.approx(float(delta.norm() / W.norm()), rel=1e-5)
        close(torch.tensor(m["singular_values"]), S.float(), 1e-5)
        assert m["shape"] == list(W.shape)
    code, out, _ = run("inspect", folder / "a", "--spectrum")
    assert code == 0 and "q_proj" in out and "stable rank" in out
    assert run("inspect", folder / "a", "-q") == (0, "", "")


def test_inspect_draws(run, folder, tmp_path):
    pytest.importorskip("matplotlib")
    assert run("inspect", folder / "a", "-q", "--plot", tmp_path / "p.png")[0] == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["LOHA", "VERA", "IA3", "OFT", "BOFT", "ADALORA", "TRAINABLE_TOKENS"])
def test_inspect_of_other_methods(method, run, tmp_path):
    base = models.make("llama")
    more = {"ADALORA": dict(total_step=9, target_modules=["q_proj"]), "TRAINABLE_TOKENS": dict(token_indices=[1, 4]),
            "IA3": dict(target_modules=["q_proj"], feedforward_modules=[])}  # fmt: skip
    config = graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](**more.get(method, dict(target_modules=["q_proj"])))
    graft.get_peft_model(base, config).save_pretrained(tmp_path)
    code, out, _ = run("inspect", tmp_path, "--json")
    report = json.loads(out)
    held = load_file(tmp_path / WEIGHTS)
    assert code == 0 and report["method"] == method and not report["unread"]
    assert report["parameters"] == sum(t.numel() for t in held.values() if t.is_floating_point())
    assert run("inspect", tmp_path)[0] == 0


def test_diff(run, folder, tmp_path):
    assert run("diff", folder / "a", folder / "a")[0] == 0
    run("resize", folder / "a", "-o", tmp_path / "same", "--energy", "1")
    code, out, _ = run("diff", folder / "a", tmp_path / "same", "--json")
    found = json.loads(out)
    assert code == 0 and found["equal"] and found["largest"] < 1e-6 and "lora_alpha" not in found["config"]
    run("resize", folder / "a", "-o", tmp_path / "less", "--rank", "2")
    code, out, _ = run("diff", folder / "a", tmp_path / "less", "--json")
    assert code == 1
    rows = json.loads(run("resize", folder / "a", "-o", "x", "--rank", "2", "--dry-run", "--json")[1])["modules"]
    energy = {row["module"]: row["energy"] for row in rows}
    for m in json.loads(out)["modules"]:
        assert m["relative"] ** 2 == pytest.approx(1 - energy[m["module"]], rel=1e-4)
        assert m["cosine"] ** 2 == pytest.approx(energy[m["module"]], rel=1e-4)
    assert run("diff", folder / "a", tmp_path / "less", "--tol", "1")[0] == 0
    code, out, _ = run("diff", folder / "a", folder / "loha")
    assert code == 1 and "peft_type" in out


def test_diff_of_what_is_beside_the_factors(run, folder, tmp_path):
    for name in ("a", "b"):
        os.makedirs(tmp_path / name)
        (tmp_path / name / CONFIG).write_text((folder / "a" / CONFIG).read_text())
    held = load_file(folder / "a" / WEIGHTS) | {"base_model.model.lm_head.weight": torch.ones(3, 4)}
    save_file(held, tmp_path / "a" / WEIGHTS)
    assert run("diff", folder / "a", tmp_path / "a", "-q")[0] == 1
    save_file(held | {"base_model.model.lm_head.weight": torch.ones(3, 4) * 1.5}, tmp_path / "b" / WEIGHTS)
    code, out, _ = run("diff", tmp_path / "a", tmp_path / "b", "--json")
    assert code == 1 and json.loads(out)["largest"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "name, field",
    [("a", {"alora_invocation_tokens": [3]}), ("a", {"layer_replication": [[0, 1], [0, 2]]}), ("ia3", {}),
     ("bottleneck", {"non_linearity": "gelu"}), ("reft", {"suffix_positions": 2})],
)  # fmt: skip
def test_diff_of_equal_tensors_that_act_otherwise(name, field, run, folder, tmp_path):
    if name == "a":
        shutil.copytree(folder / "a", tmp_path / "x")
    else:
        config = {"ia3": graft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
                  "bottleneck": graft.BottleneckConfig(), "reft": graft.ReftConfig(r=2)}[name]  # fmt: skip
        graft.get_peft_model(models.make("llama"), config).save_pretrained(tmp_path / "x")
    save_file(load_file(tmp_path / "x" / WEIGHTS), tmp_path / "x" / WEIGHTS)  # without what graft notes of the config
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    fields = json.loads((tmp_path / "x" / CONFIG).read_text())
    assert field.keys() <= fields.keys()
    of_training = {key: 0.5 for key in fields if "dropout" in key}
    (tmp_path / "y" / CONFIG).write_text(json.dumps(fields | of_training | field))
    code, out, err = run("diff", tmp_path / "x", tmp_path / "y")
    assert code == (1 if field else 0), out + err
    assert all(f"another {key}" in out for key in field)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8(dtype, run, folder, tmp_path):
    """What an adapter in float8 says is what its values say in float32."""
    narrow = {name: t.to(getattr(torch, dtype)) for name, t in load_file(folder / "a" / WEIGHTS).items()}
    for name, tensors in (("narrow", narrow), ("wide", {name: t.float() for name, t in narrow.items()})):
        os.makedirs(tmp_path / name)
        (tmp_path / name / CONFIG).write_text((folder / "a" / CONFIG).read_text())
        save_file(tensors, tmp_path / name / WEIGHTS)
    both = [tmp_path / name for name in ("narrow", "wide")]
    code, out, _ = run("diff", *both, "--json")
    assert code == 0 and json.loads(out)["largest"] < 1e-14
    reads = ("inspect", "--spectrum"), ("lint",), ("check", "--for", "vllm"), ("inspect", "--base", folder / "base")
    for words in reads:
        codes, reports = zip(*((code, json.loads(out)) for code, out, _ in (run(*words, p, "--json") for p in both)))
        assert codes[0] == codes[1] and reports[0].get("modules") == reports[1].get("modules"), words
    exported = "export", "--for", "vllm", "--base", folder / "base"
    for words in (("resize", "--rank", 2), exported, ("convert", "--to", "mlx")):
        made = [tmp_path / f"{p.name}-{words[0]}" for p in both]
        assert [run(*words, p, "-o", out)[0] for p, out in zip(both, made)] == [0, 0], words
        assert run("diff", *made, "--tol", 2**-8, "-q")[0] == 0, words
    assert {t.dtype for t in load_file(tmp_path / "narrow-resize" / WEIGHTS).values()} == {torch.bfloat16}
    assert run("resize", both[0], "-o", tmp_path / "same", "--rank", 8)[0] == 0
    again = load_file(tmp_path / "same" / WEIGHTS)
    assert all(torch.equal(again[name].view(torch.uint8), t.view(torch.uint8)) for name, t in narrow.items())
    bad = narrow | {name: torch.full(t.shape, float("nan")).to(t.dtype) for name, t in [*narrow.items()][:1]}
    save_file(bad, tmp_path / "wide" / WEIGHTS)
    assert "NaN" in run("lint", tmp_path / "wide")[1] and run("diff", *both)[0] == 3


def test_resize_writes_what_peft_loads(run, folder, tmp_path):
    sample = first("LORA", "llama")
    code, out, err = run("resize", folder / "a", "-o", tmp_path / "b", "--energy", "1")
    assert code == 0 and "100.00%" in out and not err
    ours, theirs = (peft.PeftModel.from_pretrained(models.make("llama"), p) for p in (tmp_path / "b", folder / "a"))
    close(output(ours, sample), output(theirs, sample), 1e-5)
    before = (tmp_path / "b" / WEIGHTS).read_bytes()
    assert run("resize", folder / "a", "-o", tmp_path / "b", "--rank", "1")[0] == 2
    assert run("resize", folder / "a", "-o", tmp_path / "b", "--rank", "1", "--force", "--dry-run")[0] == 0
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == before
    assert run("resize", folder / "a", "-o", tmp_path / "b", "--rank", "1", "--force")[0] == 0
    assert {h.rank for h in read(tmp_path / "b").low_rank.values()} == {1}
    assert run("resize", folder / "loha", "-o", tmp_path / "c", "--rank", "1")[0] == 5
    assert not (tmp_path / "c").exists()


def test_extract_gives_the_adapter_back(run, folder, tmp_path):
    code, out, err = run("extract", folder / "tuned", folder / "base", "-o", tmp_path / "e", "--rank", "8")
    assert code == 0 and "unchanged" in out and "q_proj" in out and not err
    assert run("diff", folder / "a", tmp_path / "e", "--tol", "1e-4", "-q")[0] == 0


def test_convert(run, tmp_path):
    base, out = FIXTURES / "base_llama", tmp_path / "a.safetensors"
    assert run("convert", FIXTURES / "mlx_lora", "--to", "kohya", "-o", out)[1] == f"mlx → kohya: 3 modules, in {out}\n"
    words = "convert", out, "--to", "peft", "--base", base, "-o", tmp_path / "b"
    shown = json.loads(run(*words, "--json")[1])
    assert (shown["of"], shown["to"], shown["modules"], shown["lost"]) == ("kohya", "peft", 3, [])
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["lora_alpha"] == 12  # scale 3, rank 4
    assert run(*words, "--force", "-q") == (0, "", "")
    save_file({"base_model.model.head.weight": torch.ones(4, 2)}, tmp_path / "b" / WEIGHTS)  # a head alone
    said = run("convert", tmp_path / "b", "--to", "peft", "-o", tmp_path / "d")[1]
    assert said == f"peft → peft: 1 tensors outside of modules, in {tmp_path / 'd'}\n"
    words = "--to", "adapterhub", "--base", base, "--lossy", "-o", tmp_path / "c"
    said = run("convert", FIXTURES / "mlx_dora", *words)[1]
    assert said.startswith("mlx → adapterhub: 3 modules,")
    assert "lost: DoRA's magnitude: model.layers.1.mlp.down_proj\n" in said


def test_merge(run, folder, tmp_path):
    words = "merge", folder / "base", folder / "loha", "-o", tmp_path / "out"
    code, out, _ = run(*words, "--dry-run")
    assert code == 0 and out.startswith("Would merge into 6 tensors") and not (tmp_path / "out").exists()
    code, out, err = run(*words, "--certificate", "--json")
    told, held = json.loads(out), json.loads((tmp_path / "out/merge.json").read_text())
    assert {*told["tensors"]} == {f"{path}.weight" for path in read(folder / "loha").modules}
    assert (code, err, held["tensors"]) == (0, "", told["tensors"])
    assert run(*words, "--force", "-q") == (0, "", "") and (tmp_path / "out/config.json").exists()
    code, _, err = run(*words)
    assert code == 2 and err.startswith("graft: ") and "--force" in err
    assert run("merge", folder / "base", folder / "a")[0] == 2


def test_sizes_and_weights_are_read_or_refused():
    sizes = {"5GB": 5 * 10**9, "1.5 mb": 1_500_000, "200": 200, "2K": 2000}
    assert {text: change.parse_size(text) for text in sizes} == sizes
    assert change.parse_weights("0.5,-1") == [0.5, -1.0]
    for text in ("five", "5 GiB", "0", "-1GB"):
        with pytest.raises(OptionError, match="The size"):
            change.parse_size(text)
    with pytest.raises(OptionError, match="--weights"):
        change.parse_weights("a,b")


def test_no_verb_waits_for_torch(folder, tmp_path):
    """Files are read, compared and written by numpy alone: a start takes a fraction of torch's."""
    commands = (
        ["inspect", folder / "a", "--spectrum"], ["inspect", folder / "a", "--json"],
        ["diff", folder / "a", folder / "a"], ["lint", folder / "a", "--base", folder / "base"],
        ["resize", folder / "a", "-o", tmp_path / "r", "--rank", "2"],
        ["inspect", folder / "a", "--base", folder / "base"], ["--help"],
    )  # fmt: skip
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", LIGHT, words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("7 are light\n"), done.stderr


LIGHT = """
import json, sys
from graft.command import main
heavy, light = {"torch", "transformers", "huggingface_hub", "matplotlib", "safetensors", "peft"}, 0
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as end:
        assert not end.code, (words, end.code)
    assert not heavy & set(sys.modules), (words, heavy & set(sys.modules))
    light += 1
print(light, "are light")
"""


def test_help_names_every_verb(run):
    code, out, _ = run("--help")
    assert code == 0 and all(f" {verb} " in out for verb in app.VERBS)
    for verb in app.VERBS:
        code, out, _ = run(verb, "--help")
        assert code == 0 and "Example: graft" in out
    assert inspect.TOP
