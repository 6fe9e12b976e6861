# SPDX-License-Identifier: Apache-2.0
"""What has to hold of adapters on a base that is in parts already: by FSDP2, or by transformers' expert parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import graft
from graft.core.errors import UnsupportedLayerError
from tests.distributed.tensor_parallel import held, refused, same_on_all, write_llama
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


@cache
def mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


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


def trains_alike(model: Any) -> None:
    """Processes with seeds and batches of their own begin and end with one adapter."""
    same_on_all(held(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = held(model)
    for step in range(3):
        with seeded(10 * step + dist.get_rank()):
            own = torch.randint(41, (2, 6))
        tasks = {"task_ids": torch.zeros(2, dtype=torch.int64)} if model.peft_type == "MULTITASK_PROMPT_TUNING" else {}
        model(input_ids=own, labels=own, **tasks).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    same_on_all(held(model))
    assert any(not torch.equal(before[name], t) for name, t in held(model).items())


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


def experts_in_parts() -> None:
    """Stacks of experts are refused, by the name of the style; what is whole on each process takes adapters."""
    for options in (
        {"target_parameters": EXPERTS, "target_modules": []},
        {"target_parameters": EXPERTS[:1], "target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    ):
        model = expert_parallel()
        before = names(model)
        act = partial(graft.get_peft_model, model, graft.LoraConfig(r=2, **options))
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


def checks(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    write_llama(folder)
    for name in PROMPTS:
        yield f"trains {name}", partial(prompt_after_sharding, folder, name)
    yield "trains layers beside units", partial(layers_beside_units, folder)
    yield "refuses experts", experts_in_parts
