# SPDX-License-Identifier: Apache-2.0
"""PEFT's name in other processes: spawned, started by a shell, by torchrun and accelerate; and as a distribution."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from graft.compat.peft import children
from graft.compat.peft.modules import VERSION

ROOT = Path(__file__).parents[2]
SAYS = "import peft, importlib.metadata as m; print(peft.LoraConfig.__module__, peft.__version__, m.version('peft'))"
OURS = f"graft.methods.lora.config {VERSION} {VERSION}"


def started(*command: str, path: str = "", **variables: str) -> subprocess.CompletedProcess:
    """A process that has ended, in an environment that knows this tree."""
    own = {k: v for k, v in os.environ.items() if k not in (children.VARIABLE, children.VERSION_VARIABLE, "PYTHONPATH")}
    where = os.pathsep.join(p for p in (path, str(ROOT / "src"), str(ROOT)) if p)
    env = {**own, "OMP_NUM_THREADS": "1", "PYTHONPATH": where, **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=ROOT)


def start(*command: str, **options: str) -> str:
    """What a process prints; it must end well."""
    done = started(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(*arguments: str, **options: str) -> str:
    return start(sys.executable, "-W", "ignore", *arguments, **options)


@pytest.fixture
def script(tmp_path):
    """A function that writes a script and returns its path."""

    def write(code: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(code))
        return str(path)

    return write


CHILDREN = f"""
    import multiprocessing, subprocess, sys

    def child(queue):
        import importlib.metadata, peft
        queue.put((peft.LoraConfig.__module__, importlib.metadata.version("peft")))

    if __name__ == "__main__":
        spawn = multiprocessing.get_context("spawn")
        queue = spawn.Queue()
        process = spawn.Process(target=child, args=(queue,))
        process.start()
        print(*queue.get(timeout=120))
        process.join()
        print(subprocess.run([sys.executable, "-c", {SAYS!r}], capture_output=True, text=True, check=True).stdout)
"""
BOTH = [f"graft.methods.lora.config {VERSION}", OURS]


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


def test_children_of_the_launcher(script):
    """A process spawned by multiprocessing, and another interpreter."""
    assert lines(python("-m", "graft.compat.peft", script(CHILDREN))) == BOTH


def test_children_of_a_script(script):
    install = "import graft.compat.peft\ngraft.compat.peft.install(children=True)\n"
    assert lines(python(script(install + textwrap.dedent(CHILDREN)))) == BOTH


@pytest.mark.parametrize("how", ["option", "=", "variable"])
def test_another_version(script, tmp_path, how):
    """For the launched script, and in its children, whether they ask the metadata before peft is imported or later."""
    path, cache, say = script(CHILDREN + f"        {SAYS}\n"), {"XDG_CACHE_HOME": str(tmp_path)}, "0.20.0"
    module = ("-m", "graft.compat.peft")
    if how == "variable":
        printed = python(*module, path, **{children.VERSION_VARIABLE: say}, **cache)
    else:
        option = ("--peft-version", say) if how == "option" else (f"--peft-version={say}",)
        printed = python(*module, *option, path, **cache)
    assert lines(printed) == [line.replace(VERSION, say) for line in (*BOTH, OURS)]
    early = "import importlib.metadata as m; print(m.version('peft')); import peft; print(peft.__version__)"
    child = f"import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', {early!r}], text=True))"
    assert lines(python(*module, "--peft-version", say, script(child), **cache)) == [say, say]


@pytest.mark.parametrize("version", ["", "new", "0.20.x", "0..1", "1.0 ", "0.20.0/../.."])
def test_no_version(script, tmp_path, version):
    path, cache = script(SAYS), {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = started(sys.executable, "-m", "graft.compat.peft", "--peft-version", version, path, **cache)
    assert done.returncode == 1 and f"{version!r}, which is no version" in done.stderr and not done.stdout
    code = f"""
