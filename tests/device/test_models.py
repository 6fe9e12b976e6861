# SPDX-License-Identifier: Apache-2.0
"""What is done with whole models, on a device: equal to the CPU.

A `scenario` builds on the device that it gets, and yields tensors: outputs and gradients, no factors, as decompositions
of a device may have other signs.
"""

from __future__ import annotations

import contextlib
from functools import partial
from itertools import chain

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing import assert_close

import graft
from graft.core.random import DrawOnCPU
from graft.kernels import decomposed, low_rank, narrow, one_product, segments
from graft.kernels.eager import Function, VmapFunction
from graft.serving import AdapterSlots
from tests import models
from tests.conformance.samples import CELLS
from tests.device.test_methods import DEVICE, default
from tests.inject import test_attention as attention
from tests.inject import test_parameters as experts
from tests.methods import test_arrow as arrow
from tests.methods import test_shadow as shadow
from tests.methods import test_xlora as xlora
from tests.prompts import samples as prompts

pytestmark = pytest.mark.filterwarnings("ignore")  # what is warned of is tested elsewhere, on the CPU
CPU = torch.device("cpu")
ROWS = ["default", "__base__", "other"]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def equal(scenario, *args, tolerance=1e-4):
    """Both devices give the same tensors."""
    found = []
    for device in (CPU, DEVICE):
        models.seed(3)
        found.append([])
        for t in scenario(device, *args):
            assert t.device == device
            found[-1].append(t.detach().float().cpu())
    assert len(found[0]) == len(found[1]) > 0
    for here, there in zip(*found):
        atol = tolerance * max(1.0, float(here.abs().max()))
        assert_close(there, here, rtol=tolerance, atol=atol)


def base(device, name="llama", tied=False):
    model = models.make(name) if name in models.MODELS else prompts.make(name)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device)


def batch(device, name="llama"):
    return {k: v.to(device) for k, v in models.inputs(name).items()}


def lora(**values):
    return graft.LoraConfig(**{"r": 3, "lora_alpha": 4, "target_modules": TARGETS, **values})


