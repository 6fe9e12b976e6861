# SPDX-License-Identifier: Apache-2.0
"""A look at what trainers' sources use of PEFT: names, attributes and keywords, each of which graft has or explains.

    python -m tests.compat.trainers [--from FOLDER] [trainer …]

reads the newest releases, as `refresh_names` does, and prints what PEFT 0.21.2 has and graft neither has nor names in
docs/differences.md, docs/peft_defects.md or `absent_names.json`. An attribute of some object counts if a class of
PEFT's defines its name and no class of torch, transformers or Python does, in files that mention peft; graft has it if
its own sources define it.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import inspect
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

import graft
from graft.compat import peft as alias
from tests.compat.refresh_names import Imported, Uses, download, sources
from tests.compat.test_clients import ABSENT, PREFIXES, in_peft, resolved

TRAINERS = (
    *("axolotl", "llamafactory", "ms-swift", "simpletuner", "unsloth", "unsloth-zoo", "verl", "skyrl"),
    "optimum-habana",
)
ELSEWHERE = {"OneTrainer": "not on PyPI", "ai-toolkit": "on PyPI that is another project"}
DOCS = Path(__file__).parents[2] / "docs"
COMMON = (nn.Module, nn.ModuleDict, nn.ParameterDict, nn.Linear, nn.Conv2d, nn.Embedding, nn.MultiheadAttention)
COMMON += (torch.Tensor, torch.nn.Parameter, torch.optim.Optimizer, transformers.PreTrainedModel, transformers.Trainer)
COMMON += (transformers.PretrainedConfig, transformers.TrainingArguments, transformers.GenerationConfig, Path)
COMMON += (torch, nn, transformers, *(v for v in vars(builtins).values() if isinstance(v, type)))


class Calls(Uses):
    """What one file takes from PEFT, with keywords of calls, and the attributes that it reads of any object."""

    def __init__(self) -> None:
        super().__init__()
        self.keywords: set[tuple[str, str]] = set()
        self.attributes: set[str] = set()

    def visit_Call(self, node: ast.Call) -> None:
        if name := self.dotted(node.func):
            self.keywords |= {(name, k.arg) for k in node.keywords if k.arg}
        texts = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr", "setattr"):
            self.attributes |= set(texts)
        super().visit_Call(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self.dotted(node) is None:
            self.attributes.add(node.attr)
        super().visit_Attribute(node)


def trees(folder: Path) -> Iterator[ast.Module]:
    for path in folder.rglob("*.py"):
        yield ast.parse(path.read_text())


def defined(node: ast.AST) -> Iterator[str]:
    """Yield the attributes that a class of these sources has: methods, fields, and what is set on `self`."""
    for part in ast.walk(node):
        if isinstance(part, ast.ClassDef):
            for line in part.body:
                if isinstance(line, (ast.FunctionDef, ast.AnnAssign, ast.Assign)):
                    yield getattr(line, "name", None) or ast.unparse(getattr(line, "target", None) or line.targets[0])
        elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            yield part.attr


def told_by(tree: ast.Module) -> Iterator[str]:
    """Yield names that stand as text or as a keyword: facts of layers, members of tables."""
    for node in ast.walk(tree):
        text = node.arg if isinstance(node, ast.keyword) else getattr(node, "value", None)
        if isinstance(text, str) and text.isidentifier():
            yield text


def takes(function: Any, keyword: str) -> bool:
    try:
        known = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(p.name == keyword or p.kind is p.VAR_KEYWORD for p in known)


def look(path: Path, of_peft: set[str], here: set[str], told: set[str]) -> tuple[int, list[str]]:
    """Return how many names, attributes and keywords of PEFT a release uses, and those that nothing here answers."""
    uses = Calls()
    for text in sources(path):
        if "peft" in text:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                uses.known.clear()
                uses.visit(Imported(ast.parse(text)))
    names = {n for n in uses.names | uses.derives | uses.sets if in_peft(n)}
    keywords = {(n, k) for n, k in uses.keywords if in_peft(n) and takes(theirs(n), k)}
    attributes = uses.attributes & of_peft
    alias.install(force=True)
    try:
        missing = [n for n in names if not answered(n)]
        missing += [f"{n}({k}=)" for n, k in keywords if answered(n) and n not in ABSENT and not takes(resolved(n), k)]
    finally:
        alias.uninstall()
    missing += [f".{a}" for a in attributes - here]
    found = [m for m in missing if re.findall(r"\w+", m)[-1] not in told]
    return len(names) + len(keywords) + len(attributes), sorted(found)


def theirs(name: str) -> Any:
    """Return what PEFT has under a dotted name; None where a package is missing that it needs."""
    value: Any = peft
    try:
        for part in name.split(".")[1:]:
            value = getattr(value, part)
    except (AttributeError, ImportError):
        return None
    return value


def answered(name: str) -> bool:
    if name in ABSENT or name.startswith(PREFIXES):
        return True
    try:
        resolved(name)
    except (AttributeError, ImportError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="folder", type=Path, help="a folder with releases")
    parser.add_argument("trainers", nargs="*", default=TRAINERS)
    given = parser.parse_args()
    common = {name for owner in COMMON for name in dir(owner)}
    of_peft = {a for tree in trees(Path(peft.__file__).parent) for a in defined(tree) if len(a) > 2} - common
    ours = [*trees(Path(graft.__file__).parent)]
    here = {a for tree in ours for a in (*defined(tree), *told_by(tree))}
    pages = [(DOCS / name).read_text() for name in ("differences.md", "peft_defects.md")]
    told = set(re.findall(r"\w+", "".join(pages)))
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for trainer in given.trainers:
            path = download(trainer, given.folder or Path(temporary))
            count, missing = look(path, of_peft, here, told)
            found += missing
            print(
                f"{path.name.split('-py')[0]}: {count} uses, {len(missing)} unanswered {' '.join(missing)}", flush=True
            )
    print(*(f"{name}: {why}" for name, why in ELSEWHERE.items()), sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
