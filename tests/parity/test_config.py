# SPDX-License-Identifier: Apache-2.0
"""Configurations: the same fields, defaults, files and registries as PEFT's."""

import importlib
import json
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path

import pytest

from tests.pair import LIBS, adapt, close_dicts, common, json_of, outcome
from tests.raised import refuses
from tests.samples import ELSEWHERE, METHODS, SAMPLES, Sample, over_all

METHOD = pytest.mark.parametrize("method", METHODS)


def cls(lib, method):
    return lib.PEFT_TYPE_TO_CONFIG_MAPPING[method]


def default(f):
    return f.default if f.default_factory is MISSING else f.default_factory()


@METHOD
def test_fields_and_defaults(method):
    """All of PEFT's fields; graft may add its own."""
    ours, theirs = ({f.name: default(f) for f in fields(cls(lib, method)) if f.init} for lib in LIBS)
    for name in theirs.keys() - {"peft_type", "peft_version"}:
        assert str(ours[name]) == str(theirs[name]), name


SUB_CONFIGS = {
    "LoraRuntimeConfig": "peft", "ArrowConfig": "peft", "KasaConfig": "peft", "VeloraConfig": "peft",
    "MontecloraConfig": "peft", "BdLoraConfig": "peft.tuners.lora", "EvaConfig": "peft", "LoftQConfig": "peft",
    "LoraGAConfig": "peft", "CordaConfig": "peft.tuners.lora.config",
}  # fmt: skip


@pytest.mark.parametrize("name", SUB_CONFIGS)
def test_fields_and_defaults_of_configs_within(name):
    classes = getattr(LIBS[0], name), getattr(importlib.import_module(SUB_CONFIGS[name]), name)
    ours, theirs = ({f.name: (default(f), f.init) for f in fields(c)} for c in classes)
    assert ours == theirs


@pytest.mark.parametrize("method", sorted(ELSEWHERE))
def test_fields_and_defaults_of_methods_that_are_compared_elsewhere(method):
    test_fields_and_defaults(method)


NEEDED = {
    "ADALORA": {"total_step": 10},
    "CPT": {"task_type": "CAUSAL_LM"},
    "OFT": {"peft_version": "0.21.2", "oft_block_size": 32},
    "XLORA": {"hidden_size": 8, "adapters": {}},
}


@pytest.mark.differs("None in a field of a config that has a default (`fan_in_fan_out=None`)")
@pytest.mark.parametrize("method", [kind.value for kind in LIBS[0].PeftType])
def test_null_is_the_default(method):
    """In a file and in a call, in every field that has a default and of which None is no value."""
    config, needed = cls(LIBS[0], method), NEEDED.get(method, {})
    wanted = config(**needed).to_file_dict()
    for name in wanted.keys() - needed.keys() - {"peft_type", "random_loc_seed"}:  # FourierFT has no value without it
        given = {"peft_type": method, **needed, name: None}
        for made in (LIBS[0].PeftConfig.from_peft_type(**given), config(**given)):
            assert made.to_file_dict()[name] in (None, wanted[name]), name


@pytest.mark.parametrize("name", sorted(SUB_CONFIGS.keys() - {"LoraRuntimeConfig"}))
def test_null_is_the_default_in_configs_within(name):
    config = getattr(LIBS[0], name)
    for f in fields(config):
        if f.init:
            assert getattr(config(**{f.name: None}), f.name) in (None, default(f)), f.name


def test_files_of_axolotl():
    given = dict(peft_type="LORA", fan_in_fan_out=None, lora_dropout=None, r=4, rank_pattern=None)
    ours, theirs = (lib.PeftConfig.from_peft_type(**given) for lib in LIBS)
    assert ours.fan_in_fan_out is False and ours.lora_dropout == 0.0
    assert ours.r == theirs.r and not theirs.fan_in_fan_out


@pytest.mark.differs("settings of a variant or an initialisation with unknown keys, given as a dict")
@pytest.mark.parametrize("field, values", [
    ("kasa_config", dict(beta=0.5)), ("velora_config", dict(scale=0.5)), ("use_bdlora", dict(nblocks=3)),
    ("arrow_config", dict(top_k=2)),
])  # fmt: skip
def test_unknown_keys_of_a_config_within(field, values):
    """Of a file of a newer version. PEFT leaves them out in silence."""
    ours, theirs = (outcome(lambda lib=lib: lib.LoraConfig(**{field: {**values, "zeta": 1}})) for lib in LIBS)
    assert vars(getattr(ours.value, field)) == vars(getattr(theirs.value, field))
    assert ours.warned("zeta")


def test_a_stored_runtime_config_is_left_out(tmp_path):
    LIBS[1].LoraConfig(r=5).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "runtime_config": {"ephemeral_gpu_offload": True}}))
    for lib in LIBS:
        result = outcome(lambda lib=lib: lib.LoraConfig.from_pretrained(tmp_path))
        assert result.value.runtime_config == lib.LoraRuntimeConfig() and result.warned("runtime")


@pytest.mark.parametrize("how", ["OLoRA", "olora", "GAUSSIAN"])
def test_spellings_of_a_start(how):
    """MiCA's are in methods/test_mica.py; of others PEFT knows one."""
    sample = Sample("LORA", "spelled", "mlp", dict(r=3, target_modules=["lin0"], init_lora_weights=how))
    ours, theirs = (adapt(lib, sample).state_dict() for lib in LIBS)
    close_dicts(common(ours), common(theirs), 1e-6)
    for wrong in ("PiSSA", "Orthogonal", "true"):
        for lib in LIBS:
            with pytest.raises(ValueError, match=f"Unknown initialization init_lora_weights='{wrong}'"):
                adapt(lib, Sample("LORA", "wrong", "mlp", {**sample.kwargs, "init_lora_weights": wrong}))


