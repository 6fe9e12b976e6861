# SPDX-License-Identifier: Apache-2.0
"""Checks of graft on a device against the CPU, and a short benchmark against PEFT, for `graft device-report`."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import distributions
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import graft
from graft.config.reading import Json

CPU = torch.device("cpu")
PACKAGES = ("graft-adapters", "peft", "torch", "transformers", "accelerate", "safetensors", "numpy", "triton")
OPTIONS: dict[str, Any] = {"ADALORA": {"total_step": 10}, "IA3": {"feedforward_modules": ["down"]}}
LEFT_OUT = {  # they need tokens, tasks, time steps, other adapters, or a model of transformers
    "SHADOW", "TRAINABLE_TOKENS", "POLY", "XLORA", "ADAPTION_PROMPT", "MTLLORA", "TLORA", "ADAPTER_FUSION", "MIXLORA",
    "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE",
}  # fmt: skip
METHODS: dict[str, Any] = {k.value: graft.PEFT_TYPE_TO_CONFIG_MAPPING[k] for k in graft.PeftType if k not in LEFT_OUT}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}  # of ‖difference‖ / ‖the CPU's‖


def build_base(width: int = 256, blocks: int = 2) -> nn.Module:
    """Return a Sequential of blocks, each of a layer norm `norm`, a linear layer `up` to three times the width, `tanh`
    and a linear layer `down`.

    The model is in float32 on the CPU and has the same values at each call. Seeds torch.
    """
    torch.manual_seed(0)
    sizes = (width, 3 * width), (3 * width, width)
    layers = [[nn.LayerNorm(width), nn.Linear(*sizes[0]), nn.Tanh(), nn.Linear(*sizes[1])] for _ in range(blocks)]
    return nn.Sequential(*(nn.Sequential(OrderedDict(zip(("norm", "up", "tanh", "down"), each))) for each in layers))


@torch.no_grad()
def randomize_adapters(model: Any) -> Any:
    """Add noise of standard deviation 0.02 to each trainable parameter, in place, so that every adapter changes the
    output. Returns the model.

    A generator on the CPU with seed 1 gives the noise.
    """
    generator = torch.Generator().manual_seed(1)
    for p in [p for p in model.parameters() if p.requires_grad]:
        p += (torch.randn(p.shape, generator=generator) * 0.02).to(p)
    return model


def load_model(folder: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """Load the adapter of a folder, as trainable, onto a new small base with a dtype on a device.

    Returns the model in eval mode.
    """
    return graft.PeftModel.from_pretrained(build_base().to(device, dtype), folder, is_trainable=True).eval()


# Laws: each returns tensors that a device and the CPU must agree on, and leaves the model as it was but for gradients.
# They get a model of `load_model` and an input of shape (8, 256) on the model's device.


def run_forward(model: Any, x: Tensor) -> list[Tensor]:
    """Return the outputs with the adapter, with the adapter disabled, and of eight rows that use the two in turn
    ("default" first).
    """
    with model.disable_adapter():
        plain = model(x)
    return [model(x), plain, model(x, adapter_names=["default", "__base__"] * 4)]


def run_backward(model: Any, x: Tensor) -> list[Tensor]:
    """Return the gradients of all adapter parameters that have one, for the sum of squared outputs in float32.

    Earlier gradients are dropped first.
    """
    model.zero_grad()
    model(x).float().square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def run_autocast(model: Any, x: Tensor) -> list[Tensor]:
    """Return the output under autocast to bfloat16 on the input's device."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return [model(x)]


def run_save(model: Any, x: Tensor) -> list[Tensor]:
    """Save the adapter from the model's device, load it onto a base on the CPU, and return the output there."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return [load_model(folder, CPU, x.dtype)(x.cpu())]


def run_merge(model: Any, x: Tensor) -> list[Tensor]:
    """Return the outputs after merging and after unmerging.

    Raises AssertionError if the model is in half precision and unmerging does not restore each bit of the weights.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    merged = model(x)
    model.unmerge_adapter()
    if x.dtype != torch.float32 and not all(torch.equal(p, before[name]) for name, p in model.named_parameters()):
        raise AssertionError("Unmerging does not restore the bits of the weights.")
    return [merged, model(x)]


