# SPDX-License-Identifier: Apache-2.0
"""What has to hold in a layout, method by method. Each check runs on all processes at once."""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import graft
from graft.core.errors import CheckpointError, ConfigError, DistributedError
from graft.train import resuming
from graft.train.state_file import write_state_file
from tests.distributed import recipes
from tests.distributed.layouts import LAYOUTS, Wrapped, mean
from tests.distributed.methods import CONFIGS, STEPS, base, batch, with_method

FILE = "adapter_model.safetensors"
Check = Callable[[str], None]


def bytes_in(folder: str) -> bytes:
    return Path(folder, FILE).read_bytes()


@cache
def alone(method: str, folder: str) -> tuple[list[float], str, str]:
    """Losses of one process with the whole batch, and its files before and after training. Each process has its own."""
    place = os.path.join(folder, "alone", str(dist.get_rank()), method)
    peft = with_method(method)
    peft.train()
    peft.save_pretrained(f"{place}/start")
    wrapped = Wrapped(peft, peft)
    losses = [wrapped.step(batch()) for _ in range(STEPS)]
    peft.save_pretrained(f"{place}/end")
    return losses, f"{place}/start", f"{place}/end"


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert a.shape == b.shape
    if b.numel():  # AdaLoRA may keep nothing of a layer
        scale = max(float(b.abs().max()), 1e-3)
        assert float((a - b).abs().max()) <= tolerance * scale, (a - b).abs().max()


def same_file(a: str, b: str) -> None:
    one, other = load_file(f"{a}/{FILE}"), load_file(f"{b}/{FILE}")
    assert {k: (t.shape, t.dtype) for k, t in one.items()} == {k: (t.shape, t.dtype) for k, t in other.items()}
    for key in other:
        try:
            close(one[key], other[key])
        except AssertionError as e:
            raise AssertionError(f"{key}: {e}") from e


def fresh(folder: str, name: str) -> str:
    """An empty folder that all processes share."""
    path = os.path.join(folder, "saved", name)
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
    dist.barrier()
    return path


@pytest.mark.differs("DoRA under FSDP2")
@pytest.mark.differs("saving under FSDP1, FSDP2 or ZeRO-3 without `state_dict`")
def trains(layout: str, method: str, folder: str) -> None:
    """Before training, the file of one process, byte for byte; losses and the file afterwards as those of one."""
    losses, start, end = alone(method, folder)
    rank, world = dist.get_rank(), dist.get_world_size()
    peft = with_method(method)
    peft.train()
    wrapped = LAYOUTS[layout](peft)
    path = fresh(folder, f"{layout}-{method}")
    wrapped.peft.save_pretrained(f"{path}/start")
    dist.barrier()
    assert bytes_in(f"{path}/start") == bytes_in(start), "the file before training"
    mine = [mean(wrapped.step(batch(rank, world))) for _ in range(STEPS)]
    for a, b in zip(mine, losses):
        assert abs(a - b) <= 1e-6 * abs(b), f"losses {mine}, of one process {losses}"
    wrapped.peft.save_pretrained(f"{path}/end")
    wrapped.peft.save_pretrained(f"{path}/again")
    dist.barrier()
    same_file(f"{path}/end", end)
    assert bytes_in(f"{path}/end") == bytes_in(f"{path}/again"), "two saves of the same values"


def refused(error: Any, words: str, act: Callable[[], Any]) -> None:
    """A call raises, with these words."""
    try:
        act()
    except error as e:
        assert words in str(e), f"{words!r} is not in {e}"
    else:
        raise AssertionError(f"no {error.__name__}: {words}")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch()).logits.clone()


def trained(method: str, folder: str) -> Any:
    """A model of one process with the adapter that `alone` has trained."""
    peft = with_method(method, seed=3)
    peft.load_adapter(alone(method, folder)[2], "default", is_trainable=True)
    return peft


