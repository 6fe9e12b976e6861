# SPDX-License-Identifier: Apache-2.0
"""What has to hold of tensor parallel models: each check compares one with the same model on a single process.

Both are in each process, so that nothing has to be handed over; files too are written and compared by each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import graft
from graft.core.errors import CheckpointError, ConfigError, UnsupportedLayerError
from graft.serving.hotswap import hotswap_adapter
from graft.train.eva import initialize_lora_eva_weights
from tests import samples
from tests.distributed.megatron import MegatronNet
from tests.models import seeded

FILE = "adapter_model.safetensors"

# every method, on layers of every style


class Net(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.layer, self.after = nn.Linear(10, 10), nn.Linear(10, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(self.layer(self.first(x))))


PAIR = {"layer": "colwise", "after": "rowwise"}
STYLES: dict[str, tuple[str, dict[str, str]]] = {  # style: (target, plan)
    "colwise": ("layer", PAIR),
    "rowwise": ("after", PAIR),
    "colwise_gather_output": ("layer", {"layer": "colwise_gather_output"}),
    "rowwise_split_input": ("layer", {"layer": "rowwise_split_input"}),
    "packed_colwise": ("layer", {"layer": "packed_colwise", "after": "rowwise"}),
}
NAMED = ("LORA", "LORA-dora", "IA3", "OFT", "VERA", "LOHA", "ADALORA")
# `make test-distributed` has these on every style and the others on one each; else these on the two common styles
ALL_LAWS = bool(os.environ.get("GRAFT_DEEPSPEED"))
TRIED = tuple(STYLES) if ALL_LAWS else ("colwise", "rowwise")


@cache
def mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


def cut(net: Any, plan: dict[str, str]) -> nn.Module:
    """Make layers of a net parallel, as transformers does."""
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    if "packed_colwise" in plan.values():  # what follows takes a process's outputs side by side
        net.layer.bias = None  # transformers cuts it in another way than the weight
        order = torch.arange(12).view(2, dist.get_world_size(), -1).transpose(0, 1).flatten()
        net.after.weight.data = net.after.weight.data[:, order]
    for path, name in plan.items():
        module, style = net.get_submodule(path), ALL_PARALLEL_STYLES[name]
        for parameter in list(module._parameters):
            style.shard_param(module, parameter, mesh())
        style.install_forward(module, mesh())
    return net  # type: ignore[no-any-return]


def with_sample(net: nn.Module, sample: Any, target: str) -> Any:
    config = sample.make()
    config.target_modules = [target]
    with seeded(1):
        model: Any = graft.get_peft_model(net, config)
    return model


def held(model: nn.Module) -> dict[str, Tensor]:
    return {key: t.clone() for key, t in graft.get_peft_model_state_dict(model).items()}


def history(model: Any, x: Tensor) -> dict[str, Any]:
    """Run an adapter through its life."""
    found: dict[str, Any] = {"start": held(model)}
    with torch.no_grad(), seeded(3):
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape), alpha=0.1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in range(2):
        with seeded(step):
            loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    model.eval()
    found |= {"losses": torch.stack(losses), "end": held(model), "y": model(x).detach()}
    with suppress(NotImplementedError, RuntimeError):
        model.merge_adapter()
        found["merged"] = model(x).detach()
        model.unmerge_adapter()
        found["unmerged"] = model(x).detach()
    return found


def close(a: Tensor, b: Tensor, tolerance: float = 2e-6) -> None:
    scale = max(float(b.abs().max()), 1e-2) if b.numel() else 1.0
    assert a.shape == b.shape and a.dtype == b.dtype
    assert float((a.double() - b.double()).abs().sum()) == 0 or float((a - b).abs().max()) <= tolerance * scale


def same_on_all(tensors: dict[str, Tensor]) -> None:
    flat = torch.cat([t.double().flatten() for t in tensors.values()])
    found = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(found, flat)
    assert all(torch.equal(other, flat) for other in found), "the processes' adapters drift apart"


@pytest.mark.differs("LoRA on `rowwise` layers of a tensor parallel model; DoRA; LoHa")
def law(style: str, sample: Any) -> None:
    target, plan = STYLES[style]
    compare(sample, target, lambda net: cut(net, plan), without_bias=style == "packed_colwise")


@pytest.mark.differs("Megatron's layers")
def megatron(target: str, sample: Any, world: int, leaves_bias: bool) -> None:
    compare(sample, target, lambda net: MegatronNet(net, world, leaves_bias))


@pytest.mark.differs("LoRA's parameters on tensor parallel layers")
def compare(sample: Any, target: str, parallel: Callable[[Any], nn.Module], without_bias: bool = False) -> None:
    with seeded(5):
        x = torch.randn(3, 4, 10)
    nets = []
    for _ in range(2):
        with seeded(0):
            nets.append(Net())
    if without_bias:
        nets[0].layer.bias = None
    one = history(with_sample(nets[0], sample, target), x)
    here = history(with_sample(parallel(nets[1]), sample, target), x)
    assert here.keys() == one.keys()
    assert here["start"].keys() == one["start"].keys()
    assert all(torch.equal(t, one["start"][key]) for key, t in here["start"].items()), "initial values"
    close(here["losses"], one["losses"], 1e-6)
    for key, t in one["end"].items():
        close(here["end"][key], t)
    same_on_all(here["end"])
    for name in ("y", "merged"):
        if name in one:
            close(here[name], one[name], 1e-5)
    assert "unmerged" not in here or torch.equal(here["unmerged"], here["y"])


def laws() -> Iterator[tuple[str, Callable[[], None]]]:
    for number, sample in enumerate(samples.BY_THEMSELVES):
        if sample.method == "LN_TUNING":  # replaces a module: see `refusals`
            continue
        one = [TRIED[number % len(TRIED)]] if ALL_LAWS else []
        for style in TRIED if str(sample) in NAMED else one:
            if takes(sample, style):
                yield f"{style} {sample}", partial(law, style, sample)


def megatron_laws() -> Iterator[tuple[str, Callable[[], None]]]:
    for sample in samples.BY_THEMSELVES:
        if str(sample) not in NAMED:
            continue
        for target, world, leaves_bias in (("layer", 2, False), ("after", 2, True), ("layer", 1, True)):
            if not leaves_bias or str(sample) not in ("IA3",):  # which scales the bias as well
                yield f"megatron {target} {world} {sample}", partial(megatron, target, sample, world, leaves_bias)


def takes(sample: Any, style: str) -> bool:
    """Return True if a sample's sizes fit the layer."""
    try:
        with seeded(0):
            with_sample(Net(), sample, STYLES[style][0])
    except (ConfigError, UnsupportedLayerError):
        return False
    return True


