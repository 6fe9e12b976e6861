# SPDX-License-Identifier: Apache-2.0
"""`GRAFT_TESTS_SUBJECT=peft pytest tests/parity` runs PEFT against itself and so checks the tests.

Every test begins with the same random state; `GRAFT_TESTS_SEED=7` gives them another, and so finds those that pass by
luck.
"""

import gc
import itertools
import os
import random
import shutil
import tempfile
import warnings
from functools import cache, wraps
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def hold_temporary_files_in_memory() -> None:
    """Have this process and those that it starts make temporary files in memory: a folder on a disk takes 1 ms.

    What torch compiles stays on the disk, for the next run. Without 4 GB of memory for files, nothing changes.
    """
    memory = "/dev/shm"
    if "TMPDIR" in os.environ or not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < 4 * 2**30:
        return
    if os.statvfs(memory).f_flag & os.ST_NOEXEC:  # some tests start what they wrote
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), "torchinductor"))
    os.environ["TMPDIR"] = memory
    tempfile.tempdir = None  # it is asked for again


hold_temporary_files_in_memory()

import sys

import pytest
from _pytest.runner import runtestprotocol

from tests.quick import draw_tests
from tests.warned import WARNED

os.fsync = lambda fd: None  # what outlives a power cut, no test can see; a disk takes milliseconds for each

SEED = int(os.environ.get("GRAFT_TESTS_SEED", "0"))

ran = itertools.count()
SUBJECT = os.environ.get("GRAFT_TESTS_SUBJECT", "graft")
if SUBJECT != "graft":
    sys.modules["graft"] = __import__(SUBJECT)


def pass_quickly(assert_close: Any) -> Any:
    """Return an `assert_close` that returns at once for plain tensors that are close: an eighth of the time.

    It calls torch's function for everything else, so each failure is torch's.
    """
    import torch

    plain = torch.float32, torch.float64, torch.bfloat16, torch.float16

    def is_close(a: Any, b: Any, rtol: float | None, atol: float | None) -> bool:
        """Return True for CPU tensors of one shape and dtype that are close; equal, where no tolerance is given."""
        if not (type(a) in TENSORS and type(b) in TENSORS and a.dtype is b.dtype and a.dtype in plain):
            return False
        if a.shape != b.shape or not (a.layout is b.layout is torch.strided) or not (a.is_cpu and b.is_cpu):
            return False
        return torch.equal(a, b) if rtol is None or atol is None else torch.allclose(a, b, rtol, atol)

    TENSORS = torch.Tensor, torch.nn.Parameter

    @wraps(assert_close)
    def assert_close_quickly(actual, expected, *, rtol=None, atol=None, **options):
        __tracebackhide__ = True
        if (rtol is None) != (atol is None) or options.keys() - {"msg"} or not is_close(actual, expected, rtol, atol):
            assert_close(actual, expected, rtol=rtol, atol=atol, **options)

    return assert_close_quickly


def prepare_process() -> None:
    """Import torch, have it use one thread, and have graft take its word about Trainer as said."""
    import torch

    torch.set_num_threads(1)
    torch.testing.assert_close = pass_quickly(torch.testing.assert_close)
    if SUBJECT == "graft":
        from graft.model import audit

        audit._said = True  # some test of this process loads Trainer; what a model says then, compat/test_late.py shows


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if next(ran) % 100 == 99:
        keep()
    numpy, torch = sys.modules["numpy"], sys.modules["torch"]
    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.default_generator.manual_seed(SEED)  # torch.manual_seed visits every accelerator, 2 ms a call
    if guards := sys.modules.get("torch._dynamo.guards"):  # it empties the caches to time them, 0.1 s for each graph
        guards.profile_guard_manager = lambda *args: 0.0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    """Report passed calls, and all that did not pass, to the process that gives out tests: half of the messages."""
    if not hasattr(item.config, "workerinput"):
        return None
    for report in runtestprotocol(item, log=False, nextitem=nextitem):
        if report.when == "call" or not report.passed:
            item.ihook.pytest_runtest_logreport(report=report)
    return True


def pytest_configure(config):
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        prepare_process()  # not in the process that only gives out tests: the others would wait for it
    config.addinivalue_line(
        "markers", "graft_only: what graft does and PEFT does not; left out when PEFT is the subject"
    )
    config.addinivalue_line(
        "markers", "slow: takes seconds: other processes, a compiler, many threads; `make test-slow` runs these"
    )
    config.addinivalue_line(
        "markers", "differs(case): the case of a row of docs/peft_defects.md, which this test shows"
    )


def pytest_ignore_collect(collection_path, config):
    """Leave out the files without slow tests where only those are asked for: collecting all takes half a minute."""
    if config.option.markexpr == "slow" and collection_path.match("test_*.py"):
        return "mark.slow" not in collection_path.read_text() or None
    return None


EXPECTED = [(tuple(known.where.split()), known.says) for known in WARNED]


@cache
def expected(function):
    """Return a mark for all warnings that a test function may call forth, since pytest sets it three times; or None."""
    says = [said for where, said in EXPECTED if function.startswith(where)]
    return pytest.mark.filterwarnings(f"ignore:({'|'.join(says)})") if says else None


def pytest_collection_modifyitems(config, items):
    if os.environ.get("GRAFT_TESTS") == "quick":
        items[:] = draw_tests([item for item in items if not item.get_closest_marker("slow")])
    for item in items:
        if mark := expected(item.nodeid.partition("[")[0].removeprefix("tests/")):
            item.add_marker(mark)
    if SUBJECT != "graft":
        dropped = [item for item in items if item.get_closest_marker("graft_only")]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """Collect no garbage meanwhile, since all that is made stays: a third less time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish(session):
    """Collect garbage less often than by default, since a model is a thousand objects: 7 % less time."""
    gc.freeze()
    gc.set_threshold(10_000)


def keep():
    """Keep what stands for good out of garbage collections: tests, imports, what torch's compiler remembers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what earlier tests left
        gc.collect()
    gc.freeze()