def loads(layout: str, method: str, folder: str) -> None:
    """A file of one process loads into the layout, before and after wrapping; the base stays the reference."""
    end, rank, world = alone(method, folder)[2], dist.get_rank(), dist.get_world_size()
    one = trained(method, folder).eval()
    expected, reference = logits(one), logits(base().eval())
    wrapped = LAYOUTS[layout](with_method(method, seed=5))
    wrapped.step(batch(rank, world))
    wrapped.peft.load_adapter(end, "default", is_trainable=True)
    wrapped.outer.eval()
    close(logits(wrapped.outer), expected, 1e-5)
    with wrapped.peft.disable_adapter():
        close(logits(wrapped.outer), reference, 1e-5)
    close(logits(wrapped.outer), expected, 1e-5)
    path = fresh(folder, f"{layout}-{method}-loaded")
    wrapped.peft.save_pretrained(path)
    dist.barrier()
    same_file(path, end)
    wrapped.outer.train()
    single = Wrapped(one.train(), one)
    for _ in range(2):  # the second after an optimizer's step, which may have values of its own
        loss = single.step(batch())
        assert abs(mean(wrapped.step(batch(rank, world))) - loss) <= 1e-6 * abs(loss)


def allocates(layout: str, folder: str) -> None:
    """AdaLoRA's allocator keeps the same singular values as on one process, or says why it cannot."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def make() -> Any:
        model = base()
        torch.manual_seed(1)
        config = dict(init_r=4, target_r=2, total_step=6, tinit=1, tfinal=1, deltaT=1)
        return graft.get_peft_model(
            model, graft.AdaLoraConfig(target_modules=["q_proj", "down_proj"], **config)
        ).train()

    def train(w: Wrapped, rows: dict) -> None:
        for step in range(6):
            w.outer(**rows).loss.backward()
            w.optimizer.step()
            w.peft.base_model.update_and_allocate(step)
            w.optimizer.zero_grad()

    one = LAYOUTS["single"](make())
    train(one, batch())
    wrapped = LAYOUTS[layout](make())
    if layout.startswith("fsdp1"):
        refused(NotImplementedError, "fully_shard", lambda: train(wrapped, batch(rank, world)))
        return
    train(wrapped, batch(rank, world))
    pattern = wrapped.peft.peft_config["default"].rank_pattern
    assert pattern == one.peft.peft_config["default"].rank_pattern
    assert 0 < sum(map(sum, pattern.values())) < 4 * len(pattern)
    path, expected = fresh(folder, f"{layout}-allocated"), os.path.join(folder, "alone", str(rank), "allocated")
    wrapped.peft.save_pretrained(path)
    one.peft.save_pretrained(expected)
    dist.barrier()
    same_file(path, expected)
    wrapped.peft.load_adapter(path, "default", is_trainable=True)  # fewer singular values than there is room for
    close(logits(wrapped.outer.eval()), logits(one.outer.eval()), 1e-5)


@pytest.mark.differs("a save of spread tensors that one process calls")
def stays_alone(layout: str, folder: str) -> None:
    """A save that one process calls ends with an error, and the next one of all processes is right."""
    wrapped = LAYOUTS[layout](with_method("LORA"))
    path = fresh(folder, f"{layout}-alone")
    if dist.get_rank() == 0:
        refused(graft.CheckpointError, "this one is alone", lambda: wrapped.peft.save_pretrained(path))
        assert not os.path.exists(f"{path}/{FILE}")
    dist.barrier()
    wrapped.peft.save_pretrained(path)
    dist.barrier()
    same_file(path, alone("LORA", folder)[1])


def fails_alike(layout: str, folder: str) -> None:
    """What the first process cannot write is an error on all, and old files stay."""
    wrapped = LAYOUTS[layout](with_method("LORA"))
    path = fresh(folder, f"{layout}-fails")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        Path(path).write_text("no folder")
    dist.barrier()
    refused((ValueError, OSError), "", lambda: wrapped.peft.save_pretrained(f"{path}/inner"))
    assert Path(path).read_text() == "no folder"


@pytest.mark.differs("processes that drew different initial values, under FSDP")
def differs(layout: str, folder: str) -> None:
    """Processes with different adapters do not save."""
    wrapped = LAYOUTS[layout](with_method("LORA"))
    path = fresh(folder, f"{layout}-differs")
    wrapped.peft.add_adapter("b", graft.LoraConfig(target_modules=["o_proj"], inference_mode=True))
    names = ["default"] if dist.get_rank() else ["default", "b"]
    refused(graft.CheckpointError, "not the same", lambda: wrapped.peft.save_pretrained(path, selected_adapters=names))
    assert not os.path.exists(path)
    dist.barrier()


def two(seed: int = 1) -> Any:
    peft = with_method("LORA", seed)
    peft.add_adapter("b", CONFIGS["LORA"]())
    return peft.train()


@pytest.mark.differs("a step in which parameters train that DDP or DeepSpeed did not see at wrapping")
def switches(layout: str, folder: str) -> None:
    """A second adapter that is activated after wrapping trains as on one process, or is refused with the remedy."""
    rank, world = dist.get_rank(), dist.get_world_size()
    wrapped = LAYOUTS[layout](two())
    wrapped.step(batch(rank, world))
    if layout in ("ddp", "zero2", "zero3", "fsdp1-flat"):
        remedy = "deepspeed.initialize" if layout.startswith("zero") else "wrap the model again"

        def train() -> None:
            wrapped.peft.set_adapter("b")
            wrapped.step(batch(rank, world))

        refused(graft.DistributedError, remedy, train)
        return
    one = two()
    single = Wrapped(one, one)
    single.step(batch())
    for w in (wrapped, single):
        w.peft.set_adapter("b")
        w.optimizer = w._optimizer()
    for _ in range(2):
        loss = single.step(batch())
        assert abs(mean(wrapped.step(batch(rank, world))) - loss) <= 1e-6 * abs(loss)
    path, expected = fresh(folder, f"{layout}-two"), os.path.join(folder, "alone", str(rank), "two")
    wrapped.peft.save_pretrained(path)
    one.save_pretrained(expected)
    dist.barrier()
    for name in ("", "/b"):
        same_file(f"{path}{name}", f"{expected}{name}")


def trains_two(layout: str, folder: str) -> None:
    """Adapters that were all trainable at wrapping can be switched."""
    rank, world = dist.get_rank(), dist.get_world_size()
    models = []
    for make in (LAYOUTS["single"], partial(LAYOUTS[layout], find_unused_parameters=True)):
        peft = two()
        peft.set_requires_grad(["default", "b"])
        models.append(make(peft))
    one, wrapped = models
    for name in ("default", "b"):
        for w in models:
            w.peft.set_adapter(name)
            w.peft.set_requires_grad(["default", "b"])
        loss = one.step(batch())
        assert abs(mean(wrapped.step(batch(rank, world))) - loss) <= 1e-6 * abs(loss)
    for a, b in zip(wrapped.peft.parameters(), one.peft.parameters()):
        close(a, b)


def merges(layout: str, folder: str) -> None:
    """Merging gives the same outputs, and unmerging the weights; or it is refused with a remedy."""
    wrapped = LAYOUTS[layout](trained("LORA", folder))
    wrapped.step(batch(dist.get_rank(), dist.get_world_size()))
    wrapped.outer.eval()
    if layout.startswith(("fsdp1", "zero3")):
        refused(NotImplementedError, "of one process to merge it", wrapped.peft.merge_adapter)
        return
    before = logits(wrapped.outer)
    wrapped.peft.merge_adapter()
    close(logits(wrapped.outer), before, 1e-5)
    wrapped.peft.unmerge_adapter()
    close(logits(wrapped.outer), before, 1e-5)


@pytest.mark.differs("an adapter that is to train, injected after FSDP has wrapped the model")
def comes_late(layout: str, folder: str) -> None:
    """An adapter that comes after wrapping acts; it trains as on one process under FSDP2, and elsewhere not at all."""
    wrapped = LAYOUTS[layout](with_method("LORA"))
    if layout.startswith("fsdp1"):
        text = "before FullyShardedDataParallel"
        refused(graft.DistributedError, text, lambda: wrapped.peft.add_adapter("b", CONFIGS["LORA"]()))
        assert list(wrapped.peft.peft_config) == ["default"]
    wrapped.peft.load_adapter(alone("LORA", folder)[2], "b")
    wrapped.peft.set_adapter("b")
    wrapped.outer.eval()
    close(logits(wrapped.outer), logits(trained("LORA", folder).eval()), 1e-5)
    wrapped.outer.train()
    if layout.startswith("fsdp2"):
        one = LAYOUTS["single"](trained("LORA", folder))
        wrapped.optimizer = wrapped._optimizer()
        for _ in range(2):
            loss = one.step(batch())
            assert abs(mean(wrapped.step(batch(dist.get_rank(), dist.get_world_size()))) - loss) <= 1e-6 * abs(loss)
        for (_, a), (_, b) in zip(one.peft.adapter_parameters("default"), wrapped.peft.adapter_parameters("b")):
            close(a, b, 1e-5)
        return
    refused(graft.DistributedError, "did not see", lambda: wrapped.step(batch(dist.get_rank(), dist.get_world_size())))


def swaps(layout: str, folder: str) -> None:
    """Hot-swapping puts a file's values into the parts; a combination of adapters is made of whole ones."""
    end = alone("LORA", folder)[2]
    wrapped = LAYOUTS[layout](with_method("LORA", seed=5))
    graft.hotswap_adapter(wrapped.peft, end, "default")
    path = fresh(folder, f"{layout}-swapped")
    wrapped.peft.save_pretrained(path)
    dist.barrier()
    same_file(path, end)
    wrapped.peft.add_weighted_adapter(["default"], [2.0], "twice", combination_type="linear")
    one = trained("LORA", folder)
    one.add_weighted_adapter(["default"], [2.0], "twice", combination_type="linear")
    expected = graft.get_peft_model_state_dict(one, adapter_name="twice")
    for key, value in graft.get_peft_model_state_dict(wrapped.peft, adapter_name="twice").items():
        close(value, expected[key])


