# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes: a model that transformers has quantized, beside PEFT and by itself."""

import copy
import importlib
import inspect
import warnings

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import graft
from graft.compat.peft import names as compat
from graft.compat.peft.layers import BNB, PREFIXES, layer_class
from graft.compat.peft.modules import resolve
from graft.storage.find import find_store
from graft.storage.quantized import Quantized
from tests.looks import layers
from tests.models import adapted, disturb, seeded

FOUR = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
QUANTIZED = {"4": FOUR, "8": dict(load_in_8bit=True)}
with seeded(6):
    IDS = torch.randint(0, 120, (3, 9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=120)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    where = tmp_path_factory.mktemp("llama")
    with seeded(0):
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).save_pretrained(where)
    return where


@pytest.fixture(params=QUANTIZED)
def bits(request):
    return request.param


def load(folder, bits=None, dtype=torch.float32):
    options = {} if bits is None else {"quantization_config": BitsAndBytesConfig(**QUANTIZED[bits])}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def plain(model):
    """Keep a model for PEFT from being rearranged for AVX512-BF16."""
    for m in model.modules():
        if isinstance(m, bnb.nn.Linear4bit):
            m.support_avx512bf16_for_cpu = False
    return model


def exact(model):
    """Keep layers of 8 bits from rounding their inputs."""
    for m in model.modules():
        if isinstance(m, bnb.nn.Linear8bitLt):
            m.training = True
    return model


def logits(model, **kwargs):
    return model(input_ids=IDS, **kwargs).logits


def far(a, b):
    return ((a - b).norm() / b.norm()).item()


LINEAR = dict(target_modules=["q_proj", "v_proj", "down_proj"])
FORWARD = {  # the same outputs; bits on which merging is right in PEFT
    "LORA": (dict(r=4), "48"),
    "LORA-dora": (dict(r=4, use_dora=True), "4"),
    "OFT": (dict(oft_block_size=8), "48"),
    "BOFT": (dict(boft_block_size=8), "48"),
    "VERA": (dict(r=8), "48"),
    "MISS": (dict(r=8), "48"),
    "HIRA": (dict(r=4), "48"),
    "ROAD": (dict(group_size=8), "48"),
    "IA3": (dict(feedforward_modules=["down_proj"]), ""),
    "FOURIERFT": (dict(n_frequency=50), ""),
    "LN_TUNING": (dict(target_modules=["input_layernorm", "norm"]), ""),
    "PROMPT_TUNING": (dict(task_type="CAUSAL_LM", num_virtual_tokens=3), ""),
    "PREFIX_TUNING": (dict(task_type="CAUSAL_LM", num_virtual_tokens=3), ""),
}


@pytest.mark.parametrize("name", FORWARD)
def test_outputs_are_those_of_peft(name, bits, folder):
    options, merges = FORWARD[name]
    method = name.partition("-")[0]
    options = options if method in ("LN_TUNING", "PROMPT_TUNING", "PREFIX_TUNING") else {**LINEAR, **options}
    ours, theirs = (
        lib.get_peft_model(plain(load(folder, bits)), lib.PEFT_TYPE_TO_CONFIG_MAPPING[method](**copy.deepcopy(options)))
        for lib in (graft, peft)
    )
    disturb(ours)
    peft.set_peft_model_state_dict(theirs, graft.get_peft_model_state_dict(ours))
    for model in (ours.eval(), theirs.eval()):
        exact(model)
    assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    if bits in merges:
        ours.merge_adapter()
        theirs.merge_adapter()
        assert far(logits(ours), logits(theirs)) < 0.02


BESIDE = {
    "ADAPTION_PROMPT": dict(adapter_len=4, adapter_layers=2),
    "POLY": dict(r=4, n_tasks=2, n_skills=2, n_splits=2, target_modules=["q_proj", "down_proj"]),
    "SHADOW": dict(),
    "CPT": dict(cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4]),
    "MULTITASK_PROMPT_TUNING": dict(num_virtual_tokens=3, num_tasks=2, num_ranks=2),
    "PREFIX_TUNING": dict(num_virtual_tokens=3),
    "P_TUNING": dict(num_virtual_tokens=3, encoder_hidden_size=16),
    "CARTRIDGE": dict(num_virtual_tokens=3),
    "TRAINABLE_TOKENS": dict(target_modules=["embed_tokens"], token_indices=[1, 2, 50]),
    "LN_TUNING": dict(target_modules=["input_layernorm", "norm"]),
}