@torch.no_grad()
def moved(model, spread=0.3):
    """Move all that trains, by values that depend on its name alone."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            with models.seeded(sum(map(ord, name))):
                p.add_((torch.randn(p.shape) * spread).to(p))
    return model.eval()


def two(device, config=lora, name="llama", base=base, **values):
    """A model with two adapters that do something."""
    model = graft.get_peft_model(base(device, name), config(**values))
    moved(model).add_adapter("other", config(**values))
    model.set_adapter("other")
    moved(model).set_adapter("default")
    return model


def logits(model, device, name="llama", **options):
    return models.output(model, {**batch(device, name), **options})


def step(model, call):
    """The gradients of a training step, by name."""
    model.zero_grad()
    call().square().mean().backward()
    yield from (p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None)


def run(model, device, name="llama", **options):
    """Outputs and gradients."""
    yield logits(model, device, name, **options)
    yield from step(model, lambda: logits(model, device, name, **options))


def written(model, device, **options):
    ids = {k: v for k, v in batch(device).items() if k in ("input_ids", "attention_mask")}
    return model.generate(**ids, min_new_tokens=4, max_new_tokens=4, do_sample=False, **options)


# generate, rows, patterns, dtypes


@pytest.mark.parametrize("how", [{}, {"adapter_names": ROWS}, {"adapter_names": ROWS, "num_beams": 2}], ids=str)
@pytest.mark.parametrize("name, targets", [("llama", TARGETS), ("gpt2", ["c_attn", "c_fc"])])
def test_generate(name, targets, how):
    def scenario(device):
        model = two(device, name=name, target_modules=targets)
        yield written(model, device, **how)

    equal(scenario)


@pytest.mark.parametrize("name, targets", [("llama", [*TARGETS, "embed_tokens"]), ("gpt2", ["c_attn", "wte"])])
def test_rows_of_a_batch(name, targets):
    def scenario(device):
        model = two(device, name=name, target_modules=targets, use_dora=name == "gpt2")
        model.set_requires_grad(["default", "other"])
        yield from run(model, device, name, adapter_names=ROWS)

    equal(scenario)


def test_patterns_and_layers_of_their_own_ranks():
    values = dict(rank_pattern={"v_proj": 5, "layers.1.q_proj": 2}, alpha_pattern={"down_proj": 9}, use_rslora=True)

    def scenario(device):
        model = two(device, **values)
        yield from run(model, device)
        yield logits(model, device, adapter_names=ROWS)
        yield from (t for t in graft.get_peft_model_state_dict(model).values())

    equal(scenario)


@pytest.mark.parametrize("method", ["LORA", "DORA", "OFT", "IA3"])
def test_a_base_in_half_precision(method):
    configs = {
        "LORA": lora,
        "DORA": partial(lora, use_dora=True),
        "OFT": lambda: graft.OFTConfig(oft_block_size=4, target_modules=TARGETS),
        "IA3": lambda: graft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    }

    def scenario(device):
        model = two(device, configs[method], base=lambda d, n: base(d, n).bfloat16())
        yield from run(model, device)
        yield logits(model, device, adapter_names=ROWS)

    equal(scenario, tolerance=0.05)


# heads and token rows


def test_heads(tmp_path):
    def scenario(device):
        config = partial(lora, task_type="SEQ_CLS", modules_to_save=["score"])
        model = graft.get_peft_model(base(device, "llama-seq"), config())
        with models.seeded(4):
            model.add_adapter("other", config(), heads={"score": nn.Linear(24, 5, bias=False)})
        model.set_requires_grad(["default", "other"])
        moved(model)
        for name in ("other", "default"):
            model.set_adapter(name)
            yield from run(model, device)
        model.set_requires_grad(["default", "other"])
        yield logits(model, device, adapter_names=ROWS).nan_to_num(neginf=0.0)
        folder = tmp_path / device.type
        model.save_pretrained(folder)
        there = graft.PeftModel.from_pretrained(base(device, "llama-seq"), folder)
        yield logits(there, device)

    equal(scenario)


@pytest.mark.parametrize("tied", [False, True])
def test_token_rows_and_copies(tied, tmp_path):
    def scenario(device):
        for values in (
            dict(trainable_token_indices={"embed_tokens": [1, 4, 7]}),
            dict(modules_to_save=["embed_tokens"], ensure_weight_tying=tied),
            dict(target_modules=["embed_tokens", "lm_head"]),
        ):
            model = two(device, base=partial(base, tied=tied), **values)
            yield from run(model, device)
            yield logits(model, device, adapter_names=ROWS)
            yield written(model, device)
            folder = tmp_path / f"{device.type}{len(values)}"
            model.save_pretrained(folder, save_embedding_layers=False)
            yield logits(graft.PeftModel.from_pretrained(base(device, tied=tied), folder), device)
            yield logits(model.merge_and_unload(), device)

    equal(scenario)


# starts


def corda(device, model, config):
    graft.preprocess_corda(model, config, lambda: logits(model, device))


def loraga(device, model, config):
    def calls():
        x = batch(device)
        model(**x, labels=x["input_ids"]).loss.backward()

    graft.preprocess_loraga(model, config, calls)


STARTS = {
    "pissa": dict(init_lora_weights="pissa"),
    "pissa_niter_4": dict(init_lora_weights="pissa_niter_4"),
    "olora": dict(init_lora_weights="olora"),
    "loftq": lambda: dict(init_lora_weights="loftq", loftq_config=graft.LoftQConfig(loftq_bits=4)),
    "corda": lambda: dict(init_lora_weights="corda", corda_config=graft.CordaConfig()),
    "lora_ga": lambda: dict(init_lora_weights="lora_ga", lora_ga_config=graft.LoraGAConfig()),
    "orthogonal": dict(init_lora_weights="orthogonal", r=4),
    "mica": dict(init_lora_weights="mica"),
}
PREPARED = {"corda": corda, "lora_ga": loraga}


@pytest.mark.parametrize("start", STARTS)
def test_starts(start, tmp_path):
    def scenario(device):
        values = STARTS[start]() if callable(STARTS[start]) else STARTS[start]
        model, config = base(device), lora(**values)
        if start in PREPARED:
            PREPARED[start](device, model, config)
        model = graft.get_peft_model(model, config)
        yield logits(model, device)
        with model.disable_adapter():
            yield logits(model, device)
        if start in PREPARED:
            model.zero_grad()
        before = logits(model, device)
        folder = tmp_path / device.type
        model.save_pretrained(folder)
        for where in (CPU, DEVICE):  # what was taken out of the base comes from the file
            there = graft.PeftModel.from_pretrained(base(where), folder)
            assert_close(logits(there, where).cpu(), before.cpu(), rtol=1e-4, atol=1e-4)

    equal(scenario, tolerance=1e-3)


def test_eva():
    def scenario(device):
        rows = [{k: v[i:] for k, v in batch(device).items()} for i in range(3)]
        config = lora(init_lora_weights="eva", eva_config=graft.EvaConfig(rho=1.0))
        model = graft.get_peft_model(base(device), config, low_cpu_mem_usage=True)
        graft.initialize_lora_eva_weights(model, rows, show_progress_bar=False)
        yield logits(model, device)
        for name, p in sorted(model.named_parameters()):
            if "lora_A" in name:
                yield p.mT @ p  # its directions, whatever their signs

    equal(scenario, tolerance=2e-3)


def test_loftq_values_for_an_adapter_that_is_there(tmp_path):
    def scenario(device):
        from safetensors.torch import save_file

        file = tmp_path / f"{device.type}.safetensors"
        save_file({k: v.cpu() for k, v in base(device).state_dict().items()}, file)
        model = graft.get_peft_model(base(device), lora())
        with contextlib.suppress(ValueError):  # a base in all its bits
            graft.replace_lora_weights_loftq(model, model_path=str(file))
        yield logits(model, device)

    equal(scenario)


# files into models that run


def files(folder):
    for i, r in enumerate((3, 2)):
        with models.seeded(i):
            model = graft.get_peft_model(models.make("llama"), lora(r=r, lora_alpha=3 + i))
            moved(model, 0.2 + i).save_pretrained(folder / str(i))
    return folder


def test_hot_swap(tmp_path):
    files(tmp_path)

    def scenario(device):
        model = graft.PeftModel.from_pretrained(base(device), tmp_path / "0")
        graft.prepare_model_for_compiled_hotswap(model, target_rank=4)
        for i in (1, 0, 1):
            graft.hotswap_adapter(model, tmp_path / str(i), "default", torch_device=str(device))
            yield logits(model, device)

    equal(scenario)


def test_slots(tmp_path):
    files(tmp_path)

    def scenario(device):
        slots = AdapterSlots(base(device), 2, 4, TARGETS)
        for i in (0, 1):
            slots.load(str(i), tmp_path / str(i))
        for names in (["0", "1", "__base__"], ["1", "1", "0"]):
            yield slots(**batch(device), adapter_names=names).logits
            yield slots.generate(**batch(device), adapter_names=names, min_new_tokens=3, max_new_tokens=3)

    with torch.no_grad():
        equal(scenario)


# combining


KINDS = ["linear", "cat", "svd", "exact", "ties", "ties_svd", "dare_linear", "dare_ties", "magnitude_prune"]


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_adapters(kind):
    def scenario(device):
        model = two(device)
        options = {} if kind in ("linear", "cat", "svd", "exact") else {"density": 0.6}
        models.seed(5)
        with DrawOnCPU():  # DARE draws where the adapters are, as PEFT does
            model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "new", combination_type=kind, **options)
        model.set_adapter("new")
        yield from run(model, device) if kind not in ("svd", "exact", "ties_svd") else [logits(model, device)]

    equal(scenario, tolerance=1e-3)


def test_conversion_to_lora():
    def scenario(device):
        loha = graft.get_peft_model(base(device), graft.LoHaConfig(r=2, target_modules=TARGETS))
        config, values = graft.convert_to_lora(moved(loha), rank=4)
        model = graft.get_peft_model(base(device), config)
        graft.set_peft_model_state_dict(model, values)
        yield logits(model, device)

    equal(scenario, tolerance=1e-3)


def test_mixed_models():
    def scenario(device):
        model = graft.get_peft_model(base(device), lora(), mixed=True)
        model.add_adapter("other", graft.OFTConfig(oft_block_size=4, target_modules=TARGETS))
        for names in ("other", "default"):
            model.set_adapter(names)
            moved(model)
        model.set_adapter(["default", "other"])
        yield from run(model, device)
        yield logits(model.merge_and_unload(), device)

    equal(scenario)


# methods beside layers


@pytest.mark.parametrize("sample", [s for s in prompts.SAMPLES if s.name != "lstm"], ids=str)
def test_prompts(sample, tmp_path):
    def scenario(device, by_default=False):
        there = base(device, sample.model)
        with default(device) if by_default else contextlib.nullcontext():
            models.seed(3)
            model = prompts.adapt(graft, sample, base=there)
        prompts.randomize(model)
        x = {k: v.to(device) for k, v in prompts.batch(sample).items()}
        if sample.method == "CPT":
            x["input_type_mask"] = torch.full_like(x["input_ids"], 4)
        yield model(**x).logits
        model(**x).loss.backward()
        yield from (p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None)
        more = {"task_ids": x["task_ids"]} if "task_ids" in x else {}
        yield written(model, device, **more)
        folder = tmp_path / f"{device.type}{by_default}"
        model.save_pretrained(folder)
        yield from graft.PeftModel.from_pretrained(base(device, sample.model), folder).state_dict().values()

    equal(scenario)
    if DEVICE.type != "cpu":
        for ours, plain in zip(scenario(DEVICE, True), scenario(CPU)):
            assert ours.device == DEVICE
            assert_close(ours.cpu(), plain, rtol=1e-4, atol=1e-4)


def test_heads_with_a_default_device():
    def scenario(device):
        there = base(device, "llama-seq")
        with default(device):
            models.seed(3)
            model = graft.get_peft_model(there, lora(task_type="SEQ_CLS"))
        assert {p.device for p in model.parameters()} == {device}
        yield from run(moved(model), device)

    equal(scenario)


def test_shadow():
    def scenario(device):
        model = shadow.with_shadow(base=base(device))
        model.add_adapter("b", graft.ShadowConfig(task_type="CAUSAL_LM"))
        shadow.moved(model)
        yield from run(model, device)
        yield logits(model, device, adapter_names=["b", "__base__", "default"])
        yield written(model, device)

    equal(scenario)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adaption_prompts(name):
    def scenario(device):
        config = graft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
        model = moved(graft.get_peft_model(base(device, name), config))
        yield from run(model, device, name)
        yield written(model, device)

    equal(scenario)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixtures")
    for i in range(3):
        arrow.saved(root / str(i), i)
    return root


def test_xlora(mixtures):
    def scenario(device):
        there = base(device)
        there.config.use_cache = False
        model = xlora.mixture(graft, mixtures, on=there)
        yield from run(model.train(), device)

    equal(scenario)


def test_arrow(mixtures):
    def scenario(device):
        model = arrow.made(graft, mixtures, base=base(device), tasks=(0, 1), general=(2,))
        with torch.no_grad():
            yield logits(model, device)
        yield written(model, device)

    equal(scenario, tolerance=1e-3)


def test_alora():
    def scenario(device):
        tokens = batch(device)["input_ids"][0, 2:4].tolist()
        model = two(device, task_type="CAUSAL_LM", alora_invocation_tokens=tokens)
        yield from run(model, device)
        yield logits(model, device, adapter_names=ROWS)
        yield written(model, device)

    equal(scenario)


@pytest.mark.parametrize("targets", [attention.WHOLE, attention.OUT])
def test_attention_of_torch(targets):
    def scenario(device):
        model = attention.net_with(targets=targets, model=attention.base().to(device))
        x = attention.X.to(device)
        yield model(x)
        yield from step(model, lambda: model(x))
        yield model.merge_and_unload()(x)

    equal(scenario)


@pytest.mark.parametrize("name", experts.MODELS)
def test_experts(name):
    def scenario(device):
        model = experts.on_stacks(graft, name, model=experts.base(name).to(device))
        call = lambda: model(experts.IDS.to(device)).logits
        yield call()
        yield from step(model, call)
        yield model.merge_and_unload()(experts.IDS.to(device)).logits

    equal(scenario)


# kernels without values: tensors have shapes and devices, and an operation that mixes devices raises


def functions_behind(y):
    """The autograd.Functions that made a tensor."""
    todo, seen = [y.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(n for n, _ in node.next_functions)
    return {type(node)._forward_cls for node in seen if isinstance(node, torch.autograd.function.BackwardCFunction)}


def drawn(*shapes, dtype=torch.float32):
    return [torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_() for shape in shapes]


def of_low_rank():
    x, W, A, B = drawn((80, 12), (20, 12), (3, 12), (20, 3))
    y = low_rank.low_rank_linear(lambda x: x @ W.detach().T, lambda g, W: g @ W, W.detach(), x, A, B, 1.3, 0.2)
    return y, (x, A, B)


def of_few_rows():
    x, W, b, A, B = drawn((8, 12), (20, 12), (20,), (3, 12), (20, 3))
    return low_rank.few_rows_linear(x, W.detach(), b.detach(), A, B, 1.3), (x, A, B)


def of_an_update():
    y, x, A, B = drawn((80, 20), (80, 12), (3, 12), (20, 3))
    return low_rank.add_low_rank(y * 1, x, A, B, 1.3, 0.2), (y, x, A, B)


def of_a_product():
    y, h, B = drawn((80, 20), (80, 3), (20, 3))
    return low_rank.add_product(y * 1, h, B, 1.3), (y, h, B)


def of_dora():
    x, W, b, A, B, ratio = drawn((80, 12), (20, 12), (20,), (3, 12), (20, 3), (20,))
    W, b = W.detach(), b.detach()
    y = decomposed.dora_linear(lambda x: x @ W.T + b, lambda g, W: g @ W, x, W, b, A, B, ratio, 1.3, 0.1)
    return y, (x, A, B, ratio)


def of_dropout():
    (x,) = drawn((80, 12))
    return low_rank.dropout(x, 0.3), (x,)


def of_hadamard():
    factors = drawn((20, 3), (3, 12), (20, 3), (3, 12))
    return one_product.multiply_hadamard(*factors), factors


def of_narrow():
    (A,) = drawn((3, 20))
    return narrow.multiply_widened(A, torch.randn(20, 12, device=DEVICE, dtype=torch.bfloat16)), (A,)


def of_scaled():
    y, h, B, d, b = drawn((80, 20), (80, 3), (20, 3), (3,), (20,))
    return low_rank.add_scaled(y * 1, h, B.detach(), d, b), (y, h, d, b)


def of_one_product():
    x, W, A, B, d, b = drawn((80, 12), (20, 12), (3, 12), (20, 3), (3,), (20,))
    fixed = (t.detach() for t in (A, B))
    call = lambda x, W, bias: x @ W.T
    return low_rank.linear_with(W.detach(), None, x, *fixed, d, b, call, lambda g, W: g @ W), (x, d, b)


def of_segments():
    x, A, B = drawn((160, 12), (3, 12), (20, 3))
    W = torch.randn(20, 12, device=DEVICE)
    groups = segments.group_segments([segments.Segment(80, A, B), segments.Segment(80, None, None)], None, A.dtype)
    return segments.segments_linear(lambda x: x @ W.T, lambda g, W: g @ W, W, x, groups), (x, A, B)


def of_layers():
    """Every method on a linear layer, and VeLoRA, which has a Function more."""
    kinds = {(c.sample.method, c.sample.label == "velora"): c for c in reversed(CELLS) if c.layer.name == "linear"}
    for cell in kinds.values():
        x = torch.zeros(80, cell.inputs().shape[-1], device=DEVICE, requires_grad=True)
        with unset_fake_temporarily():
            model = cell.trained(("default",)).to(DEVICE).train()
        y = model(x)
        yield y, [x, *(p for p in model.parameters() if p.requires_grad)]


ALONE = [
    of_low_rank,
    of_few_rows,
    of_an_update,
    of_a_product,
    of_dora,
    of_dropout,
    of_hadamard,
    of_narrow,
    of_scaled,
    of_one_product,
    of_segments,
]


def test_backward_passes_stay_on_the_device(monkeypatch):
    monkeypatch.setattr(low_rank, "new_seed", lambda: 5)  # a seed is read
    ran = set()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for y, tensors in chain((made() for made in ALONE), of_layers()):
            assert y.device == DEVICE
            ran |= functions_behind(y)
            for t, g in zip(tensors, torch.autograd.grad(y.square().sum(), tensors, allow_unused=True)):
                assert g is None or (g.shape == t.shape and g.device == t.device)
    classes = {*Function.__subclasses__(), *VmapFunction.__subclasses__()} - {VmapFunction}
    all_of_them = {f for f in classes if f.__module__.startswith("graft.kernels.")}
    # between processes; reads how many rows each expert has; looks where memory begins, in one of two
    apart = {"graft.kernels.cuts", "graft.kernels.experts", "graft.kernels.segments"}
    assert {f.__module__ for f in all_of_them - ran} == apart
