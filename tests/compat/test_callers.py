# SPDX-License-Identifier: Apache-2.0
"""What libraries do with a model that has adapters, done by small stand-ins: diffusers and the like are not needed."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import helpers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from graft.compat.peft import shims
from graft.compat.peft.names import import_held
from graft.core.layer import AdapterLayer
from graft.model.functional import disable_input_dtype_casting
from tests import models
from tests.leaves_out import FSDP2_ON_CPUS
from tests.pair import LIBS, adapt, both, close, close_dicts, output, randomize
from tests.raised import refuses
from tests.samples import each, first, mergeable

# FSDP2: parameters of which each process holds a part


@pytest.fixture
def mesh():
    """Of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


SHARING = ("VBLORA", "UNILORA", "TINYLORA")  # FSDP2 cannot have a parameter in two groups
WHOLE = ("FROD",)  # factorises whole weights when values come
BIASES = [s for s in each("bias_all", "mlp") if s.method not in (*SHARING, *WHOLE)]
SHARDED = [first("LORA", "mlp", "head"), first("VERA"), first("IA3"), *BIASES]


def sharded(model: nn.Module, mesh) -> nn.Module:
    for layer in model.get_base_model().layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("sample", SHARDED, ids=str)
def test_sharded_adapters_in_files(sample, mesh, tmp_path):
    """Saving gathers them, as the file of one process; gathered ones can be passed; a file loads into shards."""
    source = randomize(adapt(LIBS[0], sample), sample)
    full = {k: v.clone() for k, v in LIBS[0].get_peft_model_state_dict(source).items()}
    model = sharded(adapt(LIBS[0], sample), mesh)
    report = LIBS[0].set_peft_model_state_dict(model, full)
    assert not report.missing_keys and not report.unexpected_keys
    assert all(type(p).__name__ == "DTensor" for p in model.parameters())
    model.save_pretrained(tmp_path / "plain")
    source.save_pretrained(tmp_path / "one")
    one, plain = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "plain"))
    assert one == plain
    gathered = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    close_dicts(load_file(tmp_path / "adapter_model.safetensors"), full, 0)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as f:
        assert not json.loads(f.metadata()["graft_base"]).get("sample"), "one process alone would wait for the others"
    model.load_adapter(tmp_path, "default", is_trainable=True)
    if not FSDP2_ON_CPUS.args[0]:  # files go both ways where it does not run
        close(output(model.eval(), sample), output(source.eval(), sample))


# accelerate: weights that are on the CPU or on disk, and on the meta device between calls

OFFLOADS = {
    "memory": lambda model, folder: cpu_offload(model, torch.device("cpu")),
    "disk": lambda model, folder: disk_offload(model, folder, torch.device("cpu")),
}
READERS = "HIRA SUPERTUNING DEFT PSOFT OSF DELORA GLORA PEANUT TINYLORA ADAMSS FROD"  # which need the weight
PLAIN = [s for s in mergeable(each("plain", "mlp")) if s.method not in READERS.split()]
OFFLOADED = [*PLAIN, first("LORA", "mlp", "head"), first("LORA", "llama"), first("LORA", "conv1D")]


@pytest.mark.differs("a base that accelerate offloads to the CPU or disk (`device_map`, `cpu_offload`, `disk_offload`)")
@pytest.mark.parametrize("sample", [s for s in OFFLOADED if "merge" not in s.unlike], ids=str)
@pytest.mark.parametrize("kind", OFFLOADS)
def test_adapters_on_an_offloaded_base(sample, kind, tmp_path):
    """They live where the base computes. Merging works; what is on disk is left as it is."""
    source = randomize(adapt(LIBS[0], sample, base=models.make(sample.model)), sample).eval()
    source.save_pretrained(tmp_path / "first")
    expected = output(source, sample)
    low = OFFLOADS[kind](models.make(sample.model).eval(), tmp_path / "base")
    model = LIBS[0].PeftModel.from_pretrained(low, tmp_path / "first")
    stored = {f.name: f.read_bytes() for f in (tmp_path / "base").glob("*")}
    assert not any(p.is_meta for n, p in model.named_parameters() if ".default." in n)
    close(output(model, sample), expected)
    model.merge_adapter()
    close(output(model, sample), expected)
    model.unmerge_adapter()
    close(output(model, sample), expected)

    model.save_pretrained(tmp_path / "again")
    close_dicts(*(load_file(tmp_path / f / "adapter_model.safetensors") for f in ("first", "again")), 0)
    model.load_adapter(tmp_path / "first", "second")
    model.set_adapter("second")
    close(output(model, sample), expected)
    model.delete_adapter("second")
    close(output(model.merge_and_unload(), sample), expected)
    assert {f.name: f.read_bytes() for f in (tmp_path / "base").glob("*")} == stored


