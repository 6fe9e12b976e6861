# SPDX-License-Identifier: Apache-2.0
"""What stands next to an output, or in its place, is of others: no result deletes, follows or takes up any of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft.command import app
from graft.config import atomic
from graft.core.errors import CheckpointError
from graft.files import sources
from graft.files.convert import ENDS, convert_adapter_file
from graft.files.errors import OutputExistsError
from graft.files.formats import WRITTEN
from graft.files.merging.merge import merge_adapters
from tests.raised import refuses
from tests.trust.folders import files

FIXTURES = Path(__file__).parents[1] / "files" / "fixtures"
LLAMA, MLX = FIXTURES / "base_llama", FIXTURES / "mlx_lora"
SECRET = b"not for others"
ROOM = ".out.graft-merge"


@pytest.fixture
def places(tmp_path):
    """A folder with a base and an adapter, where an output comes, and one elsewhere that must stay as it is."""
    victim = tmp_path / "elsewhere"
    (victim / "deep").mkdir(parents=True)
    for path in (victim / "model.safetensors", victim / "config.json", victim / "deep" / "letter.txt"):
        path.write_bytes(SECRET)
    before, here = files(victim), tmp_path / "here"
    shutil.copytree(LLAMA, here / "base")
    shutil.copytree(MLX, here / "adapter")
    yield here, victim
    assert files(victim) == before


def merged(here, **options):
    return merge_adapters(here / "base", [here / "adapter"], here / "out", **options)


def interrupted(here, **options):
    """Stop a merge after its first file."""

    def stop(_):
        raise KeyboardInterrupt

    refuses(KeyboardInterrupt, None, merged, here, step=stop, shard_size=20_000, **options)


# the room in which an output comes about


def test_a_room_that_is_a_link_is_refused(places):
    here, victim = places
    (here / ROOM).symlink_to(victim)
    refuses(OutputExistsError, "is a link, no folder, or another user's", merged, here)
    assert (here / ROOM).is_symlink() and not (here / "out").exists()


@pytest.mark.parametrize(
    "name, says",
    [("lock", "lock"), ("state.json", "state.json"), ("out", "out"), ("out/model.safetensors", "out/model.safetensors"),
     ("out/config.json", "out/config.json"), ("out/.model.safetensors.0badf00d-1-0123456789abcdef.tmp", ".tmp"),
     ("out/1_Pooling", "out/1_Pooling")],
)  # fmt: skip
@pytest.mark.parametrize("target", ["model.safetensors", "deep", "new"])
def test_a_room_with_links_is_refused(places, name, says, target):
    here, victim = places
    link = here / ROOM / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim / target)
    with pytest.raises(OutputExistsError, match="which no merge has written") as e:
        merged(here)
    assert says in str(e.value) and link.is_symlink() and not (here / "out").exists()


@pytest.mark.parametrize("name", ["thesis.txt", "out/thesis.txt", "other/model.safetensors", "out/deep/config.json"])
def test_a_room_with_files_of_others_is_refused(places, name):
    here, _ = places
    (here / ROOM / name).parent.mkdir(parents=True)
    (here / ROOM / name).write_text("years")
    refuses(OutputExistsError, "which no merge has written", merged, here)
    assert (here / ROOM / name).read_text() == "years"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="users have no numbers")
def test_a_room_of_another_user_is_refused(places, monkeypatch):
    here, _ = places
    (here / ROOM).mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.lstat(here).st_uid + 1)
    refuses(OutputExistsError, "another user's", merged, here)


def test_where_links_are_junctions_and_opening_follows_them(places, monkeypatch):
    """As on Windows, whose `os` has neither O_NOFOLLOW nor numbers of users."""
    here, _ = places
    monkeypatch.setattr(atomic, "NO_FOLLOW", 0)
    monkeypatch.delattr(os, "geteuid")
    monkeypatch.setattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", 0xA0000003, raising=False)
    (here / ROOM).mkdir()
    facts = SimpleNamespace(st_mode=stat.S_IFDIR | 0o700, st_reparse_tag=0xA0000003, st_uid=0)
    monkeypatch.setattr(os, "lstat", lambda path: facts)
    refuses(OutputExistsError, "is a link", sources.take_work_folder, str(here / ROOM))
    facts.st_reparse_tag = 0
    sources.take_work_folder(str(here / ROOM))


@pytest.mark.skipif(os.name != "posix", reason="files have no such modes")
def test_who_may_enter(places):
    """The room is the user's alone, also one that others could enter before; the output has what the umask gives."""
    here, _ = places
    seen = {}

    def look(_):
        room = here / ROOM
        seen.update({p.name: stat.S_IMODE(p.lstat().st_mode) for p in (room, room / "lock", room / "out")})

    before = os.umask(0o027)
    try:
        (here / ROOM).mkdir(0o755)
        os.chmod(here / ROOM, 0o777)
        merged(here, step=look)
    finally:
        os.umask(before)
    assert seen == {ROOM: 0o700, "lock": 0o600, "out": 0o750}
    assert stat.S_IMODE((here / "out").stat().st_mode) == 0o750
    assert {stat.S_IMODE(p.stat().st_mode) for p in (here / "out").iterdir()} == {0o640}
    assert not (here / ROOM).exists()


