# SPDX-License-Identifier: Apache-2.0
"""What has to hold of adapters on a base that was sharded before they came, each check against one process.

The reference trains in each process, with the seed of rank 0 and the whole batch. In the layout each process has a seed
and rows of its own.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import graft
from graft.storage.parallel import is_sharded
from tests.distributed.layouts import in_units, mean
from tests.distributed.tensor_parallel import ALL_LAWS, Net, close, held, same_on_all
from tests.models import seeded

FILE = "adapter_model.safetensors"
SEED, STEPS, RATE, CLIP = 3, 3, 0.3, 0.2
ROWS = 4
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=40)
BASES = {
    "llama": LlamaConfig(**SIZES, intermediate_size=48),
    "moe": MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2),
}


@dataclass(frozen=True)
class Way:
    """A way to shard a base before adapters come."""

    base: str
    world: int  # processes
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # of a DistributedConfig; none: by hand

    @property
    def parts(self) -> int:
        """The number of parts of a batch: processes of one tensor parallel group share one."""
        return self.world // self.options.get("tp_size", 1)


WAYS = {
    "fsdp": Way("llama", 2, dict(fsdp_size=2)),
    "hand": Way("llama", 2),
    "experts": Way("moe", 2, dict(fsdp_size=2)),
    "ep": Way("moe", 2, dict(fsdp_size=2, ep_size=2)),
    "hsdp": Way("llama", 4, dict(fsdp_size=2, dp_replicate_size=2)),
    "fsdp-tp": Way("llama", 4, dict(fsdp_size=2, tp_size=2)),
    "ep-fsdp": Way("moe", 4, dict(fsdp_size=4, ep_size=2)),
    "ep-tp": Way("moe", 4, dict(fsdp_size=2, tp_size=2, ep_size=2)),
}
ATTENTION = ["q_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "down_proj"]
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
PROMPT = dict(task_type="CAUSAL_LM", num_virtual_tokens=3)
METHODS: dict[str, Callable[[], Any]] = {
    "LORA": lambda: graft.LoraConfig(r=4, target_modules=[*LINEAR, "embed_tokens", "lm_head"]),
    "DORA": lambda: graft.LoraConfig(r=4, use_dora=True, target_modules=[*LINEAR, "embed_tokens", "lm_head"]),
    "PISSA": lambda: graft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=ATTENTION),
    "LOHA": lambda: graft.LoHaConfig(r=4, target_modules=LINEAR),
    "OFT": lambda: graft.OFTConfig(r=0, oft_block_size=8, target_modules=ATTENTION),
    "VERA": lambda: graft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "IA3": lambda: graft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "HRA": lambda: graft.HRAConfig(r=4, target_modules=ATTENTION),
    "LN_TUNING": lambda: graft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "GLORA": lambda: graft.GloraConfig(r=4, target_modules=ATTENTION),
    "MISS": lambda: graft.MissConfig(r=4, target_modules=ATTENTION),
    "SAVED": lambda: graft.LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["lm_head", "norm"]),
    "TOKENS": lambda: graft.LoraConfig(r=4, target_modules=["o_proj"], trainable_token_indices=[3, 5, 30]),
    "PROMPT_TUNING": lambda: graft.PromptTuningConfig(**PROMPT),
    "PREFIX_TUNING": lambda: graft.PrefixTuningConfig(**PROMPT),
    "ATTENTION": lambda: graft.LoraConfig(r=4, use_dora=True, target_modules=ATTENTION),
    "EXPERTS": lambda: graft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=STACKS),
    "EXPERTS-LOHA": lambda: graft.LoHaConfig(r=2, target_modules=[], target_parameters=STACKS),
}
OF_LLAMAS = tuple(name for name in METHODS if name not in ("ATTENTION", "EXPERTS", "EXPERTS-LOHA"))
OF_DOWN = ("LORA", "DORA", "LOHA", "IA3")  # on layers that a block of experts has as stacks
TRIED = {
    "fsdp": OF_LLAMAS,
    "hand": OF_LLAMAS,
    "hsdp": OF_LLAMAS,
    "fsdp-tp": OF_LLAMAS,
    "experts": ("ATTENTION", "EXPERTS", "SAVED", "PROMPT_TUNING"),
    "ep": ("ATTENTION", "EXPERTS", "EXPERTS-LOHA", *(name for name in OF_LLAMAS if name not in OF_DOWN)),
    "ep-fsdp": ("ATTENTION", "EXPERTS", "EXPERTS-LOHA", "SAVED"),
    "ep-tp": ("ATTENTION", "EXPERTS", "EXPERTS-LOHA", "SAVED"),
}


def write_bases(folder: Path) -> None:
    """Rank 0 writes the base models; the others wait for it."""
    if dist.get_rank() == 0:
        for name, config in BASES.items():
            with seeded(0):
                AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    dist.barrier()


def load(folder: Path, way: Way | None, name: str = "", **options: Any) -> Any:
    """Return a base in a layout, or, without one, the base `name` on one process. options: of a DistributedConfig."""
    if way is None or not way.options:
        model = AutoModelForCausalLM.from_pretrained(folder / (name if way is None else way.base))
        if way is not None:
            in_units(model)
    else:
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(**way.options, **options)
        model = AutoModelForCausalLM.from_pretrained(folder / way.base, distributed_config=config)
    return model.train()


def whole_batch() -> dict[str, Tensor]:
    with seeded(8):
        ids = torch.randint(1, 40, (ROWS, 9))
    return dict(input_ids=ids, labels=ids)


def rows(way: Way | None) -> dict[str, Any]:
    """Return the rows of this process."""
    whole = whole_batch()
    if way is None:
        return whole
    part = dist.get_rank() * way.parts // way.world
    n = ROWS // way.parts
    return {name: t[part * n : (part + 1) * n] for name, t in whole.items()}


def own_seed() -> int:
    return SEED + 10 * dist.get_rank()


def adapted(folder: Path, way: Way | None, config: Any, name: str = "", **options: Any) -> Any:
    """Return a base with an adapter, made with the seed of this process, or of rank 0 on one process."""
    base = load(folder, way, name, **options)
    torch.manual_seed(SEED if way is None else own_seed())
    return graft.get_peft_model(base, config).train()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def step(model: Any, batch: dict[str, Any], call: Any = None) -> tuple[float, float]:
    """Take a clipped step; return loss and norm. call: what is called instead of the model."""
    loss = (model if call is None else call)(**batch).loss
    loss.backward()
    norm = nn.utils.clip_grad_norm_(trainable(model), CLIP)
    with torch.no_grad():
        for p in trainable(model):
            if p.grad is not None:
                p -= RATE * p.grad
                p.grad = None
    return float(loss.detach()), float(norm)


def logits(model: Any, batch: dict[str, Any] | None = None) -> Tensor:
    training = model.training
    model.eval()
    with torch.no_grad():
        y: Tensor = model(input_ids=whole_batch()["input_ids"], **(batch or {})).logits.clone()
    model.train(training)
    return y


def place(folder: Path, way: Way | None, name: str) -> Path:
    """Return an empty folder: of this process for a reference, else of all of them."""
    path = folder / (f"rank{dist.get_rank()}" if way is None else "all") / name
    if way is None or dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
    if way is not None:
        dist.barrier()
    return path


def save(model: Any, way: Way | None, path: Path) -> dict[str, Tensor]:
    """Save on all processes, and return the file's tensors."""
    model.save_pretrained(path)
    if way is not None:
        dist.barrier()
    return load_file(path / FILE)


