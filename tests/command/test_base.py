# SPDX-License-Identifier: Apache-2.0
"""The base of a verb: a folder, a hub id in the hub's cache, or what the adapter names; never the network."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from graft.files.sources import describe_named_base, find_base, read_base_name
from tests.files import adapters
from tests.serving.server import answers, serving

FIXTURES = Path(__file__).parents[1] / "files" / "fixtures"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache(folder, repo, source):
    """Lay out a model as the hub's cache does: blobs, and a snapshot of links to them."""
    place = folder / ("models--" + repo.replace("/", "--"))
    snapshot = place / "snapshots" / COMMIT
    for made in (place / "blobs", place / "refs", snapshot):
        made.mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(Path(source).iterdir()):
        shutil.copyfile(path, place / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return str(snapshot)


def naming(folder, base, source="plain"):
    """Copy an adapter, whose config then names a base."""
    shutil.copytree(adapters.folder(source), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return folder


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """The snapshot of me/base and gpt2; a request to any network fails the test, though the hub's settings allow it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    look_up = socket.getaddrinfo

    def look_up_here(host, *args, **options):
        assert host == "127.0.0.1", "the network is asked"
        return look_up(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up_here)
    cache(tmp_path / "hub", "gpt2", adapters.base())
    return cache(tmp_path / "hub", "me/base", adapters.base())


@pytest.mark.parametrize("words", [
    "inspect A", "diff A A", "lint A", "resize A -o OUT --rank 2", "convert A --to mlx -o OUT", "check A --for vllm",
    "export A --for vllm -o OUT", "export LOHA --for vllm -o OUT",
])  # fmt: skip
@pytest.mark.parametrize("base", ["me/base", f"me/base@{COMMIT}", "me/base@main", "gpt2"])
def test_verbs_take_a_hub_id_that_is_cached(words, base, snapshot, run, tmp_path):
    loha = "method/LoHaConfig"
    places = {"A": adapters.folder("plain"), "LOHA": adapters.folder(loha), "OUT": tmp_path / "out"}
    code, _, err = run(*(places.get(word, word) for word in words.split()), "--base", base)
    assert (code, err) == (0, "")
    assert (tmp_path / "out").exists() == ("OUT" in words)


def test_models_that_verbs_read_may_be_hub_ids(snapshot, run, tmp_path):
    assert run("merge", "me/base", adapters.folder("plain"), "-o", tmp_path / "merged")[0] == 0
    assert run("extract", tmp_path / "merged", "me/base", "-o", tmp_path / "extracted", "--rank", "4")[0] == 0
    assert run("diff", adapters.folder("plain"), tmp_path / "extracted", "--tol", "1e-3")[0] == 0
    assert run("plan", "me/base", "--seq", "8", "--targets", "q_proj")[0] == 0


@pytest.mark.parametrize("base, remedy", [
    ("me/other", "hf download me/other\n"), ("me/base@v2", "hf download me/base --revision v2\n"),
    ("bert", "hf download bert\n"),
])  # fmt: skip
def test_what_is_not_cached_says_how_to_fetch_it(base, remedy, snapshot, run, tmp_path):
    for words in (
        ("inspect", "A", "--base"), ("export", "A", "--for", "vllm", "-o", tmp_path / "out", "--base"), ("plan",),
        ("lint", "A", "--base"), ("check", "A", "--for", "vllm", "--base"), ("extract", "BASE", "-o", tmp_path / "out"),
        ("verify", "--adapter", "A", "--url", "URL", "--base"),
    ):  # fmt: skip
        with serving({"base": None}) as url:
            places = {"A": adapters.folder("plain"), "URL": url, "BASE": adapters.base()}
            code, out, err = run(*(places.get(word, word) for word in words), base)
        assert (code, out) == (3, "") and err.endswith(remedy) and not (tmp_path / "out").exists()


def test_export_and_verify_take_the_base_that_the_adapter_names(snapshot, run, tmp_path):
    own = naming(tmp_path / "a", "me/base", "scaled")
    assert run("export", own, "--for", "vllm", "-o", tmp_path / "out")[0] == 0
    with serving({"base": answers(adapters.make("llama")), "tuned": answers(adapters.model("scaled"))}) as url:
        for adapter in (own, tmp_path / "out"):
            code, out, err = run("verify", "--adapter", adapter, "--url", url, "--model", "tuned")
            assert code == 0 and out.startswith("The server applies the adapter."), err


@pytest.mark.parametrize("words", ["convert A --to peft -o OUT", "inspect A", "diff A A", "resize A -o OUT --rank 2"])
def test_a_format_that_needs_a_base_gets_what_the_adapter_names(words, snapshot, run, tmp_path):
    """torchtune's files do not say how many heads the base has."""
    cache(tmp_path / "hub", "me/llama", FIXTURES / "base_llama")
    shutil.copytree(FIXTURES / "torchtune_lora", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for base, code, says in (None, 2, "--base"), ("me/other", 3, "hf download me/other"), ("me/llama", 0, ""):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        places = {"A": tmp_path / "a", "OUT": tmp_path / "out"}
        found, _, err = run(*(places.get(word, word) for word in words.split()))
        assert found == code and says in err, err
        assert (tmp_path / "out").exists() == (code == 0 and "OUT" in words)


def test_lint_and_check_compare_with_the_names_of_that_base(snapshot, run, tmp_path):
    fits, misfit = naming(tmp_path / "a", "me/base"), naming(tmp_path / "b", "me/base", "high")
    assert "Names of modules were not compared" not in run("check", fits, "--for", "vllm")[1]
    absent = naming(tmp_path / "c", "me/other")
    code, out, err = run("check", absent, "--for", "vllm")
    assert (code, err) == (0, "") and "Names of modules were not compared" in out
    config = json.loads((Path(snapshot) / "config.json").read_text())
    assert describe_named_base(str(fits)).config == config and not describe_named_base(str(fits)).tensors
    assert describe_named_base(str(absent)) is None and describe_named_base(str(misfit)) is not None
    rules = lambda *words: {f["rule"] for f in json.loads(run("lint", *words, "--json")[1])["findings"]}
    assert rules(fits) == rules(fits, "--base", "me/base") - {"intruder"}  # which reads weights
    assert "base-mismatch" not in rules(absent)
    large = cache(tmp_path / "hub", "me/large", adapters.base("gpt2"))
    assert "base-mismatch" in rules(naming(tmp_path / "d", "me/large")) and Path(large).is_dir()


def test_an_adapter_that_names_no_base(run, tmp_path):
    for name in (None, "", "//host/share", "\\\\host\\share"):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        adapter = naming(tmp_path / "a", name)
        assert read_base_name(str(adapter)) is None and describe_named_base(str(adapter)) is None
        code, _, err = run("export", adapter, "--for", "vllm", "-o", tmp_path / "out")
        assert code == 2 and err.startswith(f"graft: {adapter} names no base model. Give one with --base")


def test_a_path_goes_before_the_cache(snapshot, tmp_path, monkeypatch):
    assert find_base("me/base") == snapshot
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapters.base(), "me/base")
    assert find_base("me/base") == "me/base" and find_base(tmp_path / "none") == str(tmp_path / "none")
