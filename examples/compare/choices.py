# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared: a config each, a learning rate, and what some need before or during training."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import graft
from examples.demo_lm import methods as demo
from examples.demo_lm.chat import training_batch
from examples.demo_lm.data import Task
from examples.demo_lm.training import BATCH, batches
from graft.model.rates import best_lr, find_settings, read_searches

DTYPE = torch.bfloat16  # of the language model, as most train such models
CALIBRATION = 8  # batches, where an initialisation looks at data
SB_STEP = 2e-3 / (0.1 * 1000)  # of AdamW at the authors' rate, in the warm-up of a thousand steps
LR = 3e-3  # chosen for LoRA on validation dates; its relatives train with the same


@dataclass(frozen=True)
class Choice:
    """A method as it is used here.

    Attributes:
        config: training steps → config.
        before: (model, config, batches) of a base, before the adapter comes.
        after: (model, batches) of the adapted model, before training.
        loss: (model) → what is added to the loss.
        after_step: given the optimizer and the model, registers what is to happen after each step.
        invocation: the text from which on an aLoRA acts.
        prompt: it goes before the input, and adapts no layers.
    """

    config: Callable[..., Any]
    lr: float = LR
    note: str = "r 4, q and v"
    before: Callable[[nn.Module, Any, list[dict[str, Tensor]]], None] | None = None
    after: Callable[[nn.Module, list[dict[str, Tensor]]], None] | None = None
    loss: Callable[[nn.Module], Tensor] | None = None
    after_step: Callable[..., Any] | None = None
    invocation: str | None = None
    prompt: bool = False

    def made(self, steps: int, tokenizer: Any) -> Any:
        """Return the config."""
        if self.invocation is None:
            return self.config(steps)
        return self.config(steps, alora_invocation_tokens=tokenizer(self.invocation).input_ids)


def lora(steps: int, **fields: Any) -> Any:
    return graft.LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, "target_modules": demo.ATTENTION, **fields}
    )


def of(method: str, **fields: Any) -> Callable[[int], Any]:
    """Return a function that makes the config of another method on the same layers."""

    def make(steps: int) -> Any:
        cls = graft.PEFT_TYPE_TO_CONFIG_MAPPING[method]
        return cls(task_type="CAUSAL_LM", target_modules=demo.ATTENTION, **fields)

    return make


def at_places(config: str, **fields: Any) -> Callable[[int], Any]:
    """Return a function that makes the config of a method that finds its places itself."""
    return lambda steps: getattr(graft, config)(task_type="CAUSAL_LM", **fields)


def calibration(tokenizer: Any, task: Task, seed: int) -> list[dict[str, Tensor]]:
    """Return batches of training pairs for initialisations that look at data."""
    return [training_batch(tokenizer, task.instruction, pairs) for pairs in picked(task, seed)]


def picked(task: Task, seed: int) -> Iterator[Any]:
    return batches(task.train, BATCH, CALIBRATION, seed + 1)


def eva(model: nn.Module, data: list[dict[str, Tensor]]) -> None:
    graft.initialize_lora_eva_weights(model, data, show_progress_bar=False)


def corda(model: nn.Module, config: Any, data: list[dict[str, Tensor]]) -> None:
    def run() -> None:
        for batch in data:
            model(**batch)

    graft.preprocess_corda(model, config, run_model=run)


def loraga(model: nn.Module, config: Any, data: list[dict[str, Tensor]]) -> None:
    graft.preprocess_loraga(model, config, backward(model, data))


def backward(model: nn.Module, data: list[dict[str, Tensor]]) -> Callable[[], None]:
    def step() -> None:
        for batch in data:
            model(**batch).loss.backward()

    return step


def lorasb(model: nn.Module, config: Any, data: list[dict[str, Tensor]]) -> None:
    graft.preprocess_lorasb(model, config, backward(model, data), step=SB_STEP)


def kasa_loss(model: nn.Module) -> Tensor:
    return model.base_model._get_kasa_loss()  # type: ignore[union-attr,operator,no-any-return]


def shadow(steps: int) -> Any:
    return graft.ShadowConfig(task_type="CAUSAL_LM")


def norms(steps: int) -> Any:
    return graft.LNTuningConfig(task_type="CAUSAL_LM")


def p_tuning(steps: int) -> Any:
    return graft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, encoder_hidden_size=128)