import graft.compat.peft as alias, os, sys
before, path, finders = dict(os.environ), list(sys.path), list(sys.meta_path)
for options in ({{"version": {version!r}}}, {{}}):
    try:
        alias.install(children=True, **options)
    except ValueError as e:
        assert {version!r} in str(e)
        assert options or {children.VERSION_VARIABLE!r} in str(e)
    else:
        raise AssertionError(options)
    assert dict(os.environ) == before and sys.path == path and sys.meta_path == finders
"""
    if version:  # an empty variable is none
        python("-c", code, **{children.VERSION_VARIABLE: version}, **cache)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    code = """
import graft.compat.peft as alias, os, sys
before, path, finders = dict(os.environ), list(sys.path), list(sys.meta_path)
try:
    alias.install(version="0.20.0", children=True)
except OSError as e:
    assert "XDG_CACHE_HOME" in str(e)
else:
    raise AssertionError
assert dict(os.environ) == before and sys.path == path and sys.meta_path == finders
alias.install(version="0.20.0")
"""
    python("-c", code, XDG_CACHE_HOME=str(tmp_path / "file"))


def test_the_variable_alone(script):
    """`import graft` reads it; "0" and "" ask for nothing."""
    code = f"import graft; {SAYS}"
    assert python("-c", code, **{children.VARIABLE: "1"}).strip() == OURS
    installed = importlib.metadata.version("peft")
    for value in ("0", ""):
        assert python("-c", code, **{children.VARIABLE: value}).split() == ["peft.tuners.lora.config", *[installed] * 2]


def test_a_loaded_client_asks_first(tmp_path):
    """Its import of peft is the first of graft, which sets the version in the client's module that looked for it."""
    client = tmp_path / "diffusers"
    client.mkdir()
    (client / "__init__.py").touch()
    (client / "utils.py").write_text("_peft_version = ''\n")
    (client / "hooks.py").write_text("import diffusers.utils\nfrom peft.helpers import disable_input_dtype_casting\n")
    path = os.pathsep.join([children.FOLDER, str(tmp_path)])
    code = "import diffusers.hooks as h, diffusers.utils, peft, sys; from peft import helpers; "
    code += (
        "assert peft is sys.modules['peft'] and h.disable_input_dtype_casting is helpers.disable_input_dtype_casting;"
    )
    code += "print(diffusers.utils._peft_version, peft.LoraConfig.__module__)"
    assert python("-c", code, path=path, **{children.VARIABLE: "1"}).split() == [VERSION, "graft.methods.lora.config"]


def test_without_asking_nothing_is_handed_down(tmp_path):
    code = f"""
import graft.compat.peft as alias, os, subprocess, sys
alias.install()
assert {children.VARIABLE!r} not in os.environ and not any("as_peft" in p for p in sys.path)
before, path = dict(os.environ), list(sys.path)
alias.install(children=True, version="0.20.0")
alias.install(children=True, version="0.19.0")
assert os.environ["PYTHONPATH"].count("as_peft") == 2 == sum("as_peft" in p for p in sys.path)
alias.install(version="0.20.0")  # of what is handed down already
assert os.environ[{children.VERSION_VARIABLE!r}] == "0.20.0" and "0.20.0" in os.environ["PYTHONPATH"]
alias.install(children=True, version="0.22.0")
assert os.environ["PYTHONPATH"].count("as_peft") == 1 == sum("as_peft" in p for p in sys.path)
alias.uninstall()
assert dict(os.environ) == before and sys.path == path
import peft
assert "site-packages" in peft.__file__
"""
    python("-c", code, XDG_CACHE_HOME=str(tmp_path))


@pytest.mark.parametrize("path", ["", os.pathsep, f"{os.pathsep}a", f"a{os.pathsep}", f"a{os.pathsep * 2}b", "a"])
def test_the_rest_of_the_path_stays(path, monkeypatch):
    """Empty entries too: they stand for the folder in which a process starts."""
    monkeypatch.setattr(sys, "path", [*sys.path, Path("a")])  # Python passes by what is no string
    before = list(sys.path)
    monkeypatch.setenv("PYTHONPATH", path)
    for name in (children.VARIABLE, children.VERSION_VARIABLE):  # both are put back at the end of the test
        monkeypatch.setenv(name, "")
    inherited = children.make_child_environment(VERSION)
    assert inherited["PYTHONPATH"] == os.pathsep.join([children.FOLDER, *([path] if path else [])])
    children.set_child_environment(inherited)
    assert sys.path.count(children.FOLDER) == 1
    children.clear_child_environment()
    assert os.environ.get("PYTHONPATH", "") == path and sys.path == before


