# SPDX-License-Identifier: Apache-2.0
"""What has to hold of adapters on a base that is in parts already: by FSDP2, or by transformers' expert parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import graft
from graft.core.errors import CheckpointError, DistributedError, RoutingError, UnsupportedLayerError
from graft.storage.parallel import is_sharded
from tests.distributed.layouts import in_units
from tests.distributed.tensor_parallel import FILE, close, held, mesh, refused, same_on_all, write_llama
from tests.families import IDS, base
from tests.models import seeded

T = dict(task_type="CAUSAL_LM", num_virtual_tokens=3)
PROMPTS: dict[str, Callable[[], Any]] = {
    "PROMPT_TUNING": lambda: graft.PromptTuningConfig(**T),
    "P_TUNING": lambda: graft.PromptEncoderConfig(**T, encoder_hidden_size=8),
    "PREFIX_TUNING": lambda: graft.PrefixTuningConfig(**T),
    "MULTITASK_PROMPT_TUNING": lambda: graft.MultitaskPromptTuningConfig(**T, num_tasks=2),
    "CARTRIDGE": lambda: graft.CartridgeConfig(**T),
    "CPT": lambda: graft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[1, 2, 3], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4]
    ),
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def ids() -> Tensor:
    with seeded(8):
        return torch.randint(41, (2, 6))


def sharded(folder: Path, whole: bool = True) -> Any:
    """A llama of which FSDP2 has each block, and the rest if `whole`."""
    from torch.distributed.fsdp import fully_shard

    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    for block in model.model.layers:
        fully_shard(block, mesh=mesh())
    return fully_shard(model, mesh=mesh()) if whole else model


def names(model: nn.Module) -> list[tuple[str, bool]]:
    return [(name, p.requires_grad) for name, p in model.named_parameters()]


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all tensors that train here and are whole."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and not is_sharded(p)}


def trains_alike(model: Any) -> None:
    """Processes with seeds and batches of their own begin and end with one adapter."""
    same_on_all(trained(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = trained(model)
    for step in range(3):
        with seeded(10 * step + dist.get_rank()):
            own = torch.randint(41, (2, 6))
        tasks = {"task_ids": torch.zeros(2, dtype=torch.int64)} if model.peft_type == "MULTITASK_PROMPT_TUNING" else {}
        model(input_ids=own, labels=own, **tasks).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    same_on_all(trained(model))
    assert any(not torch.equal(before[name], t) for name, t in trained(model).items())


def prompt_after_sharding(folder: Path, name: str) -> None:
    """A prompt on a base in parts is equal on all processes, and stays so; also one that was loaded to act alone."""
    for whole in (True, False):
        torch.manual_seed(dist.get_rank())
        trains_alike(graft.get_peft_model(sharded(folder, whole), PROMPTS[name]()).train())
    path = folder / name
    if dist.get_rank() == 0:
        one = AutoModelForCausalLM.from_pretrained(folder / "llama")
        graft.get_peft_model(one, PROMPTS[name]()).save_pretrained(path)
    dist.barrier()
    loaded: Any = graft.PeftModel.from_pretrained(sharded(folder), path)
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if "prompt_encoder" in n)
    if name == "PROMPT_TUNING":
        loaded.train().set_requires_grad("default")
        trains_alike(loaded)


def rows_at_other_depths(folder: Path) -> None:
    """Rows of this process reach other layers than those of the other: FSDP2 gathers in step, and both train alike."""
    write_llama(folder / "deep", layers=6)
    model = graft.get_peft_model(sharded(folder / "deep"), graft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("last", graft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[5]))
    model.train().set_requires_grad(["default", "last"])
    before = trained(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        row_names = [("default", "last")[dist.get_rank()], "__base__"]
        model(input_ids=ids(), labels=ids(), adapter_names=row_names).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    same_on_all(trained(model))
    for name in ("default", "last"):
        assert any(name in key and not torch.equal(before[key], t) for key, t in trained(model).items())


def files_that_differ(folder: Path) -> None:
    """A file that one process cannot load, and other values in an adapter that is there, are errors on all."""
    config, rank = graft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), dist.get_rank()
    one = AutoModelForCausalLM.from_pretrained(folder / "llama")
    torch.manual_seed(rank)
    path = folder / f"own{rank}"
    graft.get_peft_model(one, config).save_pretrained(path)
    dist.barrier()
    for load in (graft.hotswap_adapter, lambda model, path, name: model.load_adapter(path, name, is_trainable=True)):
        model = graft.get_peft_model(sharded(folder), config).train()
        trains_alike(model)
        load(model, str(path), "default")
        refused(lambda model=model: model(input_ids=ids(), labels=ids()), DistributedError, f"[{1 - rank}]")  # type: ignore[misc]
        load(model, str(folder / "own0"), "default")
        trains_alike(model)
    if rank:
        tensors = load_file(path / FILE)
        save_file(dict(list(tensors.items())[1:]), path / FILE)
    base_model = sharded(folder)
    load = lambda path: graft.PeftModel.from_pretrained(base_model, path, is_trainable=True, check_digest=False)
    own = folder / ("own1" if rank else "own0")
    refused(lambda: load(own), graft.AdapterKeyError if rank else CheckpointError, "missing adapter keys")
    trains_alike(load(folder / "own0").train())


def tied_words(folder: Path) -> None:
    """Adapters act on an embedding that FSDP2 has sharded as one with the head; they cannot be merged there."""
    from torch.distributed.fsdp import fully_shard

    config = AutoConfig.from_pretrained(folder / "llama", tie_word_embeddings=True)
    with seeded(0):
        model = AutoModelForCausalLM.from_config(config)
    model = graft.get_peft_model(
        fully_shard(model, mesh=mesh()), graft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    ).train()
    trains_alike(model)
    refused(model.merge_adapter, NotImplementedError, "embed_tokens", "tied", "one process")


def mixtures(folder: Path) -> None:
    """X-LoRA's classifier, and the networks of SHADOW and MixLoRA, are equal on all processes, and stay so."""
    experts = {name: str(folder / name) for name in ("a", "b")}
    for path in experts.values() if dist.get_rank() == 0 else ():
        config = graft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        one = AutoModelForCausalLM.from_pretrained(folder / "llama")
        graft.get_peft_model(one, config).save_pretrained(path)
    dist.barrier()
    for config in (
        graft.XLoraConfig(hidden_size=48, adapters=experts, task_type="CAUSAL_LM"),
        graft.ShadowConfig(task_type="CAUSAL_LM"),
        graft.MixLoraConfig(task_type="CAUSAL_LM"),
    ):
        torch.manual_seed(dist.get_rank())
        base_model = sharded(folder)
        base_model.config.use_cache = False
        trains_alike(graft.get_peft_model(base_model, config).train())