FAMILY: dict[str, Choice] = {
    "LoRA": Choice(lora),
    "rsLoRA": Choice(partial(lora, use_rslora=True, r=16), note="r 16, s as for LoRA, q and v"),
    "DoRA": Choice(partial(lora, use_dora=True)),
    "PiSSA": Choice(partial(lora, init_lora_weights="pissa_niter_4")),
    "OLoRA": Choice(partial(lora, init_lora_weights="olora"), 1e-3),
    "orthogonal": Choice(partial(lora, init_lora_weights="orthogonal")),
    "EVA": Choice(partial(lora, init_lora_weights="eva", eva_config=graft.EvaConfig(rho=1.0)), after=eva),
    "CorDA": Choice(
        partial(lora, init_lora_weights="corda", corda_config=graft.CordaConfig(corda_method="ipm")), before=corda
    ),
    "LoRA-GA": Choice(partial(lora, init_lora_weights="lora_ga", lora_ga_config=graft.LoraGAConfig()), before=loraga),
    "KaSA": Choice(partial(lora, kasa_config=graft.KasaConfig()), loss=kasa_loss),
    "MiCA": Choice(partial(lora, init_lora_weights="mica")),
    "aLoRA": Choice(lora, note="r 4, q and v, for the answer only", invocation="<|im_start|>assistant"),
}
OTHERS: dict[str, Choice] = {
    "AdaLoRA": Choice(demo.adalora, 1e-2, "r 6 → 4, q and v", after_step=demo.OTHERS["AdaLoRA"].after_step),
    "IA3": Choice(demo.ia3, 1e-1, "k, v, down"),
    "VeRA": Choice(of("VERA", r=64), 2e-2, "r 64, q and v"),
    "LoHa": Choice(of("LOHA", r=4, alpha=16), LR, "r 4, q and v"),
    "OFT": Choice(of("OFT", oft_block_size=32), LR, "blocks of 32, q and v"),
    "HRA": Choice(of("HRA", r=4), LR, "r 4, q and v"),
    "HiRA": Choice(of("HIRA", r=16), 1e-2, "r 16, q and v"),
    "MiSS": Choice(of("MISS", r=8), LR, "r 8, q and v"),
    "RoAd": Choice(of("ROAD", group_size=64), 1e-2, "q and v"),
    "VB-LoRA": Choice(of("VBLORA", r=4, num_vectors=64, vector_length=64), 1e-2, "r 4, 64 vectors, q and v"),
    "PVeRA": Choice(of("PVERA", r=64), 4e-2, "r 64, q and v"),
    "RandLoRA": Choice(of("RANDLORA", r=32), 1e-3, "r 32, q and v"),
    "Uni-LoRA": Choice(of("UNILORA", r=4, theta_d_length=20_000), 1e-2, "r 4, 20,000 numbers, q and v"),
    "TinyLoRA": Choice(of("TINYLORA", r=2, u=64), 1e-2, "64 numbers a layer, q and v"),
    "GraLoRA": Choice(of("GRALORA", r=4, alpha=16), LR, "r 4, q and v"),
    "DeLoRA": Choice(of("DELORA", r=4), 1e-3, "r 4, q and v"),
    "C3A": Choice(of("C3A", block_size=64), 3e-1, "blocks of 64, q and v"),
    "FourierFT": Choice(of("FOURIERFT", n_frequency=1000), 3e-2, "1,000 frequencies, q and v"),
    "WaveFT": Choice(of("WAVEFT", n_frequency=1000), 1e-2, "1,000 coefficients, q and v"),
    "LoKr": Choice(of("LOKR", r=4, alpha=16), LR, "r 4, q and v"),
    "GLoRA": Choice(of("GLORA", r=4), LR, "r 4, q and v"),
    "PEANuT": Choice(of("PEANUT", r=4), LR, "r 4, q and v"),
    "Lily": Choice(of("LILY", r=4), LR, "r 4, q and v"),
    "AdaMSS": Choice(of("ADAMSS", r=64), 3e-2, "r 64, 5 subspaces, q and v"),
    "FRoD": Choice(of("FROD", progressbar=False), LR, "q and v"),
    "BEFT": Choice(of("BEFT"), 1e-2, "q and v"),
    "SHiRA": Choice(of("SHIRA", r=4), LR, "r 4, q and v"),
    "Super-Tuning": Choice(of("SUPERTUNING"), 1e-2, "1 % of the entries, q and v"),
    "DEFT": Choice(of("DEFT", r=4), LR, "r 4, q and v"),
    "BOFT": Choice(of("BOFT", boft_block_size=4), LR, "blocks of 4, q and v"),
    "PSOFT": Choice(of("PSOFT", r=32), LR, "r 32, q and v"),
    "OSF": Choice(of("OSF"), 1e-4, "half of the triples, q and v"),
    "LoRA-XS": Choice(of("LORAXS", r=16, lora_alpha=16), LR, "r 16, q and v"),
    "LoRA-SB": Choice(of("LORAXS", r=16, lora_alpha=16, init_weights="sb"), 2e-3, "r 16, q and v", before=lorasb),
    "SVFT": Choice(of("SVFT", off_diag=2), 1e-2, "5 diagonals, q and v"),
    "FineGates": Choice(of("FINEGATES", gate_noise_std=0.1), 1e-2, "noise 0.1, q and v"),
    "EWoRA": Choice(of("EWORA", r=4, num_experts=4), LR, "4 experts of r 4, q and v"),
    "MoE-LoRA": Choice(
        of("MOELORA", r=4, lora_alpha=16, num_experts=4, router_loss=True), LR, "2 of 4 experts of r 4, q and v"
    ),
    "HydraLoRA": Choice(
        of("MOELORA", r=4, lora_alpha=16, num_experts=4, top_k=None, shared_A=True),
        LR,
        "4 experts of one A, r 4, q and v",
    ),
    "MixLoRA": Choice(
        at_places("MixLoraConfig", r=4, lora_alpha=16, num_experts=4), LR, "2 of 4 experts of r 4: MLPs; LoRA beside"
    ),
    "DyLoRA": Choice(partial(lora, use_dylora=True)),
    "LoHa by Khatri-Rao": Choice(of("LOHA", r=4, alpha=16, use_khatri_rao=True), LR, "r 4, q and v"),
    "LoHa by ABBA": Choice(of("LOHA", r=4, alpha=16, init_weights="abba"), 1e-3, "r 4, q and v"),
    "bottlenecks": Choice(at_places("BottleneckConfig", reduction_factor=16), 1e-3, "Pfeiffer's, width / 16"),
    "Houlsby": Choice(
        at_places("BottleneckConfig", reduction_factor=16, mh_adapter=True, original_ln_before=False),
        1e-3,
        "after attention and MLP, width / 16",
    ),
    "Compacter": Choice(
        at_places("BottleneckConfig", reduction_factor=16, phm_layer=True), LR, "Pfeiffer's, width / 16, n 4"
    ),
    "ReFT": Choice(at_places("ReftConfig", r=4, prefix_positions=5, suffix_positions=5), 4e-3, "r 4, 5 + 5 tokens"),
    "steering vectors": Choice(at_places("SteeringConfig"), 1e-2, "one for each block, trained"),
    "adaption prompts": Choice(
        at_places("AdaptionPromptConfig", adapter_len=10, adapter_layers=30), 5e-3, "10 tokens, all attentions"
    ),
    "SHADOW": Choice(shadow, 1e-3, "one layer beside the model"),
    "LN tuning": Choice(norms, 1e-2, "all norms"),
    "P-tuning": Choice(p_tuning, 3e-2, "20 tokens", prompt=True),
    "prefix tuning": Choice(demo.prefix_tuning, 1e-1, "20 tokens", prompt=True),
    "prompt tuning": Choice(demo.prompt_tuning, 1e-1, "20 tokens", prompt=True),
}