def test_a_failed_merge_leaves_no_folder(places, monkeypatch):
    here, _ = places
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    refuses(OSError, "are free", merge_adapters, here / "base", [here / "adapter"], here / "a" / "b" / "out")
    assert sorted(p.name for p in here.iterdir()) == ["adapter", "base"]


def test_what_came_to_the_old_output_meanwhile_stays(places):
    here, _ = places
    merged(here)
    before = files(here / "out")
    with pytest.raises(OutputExistsError, match=r"holds \[thesis.txt\]"):
        merged(here, force=True, step=lambda _: (here / "out" / "thesis.txt").write_text("years"))
    assert files(here / "out") == before | {"thesis.txt": b"years"}


# what a killed run has left


@pytest.mark.parametrize("how", ["bytes", "cut", "state", "rows", "digest", "name", "room"])
def test_a_shard_that_is_not_what_was_written_is_written_anew(places, how):
    here, _ = places
    whole = merged(here, shard_size=20_000, certificate=True)
    wanted = files(here / "out")
    shutil.rmtree(here / "out")
    interrupted(here, certificate=True)
    state, shard = here / ROOM / "state.json", next((here / ROOM / "out").glob("*.safetensors"))
    noted = json.loads(state.read_text())
    note = noted["shards"][shard.name]
    if how in ("bytes", "digest"):
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    if how == "cut":
        shard.write_bytes(shard.read_bytes()[:-8])
    if how == "rows":
        note["rows"] = [{"tensor": ["x"], "update": "much"}]
    if how == "digest":  # of what stands there now, but no text
        note["sha256"] = [hashlib.sha256(shard.read_bytes()).hexdigest()]
    if how == "name":
        noted["shards"] = {"../../elsewhere/model.safetensors": note | {"sha256": hashlib.sha256(SECRET).hexdigest()}}
    state.write_text("[" * 100_000 if how == "state" else json.dumps(noted))
    if how == "room":  # a copy, as out of an archive
        shutil.copytree(here / ROOM, here / "copy")
        (here / ROOM).rename(here / "first")
        (here / "copy").rename(here / ROOM)
    account = merged(here, shard_size=20_000, certificate=True)
    assert account.resumed == 0 and account.tensors == whole.tensors
    assert files(here / "out") == wanted


def test_a_whole_shard_is_taken_up(places):
    here, _ = places
    merged(here, shard_size=20_000, certificate=True)
    wanted = files(here / "out")
    shutil.rmtree(here / "out")
    interrupted(here, certificate=True)
    assert merged(here, shard_size=20_000, certificate=True).resumed == 1
    assert files(here / "out") == wanted and sorted(os.listdir(here)) == ["adapter", "base", "out"]


