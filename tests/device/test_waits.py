# SPDX-License-Identifier: Apache-2.0
"""A forward, a step and a generated token never have the host wait for the device, for every method and optimizer.

The first call of a kind may: it copies what is constant, looks at starts and files, and audits the first gradients.
`ALLOWED` lists what waits later, by file and function, with the reason.
"""

from functools import partial

import pytest
import torch

import graft
from graft import optim
from graft.core.rows import BASE
from graft.inject.parts import get_registry
from graft.model.averaging import Averager
from graft.serving import AdapterSlots
from graft.storage.fsdp2 import Sharding
from tests import models, pair, samples
from tests.conformance.samples import CALLED_CELLS, CELLS, STORES, cells, features
from tests.covering import cover
from tests.device import simulated
from tests.device.simulated import WAITS
from tests.inject import test_parameters as experts
from tests.methods import test_shadow as shadow
from tests.methods import test_xlora as xlora
from tests.prompts import samples as prompts

pytestmark = [
    pytest.mark.skipif(simulated.WHY_NOT is not None, reason="only the simulated device tells of waits"),
    pytest.mark.filterwarnings("ignore"),  # samples call them forth on purpose: tests/warned.py
]

CUDA = torch.device("cuda:0")
ROWS = ["default", "other", BASE, "default", "other"]
ALLOWED = {
    "core/finite.py:max_magnitudes": "the audit after the first backward pass that reaches all layers, once",
    "methods/lora/alora.py:find_offsets": "aLoRA in `generate`, once per prompt: says which rows do not invoke it",
    "methods/adalora/allocator.py:allocate": "AdaLoRA's config holds what stays; one read per allocation",
    "methods/adamss.py:of": "AdaMSS freezes parameters by their scores; one read per choice",
    "kernels/waits.py:differences": "experts by grouped products: how many rows each has, once per layer and call",
    "kernels/summed.py:_multiply_grouped": "torch's grouped product, which reads them without a kernel for the dtype",
    "serving/layer.py:move_to_devices": "an adapter that enters a slot, by one copy per dtype",
    "kernels/waits.py:_constant": "rows or slots in an arrangement that no batch before had",
}
folder = xlora.folder


def waiting(act) -> dict[str, int]:
    """How often a call waits, by place."""
    WAITS.found.clear()
    with WAITS.watch("it"):
        act()
    found: dict[str, int] = {}
    for (_, place), n in WAITS.found.items():
        found[place.split()[0]] = found.get(place.split()[0], 0) + n
    return found


def check(act, allowed=()):
    """A second call waits nowhere but in these places."""
    act()
    found = waiting(act)
    assert not {place: n for place, n in found.items() if place not in allowed}, "waits for the device"


def there(batch):
    return {k: v.to(CUDA) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def forward(model, inputs, **options):
    with torch.no_grad():
        return models.output(model, {**inputs, **options})


def step(model, inputs, **options):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-4)
    models.output(model, {**inputs, **options}).square().mean().backward()
    optimizer.step()


def check_all(model, inputs, rows=None, trains=True):
    """Forward and training step, of one adapter and of rows with several."""
    for options in ({}, {"adapter_names": rows}) if rows else ({},):
        check(lambda o=options: forward(model.eval(), inputs, **o))
        if trains:
            check(lambda o=options: step(model.train(), inputs, **o), ["core/finite.py:max_magnitudes"])


# methods


LINEAR = [cell for cell in (*CELLS, *CALLED_CELLS) if cell.layer.name == "linear"]  # each sample that takes one
OTHERS = [cell for cell in cells([s for s in samples.LAWS if s.config]) if cell.layer.name != "linear"]
CASES = [c for c in [*LINEAR, *cover("waits", OTHERS, features)] if c.store is STORES[0]]


