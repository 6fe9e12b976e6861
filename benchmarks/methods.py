# SPDX-License-Identifier: Apache-2.0
"""A training step of the methods other than LoRA, and the bytes it keeps. The floor: graft's LoRA, r 16, all linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaModel

import graft
from benchmarks.measure import LIBS, Effort, Goal, Row, Turns, take_turns
from benchmarks.models import LINEAR, SCALING, WIDTH, lora, smollm
from benchmarks.training import BATCH, TOKENS, inputs, kept, step

LAYERS = 1
EVEN = 0.95  # never slower, but for the noise of measuring the same thing twice
FLAT = 0.999  # never larger, but for some hundred bytes
PROMPT = dict(task_type="FEATURE_EXTRACTION", num_virtual_tokens=16)


def ids() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {"input_ids": torch.randint(1024, (BATCH, TOKENS))}


def block(dtype: torch.dtype) -> nn.Module:
    return smollm(LAYERS, dtype=dtype).requires_grad_(False)


def mamba(dtype: torch.dtype) -> nn.Module:
    """A Mamba as wide as the block."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, vocab_size=1024)
    return MambaModel(MambaConfig(**sizes)).to(dtype).requires_grad_(False)


def adapted(lib: Any, config: Any, dtype: torch.dtype, base: Callable[[torch.dtype], nn.Module] = block) -> nn.Module:
    return moved(lib.get_peft_model(base(dtype), config)).train()


def fused(dtype: torch.dtype) -> nn.Module:
    """AdapterFusion over two bottlenecks."""
    model = graft.get_peft_model(block(dtype), graft.BottleneckConfig(), "a", mixed=True)
    model.add_adapter("b", graft.BottleneckConfig())
    model.add_adapter("fused", graft.AdapterFusionConfig(adapters=["a", "b"]))
    model.set_adapter("fused")
    return moved(model).train()


def moved(model: nn.Module) -> nn.Module:
    """Move every trainable value away from where it starts: some kernels skip zeros."""
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=g), alpha=0.02)
    return model


@dataclass
class Case:
    """One method as it is usually set up."""

    name: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    limit: float | None = 1.3  # × floor, where the algebra permits it
    batch: Callable[[], dict[str, Tensor]] | None = None
    dtype: torch.dtype = torch.float32
    long: bool = False
    flat: float = FLAT  # PEFT's bytes over graft's, at least
    in_peft: bool = True
    also: dict[str, Tensor] = field(default_factory=dict)  # arguments of its calls beside the inputs
    base: Callable[[torch.dtype], nn.Module] = block
    tokens: int = TOKENS  # of each row
    layers: Sequence[str] = LINEAR  # of the floor
    make: Callable[[torch.dtype], nn.Module] | None = None  # graft's model, where more than a config makes it

    def models(self) -> dict[str, Callable[[], nn.Module]]:
        def make(lib: Any) -> nn.Module:
            if self.make is not None:
                return self.make(self.dtype)
            return adapted(lib, getattr(lib, self.config)(**self.options), self.dtype, self.base)

        made: dict[str, Callable[[], nn.Module]] = {name: partial(make, lib) for name, lib in LIBS.items()}
        made = made if self.in_peft else {"graft": made["graft"]}
        return made | {"floor": partial(adapted, graft, lora(graft, targets=self.layers), self.dtype, self.base)}

    def inputs(self, who: str) -> dict[str, Tensor]:
        embeddings = inputs(self.dtype, self.tokens)
        if who == "floor":
            return embeddings
        return (embeddings if self.batch is None else self.batch()) | self.also

    def benches(self) -> list[Any]:
        return [Step(self), Kept(self)]


@dataclass
class Part:
    """One of the rows of a case."""

    case: Case

    title: ClassVar[str]

    @property
    def what(self) -> str:
        return f"{self.title}, {self.case.name}"

    @property
    def long(self) -> bool:
        return self.case.long


class Step(Part):
    title = "step"

    def run(self, effort: Effort) -> Row:
        case = self.case
        turns = {who: self.repeat(make(), case.inputs(who)) for who, make in case.models().items()}
        return Row(self.what, take_turns(turns, effort), self.goal)

    @property
    def goal(self) -> Goal:
        return Goal(EVEN if self.case.in_peft else None, self.case.limit)

    def repeat(self, model: nn.Module, batch: dict[str, Tensor]) -> Turns:
        call = partial(step, model, batch)
        while True:
            yield call