def draws(layout: str, folder: str) -> None:
    """Processes that drew other initial values hear of it where the layout would mix them."""
    peft = copy.deepcopy(with_method("LORA", seed=dist.get_rank())).train()
    wrapped = LAYOUTS[layout](peft)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        wrapped.step(batch(dist.get_rank(), dist.get_world_size()))
    said = any("began with other values" in str(w.message) for w in seen)
    assert said == (layout not in ("ddp", "zero2")), [str(w.message) for w in seen]


def writes_once(layout: str, folder: str) -> None:
    """One process writes for all of them; and what it cannot write is an error on all."""
    from graft.io import files

    wrapped = LAYOUTS[layout](with_method("LORA"))
    wrapped.step(batch(dist.get_rank(), dist.get_world_size()))
    path, original, written = fresh(folder, f"{layout}-once"), files.save_adapter, []

    def save_adapter(*args: Any) -> None:
        written.append(args[0])
        if "full" in args[0]:
            raise OSError("no space left")
        original(*args)

    files.save_adapter = save_adapter
    try:
        wrapped.peft.save_pretrained(path)
        refused(OSError, "no space left", lambda: wrapped.peft.save_pretrained(f"{path}-full"))
    finally:
        files.save_adapter = original
    assert len(written) == (0 if dist.get_rank() else 2)
    assert os.path.exists(f"{path}/{FILE}")
    for _ in range(2):  # there is room again: the others wait anew, whatever became of the same values before
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(f"{path}-full", ignore_errors=True)
        dist.barrier()
        time.sleep(0.0 if dist.get_rank() else 0.5)
        wrapped.peft.save_pretrained(f"{path}-full")
        assert os.path.exists(f"{path}-full/{FILE}")