# a whole model, loaded by transformers with a plan

ALL = ["q_proj", "v_proj", "o_proj", "down_proj"]
TASK = "CAUSAL_LM"
CONFIGS: dict[str, Callable[[], Any]] = {
    "LORA": lambda: graft.LoraConfig(r=4, lora_dropout=0.1, target_modules=[*ALL, "embed_tokens", "lm_head"]),
    "DORA": lambda: graft.LoraConfig(r=4, use_dora=True, lora_dropout=0.1, target_modules=ALL),
    "PISSA": lambda: graft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj", "o_proj"]),
    "IA3": lambda: graft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "OFT": lambda: graft.OFTConfig(r=0, oft_block_size=4, target_modules=ALL),
    "VERA": lambda: graft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "ADALORA": lambda: graft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=ALL),
    "PROMPT_TUNING": lambda: graft.PromptTuningConfig(num_virtual_tokens=3, task_type=TASK),
    "P_TUNING": lambda: graft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=12, task_type=TASK),
    "PREFIX_TUNING": lambda: graft.PrefixTuningConfig(num_virtual_tokens=3, task_type=TASK),
    "TOKENS": lambda: graft.LoraConfig(r=4, target_modules=["o_proj"], trainable_token_indices=[3, 5, 30]),
    "BIAS": lambda: graft.LoraConfig(r=4, bias="lora_only", target_modules=ALL),
    "SAVED": lambda: graft.LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["lm_head", "embed_tokens"]),
}


MODELS = tuple(CONFIGS) if ALL_LAWS else ("LORA", "DORA", "OFT", "PROMPT_TUNING", "SAVED")


def llama(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "llama", **options).train()


def write_llama(folder: Path, layers: int = 2) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=41, max_position_embeddings=32, attention_bias=True, pad_token_id=0,
    )  # fmt: skip
    if dist.get_rank() == 0:
        with seeded(0):
            LlamaForCausalLM(config).save_pretrained(folder / "llama")
    dist.barrier()


def ids() -> Tensor:
    with seeded(8):
        return torch.randint(41, (3, 7))


def trained(model: Any) -> Tensor:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    with seeded(6):
        for _ in range(3):
            loss = model(input_ids=ids(), labels=ids()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses)


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids()).logits  # type: ignore[no-any-return]


def saved(model: Any, path: Path, **options: Any) -> Path:
    """Save a model from all processes."""
    model.save_pretrained(path, **options)
    dist.barrier()
    return path