BENCHMARK: tuple[tuple[str, bool, list[str], Json], ...] = (  # row, training, adapters of rows, LoRA's options
    ("forward, LoRA", False, [], {}), ("training step, LoRA", True, [], {}),
    ("training step, DoRA", True, [], {"use_dora": True}),
    ("forward, four adapters in a batch", False, ["one", "two", "three", "four"], {}),
)  # fmt: skip
LAWS = (run_forward, run_backward, run_autocast, run_save, run_merge)  # merge last: its failure may leave it merged


def check_device(device: torch.device, show: Callable[[str], None]) -> Json:
    """Check the laws for METHODS on a device against the CPU, in float32, bfloat16 and float16.

    A method that lacks a package is skipped, and a law with an error on the CPU that is no AssertionError. Where torch
    counts waits for the device, on CUDA, a ninth training step that waits fails.

    Args:
        show: called with the name of each method before its checks.

    Returns:
        "passed": a number. "failed", "skipped": {"METHOD law dtype": error}, by "METHOD" alone for waits and for errors
        outside the laws. "deviations": {"law dtype": the largest}.
    """
    results: Json = {"passed": 0, "failed": {}, "skipped": {}, "deviations": {}}
    for method, make_config in METHODS.items():
        show(method)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                config = make_config(target_modules=["up", "down"], **OPTIONS.get(method, {}))
                randomize_adapters(graft.get_peft_model(build_base(), config)).save_pretrained(folder)
                for dtype in TOLERANCES:
                    check_laws(method, folder, dtype, device, results)
                if waits := count_step_waits(load_model(folder, device), torch.randn(8, 256).to(device)):
                    raise AssertionError(f"A training step waits {waits} times for the device.")
            except ImportError as e:  # of AdaMSS without scikit-learn
                results["skipped"][method] = shorten_error(e)
            except Exception as e:
                results["failed"][method] = shorten_error(e)
    return results


def check_laws(method: str, folder: str, dtype: torch.dtype, device: torch.device, results: Json) -> None:
    """Check all laws for the adapter in a folder in one dtype, autocast only in float32, and add to the `results` of
    `check_device`. Each law runs on the CPU and on `device` with the same 8 × 256 input.

    A law that raises on the CPU is noted as skipped, with the error. One that raises on the device, or deviates more
    than `TOLERANCES` of the dtype (0.05 for autocast) or by NaN, is noted as failed. Else `passed` rises, and the
    largest deviation is kept. Nothing of a law is raised.
    """
    reference, model = load_model(folder, CPU, dtype), load_model(folder, device, dtype)
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(2)).to(dtype)
    for law in LAWS if dtype == torch.float32 else [law for law in LAWS if law is not run_autocast]:
        name, stage = f"{law.__name__.removeprefix('run_')} {str(dtype).removeprefix('torch.')}", "skipped"
        try:
            wanted = law(reference, x)  # raises for a merge that the method lacks, or a product that the CPU lacks
            stage = "failed"
            limit = 5e-2 if law is run_autocast else TOLERANCES[dtype]
            deviation = measure_deviation(law(model, x.to(device)), wanted)
            if not deviation <= limit:  # NaN is not below
                raise AssertionError(f"The deviation from the CPU is {deviation:.3g}, above {limit:.3g}.")
            results["deviations"][name] = max(deviation, results["deviations"].get(name, 0.0))
            results["passed"] += 1
        except Exception as e:
            results["failed" if isinstance(e, AssertionError) else stage][f"{method} {name}"] = shorten_error(e)


def measure_deviation(tensors: list[Tensor], wanted: list[Tensor]) -> float:
    """Return ‖a - b‖ / ‖b‖ in float32, for all values of `tensors` as one vector a, and of `wanted` as b."""
    a, b = (torch.cat([t.detach().cpu().float().flatten() for t in side]) for side in (tensors, wanted))
    return float((a - b).norm() / b.norm())


def shorten_error(error: Exception) -> str:
    """Return an error's type and first line, at most 300 characters, without the paths of graft, of the home folder and
    of temporary files.
    """
    text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    for path in (os.path.dirname(graft.__file__), os.path.expanduser("~"), tempfile.gettempdir()):
        text = text.replace(path, "…")
    return text