def is_apart(layout: str, folder: str) -> None:
    """Processes that share no tensor save without each other."""
    from torch.distributed.device_mesh import init_device_mesh

    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("apart", "together"))["together"]
    wrapped = LAYOUTS[layout](with_method("LORA"), mesh=mesh)
    path = os.path.join(folder, "alone", str(rank), "apart")
    if rank == 0:
        wrapped.peft.save_pretrained(path)
        same_file(path, alone("LORA", folder)[1])


def gathers(layout: str, folder: str) -> None:
    """A state dict that torch has gathered can be passed, whatever wrappers have put into its names."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    for method in ("LORA", "PROMPT_TUNING"):
        wrapped = LAYOUTS[layout](with_method(method))
        options = StateDictOptions(full_state_dict=True)  # cpu_offload=True on CPUs kills the process in FSDP1
        whole = get_model_state_dict(wrapped.outer, options=options)
        path = fresh(folder, f"{layout}-{method}-given")
        if dist.get_rank() == 0:
            wrapped.peft.save_pretrained(path, state_dict=whole)
        dist.barrier()
        same_file(path, alone(method, folder)[1])


def recipe(name: str, layout: str, folder: str) -> None:
    recipes.follow(name, layout, fresh(folder, f"{layout}-recipe-{name}"))


SHARDED = ("fsdp1", "fsdp1-flat", "fsdp2", "zero3")
REFUSED = {("fsdp1-flat", method) for method in ("DORA", "IA3", "ADALORA", "OFT", "VERA", "LOHA")}


@pytest.mark.differs("`fsdp_auto_wrap_policy` for methods whose tensors are read past modules")
def is_refused(layout: str, method: str, folder: str) -> None:
    """The policy says what FSDP needs for methods that read tensors themselves."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        refused(ValueError, "requires_grad", lambda: LAYOUTS[layout](with_method(method)))
    assert any("use_orig_params=True" in str(w.message) for w in seen)


