# SPDX-License-Identifier: Apache-2.0
"""The shape of the package: who may import whom, what an import costs, what adding a method costs."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import graft
from graft.methods import METHODS
from graft.model.rooms import FUNCTIONS, import_from_room

SOURCE = Path(graft.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# package → what it may import besides itself, torch, the standard library and other distributions
FLOORS = [  # the lowest first
    "kernels", "core", "storage config", "methods prompts", "inject", "combine io", "model", "files optim",
    "serving train", "many",
]  # fmt: skip
MAY_IMPORT: dict[str, set[str | None]] = {}
for floor in FLOORS:
    MAY_IMPORT |= {name: {*MAY_IMPORT} for name in floor.split()}
for room in ("files", "serving", "train", "many"):
    MAY_IMPORT[room].add(None)  # the public names
MAY_IMPORT["command"] = {*MAY_IMPORT, None}
MAY_IMPORT["__main__"] = {"command"}
MAY_IMPORT["compat"] = {*MAY_IMPORT, None}
# rooms outside the library, by the packages that they are in
ROOMS = {"files": "toolbox", "command": "toolbox", "__main__": "toolbox", "train": "training", "many": "many",
         "serving": "serving", "compat": "compat"}  # fmt: skip
# how many names of the library's inside each room imports at most: a limit only shrinks
# the aims are 60, 25, 70, 45 and 55 names
WIDTHS = {"toolbox": 60, "many": 17, "training": 37, "serving": 27, "compat": 23}
# modules of the library with this line are for rooms to import; a room takes at most eight of them
SUPPORTED = "# Supported inside: rooms may import this module."
# the rooms that each room imports, besides the library and the public names; the list of a room only shrinks
NEIGHBOURS = {"toolbox": set(), "many": {"training"}, "training": {"toolbox"}, "serving": set(), "compat": set()}
HEAVY = ("transformers", "peft", "bitsandbytes", "rich", "huggingface_hub", "safetensors", "accelerate", "matplotlib")


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree_of(path)))


@cache
def imports(path: Path, nested: bool) -> tuple[str, ...]:
    """Modules that a file imports: at its top level; or anywhere if `nested`, for type checkers too."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not nested:
            return
        elif nested or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            for child in ast.iter_child_nodes(node):
                yield from visit(child)

    return tuple(visit(tree_of(path)))


def own(path: Path, nested: bool = False) -> set[str]:
    """Modules of graft that a file imports."""
    return {name for name in imports(path, nested) if name.split(".")[0] == "graft"}