def resumes_in_another_layout(folder: Path) -> None:
    """A training on a sharded base ends with the same bits if it resumes with an adapter that was there before
    `fully_shard`, under DDP, or the other way round.
    """

    def make(layout: str) -> tuple[Any, Any]:
        torch.manual_seed(3)
        config = graft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        if layout == "before":
            model = graft.get_peft_model(sharded(folder), config).train()
            return model, model
        model = graft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "llama"), config).train()
        if layout == "ddp":
            return model, nn.parallel.DistributedDataParallel(model)
        return model, in_units(model, mesh=mesh())

    def train(outer: Any, optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            outer(input_ids=ids() + dist.get_rank(), labels=ids()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    for first, then in (("before", "after"), ("after", "before"), ("before", "ddp")):
        ends = []
        for layout, resumed in ((first, False), (then, True)):
            model, outer = make(layout)
            optimizer = torch.optim.AdamW([p for p in outer.parameters() if p.requires_grad], lr=0.01)
            path = folder / f"{first}-{then}"
            if resumed:
                graft.resume(path, model, optimizer)
            else:
                train(outer, optimizer, 1)
                graft.save_training(path, model, optimizer, step=1)
            train(outer, optimizer, 2)
            ends.append({k: t.clone() for k, t in graft.get_peft_model_state_dict(model).items()})
        assert all(torch.equal(t, ends[1][key]) for key, t in ends[0].items()), (first, then)


def layers_beside_units(folder: Path) -> None:
    """Layers that FSDP2 left alone, of a model of which it has others, have equal adapters as well."""
    for more in ({}, {"modules_to_save": ["lm_head"]}):
        torch.manual_seed(dist.get_rank())
        model = sharded(folder, whole=False)
        trains_alike(graft.get_peft_model(model, graft.LoraConfig(target_modules=["embed_tokens"], **more)).train())


def expert_parallel(**more: Any) -> Any:
    """A Mixtral of which each process has half of the experts, as transformers makes it for `ep_size`."""
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    model = base("mixtral").train()
    plan = {}
    for i in range(len(model.model.layers)):
        path = f"model.layers.{i}.mlp.experts"
        plan |= {f"{path}.gate_up_proj": "grouped_gemm", f"{path}.down_proj": "grouped_gemm"}
        plan[path] = "ep_dispatch_experts"
    return apply_expert_parallelism(model, mesh(), mesh(), plan, **more)


STACKS: dict[str, Callable[[], Any]] = {
    "LORA": lambda: graft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS),
    "LORA-one": lambda: graft.LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS[1:]),
    "LOHA": lambda: graft.LoHaConfig(r=2, target_modules=[], target_parameters=EXPERTS),
    "OFT": lambda: graft.OFTConfig(oft_block_size=4, target_modules=[], target_parameters=EXPERTS),
}