def whole_model(folder: Path, name: str) -> None:
    """Losses and files as those of one process; files of each load into the other."""
    places = dict(one=folder / f"rank{dist.get_rank()}" / name, here=folder / "all" / name)
    bases = dict(one=llama(folder), here=llama(folder, tp_plan="auto"))
    models, losses = {}, {}
    for place, base in bases.items():
        with seeded(1 if place == "one" else 1 + dist.get_rank()):  # other processes may have drawn other numbers
            models[place] = graft.get_peft_model(base, CONFIGS[name]())
        saved(models[place], places[place] / "start")
        losses[place] = trained(models[place])
        saved(models[place], places[place] / "end")
    one, here = ((path / "start" / FILE).read_bytes() for path in places.values())
    assert one == here, "the file before training"
    close(losses["here"], losses["one"], 1e-6)
    after = {place: held(model) for place, model in models.items()}
    assert after["here"].keys() == after["one"].keys()
    for key, t in after["one"].items():
        close(after["here"][key], t)
    same_on_all(after["here"])
    expected = logits(models["one"])
    close(logits(models["here"]), expected, 1e-5)
    with models["here"].disable_adapter(), models["one"].disable_adapter():
        close(logits(models["here"]), logits(models["one"]), 1e-5)
    for low in (False, True):
        loaded = graft.PeftModel.from_pretrained(
            llama(folder, tp_plan="auto"), places["one"] / "end", low_cpu_mem_usage=low
        )
        close(logits(loaded), expected, 1e-5)
    close(logits(graft.PeftModel.from_pretrained(llama(folder), places["here"] / "end")), expected, 1e-5)


@pytest.mark.differs("OFT, VeRA on a tensor parallel model")
def life(folder: Path) -> None:
    """Two adapters, of two methods: switched, in one batch, weighted, swapped, merged, deleted."""
    models = []
    for options in ({}, {"tp_plan": "auto"}):
        base = llama(folder, **options)
        with seeded(1):
            model: Any = graft.PeftMixedModel(base, graft.LoraConfig(r=4, target_modules=ALL), "a")
            model.add_adapter("b", graft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "o_proj"]))
        models.append(model)
    results = []
    for model in models:
        with torch.no_grad(), seeded(4):
            for key, p in sorted(model.named_parameters()):
                if "lora_" in key or "oft_" in key:
                    p.add_(torch.randn(p.shape), alpha=0.1)
        found = []
        for names in ("a", "b", ["a", "b"]):
            model.set_adapter(names)
            found.append(logits(model))
        model.merge_adapter()
        found.append(logits(model))
        model.unmerge_adapter()
        close(logits(model), found[2], 1e-5)
        model.merge_adapter(["b"])
        model.merge_adapter(["a"])
        found.append(logits(model))
        model.unmerge_adapter()
        model.delete_adapter("b")
        found.append(logits(model))
        found.append(logits(model.merge_and_unload()))
        results.append(found)
    for one, here in zip(*results):
        close(here, one, 1e-5)


def several(folder: Path) -> None:
    """Adapters of one method: a mixed batch, a weighted sum, another file in place of the first."""
    results = []
    for place, options in enumerate(({}, {"tp_plan": "auto"})):
        own = folder / (f"rank{dist.get_rank()}" if place == 0 else "all") / "several"
        base = llama(folder, **options)
        with seeded(1):
            model: Any = graft.get_peft_model(base, graft.LoraConfig(r=4, target_modules=ALL), "a")
            model.add_adapter("b", graft.LoraConfig(r=2, use_dora=True, target_modules=["o_proj", "up_proj"]))
            model.add_adapter("c", graft.LoraConfig(r=4, target_modules=ALL))
        with torch.no_grad(), seeded(4):
            for key, p in sorted(model.named_parameters()):
                if "lora_" in key:
                    p.add_(torch.randn(p.shape), alpha=0.1)
        model.eval()
        found = [model(input_ids=ids(), adapter_names=["a", "b", "__base__"]).logits]
        model.add_weighted_adapter(["a", "c"], [0.7, 1.0], "sum", combination_type="svd", svd_rank=4)
        model.set_adapter("sum")
        found.append(logits(model))
        saved(model, own, selected_adapters=["sum"])
        model.set_adapter("a")
        with seeded(2):
            hotswap_adapter(model, own / "sum", "a")
        found.append(logits(model))
        results.append(found)
    for one, here in zip(*results):
        close(here, one, 1e-5)


def refused(act: Callable[[], Any], error: type[Exception], *words: str) -> None:
    try:
        act()
    except error as e:
        assert all(word in str(e) for word in words), e
    else:
        raise AssertionError(f"no {error.__name__}")