class Kept(Part):
    title = "bytes kept"

    def run(self, effort: Effort) -> Row:
        case = self.case
        values = {who: [kept(make(), case.inputs(who))] for who, make in case.models().items()}
        return Row(self.what, values, self.goal, unit="B")

    @property
    def goal(self) -> Goal:
        return Goal(self.case.flat if self.case.in_peft else None)


EVERY = dict(target_modules=list(LINEAR))  # the seven layers of a block that the floor has, too
ADALORA = EVERY | dict(init_r=12, target_r=8, total_step=1000, lora_alpha=SCALING * 12)
MINI = dict(init_weights="mini", mini_r=4)
TOKEN_IDS = dict(token_indices=list(range(5, 500, 7)))
KASA = EVERY | dict(r=16, lora_alpha=SCALING * 16, kasa_config={})
VELORA = EVERY | dict(r=16, lora_alpha=SCALING * 16, velora_config=dict(num_groups=64))
OUTPUTS = ["o_proj", "down_proj"]  # which servers split by their inputs
BLOCKS = dict(target_modules_bd_a=OUTPUTS, target_modules_bd_b=[m for m in LINEAR if m not in OUTPUTS], nblocks=4)
BDLORA = EVERY | dict(r=16, lora_alpha=SCALING * 16, use_bdlora=BLOCKS)
HALF: dict[str, Any] = dict(dtype=torch.bfloat16, long=True)

