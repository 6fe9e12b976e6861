# SPDX-License-Identifier: Apache-2.0
"""Stores of weights that only the module's forward can use.

A linear layer is read by running its forward on the rows of the identity matrix.

A random input first shows that the layer is linear, and that its bias is its bias. Nothing of the weight that was read
is kept, and nobody writes it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from graft.core.effect import HALF
from graft.core.ops import find_op
from graft.storage.dense import NUMBERS, Dense, explain_forward, strange_tensor
from graft.storage.offload import computes_on
from graft.storage.quantized import OwnModule

ROWS = 512  # of the identity in one call
TOLERANCE = 0.03  # relative: activations may be rounded to 8 bits
SIZES = (1.0, 1.0, 8.0, 0.125)  # of random rows: clipping and nonlinearity show at some of them


F = TypeVar("F", bound=Callable[..., object])


def exclude_from_compiler(f: F) -> F:
    """Mark a function by `_torchdynamo_disable`, so that torch.compile does not trace it, and return it.

    torch.compiler.disable would import the compiler.
    """
    f._torchdynamo_disable = True  # type: ignore[attr-defined]
    return f


@exclude_from_compiler
def read_by_identity(m: nn.Module, dims: tuple[int, int], device: torch.device | None, dtype: torch.dtype) -> Tensor:
    """Return the weight (out, in) of a linear layer in new memory, by running it on blocks of the identity matrix.

    A copy of the layer runs, in evaluation mode, without hooks and with a zero bias. Its output for zeros is
    subtracted: the bias may be out of reach.

    Args:
        dims: (out, in).
        device, dtype: of the inputs and of the result.
    """
    run = copy_for_reading(m)
    W = torch.empty(dims, device=device, dtype=dtype)
    # the bias, which a kernel may add from its own tensors
    zero = run_forward(run, torch.zeros(1, dims[1], device=device, dtype=dtype))
    for columns, rows in _iterate_identity(dims[1], device, dtype):
        W[:, columns] = (run_forward(run, rows) - zero).T
    return W


@exclude_from_compiler
def why_not_linear(m: nn.Module, dims: tuple[int, int], device: torch.device | None, dtype: torch.dtype) -> str | None:
    """Return why a module is not y = W x + bias with its `bias` attribute; None if it is, as far as random inputs show.

    A copy of the module runs on four random rows of a fixed seed, times 1, 1, 8 and 0.125, and on the identity in
    blocks of 512. Outputs less that for zeros must be the rows' sum over the identity's outputs, within 3 % of the
    norm. An output of another shape fails. Last comes the test of `why_not_affine`.
    """
    run = copy_for_reading(m)
    x = torch.randn(len(SIZES), dims[1], generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    x = (x * torch.tensor(SIZES, device="cpu")[:, None]).to(device, dtype)
    zero = run_forward(run, torch.zeros_like(x[:1])).float()
    y, sums = run_forward(run, x).float() - zero, torch.zeros(len(SIZES), dims[0], device=device)
    for columns, rows in _iterate_identity(dims[1], device, dtype):
        sums += x[:, columns].float() @ (run_forward(run, rows).float() - zero)
    if y.shape != sums.shape or not _is_near(sums, y):
        return "it is not linear: its output is not the sum of what it makes of each input"
    return why_not_affine(m, dims, device, dtype)


@exclude_from_compiler
def why_not_affine(m: nn.Module, dims: tuple[int, int], device: torch.device | None, dtype: torch.dtype) -> str | None:
    """Return why the module adds more than its bias: its output for zeros is not `bias`, within 3 % of its norm.

    None if it is. A missing bias counts as zeros. A copy of the module runs, without hooks.
    """
    bias = getattr(m, "bias", None)  # read before the call, which may remove it
    zero = run_forward(copy_for_reading(m, keep_bias=True), torch.zeros(1, dims[1], device=device, dtype=dtype))[0]
    if not _is_near(zero.float(), torch.zeros_like(zero).float() if bias is None else bias.detach().float()):
        return "its output for an input of zeros is not its bias"
    return None


def copy_for_reading(m: nn.Module, keep_bias: bool = False) -> nn.Module:
    """Return a shallow copy of a module with the same tensors, in evaluation mode, without hooks, and with a bias of
    zeros if it has one.

    Its forward then sets attributes on the copy only. Children are copied in the same way, with their biases.

    keep_bias: leave the module's bias.
    """
    clone = copy.copy(m)
    clone.__dict__.update({key: type(v)(v) for key, v in m.__dict__.items() if key in _OWN})
    clone.__dict__.update({key: type(v)() for key, v in m.__dict__.items() if "_hooks" in key and v is not None})
    clone.__dict__["training"] = False
    for name, child in m._modules.items():
        clone._modules[name] = None if child is None else copy_for_reading(child, keep_bias=True)
    bias = getattr(m, "bias", None)
    if isinstance(bias, Tensor) and not keep_bias:
        container = next((clone.__dict__[key] for key in _OWN if "bias" in clone.__dict__[key]), clone.__dict__)
        container["bias"] = torch.zeros_like(bias.detach())
    return clone


_OWN = ("_parameters", "_buffers", "_modules")


def iterate_tensors(m: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of a module and of the modules below it.

    Of each module: its weight, other parameters and buffers, then tensors that are plain attributes. A tensor with two
    names in a module comes twice.
    """
    tensors = {**m._parameters, **m._buffers}
    for t in (tensors.pop("weight", None), *tensors.values(), *vars(m).values()):
        if isinstance(t, Tensor):
            yield t
    for child in m.children():
        yield from iterate_tensors(child)


