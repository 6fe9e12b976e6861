# SPDX-License-Identifier: Apache-2.0
"""Swapping an adapter in place: against PEFT's swap, and against loading the new adapter into a fresh model."""

import copy
import json
import warnings
from typing import NamedTuple

import peft
import pytest
import torch
from peft.utils import hotswap as peft_hotswap
from safetensors.torch import save_file
from torch.testing import assert_close

import graft
from graft.core.errors import (
    AdapterKeyError,
    AdapterNotFoundError,
    BaseModelMismatchError,
    CheckpointError,
    ConfigError,
)
from graft.core.layer import AdapterLayer
from graft.inject.parts import get_registry
from graft.io.files import load_weights
from graft.model.functional import rescale_adapter_scale
from tests import models
from tests.models import disturb

LORA = dict(r=3, lora_alpha=4.11)  # scaling 1.37
MLP = dict(target_modules=["lin0", "fc1", "fc2"])
CONV = dict(target_modules=["conv", "grouped", "rect", "lin"])


def on(*targets, **fields):
    return {"target_modules": [*targets], **fields}


class Case(NamedTuple):
    """An adapter and the one that takes its place: what both configs say, and what each says next to it."""

    model: str
    both: dict
    first: dict
    second: dict
    like_peft: bool = True  # PEFT can swap these, and rightly


PATTERNS = {"rank_pattern": {"fc2": 4, "layers.0.fc1": 2}, "alpha_pattern": {"lin0": 5.3}}
CASES = {
    "values only": Case("mlp", MLP, {}, {}),
    "other alpha": Case("mlp", MLP, {}, {"lora_alpha": 7.3}),
    "smaller rank": Case("mlp", MLP, {"r": 5}, {"r": 2}),
    "larger rank": Case("mlp", MLP, {}, {"r": 7}),
    "rsLoRA": Case("mlp", MLP | {"use_rslora": True}, {}, {"r": 2, "lora_alpha": 2.9}),
    "fewer targets": Case("mlp", MLP, {}, on("fc2", r=2)),
    "fewer targets, rsLoRA": Case("mlp", MLP | {"use_rslora": True}, {}, on("fc2")),
    "one layer": Case("mlp", MLP, {}, on("layers.1.fc1", r=5)),
    "by a regex": Case("mlp", MLP, {}, {"target_modules": r"layers\.[02]\.fc\d"}),
    "patterns": Case("mlp", MLP, {"rank_pattern": {"fc1": 6}}, PATTERNS, like_peft=False),
    "bias of B": Case("mlp", {"lora_bias": True}, on("lin0", "fc1"), on("fc1", r=2)),
    "Conv1D": Case("conv1D", {}, on("c_fc", "c_proj"), on("c_proj", r=2)),
    "conv1d": Case("conv1d", on("conv", "grouped"), {"r": 4}, {"r": 2}, like_peft=False),
    "conv2d, smaller": Case("conv2d", CONV, {"r": 6}, {"r": 2}),
    "conv2d, larger": Case("conv2d", CONV, {"r": 2}, {"r": 6}),
    "conv3d": Case("conv3d", on("conv"), {}, {"r": 2}, like_peft=False),
    "embedding": Case("embedding", on("emb", "lin"), {}, {"r": 2}, like_peft=False),
    "embedding, larger": Case("embedding", {}, on("emb", "lin"), on("emb", r=5, lora_alpha=3.7), like_peft=False),
    "embedding saved as well": Case(
        "llama", {}, on("embed_tokens", "q_proj"), on("embed_tokens", r=2), like_peft=False
    ),
    "DoRA": Case("mlp", MLP | {"use_dora": True}, {}, {"r": 2}, like_peft=False),
    "modules to save": Case("mlp", on("fc1", modules_to_save=["head"]), {}, {"r": 2}, like_peft=False),
    "token rows": Case("embedding", on("lin", trainable_token_indices={"emb": [2, 5]}), {}, {"r": 2}, like_peft=False),
    "transformer": Case(
        "llama", {"task_type": "CAUSAL_LM"}, on("q_proj", "v_proj", "down_proj"), on("q_proj", "down_proj", r=5)
    ),
}


@torch.no_grad()
def random_lora(lib, name="llama", seed=1, **config):
    """A model with an adapter that has random values all over."""
    model = lib.get_peft_model(models.make(name), lib.LoraConfig(**copy.deepcopy(config)))
    g = torch.Generator().manual_seed(seed)
    for key, p in model.named_parameters():
        if p.requires_grad or "lora_" in key:
            p.copy_(torch.randn(p.shape, generator=g) * 0.4)
    return model.eval()