@pytest.mark.parametrize("cell", CASES, ids=str)
def test_layers(cell):
    names = ("default", "other") if cell.sample.together else ("default",)
    model = cell.trained(names).to(CUDA)
    inputs = {"x": cell.inputs().to(CUDA)}
    if cell.sample.needs:
        needed = cell.sample.needs
        inputs |= there(needed(inputs["x"].cpu()))
    trains = any(p.requires_grad for p in model.parameters())
    run = lambda **options: model(inputs["x"], **{k: v for k, v in inputs.items() if k != "x"}, **options)
    for options in ({}, {"adapter_names": ROWS}) if len(names) > 1 else ({},):
        model.eval()
        with torch.no_grad():
            check(lambda o=options: run(**o))
        if trains:
            model.train()
            check(lambda o=options: run(**o).square().mean().backward(), ["core/finite.py:max_magnitudes"])


PLAIN = {s.method: s for s in [*samples.each("plain", "llama"), *samples.SAMPLES][::-1] if s.model == "llama"}


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_language_models(name):
    sample = PLAIN[name]
    model = pair.adapt(graft, sample)
    both = name != "ADALORA"
    if both:
        model.add_adapter("other", sample.config(graft))
    pair.randomize(model, sample).to(CUDA)
    inputs = there(models.inputs("llama"))
    if name == "POLY":
        inputs["task_ids"] = torch.tensor([0, 1, 0], device=CUDA)
    rows = ["default", "other", BASE] if both else None
    for options in ({}, {"adapter_names": rows}) if rows else ({},):
        check(lambda o=options: model.eval().generate(**inputs, min_new_tokens=3, max_new_tokens=3, **o))
    models.checkpoint(model)
    model.enable_input_require_grads()
    check_all(model, inputs, rows)


def alora():
    config = dict(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[11, 10])
    model = graft.get_peft_model(models.make("llama"), graft.LoraConfig(**config)).to(CUDA)
    model.add_adapter("other", graft.LoraConfig(**{**config, "alora_invocation_tokens": [10]}))
    return model.to(CUDA)


def test_alora():
    model, inputs = alora(), there(models.inputs("llama"))
    rows = ["default", "other", "default"]
    check_all(model, inputs, rows)
    check_all(model, {**inputs, "alora_offsets": [2, None, 3]}, rows)
    for options in ({}, {"adapter_names": rows}):
        few, many = (partial(model.generate, **inputs, **options, min_new_tokens=n, max_new_tokens=n) for n in (2, 5))
        few()
        found = waiting(few)
        assert set(found) == {"methods/lora/alora.py:find_offsets"}
        assert found == waiting(many)  # per prompt, not per token


def test_alora_says_on_a_device_where_it_does_not_act():
    with pytest.warns(UserWarning, match="invocation tokens of aLoRA adapter 'default' are not in rows"):
        forward(alora(), there(models.inputs("llama")))