@pytest.mark.differs("an adapter put on a base that is offloaded already")
@pytest.mark.parametrize("sample", [first("LORA"), first("LORA", "mlp", "head")], ids=str)
def test_a_fresh_adapter_on_an_offloaded_base(sample, tmp_path):
    heads = {"head": nn.Linear(models.make("mlp").head.in_features, 7)} if sample.name == "head" else None
    low = cpu_offload(models.make(sample.model), torch.device("cpu"))
    model, plain = adapt(LIBS[0], sample, base=low, heads=heads), adapt(LIBS[0], sample, heads=heads)
    close(output(randomize(model, sample).eval(), sample), output(randomize(plain, sample).eval(), sample))
    output(model, sample).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# diffusers: layers are found by their class, and told what to do one by one


def layers_of(model: nn.Module) -> list:
    return [m for m in model.modules() if hasattr(m, "base_layer")]


@pytest.mark.parametrize("sample", each("plain", "mlp"), ids=str)
def test_deleting_layer_by_layer(sample):
    """As diffusers' delete_adapters does: what is left takes over, first by name."""
    outputs = []
    for model in both(sample):
        for name in "cb":
            model.add_adapter(name, sample.config(LIBS[len(outputs)]))
        randomize(model, sample).eval()
        for layer in layers_of(model):
            layer.delete_adapter("default")
        assert {tuple(layer.active_adapters) for layer in layers_of(model)} == {("b",)}
        outputs.append(output(model, sample))
        for name in "bc":
            for layer in layers_of(model):
                layer.delete_adapter(name)
        assert {tuple(layer.active_adapters) for layer in layers_of(model)} == {()}
    close(*outputs)


def cast_when_run(module: nn.Linear, storage: torch.dtype, compute: torch.dtype) -> None:
    """Keep weights in one dtype and compute in another, as layerwise casting does."""
    forward = module.forward

    def run(x):
        module.to(compute)
        try:
            return forward(x)
        finally:
            module.to(storage)

    module.to(storage)
    module.forward = run


@pytest.mark.parametrize(
    ("sample", "everything"),
    [(first("LORA"), True), (first("LORA"), False), (first("LORA", "mlp", "dora"), False)],
    ids=str,
)
def test_layerwise_casting(sample, everything):
    """Adapters too (if `everything`), whose input then must not be cast to the dtype they are kept in."""
    outputs = []
    with torch.no_grad():
        for model in both(sample):
            randomize(model, sample).eval()
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and (everything or "lora_" not in name):
                    cast_when_run(module, torch.bfloat16, torch.float32)
            disable = (disable_input_dtype_casting, helpers.disable_input_dtype_casting)[len(outputs)]
            with disable(model) if everything else nullcontext():
                outputs.append(output(model, sample))
            if everything:
                refuses(RuntimeError, "same dtype", output, model, sample)
    assert outputs[0].dtype == torch.float32
    close(*outputs)


def test_casting_of_inputs_is_put_back():
    model = adapt(LIBS[0], first("LORA", "mlp"))
    layers = [m for m in model.modules() if isinstance(m, AdapterLayer)]
    layers[0].cast_input_dtype_enabled = False
    with pytest.raises(ZeroDivisionError), disable_input_dtype_casting(model):
        assert not any(layer.cast_input_dtype_enabled for layer in layers)
        x = torch.zeros(2)
        assert layers[0]._cast_input_dtype(x, torch.float64) is x and layers[0]._cast_input_dtype(None, x.dtype) is None
        raise ZeroDivisionError
    assert [layer.cast_input_dtype_enabled for layer in layers] == [False] + [True] * (len(layers) - 1)
    with disable_input_dtype_casting(model, active=False):
        assert layers[1].cast_input_dtype_enabled
        assert layers[1]._cast_input_dtype(torch.zeros(2), torch.float64).dtype == torch.float64
        assert layers[1]._cast_input_dtype(None, torch.float64) is None


# PEFT's own methods of layers, wrappers and tuners, which scripts call