def save(folder, name, seed, **config):
    """By PEFT: its files are what there is to swap in."""
    random_lora(peft, name, seed, **config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folders(request, tmp_path):
    case = CASES[request.param]
    pair = enumerate((case.first, case.second), 1)
    return case, *(save(tmp_path / str(seed), case.model, seed, **LORA | case.both | own) for seed, own in pair)


def loaded(lib, name, folder):
    return lib.PeftModel.from_pretrained(models.make(name), folder).eval()


@torch.no_grad()
def output(model, name):
    return models.output(model, models.inputs(name))


def state(model):
    """All that a swap may change."""
    layers = {
        key: (dict(m.r), dict(m.lora_alpha), copy.deepcopy(dict(m.scaling)), copy.deepcopy(dict(m.scaling_at_start)))
        for key, m in model.named_modules()
        if isinstance(m, AdapterLayer) and hasattr(m, "r")
    }
    configs = {name: c.to_dict() for name, c in model.peft_config.items()}
    return {k: v.clone() for k, v in model.state_dict().items()}, layers, configs


def unchanged(model, before):
    tensors, *facts = state(model)
    assert facts == list(before[1:])
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(t, before[0][k]) for k, t in tensors.items())


# the result


@pytest.mark.differs(
    "hot-swapping: embeddings, Conv1d, Conv3d, DoRA, `modules_to_save`, token rows, models without a wrapper"
)
@pytest.mark.parametrize("folders", CASES, indirect=True)
def test_a_swapped_adapter_does_what_it_does_when_loaded(folders):
    case, first, second = folders
    model = loaded(graft, case.model, first)
    expected = output(loaded(peft, case.model, second), case.model)
    assert not torch.allclose(output(model, case.model), expected, atol=1e-2)
    graft.hotswap_adapter(model, second, "default")
    assert_close(output(model, case.model), expected, rtol=1e-5, atol=1e-5)
    graft.hotswap_adapter(model, first, "default")
    assert_close(output(model, case.model), output(loaded(peft, case.model, first), case.model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("folders", [k for k, c in CASES.items() if c.like_peft], indirect=True)
def test_tensors_are_those_of_peft(folders):
    case, first, second = folders
    ours, theirs = loaded(graft, case.model, first), loaded(peft, case.model, first)
    graft.hotswap_adapter(ours, second, "default")
    peft_hotswap.hotswap_adapter(theirs, second, "default", torch_device="cpu")
    swapped = {k: v for k, v in theirs.state_dict().items() if "lora_" in k}
    tensors = ours.state_dict()
    assert swapped and all(torch.equal(tensors[k], v) for k, v in swapped.items())
    for (key, a), (other, b) in zip(lora_layers(ours), lora_layers(theirs), strict=True):
        assert key == other
        if any(p.any() for p in b.lora_A.parameters()):  # of layers that are zero, PEFT leaves the old scaling
            assert a.scaling == pytest.approx(b.scaling)


def lora_layers(model):
    return [(key, m) for key, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")]


@pytest.mark.differs("hot-swapping: the config after a swap")
@pytest.mark.differs("hot-swapping: layers that become zero")
@pytest.mark.parametrize("folders", CASES, indirect=True)
@pytest.mark.parametrize("lib", [graft, peft], ids=["graft", "peft"])
def test_what_is_saved_after_a_swap_is_the_adapter_that_ran(folders, lib, tmp_path):
    case, first, second = folders
    model = loaded(graft, case.model, first)
    graft.hotswap_adapter(model, second, "default")
    model.save_pretrained(tmp_path / "again")
    again = loaded(lib, case.model, str(tmp_path / "again"))
    assert_close(output(again, case.model), output(model, case.model), rtol=1e-5, atol=1e-5)


def test_a_config_that_several_adapters_share_is_left_alone(tmp_path):
    config = graft.LoraConfig(**LORA, **MLP)
    model = graft.get_peft_model(models.make("mlp"), config)
    model.add_adapter("other", config)
    graft.hotswap_adapter(model, save(tmp_path, "mlp", 2, **LORA | MLP | {"r": 7}), "default")
    assert (model.peft_config["default"].r, config.r, model.peft_config["other"].r) == (7, 3, 3)


@pytest.mark.differs("hot-swapping: `rank_pattern` of the new adapter")
def test_names_that_end_alike_keep_their_own_ranks(tmp_path):
    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(6, 6)
            self.a = torch.nn.ModuleDict({"lin": torch.nn.Linear(6, 6)})
            self.b = torch.nn.ModuleDict({"lin": torch.nn.Linear(6, 6)})

    def make(**config):
        with models.seeded(3):
            return graft.get_peft_model(Nested(), graft.LoraConfig(target_modules=["lin"], **config))

    model = make(r=5)
    make(r=5, rank_pattern={"^lin": 9}).save_pretrained(tmp_path / "new")
    graft.hotswap_adapter(model, str(tmp_path / "new"), "default")
    assert [model.base_model.model.get_submodule(k).r["default"] for k in ("lin", "a.lin", "b.lin")] == [9, 5, 5]
    config, keys = model.peft_config["default"], ("lin", "a.lin", "b.lin")
    assert [config.at(k).r for k in keys] == [9, 5, 5]


def test_other_adapters_stay(tmp_path):
    model = random_lora(graft, "mlp", 1, **LORA, **MLP)
    model.load_adapter(save(tmp_path / "b", "mlp", 3, **LORA, **MLP), "b")
    model.set_adapter("b")
    before = output(model, "mlp")
    graft.hotswap_adapter(model, save(tmp_path / "new", "mlp", 2, **LORA | MLP | {"r": 7}), "default")
    assert torch.equal(output(model, "mlp"), before) and model.active_adapters == ["b"]
    with pytest.raises(AdapterNotFoundError, match="c not found"):
        graft.hotswap_adapter(model, str(tmp_path / "new"), "c")


def test_training_goes_on_after_a_swap(tmp_path):
    model = random_lora(graft, "mlp", 1, **LORA, **MLP).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    graft.hotswap_adapter(model, save(tmp_path, "mlp", 2, **LORA | MLP | {"r": 7}), "default")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    before = output(model, "mlp")
    model(**models.inputs("mlp")).square().mean().backward()
    optimizer.step()
    assert not torch.allclose(output(model, "mlp"), before)


def test_values_take_the_dtype_that_the_adapter_has(tmp_path):
    folder = save(tmp_path, "mlp", 2, **LORA | MLP | {"r": 5})
    model = random_lora(graft, "mlp", 1, **LORA, **MLP).to(torch.bfloat16)
    graft.hotswap_adapter(model, folder, "default")
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.bfloat16}
    stored = load_weights(folder).tensors["base_model.model.lin0.lora_A.weight"]
    assert torch.equal(model.base_model.model.lin0.lora_A.default.weight, stored.to(torch.bfloat16))


def test_files_in_several_dtypes_and_torch_files(tmp_path):
    config = LORA | MLP
    model = random_lora(peft, "mlp", 2, **config)
    model.base_model.model.lin0.lora_A.default.half()
    model.save_pretrained(tmp_path / "mixed")
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    tensors = load_weights(str(tmp_path / "mixed")).tensors
    assert {t.dtype for t in tensors.values()} == {torch.float16, torch.float32}
    for name in ("mixed", "bin"):
        ours = random_lora(graft, "mlp", 1, **config)
        graft.hotswap_adapter(ours, str(tmp_path / name), "default")
        for key, t in graft.get_peft_model_state_dict(ours).items():
            assert torch.equal(t, tensors[key].float()), key


def test_subfolder_and_key_mapping(tmp_path):
    first, second = LORA | MLP, LORA | MLP | {"r": 2}
    save(tmp_path / "deep", "mlp", 2, **second)
    model = random_lora(graft, "mlp", 1, **first)
    graft.hotswap_adapter(model, str(tmp_path), "default", subfolder="deep")
    expected = output(model, "mlp")
    tensors = load_weights(str(tmp_path / "deep")).tensors
    renamed = {k.replace("layers.", "blocks."): t for k, t in tensors.items()}
    save_file(renamed, tmp_path / "deep" / "adapter_model.safetensors", {"format": "pt"})
    model = random_lora(graft, "mlp", 1, **first)
    with pytest.raises(AdapterKeyError, match="blocks"):
        graft.hotswap_adapter(model, str(tmp_path / "deep"), "default")
    graft.hotswap_adapter(model, str(tmp_path / "deep"), "default", key_mapping={"^blocks": "layers"})
    assert torch.equal(output(model, "mlp"), expected)


# from tensors


@pytest.mark.parametrize("names", ["file", "memory"])
def test_from_a_state_dict(names, tmp_path):
    config = LORA | MLP | {"r": 2, "lora_alpha": 3.1}
    source = random_lora(peft, "mlp", 2, **config)
    if names == "file":
        tensors = peft.get_peft_model_state_dict(source)
    else:
        tensors = {k: v for k, v in source.state_dict().items() if "lora_" in k}
        theirs = random_lora(peft, "mlp", 1, **LORA, **MLP)
        peft_hotswap.hotswap_adapter_from_state_dict(theirs, tensors, "default", source.peft_config["default"])
        assert_close(output(theirs, "mlp"), output(source, "mlp"))
    model = random_lora(graft, "mlp", 1, **LORA, **MLP)
    given = dict(tensors)
    graft.hotswap_adapter_from_state_dict(model, given, "default", graft.LoraConfig(**config))
    assert given.keys() == tensors.keys()
    assert_close(output(model, "mlp"), output(source, "mlp"))


def test_into_a_model_without_a_wrapper(tmp_path):
    config = graft.LoraConfig(**LORA | MLP)
    base = models.make("mlp")
    graft.inject_adapter_in_model(config, base)
    second = LORA | {"r": 5, "target_modules": ["fc1"]}
    folder = save(tmp_path, "mlp", 2, **second)
    graft.hotswap_adapter(base, folder, "default")
    expected = output(loaded(peft, "mlp", folder), "mlp")
    assert_close(output(base, "mlp"), expected)
    tensors = {k: v * 2 for k, v in graft.get_peft_model_state_dict(base).items() if "fc1.lora_B" in k}
    tensors |= {k: v for k, v in graft.get_peft_model_state_dict(base).items() if "fc1.lora_A" in k}
    halved = graft.LoraConfig(**second | {"lora_alpha": second["lora_alpha"] / 2})
    graft.hotswap_adapter_from_state_dict(base, tensors, "default", halved)
    assert_close(output(base, "mlp"), expected)


# what cannot be swapped


def refused(tmp_path, error, match, name="mlp", first=LORA | MLP, config=None, edit=None, **second):
    """A swap that raises and changes nothing. `edit` changes the tensors that come."""
    model = random_lora(graft, name, 1, **first)
    source = random_lora(graft, name, 2, **(first | second))
    tensors = {k: v.detach().clone() for k, v in graft.get_peft_model_state_dict(source).items()}
    if edit is not None:
        edit(tensors)
    before, y = state(model), output(model, name)
    with pytest.raises(error, match=match):
        graft.hotswap_adapter_from_state_dict(model, tensors, "default", config or source.peft_config["default"])
    unchanged(model, before)
    assert torch.equal(output(model, name), y)


@pytest.mark.differs("hot-swapping: other `alpha_pattern`")
@pytest.mark.parametrize(
    "second", [dict(use_rslora=True), dict(lora_dropout=0.1), dict(use_dora=True)], ids=lambda d: next(iter(d))
)
def test_configs_must_agree_as_in_peft(tmp_path, second):
    refused(tmp_path, ConfigError, f"Configs are incompatible: for {next(iter(second))}", **second)
    folder = save(tmp_path, "mlp", 2, **LORA | MLP | second)
    with pytest.raises(ValueError, match=f"Configs are incompatible: for {next(iter(second))}"):
        peft_hotswap.hotswap_adapter(
            loaded(peft, "mlp", save(tmp_path / "1", "mlp", 1, **LORA, **MLP)), folder, "default"
        )


@pytest.mark.differs(
    "hot-swapping: other `trainable_token_indices`, `alora_invocation_tokens`, `layer_replication`, "
    "`ensure_weight_tying`"
)
def test_token_rows_must_be_the_same_ones(tmp_path):
    first = LORA | dict(target_modules=["lin"], trainable_token_indices={"emb": [2, 5]})
    text = "for trainable_token_indices"
    refused(tmp_path, ConfigError, text, "embedding", first, trainable_token_indices={"emb": [2, 6]})


@pytest.mark.parametrize("tokens", [(None, [5]), ([5], None), ([5], [6])])
def test_invocation_tokens_must_be_the_same_ones(tmp_path, tokens):
    both = dict(target_modules=["q_proj"], task_type="CAUSAL_LM")
    first, second = (dict(alora_invocation_tokens=t) for t in tokens)
    refused(tmp_path, ConfigError, "for alora_invocation_tokens", "llama", LORA | both | first, **second)


def test_an_arrow_router_sees_experts_that_have_grown(tmp_path):
    config = dict(target_modules=["q_proj", "v_proj"])
    folders = [save(tmp_path / str(seed), "llama", seed, r=r, **config) for seed, r in enumerate((2, 2, 4, 4))]

    def arrow(folders):
        return graft.create_arrow_model(models.make("llama"), folders, graft.ArrowConfig(top_k=1, rng_seed=3)).eval()

    model = arrow(folders[:2])
    output(model, "llama")  # finds the experts' directions
    for i, folder in enumerate(folders[2:]):
        graft.hotswap_adapter(model, folder, f"task_{i}")
    assert_close(output(model, "llama"), output(arrow(folders[2:]), "llama"))


def swap(model, folder):
    graft.hotswap_adapter(model, folder, "default")


def fill(model, folder):
    graft.set_peft_model_state_dict(model, graft.get_peft_model_state_dict(loaded(graft, "mlp", folder)))


@pytest.mark.parametrize("way, rank, dora", [(swap, 7, False), (swap, 3, False), (swap, 3, True), (fill, 3, True)])
def test_an_adapter_that_was_made_in_inference_mode_grows_or_has_new_values_in_its_place(tmp_path, way, rank, dora):
    folder = save(tmp_path, "mlp", 1, **MLP, r=rank, use_dora=dora)
    with torch.inference_mode():
        model = random_lora(graft, "mlp", 2, **MLP, r=3, use_dora=dora).eval()
        output(model, "mlp")  # DoRA keeps norms of it
    way(model, folder)
    with torch.inference_mode(rank == 3):
        assert_close(output(model, "mlp"), output(loaded(graft, "mlp", folder), "mlp"))


def test_other_methods_are_refused(tmp_path):
    ia3 = graft.get_peft_model(models.make("mlp"), graft.IA3Config(target_modules=["fc1"], feedforward_modules=[]))
    ia3.save_pretrained(tmp_path / "ia3")
    folder = save(tmp_path / "lora", "mlp", 1, **LORA, **MLP)
    for model, source, text in (
        (random_lora(graft, "mlp", 1, **LORA, **MLP), "ia3", "Incompatible PEFT types found: LORA and IA3"),
        (ia3, "lora", "Incompatible PEFT types found: IA3 and LORA"),
        (ia3, "ia3", "Hotswapping only supports LORA but IA3 was passed"),
    ):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ConfigError, match=text):
            graft.hotswap_adapter(model, str(tmp_path / source), "default")
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert folder == str(tmp_path / "lora")


@pytest.mark.differs("hot-swapping: PiSSA, OLoRA, KaSA")
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_adapters_that_belong_to_a_changed_base_are_refused(tmp_path, how):
    refused(tmp_path, ConfigError, "path_initial_model_for_weight_conversion", init_lora_weights=how)
    refused(tmp_path, ConfigError, "in the model belongs", first=LORA | MLP | {"init_lora_weights": how})


def drop(*fragments):
    def edit(tensors):
        for key in [k for k in tensors if any(f in k for f in fragments)]:
            del tensors[key]

    return edit


def test_keys_that_fit_nothing_are_named(tmp_path):
    refused(tmp_path, AdapterKeyError, r"unexpected keys found: .*head\.lora_A", target_modules=["fc1", "head"])
    folder = save(tmp_path / "2", "mlp", 2, **LORA, target_modules=["fc1", "head"])
    with pytest.raises(RuntimeError, match="unexpected keys found"):
        first = save(tmp_path / "1", "mlp", 1, **LORA, **MLP)
        peft_hotswap.hotswap_adapter(loaded(peft, "mlp", first), folder, "default")


@pytest.mark.differs(
    "hot-swapping: a layer with only A or only B, or one that the new config targets and the file lacks"
)
def test_missing_keys_are_named(tmp_path):
    text = r"missing keys: \[base_model\.model\.layers\.1\.fc1\.lora_B\.weight\]"
    refused(tmp_path, AdapterKeyError, text, edit=drop("layers.1.fc1.lora_B"))
    # the config says that the layer is adapted: without its tensors this is not the adapter
    refused(tmp_path, AdapterKeyError, "missing keys: .*lin0.lora_A.weight, .*lin0.lora_B", edit=drop("lin0"))
    refused(tmp_path, AdapterKeyError, "magnitude", first=LORA | MLP | {"use_dora": True}, target_modules=["fc1"])
    first = LORA | dict(target_modules=["fc1"], modules_to_save=["head"])
    refused(tmp_path, AdapterKeyError, r"missing keys: .*head\.weight", first=first, modules_to_save=None)


def test_an_adapter_for_none_of_the_layers_is_refused(tmp_path):
    config = graft.LoraConfig(**LORA, target_modules=["other"])
    text = "it has no layer of this one.*is unchanged.*call load_adapter.. with another name"
    refused(tmp_path, AdapterKeyError, text, edit=dict.clear, config=config)


@pytest.mark.differs("hot-swapping: shapes that differ in more than the rank, ranks that are not the config's")
@pytest.mark.differs("hot-swapping: an error on the way")
def test_shapes_and_ranks_must_be_those_of_the_config(tmp_path):
    def edit(tensors):
        key = "base_model.model.lin0.lora_A.weight"
        tensors[key] = tensors[key][:, :-1]

    refused(tmp_path, AdapterKeyError, r"lin0\.lora_A\.weight has shape \(3, 9\), expected is \(3, 10\)", edit=edit)
    config = graft.LoraConfig(**LORA | MLP | {"r": 4})
    refused(tmp_path, AdapterKeyError, r"has shape \(3, 10\), expected is \(4, 10\)", config=config)


def test_base_weights_that_differ_are_refused(tmp_path):
    def edit(tensors):
        tensors["base_model.model.model.embed_tokens.base_layer.weight"] += 0.5

    first = LORA | dict(target_modules=["embed_tokens", "q_proj"])
    refused(tmp_path, AdapterKeyError, "embed_tokens.base_layer.weight is not what the base", "llama", first, edit=edit)


def test_a_merged_adapter_must_be_unmerged(tmp_path):
    folder = save(tmp_path, "mlp", 2, **LORA, **MLP)
    model = random_lora(graft, "mlp", 1, **LORA, **MLP)
    model.merge_adapter()
    before = state(model)
    with pytest.raises(ConfigError, match=r"'default' because it is currently merged .*unmerge_adapter\(\)"):
        graft.hotswap_adapter(model, folder, "default")
    unchanged(model, before)
    with pytest.raises(ConfigError, match="merged"):
        graft.prepare_model_for_compiled_hotswap(model, target_rank=7)
    unchanged(model, before)
    model.unmerge_adapter()
    graft.hotswap_adapter(model, folder, "default")
    assert_close(output(model, "mlp"), output(loaded(peft, "mlp", folder), "mlp"))


@pytest.mark.differs("hot-swapping: an adapter for another architecture")
def test_another_architecture_and_damaged_files(tmp_path):
    model = random_lora(graft, "mlp", 1, **LORA, **MLP)
    before = state(model)
    with pytest.raises(CheckpointError, match="adapter_config"):
        graft.hotswap_adapter(model, str(tmp_path), "default")
    other = models.make("mlp")
    other.layers = torch.nn.ModuleList(list(other.layers)[:2])
    narrow = graft.get_peft_model(other, graft.LoraConfig(**LORA, target_modules=["fc1"]))
    narrow.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"fc1"', '"layers.0.fc1", "layers.1.fc1"'))
    graft.hotswap_adapter(model, str(tmp_path), "default")  # fewer layers: shapes agree
    unwanted = models.make("mlp")
    unwanted.lin0 = torch.nn.Linear(10, 12)
    before = state(model)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_weights(str(tmp_path))
    stored = tensors.fingerprint
    stored["weights"]["layers.0.fc1"], stored["shapes"] = [21, 12], "another"
    save_file({k: v.clone() for k, v in tensors.tensors.items()}, weights, {"graft_base": json.dumps(stored)})
    with pytest.raises(BaseModelMismatchError, match=r"layers\.0\.fc1"):
        graft.hotswap_adapter(model, str(tmp_path), "default")
    unchanged(model, before)
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated or corrupted"):
        graft.hotswap_adapter(model, str(tmp_path), "default")
    unchanged(model, before)


def tied(r=3, **fields):
    base = models.make("llama")
    base.lm_head.weight = base.model.embed_tokens.weight
    base.config.tie_word_embeddings = True
    options = on("embed_tokens", "q_proj", lora_alpha=4.11, ensure_weight_tying=True, **fields)
    return graft.get_peft_model(base, graft.LoraConfig(r=r, **options))


def test_tied_adapters_do_not_grow():
    def tensors(model):
        return {k: v.detach().clone() for k, v in graft.get_peft_model_state_dict(disturb(model)).items()}

    model, same, larger = tied(3), tied(3), tied(5)
    assert isinstance(model.base_model.model.lm_head, AdapterLayer)
    graft.hotswap_adapter_from_state_dict(model, tensors(same), "default", same.peft_config["default"])
    assert_close(output(model, "llama"), output(same, "llama"))
    before = state(model)
    with pytest.raises(ConfigError, match="ensure_weight_tying"):
        graft.hotswap_adapter_from_state_dict(model, tensors(larger), "default", larger.peft_config["default"])
    with pytest.raises(ConfigError, match="ensure_weight_tying"):
        graft.prepare_model_for_compiled_hotswap(model, target_rank=5)
    unchanged(model, before)


def test_a_tied_head_has_the_rank_and_alpha_of_its_embedding(tmp_path):
    model, other = (tied(2, rank_pattern={"embed_tokens": 4}, alpha_pattern={"embed_tokens": 32}) for _ in range(2))
    disturb(other)
    assert other.base_model.model.lm_head.scaling == {"default": 8.0}
    other.save_pretrained(tmp_path)
    graft.hotswap_adapter(model, str(tmp_path), "default")
    assert model.base_model.model.lm_head.scaling == {"default": 8.0}
    assert_close(output(model, "llama"), output(other, "llama"))


# before compiling


@pytest.mark.parametrize("name", ["mlp", "conv2d", "conv1D"])
def test_preparing_pads_as_peft_does(name):
    targets = {"mlp": MLP, "conv2d": CONV, "conv1D": dict(target_modules=["c_fc"])}[name]
    config = LORA | targets | {"r": 4}
    ours, theirs = random_lora(graft, name, 1, **config), random_lora(peft, name, 1, **config)
    before = output(ours, name)
    configs = graft.LoraConfig(**config), peft.LoraConfig(**config)
    graft.prepare_model_for_compiled_hotswap(ours, target_rank=6, config=configs[0])
    peft_hotswap.prepare_model_for_compiled_hotswap(theirs, target_rank=6, config=configs[1])
    assert configs[0].r == configs[1].r == 6
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], v) for k, v in b.items())
    assert_close(output(ours, name), before)
    scalings = [m.scaling["default"] for _, m in lora_layers(ours)]
    assert scalings and all(isinstance(s, torch.Tensor) and s == pytest.approx(4.11 / 4) for s in scalings)


