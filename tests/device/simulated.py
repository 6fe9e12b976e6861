# SPDX-License-Identifier: Apache-2.0
"""A simulated CUDA device on a machine without one: "cuda:0" and "cuda:1" in a CPU build of torch.

    pytest -p tests.device.simulated tests/device

As a pytest plugin it begins before torch is imported, as it must. simulated.cpp puts a fallback for the dispatch key
CUDA, which runs the CPU's kernel over the same memory. So tensors are plain ones with `.device.type == "cuda"`, and
views, writes in place, autocast's lists, autograd's thread for each device and branches on `is_cuda` are the real
ones. An operation that mixes devices raises, as on a GPU (0-dim tensors and indices of the CPU pass). `WAITS` notes
what makes the host wait for the device: .item(), nonzero, masks, copies between the two, decompositions; by file and
function. `torch.ops.simulated.signs(1)` gives SVDs other signs than LAPACK's, as cuSOLVER may.

It cannot show: CUDA's numerics, missing kernels and dtypes, streams, asynchronous errors, graphs, memory, speed,
Triton, torch.compile for cuda, sparse tensors, LSTM cells, NCCL, `torch.load(map_location="cuda")`. It leans on
internals of torch. `WHY_NOT` says why it is not there, and the tests are skipped with that reason. Where torch has
CUDA itself nothing is simulated; with `GRAFT_TESTS_DEVICE=cuda` the same tests run on the real device.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

SOURCE = Path(__file__).with_name("simulated.cpp")
CACHE = (
    Path(os.environ.get("GRAFT_TESTS_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graft"
)
KNOWN = ("2.13",)  # releases of torch whose internals it was written for
SRC = Path(__file__).parents[2] / "src" / "graft"


class Waits:
    """Which functions of graft made the host wait for the device, by what the test was doing."""

    def __init__(self) -> None:
        self.found: collections.Counter[tuple[str, str]] = collections.Counter()
        self.on: str | None = None
        self.root = f"{SRC}/"
        self.told = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)(self.note)  # kept: C holds its address

    def note(self, op: bytes, kind: bytes) -> None:
        frame = sys._getframe() if self.on else None
        while frame and (
            frame.f_code is Waits.note.__code__
            or "/torch/" in frame.f_code.co_filename
            or frame.f_code.co_filename.startswith("<")
        ):
            frame = frame.f_back
        if frame and self.on and frame.f_code.co_filename.startswith(self.root):
            where = f"{frame.f_code.co_filename[len(self.root) :]}:{frame.f_code.co_name}"
            self.found[self.on, f"{where} {op.decode()} ({kind.decode()})"] += 1

    @contextlib.contextmanager
    def watch(self, what: str):
        self.on = what
        try:
            yield
        finally:
            self.on = None


def build(torch_folder: Path) -> Path:
    """Compile simulated.cpp, unless that was done for this torch; return the library."""
    key = hashlib.sha256(SOURCE.read_bytes() + f"{torch_folder}{importlib.metadata.version('torch')}".encode())
    library = CACHE / f"simulated-{key.hexdigest()[:12]}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        include, lib = torch_folder / "include", torch_folder / "lib"
        flags = [f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-L{lib}", f"-Wl,-rpath,{lib}"]
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = f"{folder}/made.so"
            options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-w"]
            command = ["g++", *options, str(SOURCE), "-o", made, *flags, "-ltorch_cpu", "-lc10"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(made, library)  # workers may build side by side
    return library


def why_not() -> str | None:
    """Return the reason against a simulation here, or None."""
    if os.environ.get("GRAFT_TESTS_DEVICE"):
        return "GRAFT_TESTS_DEVICE names a real device"
    version = importlib.metadata.version("torch")
    if not version.startswith(KNOWN):
        return f"the simulated device knows the internals of torch {', '.join(KNOWN)}, and this is {version}"
    if "-n" in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:
        return "this process only gives out tests, and the others wait until it has started"
    if "torch" in sys.modules:
        return "torch was imported before: run `pytest -p tests.device.simulated tests/device`"
    spec = importlib.util.find_spec("torch")
    if any((Path(spec.origin).parent / "lib").glob("libtorch_cuda*")):
        return "this torch has CUDA itself: GRAFT_TESTS_DEVICE=cuda runs the tests on the real device"
    if shutil.which("g++") is None:
        return "the simulated device needs g++"
    return None


def simulate(waits: Waits) -> ModuleType:
    """Load the device before torch is imported, then give torch.cuda what it asks of a driver. Return torch."""
    folder = Path(importlib.util.find_spec("torch").origin).parent
    ctypes.CDLL(str(build(folder)), ctypes.RTLD_GLOBAL).simulated_callback(waits.told)
    import torch
    import torch.cuda as cuda

    C, device, nothing = torch._C, torch.ops.simulated, lambda *args, **kwargs: None
    cuda._initialized, cuda._lazy_init = True, nothing
    cuda._is_in_bad_fork = lambda: False
    cuda.is_available, cuda.is_bf16_supported = lambda: True, lambda *args, **kwargs: True
    cuda.device_count = cuda.random.device_count = lambda: 2
    C._cuda_getDevice = lambda: device.exchange(-1)
    cuda.get_device_capability, cuda.get_device_name = lambda d=None: (8, 0), lambda d=None: "simulated"
    C._cuda_setDevice = C._cuda_exchangeDevice = C._cuda_maybeExchangeDevice = device.exchange
    cuda._exchange_device = cuda._maybe_exchange_device = device.exchange
    cuda.synchronize = cuda.empty_cache = cuda.ipc_collect = cuda.reset_peak_memory_stats = nothing
    torch.accelerator.synchronize = nothing
    cuda.memory_allocated = cuda.max_memory_allocated = cuda.memory_reserved = lambda d=None: 0
    cuda.mem_get_info = lambda d=None: (1 << 33, 1 << 34)
    cuda.default_generators = tuple(device.default_generator(i) for i in range(2))
    plain = torch.storage._StorageBase.clone

    def clone(storage):  # torch's asks the storage's type for memory on the device, which this build refuses
        if storage.device.type != "cuda":
            return plain(storage)
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).clone().untyped_storage()

    torch.storage._StorageBase.clone = clone
    return torch


WAITS = Waits()
WHY_NOT = why_not()
if WHY_NOT is None:
    try:
        simulate(WAITS)
    except subprocess.CalledProcessError as failed:
        WHY_NOT = f"g++ could not build it: {failed.stderr.strip().splitlines()[-1]}"