def run_experts(model: Any, name: str, folder: Path, seed: int) -> dict[str, Any]:
    """Train an adapter on stacks of experts, save, merge and unmerge it."""
    torch.manual_seed(seed)
    adapted: Any = graft.get_peft_model(model, STACKS[name]())
    with torch.no_grad(), seeded(4):
        for _, p in sorted((n, p) for n, p in adapted.named_parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape), alpha=0.05)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.3)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    adapted.save_pretrained(folder)
    adapted.eval()
    found = {"losses": torch.stack(losses), "held": held(adapted), "model": adapted}
    with torch.no_grad():
        found["y"] = adapted(input_ids=IDS).logits
        stack = adapted.base_model.model.model.layers[0].mlp.experts.base_layer
        before = [
            stack._parameters[n].to_local().clone() for n in stack._parameters if is_sharded(stack._parameters[n])
        ]
        adapted.merge_adapter()
        found["merged"] = adapted(input_ids=IDS).logits
        adapted.unmerge_adapter()
        found["unmerged"] = adapted(input_ids=IDS).logits
    after = [stack._parameters[n].to_local() for n in stack._parameters if is_sharded(stack._parameters[n])]
    assert all(map(torch.equal, before, after))
    return found


def experts_of_all(folder: Path, name: str) -> None:
    """An adapter on dispatched experts has the numbers of one process, and its file; a file of one process loads."""
    own, shared = folder / f"rank{dist.get_rank()}" / f"experts {name}", folder / f"experts {name}"
    one = run_experts(base("mixtral").train(), name, own, 1)
    here = run_experts(expert_parallel(), name, shared, 1 + dist.get_rank())
    dist.barrier()
    close(here["losses"], one["losses"], 1e-6)
    same_on_all(here["held"])
    for key, t in one["held"].items():
        close(here["held"][key], t)
    for what in ("y", "merged"):
        close(here[what], one[what], 1e-5)
    close(here["unmerged"], here["y"], 1e-6)
    files = [load_file(path / "adapter_model.safetensors") for path in (own, shared)]
    assert files[0].keys() == files[1].keys()
    for key, t in files[0].items():
        close(files[1][key], t)
    for model, path in ((expert_parallel(), own), (base("mixtral"), shared)):
        loaded: Any = graft.PeftModel.from_pretrained(model, path).eval()
        with torch.no_grad():
            close(loaded(input_ids=IDS).logits, one["y"], 1e-5)
    for model in (here["model"], one["model"]):
        with seeded(5):
            model.add_adapter("b", STACKS[name]())
        with torch.no_grad(), seeded(6):
            for _, p in sorted((n, p) for n, p in model.named_parameters() if ".b." in n or n.endswith(".b")):
                p.add_(torch.randn(p.shape), alpha=0.05)
    for rows in (["default", "b"], ["__base__", "b"], ["b", "b"]):
        y, expected = (m(input_ids=IDS, adapter_names=rows).logits.detach() for m in (here["model"], one["model"]))
        close(y, expected, 1e-5)
    if name != "LORA":
        return
    both = graft.Average("default", "b")
    refused(
        partial(here["model"], input_ids=IDS, adapter_names=[both, "b"]), RoutingError, "expert parallel", "fsdp_size"
    )  # fmt: skip


def experts_in_parts() -> None:
    """A copy of a block is refused by the name of the style; what is whole on each process takes adapters."""
    model = expert_parallel()
    before = names(model)
    config = graft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"])
    act = partial(graft.get_peft_model, model, config)
    refused(act, UnsupportedLayerError, "expert parallel", "ep_dispatch_experts", "ep_size")
    assert names(model) == before and not hasattr(model, "peft_config")
    torch.manual_seed(dist.get_rank())  # processes of one batch begin alike, whatever each would draw
    adapted = graft.get_peft_model(expert_parallel(), graft.LoraConfig(r=2, target_modules=["q_proj"]))
    same_on_all(held(adapted))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    same_on_all(held(adapted))
    bank = graft.VBLoRAConfig(r=1, num_vectors=8, vector_length=4, topk=2, target_modules=[], target_parameters=EXPERTS)
    torch.manual_seed(0)
    shared = graft.get_peft_model(expert_parallel(), bank)
    refused(lambda: shared(input_ids=IDS, labels=IDS), UnsupportedLayerError, "tp_size", "share")


WHOLE = (rows_at_other_depths, files_that_differ, tied_words, mixtures, resumes_in_another_layout)


def checks(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    write_llama(folder)
    for name in PROMPTS:
        yield f"trains {name}", partial(prompt_after_sharding, folder, name)
    yield "trains layers beside units", partial(layers_beside_units, folder)
    for check in WHOLE:
        yield check.__name__.replace("_", " "), partial(check, folder)
    yield "refuses experts", experts_in_parts
    for name in STACKS:
        yield f"experts {name}", partial(experts_of_all, folder, name)