def test_preparing_embeddings_patterns_and_several_adapters(tmp_path):
    config = LORA | dict(target_modules=["emb", "lin"], rank_pattern={"lin": 5}, use_rslora=True)
    model = random_lora(graft, "embedding", 1, **config)
    model.add_adapter("b", graft.LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False))
    before = output(model, "embedding")
    graft.prepare_model_for_compiled_hotswap(model, target_rank=6, config=model.peft_config)
    assert_close(output(model, "embedding"), before)
    assert [(c.r, c.rank_pattern) for c in model.peft_config.values()] == [(6, {"lin": 6}), (6, {})]
    model.save_pretrained(tmp_path)
    assert_close(output(loaded(peft, "embedding", str(tmp_path)), "embedding"), before)
    model.set_adapter("b")
    y = output(model, "embedding")
    assert_close(output(loaded(peft, "embedding", str(tmp_path / "b")), "embedding"), y)


def test_a_prepared_model_does_all_that_it_did(tmp_path):
    plain, model = (random_lora(graft, "mlp", 1, **LORA, **MLP) for _ in range(2))
    graft.prepare_model_for_compiled_hotswap(model)  # ranks stay, scalings are tensors
    assert model.base_model.model.lin0.lora_A.default.weight.shape == (3, 10)
    for m in (plain, model):
        m.load_adapter(save(tmp_path, "mlp", 3, **LORA, **MLP), "b")
        m.add_weighted_adapter(["default", "b"], [0.7, 0.6], "sum", "linear")
    rows = dict(adapter_names=["default", "b", "__base__"])
    with torch.no_grad():
        assert_close(model(**models.inputs("mlp"), **rows), plain(**models.inputs("mlp"), **rows))
    for name in ("default", "sum"):
        for m in (plain, model):
            m.set_adapter(name)
        assert_close(output(model, "mlp"), output(plain, "mlp"))
        merged = [output(copy.deepcopy(m).merge_and_unload(), "mlp") for m in (plain, model)]
        assert_close(merged[1], merged[0])
    for m in (plain, model):
        m.set_adapter("default")
        m(**models.inputs("mlp")).square().mean().backward()
    grads = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (plain, model)]
    assert grads[0] and grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(g, grads[1][n], atol=1e-6) for n, g in grads[0].items())
    with rescale_adapter_scale(model, 0.5), rescale_adapter_scale(plain, 0.5):
        assert_close(output(model, "mlp"), output(plain, "mlp"))


