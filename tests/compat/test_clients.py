# SPDX-License-Identifier: Apache-2.0
"""What other packages take from PEFT resolves: `client_names.json` holds it, `absent_names.json` what cannot.

`python -m tests.compat.refresh_names` reads the first from the packages' newest releases.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import warnings
from functools import cache
from pathlib import Path

import peft
import pytest

from graft.compat.peft import children
from graft.compat.peft.modules import AliasModule, is_known_module, names_in, resolve
from graft.compat.peft.names import MODULES
from tests.compat.test_compat import run

HERE = Path(__file__).parent
CLIENTS = json.loads((HERE / "client_names.json").read_text())
ABSENT = {name: why for why, names in json.loads((HERE / "absent_names.json").read_text()).items() for name in names}
PREFIXES = tuple(f"{name}." for name in ABSENT)


def taken(row: dict) -> list[str]:
    return sorted({*row["names"], *row["derives"], *row["sets"]})


@cache
def defined(module: str) -> frozenset[str]:
    """Functions and classes in a module of PEFT, also where a package is missing that it needs."""
    path = Path(peft.__file__).parent.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
    return frozenset(n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef)))


@cache
def in_peft(name: str) -> bool:
    """Whether PEFT 0.21.2 has it: clients also name what older and newer ones have."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        module = ".".join(parts[:i])
        try:
            value = importlib.import_module(module)
        except ImportError:
            continue
        for j, part in enumerate(parts[i:]):
            if not hasattr(value, part):
                return j == 0 and part in defined(module)
            value = getattr(value, part)
        return True
    return False


def resolved(name: str):
    """What graft has under a dotted name, as `import` and attributes find it."""
    parts = name.split(".")
    i = max(i for i in range(len(parts) + 1) if is_known_module(".".join(parts[:i])))
    value = importlib.import_module(".".join(parts[:i]))
    for part in parts[i:]:
        value = getattr(value, part)
    return value


@pytest.fixture
def alias():
    """PEFT's name is graft's within a test; modules below it are found as they are after `install`."""
    import graft.compat.peft as alias

    alias.install(force=True)
    yield alias
    alias.uninstall()


@pytest.mark.parametrize("client", CLIENTS)
def test_names_that_a_client_takes(client, alias):
    alias.uninstall()
    there = [name for name in taken(CLIENTS[client]) if in_peft(name)]
    alias.install(force=True)
    missing = {}
    for name in there:
        if name in ABSENT or name.startswith(PREFIXES):
            continue
        try:
            resolved(name)
        except (AttributeError, ImportError) as e:
            missing[name] = str(e)
    assert not missing


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_absent_says_what_to_do(name, alias):
    assert any(n == name or n.startswith(f"{name}.") for row in CLIENTS.values() for n in taken(row)), "no client's"
    with pytest.raises((AttributeError, ImportError), match=r"is not in graft|has no attribute") as error:
        resolved(name)
    assert any(word in str(error.value) for word in ("graft.Method", "docs/differences.md"))


def test_constants_are_those_of_peft():
    compared = 0
    for module in MODULES:
        if not in_peft(path := f"peft.{module}".rstrip(".")) or not (theirs := vars(importlib.import_module(path))):
            continue
        for name in {*names_in(path)} & {*theirs} - {"__version__"}:
            if isinstance(value := theirs[name], (str, int, float, list, tuple, set)):
                assert resolve(path, name) == value, (path, name)
                compared += 1
    assert compared > 20


def test_the_table_is_of_real_releases():
    assert len(CLIENTS) > 30 and all(row["version"][0].isdigit() for row in CLIENTS.values())
    for client, name in (("axolotl", "LoftQConfig"), ("axolotl", "ParamWrapper"), ("trl", "get_peft_model")):
        assert any(n.endswith(f".{name}") for n in CLIENTS[client]["names"]), (client, name)


# classes that clients derive from, and attributes that they set

DERIVED = sorted({name for row in CLIENTS.values() for name in row["derives"] if in_peft(name)})
SET = sorted({name for row in CLIENTS.values() for name in row["sets"] if in_peft(name)} - {*ABSENT})
SET = [name for name in SET if not name.startswith(PREFIXES)]  # nor an owner that is absent