def test_arrow():
    config = dict(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = graft.get_peft_model(models.make("llama"), graft.LoraConfig(**config), "x")
    for name in ("y", "z"):
        model.add_adapter(name, graft.LoraConfig(**config, lora_alpha=5))
    arrow = graft.ArrowConfig(top_k=2, rng_seed=5)
    model.add_adapter("router", graft.LoraConfig(**config, arrow_config=arrow))
    models.nudged(model).set_adapter("router")
    model.to(CUDA)
    check(lambda: forward(model, there(models.inputs("llama"))))


@pytest.mark.parametrize("layerwise", [False, True])
def test_xlora(folder, layerwise):
    model = xlora.mixture(graft, folder, layerwise_scalings=layerwise, top_k_lora=2).to(CUDA)
    check_all(model, there(models.inputs("llama")))


def told():
    """Models of which a call says something as numbers of the host: (model, inputs, arguments)."""
    timed = graft.get_peft_model(models.make("mlp"), graft.TLoraConfig(r=2, target_modules=["fc1", "fc2"]))
    for t in (7, torch.tensor([7]), torch.tensor([1, 2, 3])):
        yield timed, {"x": torch.randn(3, 10)}, {"timestep": t}
    config = dict(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    steered = graft.get_peft_model(models.make("llama"), graft.SteeringConfig(task_type="CAUSAL_LM"))
    for c in (2.0, [1.0, 0.0, 2.0]):
        yield steered, models.inputs("llama"), {"steering_coefficient": c}
    poly = graft.get_peft_model(models.make("llama"), graft.PolyConfig(**config, n_tasks=3))
    prompt = graft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=3, task_type="CAUSAL_LM")
    for model in (poly, graft.get_peft_model(models.make("llama"), prompt)):
        for ids in ([0, 1, 2], torch.tensor([0, 1, 2])):
            yield model, models.inputs("llama"), {"task_ids": ids}


def test_numbers_of_the_host_are_copied_without_a_wait():
    for model, inputs, arguments in told():
        check(partial(forward, model.to(CUDA).eval(), there(inputs), **arguments))
    timed, inputs, _ = next(told())
    timed, x = timed.to(CUDA), inputs["x"].to(CUDA)

    def within():
        with timed.timestep(7):
            timed(x)

    check(within)


def test_shadow():
    model, inputs = shadow.two().to(CUDA), there(models.inputs("llama"))
    check_all(model, {**inputs, "labels": inputs["input_ids"]}, ["default", "b", "default"])


def test_adaption_prompt():
    config = graft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
    check_all(graft.get_peft_model(models.make("llama"), config).to(CUDA), there(models.inputs("llama")))


def test_adapters_of_different_scalings_and_heads():
    config = dict(r=2, target_modules=["fc1"], modules_to_save=["head"])
    model = graft.get_peft_model(models.make("mlp"), graft.LoraConfig(**config))
    model.add_adapter("other", graft.LoraConfig(**config, lora_alpha=3))
    rows = ["default", "default", "other", "other"]
    check_all(model.to(CUDA), {"x": torch.randn(4, 4, 10, device=CUDA)}, rows)


@pytest.mark.parametrize("name", experts.MODELS)
def test_experts(name):
    """A product of few rows for each expert in use: how many, the router has decided on the device."""
    model = experts.on_stacks(graft, name, model=experts.base(name).to(CUDA))
    layers = sum(m.endswith("experts") for m, _ in model.named_modules())
    ids = experts.IDS.to(CUDA)
    act = lambda: model(ids)
    with torch.no_grad():
        act()
        found = waiting(act)
    found.pop("kernels/summed.py:_multiply_grouped", 0)  # torch's, not graft's
    grouped = name != "llama4"  # which multiplies all experts by all rows
    assert found == ({"kernels/waits.py:differences": layers} if grouped else {})


# prompts


@pytest.mark.parametrize("sample", [s for s in prompts.SAMPLES if s.name != "lstm"], ids=str)
def test_prompts(sample):
    model, inputs = prompts.adapt(graft, sample).to(CUDA), there(models.inputs("llama"))
    if sample.method == "MULTITASK_PROMPT_TUNING":
        inputs["task_ids"] = torch.tensor([0, 1, 2], device=CUDA)
    if sample.method == "CPT":
        inputs["input_type_mask"] = torch.full_like(inputs["input_ids"], 4)
    check(lambda: model.eval().generate(**inputs, min_new_tokens=3, max_new_tokens=3))
    check_all(model, {**inputs, "labels": inputs["input_ids"]})
    check(
        lambda: model.train()(**inputs, labels=inputs["input_ids"]).loss.backward(), ["core/finite.py:max_magnitudes"]
    )


@pytest.mark.differs(
    "Poly and multitask prompts: `task_ids` that are out of range, on a GPU; CPT: no label that counts"
)
def test_tasks_are_checked_on_the_device():
    sample = prompts.first("MULTITASK_PROMPT_TUNING")
    model = prompts.adapt(graft, sample).to(CUDA)
    with pytest.raises(RuntimeError, match="task_ids must be whole numbers from 0 to 2"):
        forward(model, there(models.inputs("llama")), task_ids=torch.tensor([0, 1, 3], device=CUDA))


# optimizers and allocators


def trained(config):
    model = graft.get_peft_model(models.make("llama"), config).to(CUDA).train()
    forward(model, there(models.inputs("llama")))
    return model


OPTIMIZERS = {
    "loraplus": lambda model: optim.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4),
    "lorapro": lambda model: optim.create_lorapro_optimizer(model, torch.optim.SGD, lr=1e-3),
    "muon": lambda model: optim.create_muon_optimizer(model, lr=1e-3),
    "lorafa": lambda model: optim.create_lorafa_optimizer(model, lr=1e-3),
    "riemannian": lambda model: optim.create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    model = trained(graft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    optimizer, inputs = OPTIMIZERS[name](model), there(models.inputs("llama"))

    def act():
        models.output(model, inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    check(act)


def test_adalora_waits_once_per_allocation():
    config = dict(init_r=4, target_r=2, total_step=6, tfinal=2, target_modules=["q_proj", "down_proj"])
    model = trained(graft.AdaLoraConfig(**config, task_type="CAUSAL_LM"))
    inputs = there(models.inputs("llama"))
    for at in range(6):
        step(model, inputs)
        found = waiting(lambda at=at: model.base_model.update_and_allocate(at))
        if at < 5:
            assert found == ({} if at == 0 else {"methods/adalora/allocator.py:allocate": 1})
        model.zero_grad()
    step(model, inputs)
    assert waiting(lambda: model.base_model.update_and_allocate(6)) == {}


def test_adamss_waits_once_per_choice():
    config = dict(r=4, num_subspaces=3, use_asa=True, init_warmup=0, final_warmup=9, mask_interval=2)
    model = trained(graft.AdamssConfig(**config, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for at in range(4):
        step(model, there(models.inputs("llama")))
        found = waiting(lambda at=at: model.base_model.update_and_allocate(at))
        assert found == ({} if at % 2 else {"methods/adamss.py:of": 1})


# slots


@pytest.mark.parametrize("keep", [True, False])
def test_slots(tmp_path, keep):
    for seed, name in enumerate("abc"):
        with models.seeded(seed):
            config = graft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
            graft.get_peft_model(models.make("llama"), config).save_pretrained(tmp_path / name)
    slots = AdapterSlots(models.make("llama").to(CUDA), 2, 4, ["q_proj", "v_proj", "down_proj"], keep_gathered=keep)
    for name in "abc":
        slots.load(name, tmp_path / name)
    inputs, mix = there(models.inputs("llama")), ["a", "b", BASE]
    with torch.no_grad():
        check(lambda: slots(**inputs, adapter_names=mix))
        check(lambda: slots.generate(**inputs, adapter_names=mix, min_new_tokens=3, max_new_tokens=3))
        check(lambda: slots(**inputs, adapter_names="a"))
        new = ["b", BASE, "a"] if keep else ["b", BASE, "b"]
        assert waiting(lambda: slots(**inputs, adapter_names=new)) == {"kernels/waits.py:_constant": 1}
        assert waiting(lambda: slots.pin("c")) == {"serving/layer.py:move_to_devices": 1}  # one enters, of six tensors


# the list


def test_averages_on_a_sharded_base(monkeypatch):
    monkeypatch.setattr(Averager, "agree", lambda self: None)  # once per change of what trains
    model = graft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), graft.LoraConfig(target_modules=["0"]))
    registry = get_registry(model.to(CUDA).train())
    registry.averager = Averager(registry, Sharding([], [0], [], []))
    check(lambda: step(model, {"input": torch.randn(3, 8, device=CUDA)}), ["core/finite.py:max_magnitudes"])
    assert registry.averager.parameters[0].grad is not None


def test_the_list_names_what_there_is():
    for place in ALLOWED:
        file, name = place.split(":")
        assert f"def {name}(" in (simulated.SRC / file).read_text()