@pytest.mark.parametrize("how", ["swapped", "prepared and swapped", "deleted and loaded"])
def test_what_comes_while_scales_are_changed_keeps_its_own(tmp_path, how):
    folder = save(tmp_path, "mlp", 2, **LORA | MLP | dict(lora_alpha=7.3))
    model = random_lora(graft, "mlp", 1, **LORA, **MLP)
    model.add_adapter("other", graft.LoraConfig(**LORA, **MLP))
    if how.startswith("prepared"):
        graft.prepare_model_for_compiled_hotswap(model, target_rank=4)
    with rescale_adapter_scale(model, 0.5):
        if how.endswith("swapped"):
            graft.hotswap_adapter(model, folder, "default")
        else:
            model.set_adapter("other")
            model.delete_adapter("default")
            model.load_adapter(folder, "default")
    model.set_adapter("default")
    assert_close(output(model, "mlp"), output(loaded(graft, "mlp", folder), "mlp"))
    assert all(abs(layer.scaling["other"] - 1.37) < 1e-6 for layer in get_registry(model).layers.values())


def test_preparing_refuses_what_it_cannot_do():
    model = random_lora(graft, "conv2d", 1, **LORA | CONV | {"r": 4})
    before = state(model)
    for options, text in (
        (dict(target_rank=3), r"target rank 3, but the original rank is larger \(4\).*'default'.*conv'"),
        (dict(target_rank=7), r"groups=2 to target rank 7.*grouped'"),
        (dict(check_compiled="maybe"), r"check_compile.* should be one of"),
    ):
        with pytest.raises(ConfigError, match=text):
            graft.prepare_model_for_compiled_hotswap(model, **options)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ConfigError, match=r"\*before\* compiling"):
        graft.prepare_model_for_compiled_hotswap(compiled, target_rank=6)
    unchanged(model, before)
    with pytest.warns(graft.PeftWarning, match="already compiled"):
        graft.prepare_model_for_compiled_hotswap(compiled, target_rank=6, check_compiled="warn")
    assert model.base_model.model.lin.r == {"default": 6}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graft.prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="ignore")
    assert model.base_model.model.lin.r == {"default": 8}
    with pytest.raises(ConfigError, match="No adapter layers found"):
        graft.prepare_model_for_compiled_hotswap(models.make("mlp"))