def count_step_waits(model: Any, x: Tensor) -> int:
    """Run nine forward and backward passes, the last with torch's sync debug mode "warn", which is "default"
    afterwards. Return how often the last waits for a CUDA device, by torch's warnings; 0 without running for other
    devices and in CPU builds.

    The passes before it copy constants and audit gradients, which waits: eight times for a part without gradients.
    """
    if not x.is_cuda or not hasattr(torch._C, "_cuda_set_sync_debug_mode"):
        return 0
    for _ in range(8):
        run_backward(model, x)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        run_backward(model, x)
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in heard)


def run_benchmark(device: torch.device, width: int = 1024, tokens: int = 256, turns: int = 20) -> Json:
    """Measure LoRA of rank 16 and alpha 22 in graft, in PEFT if it is installed, and the base alone, for each row of
    BENCHMARK.

    Rows for training run a forward and a backward pass, others a forward pass without gradients.

    The base has four blocks in bfloat16, and a batch is (4, tokens, width). A number is the median that torch's Timer
    gives of `turns` calls.

    Returns:
        {row: {"graft", "PEFT" and "base": seconds of a call}}
    """
    x = torch.randn(4, tokens, width).to(device, torch.bfloat16).requires_grad_()
    libraries: dict[str, Any] = {"graft": graft, "base": None}
    if find_spec("peft"):
        libraries["PEFT"] = import_module("peft")
    rows: Json = {}
    for row, trains, names, options in BENCHMARK:
        for name, library in libraries.items():
            model: Any = build_base(width, 4).to(device, torch.bfloat16).requires_grad_(False)
            if library:
                config = library.LoraConfig(r=16, lora_alpha=22, target_modules=["up", "down"], **options)
                model = library.get_peft_model(model, config)
                for adapter in names:
                    model.add_adapter(adapter, config)
                randomize_adapters(model)
            model.train(trains)
            keywords = {"adapter_names": names} if names and library else {}

            def call(model: Any = model, trains: bool = trains, keywords: Any = keywords) -> None:
                """Run a forward pass, and in training the backward pass of the outputs' mean square in float32.

                Gradients add up; nothing is returned.
                """
                with torch.set_grad_enabled(trains):
                    y = model(x, **keywords)
                if trains:
                    y.float().square().mean().backward()

            rows.setdefault(row, {})[name] = Timer("call()", globals={"call": call}).timeit(turns).median
    return rows


def find_device(kind: str | None) -> torch.device | None:
    """Return the first device of a type ("cpu", "cuda", "xpu", "mps", "npu"), with None of any type but "cpu". Return
    None if torch finds none here.
    """
    for name in ("cuda", "xpu", "mps", "npu") if kind is None else (kind,):
        module: Any = getattr(torch, name, None)
        if name == "cpu" or (hasattr(module, "is_available") and module.is_available()):
            return CPU if name == "cpu" else torch.device(name, 0)
    return None


def build_report(device: torch.device, show: Callable[[str], None]) -> Json:
    """Return the document of `graft device-report`: "versions", "device", "checks" (`check_device`) and "benchmark"
    (`run_benchmark`).

    The benchmark is {} for the CPU; its error is a failed check. The device has its name, capability, memory and driver
    on CUDA only. `show` is called with the name of each method and with "benchmark".
    """
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda, "hip": torch.version.hip}
    versions |= {d.name: d.version for d in distributions() if d.name in PACKAGES}
    facts: Json = {"type": device.type, "system": platform.platform()}
    if device.type == "cuda":
        facts |= {"name": torch.cuda.get_device_name(0), "capability": torch.cuda.get_device_capability(0)}
        facts |= {"count": torch.cuda.device_count(), "memory": torch.cuda.mem_get_info(0)[1]}
        facts["driver"] = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    report: Json = {"versions": versions, "device": facts, "checks": check_device(device, show), "benchmark": {}}
    if device.type != "cpu":
        show("benchmark")
        try:
            report["benchmark"] = run_benchmark(device)
        except Exception as e:  # a report without it is better than none
            report["checks"]["failed"]["benchmark"] = shorten_error(e)
    return report