def package(module: str) -> str | None:
    """The part of the library that a module belongs to; None for `graft` itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


# layering


def test_every_package_has_its_place():
    assert {package(m) for m in MODULES} - {None} <= set(MAY_IMPORT)


def test_a_package_imports_only_what_is_below_it():
    for module, path in MODULES.items():
        if of := package(module):
            wrong = {name for name in own(path, nested=True) if package(name) not in MAY_IMPORT[of] | {of}}
            assert not wrong, f"{module} imports {sorted(wrong)}"


# doors


def room_of(module: str) -> str:
    """Return the room of a module: one of `ROOMS`, "library", or "face" for `graft` itself."""
    parts = module.split(".")[1:]
    names = [".".join(parts[:n]) for n in (2, 1)]
    return next((ROOMS[name] for name in names if name in ROOMS), "library" if parts else "face")


def names_from_library(room: str) -> set[tuple[str, str]]:
    """Return the names that a room's modules take from inside the library, each with its module.

    Of a module that is imported whole, these are its attributes that the importing module reads.
    """
    names = set()
    for module, path in MODULES.items():
        if room_of(module) != room:
            continue
        whole: dict[str, str] = {}  # name in this module → module of the library
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    if inner in MODULES:
                        whole[alias.asname or alias.name] = inner
                    else:
                        names.add((node.module, alias.name))
            elif isinstance(node, ast.Import):
                names |= {(alias.name, "*") for alias in node.names}
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in whole:
                names.add((whole[node.value.id], node.attr))
    return {(module, name) for module, name in names if module in MODULES and room_of(module) == "library"}


def test_no_import_leads_from_the_library_to_a_room():
    """Imports inside functions and for type checkers count."""
    for module, path in MODULES.items():
        if room_of(module) == "library":
            rooms = {name for name in own(path, nested=True) if room_of(name) != "library"}
            assert not rooms, f"{module} imports {sorted(rooms)}"


def test_one_table_names_what_the_library_looks_up_in_rooms():
    rooms = "|".join(ROOMS)
    named = re.compile(rf"graft\.({rooms})(\.\w+)*|({rooms})(\.\w+)+:\w+")
    for module, path in MODULES.items():
        if room_of(module) == "library" and module != "graft.model.rooms":
            strings = {n.value for n in nodes(path) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            assert not {text for text in strings if named.fullmatch(text)}, f"{module}: see graft.model.rooms"
    for name, module in FUNCTIONS.items():
        assert import_from_room(name).__module__ == module and room_of(module) not in ("library", "face")


@pytest.mark.parametrize("room", NEIGHBOURS)
def test_a_room_imports_no_more_rooms(room):
    for module, path in MODULES.items():
        if room_of(module) == room:
            others = {name for name in own(path, nested=True) if room_of(name) not in ("library", "face", room)}
            wrong = {name for name in others if room_of(name) not in NEIGHBOURS[room]}
            assert not wrong, f"{module} imports {sorted(wrong)}"


@pytest.mark.parametrize("room", WIDTHS)
def test_a_door_grows_no_wider(room):
    names = names_from_library(room)
    print(f"{room}: {len(names)} names from {len({module for module, _ in names})} modules of the library")
    assert len(names) <= WIDTHS[room], f"use what {room} has already, or the public names: {sorted(names)}"


@pytest.mark.parametrize("room", WIDTHS)
def test_a_room_takes_modules_that_are_supported_inside(room):
    modules = {module for module, _ in names_from_library(room)}
    supported = {module for module in modules if SUPPORTED in MODULES[module].read_text().splitlines()[:3]}
    print(f"{room}: {len(supported)} supported modules, {len(modules - supported)} others")
    assert len(supported) <= 8
    assert modules == supported, f"use another module: {sorted(modules - supported)}"


def test_each_room_says_what_it_is_for():
    """The docstring names its entry points and its most important files, which are there, in at most ten lines."""
    for package in (*ROOMS, "compat.peft"):
        if package not in ("__main__", "compat"):
            path = MODULES[f"graft.{package}"]
            text = ast.get_docstring(tree_of(path)) or ""
            files = re.findall(r"^- `(\w+\.py)`: ", text, re.M)
            assert "ntry point" in text and len(files) == 3 and len(text.splitlines()) <= 10, package
            assert all((path.parent / name).exists() for name in files), package


# what each floor may import of others


@pytest.mark.parametrize("floor, below", [("kernels", set()), ("core", {"kernels"})])
def test_core_and_kernels_know_torch_and_nothing_else(floor, below):
    for module, path in MODULES.items():
        if package(module) == floor:
            others = {name.split(".")[0] for name in imports(path, nested=True)} - {"graft", "torch"}
            assert others <= set(sys.stdlib_module_names), f"{module} imports {others}"
            assert {package(m) for m in own(path, nested=True)} <= below | {floor}, module


def test_no_module_imports_itself_in_a_circle():
    """Imports inside functions and for type checkers count."""
    graph = {module: own(path, nested=True) - {module} for module, path in MODULES.items()}
    # importing a.b runs a/__init__ first; that a package's own modules do so is not a circle
    done: set[str] = set()

    def visit(module: str, above: list[str]) -> None:
        assert module not in above, " → ".join([*above[above.index(module) :], module])
        if module in done:
            return
        for name in sorted(graph.get(module, ())):
            visit(name, [*above, module])
        done.add(module)

    for module in graph:
        visit(module, [])


def test_optional_packages_are_imported_inside_functions():
    for module, path in MODULES.items():
        top = {name.split(".")[0] for name in imports(path, nested=False)}
        assert not top & {*HEAVY, "tqdm"}, f"{module} imports {sorted(top)}"


def test_the_oracle_is_never_imported():
    for module, path in MODULES.items():
        if package(module) != "compat":
            assert "peft" not in {name.split(".")[0] for name in imports(path, nested=True)}, module


def run(code: str, *arguments: str, path: Path | None = None) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_import_loads_torch_and_nothing_heavier():
    code = """
