# SPDX-License-Identifier: Apache-2.0
"""The estimate of training memory against what real steps take, as torch's profiler sees it."""

import itertools
from functools import partial

import pytest
import torch
import transformers as t
from transformers.models.llama.modeling_llama import LlamaMLP

import graft
from graft.core.errors import ConfigError
from graft.files import budget
from graft.files.budget import Training, compute_training_loss, count_adapted_blocks, find_block_classes, measure_budget
from graft.kernels import experts
from graft.storage import stacks
from tests.leaves_out import FUSED_EXPERTS, PLANS
from tests.storage.packed_experts import BOTH, EXPERTS, KINDS, WIDTH, blocks, made

pytestmark = PLANS
LLAMA = dict(hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, vocab_size=200)
BERT = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=200)
T5 = dict(d_model=64, d_ff=160, d_kv=16, num_heads=4, vocab_size=200, decoder_start_token_id=0, pad_token_id=0)
MODELS = {
    "llama": lambda n: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA, num_hidden_layers=n)),
    "tied": lambda n: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA, num_hidden_layers=n, tie_word_embeddings=True)),
    "gpt2": lambda n: t.GPT2LMHeadModel(t.GPT2Config(n_embd=64, n_head=4, vocab_size=200, n_layer=n)),
    "bert": lambda n: t.BertForMaskedLM(t.BertConfig(**BERT, num_hidden_layers=n)),
    "t5": lambda n: t.T5ForConditionalGeneration(t.T5Config(**T5, num_layers=n, num_decoder_layers=2)),
}
CONFIGS = {
    "lora": lambda: graft.LoraConfig(r=8, target_modules="all-linear"),
    "conv1d": lambda: graft.LoraConfig(r=8, target_modules="all-linear", fan_in_fan_out=True),
    "dora": lambda: graft.LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "osf": lambda: graft.OSFConfig(target_modules="all-linear"),
    "ia3": lambda: graft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def training(kind, config="lora", layers=5, length=48, dtype=torch.float32, **options):
    return Training(MODELS[kind], layers, CONFIGS[config](), length, dtype, **options)


def real_peak(of, batch, checkpointing=False):
    """Return the bytes that torch's allocator gave away at the fullest moment of a real step."""
    model = of.build_model(of.layers, "cpu", checkpointing)
    ids = torch.zeros(batch, of.length, dtype=torch.long)
    compute_training_loss(model, ids).backward()  # what is made once, is there
    model.zero_grad()
    with torch.profiler.profile(profile_memory=True) as found:
        compute_training_loss(model, ids).backward()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(held))


def step(held):
    return held.kept + held.gradients + held.working


F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    "kind, config, dtype, checkpointing",
    [("llama", "lora", F32, False), ("llama", "lora", BF16, False), ("llama", "lora", BF16, True),
     ("llama", "dora", F32, False), ("llama", "osf", F32, False), ("llama", "ia3", F32, False),
     ("tied", "lora", F32, True), ("gpt2", "conv1d", F32, False), ("bert", "lora", F32, False),
     ("t5", "lora", F32, False)],
)  # fmt: skip
def test_the_estimate_is_within_a_tenth_of_what_a_step_takes(kind, config, dtype, checkpointing):
    of = training(kind, config, dtype=dtype)
    held = measure_budget(of, 3, checkpointing)
    assert step(held) == pytest.approx(real_peak(of, 3, checkpointing), rel=0.1)
    model = of.build_model(of.layers, "cpu")
    frozen = {id(x): x.nbytes for x in (*model.parameters(), *model.buffers()) if not x.requires_grad}
    assert held.weights == sum(frozen.values())


def test_blocks_of_several_kinds_come_again_after_a_period():
    """Every third block is twice as wide."""

    class Uneven(t.LlamaForCausalLM):
        def __init__(self, blocks):
            super().__init__(t.LlamaConfig(**LLAMA, num_hidden_layers=blocks))
            for block in self.model.layers[2::3]:
                wide = t.LlamaConfig(**LLAMA | {"intermediate_size": 1600})
                block.mlp = LlamaMLP(wide)

    of = Training(Uneven, 9, CONFIGS["lora"](), 48, torch.float32, period=3)
    assert step(measure_budget(of, 3)) == pytest.approx(real_peak(of, 3), rel=0.05)