SWAPS = [(2, 3.3, ["fc1"]), (6, 4.7, ["lin0", "fc2"]), (1, 2.1, ["lin0", "fc1", "fc2"]), (4, 1.9, ["layers.1.fc2"])]


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "what", ["model", *(pytest.param(w, marks=pytest.mark.slow) for w in ("in place", "unwrapped"))]
)
def test_a_prepared_model_is_compiled_once(tmp_path, backend, what):
    model = random_lora(graft, "mlp", 9, **LORA, **MLP)
    graft.prepare_model_for_compiled_hotswap(model, target_rank=6)
    torch._dynamo.reset()
    run = model
    if what == "model":
        run = torch.compile(model, backend=backend, fullgraph=True)
    elif what == "in place":
        model.compile(backend=backend)
    else:
        run = torch.compile(model.base_model.model, backend=backend, fullgraph=True)
    before = output(run, "mlp")
    with torch._dynamo.config.patch(error_on_recompile=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed, (r, alpha, targets) in enumerate(SWAPS):
            folder = save(tmp_path / str(seed), "mlp", seed, r=r, lora_alpha=alpha, target_modules=targets)
            graft.hotswap_adapter(run if what == "model" else model, folder, "default")
            y = output(run, "mlp")
            assert_close(y, output(loaded(peft, "mlp", folder), "mlp"))
            assert not torch.allclose(y, before, atol=1e-3)
            before = y
    torch._dynamo.reset()


def test_a_model_that_is_not_prepared_is_compiled_again(tmp_path):
    """What the test above would see if it failed."""
    model = random_lora(graft, "mlp", 9, **LORA, **MLP)
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager")
    output(run, "mlp")
    graft.hotswap_adapter(run, save(tmp_path, "mlp", 1, **LORA | MLP | {"lora_alpha": 5.5}), "default")
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(Exception, match="Recompiling"):
        output(run, "mlp")
    torch._dynamo.reset()


@pytest.mark.differs("hot-swapping: growing beyond `target_rank`")
def test_growing_beyond_the_room_warns(tmp_path):
    model = random_lora(graft, "mlp", 1, **LORA, **MLP)
    graft.prepare_model_for_compiled_hotswap(model, target_rank=5)
    folder = save(tmp_path, "mlp", 2, **LORA | MLP | {"r": 7})
    with pytest.warns(graft.PeftWarning, match="'default' grows to rank 7.*compiled again"):
        graft.hotswap_adapter(model, folder, "default")
    assert_close(output(model, "mlp"), output(loaded(peft, "mlp", folder), "mlp"))