@pytest.mark.differs("a class derived from a layer or tuner class")
@pytest.mark.parametrize("name", DERIVED)
def test_deriving_a_class(name, alias):
    """To define one is no error, with `nn.Module` in front as well; a layer or tuner of one cannot be made."""
    from torch import nn

    base = resolved(name)
    mine = type(base)("Mine", (base,), {"_create_and_replace": None})
    if name.endswith("Config"):
        required = {"total_step": 9} if "AdaLora" in name else {}
        assert isinstance(mine(target_modules=["a"], **required), base)
        return
    if name.endswith(("Wrapper", "Mixin")):
        assert issubclass(mine, base)
        return
    if not name.endswith("Model"):
        type(base)("Other", (nn.Module, base), {})
    with pytest.raises(TypeError, match=r"graft\.Method"):
        mine(nn.Linear(2, 2), "default")


NOTHING = object()


@pytest.mark.differs("setting `ParamWrapper.__init__`, or something of `RankAllocator`")
@pytest.mark.differs("replacing a function in a module of PEFT's")
@pytest.mark.parametrize("name", SET)
def test_setting_an_attribute(name, alias):
    """It acts (on graft's own classes), warns (a function of a module), or is an error that says what to do."""
    owner, _, last = name.rpartition(".")
    owner = resolved(owner)
    assert hasattr(owner, last)
    before = vars(owner).get(last, NOTHING)  # as it stands there: a class method is no attribute's value
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            setattr(owner, last, replaced := lambda *a, **k: None)
    except AttributeError as e:
        assert "would change nothing" in str(e) and "graft.Method" in str(e)
        return
    warns = isinstance(owner, AliasModule) and not last.startswith("__")
    assert warns == any("was replaced for those who" in str(w.message) for w in seen)
    assert owner.__dict__[last] is replaced
    if isinstance(owner, AliasModule):
        return  # modules are made anew for the next test
    if before is NOTHING:
        delattr(owner, last)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some tell of this as well
            setattr(owner, last, before)


@pytest.mark.differs("`register_peft_method`")
def test_register_peft_method_refuses(alias):
    from torch import nn

    config = resolved("peft.LoraConfig")
    with pytest.raises(NotImplementedError, match=r"'mine'.*Add a method"):
        resolved("peft.utils.register_peft_method")(name="mine", config_cls=config, model_cls=nn.Module)


@pytest.mark.differs("`issubclass(type(layer), LoraLayer)`")
def test_issubclass():
    run(
        """
        import graft.compat.peft as alias
        alias.install()
        import torch, peft
        from peft.tuners.lora.layer import LoraLayer, Linear, ParamWrapper
        from peft.tuners.tuners_utils import BaseTunerLayer

        model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), peft.LoraConfig(target_modules=["0"]))
        layer = model.base_model.model[0]
        assert isinstance(layer, BaseTunerLayer) and issubclass(type(layer), BaseTunerLayer)
        assert issubclass(Linear, LoraLayer) and issubclass(LoraLayer, BaseTunerLayer)
        assert isinstance(layer, Linear) and not isinstance(layer, ParamWrapper)
        assert not issubclass(torch.nn.Linear, LoraLayer)
        try:
            issubclass(type(layer), LoraLayer)
        except TypeError as e:
            assert "isinstance(layer, LoraLayer)" in str(e)
        else:
            raise AssertionError("no answer is right")

        class Noted(torch.nn.Module, LoraLayer):
            def __init_subclass__(cls, **options):
                super().__init_subclass__(**options)
                cls.noted = True

        class Mine(Noted):
            pass

        assert Mine.noted and not isinstance(layer, Mine)
        Mine.flag = 3  # a client's own class
        """
    )


@pytest.mark.differs("`peft.__version__` and the package's metadata, under PEFT's name")
@pytest.mark.parametrize(("transformers", "said"), [("", "0.22.0"), ("5.6.0", "0.20.0"), ("5.24.0", "0.22.0")])
def test_the_version_suits_the_installed_transformers(transformers, said, monkeypatch):
    numbers = tuple(map(int, transformers.split("."))) if transformers else ()
    monkeypatch.setattr("graft.compat.peft.shims.read_release", lambda package: numbers)
    monkeypatch.delenv(children.VERSION_VARIABLE, raising=False)
    assert children.choose_version(None) == said
    assert children.choose_version("0.19.1") == "0.19.1"