def test_checkpointing_takes_less_and_a_packed_base_too():
    of = training("llama", layers=8, length=64)
    whole, again, packed = (measure_budget(of, 4, **o) for o in ({}, dict(checkpointing=True), dict(bits=4)))
    assert again.kept < whole.kept / 4 and again.total < whole.total
    blocks = sum(p.numel() for p in of.whole_model.get_base_model().model.layers.parameters() if p.ndim > 1)
    saved = (4 - 0.5625) * (blocks - sum(p.numel() for p in of.whole_model.parameters() if p.requires_grad))
    assert whole.weights - packed.weights == pytest.approx(saved)
    assert packed.working - whole.working == 4 * 64 * 160  # one matrix unpacked


@FUSED_EXPERTS
@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_a_base_of_packed_experts(kind, monkeypatch):
    """Codes and scales as transformers' own experts of the format hold them; a step has a chunk of a stack dense."""
    make, pack = KINDS[kind]
    pack = partial(pack, block=(128, 128)) if kind == "fp8" else pack
    r, config = 2, graft.LoraConfig(r=2, target_modules=[], target_parameters=BOTH)
    of = Training(lambda n: make(), 2, config, 16, torch.float32)
    plain, packed = measure_budget(of, 1), measure_budget(of, 1, bits=kind)
    size = lambda model: sum(sizes_of(m) for _, m in blocks(model))
    dense = sum(p.nbytes for _, m in blocks(make()) for p in m.parameters() if p.ndim == 3)
    saved = dense - size(pack(made(make)))
    if kind == "fp8":  # whose other matrices are packed as well
        others = [p for n, p in make().model.layers.named_parameters() if p.ndim == 2]
        saved += sum(p.numel() * (4 - 1 - 4 / 128**2) for p in others)
    assert plain.weights - packed.weights == pytest.approx(saved, rel=0.01)
    assert plain.adapter == 4 * 2 * EXPERTS * r * (2 * WIDTH + 3 * (WIDTH // 2))
    stack = 4 * EXPERTS * WIDTH * WIDTH  # gate_up_proj
    assert packed.working - plain.working == stack  # less than a chunk
    monkeypatch.setattr("graft.files.budget.CHUNK", 1)
    assert measure_budget(of, 1, bits=kind).working - plain.working == stack / EXPERTS
    with pytest.raises(ConfigError, match="one of 4, 8, nf4"):
        measure_budget(of, 1, bits="q4")


def test_a_chunk_is_that_of_the_kernel():
    """The toolbox does not import kernels, so that both modules have the number."""
    assert budget.CHUNK == experts.BUDGET


def sizes_of(module):
    """Bytes of the codes and scales of a module of experts."""
    held = [stacks.find_matrices(module, name) for name in ("gate_up_proj", "down_proj")]
    return sum(h.weight.nbytes + h.scale.nbytes for h in held)


def test_what_trains_is_counted_once_and_optimizers_differ():
    of = training("llama", layers=4, length=16)
    trained = of.whole_model.get_nb_trainable_parameters()[0]
    held = {o: measure_budget(of, 1, optimizer=o) for o in ("adamw", "sgd")}
    assert held["adamw"].adapter == 4 * trained
    assert held["adamw"].optimizer == 8 * trained and held["sgd"].optimizer == 0
    with pytest.raises(ConfigError, match="one of adamw"):
        measure_budget(of, 1, optimizer="lion")


def test_a_model_of_pictures_is_refused():
    config = t.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    of = Training(lambda n: t.ViTModel(config), 2, CONFIGS["lora"](), 16)
    with pytest.raises(ConfigError, match="pixel_values"):
        measure_budget(of, 1)


def test_a_model_that_does_not_run_on_meta_says_so():
    class PickyForCausalLM(t.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            with torch.autocast(out.loss.device.type, enabled=False):
                return out

    of = Training(lambda n: PickyForCausalLM(t.LlamaConfig(**LLAMA, num_hidden_layers=n)), 2, CONFIGS["lora"](), 16)
    with pytest.raises(ConfigError, match=r"PickyForCausalLM cannot run on tensors without values.*transformers 5"):
        measure_budget(of, 1)


def test_blocks_without_an_adapter_are_counted():
    model = MODELS["llama"](6)
    config = graft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 3])
    matched = [m.name for m in graft.plan(model, config).matched]
    assert count_adapted_blocks(matched, find_block_classes(model)) == {"LlamaDecoderLayer": (6, 2)}