@pytest.mark.parametrize("sample", [s for s in each("plain", "mlp conv1D embedding conv2d")], ids=str)
def test_facts_of_layers(sample):
    """What containers there are, `r`, and the base weight, under PEFT's names."""
    seen = []
    for model in both(sample):
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "base_layer")}
        facts = {n: {"weight": m.get_base_weight(), "delta": set(m.adapter_layer_names)} for n, m in layers.items()}
        for n, m in layers.items():
            facts[n] |= {a: getattr(m, a) for a in ("r", "is_target_conv_1d_layer") if hasattr(m, a)}
            m.set_requires_grad("default", False)
            shared = {p for c in getattr(m, "attached", ()) for p in getattr(m, c).parameters()}  # the tuner's
            own = [p for k, p in m.named_parameters() if p not in shared and "vector_bank" not in k]
            facts[n]["trains"] = [p.requires_grad for p in own].count(True)
            m.set_requires_grad(["default"])
            facts[n]["trained"] = {k for k, p in m.named_parameters() if p.requires_grad}
        seen.append(facts)
    ours, theirs = seen
    assert ours.keys() == theirs.keys()
    for name, facts in theirs.items():
        close(ours[name].pop("weight"), facts.pop("weight"), 0)
        missing = facts.pop("delta") ^ ours[name].pop("delta")  # empty ones that only PEFT has
        spare = ("hada_t1", "hada_t2", "oft_R", "gralora_A_general", "gralora_B_general", "psoft_basis")
        assert all("embedding" in n or n.startswith("lokr_") or n in spare for n in missing), missing
        if sample.method == "PVERA":  # PEFT says of Conv1D that it is none
            facts.pop("is_target_conv_1d_layer", None)
        if sample.method == "FROD":  # a rank that means nothing there
            facts.pop("r", None)
        assert {k: ours[name][k] for k in facts} == facts


@pytest.mark.parametrize("sample", [first("LORA", "mlp", "head"), *each("tokens", "gpt2")], ids=str)
def test_facts_of_wrappers(sample):
    seen = []
    for model in both(sample):
        wrappers = {n: m for n, m in model.named_modules() if type(m).__name__.endswith("Wrapper")}
        assert wrappers
        for m in wrappers.values():
            held = m.adapter_state_dict("default", m.state_dict())
            m.set_requires_grad("default", False)
            seen.append(({k: v.shape for k, v in held.items()}, m.merged_adapters, m.adapter_layer_names))
            assert not any(p.requires_grad for p in m.parameters())
    half = len(seen) // 2
    assert [s[0] for s in seen[:half]] == [s[0] for s in seen[half:]]
    assert all(isinstance(names, tuple) and merged == [] for _, merged, names in seen[:half])


def test_injecting_through_the_tuner():
    sample, outputs = first("LORA"), []
    for model, lib in zip(both(sample), LIBS):
        tuner = model.base_model
        tuner.peft_config["new"] = sample.config(lib, r=2)
        tuner.inject_adapter(tuner.model, "new")
        model.set_adapter("new")
        outputs.append(output(randomize(model, sample).eval(), sample))
        assert tuner.get_model_config(tuner.model) == {"model_type": "custom"}
        assert list(tuner.targeted_parameter_names) == []
        assert set(tuner.target_module_mapping) >= {"llama", "t5"}
    close(*outputs)
    tuner = adapt(LIBS[0], sample).base_model
    refuses(LIBS[0].AdapterNameError, "'default' already exists", tuner.inject_adapter, tuner.model, "default")
    refuses(LIBS[0].AdapterNotFoundError, None, tuner.inject_adapter, tuner.model, "unknown")
    refuses(ValueError, "own model", tuner.inject_adapter, models.make("mlp"), "default")


def test_small_functions():
    model = adapt(LIBS[0], first("LORA"))
    layer = next(m for m in model.modules() if isinstance(m, AdapterLayer))
    assert import_held("check_adapters_to_merge")(layer) == ["default"]
    assert shims.dequantize_module_weight(layer.base_layer) is layer.base_layer.weight
    with shims.gather_params_ctx(layer.base_layer.parameters()), shims.gather_params_ctx(layer.base_layer.weight):
        pass
    prepare = adapt(LIBS[0], first("LORA", "llama")).base_model_prepare_inputs_for_generation
    assert prepare.__name__ == "prepare_inputs_for_generation"
    config = LIBS[0].AdaLoraConfig(target_modules=["fc1"], total_step=10)
    assert LIBS[0].get_peft_model(models.make("mlp"), config, "mine").base_model.trainable_adapter_name == "mine"