def values_of(peft: Any) -> dict[str, torch.Tensor]:
    return {key: t.clone() for key, t in graft.get_peft_model_state_dict(peft).items()}


def goes_on(layout: str, folder: str) -> None:
    """A training that was interrupted has the bits of one that was not; in another layout it has its values."""
    place, adamw = f"{folder}/{layout}/training", partial(torch.optim.AdamW, lr=0.01)

    def begun(seed: int, layout: str = layout) -> tuple[Any, Wrapped, Any]:
        torch.manual_seed(seed)
        peft = graft.get_peft_model(
            base(), graft.LoraConfig(r=3, lora_dropout=0.3, target_modules=["q_proj", "up_proj"])
        )
        zero = layout.startswith("zero")
        wrapped = LAYOUTS[layout](peft.train(), **dict(make=adamw) if zero else {})
        if not zero:
            wrapped.optimizer = adamw([p for p in wrapped.outer.parameters() if p.requires_grad])
        optimizer = wrapped.outer.optimizer if zero else wrapped.optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(getattr(optimizer, "optimizer", optimizer), 0.8)
        torch.manual_seed(100 * seed + dist.get_rank())  # each draws its own dropout
        return peft, wrapped, (optimizer, scheduler)

    def run(wrapped: Wrapped, scheduler: Any, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(wrapped.step(batch(dist.get_rank(), dist.get_world_size())))
            scheduler.step()
        return losses

    peft, wrapped, parts = begun(1)
    first = run(wrapped, parts[1], 3)
    graft.save_training(place, peft, *parts, step=3, extra={"seen": 12})
    at_saving = values_of(peft)
    rest = run(wrapped, parts[1], 3)
    whole = values_of(peft)
    assert len({*first, *rest}) == 6, "each step changes something"

    peft, wrapped, parts = begun(2)
    done = graft.resume(place, peft, *parts)
    assert (done.step, done.extra, done.fresh, done.missing) == (3, {"seen": 12}, [], [])
    assert run(wrapped, parts[1], 3) == rest
    for key, t in graft.get_peft_model_state_dict(peft).items():
        assert torch.equal(t, whole[key]), key

    other = "ddp" if layout == "fsdp2" else "fsdp2"
    if layout in ("ddp", "fsdp2"):
        peft, wrapped, parts = begun(3, other)
        graft.resume(place, peft, *parts)
        for key, t in graft.get_peft_model_state_dict(peft).items():
            assert torch.equal(t, at_saving[key]), key
        for a, b in zip(run(wrapped, parts[1], 3), rest):
            assert abs(a - b) < 1e-5

    peft, wrapped, parts = begun(4)
    before = values_of(peft)
    more, none = f"{folder}/{layout}/more", f"{folder}/{layout}/none"
    if dist.get_rank() == 0:
        os.makedirs(more)
        tensors = load_file(f"{place}/{resuming.FILE}")
        note = json.loads(tensors.pop(resuming.NOTE).numpy().tobytes())
        note |= {"processes": 3, "of_ranks": note["of_ranks"] * 2}
        write_state_file(f"{more}/{resuming.FILE}", resuming.NOTE, note, tensors)
    dist.barrier()
    with pytest.raises(ConfigError, match="3 processes trained it, and here are 2"):
        graft.resume(more, peft, *parts)
    with pytest.raises(CheckpointError, match="no whole state"):
        graft.resume(none, peft, *parts)
    for key, t in graft.get_peft_model_state_dict(peft).items():
        assert torch.equal(t, before[key]), key
    assert graft.resume(more, peft, *parts, strict=False).fresh == ["generators"]


def cannot_go_on(layout: str, folder: str) -> None:
    """What cannot be put together by name is told, and nothing is written."""
    peft = with_method("LORA")
    wrapped = LAYOUTS[layout](peft)
    optimizer = wrapped.outer.optimizer if layout.startswith("zero") else wrapped.optimizer
    with pytest.raises(DistributedError, match=r"FSDP2|ZeRO-3's"):
        graft.save_training(f"{folder}/{layout}/refused", peft, optimizer, step=1)
    assert not os.path.exists(f"{folder}/{layout}/refused")


def checks_of(layout: str) -> Iterator[tuple[str, Check]]:
    for method in CONFIGS:
        if (layout, method) in REFUSED:
            yield f"{layout} is_refused {method}", partial(is_refused, layout, method)
        else:
            yield f"{layout} trains {method}", partial(trains, layout, method)
            if layout in (*SHARDED, "ddp", "zero2"):
                yield f"{layout} loads {method}", partial(loads, layout, method)
    if layout not in (*SHARDED, "ddp", "zero2"):
        return
    checks: list[Any] = [writes_once, switches, merges, comes_late, swaps, draws]
    checks += [stays_alone, fails_alike, differs] if layout in SHARDED else []
    checks += [] if layout.startswith("zero") or layout == "fsdp1-flat" else [allocates]
    checks += [is_apart] if layout == "fsdp2" else []
    checks += [trains_two] if layout == "ddp" else []
    checks += [goes_on] if layout in ("ddp", "fsdp2", "zero3") else [cannot_go_on]
    checks += [] if layout.startswith("zero") else [gathers]
    for check in checks:
        yield f"{layout} {check.__name__}", partial(check, layout)
    for name in recipes.OF.get(layout, ()):
        yield f"{layout} recipe {name}", partial(recipe, name, layout)


def checks(folder: Path, *layouts: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for layout in layouts:
        for name, check in checks_of(layout):
            yield name, partial(check, str(folder))
