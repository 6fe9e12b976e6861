# SPDX-License-Identifier: Apache-2.0
"""Which modules are adapted: the same set as PEFT, or the same refusal."""

import re

import peft
import pytest
from torch import nn

import graft
from tests import models
from tests.covering import EVERYTHING, Case, Sometimes, law
from tests.pair import LIBS, outcome
from tests.trees import Config, tree

L = "model.layers"

# name → (model, config); every method but LN_TUNING shares these rules
CASES = {
    "suffix": ("llama", dict(target_modules=["q_proj"])),
    "dotted_suffix": ("llama", dict(target_modules=["self_attn.q_proj", "mlp.up_proj"])),
    "full_name": ("llama", dict(target_modules=[f"{L}.1.self_attn.q_proj"])),
    "suffix_is_not_substring": ("llama", dict(target_modules=["_proj"])),
    "no_partial_component": ("llama", dict(target_modules=["proj"])),
    "set": ("llama", dict(target_modules={"v_proj", "o_proj"})),
    "tuple_of_two": ("mlp", dict(target_modules=("lin0", "fc1"))),
    "some_unmatched": ("llama", dict(target_modules=["q_proj", "nope"])),
    "top_level": ("mlp", dict(target_modules=["head"])),
    "index_like": ("mlp", dict(target_modules=["layers.0.fc1", "1.fc1"])),
    "regex": ("llama", dict(target_modules=r".*\.[qv]_proj")),
    "regex_is_full_match": ("llama", dict(target_modules=r"q_proj")),
    "regex_anchored": ("llama", dict(target_modules=rf"^{L}\.\d+\.mlp\.\w+$")),
    "regex_lookahead": ("llama", dict(target_modules=r"model\.layers\.(?!0).*(up|down)_proj")),
    "regex_lm_head": ("llama", dict(target_modules=r".*lm_head|.*q_proj")),
    "all_linear": ("llama", dict(target_modules="all-linear")),
    "all_linear_upper": ("llama", dict(target_modules="ALL-LINEAR")),
    "all_linear_conv1D": ("gpt2", dict(target_modules="all-linear")),
    "all_linear_mlp": ("mlp", dict(target_modules="all-linear")),
    "all_linear_seq_cls": ("bert-seq", dict(target_modules="all-linear", task_type="SEQ_CLS")),
    "all_linear_seq_cls_untold": ("bert-seq", dict(target_modules="all-linear")),
    "all_linear_tok": ("bert-tok", dict(target_modules="all-linear")),
    "all_linear_t5": ("t5", dict(target_modules="all-linear")),
    "all_linear_exclude": ("llama", dict(target_modules="all-linear", exclude_modules=["q_proj", "mlp.gate_proj"])),
    "all_linear_save": ("mlp", dict(target_modules="all-linear", modules_to_save=["head"])),
    "all_linear_mixed_layers": ("conv2d", dict(target_modules="all-linear")),
    "exclude": ("llama", dict(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"])),
    "exclude_full": ("llama", dict(target_modules=["q_proj"], exclude_modules=[f"{L}.0.self_attn.q_proj"])),
    "exclude_regex": ("llama", dict(target_modules=["q_proj", "v_proj"], exclude_modules=r".*\.1\..*v_proj")),
    "exclude_nothing": ("llama", dict(target_modules=["q_proj"], exclude_modules=["nope"])),
    "exclude_all": ("llama", dict(target_modules=["q_proj"], exclude_modules=["q_proj"])),
    "exclude_everything": ("mlp", dict(target_modules=["fc1"], exclude_modules=r".*")),
    "exclude_and_missing": ("llama", dict(target_modules=["nope"], exclude_modules=["q_proj"])),
    "regex_exclude_suffix": ("llama", dict(target_modules=r".*_proj", exclude_modules=["o_proj"])),
    "save_is_not_targeted": ("mlp", dict(target_modules=["head", "fc1"], modules_to_save=["head"])),
    "save_everything_targeted": ("mlp", dict(target_modules=["head"], modules_to_save=["head"])),
    "save_parent": ("mlp", dict(target_modules=["fc1", "head"], modules_to_save=["layers"])),
    "save_missing": ("mlp", dict(target_modules=["fc1"], modules_to_save=["nope"])),
    "layer_int": ("llama", dict(target_modules=["q_proj", "v_proj"], layers_to_transform=1)),
    "layer_zero": ("llama", dict(target_modules=["q_proj"], layers_to_transform=0)),
    "layer_list": ("llama", dict(target_modules=["q_proj"], layers_to_transform=[0, 1])),
    "layer_empty_list": ("llama", dict(target_modules=["q_proj"], layers_to_transform=[])),
    "layer_missing": ("llama", dict(target_modules=["q_proj"], layers_to_transform=[7])),
    "layer_pattern": ("llama", dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")),
    "layer_patterns": ("llama", dict(target_modules=["q_proj"], layers_to_transform=[1],
                                     layers_pattern=["h", "layers"])),
    "layer_pattern_missing": ("llama", dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="h")),
    "layer_pattern_empty": ("llama", dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=[])),
    "layer_without_index": ("mlp", dict(target_modules=["lin0", "fc1"], layers_to_transform=[0])),
    "layer_top_level_list": ("mlp", dict(target_modules=["fc1"], layers_to_transform=[0])),
    "layer_top_level_pattern": ("mlp", dict(target_modules=["fc1"], layers_to_transform=[0], layers_pattern="layers")),
    "layer_ignored_for_full_names": ("llama", dict(target_modules=[f"{L}.0.self_attn.q_proj", "v_proj"],
                                                   layers_to_transform=[1])),
    "layer_of_two_indices": ("t5", dict(target_modules=["q"], layers_to_transform=[1])),
    "layer_pattern_of_two": ("t5", dict(target_modules=["q"], layers_to_transform=[1], layers_pattern="layer")),
    "layer_exclude": ("llama", dict(target_modules=["q_proj"], layers_to_transform=[0, 1],
                                    exclude_modules=["0.self_attn.q_proj"])),
    "empty": ("mlp", dict(target_modules=[])),
    "missing": ("mlp", dict(target_modules=["nope"])),
    "missing_regex": ("mlp", dict(target_modules="nope.*")),
    "missing_str": ("mlp", dict(target_modules="fc1")),
    "case": ("mlp", dict(target_modules=["FC1"])),
    "none_unknown_model": ("mlp", dict(target_modules=None)),
    "none_llama": ("llama", dict(target_modules=None)),
    "none_deberta": ("deberta", dict(target_modules=None)),
    "none_layer": ("llama", dict(target_modules=None, layers_to_transform=[1])),
    "dummy": ("mlp", dict(target_modules="dummy-target-modules")),
    "unsupported_norm": ("mlp", dict(target_modules=["norm"])),
    "unsupported_parent": ("llama", dict(target_modules=["self_attn"])),
    "some_unsupported": ("mlp", dict(target_modules=["norm", "fc1"])),
    "embedding": ("llama", dict(target_modules=["embed_tokens", "q_proj"])),
    "name_within_name": ("gpt2", dict(target_modules=["c_proj"])),
    "dotted_within_name": ("gpt2", dict(target_modules=["attn.c_proj"])),
    "more_than_twenty": (
        "llama",
        dict(
            target_modules=[
                f"{L}.{i}.{m}"
                for i in (0, 1)
                for m in (
                    "self_attn.q_proj",
                    "self_attn.k_proj",
                    "self_attn.v_proj",
                    "self_attn.o_proj",
                    "mlp.gate_proj",
                    "mlp.up_proj",
                    "mlp.down_proj",
                )
            ]
            + [f"x{i}" for i in range(10)]
        ),
    ),
    "regex_special_in_list": ("llama", dict(target_modules=[r".*\.q_proj", "v_proj"])),
}  # fmt: skip


def targeted(lib, model, cls, **config):
    model = models.make(model) if isinstance(model, str) else model
    return outcome(lambda: list(lib.get_peft_model(model, getattr(lib, cls)(**config)).targeted_module_names))


CLASS = re.compile("<class '[^']*'>")


def first_sentence(error: Exception) -> str:
    if "not supported" in str(error):
        return "not supported"  # graft says which layer it is, PEFT prints the module
    return CLASS.sub("", str(error)).split(". ")[0].rstrip(".")


def assert_same(ours, theirs):
    if theirs.error is None:
        assert ours.error is None
        assert ours.value == theirs.value
        return
    assert isinstance(ours.error, theirs.kind), (ours.error, theirs.error)
    assert (type(theirs.error).__name__ == "NoMatchingPeftModuleError") == (
        type(ours.error).__name__ == "NoMatchingPeftModuleError"
    )
    assert first_sentence(theirs.error) in CLASS.sub("", str(ours.error))


@pytest.mark.parametrize("case", CASES)
def test_lora(case):
    model, config = CASES[case]
    assert_same(*(targeted(lib, model, "LoraConfig", **config) for lib in LIBS))


OTHERS = {
    "VeraConfig": dict(r=2),
    "LoHaConfig": {},
    "OFTConfig": {},
    "HRAConfig": {},
    "HiraConfig": {},
    "GraloraConfig": dict(r=2),
    "DeloraConfig": {},
    "C3AConfig": dict(block_size=1),
    "FourierFTConfig": dict(n_frequency=1),
    "WaveFTConfig": dict(n_frequency=1),
    "LoKrConfig": {},
    "MissConfig": dict(r=2),
    "VBLoRAConfig": dict(vector_length=1),
    "IA3Config": dict(feedforward_modules=[]),
}
# layer types that PEFT refuses for some of these methods; messages that differ by method
NOT_SHARED = ("unsupported", "embedding", "conv1D", "name_within", "dotted_within", "mixed_layers", "none_", "empty")


def shared_cases():
    for cls, values in OTHERS.items():
        fields = vars(getattr(peft, cls)(**values))
        for case, (_, config) in CASES.items():
            if config.keys() <= fields.keys() and not any(part in case for part in NOT_SHARED):
                yield cls, case


@law("cls, case", [Case(c) for c in shared_cases()], lambda c: [c[0], c[1], Sometimes(c, 8)])
def test_other_methods(cls, case):
    model, config = CASES[case]
    ours, theirs = (targeted(lib, model, cls, **OTHERS[cls], **config) for lib in LIBS)
    if cls == "VeraConfig" and theirs.error:  # PEFT measures the layers first and has other words for no match
        assert isinstance(ours.error, (ValueError, TypeError))
    elif cls == "VeraConfig" and case == "dummy":
        assert ours.error is None
    elif cls == "VBLoRAConfig" and case == "dummy":  # what layers share stands on one of them, at least
        assert "No layers types compatible" in str(ours.error)
    else:
        assert_same(ours, theirs)


# the default targets are data: every model type of PEFT's tables, on a tree that has all the names

MAPS = {
    "LoraConfig": ("LORA", {}),
    "IA3Config": ("IA3", {}),
    "VeraConfig": ("VERA", dict(r=2)),
    "LoHaConfig": ("LOHA", {}),
    "OFTConfig": ("OFT", dict(oft_block_size=2)),
    "HRAConfig": ("HRA", {}),
    "HiraConfig": ("HIRA", {}),
    "MissConfig": ("MISS", dict(r=2)),
    "VBLoRAConfig": ("VBLORA", dict(vector_length=1)),
    "PveraConfig": ("PVERA", dict(r=2)),
    "RandLoraConfig": ("RANDLORA", dict(r=2)),
    "UniLoraConfig": ("UNILORA", {}),
    "TinyLoraConfig": ("TINYLORA", {}),
    "GraloraConfig": ("GRALORA", dict(r=2)),
    "DeloraConfig": ("DELORA", {}),
    "C3AConfig": ("C3A", dict(block_size=1)),
    "FourierFTConfig": ("FOURIERFT", dict(n_frequency=1)),
    "AdamssConfig": ("ADAMSS", dict(r=2)),
    "WaveFTConfig": ("WAVEFT", dict(n_frequency=1)),
    "LoKrConfig": ("LOKR", {}),
    "FrodConfig": ("FROD", {}),
    "LNTuningConfig": ("LNTUNING", {}),
}


def default_map(name: str) -> dict:
    from peft.utils import constants

    return getattr(constants, f"TRANSFORMERS_MODELS_TO_{name}_TARGET_MODULES_MAPPING")


def words() -> list[str]:
    """Every name of every default map, under two parents, and one that regular expressions of the maps match."""
    names = {
        n
        for name, _ in MAPS.values()
        for value in default_map(name).values()
        if not isinstance(value, str)
        for n in value
    }
    return [f"{p}.{n}" for p in ("model.layers.0", "model.language_model.layers.1") for n in sorted(names)]


def alike(types: list[str], name: str, cls: str, config: dict) -> list[str]:
    """One of the types to which both libraries give the same targets: only the tables know types.

    LoRA meets all of these; the others, whose tables say the same of most types, a quarter.
    """
    ours = graft.method_of(getattr(graft, cls)(**config).peft_type).targets
    found = {(str(sorted(default_map(name)[t])), str(ours.get(t))): t for t in types}
    return [t for t in found.values() if EVERYTHING or name == "LORA" or Sometimes(t, 4).by(cls)]


@pytest.mark.parametrize("cls", MAPS)
def test_default_targets(cls):
    name, config = MAPS[cls]
    types = [
        t for t, value in default_map(name).items() if not isinstance(value, str)
    ]  # PEFT splits strings to letters
    types = [
        t
        for t in types
        if (t, cls) not in (("mixtral", "LoraConfig"), ("rwkv", "TinyLoraConfig"), ("rwkv", "FrodConfig"))
    ]  # PEFT looks for experts, which a tree lacks; have other errors
    assert len(types) > 9
    for model_type in alike(types, name, cls, config):
        ours, theirs = (
            targeted(lib, tree(words(), lambda: nn.Linear(4, 4), config=Config(model_type)), cls, **config)
            for lib in LIBS
        )
        assert_same(ours, theirs)
    ours, theirs = (targeted(lib, tree(words(), config=Config("custom")), cls, **config) for lib in LIBS)
    assert theirs.kind is ValueError and isinstance(ours.error, ValueError) and "Please specify" in str(ours.error)


@pytest.mark.parametrize("cls", MAPS)
def test_default_targets_enter_the_config(cls):
    _, config = MAPS[cls]
    chosen = []
    for lib in LIBS:
        model = lib.get_peft_model(models.make("llama"), getattr(lib, cls)(**config))
        found = model.peft_config["default"]
        chosen.append((set(found.target_modules), set(getattr(found, "feedforward_modules", None) or ())))
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("case", ["suffix", "all_linear", "more_than_twenty", "regex", "all_linear_conv1D", "dummy"])
def test_targets_in_the_config_after_injection(case):
    """ "all-linear" is resolved and long lists are shortened, as PEFT would save them."""
    model, config = CASES[case]
    ours, theirs = (
        lib.get_peft_model(models.make(model), lib.LoraConfig(**config)).peft_config["default"].target_modules
        for lib in LIBS
    )
    assert ours == theirs


@pytest.mark.parametrize("case", ["suffix", "exclude", "regex", "all_linear", "layer_int"])
def test_second_adapter(case):
    """Targets of all adapters, in the order of injection."""
    model, config = CASES[case]
    found = []
    for lib in LIBS:
        adapted = lib.get_peft_model(models.make(model), lib.LoraConfig(target_modules=["k_proj", "q_proj"]))
        adapted.add_adapter("b", lib.LoraConfig(**config))
        found.append((list(adapted.targeted_module_names), {n for n, _ in adapted.named_parameters()}))
    assert found[0] == found[1]


def test_second_adapter_without_a_match_is_not_kept():
    for lib in LIBS:
        model = lib.get_peft_model(models.make("mlp"), lib.LoraConfig(target_modules=["fc1"]))
        before = {n for n, _ in model.named_parameters()}
        result = outcome(lambda lib=lib, model=model: model.add_adapter("b", lib.LoraConfig(target_modules=["nope"])))
        assert result.kind is ValueError and "Target modules {'nope'} not found" in str(result.error)
        assert list(model.peft_config) == ["default"]
        assert {n for n, _ in model.named_parameters()} == before


@pytest.mark.parametrize("names", [
    ["a.layers.0.q", "a.layers.1.q", "a.h.0.q"], ["layers.0.q", "b.layers.0.q"], ["a.0.1.q", "a.1.0.q"],
    ["a.b.10.q", "a.b.1.q"],
    ["x.layers.0.layers.1.q", "x.layers.1.layers.0.q"], ["a.layers.0", "a.layers.1"], ["0.q", "1.q"], ["a.b.0.c.1.q"],
    ["a.xlayers.1.q", "a.layers.1.q"], ["a.1x.q", "a.x1.q", "a.1.q"],
])  # fmt: skip
@pytest.mark.parametrize("options", [
    dict(layers_to_transform=[1]), dict(layers_to_transform=1, layers_pattern="layers"),
    dict(layers_to_transform=[0], layers_pattern=["layers", "b"]), dict(layers_to_transform=[1, 10]),
])  # fmt: skip
def test_where_the_layer_index_stands(names, options):
    target_modules = ["q", "1", "0"]
    assert_same(*(targeted(lib, tree(names), "LoraConfig", target_modules=target_modules, **options) for lib in LIBS))


@pytest.mark.parametrize("patterns", [
    {"q": 5}, {"layers.0.q": 5}, {"^layers.0.q": 5}, {r"layers\.\d\.q": 5, "q": 7}, {"q": 7, "layers.0.q": 5},
    {"0.q": 3},
    {"b.layers.0.q": 4}, {"^b.layers.0.q$": 4}, {".*": 6}, {"k|q": 6}, {"layers.0.[qk]": 2}, {"nope": 2},
    {"aq": 3, "q": 2},
    {"": 3}, {"layers": 3}, {"(b|layers)": 9},
])  # fmt: skip
def test_rank_and_alpha_patterns(patterns):
    names = ["layers.0.q", "layers.0.k", "layers.1.q", "b.layers.0.q", "b.layers.0.aq"]
    found = []
    for lib in LIBS:
        config = lib.LoraConfig(target_modules=["q", "k", "aq"], rank_pattern=patterns, alpha_pattern=patterns)
        result = outcome(lambda lib=lib, config=config: lib.get_peft_model(tree(names), config))
        assert result.error is None
        layers = dict(result.value.base_model.model.named_modules())
        found.append(
            (
                {n: (layers[n].r["default"], layers[n].scaling["default"]) for n in names},
                result.warned("rank_pattern keys"),
            )
        )
    assert found[0] == found[1]
