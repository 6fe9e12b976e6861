# SPDX-License-Identifier: Apache-2.0
"""What other packages take from PEFT: `python -m tests.compat.refresh_names` reads it from their newest releases.

Download each package of `CLIENTS` with pip, without what it depends on, parse its Python files, and write
`client_names.json`: {client: {version, names, derives, sets}}, where `names` are dotted names below `peft` that it
imports or reads from a module, `derives` those of classes that it derives classes of its own from, and `sets` those
that it assigns to. Nothing of a package runs.

    python -m tests.compat.refresh_names [--from FOLDER] [client …]

`--from` reads wheels and archives that are in a folder already, and downloads only what is not.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).with_name("client_names.json")
CLIENTS = (
    *("axolotl", "unsloth", "unsloth-zoo", "llamafactory", "ms-swift", "verl", "lm-eval", "mergekit"),
    *("trl", "diffusers", "sentence-transformers", "transformers", "accelerate", "optimum", "optimum-habana"),
    *("optimum-intel", "auto-gptq", "auto-round", "openrlhf", "flagembedding", "colpali-engine", "lerobot"),
    *("chronos-forecasting", "instructlab-training", "fms-hf-tuning", "ludwig", "oumi", "setfit", "xtuner"),
    *("autotrain-advanced", "simpletransformers", "opencompass", "llm2vec", "comfy-diffusion", "text-generation"),
    "peft",  # its sdist: the tests in it
)


class Uses(ast.NodeVisitor):
    """What one file takes from PEFT, as dotted names."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}  # name in the file → dotted name
        self.names: set[str] = set()
        self.derives: set[str] = set()
        self.sets: set[str] = set()

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if below_peft(alias.name):
                self.names.add(alias.name)
                self.known[alias.asname or "peft"] = alias.name if alias.asname else "peft"

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or not node.module or not below_peft(node.module):
            return
        for alias in node.names:
            name = node.module if alias.name == "*" else f"{node.module}.{alias.name}"
            self.names.add(name)
            if alias.name != "*":
                self.known[alias.asname or alias.name] = name

    def dotted(self, node: ast.AST) -> str | None:
        """Return the name that an expression `a.b.c` stands for, if it begins with something of PEFT's."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.dotted(node.value)
            return owner and f"{owner}.{node.attr}"
        return None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self.dotted(node)
        if name is None:
            self.generic_visit(node)
        elif isinstance(node.ctx, ast.Load):
            self.names.add(name)
        else:
            self.sets.add(name)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.derives |= {name for base in node.bases if (name := self.dotted(base))}
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Count `import_module("peft.x")`, and `setattr(peft.x, "name", …)`."""
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if called in ("import_module", "find_spec", "__import__"):
            self.names |= {t for t in texts if below_peft(t)}
        if called in ("setattr", "patch", "object") and texts and (owner := self.dotted(node.args[0])):
            self.sets.add(f"{owner}.{texts[0]}")
        self.generic_visit(node)


def below_peft(module: str) -> bool:
    return module == "peft" or module.startswith("peft.")


def uses(sources: Iterator[str]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {"names": set(), "derives": set(), "sets": set()}
    for text in sources:
        if "peft" not in text:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except SyntaxError:
            continue
        visitor = Uses()
        visitor.visit(Imported(tree))
        for kind, names in found.items():
            names |= getattr(visitor, kind)
    return {kind: sorted(names) for kind, names in found.items()}


def Imported(tree: ast.Module) -> ast.Module:
    """Return the module with its imports first, wherever they stand, so that names are known before they are used."""
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return ast.Module(body=[*imports, *tree.body], type_ignores=[])


def sources(path: Path) -> Iterator[str]:
    """Yield the Python files in a wheel or archive; of PEFT itself its tests only."""
    own = path.name.startswith("peft-")
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".py"):
                    yield archive.read(name).decode(errors="replace")
        return
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".py") and (not own or "/tests/" in member.name):
                file = archive.extractfile(member)
                assert file is not None
                yield file.read().decode(errors="replace")


def download(client: str, folder: Path) -> Path:
    """Return the file of a client's newest release: a wheel, since to unpack an sdist pip would run its build."""
    if (found := in_folder(client, folder)) is not None:
        return found
    form = "--no-binary" if client == "peft" else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--ignore-requires-python"]
    subprocess.run([*command, form, ":all:", "-d", str(folder), client], check=True)
    found = in_folder(client, folder)
    assert found is not None, f"pip downloaded nothing for {client}"
    return found


def in_folder(client: str, folder: Path) -> Path | None:
    stem = re.sub(r"[-_.]+", "_", client).lower()
    pattern = re.compile(rf"{stem}-[^-]+(-.*\.whl|\.tar\.gz)", re.IGNORECASE)
    files = [p for p in folder.iterdir() if pattern.fullmatch(p.name.replace(".", ".", 1))]
    return max(files, key=lambda p: p.stat().st_mtime, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="folder", type=Path, help="a folder with releases")
    parser.add_argument("clients", nargs="*", help="only these; the others stay as they are")
    given = parser.parse_args()
    table = json.loads(FILE.read_text()) if FILE.exists() and given.clients else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        for client in given.clients or CLIENTS:
            path = download(client, folder)
            version = re.sub(r"\.tar\.gz$", "", path.name).split("-")[1]
            table[client] = {"version": version, **uses(sources(path))}
            print(f"{client} {version}: {len(table[client]['names'])} names", flush=True)
    FILE.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