@pytest.mark.skipif(os.name != "posix", reason="a line for a POSIX shell")
def test_a_shell(tmp_path):
    line = 'eval "$({0} -m graft.compat.peft {1} --env)" && {0} -W ignore -c "{2}"'
    assert start("bash", "-c", line.format(sys.executable, "", SAYS)).strip() == OURS
    other = line.format(sys.executable, "--peft-version 0.20.0", SAYS)
    cache = {"XDG_CACHE_HOME": str(tmp_path / "a cache")}
    assert start("bash", "-c", other, **cache).strip() == OURS.replace(VERSION, "0.20.0")


def test_torchrun(script):
    """Two processes that train one adapter, of a script that knows nothing of graft."""
    code = """
        import os, peft, torch
        from torch import distributed
        from torch.nn.parallel import DistributedDataParallel

        distributed.init_process_group("gloo")
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["0"], r=2)
        model = DistributedDataParallel(peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), config))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        torch.manual_seed(distributed.get_rank())
        for _ in range(2):
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
        mine = torch.cat([p.detach().flatten() for p in model.parameters()])
        both = [torch.empty_like(mine) for _ in range(2)]
        distributed.all_gather(both, mine)
        assert torch.equal(*both)
        with open(f"{__file__}.{distributed.get_rank()}", "w") as file:
            print(peft.LoraConfig.__module__, os.environ["GRAFT_AS_PEFT"], file=file)
        distributed.barrier()
        distributed.destroy_process_group()
        os._exit(0)  # a thread of gloo that is still there aborts an ordinary exit, now and then
    """
    path = script(code)
    run = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", path)
    python("-m", "graft.compat.peft", "-m", *run)
    for rank in range(2):
        assert Path(f"{path}.{rank}").read_text().strip() == "graft.methods.lora.config 1"


def test_accelerate_launch(script):
    path = script(f"{SAYS}\nfrom accelerate.utils import is_peft_available; assert is_peft_available()")
    launch = ("accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1")
    options = ("--mixed_precision", "no", "--dynamo_backend", "no")
    assert OURS in lines(python("-m", "graft.compat.peft", "-m", *launch, *options, path))


def test_the_distribution(tmp_path):
    """Built, and installed into a folder: every process that sees it has graft for peft, and pip shows it."""
    shutil.copytree(ROOT / "packaging" / "as-peft", tmp_path / "as-peft")
    assert shutil.which("pip") or importlib.metadata.version("pip")
    setuptools = importlib.metadata.version("setuptools").split(".")[0]
    isolation = ["--no-build-isolation"] if int(setuptools) >= 77 else []
    target = str(tmp_path / "installed")
    python("-m", "pip", "install", "-q", "--no-deps", *isolation, "--target", target, str(tmp_path / "as-peft"))
    version = f"{VERSION}+graft"
    code = "from peft.tuners.lora import LoraLayer; import peft.utils.other; print(LoraLayer.__module__, peft.__file__)"
    assert python("-c", SAYS, path=target).split()[0] == "graft.methods.lora.config"
    assert python("-c", "import importlib.metadata as m; print(m.version('peft'))", path=target).strip() == version
    assert python("-c", code, path=target).startswith("graft.compat.peft.layers ")
    shown = python("-m", "pip", "show", "peft", path=target)
    assert re.search(rf"^Version: {re.escape(version)}$", shown, re.MULTILINE)


def test_versions_agree():
    (metadata,) = Path(children.FOLDER).glob("*.dist-info/METADATA")
    assert f"\nVersion: {VERSION}\n" in metadata.read_text() and f"-{VERSION}." in metadata.parent.name
    assert f'version = "{VERSION}+graft"' in (ROOT / "packaging" / "as-peft" / "pyproject.toml").read_text()
