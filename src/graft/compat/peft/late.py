# SPDX-License-Identifier: Apache-2.0
"""Modules that asked for PEFT before `install`, and are asked to ask again.

transformers, accelerate, TRL and diffusers look on import whether the package peft is there and keep the answer: in a
cache (`is_peft_available`), in constants (`USE_PEFT_BACKEND`), in the names that they import if it is (`PeftModel`).
Those lines of a loaded module run again, in its namespace; its classes and functions stay the ones they are.
"""

from __future__ import annotations

import ast
import gc
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, GenericAlias, ModuleType

CLIENTS = ("transformers", "accelerate", "trl", "diffusers", "sentence_transformers")
INSIDE = ("def ", "async def ", "class ", "@")
ELSEWHERE = re.compile(r"from (?!peft\b)|import (?!peft\b)")
ROUNDS = 8  # constants that are made of each other, at most so deep
_ABSENT = object()


class Asked:
    """The answers that loaded clients hold, as long as they may have to be put back."""

    def __init__(self) -> None:
        self.before: list[tuple[dict[str, object], str, object]] = []

    def again(self) -> None:
        """Run again the lines by which loaded clients ask for peft.

        Raises:
            ImportError: one of them cannot be put right; then all hold their old answers.
        """
        modules = [m for m in loaded(CLIENTS) if mentions(vars(m))]
        forget(modules)
        try:
            lines = {m: asking(m) for m in modules}
            for _ in range(ROUNDS):
                if not any([self._run(m, nodes) for m, nodes in lines.items()]):
                    break
        except Exception as e:
            self.back()
            raise ImportError(
                f"{e} Call graft.compat.peft.install() before the first import of {', '.join(CLIENTS[:-1])}."
            ) from e

    def _run(self, module: ModuleType, nodes: list[ast.stmt]) -> bool:
        """Run statements of a module, and give the copies of what they bind to modules beside it; say if all is new."""
        namespace, package = vars(module), module.__name__.partition(".")[0]
        changed = False
        for node in nodes:
            old = {name: namespace.get(name, _ABSENT) for name in bound(node)}
            try:
                code = compile(ast.Module([node], []), module.__file__ or module.__name__, "exec", dont_inherit=True)
                exec(code, namespace)
            except Exception as e:
                raise ImportError(f"{module.__name__}, line {node.lineno}, cannot take graft for peft: {e}") from e
            for name, before in old.items():
                now = namespace.get(name, _ABSENT)
                if now is before or (isinstance(now, str) and now == before):
                    continue
                changed = True
                self.before.append((namespace, name, before))
                if isinstance(node, (ast.Assign, ast.AnnAssign)):  # others may have imported the constant
                    for other in loaded((package,)):
                        if vars(other).get(name, now) is not now:
                            self.before.append((vars(other), name, vars(other)[name]))
                            vars(other)[name] = now
        return changed

    def back(self) -> None:
        """Put back the answers that `again` has changed."""
        while self.before:
            namespace, name, value = self.before.pop()
            if value is _ABSENT:
                namespace.pop(name, None)
            else:
                namespace[name] = value
        forget(loaded(CLIENTS))


def loaded(packages: tuple[str, ...]) -> list[ModuleType]:
    """Return the modules of these packages that have been imported to the end."""
    found = [(name, m) for name, m in list(sys.modules.items()) if name.partition(".")[0] in packages]
    return [
        m
        for _, m in found
        if isinstance(m, ModuleType) and not getattr(vars(m).get("__spec__"), "_initializing", False)
    ]


def mentions(names: Iterable[str]) -> bool:
    return any("peft" in name.lower() for name in names)


def forget(modules: Iterable[ModuleType]) -> None:
    """Empty the caches of functions that answer whether peft is there."""
    for m in modules:
        for name, value in list(vars(m).items()):
            if "peft" in name.lower() and hasattr(value, "cache_clear"):
                value.cache_clear()


def asking(module: ModuleType) -> list[ast.stmt]:
    """Return the statements of a module, outside functions and classes, that depend on whether peft is there."""
    try:
        source = inspect.getsource(module)
        body = ast.parse(source).body if names_outside(source) else []
    except (OSError, TypeError, SyntaxError):
        if not {"is_peft_available", "USE_PEFT_BACKEND"} & vars(module).keys():
            return []
        raise ImportError(f"{module.__name__} has asked for peft already, and its source cannot be read.") from None
    found: list[ast.stmt] = []
    dependent: set[str] = set()
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.If, ast.Try)) and any(
            asks(part, dependent) for part in ast.walk(node)
        ):
            found.append(node)
            dependent |= bound(node)
    return found


def names_outside(source: str) -> bool:
    """Return False if peft is in functions, classes and imports from other modules alone: parsing takes a while."""
    head = ""
    for line in source.splitlines():
        if line[:1] not in ("", " ", "\t", ")", "]", "}", "#"):
            head = line
        if "peft" in line.lower() and not head.startswith(INSIDE) and not ELSEWHERE.match(head):
            return True
    return False


def asks(node: ast.AST, dependent: set[str]) -> bool:
    """Return True for an import of peft, a call that asks for it, and a name that was bound by one of these."""
    if isinstance(node, ast.Import):
        return any(is_peft(alias.name) for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return node.level == 0 and is_peft(node.module or "")
    if isinstance(node, ast.Call):
        of_peft = isinstance(node.func, ast.Name) and mentions([node.func.id])
        return of_peft or any(isinstance(a, ast.Constant) and a.value == "peft" for a in node.args[:1])
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in dependent


def is_peft(name: str) -> bool:
    return name.partition(".")[0] == "peft"


def bound(node: ast.stmt) -> set[str]:
    """Return the names that a statement may bind in its module."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for part in ast.walk(node):
        if isinstance(part, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in part.names}
    return names


# who goes on using an installed PEFT


def holders(real: Mapping[str, ModuleType]) -> list[str]:
    """Name the modules that hold something of an imported PEFT, and what it has made that is alive."""
    outside = [m for name, m in list(sys.modules.items()) if isinstance(m, ModuleType) and name not in real]
    found = [m.__name__ for m in outside if any(is_of(value, real) for value in list(vars(m).values()))]
    return [*dict.fromkeys(found), *dict.fromkeys(alive(real))]


def is_of(value: object, real: Mapping[str, ModuleType]) -> bool:
    """Return True for PEFT's modules, classes and functions, and for classes derived from its own."""
    if isinstance(value, ModuleType):
        return real.get(value.__name__) is value
    if isinstance(value, FunctionType):
        return value.__module__ in real
    if isinstance(value, GenericAlias):  # a type by `isinstance` under Python 3.10: list[int]
        return False
    return isinstance(value, type) and any(vars(c).get("__module__") in real for c in type.mro(value))


def alive(real: Mapping[str, ModuleType]) -> Iterator[str]:
    """Name the classes of models, layers and configs of PEFT's that there are objects of."""
    from torch import nn

    configs = getattr(real.get("peft"), "PeftConfig", ())
    for x in gc.get_objects():
        cls = type(x)
        if vars(cls).get("__module__") in real and issubclass(cls, (nn.Module, *([configs] if configs else []))):
            yield f"an object of {cls.__module__}.{cls.__name__}"
