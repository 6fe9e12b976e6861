# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""Random values as torch's constructors draw them on a CPU, so that a seeded run gets PEFT's numbers on any device.

Also the adapters' generators, if a call has one generator for each adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from threading import RLock
from typing import Any

import torch
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode

from graft.kernels.low_rank import new_seed

LOCK = RLock()  # torch's own generator is one for all threads
_SCRATCH = 1 << 14  # 64-bit words: few enough for the cache
_WORTH = 1 << 12  # numbers: with fewer, `skip` costs more than it gains


@cache
def kaiming_bound(fan_in: int) -> float:
    """Return the bound of the uniform values of a new nn.Linear: kaiming_uniform_ with a = √5, rounded in the same
    steps.

    Returns 0.0 if `fan_in` is 0. Cached.
    """
    a = math.sqrt(5)
    return math.sqrt(3.0) * (math.sqrt(2.0 / (1 + a**2)) / math.sqrt(fan_in)) if fan_in else 0.0


def skip_draws(*tensors: Tensor) -> None:
    """Advance the CPU's generator as far as filling the tensors with uniform values would, in about half the time.

    From 4096 float32 numbers on, raw words are drawn into a scratch tensor and the tensors keep their values. Else the
    tensors are really filled (those on other devices are not), so callers must overwrite them.
    """
    left = sum([t.numel() for t in tensors])
    if left >= _WORTH and all(t.dtype is torch.float32 for t in tensors):
        while left > 1:  # a 64-bit word takes two steps of the generator, a float one
            words = min(left // 2, _SCRATCH)
            make_scratch()[:words].random_(-(2**63), None)
            left -= 2 * words
        if left:
            torch.empty(1, device="cpu").uniform_()
        return
    for t in tensors:
        (t if t.is_cpu else torch.empty_like(t, device=CPU)).uniform_()  # the caller overwrites the values


@cache
def make_scratch() -> Tensor:
    """Return a CPU tensor of 16,384 64-bit words for `skip_draws`. One tensor for all calls."""
    return torch.empty(_SCRATCH, dtype=torch.int64, device="cpu")


CPU = torch.device("cpu")


def find_accelerator() -> torch.device | None:
    """Return the device of this process that is not the CPU, of whatever maker.

    Returns None if there is none, or if its runtime is not initialized, so that asking never starts it.
    """
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    begun = getattr(torch.get_device_module(device), "is_initialized", None)  # MPS always is
    return device if begun is None or begun() else None


def read_generator_states() -> list[Tensor]:
    """Return copies of the states of torch's default generators: the CPU's, then that of the accelerator in use, if
    any.
    """
    device = find_accelerator()
    return [torch.get_rng_state(), *([] if device is None else [torch.get_device_module(device).get_rng_state()])]


def restore_generator_states(states: list[Tensor]) -> None:
    """Set torch's default generators to the states that `read_generator_states` returned: the CPU's, then that of the
    present accelerator, if its state is there.
    """
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(find_accelerator()).set_rng_state(state)


_CREATE = frozenset({torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal})
_LIKE = frozenset({torch.rand_like, torch.randn_like, torch.randint_like})
_SAMPLE = {"bernoulli", "multinomial", "poisson"}  # functions and methods of a tensor of probabilities
# functions that fill a tensor: torch's, or a library's replacements of those of torch.nn.init
_UNIFORM = {"uniform_", "kaiming_uniform_", "xavier_uniform_", "random_", "bernoulli_", "sparse_"}
_NORMAL = {"normal_", "kaiming_normal_", "xavier_normal_", "trunc_normal_", "log_normal_", "orthogonal_"}
_FILL = _UNIFORM | _NORMAL | {"exponential_", "cauchy_", "geometric_"}


class DrawOnCPU(TorchFunctionMode):
    """A mode that makes torch draw random values by the CPU's generator, and then copies them to the device of their
    tensor.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Run a random function on the CPU and return its result on the device that the caller wanted; run others
        unchanged.

        Functions that create a tensor (`torch.rand`) use `device`, else the device of a `…_like` tensor or torch's
        default. Those that sample from a tensor (`bernoulli`) return on that tensor's device. Neither leaves the meta
        device. A function that fills a tensor (`normal_`) fills a CPU twin, which is copied into the tensor without
        gradients, and returns the tensor. The twin begins with the tensor's values only if a library marked the tensor
        by attributes, which the twin gets, too. Tensors on the CPU are filled directly; meta tensors draw nothing.
        """
        kwargs = kwargs or {}
        if func in _CREATE or func in _LIKE:
            like = args[0] if func in _LIKE else None
            default = torch.empty(0).device if like is None else like.device
            device = torch.device(kwargs.pop("device", None) or default)
            if device.type == "meta":
                return func(*args, **kwargs, device=device)
            return func(*args, **kwargs, device=CPU).to(device)
        name = getattr(func, "__name__", "")
        if name in _SAMPLE:
            shares = args[0] if args else kwargs.pop("input")
            twin = shares if shares.is_meta else shares.to(CPU)
            return func(twin, *args[1:], **kwargs).to(shares.device)
        if name in _FILL:
            t = args[0] if args else kwargs.pop("tensor", None)
            if not isinstance(t, Tensor) or t.device.type in ("cpu", "meta"):
                return func(t, *args[1:], **kwargs)
            with torch.no_grad():
                marked = vars(t)  # a library's own function may leave values that it has marked
                twin = t.detach().to(CPU) if marked else torch.empty_like(t, device=CPU)
                twin.__dict__.update(marked)
                t.copy_(func(twin, *args[1:], **kwargs))
            return t
        return func(*args, **kwargs)


NOTHING = nullcontext()


def build_on(device: torch.device | None, default: torch.device | None = None) -> AbstractContextManager[None]:
    """Return a context that makes tensors on `device`, with the random values that a seed gives on a CPU.

    None and "meta" as `device` mean the CPU. The context does nothing if the default device is meta, or if both devices
    are CPUs. `default` is torch's default device, to save the call that reads it.
    """
    default = default or torch.empty(0).device  # get_default_device of torch 2.6 does not see `with torch.device(…)`
    if device is None or device.type == "meta":
        device = CPU
    if default.type == "meta" or (default.type == "cpu" and device.type == "cpu"):
        return NOTHING
    return _build_with_cpu_draws(device)


@contextmanager
def draw_from_seed(seed: int) -> Iterator[None]:
    """Make all draws of the block those that `seed` gives on a CPU, whatever the device.

    Holds the lock of all threads. Afterwards the CPU's generator has its former state; others were not used.
    """
    with LOCK, torch.random.fork_rng(devices=[]), DrawOnCPU():
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _build_with_cpu_draws(device: torch.device) -> Iterator[None]:
    """Set torch's default device to `device` within the block, and draw random values on the CPU.

    Both end with the block, also after an error.
    """
    with device, DrawOnCPU():
        yield


_tickets = [0]  # drawn so far, by all threads


class AdapterGenerators:
    """The random generators of one call, by adapter.

    While an adapter's rows run, torch's own generator has the state of the adapter's, so that methods draw as they do
    with one adapter. Each run of a layer draws a ticket from torch's generator. Gradient checkpointing restores torch's
    generator before it runs a layer again. So the layer gets the same ticket, and by it the draws of the first time.
    """

    def __init__(self, generators: Mapping[str, Generator]) -> None:
        """Keep the generators, and their present states for `rewind`."""
        self.generators = generators
        self._first = {name: g.get_state() for name, g in generators.items()}
        self._began: dict[int, dict[str, Tensor]] = {}  # by ticket, each adapter's state at its first block

    def ticket(self) -> int:
        """Draw a number from torch's own CPU generator, under the lock, and count it.

        It identifies one run of a layer. Another thread may set torch's generator back, so that a number comes twice.
        Outside a backward pass the earlier run's states are therefore dropped.
        """
        with LOCK:
            _tickets[0] += 1
            number = new_seed()
            if torch._C._current_graph_task_id() == -1:
                self._began.pop(number, None)
            return number

    @contextmanager
    def use_generator(self, adapter: str | None, ticket: int, device: torch.device) -> Iterator[None]:
        """Make all draws within the block come from the generator of `adapter`; do nothing if `adapter` is None.

        Holds the lock of all threads. The first block of a ticket starts from the generator's state, and stores the new
        state in it afterwards. A later block of the same ticket and adapter starts from the same state, and leaves the
        generator as it is. On an accelerator, its generator gets a seed drawn from the adapter's. Afterwards torch's
        generators are as before. Raises KeyError for an adapter without a generator. The start states of all tickets
        stay as long as the call.
        """
        if adapter is None:
            yield
            return
        generator, torch_generator = self.generators[adapter], torch.default_generator
        states = self._began.setdefault(ticket, {})
        began = states.get(adapter)
        with LOCK:
            before = torch_generator.get_state()
            start = generator.get_state() if began is None else began
            torch_generator.set_state(start)
            on_cpu = device.type == "cpu" or find_accelerator() is None
            device_module = None if on_cpu else torch.get_device_module(device)
            if device_module is not None:
                device_state = device_module.get_rng_state(device)
                device_module.manual_seed(new_seed())
            try:
                yield
            finally:
                if began is None:
                    generator.set_state(torch_generator.get_state())
                    states[adapter] = start
                torch_generator.set_state(before)
                if device_module is not None:
                    device_module.set_rng_state(device_state, device)

    def rewind(self) -> None:
        """Set each generator back to its state at the beginning of the call."""
        for name, state in self._first.items():
            self.generators[name].set_state(state)


class GeneratorSnapshot:
    """The states of torch's own generators at one time, to see whether a call drew anything but tickets since then."""

    def __init__(self) -> None:
        """Record the states of torch's CPU generator and of the accelerator's, and the number of tickets so far."""
        with LOCK:
            self._states, self._tickets = read_generator_states(), _tickets[0]

    def is_untouched(self) -> bool:
        """Return True if nothing but tickets was drawn from torch's CPU generator since, and nothing from the
        accelerator's.

        Under the lock, draws as many tickets from a copy of the old state as were drawn meanwhile, and compares; the
        generators do not change. An accelerator counts only if it was in use both then and now.
        """
        with LOCK:
            twin = Generator("cpu")
            twin.set_state(self._states[0])
            for _ in range(_tickets[0] - self._tickets):
                new_seed(twin)
            return all(map(torch.equal, read_generator_states(), [twin.get_state(), *self._states[1:]]))
