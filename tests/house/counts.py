# SPDX-License-Identifier: Apache-2.0
"""Counts of a Python file: lines of code, and turns of names and sentences that readers stumble over."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

QUIET = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER
}  # fmt: skip
INTERFACES = {"main", "read", "write", "recognises", "build", "run", "check"}  # names that tables call in many files
VAGUE = {
    "own", "found", "made", "given", "told", "held", "kept", "taken", "theirs", "ours", "mine", "here", "there",
    "rest", "other", "others", "has", "have", "takes",
}  # fmt: skip
# endings of participles, and words that end alike and are none
PARTICIPLE = re.compile(r"[a-z]*(?:ed|wn|ung|ought|aken|iven|ritten|idden|eld|ept|old|aid)")
NO_PARTICIPLES = {
    "embed", "unembed", "feed", "need", "seed", "shed", "speed", "bed", "down", "own", "unknown", "fold", "unfold",
    "hold", "scaffold", "old", "field", "shield", "breakdown", "threshold", "accept", "except", "concept", "dept",
    "paid", "aid",
}  # fmt: skip
LONG = 30  # words of a sentence
HARD_TURNS = (
    re.compile(r"\b[Ww]hat\b(?![^.?!]*\?)"),  # relative, not of a question
    re.compile(r"\b(?:of|by|in|to|from|on|with|for) (?:which|whose|whom|what)\b|\bwhose\b"),
    re.compile(
        r"\b(?:stands? (?:for|in|beside|at|on|there)|beside|of its own|of their own|in its place|by itself|comes? along"
        r"|goes? on|makes? of|(?:is|are) (?:asked|told)|gives? out|hands? on|Have (?:all|the|an?|what))\b"
    ),
)


class SourceFile:
    """A Python file and its counts."""

    def __init__(self, path: Path):
        self.path = path
        self.text = path.read_text()
        self.tree = ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @cached_property
    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        kinds = ast.FunctionDef, ast.AsyncFunctionDef
        return [node for node in self.nodes if isinstance(node, kinds) and not node.name.startswith("__")]

    @cached_property
    def docstrings(self) -> list[ast.Expr]:
        """The statements that are docstrings."""
        owners = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
        return [
            node.body[0]
            for node in self.nodes
            if isinstance(node, owners) and ast.get_docstring(node, clean=False) and isinstance(node.body[0], ast.Expr)
        ]

    @cached_property
    def tokens(self) -> list[tokenize.TokenInfo]:
        return list(tokenize.generate_tokens(io.StringIO(self.text).readline))

    @cached_property
    def texts(self) -> list[str]:
        """Docstrings, comments, and the messages of errors and warnings."""
        return list(self.find_texts())

    def count_lines(self) -> int:
        """Return the number of lines without docstrings, comments and blank lines."""
        lines: set[int] = set()
        for token in self.tokens:
            if token.type not in QUIET:
                lines.add(token.start[0])
                if token.end[0] > token.start[0]:
                    lines.update(range(token.start[0], token.end[0] + 1))
        for docstring in self.docstrings:
            lines.difference_update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
        return len(lines)

    def module_names(self) -> set[str]:
        """Return the names of the functions and classes of the module, without those of interfaces."""
        kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
        names = {node.name for node in self.tree.body if isinstance(node, kinds)}
        return {name for name in names - INTERFACES if not name.startswith("__")}

    def participles(self) -> list[str]:
        """Return the names of functions that begin with a participle or a vague word."""
        return [node.name for node in self.functions if is_participle(node.name)]

    def vague_variables(self) -> list[str]:
        names = [node.id for node in self.nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        return [name for name in names if name in VAGUE]

    def find_texts(self) -> Iterator[str]:
        """Yield docstrings, comments, and the messages of errors and warnings."""
        for docstring in self.docstrings:
            yield docstring.value.value  # type: ignore[attr-defined]
        for node in self.nodes:
            called = getattr(node, "func", None)
            if isinstance(node, ast.Raise) or getattr(called, "id", getattr(called, "attr", "")) in ("warn", "warning"):
                texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                yield " ".join(texts)
        for token in self.tokens:
            if token.type == tokenize.COMMENT:
                yield token.string.lstrip("# ")

    def count_words(self) -> int:
        return sum(len(text.split()) for text in self.texts)

    def count_hard_turns(self) -> int:
        return sum(count_hard_turns(text) for text in self.texts)


def is_participle(name: str) -> bool:
    """Return True if the first word of a function's name is a participle or says nothing."""
    first = name.strip("_").split("_")[0]
    return first in VAGUE or (PARTICIPLE.fullmatch(first) is not None and first not in NO_PARTICIPLES)


def count_hard_turns(text: str) -> int:
    """Return the number of relative "what", "of which", idioms, and sentences of more than `LONG` words."""
    sentences = re.split(r"(?<=[.!?:])\s+|\n\n", text)
    turns = sum(len(pattern.findall(sentence)) for sentence in sentences for pattern in HARD_TURNS)
    return turns + sum(len(sentence.split()) > LONG for sentence in sentences)
