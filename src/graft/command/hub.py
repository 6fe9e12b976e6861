# SPDX-License-Identifier: Apache-2.0
"""`graft push`, `pull`, `card`: adapters to and from the Hugging Face hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.command import show
from graft.command.app import HUB, app, print_json
from graft.config.hub import looks_like_repository
from graft.config.reading import Json
from graft.core.errors import CheckpointError
from graft.files.bases import COMPONENTS

if TYPE_CHECKING:
    from graft.files.neutral import AdapterFile

OWN = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
PICKLES = (".bin", ".pt", ".pth")
OF_PARTS = tuple(f"{part}*/{name}" for part in COMPONENTS for name in OWN)  # of a pipeline


@app.command(rich_help_panel=HUB)
def push(
    adapter: Annotated[Path, typer.Argument(help="Folder with an adapter.")],
    repo: Annotated[str, typer.Argument(help="user/name on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is new.")] = False,
    message: Annotated[str, typer.Option("--message", "-m", help="Of the commit.")] = "Upload adapter",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the adapter, send nothing.")] = False,
    quiet: show.Quiet = False,
    as_json: show.Json = False,
) -> None:
    """Upload an adapter's folder, after a look at it: what no reader could load never leaves.

    Example: graft push out/adapter me/my-adapter --private
    """
    from graft.config import hub
    from graft.files import formats

    file = formats.read(adapter)
    found: Json = {"repo": repo, "format": file.format, "method": file.method, "files": names_in(adapter)}
    if not dry_run:
        url = hub.push(lambda folder: copied(adapter, Path(folder)), repo, private=private, commit_message=message)
        found["url"] = str(url)
    report(found, f"{'Would push' if dry_run else 'Pushed'} {len(found['files'])} files to {repo}.", quiet, as_json)


@app.command(rich_help_panel=HUB)
def pull(
    repo: Annotated[str, typer.Argument(help="user/name on the hub, @revision behind it if wanted.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    force: show.Force = False,
    quiet: show.Quiet = False,
    as_json: show.Json = False,
) -> None:
    """Download an adapter into a folder. Pickles are left out where safetensors are there.

    Example: graft pull me/my-adapter@main -o adapters/mine
    """
    from huggingface_hub import snapshot_download

    from graft.config import hub
    from graft.core.errors import HubError
    from graft.files import formats
    from graft.files.output import appearing, check_output

    check_output(str(output), [], force)
    name, _, revision = repo.partition("@")
    wanted = [*OWN, *OF_PARTS, "*.safetensors", "*.md"]
    try:
        there = Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except Exception as e:  # of the network or the hub, of types that differ between versions
        login = hub.login(e.__cause__ or e)
        raise HubError(f"'{repo}' cannot be fetched from the hub: {type(e).__name__}: {e}{login}") from e
    file = formats.read(there)  # whatever is no adapter never gets to the output
    with appearing(str(output)) as part:
        copied(there, Path(part), pickles=False)
    found: Json = {"repo": repo, "output": str(output), "format": file.format, "method": file.method}
    found["files"] = names_in(output)
    report(found, f"Pulled {len(found['files'])} files of {repo} to {output}.", quiet, as_json)


@app.command(rich_help_panel=HUB)
def card(
    adapter: Annotated[Path, typer.Argument(help="Folder with an adapter.")],
    base: Annotated[str | None, typer.Option(help="Name of the base model; else that of the adapter's config.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="As the hub writes it: apache-2.0.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card, write nothing.")] = False,
    quiet: show.Quiet = False,
    as_json: show.Json = False,
) -> None:
    """Write README.md, the adapter's model card; of one that is there the text stays, and its head is renewed.

    Example: graft card out/adapter --license apache-2.0
    """
    from graft.config.atomic import replace, write_text
    from graft.files import formats

    text = card_of(formats.read(adapter), adapter / "README.md", base, licence)
    path = adapter / "README.md"
    if not dry_run:
        replace(str(path), write_text(text))
    report({"output": str(path), "card": text}, text if dry_run else f"Wrote {path}.", quiet, as_json)


def card_of(adapter: AdapterFile, path: Path, base: str | None, licence: str | None) -> str:
    """Return the text of a model card for an adapter that was read."""
    from huggingface_hub import ModelCard

    from graft.files.neutral import LowRank

    base = base or adapter.base
    if path.exists():
        try:
            made = ModelCard(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as e:
            raise CheckpointError(f"{path} is no text in UTF-8 ({e}): write it anew, or remove it.") from e
    else:
        ranks = sorted({m.rank for m in adapter.modules.values() if isinstance(m, LowRank)})
        parts = [f"- method: {adapter.method}", f"- adapted modules: {len(adapter.modules)}"]
        parts += [f"- rank: {', '.join(map(str, ranks))}"] * bool(ranks)
        parts += [f"- trained whole: {len(adapter.full)} tensors"] * bool(adapter.full)
        made = ModelCard("---\n{}\n---\n# Adapter for " + f"{base or 'an unknown base'}\n\n" + "\n".join(parts) + "\n")
    tags = {*(made.data.get("tags") or []), *(["lora"] if adapter.method == "LORA" else [])}
    made.data["library_name"] = "peft"
    made.data["tags"] = sorted(tags)
    if base and looks_like_repository(base):  # a path of this machine means nothing to others
        made.data["base_model"] = base
        made.data["base_model_relation"] = "adapter"
    if licence:
        made.data["license"] = licence
    return str(made)


def names_in(folder: Path) -> list[str]:
    """Return the files of an adapter's folder but for hidden ones; of a pipeline's those of each part as well."""
    from graft.files.formats.peft import parts_in

    inner = [folder / part for part in parts_in(str(folder))]
    files = [p for place in (folder, *inner) for p in place.iterdir() if p.is_file() and not p.name.startswith(".")]
    return sorted(p.relative_to(folder).as_posix() for p in files)


def copied(source: Path, target: Path, pickles: bool = True) -> None:
    """Copy the files that `names_in` gives.

    Args:
        pickles: those beside safetensors as well.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in names_in(source):
        if pickles or not (name.endswith(PICKLES) and any((source / name).parent.glob("*.safetensors"))):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


def report(found: Json, text: str, quiet: bool, as_json: bool) -> None:
    if as_json:
        print_json(found)
    elif not quiet:
        print(text)
