# SPDX-License-Identifier: Apache-2.0
"""What has to hold of the stages of a pipeline: each process has some of the blocks, and sends its output on."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import graft
from graft.core.errors import (
    BaseModelMismatchError,
    CheckpointError,
    ConfigError,
    DistributedError,
    UnsupportedLayerError,
)
from tests.distributed.tensor_parallel import FILE, close, held, refused, write_llama
from tests.models import seeded

LAYERS = ["q_proj", "v_proj", "o_proj", "down_proj"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "LORA": lambda: graft.LoraConfig(r=4, target_modules=LAYERS, rank_pattern={"layers.2.self_attn.v_proj": 7}),
    "ONE": lambda: graft.LoraConfig(r=4, target_modules=LAYERS, layers_to_transform=[0, 3]),
    "DORA": lambda: graft.LoraConfig(r=4, use_dora=True, target_modules=LAYERS),
    "IA3": lambda: graft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "OFT": lambda: graft.OFTConfig(r=0, oft_block_size=4, target_modules=LAYERS),
    "VERA": lambda: graft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "LOHA": lambda: graft.LoHaConfig(r=4, target_modules=LAYERS),
    "SAVED": lambda: graft.LoraConfig(r=4, target_modules=LAYERS, modules_to_save=["lm_head"]),
    "TOKENS": lambda: graft.LoraConfig(r=4, target_modules=LAYERS, trainable_token_indices=[2, 5]),
    "WAVEFT": lambda: graft.WaveFTConfig(n_frequency=24, target_modules=["q_proj", "k_proj"]),
}


def whole(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "llama").train()


def stage(folder: Path, empty: str) -> Any:
    """The model of which this process has two blocks of four; the first also the embedding, the last the head."""
    from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

    model, rank = whole(folder), dist.get_rank()
    kind = PipelineIdentityLayer if empty == "transformers" else nn.Identity
    layers = model.model.layers
    for i in range(4):
        if i // 2 != rank:
            layers._modules[str(i)] = None if empty == "None" else kind()
    if rank == 0:
        model.model.norm, model.lm_head = kind(), kind()
    else:
        model.model.embed_tokens = kind()
    return model


def forward(model: Any, rank: int, ids: Tensor, hidden: Tensor | None) -> Tensor:
    """Run one stage of a PeftModel: blocks by hand, since what is empty takes other arguments in each layout."""
    base = model.base_model.model
    inner = base.model
    x = inner.embed_tokens(ids) if rank == 0 else hidden
    places = torch.arange(ids.shape[1])[None]
    rotary = inner.rotary_emb(x, places)
    for block in inner.layers._modules.values():
        if block is not None and any(True for _ in block.parameters()):
            x = block(x, position_embeddings=rotary, position_ids=places)
    return x if rank == 0 else base.lm_head(inner.norm(x))


def ids() -> Tensor:
    with seeded(8):
        return torch.randint(41, (3, 7))


def loss_of(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())


def step(model: Any) -> Tensor:
    """Forward and backward over both stages; return the loss on both."""
    rank = dist.get_rank()
    if rank == 0:
        hidden = forward(model, 0, ids(), None)
        dist.send(hidden.detach().contiguous(), 1)
        g = torch.empty_like(hidden)
        dist.recv(g, 1)
        if hidden.requires_grad:
            hidden.backward(g)
        loss = torch.zeros(())
    else:
        hidden = torch.empty(*ids().shape, 48)
        dist.recv(hidden, 0)
        hidden.requires_grad_()
        loss = loss_of(forward(model, 1, ids(), hidden))
        loss.backward()
        dist.send(hidden.grad.contiguous(), 0)  # type: ignore[union-attr]
    loss = loss.detach()
    dist.broadcast(loss, 1)
    return loss


def trained(model: Any, alone: bool) -> Tensor:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        if alone:
            loss = loss_of(model(input_ids=ids()).logits)
            loss.backward()
        else:
            loss = step(model)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def saved(model: Any, path: Path, one: bool) -> Path:
    """Save a model; of stages, join what each has saved. Return the folder."""
    if one:
        model.save_pretrained(path)
        return path
    model.save_pretrained(path / f"stage{dist.get_rank()}")
    dist.barrier()
    if dist.get_rank() == 0:
        graft.join_stages([path / "stage0", path / "stage1"], path / "whole")
    dist.barrier()
    return path / "whole"


@pytest.mark.differs("a stage of a pipeline: seeds")
@pytest.mark.differs("a stage of a pipeline: a file of the whole model; parts")
def trains(folder: Path, name: str, empty: str) -> None:
    path, own = folder / f"{name}-{empty}", folder / f"one{dist.get_rank()}-{name}"
    with seeded(1):
        one: Any = graft.get_peft_model(whole(folder), CONFIGS[name]())
    with seeded(1):
        here: Any = graft.get_peft_model(stage(folder, empty), CONFIGS[name]())
    start = saved(one, own / "start", True), saved(here, path / "start", False)
    assert (start[0] / FILE).read_bytes() == (start[1] / FILE).read_bytes(), "the file before training"
    assert (start[0] / "adapter_config.json").read_bytes() == (start[1] / "adapter_config.json").read_bytes()
    close(trained(here, False), trained(one, True), 1e-6)
    end = saved(one, own / "end", True), saved(here, path / "end", False)
    a, b = (graft.load_peft_weights(str(f)) for f in end)
    assert a.keys() == b.keys()
    for key in a:
        close(b[key], a[key])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of a whole file is left out in silence, or complained about
        loaded: Any = graft.PeftModel.from_pretrained(stage(folder, empty), end[0])
    report = loaded.load_adapter(end[0], "again")
    assert report.absent_keys and not (report.missing_keys or report.unexpected_keys)
    assert {*report.loaded, *report.absent_keys} == set(a)
    for key, t in held(here).items():
        close(held(loaded)[key], t)
    again: Any = graft.PeftModel.from_pretrained(whole(folder), end[1])
    with torch.no_grad():
        close(again.eval()(input_ids=ids()).logits, one.eval()(input_ids=ids()).logits, 1e-5)


@pytest.mark.differs("AdaLoRA, VB-LoRA on a stage of a pipeline")
def refusals(folder: Path) -> None:
    rank = dist.get_rank()
    ada = graft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=LAYERS)
    for config, word in (
        (ada, "budget"),
        (graft.VBLoRAConfig(num_vectors=8, vector_length=4, topk=2, target_modules=["q_proj"]), "all layers share"),
    ):
        model = stage(folder, "Identity")
        before = dict(model.named_modules())
        refused(lambda: graft.get_peft_model(model, config), UnsupportedLayerError, "stage of a pipeline", word)  # noqa: B023
        assert dict(model.named_modules()) == before
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with seeded(1):
            model = graft.get_peft_model(stage(folder, "Identity"), graft.LoraConfig(r=2, target_modules=["lm_head"]))
    nothing = any("adapts nothing on this stage" in str(w.message) for w in said)
    assert nothing == (rank == 0)
    prompt = graft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    refused(lambda: graft.get_peft_model(stage(folder, "transformers"), prompt), ConfigError, "stage of a pipeline")
    # a part is no whole adapter, and parts of two adapters are no adapter
    own = folder / f"refused{rank}"
    for seed in (1, 2):
        with seeded(seed):
            model = graft.get_peft_model(stage(folder, "Identity"), CONFIGS["LORA"]())
        model.save_pretrained(own / f"{seed}")
    refused(lambda: graft.PeftModel.from_pretrained(whole(folder), own / "1"), BaseModelMismatchError, "layers")
    refused(lambda: graft.join_stages([own / "1", own / "2"], own / "both"), CheckpointError, "other values")
    refused(lambda: graft.join_stages([], own / "both"), CheckpointError, "first one first")
    assert not (own / "both").exists()
    shutil.rmtree(own)
    # the first process would write its own stage alone
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    act = partial(graft.save_training, folder / "training", model, optimizer, step=1)
    refused(act, DistributedError, "Rank 1 trains other tensors than rank 0", "pipeline")
    assert not (folder / "training").exists()


def checks(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    write_llama(folder, layers=4)
    for name in CONFIGS:
        yield f"trains {name}", partial(trains, folder, name, "transformers")
    for empty in ("Identity", "None"):
        yield f"trains LORA {empty}", partial(trains, folder, "LORA", empty)
    yield "refusals", partial(refusals, folder)