def refusals(folder: Path) -> None:
    """What has no rule is refused by the name of its style, before anything has changed."""
    from torch.distributed.tensor import Shard
    from transformers.distributed.tensor_parallel import ColwiseParallel

    lora = partial(graft.LoraConfig, r=2, target_modules=["layer"])
    for style in ("all_reduce", "replicated_with_grad_allreduce"):
        net = cut(Net(), {"layer": style})
        before = dict(net.named_modules())
        refused(lambda: graft.get_peft_model(net, lora()), UnsupportedLayerError, f"style '{style}'", "tp_plan")  # noqa: B023
        assert before == dict(net.named_modules()) and all(p.requires_grad for p in net.parameters())
    net = Net()
    sequence = ColwiseParallel(input_layouts=Shard(1))
    sequence.shard_param(net.layer, "weight", mesh())
    sequence.install_forward(net.layer, mesh())
    refused(lambda: graft.get_peft_model(net, lora()), UnsupportedLayerError, "style 'ColwiseParallel'")
    net = Net()
    net.layer._hf_tp_plan = "colwise"  # as before 5.17: a piece of the weight, which says nothing of the whole
    refused(lambda: graft.get_peft_model(net, lora()), UnsupportedLayerError, "style 'colwise'", "5.17")
    net = cut(Net(), {"layer": "packed_colwise"})
    net.layer.bias = nn.Parameter(torch.zeros(12))
    refused(lambda: graft.get_peft_model(net, lora()), UnsupportedLayerError, "bias", "packed_colwise")
    for config in (
        graft.LoraConfig(r=2, target_modules=["after"], modules_to_save=["layer"]),
        graft.LNTuningConfig(target_modules=["layer"]),
    ):
        net = cut(Net(), PAIR)
        refused(lambda: graft.get_peft_model(net, config), UnsupportedLayerError, "style 'colwise'")  # noqa: B023
        assert not any("lora" in name or "save" in name for name, _ in net.named_modules())
    for change, word in ((dict(sequence_parallel=True), "sequence parallel"), (dict(tp_group=None), "tp_group")):
        net = MegatronNet(Net(), 2, False)
        net.layer.__dict__.update(change)
        refused(lambda: graft.get_peft_model(net, lora()), UnsupportedLayerError, "ColumnParallelLinear", word)  # noqa: B023
    net = MegatronNet(Net(), 2, True)
    config = graft.IA3Config(target_modules=["layer"], feedforward_modules=[])
    refused(lambda: graft.get_peft_model(net, config), UnsupportedLayerError, "IA3", "leaves to its caller")
    config = graft.LoraConfig(r=2, target_modules=["after"], modules_to_save=["layer"])
    refused(lambda: graft.get_peft_model(net, config), UnsupportedLayerError, "ColumnParallelLinear", "copy")
    eva = graft.LoraConfig(r=2, target_modules=["after"], init_lora_weights="eva", eva_config=graft.EvaConfig())
    net = cut(Net(), PAIR)
    model = graft.get_peft_model(net, eva, low_cpu_mem_usage=True)
    refused(lambda: initialize_lora_eva_weights(model, [torch.ones(4, 10)]), UnsupportedLayerError, "EVA", "rowwise")
    corda = graft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights="corda", corda_config=graft.CordaConfig())
    act = partial(graft.preprocess_corda, cut(Net(), PAIR), corda, lambda: None)
    refused(act, UnsupportedLayerError, "corda", "colwise")
    config = graft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type=TASK)
    model = llama(folder, tp_plan="auto")
    refused(lambda: graft.get_peft_model(model, config), UnsupportedLayerError, "style 'colwise'")


def differences(folder: Path) -> None:
    """Processes that would drift apart say so, on all of them."""
    rank = dist.get_rank()
    config = graft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["layer", "after"])
    with seeded(rank):
        model = graft.get_peft_model(cut(Net(), PAIR), config).train()
        same_on_all(held(model))
        model(torch.ones(2, 10))  # drawing has begun alike
        torch.manual_seed(rank)
        model = graft.get_peft_model(cut(Net(), PAIR), config).train()
        torch.manual_seed(rank)
        refused(lambda: model(torch.ones(2, 10)), RuntimeError, "torch.manual_seed", "'layer'")
        model.eval()(torch.ones(2, 10))
    own = folder / f"rank{rank}" / "differences"
    one = graft.get_peft_model(Net(), config)
    with torch.no_grad():
        one.base_model.model.layer.lora_B["default"].weight.fill_(rank)
    one.save_pretrained(own)
    for _ in range(2):
        net = cut(Net(), PAIR)
        refused(lambda: graft.PeftModel.from_pretrained(net, own), CheckpointError, "rank(s) [1]", "same file")  # noqa: B023
        assert type(net.layer) is nn.Linear


def checks(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    yield from laws()
    yield from megatron_laws()
    write_llama(folder)
    for name in MODELS:
        yield f"model {name}", partial(whole_model, folder, name)
    yield "two methods", partial(life, folder)
    yield "several adapters", partial(several, folder)
    yield "refusals", partial(refusals, folder)
    yield "differences", partial(differences, folder)
