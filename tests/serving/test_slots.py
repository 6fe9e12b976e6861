# SPDX-License-Identifier: Apache-2.0
"""Adapters in slots: the same results as a PeftModel that carries them, whatever is loaded, evicted and mixed."""

import shutil
import warnings
import weakref
from functools import partial
from threading import Thread

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.testing import assert_close
from transformers import LogitsProcessorList

import graft
from graft.core.errors import (
    AdapterKeyError,
    AdapterNameError,
    AdapterNotFoundError,
    AlreadyInjectedError,
    BaseModelMismatchError,
    CheckpointError,
    ConfigError,
    NoMatchingPeftModuleError,
    RoutingError,
    UnsupportedLayerError,
)
from graft.io.files import load_weights
from graft.serving import AdapterSlots
from tests import models
from tests.serving.test_hotswap import random_lora as any_lora

TARGETS = ["q_proj", "v_proj", "down_proj"]
BASE = "__base__"
ADAPTERS = {
    "a": dict(r=3, lora_alpha=4.11, target_modules=TARGETS),
    "b": dict(r=5, lora_alpha=3.7, target_modules=["q_proj", "down_proj"]),
    "c": dict(r=2, lora_alpha=2.3, target_modules=TARGETS, use_rslora=True, lora_dropout=0.3),
    "d": dict(r=1, lora_alpha=1.7, target_modules=["v_proj", "layers.1.mlp.down_proj"],
              rank_pattern={"down_proj": 4}, alpha_pattern={"layers.0.self_attn.v_proj": 2.9}),
}  # fmt: skip
random_lora = partial(any_lora, graft)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved adapters by name."""
    top = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        random_lora(seed=seed, **config).save_pretrained(top / name)
    return {name: str(top / name) for name in ADAPTERS}


def carrying(folders, base=None, names=ADAPTERS):
    """A PeftModel with these adapters: what slots must agree with."""
    first, *others = names
    model = graft.PeftModel.from_pretrained(base or models.make("llama"), folders[first], first)
    for name in others:
        model.load_adapter(folders[name], name)
    return model.eval()


def slotted(folders=None, n=4, rank=5, names=ADAPTERS, base=None, **options):
    slots = AdapterSlots(models.make("llama") if base is None else base, n, rank, TARGETS, **options)
    for name in names if folders else ():
        slots.load(name, folders[name])
    return slots


@torch.no_grad()
def out(model, names=None, batch=5, **options):
    return models.output(lambda **k: model(adapter_names=names, **k), models.inputs("llama", batch) | options)


@torch.no_grad()
def expected(model, names, batch=5):
    if isinstance(names, str):
        names = [names] * batch
    return out(model, list(names), batch)


# results


@pytest.mark.parametrize("name", [*ADAPTERS, BASE])
def test_one_adapter(folders, name):
    slots, model = slotted(folders), carrying(folders)
    y = expected(model, name)
    assert_close(out(slots, name), y)
    assert_close(out(slots, [name] * 5), y)
    with slots.using(name):
        assert_close(out(slots), y)
    plain = models.output(models.make("llama"), models.inputs("llama", 5))
    assert_close(out(slots), plain)
    assert torch.allclose(y, plain, atol=1e-3) == (name == BASE)


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "gathered anew"])
def test_mixed_batches(folders, keep):
    slots, model = slotted(folders, rank=7, keep_gathered=keep), carrying(folders)
    for names in (["a", "b", "c", "d", BASE], ["b", "b", BASE, "a", "b"], ["d", "c", "b", "a", "a"], ["a"] * 5):
        for _ in range(3):  # gathered factors are kept from the second time on
            assert_close(out(slots, names), expected(model, names))
        assert (slots.report().gathered_bytes > 0) == keep
    names = ["c", BASE]
    assert_close(out(slots, names, batch=2), expected(model, names, 2))
    assert_close(out(slots, ["b"], batch=1), expected(model, ["b"], 1))


def test_gathered_factors_do_not_outlive_what_they_were_made_of(folders):
    slots, model = slotted(folders, n=2), carrying(folders)
    for names in (["a", "b", "a", "b", "a"], ["c", "d", "c", "d", "c"], ["a", "b", "a", "b", "a"]):
        for _ in range(2):
            assert_close(out(slots, names), expected(model, names))
    slots.unload("a")
    slots.load("a", folders["c"])
    names = ["a", "b", "a", "b", "a"]
    assert_close(out(slots, names), expected(model, ["c", "b", "c", "b", "c"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision(folders, dtype):
    slots = slotted(folders, base=models.make("llama").to(dtype))
    assert {b.dtype for layer in slots.layers.values() for b in (layer.A, layer.B)} == {torch.float32}
    model = carrying(folders, models.make("llama").to(dtype))
    exact = carrying(folders, models.make("llama").to(dtype).double())
    for names in (["a", "b", "c", "d", BASE], "a"):
        ours, theirs, y = out(slots, names), expected(model, names), expected(exact, names)
        assert ours.dtype == theirs.dtype == dtype
        assert (ours - y).norm() < 1.2 * (theirs - y).norm() < 0.05 * y.norm(), "rounds no more than a PeftModel"


def test_slots_in_half_precision(folders):
    slots = slotted(folders, base=models.make("llama").to(torch.bfloat16), dtype=torch.bfloat16)
    assert {b.dtype for layer in slots.layers.values() for b in (layer.A, layer.B)} == {torch.bfloat16}
    names, full = ["a", "b", "c", "d", BASE], carrying(folders)
    y = expected(full, names)
    assert (out(slots, names).float() - y).norm() < 0.05 * y.norm()
    assert slots.report().slot_bytes * 2 == slotted().report().slot_bytes


@pytest.mark.parametrize("name, targets", [("gpt2", ["c_attn", "mlp.c_proj"]), ("t5", ["q", "wo"]), ("mlp", ["fc1"])])
def test_other_models(name, targets):
    source = random_lora(name, 3, r=3, lora_alpha=4.11, target_modules=targets)
    slots = AdapterSlots(models.make(name), 2, 4, targets)
    slots.load("a", source)
    batch = models.inputs(name)
    with torch.no_grad():
        y = models.output(slots, {**batch, "adapter_names": ["a", BASE, "a"]})
        alone, base = models.output(source, batch), models.output(models.make(name), batch)
    assert_close(y, torch.stack([alone[0], base[1], alone[2]]))
    assert not torch.allclose(alone, base, atol=1e-2)


def test_all_linear_layers_and_exclusions(folders):
    slots = AdapterSlots(models.make("llama"), 2, 5, "all-linear", exclude=["up_proj", "layers.0.self_attn.k_proj"])
    assert len(slots.layers) == 14 - 2 - 1 and not any("up_proj" in key for key in slots.layers)
    slots.load("b", folders["b"])
    assert_close(out(slots, "b"), expected(carrying(folders), "b"))


def test_a_hook_on_the_base_layer_sees_its_own_output(folders):
    slots, seen = slotted(folders), []
    layer = slots.layers["model.layers.0.self_attn.q_proj"]
    handle = layer.base_layer.register_forward_hook(lambda m, args, y: seen.append((y, y.clone())))
    y = out(slots, ["a", "b", "c", "d", BASE])
    assert len(seen) == 1 and torch.equal(*seen[0]), "what the hook got was overwritten"
    handle.remove()
    assert_close(out(slots, ["a", "b", "c", "d", BASE]), y)


class Flat(torch.nn.Module):
    """Its layer's input has other rows than the batch."""

    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(6, 5)

    def forward(self, x):
        return self.lin(x.flatten(0, 1)).view(*x.shape[:2], 5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_inputs_that_are_not_one_row_per_sample(compiled):
    torch._dynamo.reset()
    config = graft.LoraConfig(r=2, lora_alpha=2.74, target_modules=["lin"], init_lora_weights=False)
    with models.seeded(1):
        base, x = Flat(), torch.randn(3, 4, 6)
        slots = AdapterSlots(torch.compile(base, backend="eager", fullgraph=True) if compiled else base, 2, 3, ["lin"])
        for name in "ab":
            slots.load(name, graft.get_peft_model(Flat(), config))
    layer = slots.layers["lin"]
    with torch.no_grad():
        assert_close(slots(x), layer.base_layer(x))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for name in "aba":
                y = slots(x, adapter_names=name)
                slot = slots.report().resident[name]
                assert_close(y, layer.base_layer(x) + x @ layer.A[slot].T @ layer.B[slot])
        if not compiled:
            with pytest.raises(RoutingError, match=r"layer 'lin' received 12 rows in a batch of 3 samples.*`targets`"):
                slots(x, adapter_names=["a", "b", "a"])
    torch._dynamo.reset()


# which adapters are in slots


def test_the_adapter_used_longest_ago_gives_way(folders):
    slots = slotted(folders, n=2)
    model = carrying(folders)
    assert slots.report().resident == {} and slots.names == list(ADAPTERS)
    for name, resident in [("a", "a"), ("b", "ab"), ("a", "ba"), ("c", "ac"), ("d", "cd"), ("c", "dc"), ("a", "ca")]:
        assert_close(out(slots, name), expected(model, name))
        assert list(slots.report().resident) == list(resident)
    out(slots, [BASE, "a", "c", "a", "a"])
    assert list(slots.report().resident) == ["a", "c"], "in the order in which the batch names them"
    out(slots, BASE)
    assert list(slots.report().resident) == ["a", "c"]


def test_pinned_adapters_stay(folders):
    slots = slotted(folders, n=2)
    slots.pin("a")
    slot = slots.report().resident["a"]
    for name in "bcdb":
        out(slots, name)
        assert slots.report().resident == {"a": slot, name: 3 - slot}
    assert slots.report().pinned == ["a"]
    before = slots.report()
    with pytest.raises(RoutingError, match=r"2 adapters .* beside \[a\], which are pinned .* max_adapters is 2.*b, c"):
        out(slots, ["b", "c", "b", "c", "b"])
    with pytest.raises(RoutingError, match=r"max_adapters is 2"):
        slots.pin("b", "c")
    assert slots.report() == before
    slots.unpin("a")
    out(slots, ["b", "c", "b", "c", "b"])
    assert sorted(slots.report().resident) == ["b", "c"]


def test_more_adapters_than_slots_in_a_batch_are_refused(folders):
    slots = slotted(folders, n=3)
    out(slots, ["a", "b", "a", "b", "a"])
    before, y = slots.report(), out(slots, "a")
    with pytest.raises(RoutingError, match=r"4 adapters are needed at once, but max_adapters is 3.*\[a, b, c, d\]"):
        out(slots, ["a", "b", "c", "d", "a"])
    assert sorted(slots.report().resident) == sorted(before.resident)
    assert torch.equal(out(slots, "a"), y)


def test_nested_blocks_keep_what_they_use(folders):
    slots, model = slotted(folders, n=2), carrying(folders)
    with slots.using(["a", "b", "a", "b", "a"]):
        with pytest.raises(RoutingError, match="pinned or in use"):
            out(slots, "c")
        assert_close(out(slots, "b"), expected(model, "b"))
        with slots.using(BASE):
            assert_close(out(slots), expected(model, BASE))
        assert_close(out(slots), expected(model, ["a", "b", "a", "b", "a"]))
        with pytest.raises(RoutingError, match=r"'a' is in use"):
            slots.unload("a")
    assert_close(out(slots), expected(model, BASE))
    with pytest.raises(ZeroDivisionError), slots.using("a"):
        raise ZeroDivisionError
    assert_close(out(slots), expected(model, BASE))


def test_unload_frees_slot_and_memory(folders):
    slots = slotted(folders, n=2)
    slots.pin("a")
    held = weakref.ref(next(iter(slots._known["a"].factors.values())).A)
    before = slots.report()
    slots.unload("a")
    after = slots.report()
    assert held() is None and "a" not in slots and after.known == ["b", "c", "d"]
    assert after.pinned == [] and after.resident == {} and after.host_bytes < before.host_bytes
    for call in (lambda: out(slots, "a"), lambda: slots.unload("a"), lambda: slots.pin("a"), lambda: slots.unpin("a")):
        with pytest.raises(RoutingError, match=r"Unknown adapter\(s\): a\. Known are \[b, c, d\]"):
            call()
    slots.load("a", folders["a"])
    assert_close(out(slots, "a"), expected(carrying(folders), "a"))


def test_a_thousand_adapters_in_memory_a_hundred_in_slots():
    source = random_lora("mlp", r=2, lora_alpha=2.74, target_modules=["fc1", "fc2"])
    tensors = {k: v.detach().clone() for k, v in graft.get_peft_model_state_dict(source).items()}
    config = source.peft_config["default"]
    slots = AdapterSlots(models.make("mlp"), 100, 3, ["fc1", "fc2"])

    def scaled(i):  # ΔW of adapter i is i times that of the source
        return {k: v * i if "lora_B" in k else v for k, v in tensors.items()}

    for i in range(1000):
        slots.load(f"{i}", scaled(i / 500), config=config)
    buffers = {key: (layer.A.data_ptr(), layer.B.data_ptr()) for key, layer in slots.layers.items()}
    g = torch.Generator().manual_seed(0)
    reference = models.make("mlp")
    for _ in range(12):
        chosen = torch.randperm(1000, generator=g)[:100].tolist()
        x = torch.randn(100, 4, 10, generator=g)
        with torch.no_grad():
            y = slots(x, adapter_names=[str(i) for i in chosen])
            for row in (0, 57, 99):
                graft.set_peft_model_state_dict(source, scaled(chosen[row] / 500))
                assert_close(y[row], source(x[row : row + 1])[0])
        assert list(slots.report().resident) == [str(i) for i in chosen]
    report = slots.report()
    assert len(report.known) == 1000 and len(report.resident) == 100
    assert report.host_bytes == 1000 * sum(t.nbytes for t in tensors.values())
    assert {key: (layer.A.data_ptr(), layer.B.data_ptr()) for key, layer in slots.layers.items()} == buffers
    assert sum(t.nbytes for t in slots.remove().state_dict().values()) == sum(
        t.nbytes for t in reference.state_dict().values()
    )


# where adapters come from


def test_from_folders_tensors_and_models(folders):
    slots = slotted(n=8)
    source = random_lora(seed=0, **ADAPTERS["a"])
    slots.load("folder", folders["a"])
    slots.load("tensors", load_weights(folders["a"]).tensors, config=graft.LoraConfig(**ADAPTERS["a"]))
    slots.load("model", source)
    slots.load("compiled", torch.compile(source, backend="eager"))
    named = carrying(folders)
    slots.load("named", named, adapter="a")
    slots.load("reread", folders["a"], keep=False)
    y = out(slots, "folder")
    assert_close(y, expected(named, "a"))
    for name in ("tensors", "model", "compiled", "named", "reread"):
        assert torch.equal(out(slots, name), y), name
    with torch.no_grad():
        for key, p in source.named_parameters():
            if "lora_" in key:
                p.zero_()
    slots.unload("folder")
    assert torch.equal(out(slots, "model"), y), "slots hold values of their own"


def test_from_an_injected_model(folders):
    slots = slotted()
    base = models.make("llama")
    config = graft.LoraConfig(**ADAPTERS["a"], init_lora_weights=False)
    graft.inject_adapter_in_model(config, base)
    slots.load("x", base)
    del base.peft_config
    with pytest.raises(ConfigError, match="'y' comes without its config"):
        slots.load("y", base)
    slots.load("y", base, config=config)
    y = models.output(base, models.inputs("llama", 5)).detach()
    assert_close(out(slots, "x"), y)
    assert_close(out(slots, "y"), y)


def test_from_a_subfolder_and_a_torch_file(folders, tmp_path):
    random_lora(seed=0, **ADAPTERS["a"]).save_pretrained(tmp_path / "deep", safe_serialization=False)
    slots = slotted(folders)
    slots.load("x", tmp_path, subfolder="deep")
    assert torch.equal(out(slots, "x"), out(slots, "a"))
    with pytest.raises(TypeError, match="subfoldr"):
        slots.load("y", tmp_path, subfoldr="deep")


def test_what_is_not_kept_is_read_again(folders, tmp_path):
    shutil.copytree(folders["a"], tmp_path / "a")
    slots = slotted(folders, n=1, names="bc")
    slots.load("a", tmp_path / "a", keep=False)
    host = slots.report().host_bytes
    y = out(slots, "a")
    assert slots.report().host_bytes == host
    out(slots, "b")
    assert torch.equal(out(slots, "a"), y)
    out(slots, "b")
    shutil.rmtree(tmp_path / "a")
    before, base = slots.report(), out(slots, "b")
    with pytest.raises(CheckpointError, match="adapter_config"):
        out(slots, "a")
    assert slots.report() == before and torch.equal(out(slots, "b"), base)
    for source in (carrying(folders), load_weights(folders["a"]).tensors):
        with pytest.raises(ConfigError, match="keep=False reads it again from a folder"):
            slots.load("x", source, adapter="a", config=graft.LoraConfig(**ADAPTERS["a"]), keep=False)


def test_a_slot_that_could_not_be_filled_is_free(folders, tmp_path, monkeypatch):
    shutil.copytree(folders["c"], tmp_path / "x")
    slots, model = AdapterSlots(models.make("llama"), {2: 1, 5: 1}, targets=TARGETS), carrying(folders)
    slots.load("x", tmp_path / "x", keep=False)
    slots.load("c", folders["c"])
    random_lora(**dict(ADAPTERS["c"], r=4)).save_pretrained(tmp_path / "x")
    with pytest.raises(ConfigError, match="'x' has rank 4 in its folder by now, and had a slot of rank 2"):
        out(slots, "x")
    y = out(slots, "c")
    assert_close(y, expected(model, "c"))
    slots.load("b", folders["b"])
    slots.load("a", folders["a"])
    out(slots, "a")

    def full(*_):
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr("graft.serving.slots.move_to_devices", full)
        out(slots, "b")
    assert list(slots.report().resident) == ["c"]
    for name in "ab":
        assert_close(out(slots, name), expected(model, name))


# what does not fit


def refused(slots, error, match, *args, **options):
    before, y = slots.report(), out(slots, "a")
    with pytest.raises(error, match=match):
        slots.load(*args, **options)
    assert slots.report().known == before.known and slots.report().host_bytes == before.host_bytes
    assert torch.equal(out(slots, "a"), y)


@pytest.mark.parametrize(
    "config, match",
    [
        (dict(r=6), r"'x' does not fit: rank 6 on 'model\.layers\.0.*' is above max_rank=5"),
        (dict(rank_pattern={"layers.1.mlp.down_proj": 9}), r"rank 9 on 'model\.layers\.1\.mlp\.down_proj' is above"),
        (dict(use_dora=True), r"'x' does not fit: DoRA \(use_dora=True\) needs vectors as well as A and B.*gains=True"),
        (dict(lora_bias=True), "lora_bias=True"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\]"),
        (dict(trainable_token_indices=[1, 2]), "trainable_token_indices"),
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa' changed"),
        (dict(init_lora_weights="olora"), "init_lora_weights='olora' changed"),
        (dict(layer_replication=[(0, 2), (0, 2)]), "layer_replication"),
        (dict(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"), "'x' does not fit: .*alora_invocation_tokens"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_loras_that_do_not_fit_are_refused_by_name(folders, config, match, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = random_lora(**ADAPTERS["a"] | config)
        model.save_pretrained(tmp_path / "x")
    refused(slotted(folders), ConfigError, match, "x", tmp_path / "x")


def test_biases_are_refused(tmp_path):
    config = dict(r=2, target_modules=["fc1"], bias="lora_only")
    slots = AdapterSlots(models.make("mlp"), 2, 5, ["fc1"])
    with pytest.raises(ConfigError, match="bias='lora_only'"):
        slots.load("x", random_lora("mlp", **config))
    assert slots.names == []


def test_other_methods_are_refused_by_name(folders, tmp_path):
    ia3 = graft.IA3Config(target_modules=["v_proj"], feedforward_modules=[])
    graft.get_peft_model(models.make("llama"), ia3).save_pretrained(tmp_path / "ia3")
    config = graft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    prompt = graft.get_peft_model(models.make("llama"), config)
    prompt.save_pretrained(tmp_path / "prompt")
    slots = slotted(folders)
    refused(slots, ConfigError, "'x' does not fit: IA3 needs vectors .*gains=True", "x", tmp_path / "ia3")
    refused(slots, ConfigError, "PROMPT_TUNING", "x", tmp_path / "prompt")
    refused(slots, ConfigError, "PROMPT_TUNING", "x", prompt)


def test_other_targets_are_refused_by_name(folders):
    for targets, key in ((["q_proj", "o_proj"], "o_proj"), (["embed_tokens", "q_proj"], "embed_tokens")):
        source = random_lora(r=2, target_modules=targets)
        refused(slotted(folders), AdapterKeyError, f"'x' does not fit: no slots for .*{key}.*`targets`", "x", source)


def test_tensors_must_be_those_of_the_config(folders):
    slots, config = slotted(folders), graft.LoraConfig(**ADAPTERS["a"])
    tensors = load_weights(folders["a"]).tensors
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    less = {k: v for k, v in tensors.items() if k != key}
    refused(slots, AdapterKeyError, "lacks .*layers.0.self_attn.q_proj.lora_B", "x", less, config=config)
    less = {k: v for k, v in tensors.items() if "layers.1.mlp" not in k}
    refused(slots, AdapterKeyError, "lacks .*layers.1.mlp.down_proj", "x", less, config=config)
    refused(slots, AdapterKeyError, "lacks ", "x", {}, config=graft.LoraConfig(target_modules=["other"]))
    other = tensors | {key: tensors[key][:-1]}
    wrong = r"q_proj\.lora_B\.weight' is \(23, 3\), which should be \(24, 3\)"
    refused(slots, AdapterKeyError, wrong, "x", other, config=config)
    rank = graft.LoraConfig(**ADAPTERS["a"] | {"r": 2})
    refused(slots, AdapterKeyError, r"'x' does not fit: .* which should be \(2, \d+\)", "x", tensors, config=rank)
    refused(slots, ConfigError, "comes without its config", "x", tensors)


def test_another_architecture_is_refused(folders, tmp_path):
    wide = graft.get_peft_model(models.make("mlp"), graft.LoraConfig(r=2, target_modules=["fc1"]))
    wide.save_pretrained(tmp_path)
    base = models.make("mlp")
    base.layers[0].fc1 = torch.nn.Linear(12, 21)
    slots = AdapterSlots(base, 2, 4, ["fc1"])
    with pytest.raises(BaseModelMismatchError, match=r"'x' from .*layers\.0\.fc1"):
        slots.load("x", tmp_path)
    assert slots.names == []


def test_names_and_sources_are_checked(folders, tmp_path):
    slots = slotted(folders)
    for name in ("a", BASE, "x.y", "", 3):
        with pytest.raises(AdapterNameError):
            slots.load(name, folders["b"])
    with pytest.raises(AdapterNameError, match=r"'a' already exists\. .* unload\(\) it first"):
        slots.load("a", folders["b"])
    refused(slots, CheckpointError, "adapter_config", "x", tmp_path)
    refused(slots, AdapterNotFoundError, "nobody", "x", carrying(folders), adapter="nobody")


def test_models_that_cannot_have_slots(folders):
    for options, error, match in (
        (dict(max_adapters=0), ConfigError, "max_adapters must be at least 1, got 0"),
        (dict(max_rank=-1), ConfigError, "max_rank must be at least 1, got -1"),
        (dict(targets=["q_prj"]), NoMatchingPeftModuleError, "did you mean 'q_proj'"),
        (dict(targets=["embed_tokens"]), UnsupportedLayerError, r"embed_tokens \(Embedding\) is not linear"),
    ):
        base = models.make("llama")
        before = dict(base.named_modules())
        with pytest.raises(error, match=match):
            AdapterSlots(base, **dict(max_adapters=2, max_rank=4, targets=["q_proj"]) | options)
        assert dict(base.named_modules()) == before
    attention = torch.nn.ModuleDict({"attention": torch.nn.MultiheadAttention(8, 2)})
    with pytest.raises(UnsupportedLayerError, match=r"attention\.out_proj .* never called"):
        AdapterSlots(attention, 2, 4, ["out_proj"])
    with pytest.raises(AlreadyInjectedError, match="carries adapters already"):
        AdapterSlots(carrying(folders), 2, 4, TARGETS)
    slots = slotted(folders)
    for again in (
        lambda: AdapterSlots(slots.model, 2, 4, TARGETS),
        lambda: graft.get_peft_model(slots.model, graft.LoraConfig(target_modules=TARGETS)),
    ):
        with pytest.raises(UnsupportedLayerError, match=r"has slots of AdapterSlots, whose remove\(\)"):
            again()
    assert_close(out(slots, "a"), expected(carrying(folders), "a"))


def test_rows_and_names_must_agree(folders):
    slots = slotted(folders)
    with pytest.raises(RoutingError, match=r"same as the number of inputs, but got 2 and 5"):
        out(slots, ["a", "b"])
    with pytest.raises(RoutingError, match=r"Unknown adapter\(s\): x, y"):
        out(slots, ["x", "y", "a", "a", "a"])
    with pytest.raises(RoutingError, match="No adapter is named"), slots.using([]):
        pass
    assert slots.report().resident == {}


# the model


def test_remove_restores_the_model(folders):
    base = models.make("llama")
    modules, tensors = list(base.named_modules()), {k: v.data_ptr() for k, v in base.state_dict().items()}
    slots = slotted(folders, base=base)
    out(slots, ["a", "b", "c", "d", BASE])
    assert list(base.named_modules()) != modules
    assert slots.remove() is base
    assert list(base.named_modules()) == modules
    assert {k: v.data_ptr() for k, v in base.state_dict().items()} == tensors
    assert torch.equal(
        models.output(base, models.inputs("llama")), models.output(models.make("llama"), models.inputs("llama"))
    )


def test_removed_slots_serve_nothing(folders):
    slots = slotted(folders)
    with slots.using("a"), pytest.raises(RoutingError, match="Leave the `using` block"):
        slots.remove()
    slots.pin("a")
    slots.remove()
    ids = models.inputs("llama", 4)
    for use in (
        lambda: slots(**ids, adapter_names=["a", "b", "a", "b"]),
        lambda: slots(**ids),
        lambda: slots.generate(**ids, adapter_names="a", max_new_tokens=1),
        lambda: slots.pin("a"),
        lambda: slots.load("new", folders["a"]),
    ):
        with pytest.raises(RoutingError, match="removed from the model"):
            use()
    report = slots.report()
    assert report.layers == report.slot_bytes == report.gathered_bytes == 0 and not report.resident
    assert slots.remove() is slots.model


def test_factors_gathered_in_inference_mode_serve_outside(folders):
    slots, names = slotted(folders), ["a", "b", "c", BASE, "a"]
    with torch.inference_mode():
        expected = out(slots, names), out(slots, names)
    found = slots(**models.inputs("llama", 5), adapter_names=names).logits
    assert slots.report().gathered_bytes
    assert_close(found, expected[0])
    slots.model.get_input_embeddings().weight.requires_grad_()
    slots(**models.inputs("llama", 5), adapter_names=names).logits.sum().backward()


def test_a_batch_of_no_rows():
    slots = AdapterSlots(models.make("mlp"), 2, 3, ["fc1"])
    empty = torch.zeros(0, 10)
    assert slots(empty).shape == slots(empty, adapter_names=[]).shape == slots.model(empty).shape
    with pytest.raises(RoutingError, match="No adapter is named"), slots.using([]):
        pass


def test_a_hook_on_all_modules_sees_the_base_output(folders):
    slots, seen = slotted(folders), []
    layer = next(iter(slots.layers.values()))
    handle = register_module_forward_hook(lambda m, x, y: seen.append((x[0], y)) if m is layer.base_layer else None)
    try:
        out(slots, ["a", "b", "c", BASE, "a"])
    finally:
        handle.remove()
    ((x, y),) = seen
    assert torch.equal(y, torch.nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))


def test_what_a_state_dict_holds(folders):
    slots = slotted(folders)
    assert not any(k.endswith((".A", ".B")) for k in slots.model.state_dict()), "slots are not part of the model"
    linear = slots.model.model.layers[0].self_attn.q_proj
    assert (linear.in_features, linear.out_features, linear.bias) == (24, 24, None)
    assert linear.weight is linear.base_layer.weight and "slots=4, max_rank=5" in repr(linear)


def test_report(folders):
    slots = slotted(folders, n=3, rank=5)
    out(slots, ["b", "a", "b", "a", "a"])
    slots.pin("a")
    report = slots.report()
    widths = sum(m.in_features + m.out_features for m in slots.layers.values())
    assert widths == 2 * ((24 + 24) + (24 + 12) + (36 + 24))
    assert report.bytes_per_slot == 5 * widths * 4 and report.slot_bytes == 4 * report.bytes_per_slot
    assert report.layers == 6 and list(report.resident) == ["b", "a"] and report.pinned == ["a"]
    assert report.host_bytes == sum(sum(t.nbytes for t in load_weights(f).tensors.values()) for f in folders.values())
    assert report.gathered_bytes == 0
    for _ in range(2):
        out(slots, ["b", "a", "b", "a", "a"])
    assert slots.report().gathered_bytes == 5 * report.bytes_per_slot
    text = str(report)
    assert "2 of 3 slots in use (1 pinned), 4 adapters known; 6 layers, rank ≤ 5" in text


def test_it_follows_the_model_to_another_dtype(folders):
    slots = slotted(folders)
    y = out(slots, ["a", "b", "c", "d", BASE])
    slots.model.double()
    assert_close(out(slots, ["a", "b", "c", "d", BASE]), y.double(), rtol=1e-4, atol=1e-4)


# generation


def generate(model, batch, names=None, **options):
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0) | options
    extra = {} if names is None else {"adapter_names": names}
    return model.generate(**batch, **extra, **settings)


def padded(rows, width):
    return torch.stack([torch.nn.functional.pad(r, (0, width - len(r))) for r in rows])


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_equals_row_by_row(folders, beams):
    slots, model = slotted(folders, n=4), carrying(folders)
    batch = {"input_ids": torch.randint(3, models.VOCAB, (5, 6), generator=torch.Generator().manual_seed(4))}
    names = ["a", "b", BASE, "d", "a"]
    together = generate(slots, batch, names, num_beams=beams)
    alone = []
    for i, name in enumerate(names):
        row = {"input_ids": batch["input_ids"][i : i + 1]}
        if name == BASE:
            with model.disable_adapter():
                alone.append(generate(model, row, num_beams=beams)[0])
        else:
            model.set_adapter(name)
            alone.append(generate(model, row, num_beams=beams)[0])
        assert torch.equal(generate(slots, row, name, num_beams=beams)[0], alone[-1])
    assert torch.equal(together, padded(alone, together.shape[1]))
    assert len({tuple(row.tolist()) for row in together}) == 5
    assert_close(out(slots), expected(model, BASE))


def test_generate_several_samples_per_row(folders):
    slots = slotted(folders)
    batch = {"input_ids": torch.randint(3, models.VOCAB, (3, 4), generator=torch.Generator().manual_seed(4))}
    seen = []
    handle = slots.layers["model.layers.0.self_attn.q_proj"].register_forward_pre_hook(
        lambda m, args: seen.append(m.choice.index.tolist())
    )
    torch.manual_seed(0)
    y = generate(slots, batch, ["a", BASE, "b"], do_sample=True, num_return_sequences=2)
    handle.remove()
    a, b = (slots.report().resident[n] for n in "ab")
    assert len(y) == 6 and seen[0] == [a, a, 0, 0, b, b]
    assert torch.equal(
        generate(slots, batch), models.make("llama").generate(**batch, max_new_tokens=6, do_sample=False)
    )


def test_slots_refill_between_the_tokens_of_a_running_generate(folders):
    """Requests of other threads take the free slot in turn, and an adapter goes and comes again."""
    slots, batch = slotted(folders, n=2), models.inputs("llama", 2)
    alone = generate(slots, batch, "a")
    expected = {name: out(slots, name, 2) for name in "bcd"}
    seen = []

    def others(ids, scores):
        thread = Thread(target=lambda: seen.extend((name, out(slots, name, 2)) for name in "bcd"))
        thread.start()
        thread.join(60)
        if "d" in slots and len(seen) > 5:
            slots.unload("d")
            slots.load("d", folders["d"])
        return scores

    tokens = generate(slots, batch, "a", logits_processor=LogitsProcessorList([others]))
    assert torch.equal(tokens, alone)
    assert len(seen) >= 3 * 3 and all(torch.equal(y, expected[name]) for name, y in seen)
    assert "a" in slots.report().resident


def test_an_encoder_decoder():
    sources = {n: random_lora("t5", s, r=2, lora_alpha=2.74, target_modules=["q", "wo"]) for s, n in enumerate("ab")}
    slots = AdapterSlots(models.make("t5"), 2, 2, ["q", "wo"])
    for name, source in sources.items():
        slots.load(name, source)
    batch = {k: v for k, v in models.inputs("t5").items() if "decoder" not in k}
    y = generate(slots, batch, ["a", BASE, "b"])
    for i, name in enumerate(["a", BASE, "b"]):
        row = {k: v[i : i + 1] for k, v in batch.items()}
        alone = generate(sources.get(name, models.make("t5")), row)
        assert torch.equal(y[i : i + 1, : alone.shape[1]], alone)
    with pytest.raises(RoutingError, match="num_beams=1"):
        generate(slots, batch, ["a", BASE, "b"], num_beams=2)
    beams = generate(slots, batch, "a", num_beams=2)
    assert torch.equal(beams, generate(sources["a"], batch, num_beams=2))


# compiled


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_compiled_model_is_compiled_once(folders, backend):
    """0 graph breaks, 0 recompiles: whatever is added, removed, switched and mixed."""
    torch._dynamo.reset()
    base = models.make("llama")
    compiled = torch.compile(base, backend=backend, fullgraph=True)
    slots = slotted(folders, n=3, names="ab", base=compiled)
    model = carrying(folders)
    names = ["a", "b", "a", BASE, "b"]
    assert_close(out(slots), expected(model, BASE))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("a", "b", BASE):
            assert_close(out(slots, name), expected(model, name))
            assert_close(out(slots, [name] * 5), expected(model, name))
        slots.load("c", folders["c"])
        slots.load("d", folders["d"])
        for names in (["c", "a", "b", BASE, "c"], ["d", "d", "c", "a", "d"], ["a"] * 5, [BASE, "b", BASE, "d", "c"]):
            assert_close(out(slots, names), expected(model, names))
        slots.unload("a")
        slots.pin("b")
        slots.load("a", folders["a"])
        assert_close(out(slots, ["a", "c", "b", "b", "c"]), expected(model, ["a", "c", "b", "b", "c"]))
        slots.unload("c")
        assert_close(out(slots), expected(model, BASE))
        for name in "abd":
            with slots.using(name):
                assert_close(out(slots), expected(model, name))
                with torch.no_grad():
                    assert_close(models.output(compiled, models.inputs("llama", 5)), expected(model, name))
    torch._dynamo.reset()