CASES = [
    Case("KaSA r 16", "LoraConfig", KASA, long=True),
    Case("VeLoRA r 16", "LoraConfig", VELORA, long=True),
    Case("BD-LoRA r 16", "LoraConfig", BDLORA, long=True, flat=0.98),  # the zeros of its matrices, whatever the batch
    Case("IA3", "IA3Config", long=True),  # on the layers that its authors chose
    Case(
        "VeRA r 256", "VeraConfig", EVERY | dict(r=256), None, long=True
    ),  # 16 times LoRA's rank is at least its arithmetic
    Case("LoHa r 8", "LoHaConfig", EVERY | dict(r=8, alpha=SCALING * 8)),
    Case("LoHa r 32", "LoHaConfig", EVERY | dict(r=32, alpha=SCALING * 32), None, long=True),  # a dense gradient
    Case("OFT block 32", "OFTConfig", EVERY | dict(oft_block_size=32), long=True),
    Case("HRA r 8", "HRAConfig", EVERY | dict(r=8), long=True),
    Case("HiRA r 32", "HiraConfig", EVERY | dict(r=32), None, long=True),  # a dense gradient
    Case("MiSS r 64", "MissConfig", EVERY, long=True),
    Case("MiSS r 64, mini", "MissConfig", EVERY | MINI, long=True),
    Case("MiSS r 64, bat", "MissConfig", EVERY | dict(init_weights="bat"), None, long=True),  # a dense gradient
    Case("VB-LoRA r 4", "VBLoRAConfig", EVERY | dict(vector_length=64), long=True),
    Case("PVeRA r 256", "PveraConfig", EVERY | dict(r=256), None, long=True),  # as VeRA
    Case("RandLoRA r 32", "RandLoraConfig", EVERY, None, long=True),  # of full rank
    Case("UniLoRA r 4", "UniLoraConfig", EVERY, long=True),
    Case("TinyLoRA r 2", "TinyLoraConfig", EVERY, long=True),
    Case("GraLoRA r 32", "GraloraConfig", EVERY | dict(r=32, alpha=SCALING * 32), long=True),
    Case("DeLoRA r 8", "DeloraConfig", EVERY | dict(r=8), long=True),
    Case("C3A block 64", "C3AConfig", EVERY | dict(block_size=64), None, long=True),  # a transform of every row
    Case("FourierFT n 1000", "FourierFTConfig", EVERY, None, long=True),  # a transform of every row
    Case("AdaMSS r 100", "AdamssConfig", EVERY, long=True),
    Case("WaveFT n 2592", "WaveFTConfig", EVERY, None, long=True),  # a sum for every coefficient and row
    Case("LoKr r 8", "LoKrConfig", EVERY | dict(r=8, alpha=SCALING * 8), long=True),
    Case("FRoD", "FrodConfig", EVERY | dict(progressbar=False), None, long=True),  # of full rank
    Case("RoAd", "RoadConfig", EVERY, long=True),
    Case("RoAd 4", "RoadConfig", EVERY | dict(variant="road_4"), long=True),
    Case("SHiRA r 8", "ShiraConfig", EVERY | dict(r=8)),
    Case("SHiRA r 32", "ShiraConfig", EVERY, None, long=True),  # a dense gradient where a tenth of a weight trains
    Case("SHiRA r 8, bf16 base", "ShiraConfig", EVERY | dict(r=8), None, **HALF),
    Case("Super-Tuning", "SupertuningConfig", EVERY),
    Case("Super-Tuning r 16", "SupertuningConfig", EVERY | dict(r=16), long=True),
    Case("Super-Tuning, bf16 base", "SupertuningConfig", EVERY, None, **HALF),
    Case("DEFT r 8", "DeftConfig", EVERY),
    Case("DEFT r 8, bf16 base", "DeftConfig", EVERY, **HALF),
    Case("BOFT block 4", "BOFTConfig", EVERY),
    Case("BOFT block 4, bf16 base", "BOFTConfig", EVERY, None, **HALF),
    Case("PSOFT r 32", "PsoftConfig", EVERY, flat=0.97),  # B (R - I), whatever the batch
    Case("PSOFT r 32, bf16 base", "PsoftConfig", EVERY, flat=0.97, **HALF),
    Case("OSF", "OSFConfig", EVERY, None),  # a dense gradient
    Case("OSF, bf16 base", "OSFConfig", EVERY, None, **HALF),
    Case("BEFT", "BeftConfig", long=True),  # on value projections
    Case("GLoRA r 8", "GloraConfig", EVERY, None, long=True),  # a dense gradient
    Case("GLoRA, numbers by row", "GloraConfig", EVERY | dict(config_A_B="vector"), long=True),
    Case("PEANuT r 32", "PeanutConfig", EVERY, long=True),
    Case("PEANuT r 32, depth 2", "PeanutConfig", EVERY | dict(depth=2), long=True),
    Case("Lily r 32", "LilyConfig", EVERY, long=True),
    Case("SHADOW", "ShadowConfig", dict(task_type="FEATURE_EXTRACTION"), None, batch=ids, long=True),  # another network
    Case("AdaLoRA", "AdaLoraConfig", ADALORA, long=True),
    Case("LN tuning", "LNTuningConfig", long=True),
    Case("trainable tokens", "TrainableTokensConfig", TOKEN_IDS, batch=ids, long=True),
    Case("prefix tuning", "PrefixTuningConfig", PROMPT, long=True),
    Case("prompt tuning", "PromptTuningConfig", PROMPT, long=True),
    Case("P-tuning", "PromptEncoderConfig", PROMPT | dict(encoder_hidden_size=64), long=True),
    Case("KaSA r 16, bf16 base", "LoraConfig", KASA, **HALF),
    Case("IA3, bf16 base", "IA3Config", **HALF),
    Case("VeRA r 256, bf16 base", "VeraConfig", EVERY | dict(r=256), None, **HALF),
    Case("LoHa r 8, bf16 base", "LoHaConfig", EVERY | dict(r=8, alpha=SCALING * 8), **HALF),
    Case("OFT block 32, bf16 base", "OFTConfig", EVERY | dict(oft_block_size=32), **HALF),
    Case("HRA r 8, bf16 base", "HRAConfig", EVERY | dict(r=8), **HALF),
    Case("HiRA r 32, bf16 base", "HiraConfig", EVERY | dict(r=32), None, **HALF),
    Case("MiSS r 64, bf16 base", "MissConfig", EVERY, **HALF),
    Case("MiSS r 64, bat, bf16 base", "MissConfig", EVERY | dict(init_weights="bat"), None, **HALF),
    Case("VB-LoRA r 4, bf16 base", "VBLoRAConfig", EVERY | dict(vector_length=64), **HALF),
    Case("GraLoRA r 32, bf16 base", "GraloraConfig", EVERY | dict(r=32, alpha=SCALING * 32), None, **HALF),
    Case("DeLoRA r 8, bf16 base", "DeloraConfig", EVERY | dict(r=8), **HALF),
    Case("C3A block 64, bf16 base", "C3AConfig", EVERY | dict(block_size=64), None, **HALF),
    Case("FourierFT n 1000, bf16 base", "FourierFTConfig", EVERY, None, **HALF),
    Case("WaveFT n 2592, bf16 base", "WaveFTConfig", EVERY, None, **HALF),
    Case("LoKr r 8, bf16 base", "LoKrConfig", EVERY | dict(r=8, alpha=SCALING * 8), None, **HALF),
    Case("RoAd, bf16 base", "RoadConfig", EVERY, **HALF),
    Case("GLoRA r 8, bf16 base", "GloraConfig", EVERY, None, **HALF),
    Case("PEANuT r 32, bf16 base", "PeanutConfig", EVERY, **HALF),
    Case("Lily r 32, bf16 base", "LilyConfig", EVERY, **HALF),
    Case("AdaLoRA, bf16 base", "AdaLoraConfig", ADALORA, **HALF),
]
OWN: dict[str, Any] = dict(in_peft=False, long=True)  # methods that PEFT 0.21.2 lacks
R16 = EVERY | dict(r=16, lora_alpha=SCALING * 16)
MIXED = dict(r=4, lora_alpha=SCALING * 4, num_experts=4)
CASES += [
    Case("bottlenecks of Pfeiffer", "BottleneckConfig", **OWN),
    Case("bottlenecks of Houlsby", "BottleneckConfig", dict(mh_adapter=True, original_ln_before=False), **OWN),
    Case("parallel bottlenecks", "BottleneckConfig", dict(is_parallel=True, original_ln_before=False), **OWN),
    Case("Compacter++", "BottleneckConfig", dict(phm_layer=True), **OWN),
    Case("ReFT r 4", "ReftConfig", dict(r=4, prefix_positions=5, suffix_positions=5), **OWN),
    Case("steering vectors", "SteeringConfig", **OWN),
    Case("LoRA-XS r 16", "LoraXsConfig", R16, **OWN),
    Case("T-LoRA r 8", "TLoraConfig", EVERY | dict(r=8), 1.6, also=dict(timestep=torch.tensor(300.0)), **OWN),
    Case(
        "MTL-LoRA r 16",
        "MtlLoraConfig",
        R16 | dict(n_tasks=3, n_up_projection=2),
        1.6,  # two up-projections
        also=dict(task_ids=torch.arange(BATCH) % 3),
        **OWN,
    ),
    Case("DyLoRA r 16", "LoraConfig", R16 | dict(use_dylora=True), **OWN),
    Case("SVFT, a diagonal", "SvftConfig", EVERY, None, **OWN),  # vectors as large as the weight
    Case("FineGates", "FineGatesConfig", EVERY | dict(gate_noise_std=0.1), **OWN),
    Case("LoHa r 8, Khatri-Rao", "LoHaConfig", EVERY | dict(r=8, alpha=SCALING * 8, use_khatri_rao=True), **OWN),
    Case("LoHa r 8, ABBA", "LoHaConfig", EVERY | dict(r=8, alpha=SCALING * 8, init_weights="abba"), **OWN),
    Case("EWoRA, 4 experts of r 4", "EworaConfig", EVERY | dict(r=4, num_experts=4), 1.6, **OWN),
    Case("MoE-LoRA, 2 of 4 experts of r 4", "MoeLoraConfig", EVERY | MIXED, 1.6, **OWN),
    Case("MoE-LoRA, 4 experts, one A", "MoeLoraConfig", EVERY | MIXED | dict(top_k=None, shared_A=True), 1.6, **OWN),
    Case("MixLoRA, 2 of 4 experts of r 4", "MixLoraConfig", EVERY | MIXED, None, **OWN),  # runs two MLPs for each token
    Case(
        "AdapterFusion of two bottlenecks", "AdapterFusionConfig", limit=None, make=fused, **OWN
    ),  # three dense layers
    Case("SDT", "SdtConfig", dict(init_weights=False), base=mamba, tokens=16, layers=("in_proj", "out_proj"), **OWN),
]
BENCHES = [bench for case in CASES for bench in case.benches()]