def pieces(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the frozen tensors as this process has them."""
    with torch.no_grad():
        return {
            name: (p.to_local() if hasattr(p, "to_local") else p).clone()
            for name, p in model.named_parameters()
            if not p.requires_grad
        }


def history(folder: Path, way: Way | None, method: str, base: str) -> dict[str, Any]:
    """Run an adapter through its life."""
    model = adapted(folder, way, METHODS[method](), base)
    path = place(folder, way, f"{base} {method}")
    found: dict[str, Any] = {"path": path, "start": save(model, way, path / "start")}
    average = (lambda value: value) if way is None else mean
    taken = [step(model, rows(way)) for _ in range(STEPS)]
    found |= {"losses": [average(loss) for loss, _ in taken], "norms": [norm for _, norm in taken]}
    found["end"] = save(model, way, path / "end")
    found |= {"y": logits(model), "held": held(model)}
    with model.disable_adapter():
        found["disabled"] = logits(model)
    model.eval()
    ids = whole_batch()["input_ids"][:2, :4]
    found["tokens"] = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    before = pieces(model)
    try:
        model.merge_adapter()
    except (NotImplementedError, AttributeError) as e:
        found["merged"] = str(e)
    else:
        found["merged"] = logits(model)
        model.unmerge_adapter()
        found["unmerged"] = logits(model)
        after = pieces(model)
        found["same bits"] = [name for name, t in before.items() if not torch.equal(t, after[name])]
    found["model"] = model
    return found


@cache
def alone(folder: Path, base: str, method: str) -> dict[str, Any]:
    found = history(folder, None, method, base)
    del found["model"]
    return found


def near(a: float, b: float, tolerance: float = 1e-6) -> bool:
    return abs(a - b) <= tolerance * max(abs(b), 1e-3)


def same_file(here: dict[str, Tensor], one: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    assert {key: (t.shape, t.dtype) for key, t in here.items()} == {key: (t.shape, t.dtype) for key, t in one.items()}
    for key, t in one.items():
        try:
            close(here[key], t, tolerance)
        except AssertionError as e:
            raise AssertionError(f"{key}: {float((here[key] - t).abs().max())} of {float(t.abs().max())}") from e


def begins_alike(here: dict[str, Any], one: dict[str, Any]) -> None:
    """The file before training has the bytes of one process's; DoRA's magnitudes may differ by an ulp."""
    magnitudes = [key for key in one["start"] if "magnitude" in key]
    if not magnitudes:
        assert (here["path"] / "start" / FILE).read_bytes() == (one["path"] / "start" / FILE).read_bytes()
    assert here["start"].keys() == one["start"].keys()
    for key, t in one["start"].items():
        if key in magnitudes:
            close(here["start"][key], t, 2e-7)
        else:
            assert torch.equal(here["start"][key], t), key


@pytest.mark.differs(
    "an adapter on a base that `fsdp_size`, HSDP, FSDP2 with tensor parallelism or `ep_size` has sharded"
)
def life(folder: Path, name: str, method: str) -> None:
    """An adapter's life has the numbers of one process."""
    way = WAYS[name]
    one, here = alone(folder, way.base, method), history(folder, way, method, way.base)
    begins_alike(here, one)
    for what in ("losses", "norms"):
        assert all(map(near, here[what], one[what])), f"{what} {here[what]}, of one process {one[what]}"
    same_on_all(here["held"])
    same_file(here["end"], one["end"])
    close(here["y"], one["y"], 1e-5)
    close(here["disabled"], one["disabled"], 1e-6)
    assert torch.equal(here["tokens"], one["tokens"])
    if isinstance(one["merged"], str):
        assert isinstance(here["merged"], str), "merged, which one process does not"
    else:
        close(here["merged"], one["merged"], 1e-5)
        assert torch.equal(here["unmerged"], here["y"]) and here["same bits"] == []
    model = here["model"]
    model.load_adapter(one["path"] / "end", "again")
    model.set_adapter("again")
    close(logits(model), one["y"], 1e-5)
    model.delete_adapter("again")


def drift(folder: Path, name: str) -> None:
    """With dropout, processes draw other numbers; after three steps with momentum they have one adapter."""
    way = WAYS[name]
    config = graft.LoraConfig(
        r=4, lora_dropout=0.3, target_modules=ATTENTION, modules_to_save=["lm_head"], trainable_token_indices=[3, 5]
    )
    model = adapted(folder, way, config)
    draws = [torch.empty(3) for _ in range(way.world)]
    dist.all_gather(draws, torch.rand(3))
    share = way.world // way.parts  # processes of one batch draw alike, for dropout; others on their own
    for rank, draw in enumerate(draws):
        alike = [other for other, of_other in enumerate(draws) if torch.equal(draw, of_other)]
        assert alike == [other for other in range(way.world) if other // share == rank // share], (rank, alike)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    start = held(model)
    for _ in range(3):
        model(**rows(way)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    end = held(model)
    same_on_all(end)
    assert all(not torch.equal(t, end[key]) for key, t in start.items() if "lora_B" in key)


def compare_steps(
    folder: Path,
    name: str,
    make: Callable[[Any], Any],
    train: Callable[[Any, Way | None], list[tuple[float, float]]],
    adapters: tuple[str, ...] = ("default",),
    config: Callable[[], Any] = METHODS["LORA"],
    **options: Any,
) -> Any:
    """Train on one process and in a layout; compare losses, norms and adapters. Return the model of the layout.

    make: prepares a model with an adapter of `config`. train: returns losses and norms; None for one process.
    """
    way = WAYS[name]
    models, taken = [], []
    for where in (None, way):
        model = make(adapted(folder, where, config(), way.base, **(options if where else {})))
        taken.append(train(model, where))
        models.append(model)
    for (loss, norm), (expected, expected_norm) in zip(taken[1], taken[0], strict=True):
        assert near(mean(loss), expected), f"losses {taken[1]}, of one process {taken[0]}"
        assert near(norm, expected_norm), f"norms {taken[1]}, of one process {taken[0]}"
    for adapter in adapters:
        one, here = (graft.get_peft_model_state_dict(model, adapter_name=adapter) for model in models)
        same_file(here, one)
        same_on_all({key: t.clone() for key, t in here.items()})
    return models[1]


def lora(**options: Any) -> Any:
    return graft.LoraConfig(r=4, target_modules=ATTENTION, **options)


def mixed_rows(folder: Path, name: str) -> None:
    """Batches with rows of several adapters: each process has others, and not all use each adapter."""
    way = WAYS[name]
    parts = way.parts
    method = "ATTENTION" if way.base == "llama" else "EXPERTS"
    batches = [["a", "b", "b", "a"], ["a", "a", "b", "b"]]
    if parts < ROWS:
        batches.append(["a", "__base__", "__base__", "b"])

    def make(model: Any) -> Any:
        model.add_adapter("a", METHODS[method]())
        model.add_adapter("b", METHODS[method]())
        model.set_requires_grad(["a", "b"])
        return model

    def train(model: Any, way: Way | None) -> list[tuple[float, float]]:
        taken = []
        for names in batches:
            if way is not None:
                n, part = ROWS // way.parts, dist.get_rank() * way.parts // way.world
                names = names[part * n : (part + 1) * n]
            taken.append(step(model, rows(way) | {"adapter_names": names}))
        return taken

    compare_steps(folder, name, make, train, ("a", "b"), METHODS[method])


def accumulates(folder: Path, name: str) -> None:
    """Two passes before a step, the first without sending gradients: the step has the mean of both."""

    def train(model: Any, way: Way | None) -> list[tuple[float, float]]:
        unit = model.get_base_model()
        taken = []
        for _ in range(2):
            for last in (False, True):
                if way is not None and "dp_replicate_size" in way.options:  # as Trainer does
                    unit.set_requires_all_reduce(last)
                elif way is not None:
                    unit.set_requires_gradient_sync(last)
                batch = rows(way)
                if not last:
                    batch = {key: t.flip(1) for key, t in batch.items()}
                loss, norm = 0.0, 0.0
                if last:
                    loss, norm = step(model, batch)
                else:
                    model(**batch).loss.backward()
            taken.append((loss, norm))
        return taken

    compare_steps(folder, name, lambda model: model, train)


def switches(folder: Path, name: str) -> None:
    """`set_adapter` to a frozen adapter, and a trainable `load_adapter`, after training has begun."""
    way = WAYS[name]
    path = alone(folder, way.base, "ATTENTION")["path"] / "end"

    def train(model: Any, way: Way | None) -> list[tuple[float, float]]:
        taken = [step(model, rows(way))]
        model.set_adapter("b")
        taken += [step(model, rows(way)) for _ in range(2)]
        model.load_adapter(path, "c", is_trainable=True)
        model.set_adapter("c")
        taken += [step(model, rows(way)) for _ in range(2)]
        model.set_adapter("default")
        return [*taken, step(model, rows(way))]

    def make(model: Any) -> Any:
        model.add_adapter("b", graft.LoraConfig(r=2, target_modules=["k_proj", "o_proj"]))
        return model

    compare_steps(folder, name, make, train, ("default", "b", "c"))


def checkpoints(folder: Path, name: str, reentrant: bool) -> None:
    """Gradient checkpointing of either kind."""

    def make(model: Any) -> Any:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        return model

    def train(model: Any, way: Way | None) -> list[tuple[float, float]]:
        return [step(model, rows(way)) for _ in range(2)]

    compare_steps(folder, name, make, train, config=METHODS["LORA" if WAYS[name].base == "llama" else "EXPERTS"])


def calls_base(folder: Path, name: str) -> None:
    """A loop that calls the base inside the PeftModel."""

    def train(model: Any, way: Way | None) -> list[tuple[float, float]]:
        return [step(model, rows(way), model.get_base_model()) for _ in range(2)]

    compare_steps(folder, name, lambda model: model, train)


def goes_on(folder: Path, name: str) -> None:
    """A training saved after two steps and resumed ends with the bits of one that went on, with dropout."""
    way = WAYS[name]
    path = place(folder, way, f"{name} training")

    def make(seed: int) -> tuple[Any, Any]:
        model = adapted(folder, way, lora(lora_dropout=0.3))
        torch.manual_seed(seed + dist.get_rank() * way.parts // way.world)
        return model, torch.optim.AdamW(trainable(model), lr=1e-2)

    def train(model: Any, optimizer: Any) -> float:
        loss = model(**rows(way)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    model, optimizer = make(50)
    for _ in range(2):
        train(model, optimizer)
    graft.save_training(path, model, optimizer, step=2)
    dist.barrier()
    expected = [train(model, optimizer) for _ in range(2)]
    again, other = make(90)
    graft.resume(path, again, other)
    assert [train(again, other) for _ in range(2)] == expected
    end = held(again)
    assert all(torch.equal(t, end[key]) for key, t in held(model).items())
    same_on_all(end)


def unloads(folder: Path, name: str) -> None:
    """`merge_and_unload` gives the base with merged weights, still sharded."""
    way = WAYS[name]
    outputs = []
    for where in (None, way):
        model = adapted(folder, where, METHODS["LORA" if way.base == "llama" else "ATTENTION"](), way.base)
        step(model, rows(where))
        base = model.merge_and_unload()
        outputs.append(logits(base))
    close(outputs[1], outputs[0], 1e-5)
    fresh = load(folder, way)
    assert type(base) is type(fresh) and base.state_dict().keys() == fresh.state_dict().keys()
    assert all(is_sharded(p.data) for p in base.model.layers.parameters())


def narrow(folder: Path, name: str) -> None:
    """`fsdp_mixed_precision`: units compute in bfloat16, adapters stay float32 and do not drift."""
    way = WAYS[name]
    make = METHODS["EXPERTS" if way.base == "moe" else "ATTENTION"]
    one = adapted(folder, None, make(), way.base)
    expected = [step(one, rows(None)) for _ in range(STEPS)]
    model = adapted(folder, way, make(), fsdp_mixed_precision=True)
    assert {p.dtype for p in trainable(model)} == {torch.float32}
    taken = [step(model, rows(way)) for _ in range(STEPS)]
    for (loss, norm), (a, b) in zip(taken, expected):
        assert near(mean(loss), a, 1e-2) and near(norm, b, 5e-2), (taken, expected)
    same_on_all(held(model))


def saves_alone(folder: Path, name: str) -> None:
    """Rank 0 saves without the others, before a step and after one."""
    way = WAYS[name]
    path = place(folder, way, f"{name} alone")
    config = lora(modules_to_save=["lm_head"])
    model, one = adapted(folder, way, config), adapted(folder, None, copy.deepcopy(config), way.base)
    for when in ("start", "end"):
        if dist.get_rank() == 0:
            model.save_pretrained(path / when)
            one.save_pretrained(path / f"one {when}")
            same_file(load_file(path / when / FILE), load_file(path / f"one {when}" / FILE))
        dist.barrier()
        step(model, rows(way))
        step(one, rows(None))


def second_after(folder: Path, name: str) -> None:
    """A layer adapted before `fully_shard` takes a second adapter after it, and merges both."""
    way = WAYS[name]
    models = []
    for where in (None, way):
        base = load(folder, None, way.base)
        torch.manual_seed(SEED)
        model = graft.get_peft_model(base, lora())
        if where is not None:
            in_units(model)
        torch.manual_seed(SEED if where is None else own_seed())
        model.add_adapter("b", graft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        model.set_adapter("b")
        for _ in range(2):
            step(model, rows(where))
        models.append(model.eval())
    one, here = (graft.get_peft_model_state_dict(m, adapter_name="b") for m in models)
    same_file(here, one)
    before = [logits(m) for m in models]
    for m in models:
        m.merge_adapter(["b"])
    merged = [logits(m) for m in models]
    close(merged[1], merged[0], 1e-5)
    for m in models:
        m.unmerge_adapter()
    close(before[1], before[0], 1e-5)
    assert torch.equal(logits(models[1]), before[1])


# the covering array: every method on layers of a small net


def mesh(*shape: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    names = ("replicas", "shards") if len(shape) == 2 else None
    return init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names)


def shard_net(net: Any, unit: str) -> Any:
    options: dict[str, Any] = dict(reshard_after_forward=unit != "kept")
    if unit == "replicas":
        options["mesh"] = mesh(dist.get_world_size() // 2, 2)
    return in_units(net, () if unit == "whole" else net.children(), **options)


def net_history(net: Any, sample: Any, seed: int, part: slice) -> dict[str, Any]:
    """Run an adapter on the layer of a net through its life."""
    config = sample.make()
    with seeded(seed):
        model: Any = graft.get_peft_model(net, config)
    found: dict[str, Any] = {"start": held(model)}
    with seeded(5):
        x = torch.randn(ROWS, 4, 10)
    with torch.no_grad(), seeded(3):
        for p in trainable(model):
            p.add_(torch.randn(p.shape), alpha=0.1)
    losses = []
    for number in range(2):
        with seeded(number):
            loss = model(x[part]).square().mean()
        loss.backward()
        with torch.no_grad():
            for p in trainable(model):
                if p.grad is not None:
                    p -= 0.05 * p.grad
                    p.grad = None
        losses.append(float(loss.detach()))
    model.eval()
    with torch.no_grad():
        found |= {"losses": losses, "end": held(model), "y": model(x).clone()}
        try:
            model.merge_adapter()
        except NotImplementedError as e:
            found["merged"] = str(e)
        else:
            found["merged"] = model(x).clone()
            model.unmerge_adapter()
            found["unmerged"] = model(x).clone()
    return found


def law(sample: Any, unit: str) -> None:
    """A method on a sharded layer has the numbers of one process."""
    with seeded(0):
        nets = Net(), Net()
    nets[1].load_state_dict(nets[0].state_dict())
    rank, n = dist.get_rank(), ROWS // dist.get_world_size()
    one = net_history(nets[0], sample, SEED, slice(None))
    here = net_history(shard_net(nets[1], unit), sample, own_seed(), slice(rank * n, (rank + 1) * n))
    assert here["start"].keys() == one["start"].keys()
    for key, t in one["start"].items():
        close(here["start"][key], t, 2e-7)
    if not sample.draws and sample.by_row:
        assert all(near(mean(a), b) for a, b in zip(here["losses"], one["losses"])), (here["losses"], one["losses"])
        for key, t in one["end"].items():
            close(here["end"][key], t)
        close(here["y"], one["y"], 1e-5)
    same_on_all(here["end"])
    if isinstance(one["merged"], str):
        assert isinstance(here["merged"], str), "merged, which one process does not"
    else:
        close(here["merged"], here["y"] if sample.draws or not sample.by_row else one["merged"], 1e-5)
        close(here["unmerged"], here["y"], 1e-6 if sample.subtracts else 0)


UNITS = ("units", "whole", "kept", "replicas")


def laws(world: int) -> dict[str, Callable[[], None]]:
    """Return the checks of samples of all methods, each on one way to make units; on four processes every sixth one."""
    from tests import samples

    out = {}
    for number, sample in enumerate(samples.BY_THEMSELVES):
        if sample.method == "LN_TUNING":  # on norms: among the models above
            continue
        if world == 2:
            out[f"law {sample}"] = partial(law, sample, UNITS[number % 3])
        elif number % 6 == 0:
            out[f"law {sample}"] = partial(law, sample, "replicas")
    return out


CHECKS: dict[str, Callable[[Path, str], None]] = {
    "drift": drift,
    "mixed rows": mixed_rows,
    "accumulates": accumulates,
    "switches": switches,
    "checkpointing": partial(checkpoints, reentrant=False),
    "reentrant checkpointing": partial(checkpoints, reentrant=True),
    "calls the base": calls_base,
    "goes on": goes_on,
    "unloads": unloads,
    "saves alone": saves_alone,
    "narrow": narrow,
    "second after": second_after,
}
BY_HAND = tuple(name for name in CHECKS if name != "narrow")
AT_LOAD = tuple(name for name in CHECKS if name != "second after")
ELSEWHERE = ("drift", "mixed rows", "accumulates", "switches", "checkpointing", "goes on", "unloads", "saves alone",
             "narrow")  # fmt: skip
FEW = {
    "fsdp": ("LORA", "DORA", "SAVED", "TOKENS", "PROMPT_TUNING", "drift", "mixed rows", "accumulates"),
    "hand": ("OFT", "drift", "second after"),
    "experts": ("EXPERTS", "drift"),
    "ep": ("EXPERTS", "drift"),
}  # where not all run


def cases(world: int) -> dict[str, Callable[[Path], None]]:
    """Return the checks on that many processes, by name."""
    out: dict[str, Callable[[Path], None]] = {}
    for name, way in WAYS.items():
        if way.world != world:
            continue
        whole = dict.fromkeys([*TRIED[name], *{"fsdp": AT_LOAD, "hand": BY_HAND}.get(name, ELSEWHERE)])
        for what in whole if ALL_LAWS else FEW[name]:
            check = partial(CHECKS[what], name=name) if what in CHECKS else partial(life, name=name, method=what)
            out[f"{name} {what}"] = check
    if ALL_LAWS:
        out |= {name: (lambda folder, check=check: check()) for name, check in laws(world).items()}  # type: ignore[misc]
    return out


def names(world: int) -> list[str]:
    return list(cases(world))


def checks(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    write_bases(folder)
    for name, check in cases(dist.get_world_size()).items():
        yield name, partial(check, folder)