def searched(name: str, choice: Choice) -> Choice:
    """Return a choice with the rate that `make rates` found for it on the dates, if it has been there."""
    found = [row for row in read_searches() if (row["method"], row["task"]) == (name, "dates")]
    own = [row for row in found if row["config"] == find_settings(choice.config(row["steps"]))]
    return replace(choice, lr=best_lr(own)) if own else choice


CHOICES = {name: searched(name, choice) for name, choice in (FAMILY | OTHERS).items()}


def check_names(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """End with an error if there is no method of a name."""
    unknown = [name for name in names if name not in CHOICES]
    if unknown:
        parser.error(f"no such method: {', '.join(unknown)}. Known: {', '.join(CHOICES)}")


TASKS = "one task only"
OVER_OTHERS = "trained over adapters of other tasks"
# methods that the dates cannot show, by their config
LEFT_OUT: dict[str, str] = {
    "TLoraConfig": "needs the timesteps of a diffusion model",
    "SdtConfig": "needs the state space of a Mamba",
    "AdapterFusionConfig": OVER_OTHERS,
    "XLoraConfig": OVER_OTHERS,
    "MtlLoraConfig": TASKS,
    "PolyConfig": TASKS,
    "MultitaskPromptTuningConfig": TASKS,
    "TrainableTokensConfig": "no new tokens",
    "CPTConfig": "no examples in the prompt",
    "CartridgeConfig": "no long text",
}