# what --force replaces


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr("sys.argv", ["graft", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            app.main()
        return left.value.code or 0, "".join(capsys.readouterr())

    return call


VERBS = {
    "convert": "convert {here}/adapter --to peft --base {here}/base -o {out}",
    "resize": "resize {here}/adapter --rank 1 -o {out}",
    "extract": "extract {here}/tuned {here}/base -o {out}",
    "export": "export {here}/adapter --for vllm --base {here}/base -o {out}",
    "merge": "merge {here}/base {here}/adapter -o {out}",
}


def words(verb, here, out):
    return VERBS[verb].format(here=here, out=out).split()


def tune(here):
    shutil.copytree(here / "base", here / "tuned")
    tensors = load_file(here / "tuned" / "model.safetensors")
    torch.manual_seed(0)
    changed = {k: t + torch.randn_like(t) if "q_proj" in k else t for k, t in tensors.items()}
    save_file(changed, here / "tuned" / "model.safetensors", {"format": "pt"})


LOCON = FIXTURES / "lycoris_locon" / "adapter.safetensors"
OTHERS = {  # what is in a folder: name → bytes, the file that a link leads to, or None for a folder
    "photos": {"photos.jpg": b"1"},
    "project": {"model.gguf": b"GGUF", "main.py": b"1"},
    "page": {"config.json": b"{}", ".git/HEAD": b"1"},
    "collection": {"one.safetensors": LOCON.read_bytes(), "two.safetensors": LOCON.read_bytes()},
    "config alone": {"config.json": b"{}"},
    "card alone": {"README.md": b"mine"},
    "inner": {"model.safetensors": b"1", "adapter_model.safetensors": b"1", "src": None},
    "links": {"model.safetensors": __file__, "adapter_model.safetensors": __file__},
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.filterwarnings("ignore")
def test_force_replaces_no_folder_of_others(places, run, verb, kind):
    here, _ = places
    out = here / "damaged cut off"
    tune(here)
    for name, content in OTHERS[kind].items():
        path = out / name
        (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            path.symlink_to(content)
    before = sorted((str(p), p.read_bytes() if p.is_file() else b"") for p in out.rglob("*"))
    line = [str(out) if word == "OUT" else word for word in words(verb, here, "OUT")]
    code, said = run(*line, "--force")
    assert code == 2 and "Move that away" in said
    assert sorted((str(p), p.read_bytes() if p.is_file() else b"") for p in out.rglob("*")) == before


@pytest.mark.parametrize(
    "extra", ["optimizer.pt", "training.safetensors", "tokenizer.json", "second/adapter_config.json"]
)
@pytest.mark.parametrize("verb", [v for v in VERBS if v != "merge"])
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_with_more_than_an_adapter_stays(places, run, verb, extra):
    here, _ = places
    tune(here)
    assert run(*words(verb, here, here / "out"))[0] == 0
    (here / "out" / extra).parent.mkdir(exist_ok=True)
    (here / "out" / extra).write_text("1")
    before = files(here / "out")
    code, said = run(*words(verb, here, here / "out"), "--force")
    assert code == 2 and extra.partition("/")[0] in said and files(here / "out") == before


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.filterwarnings("ignore")
def test_force_replaces_what_the_verb_has_written_whole_or_damaged(places, run, verb):
    here, _ = places
    tune(here)
    (here / "base" / "tokenizer.json").write_text("{}")
    (here / "base" / "LICENSE").write_text("")
    assert run(*words(verb, here, here / "out"), *(["--certificate"] if verb == "merge" else []))[0] == 0
    wanted = files(here / "out")
    weights = next((here / "out").glob("*model*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run(*words(verb, here, here / "out"), "--force", *(["--certificate"] if verb == "merge" else []))[0] == 0
    assert files(here / "out") == wanted


WRITERS = [name for name in WRITTEN if name != "pyreft"]


@pytest.mark.parametrize("to", WRITERS)
def test_every_format_knows_the_files_that_it_writes(places, to):
    if to == "gguf":
        pytest.importorskip("gguf.constants")  # some other module may be called gguf
    here, _ = places
    source, base = (FIXTURES / "diffusers_new", None) if to == "diffusers" else (here / "adapter", here / "base")
    if to in ENDS:  # a format that is one file, which goes into a folder that is there
        (here / "new").mkdir()
    convert_adapter_file(source, to, here / "new", base, lossy=True)
    assert files(here / "new") and sources.list_foreign_entries(str(here / "new"), model=False) == []


def test_an_index_names_no_files_of_others(tmp_path):
    """One whose names are patterns, or no weights."""
    (tmp_path / "model.safetensors").write_bytes(b"1")
    (tmp_path / "thesis.txt").write_text("years")
    (tmp_path / "mine.safetensors").write_text("1")
    index = tmp_path / "model.safetensors.index.json"
    for names in ({"a": "*"}, {"a": "thesis.txt"}, {"a": "*.safetensors"}, {"a": "../x.safetensors"}, ["a"], 5):
        index.write_text(json.dumps({"weight_map": names}))
        assert sources.list_foreign_entries(str(tmp_path), model=True) == ["mine.safetensors", "thesis.txt"]
    (tmp_path / "model.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": {"a": "mine.safetensors"}}))
    assert sources.list_foreign_entries(str(tmp_path), model=True) == ["thesis.txt"]


# what a merge copies


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "LICENSE", "1_Pooling/config.json"])
@pytest.mark.parametrize("target", ["model.safetensors", "missing"])
def test_a_link_out_of_the_base_is_not_followed(places, name, target):
    here, victim = places
    link = here / "base" / name
    link.parent.mkdir(exist_ok=True)
    if name == "config.json" and target != "missing":  # which is read first
        shutil.copy(link, victim.parent / "config.json")
        target = "../config.json"
    link.unlink(missing_ok=True)
    link.symlink_to(victim / target)
    refuses(CheckpointError, f"{name} is a link to .*outside of the model's folder", merged, here)
    assert sorted(os.listdir(here)) == ["adapter", "base"]


def test_weights_that_lie_elsewhere_are_not_copied(places):
    here, _ = places
    (here / "base" / "model.safetensors").rename(here / "private.safetensors")
    (here / "base" / "model.safetensors").symlink_to("../private.safetensors")
    refuses(CheckpointError, r"model\.safetensors is a link to .*private", merged, here)
    assert not (here / "out").exists()


def test_a_pipe_in_the_base_does_not_hang(places):
    here, _ = places
    os.mkfifo(here / "base" / "tokenizer.json")
    refuses(CheckpointError, r"tokenizer\.json is no regular file", merged, here)


def test_a_snapshot_of_the_hubs_cache_is_a_base(places):
    """Its files are links to the blobs beside it; one that leads elsewhere is refused."""
    here, victim = places
    repo = here / "models--me--it"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (here / "base" / "tokenizer.json").write_text("{}")
    for i, path in enumerate(sorted((here / "base").iterdir())):
        path.rename(repo / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    merge_adapters(snapshot, [here / "adapter"], here / "out")
    assert not any(p.is_symlink() for p in (here / "out").iterdir())
    assert (here / "out" / "tokenizer.json").read_text() == "{}"
    (repo / "blobs" / "100").symlink_to(victim / "model.safetensors")
    (snapshot / "vocab.txt").symlink_to("../../blobs/100")
    with pytest.raises(CheckpointError, match="outside of the model's folder"):
        merge_adapters(snapshot, [here / "adapter"], here / "more")


def test_what_a_model_needs_is_copied_and_nothing_else(places):
    here, victim = places
    needed = {"tokenizer.model.v3", "chat_template.jinja", "special_tokens_map.json", "preprocessor_config.json",
              "additional_chat_templates/tool.jinja", "LICENSE.txt", "modeling_own.py", "1_Dense/model.safetensors",
              "spiece.model", "qwen.tiktoken"}  # fmt: skip
    others = {".env", "secrets.json", "train.py", "notes/config.json", "optimizer.pt", "adapter_config.json",
              "README.md", "1_Dense/notes.txt"}  # fmt: skip
    for name in needed | others:
        (here / "base" / name).parent.mkdir(exist_ok=True)
        (here / "base" / name).write_text("x")
    (here / "base" / "2_Dense").symlink_to(victim)
    notes = merged(here).notes
    copied = set(files(here / "out"))
    assert needed <= copied and not others & copied and not any(name.startswith("2_Dense") for name in copied)
    assert notes == [
        "Not copied from the base: [1_Dense/notes.txt, 2_Dense, adapter_config.json, notes/, optimizer.pt, "
        "secrets.json, train.py]."
    ]