@pytest.mark.parametrize("method", BESIDE)
def test_what_acts_beside_the_linear_layers_is_as_on_dense_ones(method, bits, folder):
    found = []
    for dense in (False, True):
        base = plain(load(folder, bits))
        for parent in list(base.modules()) if dense else ():
            for name, m in parent.named_children():
                if isinstance(find_store(m), Quantized):
                    setattr(parent, name, find_store(m).dense(m))
        with seeded(1):
            config = graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](task_type="CAUSAL_LM", **copy.deepcopy(BESIDE[method]))
            model = exact(disturb(graft.get_peft_model(base, config)).eval())
        tasks = {"task_ids": torch.tensor([0, 1, 0])} if method in ("POLY", "MULTITASK_PROMPT_TUNING") else {}
        model(input_ids=IDS, labels=IDS, **tasks).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    ours, theirs = found
    assert ours.keys() == theirs.keys() and ours
    for name, grad in theirs.items():
        assert (ours[name] is None) == (grad is None), name
        if grad is not None:
            assert_close(
                ours[name],
                grad,
                rtol=1e-3,
                atol=1e-4 * float(grad.abs().max()) + 1e-7,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def trained(model, steps=3, **kwargs):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS, **kwargs).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    return model


LORA = dict(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")


def with_lora(base, **options):
    return adapted(base, graft.LoraConfig(**{**LORA, **options}), seed=2, scale=0)


@pytest.mark.parametrize("dora", [False, True])
def test_train_save_and_load(bits, dora, folder, tmp_path):
    model = trained(with_lora(load(folder, bits), use_dora=dora).train()).eval()
    assert len(layers(model)) == 14 and all(m.quantization_backend == f"bnb {bits}bit" for m in layers(model).values())
    exact(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        again = graft.PeftModel.from_pretrained(load(folder, bits), tmp_path, **options)
        assert torch.equal(logits(exact(again.eval())), expected)
    whole = graft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**QUANTIZED[bits]), dtype=torch.float32
    )
    assert torch.equal(logits(exact(whole.eval())), expected)
    dense = graft.PeftModel.from_pretrained(load(folder), tmp_path).eval()
    assert 0 < far(logits(dense), expected) < (0.5 if bits == "4" else 0.05)
    for key, layer in layers(dense).items():
        assert torch.equal(layer.lora_B["default"].weight, layers(model)[key].lora_B["default"].weight)
        layer.base_layer.weight.data = layers(model)[key].W0
    assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)
    theirs = peft.PeftModel.from_pretrained(plain(load(folder, bits)), tmp_path)
    assert_close(logits(exact(theirs.eval())), expected, rtol=1e-4, atol=1e-4)


def test_merged_models_are_saved_and_loaded(bits, folder, tmp_path):
    model = exact(disturb(with_lora(load(folder, bits)).eval()))
    before = logits(model)
    dense = copy.deepcopy(model).merge_and_unload(dequantize=True)
    assert_close(logits(dense), before, rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path / "dense")
    assert_close(logits(load(tmp_path / "dense")), before, rtol=1e-4, atol=1e-4)
    packed = model.merge_and_unload()
    assert packed.is_quantized and type(packed.model.layers[0].mlp.up_proj).__module__ == "bitsandbytes.nn.modules"
    exact(packed).save_pretrained(tmp_path / "packed")
    assert_close(logits(exact(load(tmp_path / "packed"))), logits(packed), rtol=1e-4, atol=1e-4)
    assert far(logits(packed), before) < 0.7