import sys, torch
before = set(sys.modules)
import graft
print(*[name for name in sys.argv[1:] if name in sys.modules and name not in before])
print(*sorted({m.split(".")[0] for m in set(sys.modules) - before} - {"graft"} - set(sys.stdlib_module_names)))
print(*sorted(m for m in sys.modules if m.startswith(("graft.methods.", "graft.prompts"))))
"""
    heavy, third, methods = run(code, *HEAVY).splitlines()
    assert heavy == "" and third == "", "besides torch"
    assert methods == "", "a method's file is imported when it is first used"


def test_using_it_on_a_plain_model_needs_nothing_heavier():
    code = """
import sys, warnings, torch, graft
before = set(sys.modules)
net = torch.nn.Sequential(torch.nn.Linear(4, 3))
model = graft.get_peft_model(net, graft.LoraConfig(target_modules=["0"]))
model(torch.ones(1, 4)).sum().backward()
model.merge_and_unload()
print(*[name for name in sys.argv[1:] if name in sys.modules])
"""
    assert run(code, *HEAVY).strip() == ""


# the table of methods


@pytest.mark.parametrize("peft_type", METHODS)
def test_a_row_of_the_table(peft_type):
    row = METHODS[peft_type]
    method = graft.method_of(peft_type)
    assert getattr(graft, row.config) is method.config is graft.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    assert method.config.__name__ == row.config and method.config.peft_type == peft_type
    tuner = getattr(graft, row.tuner)
    assert tuner is graft.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] and tuner.__name__ == row.tuner
    assert tuner._method is method and graft.PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] == method.prefix
    assert graft.PeftType(peft_type).value == peft_type
    assert {row.config, row.tuner} <= set(graft.__all__) & set(dir(graft))


def test_every_public_name_resolves_and_says_what_it_is():
    for name in graft.__all__:
        thing = getattr(graft, name)
        assert thing is getattr(graft, name), name
        if callable(thing):
            own = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__
            assert own and not own.startswith(f"{name}("), f"{name}: the text that dataclasses write says nothing"


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="module 'graft' has no attribute 'LoraConfg'"):
        graft.LoraConfg  # noqa: B018
    with pytest.raises(graft.ConfigError, match=r"Unknown peft_type 'NOPE'. Known ones: LORA"):
        graft.method_of("NOPE")
    for name, text in ("LORAA", "'LORAA'. Did you mean 'LORA'?"), ("loha", "Did you mean 'LOHA'?"), (["LORA"], "LORA"):
        with pytest.raises(graft.ConfigError, match="Unknown peft_type .*" + re.escape(text) + ".* Known ones: LORA"):
            graft.PeftConfig(peft_type=name)
    assert "NOPE" not in graft.PEFT_TYPE_TO_TUNER_MAPPING


# one place each


QUANTIZED = re.compile(
    r"Linear4bit|Linear8bit|Params4bit|Int8Params|bitsandbytes|bnb_|HQQLinear|QuantLinear|quant_state"
)


# "optim": bitsandbytes has optimizers, too; "files": checkpoints name who quantized them
def test_storage_is_a_matter_of_storage():
    for module, path in MODULES.items():
        if package(module) not in (None, "storage", "optim", "compat", "files"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not QUANTIZED.search(line), f"{module}:{number} {line.strip()}"


def calls(path: Path) -> Iterator[str]:
    """Dotted names of what a file calls."""
    for node in nodes(path):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_only_ops_run_a_layer_with_another_weight():
    running = re.compile(r"(^|\.)(linear|embedding|conv[123]d)$")
    for module, path in MODULES.items():
        if (
            package(module) in ("core", "methods", "prompts", "inject", "io", "model", "files")
            and module != "graft.core.ops"
        ):
            wrong = [name for name in calls(path) if running.search(name) and name.startswith(("F.", "torch.", "nn.f"))]
            assert not wrong, f"{module} calls {wrong}"


def test_files_are_opened_to_read_in_one_place():
    """`config/reading.py` refuses pipes and devices, which block, and runs no code of a pickle."""
    own = {"graft.model.rates", "graft.files.serving", "graft.config.atomic", "graft.config.base"}  # files of graft's
    alone = {
        "torch.load": "graft.config.reading",
        "pickle.load": None,
        "json.load": None,
        "load_file": "graft.io.files",
    }
    for module, path in MODULES.items():
        for node in (n for n in nodes(path) if isinstance(n, ast.Call)):
            name, where = ast.unparse(node.func), f"{module}:{node.lineno}"
            assert name not in alone or module in (alone[name], *own), f"{where} calls {name}"
            modes = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "mode")]
            if name == "open" and not any(set(ast.literal_eval(mode)) & set("wax") for mode in modes):
                assert module in ("graft.config.reading", *own), f"{where} opens a file without open_file"


def test_the_forward_pass_decides_nothing():
    """`forward` and every `run` hold no isinstance, hasattr, warning or string."""
    hot = {"layer": {"forward"}, "plan": {"run", "run_steps", "add", "add_gated"}, "mixed": {"run", "run_one", "add"}}
    for module, names in hot.items():
        found = [
            node
            for node in nodes(MODULES[f"graft.core.{module}"])
            if isinstance(node, ast.FunctionDef) and node.name in names
        ]
        assert {node.name for node in found} == names
        for function in found:
            calls = {ast.unparse(n.func) for n in ast.walk(function) if isinstance(n, ast.Call)}
            assert not calls & {"isinstance", "hasattr", "getattr", "warn", "type"}, function.name
            doc = ast.get_docstring(function, clean=False)
            strings = {n.value for n in ast.walk(function) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            annotations = {s for s in strings if s in ("Rows | None",)}
            assert not strings - {doc} - annotations, function.name


def test_every_file_names_its_licence_once():
    for path in FILES:
        assert path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n"), path


# private state


NAMES_OF_TORCH = """
_modules _parameters _buffers _non_persistent_buffers_set _version _C _orig_mod _compiled_call_impl _utils _get_name
_reversed_padding_repeated_twice _execution_engine _is_compiling_flag _current_level _current_graph_task_id
_global_forward_pre_hooks _global_forward_hooks _global_backward_pre_hooks _global_backward_hooks
_make_wrapper_subclass _is_view _torchdynamo_disable _cdata _local_scalar_dense
_base _shapes _shard_param_infos _numels_with_padding _is_padding_mask _params _get_default_store
_module_info _get_fsdp_state _state_ctx _fsdp_param_group _training_state _get_default_group
_active_ddp_module _z3_optimizer _get_zeros_like_grad_buckets
_foreach_copy_ _foreach_zero_ _foreach_mul_ _foreach_norm _post_accumulate_grad_hooks _asdict _replace _getframe
_foreach_add_ _backward_hooks _optimizer_step_pre_hooks _optimizer_step_post_hooks _assert_async _standard_gamma
_from_config
"""
TORCHS = frozenset(NAMES_OF_TORCH.split())


def defined(path: Path) -> Iterator[str]:
    """Names that a file defines: functions, classes, attributes that are set or declared, keywords."""
    for node in nodes(path):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg


def test_private_state_stays_in_its_file():
    for module, path in MODULES.items():
        own = {*defined(path), *TORCHS}
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                of_parent = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super"
                assert of_self or of_parent or node.attr in own, f"{module}:{node.lineno} {ast.unparse(node)}"


def test_only_storage_looks_into_a_module_for_its_tensors():
    """`find_store` and its rows decide how a weight is held; elsewhere nobody asks for its type."""
    for module, path in MODULES.items():
        if package(module) in ("core", "methods", "inject", "combine", "io", "model", "serving", "files"):
            for node in nodes(path):
                if isinstance(node, ast.Attribute) and node.attr in ("qweight", "quant_state", "SCB", "tensor_impl"):
                    raise AssertionError(f"{module}:{node.lineno} {ast.unparse(node)}")
