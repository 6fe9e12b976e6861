# SPDX-License-Identifier: Apache-2.0
"""A look at what trainers' sources use of PEFT: names, attributes and keywords, each of which graft has or explains.

    python -m tests.compat.trainers [--from FOLDER] [trainer …]

reads the newest releases, as `refresh_names` does, and prints what PEFT 0.21.2 has and graft neither has nor names in
docs/differences.md, docs/peft_defects.md or `absent_names.json`; it fails if there is anything. An attribute that a
trainer reads of some object may be PEFT's if a class of PEFT's defines its name and neither a class of the trainer, of
torch, transformers nor Python does. What is left and is not PEFT's stands in `not_of_peft.json`, with whose it is.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import inspect
import json
import re
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import peft
import safetensors
import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor

import graft
from graft.compat import peft as alias
from tests.compat.refresh_names import Imported, Uses, download, sources
from tests.compat.test_clients import ABSENT, PREFIXES, in_peft, resolved

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
TRAINERS = (
    *("axolotl", "llamafactory", "ms-swift", "simpletuner", "unsloth", "unsloth-zoo", "verl", "skyrl"),
    "optimum-habana",
)
ELSEWHERE = {"OneTrainer": "not on PyPI", "ai-toolkit": "on PyPI that is another project"}
NOT_OF_PEFT = json.loads((HERE / "not_of_peft.json").read_text())  # {why: {trainer: attributes}}
COMMON = (torch, nn, transformers, *(v for v in vars(builtins).values() if isinstance(v, type)), Path)
COMMON += (torch.Tensor, nn.Parameter, DTensor, torch.optim.Optimizer, safetensors.safe_open)
COMMON += (nn.Linear(1, 1), nn.Conv2d(1, 1, 1), nn.Embedding(1, 1), nn.MultiheadAttention(1, 1), nn.ModuleDict())
COMMON += (nn.ParameterDict(), transformers.PreTrainedModel, transformers.Trainer, transformers.TrainingArguments)
COMMON += (transformers.DynamicCache, transformers.StaticCache, transformers.EncoderDecoderCache)
COMMON += (transformers.Qwen2Config(), transformers.GenerationConfig())


class Calls(Uses):
    """What one file takes from PEFT, with keywords of calls, and the attributes that it reads of any object."""

    def __init__(self) -> None:
        super().__init__()
        self.keywords: set[tuple[str, str]] = set()
        self.attributes: set[str] = set()
        self.of_methods: set[tuple[str, str]] = set()  # keywords of methods of any object
        self.within = 0  # classes around

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.within += 1
        super().visit_ClassDef(node)
        self.within -= 1

    def visit_Call(self, node: ast.Call) -> None:
        if name := self.dotted(node.func):
            self.keywords |= {(name, k.arg) for k in node.keywords if k.arg}
        elif isinstance(node.func, ast.Attribute) and not self.of_another(node.func.value):
            self.of_methods |= {(node.func.attr, k.arg) for k in node.keywords if k.arg}
        texts = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr", "setattr"):
            self.attributes |= set(texts)
        super().visit_Call(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self.dotted(node) is None and not self.of_another(node.value):
            self.attributes.add(node.attr)
        super().visit_Attribute(node)

    def of_another(self, node: ast.expr) -> bool:
        """Return True for autograd's context, and `self` in a class: one derived from PEFT's has a row of its own."""
        return isinstance(node, ast.Name) and (node.id == "ctx" or (node.id == "self" and self.within > 0))


@cache
def trees(folder: Path) -> list[ast.Module]:
    return [ast.parse(path.read_text()) for path in folder.rglob("*.py")]


def parsed(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except SyntaxError:
            return ast.Module([], [])


def defined(node: ast.AST, stored: str = "") -> Iterator[str]:
    """Yield the attributes that a class of these sources has: methods, fields, and what is set on it.

    Args:
        stored: the object whose attributes count where they are set; "": any.
    """
    for part in ast.walk(node):
        if isinstance(part, ast.ClassDef):
            for line in part.body:
                if isinstance(line, (ast.FunctionDef, ast.AnnAssign, ast.Assign)):
                    yield getattr(line, "name", None) or ast.unparse(getattr(line, "target", None) or line.targets[0])
        elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            yield from [part.attr] if stored in ("", ast.unparse(part.value)) else ()


def told_by(tree: ast.Module) -> Iterator[str]:
    """Yield names that stand as text or as a keyword: facts of layers, members of tables."""
    for node in ast.walk(tree):
        text = node.arg if isinstance(node, ast.keyword) else getattr(node, "value", None)
        if isinstance(text, str) and text.isidentifier():
            yield text


def parameters(folder: Path) -> dict[str, set[str]]:
    """Return the parameters that methods of a name have; "**" is one that takes any keyword."""
    found = defaultdict(set)
    for tree in trees(folder):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                found[node.name] |= {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
                found[node.name] |= {"**"} if node.args.kwarg else set()
    return found


def takes(function: Any, keyword: str) -> bool:
    try:
        known = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(p.name == keyword or p.kind is p.VAR_KEYWORD for p in known)


class Known:
    """What PEFT has, what graft has, and what its pages tell."""

    def __init__(self) -> None:
        theirs, ours = (Path(package.__file__).parent for package in (peft, graft))
        common = {name for owner in COMMON for name in dir(owner)}
        self.of_peft = {a for tree in trees(theirs) for a in defined(tree) if len(a) > 2} - common
        self.here = {a for tree in trees(ours) for a in (*defined(tree), *told_by(tree))}
        self.taken, self.taken_here = parameters(theirs), parameters(ours)
        pages = "".join((DOCS / name).read_text() for name in ("differences.md", "peft_defects.md"))
        self.told = {word for span in re.findall(r"`([^`\n]+)`", pages) for word in re.findall(r"\w+", span)}

    def lacks(self, method: str, keyword: str) -> bool:
        """Return True if a method of PEFT's takes a keyword that graft's of this name does not."""
        here = self.taken_here.get(method, set())
        return method in self.of_peft & self.here and keyword in self.taken[method] and not here & {keyword, "**"}


def look(trainer: str, path: Path, known: Known) -> tuple[int, list[str]]:
    """Return how many names, attributes and keywords of PEFT a release uses, and those that nothing here answers."""
    uses, own = Calls(), set[str]()
    for text in sources(path):
        tree = parsed(text)
        own |= {*defined(tree, "self")}
        if "peft" in text:
            uses.known.clear()
            uses.visit(Imported(tree))
    names = {n for n in uses.names | uses.derives | uses.sets if in_peft(n)}
    keywords = {(n, k) for n, k in uses.keywords if in_peft(n) and takes(theirs(n), k)}
    others = {a for why in NOT_OF_PEFT.values() for a in why.get(trainer, ())}
    attributes = (uses.attributes & known.of_peft) - own - others
    of_methods = {(m, k) for m, k in uses.of_methods if m in attributes and k in known.taken[m]}
    alias.install(force=True)
    try:
        missing = [n for n in names if not answered(n)]
        missing += [f"{n}({k}=)" for n, k in keywords if answered(n) and n not in ABSENT and not takes(resolved(n), k)]
    finally:
        alias.uninstall()
    missing += [f".{a}" for a in attributes - known.here]
    missing += [f".{m}({k}=)" for m, k in of_methods if known.lacks(m, k)]
    found = [m for m in missing if re.findall(r"\w+", m)[-1] not in known.told]
    return len(names) + len(keywords) + len(attributes) + len(of_methods), sorted(found)


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
    known = Known()
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for trainer in given.trainers:
            path = download(trainer, given.folder or Path(temporary))
            count, missing = look(trainer, path, known)
            found += missing
            release = path.name.split("-py")[0]
            print(f"{release}: {count} uses, {len(missing)} unanswered {' '.join(missing)}", flush=True)
    print(*(f"{name}: {why}" for name, why in ELSEWHERE.items()), sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