@METHOD
def test_names(method):
    ours, theirs = (cls(lib, method) for lib in LIBS)
    assert ours.__name__ == theirs.__name__
    assert getattr(LIBS[0], ours.__name__) is ours
    assert LIBS[0].PEFT_TYPE_TO_TUNER_MAPPING[method].__name__ == LIBS[1].PEFT_TYPE_TO_TUNER_MAPPING[method].__name__
    assert ours().peft_type == LIBS[0].PeftType[method] == method
    assert LIBS[0].PeftType[method].value == LIBS[1].PeftType[method].value


@pytest.mark.graft_only
def test_every_method_that_peft_has_is_compared():
    have = {m for m in LIBS[0].methods.METHODS if hasattr(LIBS[1].PeftType, m)}
    assert set(METHODS) | set(ELSEWHERE) == have
    assert all((Path(__file__).parents[1] / name).is_file() for name in ELSEWHERE.values())


def test_enums():
    assert {t.value for t in LIBS[0].TaskType} == {t.value for t in LIBS[1].TaskType}
    assert {k: v.__name__ for k, v in LIBS[0].MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items()} == {
        k: v.__name__ for k, v in LIBS[1].MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items()
    }


@over_all(SAMPLES)
def test_files_of_configurations(sample, tmp_path):
    sample.config(LIBS[0]).save_pretrained(tmp_path / "ours")
    sample.config(LIBS[1]).save_pretrained(tmp_path / "theirs")
    assert json_of(tmp_path / "ours") == json_of(tmp_path / "theirs")
    text = (tmp_path / "ours" / "adapter_config.json").read_text()
    assert text.rstrip() == json.dumps(json.loads(text), indent=2, sort_keys=True)
    loaded = [lib.PeftConfig.from_pretrained(tmp_path / "ours") for lib in LIBS]
    assert type(loaded[0]).__name__ == type(loaded[1]).__name__
    ours, theirs = map(plain, loaded)
    assert {k: ours[k] for k in theirs} == theirs


@over_all(SAMPLES)
def test_its_own_dict(sample):
    """Sets, enums and all: what a config says of itself makes an equal one."""
    configs = [sample.config(lib) for lib in LIBS]
    assert plain(configs[0]) == plain(configs[1])  # without graft's own fields
    ours, theirs = (config.to_dict() for config in configs)
    special = {k: type(v).__name__ for k, v in theirs.items() if isinstance(v, (set, Enum))}
    assert special.items() <= {k: type(v).__name__ for k, v in ours.items()}.items()
    for lib, config in zip(LIBS, configs):
        assert type(config)(**config.to_dict()) == lib.get_peft_config(config.to_dict()) == config
    assert "runtime_config" not in ours


def test_a_dict_is_a_copy():
    config = LIBS[0].LoraConfig(rank_pattern={"a": 2})
    config.to_dict()["rank_pattern"]["b"] = 3
    assert config.rank_pattern == {"a": 2}


def plain(config):
    """As a dictionary of plain values, sets as sorted lists, without the version."""
    values = json.loads(json.dumps(config.to_dict(), default=sorted))
    return {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in values.items() if k != "peft_version"}


@METHOD
def test_from_a_dict(method):
    values = {"peft_type": method, "target_modules": ["a", "b"]}
    ours, theirs = (lib.get_peft_config(dict(values)) for lib in LIBS)
    assert type(ours).__name__ == type(theirs).__name__
    assert set(ours.target_modules) == set(theirs.target_modules)


def test_file_beats_keyword(tmp_path):
    LIBS[1].LoraConfig(r=5).save_pretrained(tmp_path)
    for lib in LIBS:
        assert lib.LoraConfig.from_pretrained(tmp_path, r=9).r == 5


def test_sub_folder(tmp_path):
    LIBS[1].LoraConfig(r=5).save_pretrained(tmp_path / "sub")
    for lib in LIBS:
        assert lib.PeftConfig.from_pretrained(str(tmp_path), subfolder="sub").r == 5


def test_unknown_keys(tmp_path):
    LIBS[1].LoraConfig(r=5).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "zeta": 1, "alpha_new": {"x": 2}}))
    for lib in LIBS:
        result = outcome(lambda lib=lib: lib.PeftConfig.from_pretrained(tmp_path))
        assert result.value.r == 5
        assert result.warned("['alpha_new', 'zeta']")


@pytest.mark.parametrize("method", ["LORA", "IA3", "OFT"])
def test_file_without_a_type(method, tmp_path):
    """The class that reads it knows its own type."""
    config = cls(LIBS[1], method)(**({"feedforward_modules": []} if method == "IA3" else {}))
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "peft_type"}))
    for lib in LIBS:
        assert cls(lib, method).from_pretrained(tmp_path).peft_type == method
    path.write_text(json.dumps({**json.loads(path.read_text()), "zeta": 1}))
    for lib in LIBS:
        refuses(TypeError, r"missing required keys: \{'peft_type'\}", cls(lib, method).from_pretrained, tmp_path)
        refuses(TypeError, r"missing required keys: \{'peft_type'\}", lib.PeftConfig.from_pretrained, tmp_path)


def test_old_oft_files(tmp_path):
    LIBS[1].OFTConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in values.items() if k != "oft_block_size"}))
    for lib in LIBS:
        refuses(ValueError, "OFT", lib.OFTConfig.from_pretrained, tmp_path)


def test_runtime_settings_stay_out_of_files(tmp_path):
    for lib in LIBS:
        config = lib.LoraConfig(runtime_config=lib.LoraRuntimeConfig(ephemeral_gpu_offload=True))
        config.save_pretrained(tmp_path)
        assert "runtime_config" not in json.loads((tmp_path / "adapter_config.json").read_text())