def test_a_model_that_is_plain_in_part_is_saved_and_loaded(bits, folder, tmp_path):
    config = graft.LoraConfig(target_modules=["q_proj", "down_proj"])
    dense = adapted(load(folder, bits), config).merge_and_unload(dequantize=True)
    expected = logits(exact(dense))
    dense.save_pretrained(tmp_path)
    again = exact(load(tmp_path))
    assert type(again.model.layers[0].mlp.down_proj) is nn.Linear
    assert type(again.model.layers[0].mlp.up_proj).__module__ == "bitsandbytes.nn.modules"
    assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_k_bit_preparation_and_checkpointing(bits, reentrant, folder):
    found = []
    for prepare in (graft.prepare_model_for_kbit_training, peft.prepare_model_for_kbit_training, None):
        base = plain(load(folder, bits, torch.bfloat16))
        if prepare is None:  # without checkpointing
            graft.prepare_model_for_kbit_training(base, False)
        else:
            prepare(base, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            assert base.is_gradient_checkpointing
        model = with_lora(base)
        facts = {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()}
        model = disturb(model).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append((facts, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (facts, ours), (theirs, other), (_, kept) = found
    assert facts == theirs and ours.keys() == other.keys() == kept.keys()
    for name, grad in ours.items():
        assert_close(grad, other[name], rtol=1e-4, atol=1e-4)
        assert_close(grad, kept[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prepared", [False, True])
def test_half_precision(bits, prepared, folder):
    base = load(folder, bits, torch.bfloat16)
    if prepared:
        graft.prepare_model_for_kbit_training(base)
    model = disturb(with_lora(base).eval())
    hidden = torch.float32 if prepared else torch.bfloat16
    exact(model)
    before = logits(model)
    assert before.dtype == hidden
    model.merge_adapter()
    held = layers(model)["model.layers.0.mlp.up_proj"].base_layer
    assert bits == "8" or held.weight.quant_state.dtype == torch.bfloat16
    assert far(logits(model), before) < 0.7
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    dense = model.merge_and_unload(dequantize=True)
    assert dense.model.layers[0].mlp.up_proj.weight.dtype == hidden
    assert far(logits(dense), before) < (1e-4 if prepared and bits == "8" else 0.03)


def test_a_prompt_gets_gradients_after_the_model_has_run(bits, folder):
    """A forward pass in eval mode rearranges weights where the CPU has AVX512-BF16."""
    base = load(folder, bits)
    with torch.no_grad():
        expected = logits(base)
    config = graft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = graft.get_peft_model(base, config)
    with model.disable_adapter():
        assert far(logits(model), expected) < 0.02
    grads = []
    for net in (model, graft.get_peft_model(load(folder, bits), config)):
        with seeded(1):
            nn.init.normal_(net.prompt_encoder["default"].embedding.weight)
        exact(net)(input_ids=IDS, labels=IDS).loss.backward()
        grads.append(net.prompt_encoder["default"].embedding.weight.grad)
    assert far(grads[0], grads[1]) < 0.05
    trained(exact(model))


def test_rows_of_a_batch_and_generate(bits, folder):
    model = exact(disturb(with_lora(load(folder, bits)).eval()))
    with seeded(8):
        model.add_adapter("other", graft.LoraConfig(**{**LORA, "use_dora": True, "init_lora_weights": False}))
    exact(model.eval())
    rows = ["default", "other", "__base__"]
    mixed = logits(model, adapter_names=rows)
    tokens = model.generate(input_ids=IDS, adapter_names=rows, max_new_tokens=4, do_sample=False)
    for i, name in enumerate(rows[:2]):
        model.set_adapter(name)
        assert_close(mixed[i], logits(model)[i], rtol=1e-4, atol=1e-4)
        alone = model.generate(input_ids=IDS[i : i + 1], max_new_tokens=4, do_sample=False)
        assert torch.equal(tokens[i : i + 1], alone)
    with model.disable_adapter():
        assert_close(mixed[2], logits(model)[2], rtol=1e-4, atol=1e-4)
    assert_close(mixed[2], logits(exact(plain(load(folder, bits))))[2], rtol=1e-4, atol=1e-4)


def test_what_quantization_lost_comes_back(bits, folder):
    dense = logits(load(folder))
    model = exact(with_lora(load(folder, bits), r=12, lora_alpha=18))
    before = far(logits(model), dense)
    graft.replace_lora_weights_loftq(model, str(folder))
    assert 0 < far(logits(model), dense) < 0.8 * before
    seen = []

    def refuse(net, name):
        seen.append(name)
        return False

    after = logits(model)
    graft.replace_lora_weights_loftq(model, str(folder), callback=refuse)
    assert len(seen) == 14 and torch.equal(logits(model), after)


@pytest.mark.parametrize("method", ["LORA", "ADALORA", "IA3", "ROAD", "HIRA", "RANDLORA", "PVERA"])
def test_isinstance_agrees_with_peft(method, bits, folder):
    options = dict(ADALORA=dict(total_step=9), ROAD=dict(group_size=8), IA3=dict(feedforward_modules=["down_proj"]))
    options = {**LINEAR, **options.get(method, {})}
    ours, theirs = (
        dict(lib.get_peft_model(load(folder, bits), lib.PEFT_TYPE_TO_CONFIG_MAPPING[method](**options)).named_modules())
        for lib in (graft, peft)
    )
    where = f"tuners.{compat.folder(method)}"
    for module in (f"{where}.bnb", f"{where}.layer"):
        held = importlib.import_module(f"peft.{module}")
        for name, kind in inspect.getmembers(held, inspect.isclass):
            if kind.__module__ == held.__name__ and issubclass(kind, nn.Module):
                own = layer_class(method, name)
                if own is None:
                    continue
                found = {key for key, m in ours.items() if isinstance(m, own)}
                assert found == {key for key, m in theirs.items() if isinstance(m, kind)}, name
    four, eight = (resolve(f"peft.{where}.bnb", f"{PREFIXES.get(method, '')}{kind}") for kind in BNB)
    assert sum(isinstance(m, four if bits == "4" else eight) for m in ours.values()) == 6