def find_compute_dtype(m: nn.Module) -> torch.dtype | None:
    """Return the dtype that a module computes in; None if nothing tells.

    The first of these counts: the module's `compute_dtype`; the dtype of a weight of plain floats; the dtype of the
    first tensor in half precision. Scales in float32 say nothing, as many layers compute in the dtype of their input.
    """
    named = getattr(m, "compute_dtype", None)
    if isinstance(named, torch.dtype):
        return named
    weight = m._parameters.get("weight")
    if weight is not None and weight.dtype in NUMBERS:
        return weight.dtype
    return next((t.dtype for t in iterate_tensors(m) if t.dtype in HALF), None)


def _iterate_identity(n: int, device: torch.device | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield (slice, rows) for blocks of at most 512 rows of the identity matrix of size n; `rows` is (size, n)."""
    for start in range(0, n, ROWS):
        size = min(ROWS, n - start)
        rows = torch.zeros(size, n, device=device, dtype=dtype)
        rows.diagonal(start).fill_(1)
        yield slice(start, start + size), rows


@torch.no_grad()
def run_forward(m: nn.Module, x: Tensor) -> Tensor:
    """Return the output of a module's forward without gradients or autocast; the first item if it is a tuple."""
    with torch.autocast(x.device.type, enabled=False):
        y = m.forward(x)
    return y[0] if isinstance(y, tuple) else y


def _is_near(rows: Tensor, goal: Tensor) -> bool:
    """Return True if the distance of each row to its goal is at most 0.03 times the goal's norm, plus 1e-6."""
    scale = goal.norm(dim=-1)
    return bool(((rows - goal).norm(dim=-1) <= TOLERANCE * scale + 1e-6).all())


DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # tried in this order if the compute dtype is not known


class ByIdentity(OwnModule):
    """The store of a layer that is known to be linear, read by running its forward on in_features rows at each reading.

    Args:
        codes: the kind of codes that replace its weight, for errors: "GPTQ codes".
        calibrated: the codes were made with data from a model in use, so that they are not made anew.
    """

    writes = False

    def __init__(self, name: str, codes: str, calibrated: bool = True):
        """Set the texts for errors, and an empty cache of results by module."""
        self.name, self.codes = name, codes
        self.calibrated = f"its weight is {codes} that were calibrated" if calibrated else None
        # result of `look` for a layer, and the dtype that it ran with
        self.known: WeakKeyDictionary[nn.Module, tuple[str | None, torch.dtype]] = WeakKeyDictionary()

    look = staticmethod(why_not_affine)

    def reason(self, m: nn.Module) -> tuple[str, str]:
        """Return ("its weight is <codes>", ""): why graft itself cannot read the weight, and no remedy."""
        return f"its weight is {self.codes}", ""

    def why_undecodable(self, m: nn.Module) -> str | None:
        """Return why running the layer does not give its weight; None if it does.

        A layer with an Op that is not linear gets the store's reason and remedy. Otherwise the first call runs a copy
        of the layer through `look`, and caches result and dtype for this module. The dtype is the compute dtype; if
        none is known, float32, bfloat16 and float16 are tried in turn. If all raise, return the first error; the next
        call tries again.
        """
        reason, remedy = self.reason(m)
        op, (device, dtype) = find_op(m), self.where(m)
        if not op.linear:
            return reason + remedy
        if m not in self.known:
            first: Exception | None = None
            for runs_in in DTYPES if dtype is None else (dtype,):
                try:
                    self.known[m] = self.look(m, op.dims(m), device, runs_in), runs_in
                    break
                except Exception as e:  # a forward may raise anything, and may run later on another device
                    first = first or e
            else:
                return f"{reason}, and running the layer to read it ends in {type(first).__name__}: {first}"
        why = self.known[m][0]
        return None if why is None else f"{reason}, and {why}"

    def values(self, m: nn.Module) -> Tensor:
        """Return the weight in the module's orientation, from `read_by_identity`, in the compute dtype.

        If nothing tells the dtype, it is the one that `why_undecodable` has cached: call that before.
        """
        op, (device, dtype) = find_op(m), self.where(m)
        return op.uncanon(read_by_identity(m, op.dims(m), device, dtype or self.known[m][1]))

    def why_unwritable(self, m: nn.Module, name: str = "weight") -> str | None:
        """Return why merging cannot write the weight: always a reason, as graft cannot make these codes.

        For calibrated codes, and for other tensors than `weight`, it is the reason of all quantized stores.
        """
        if name != "weight" or self.calibrated is not None:
            return super().why_unwritable(m, name)
        reason, remedy = self.reason(m)
        return f"{reason}, and graft does not know how to write it{remedy}"

    def snapshot(self, m: nn.Module, name: str = "weight", shared: bool = False) -> dict[str, object]:
        """Return all parameters and buffers of the module by name, themselves, but those that are None."""
        return {part: t for tensors in (m._parameters, m._buffers) for part, t in tensors.items() if t is not None}

    def compute_dtype(self, m: nn.Module) -> torch.dtype | None:
        """Return the dtype of `find_compute_dtype`; None if nothing tells."""
        return find_compute_dtype(m)

    def where(self, m: nn.Module, name: str = "weight") -> tuple[torch.device | None, torch.dtype | None]:
        """Return the device of the module's first tensor, or accelerate's if it is offloaded; and the compute dtype.

        Each may be None.
        """
        return computes_on(m, next((t.device for t in iterate_tensors(m)), None)), self.compute_dtype(m)

    def strange(self, m: nn.Module) -> str | None:
        """Return None: a replaced forward is no obstacle, since the forward defines the weight."""
        return None  # its forward defines the weight


class Foreign(ByIdentity):
    """The store of classes that graft does not know: adapters act next to the layer, and nothing writes the weight.

    Its weight can be read if running the layer shows that it is linear.
    """

    look = staticmethod(why_not_linear)
    copies = "all"  # they may be views, or saved for a backward pass

    def __init__(self) -> None:
        """Name the store "foreign"; no codes are known, and none were calibrated."""
        super().__init__("foreign", "", calibrated=False)

    def reason(self, m: nn.Module) -> tuple[str, str]:
        """Return why graft cannot read the weight, and the remedy or "".

        The reason is a strange class or dtype of the weight, else a replaced forward (with a remedy), else that graft
        does not know the module's class.
        """
        if (why := strange_tensor(m, "weight")) is not None:
            return why, ""
        return explain_forward(m) or (f"graft does not know how a {type(m).__name__} holds its weight", "")

    def ready(self, m: nn.Module) -> str | None:
        """Do nothing, and return None: classes that graft does not know stay as they are."""
        return None  # classes that graft does not know stay as they are


class Packed(Dense):
    """The store of one parameter with codes, in a module that computes with the codes directly."""

    name = "packed"
    exact = live = False

    def why_unreadable(self, m: nn.Module, name: str = "weight") -> str | None:
        """Return why the parameter can be neither read nor written, with the remedy: always a reason."""
        why = strange_tensor(m, name) or f"a {type(m).__name__} computes with codes in place of its {name}"
        return f"{why}: load the base model dequantized (in transformers: dequantize=True in its quantization_config)"

    why_unwritable = why_unreadable
