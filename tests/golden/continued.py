# SPDX-License-Identifier: Apache-2.0
"""Work that stops in the middle, with its state in files, and goes on from them: trainings, runs, merges, caches.

`begin` writes the files of a case into a folder, by the graft that is installed; `finish` goes on and returns numbers.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

import graft
from graft import optim
from graft.files.errors import OutputExistsError
from graft.files.merging.merge import merge_adapters
from graft.many import MultiTrain
from tests.golden.cases import base_at, inputs_at, sampled
from tests.models import seeded


class Continued(NamedTuple):
    """The two halves of a piece of work; both get the folder of the case, and the folder of the base models."""

    begin: Callable[[Path, Path], object]
    finish: Callable[[Path, Path], Tensor]


def trained(model: nn.Module) -> Tensor:
    """Return numbers of all parameters that train, by name."""
    return torch.cat([sampled(p) for _, p in sorted(model.named_parameters()) if p.requires_grad])


# trainings in a loop


def halved(step: int) -> float:
    return 0.5**step


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameters that train in two groups, of the A and of all others."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    slow = {"params": [p for name, p in named if "lora_A" in name], "weight_decay": 0.1}
    return [slow, {"params": [p for name, p in named if "lora_A" not in name], "lr": 3e-3}]


Maker = Callable[[nn.Module], Any]
OPTIMIZERS: dict[str, tuple[Maker, Maker | None]] = {  # of the model; the scheduler is of the optimizer
    "adamw": (lambda m: AdamW(groups_of(m), lr=1e-2), lambda o: CosineAnnealingLR(o, T_max=9)),
    "amsgrad": (lambda m: AdamW(groups_of(m), lr=1e-2, amsgrad=True, foreach=False), None),
    "sgd": (lambda m: SGD(groups_of(m), lr=0.1, momentum=0.9), lambda o: LambdaLR(o, partial(halved))),
    "loraplus": (lambda m: optim.create_loraplus_optimizer(m, AdamW, lr=1e-2, loraplus_lr_ratio=4.0), None),
    "lorafa": (lambda m: optim.create_lorafa_optimizer(m, r=2, lora_alpha=3, lr=1e-2), None),
    "riemannian": (lambda m: optim.create_riemannian_optimizer(m, AdamW, lr=1e-2), None),
    "lorapro": (lambda m: optim.create_lorapro_optimizer(m, AdamW, lr=1e-2), None),
    "muon": (lambda m: optim.create_muon_optimizer(m, lr=1e-2), None),
}


class Loader:
    """A loader that says where it stands."""

    at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Training:
    """A small training without random numbers, made anew in the same way each time."""

    def __init__(self, bases: Path, optimizer: str = "adamw", config: Any = None, base: str = "mlp"):
        config = config or graft.LoraConfig(r=2, lora_alpha=3, target_modules=["fc1"], modules_to_save=["head"])
        with seeded(1):
            self.model = graft.get_peft_model(base_at(bases / base), config).eval()
        make, schedule = OPTIMIZERS[optimizer]
        self.inputs, self.optimizer = inputs_at(bases / base), make(self.model)
        self.scheduler, self.step = schedule and schedule(self.optimizer), 0

    def run(self, steps: int) -> Training:
        for _ in range(steps):
            self.step += 1
            inputs = {k: v + v.roll(self.step, 0) if v.is_floating_point() else v for k, v in self.inputs.items()}
            y = self.model(**inputs)
            y = y if isinstance(y, Tensor) else y["logits"]
            (y - torch.linspace(-1, 1, y.numel()).view(y.shape)).square().mean().backward()
            self.optimizer.step()
            self.scheduler and self.scheduler.step()
            self.optimizer.zero_grad()
        return self


def begin_training(make: Callable[[Path], Training], folder: Path, bases: Path) -> None:
    training, loader = make(bases).run(4), Loader()
    loader.at = 4
    random.seed(4)
    torch.default_generator.manual_seed(4)
    parts = training.model, training.optimizer, training.scheduler, loader
    graft.save_training(folder, *parts, step=4, extra={"seen": 20, "best": torch.tensor(0.5), "pair": (1, 2)})


def finish_training(make: Callable[[Path], Training], folder: Path, bases: Path) -> Tensor:
    training, loader = make(bases), Loader()
    done = graft.resume(folder, training.model, training.optimizer, training.scheduler, loader)
    assert (done.step, done.fresh, done.missing, loader.at) == (4, [], [], 4)
    assert (done.extra["seen"], done.extra["best"].item(), tuple(done.extra["pair"])) == (20, 0.5, (1, 2))
    drawn = torch.tensor([random.random(), torch.rand(()).item()])
    training.step = 4
    return torch.cat([trained(training.run(3).model), drawn])


def training(**options: Any) -> Continued:
    make = partial(Training, **options)
    return Continued(partial(begin_training, make), partial(finish_training, make))


# many runs at once


def batches(bases: Path, n: int = 4) -> list[dict[str, Tensor]]:
    ids = inputs_at(bases / "llama")["input_ids"].clamp(min=3)
    return [{"input_ids": ids.roll(i, 1), "labels": ids.roll(i, 1)} for i in range(n)]


LORA = dict(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"])
RUNS: dict[str, dict[str, Any]] = {
    "plain": dict(optimizer=partial(AdamW, lr=1e-2)),
    "gathers": dict(optimizer=partial(AdamW, lr=1e-2), accumulate=3, clip=1.0),
    "timed": dict(optimizer=partial(SGD, lr=0.5, momentum=0.9), schedule=partial(CosineAnnealingLR, T_max=12)),
    "looks": dict(optimizer=partial(AdamW, lr=3e-3), every=2),
}


def add_runs(runs: MultiTrain, bases: Path) -> MultiTrain:
    for name, options in RUNS.items():
        valid = {"valid": batches(bases, 1)} if "every" in options else {}
        runs.add(name, graft.LoraConfig(**LORA), data=batches(bases), steps=6, seed=3, **options, **valid)
    return runs


def begin_runs(folder: Path, bases: Path) -> None:
    runs = add_runs(MultiTrain(base_at(bases / "llama")), bases)
    for step in runs:
        if step.number == 4:  # one run is in the middle of a step
            break
    runs.save(folder)


def finish_runs(folder: Path, bases: Path) -> Tensor:
    runs = add_runs(MultiTrain.resume(base_at(bases / "llama"), folder), bases)
    assert [run.step for run in runs.list_runs()] == [4, 1, 4, 4]
    found = []
    for run in runs.run().list_runs():
        assert run.step == 6 and run.state == "ended", run.name
        found += [sampled(p) for p in run.parameters]
        found += [torch.tensor([point.loss for point in run.curve]), torch.tensor([look.loss for look in run.valid])]
    return torch.cat(found)


def swept(folder: Path, bases: Path) -> Any:
    space = {"r": [1, 2], "lr": [1e-2, 3e-2], "lora_alpha": [4]}
    options = dict(steps=4, keep=1 / 2, rungs=2, seed=3, save_every=1)
    return graft.sweep(
        base_at(bases / "llama"), graft.LoraConfig(**LORA), space, data=batches(bases), valid=batches(bases, 1),
        folder=folder, **options,
    )  # fmt: skip


def begin_sweep(stop: int, folder: Path, bases: Path) -> None:
    step, calls = MultiTrain.step, []

    def until(self: MultiTrain) -> Any:
        calls.append(None)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return step(self)

    MultiTrain.step = until  # type: ignore[method-assign]
    try:
        swept(folder, bases)
    except KeyboardInterrupt:
        pass
    finally:
        MultiTrain.step = step  # type: ignore[method-assign]
    assert (len(calls) > stop) == (stop < 100)


def finish_sweep(stop: int, folder: Path, bases: Path) -> Tensor:
    before = json.loads((folder / "sweep.json").read_text())["trials"]
    found = swept(folder, bases)
    for then, now in zip(before, found.trials):  # what was there stays
        assert (now.name, now.losses[: len(then["losses"])]) == (then["name"], then["losses"])
        assert [list(point) for point in now.curve][: len(then["curve"])] == then["curve"]
    rows = [
        [row["r"], row["lr"], row["steps"], row["loss"], ["dropped", "kept"].index(row["state"])] for row in found.rows
    ]
    return torch.tensor(rows).flatten()


# merges into files


def merged(folder: Path, **options: Any) -> Any:
    return merge_adapters(
        folder / "base", [folder / "adapter"], folder / "merged", weights=[0.5], certificate=True, **options
    )


def begin_merge(folder: Path, bases: Path) -> None:
    """Merge until the first file stands, as far as a process that is killed then."""
    with seeded(1):
        config = graft.LoraConfig(**LORA, init_lora_weights=False)
        adapted = graft.get_peft_model(base_at(bases / "llama"), config)
    adapted.save_pretrained(folder / "adapter")
    adapted.unload().save_pretrained(folder / "base", max_shard_size="20KB")

    def stop(name: str) -> None:
        raise KeyboardInterrupt

    try:
        merged(folder, step=stop)
    except KeyboardInterrupt:
        return
    raise AssertionError("nothing was written")


def finish_merge(folder: Path, bases: Path) -> Tensor:
    """Merge where a killed merge has left its files. Those that came with an archive count for nothing."""
    room = folder / ".merged.graft-merge"
    assert room.is_dir()
    try:
        done = merged(folder)
    except OutputExistsError as e:  # files in another place than merges of today have them
        assert str(room) in str(e) and not (folder / "merged").exists()
        shutil.rmtree(room)
        done = merged(folder)
    assert done.resumed == 0 and not room.exists()
    assert {*json.loads((folder / "merged" / "merge.json").read_text())["tensors"]} == {*done.tensors}
    return sampled(base_at(folder / "merged")(**inputs_at(bases / "llama")).logits)


# caches of starts that measure data


def with_corda(folder: Path, bases: Path, run: Any) -> Tensor:
    model = base_at(bases / "mlp")
    files = {f"{name}_file": str(folder / f"{name}.pt") for name in ("cache", "covariance")}
    config = graft.LoraConfig(
        r=2, target_modules=["fc1", "fc2"], init_lora_weights="corda", corda_config=graft.CordaConfig(**files)
    )
    graft.preprocess_corda(model, config, run and (lambda: run(model)))
    adapted = graft.get_peft_model(model, config)
    found = [t for name, t in sorted(graft.get_peft_model_state_dict(adapted).items()) if "lora_" in name]
    return torch.cat([sampled(t) for t in found])


def with_loraga(folder: Path, bases: Path, run: Any) -> Tensor:
    model = base_at(bases / "mlp")
    config = graft.LoraConfig(
        r=2, target_modules=["fc1", "fc2"], init_lora_weights="lora_ga", lora_ga_config=graft.LoraGAConfig()
    )
    graft.preprocess_loraga(
        model, config, run and (lambda: run(model).square().sum().backward()), str(folder / "ga.pt")
    )
    with seeded(1):
        adapted = graft.get_peft_model(model, config)
    # signs and order of singular vectors are LAPACK's; their products are not
    layers = [m for m in adapted.modules() if isinstance(m, graft.AdapterLayer)]
    return torch.cat([sampled(layer.lora_B["default"].weight @ layer.lora_A["default"].weight) for layer in layers])


def cache(start: Callable[..., Tensor]) -> Continued:
    def begin(folder: Path, bases: Path) -> None:
        start(folder, bases, lambda model: model(**inputs_at(bases / "mlp")))

    return Continued(begin, lambda folder, bases: start(folder, bases, None))


CONTINUED: dict[str, Continued] = {
    **{f"training-{name}": training(optimizer=name) for name in OPTIMIZERS},
    "training-dora": training(config=graft.LoraConfig(r=2, target_modules=["fc1", "fc2"], use_dora=True)),
    "training-prompt": training(
        base="llama",
        config=graft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=6, task_type="CAUSAL_LM"),
    ),
    "training-loha": training(config=graft.LoHaConfig(r=2, target_modules=["fc1"])),
    "runs": Continued(begin_runs, finish_runs),
    "sweep-begun": Continued(partial(begin_sweep, 3), partial(finish_sweep, 3)),
    "sweep-ended": Continued(partial(begin_sweep, 1000), partial(finish_sweep, 1000)),
    "merge": Continued(begin_merge, finish_merge),
    "cache-corda": cache(with_corda),
    "cache-loraga": cache(with_loraga),
}
