# SPDX-License-Identifier: Apache-2.0
"""Wrong use is refused with PEFT's exception classes and, at least, PEFT's words."""

import re
import warnings

import pytest
import torch
from torch import nn

from tests import models
from tests.pair import LIBS, adapt, output
from tests.raised import refuses
from tests.samples import METHODS, each, first, over
from tests.trees import Config, tree

LORA, VERA, OFT, HEAD = first("LORA"), first("VERA"), first("OFT"), first("LORA", "mlp", "head")
VBLORA, TOPK = first("VBLORA"), first("VBLORA", "mlp", "topk_saved")


def inject(cls, model="mlp", adapter="default", **config):
    def call(lib, tmp_path):
        base = models.make(model) if isinstance(model, str) else model()
        return lib.get_peft_model(base, getattr(lib, cls)(**config), adapter)

    return call


def config(cls, **values):
    return lambda lib, tmp_path: getattr(lib, cls)(**values)


def two(lib, sample=LORA):
    model = adapt(lib, sample)
    model.add_adapter("b", sample.config(lib))
    return model.eval()


def on(change, sample=LORA, start=adapt):
    """`change(lib, model)` on an adapted model."""
    return lambda lib, tmp_path: change(lib, start(lib, sample))


def forward(names, sample=LORA, prepare=lambda m: None):
    def call(lib, tmp_path):
        model = two(lib, sample)
        prepare(model)
        return output(model, sample, adapter_names=names)

    return call


def load(prepare, sample=LORA, **options):
    """Save an adapter, spoil the folder, load it again."""

    def call(lib, tmp_path):
        adapt(lib, sample).save_pretrained(tmp_path)
        prepare(tmp_path)
        return lib.PeftModel.from_pretrained(models.make(sample.model), str(tmp_path), **options)

    return call


def reshape(tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if "lora_A" in k)
    save_file({**tensors, key: tensors[key][:, :-1].contiguous()}, path, metadata={"format": "pt"})


def train_on(lib, tmp_path):
    """Go on from a file that holds the largest logits alone."""
    adapt(lib, TOPK).save_pretrained(tmp_path)
    model = lib.PeftModel.from_pretrained(models.make("mlp"), str(tmp_path), is_trainable=True)
    return output(model.train(), TOPK)


def quietly(call):
    def run(lib, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(lib, tmp_path)

    return run


def touch(tmp_path):
    (tmp_path / "file").touch()
    return tmp_path / "file"


two_norms = lambda lib, model: (model.base_model.set_adapter(["default", "b"]), output(model, norms))
norms = first("LN_TUNING")
BIAS = dict(bias="all", target_modules=["lin0"])

CASES = {
    # configurations
    "task_type": (config("LoraConfig", task_type="XX"), ValueError,
                  "Invalid task type: 'XX'. Must be one of the following"),
    "str_layers": (config("LoraConfig", target_modules="q", layers_to_transform=[1]), ValueError,
                   "`layers_to_transform` cannot be used when `target_modules` is a str."),
    "str_pattern": (config("LoraConfig", target_modules="q", layers_pattern="h"), ValueError,
                    "`layers_pattern` cannot be used when `target_modules` is a str."),
    "lone_pattern": (config("LoraConfig", target_modules=["q"], layers_pattern="h"), ValueError,
                     "When `layers_pattern` is specified, `layers_to_transform` must also be specified."),
    "lora_bias_init": (config("LoraConfig", lora_bias=True, init_lora_weights="pissa"), ValueError,
                       "The argument lora_bias=True is only supported with"),
    "lora_bias_dora": (config("LoraConfig", lora_bias=True, use_dora=True), ValueError,
                       "The argument lora_bias=True is not supported for DoRA, please pass use_dora=False"),
    "megatron_dora": (config("LoraConfig", megatron_config={"a": 1}, use_dora=True), ValueError,
                      "DoRA does not support megatron_core, please set `use_dora=False`."),
    "loftq_empty": (config("LoraConfig", init_lora_weights="loftq"), ValueError,
                    "`loftq_config` must be specified when `init_lora_weights` is 'loftq'."),
    "pissa_niter": (inject("LoraConfig", init_lora_weights="pissa_niter_x", target_modules=["fc1"]), ValueError, "x"),
    **{
        f"{field}_type": (config("LoraConfig", **{field: 3}, **more), TypeError, name)
        for field, name, more in (
            ("eva_config", "EvaConfig", dict(init_lora_weights="eva")),
            ("corda_config", "CordaConfig", dict(init_lora_weights="corda")),
            ("lora_ga_config", "LoraGAConfig", dict(init_lora_weights="lora_ga")),
            ("use_bdlora", "BdLoraConfig", {}),
            ("arrow_config", "ArrowConfig", {}),
        )
    },
    "loha_lone_pattern": (config("LoHaConfig", target_modules=["q"], layers_pattern="h"), ValueError,
                          "When `layers_pattern` is specified, `layers_to_transform` must also be specified."),
    "hra_str_layers": (config("HRAConfig", target_modules="q", layers_to_transform=[1]), ValueError,
                       "`layers_to_transform` cannot be used when `target_modules` is a str."),
    "vera_lone_pattern": (config("VeraConfig", target_modules=["q"], layers_pattern="h"), ValueError,
                          "When `layers_pattern` is specified, `layers_to_transform` must also be specified."),
    "ia3_feedforward": (config("IA3Config", target_modules=["k"], feedforward_modules=["w"]), ValueError,
                        "`feedforward_modules` should be a subset of `target_modules`"),
    "road_variant": (config("RoadConfig", variant="road_3"), ValueError, "Invalid variant road_3 specified."),
    "road_odd": (config("RoadConfig", group_size=5), ValueError, "The group_size must be divisible by 2"),
    "road_none": (config("RoadConfig", group_size=0), ValueError, "The group_size must be divisible by 2"),
    "kasa_negative": (lambda lib, p: lib.KasaConfig(beta=-1e-3), ValueError,
                      "`beta` must be non-negative, got -0.001."),
    "kasa_type": (config("LoraConfig", kasa_config=3), TypeError, "KasaConfig"),
    "velora_type": (config("LoraConfig", velora_config=3), TypeError, "VeloraConfig"),
    "bdlora_type": (config("LoraConfig", use_bdlora=3), TypeError, "BdLoraConfig"),
    "oft_two_sizes": (config("OFTConfig", r=4), ValueError, "oft_block_size"),
    "oft_no_size": (config("OFTConfig", r=0, oft_block_size=0), ValueError, "oft_block_size"),
    "unknown_field": (config("LoraConfig", rnak=4), TypeError, "rnak"),
    "target_parameters_str": (config("LoraConfig", target_parameters="w"), TypeError,
                              "`target_parameters` must be a list of strings or None."),
    # injection
    "r_zero": (inject("LoraConfig", r=0, target_modules=["fc1"]), ValueError,
               "`r` should be a positive integer value but the value passed is 0"),
    "r_negative": (inject("LoraConfig", r=-1, target_modules=["fc1"]), ValueError,
                   "`r` should be a positive integer value but the value passed is -1"),
    "loha_r": (inject("LoHaConfig", r=0, target_modules=["fc1"]), ValueError,
               "`r` should be a positive integer value but the value passed is 0"),
    "hra_r": (inject("HRAConfig", r=0, target_modules=["fc1"]), ValueError,
              "`r` should be a positive integer value but the value passed is 0"),
    **{f"{cls}_r": (inject(cls, r=0, target_modules=["fc1"], **sizes), ValueError,
                    "should be a positive integer value")
       for cls, sizes in (("HiraConfig", {}), ("MissConfig", {}), ("VBLoRAConfig", dict(vector_length=2)))},
    **{
        name: (inject(cls, target_modules=["fc1"], **values), ValueError, words)
        for name, cls, values, words in (
            ("gralora_chunks", "GraloraConfig", dict(r=5), "r should be divisible by gralora_k"),
            ("gralora_blocks", "GraloraConfig", dict(r=10, gralora_k=5), "divisible by gralora_k"),
            ("gralora_hybrid", "GraloraConfig", dict(hybrid_r=-1), "`hybrid_r`"),
            ("delora_r", "DeloraConfig", dict(r=0), "a positive integer"),
            ("c3a_block", "C3AConfig", dict(block_size=7), "The block size should be a factor of the input size"),
            ("c3a_zero", "C3AConfig", dict(block_size=0), "`block_size` should be a positive integer value"),
            (
                "fourier_zero",
                "FourierFTConfig",
                dict(n_frequency=0),
                "`n_frequency` should be a positive integer value",
            ),
            (
                "fourier_many",
                "FourierFTConfig",
                dict(n_frequency=999),
                "less than or equal to the product of the input",
            ),
            ("wave_family", "WaveFTConfig", dict(wavelet_family="haar"), "Wavelet family haar not supported"),
            ("lokr_r", "LoKrConfig", dict(r=0), "`r` should be a positive integer value"),
        )
    },
    "miss_wide": (inject("MissConfig", r=13, target_modules=["fc1"]), ValueError,
                  "`r` (13) must be less than or equal to in_features (12)"),
    "miss_bat": (inject("MissConfig", r=5, init_weights="bat", target_modules=["fc1"]), ValueError, "divisible"),
    "miss_mini": (inject("MissConfig", r=4, mini_r=3, init_weights="mini", target_modules=["fc1"]), ValueError,
                  "divisible by"),
    "vblora_length": (inject("VBLoRAConfig", vector_length=5, target_modules=["fc1"]), ValueError,
                      "`in_features` 12 must be divisible by `vector_length` 5"),
    "vblora_topk": (inject("VBLoRAConfig", vector_length=2, topk=0, target_modules=["fc1"]), ValueError,
                    "`topk` 0 should be a positive integer value"),
    "hira_init": (inject("HiraConfig", init_weights="xavier", target_modules=["fc1"]), ValueError, "xavier"),
    "inject_shared_bank": (lambda lib, p: lib.inject_adapter_in_model(VBLORA.config(lib), models.make("mlp")),
                           ValueError, "Please use `get_peft_model` instead."),
    "vblora_trains_on": (train_on, RuntimeError, "Found infinity values in VB-LoRA logits"),
    "road_group": (inject("RoadConfig", group_size=8, target_modules=["fc1"]), ValueError,
                   "The out_features of the base layer must be divisible by group_size (8)"),
    "kasa_rank": (inject("LoraConfig", r=12, kasa_config={}, target_modules=["fc1"]), ValueError,
                  "KaSA requires `r` (12) to be smaller than min(in_features, out_features) (12)"),
    "kasa_dora": (inject("LoraConfig", kasa_config={}, use_dora=True, target_modules=["fc1"]), ValueError,
                  "Invalid or unsupported variant combination: ('kasa_config', 'use_dora')"),
    "mica_monteclora": (inject("LoraConfig", init_lora_weights="mica", monteclora_config={}, target_modules=["fc1"]),
                        ValueError, "Invalid or unsupported variant combination: ('mica', 'monteclora_config')"),
    "velora_conv": (inject("LoraConfig", "conv2d", velora_config={}, target_modules=["point"]), ValueError, ""),
    "bdlora_embedding": (inject("LoraConfig", "embedding", use_bdlora=dict(target_modules_bd_a=["emb"]),
                                target_modules=["emb"]), ValueError, ""),
    "kasa_conv": (inject("LoraConfig", "conv2d", kasa_config={}, target_modules=["point"]), ValueError, ""),
    "kasa_embedding": (inject("LoraConfig", "embedding", kasa_config={}, target_modules=["emb"]), ValueError, ""),
    "kasa_beside_lora": (on(lambda lib, m: m.add_adapter("b", LORA.config(lib, kasa_config=lib.KasaConfig()))),
                         ValueError, "KaSA cannot be combined with adapters that don't use KaSA"),
    "lora_beside_kasa": (on(lambda lib, m: m.add_adapter("b", LORA.config(lib)), first("LORA", name="kasa")),
                         ValueError, "KaSA cannot be combined with adapters that don't use KaSA"),
    "rank_pattern_zero": (inject("LoraConfig", rank_pattern={"fc1": 0}, target_modules=["fc1"]), ValueError,
                          "`r` should be a positive integer value but the value passed is 0"),
    "bias": (inject("LoraConfig", bias="some", target_modules=["fc1"]), NotImplementedError,
             "Requested bias: some, is not implemented."),
    "init": (inject("LoraConfig", init_lora_weights="xavier", target_modules=["fc1"]), ValueError, "xavier"),
    "no_targets": (inject("LoraConfig"), ValueError, "Please specify `target_modules`"),
    "no_targets_loha": (inject("LoHaConfig"), ValueError, "Please specify `target_modules` in `peft_config`"),
    "no_feedforward": (inject("IA3Config", target_modules=["fc1"]), ValueError,
                       "Please specify `feedforward_modules` in `peft_config`"),
    "unsupported": (inject("LoraConfig", target_modules=["norm"]), ValueError, "is not supported"),
    "embedding_bias": (inject("LoraConfig", "embedding", target_modules=["emb"], lora_bias=True), ValueError,
                       "lora_bias=True is not supported for Embedding"),
    "conv_groups": (inject("LoraConfig", "conv2d", r=3, target_modules=["grouped"]), ValueError,
                    "rank is divisible by groups"),
    "odd_orthogonal": (inject("LoraConfig", r=3, init_lora_weights="orthogonal", target_modules=["fc1"]), ValueError,
                       "even"),
    "save_container": (inject("LoraConfig", target_modules=["lin0"], modules_to_save=["layers"]), TypeError,
                       "modules_to_save cannot be applied to modules of type"),
    "tokens_missing": (inject("LoraConfig", "embedding", target_modules=["lin"], trainable_token_indices={"zz": [1]}),
                       ValueError, "Target modules {'zz'} not found in the base model"),
    "tokens_of_a_target": (inject("LoraConfig", "embedding", target_modules=["emb"],
                                  trainable_token_indices={"emb": [1]}), TypeError,
                           "trainable_token_indices cannot be applied to modules of type"),
    "tokens_saved_too": (inject("LoraConfig", "embedding", target_modules=["lin"], modules_to_save=["emb"],
                                trainable_token_indices={"emb": [1]}), ValueError,
                         "The embedding layer is already marked to be trained fully"),
    "tokens_tied_apart": (
        quietly(  # both also say that no modules are tied
            inject(
                "LoraConfig",
                "opt",
                target_modules=["q_proj"],
                trainable_token_indices={"embed_tokens": [1], "lm_head": [2]},
                ensure_weight_tying=True,
            )
        ),
        ValueError,
        "Cannot ensure weight tying when different token indices are specified for tied layers. Conflicting layers:",
    ),
    "tokens_overlap": (
        on(
            lambda lib, m: (
                m.add_adapter("other", lib.TrainableTokensConfig(token_indices=[9, 3], target_modules=["emb"])),
                m.base_model.set_adapter(["default", "other"]),
                output(m, first("TRAINABLE_TOKENS", "embedding", "rows")),
            ),
            first("TRAINABLE_TOKENS", "embedding", "rows"),
        ),
        ValueError,
        "Token indices of adapter other are already defined and would result in undefined merging behavior. Only "
        "disjunct token indices are currently supported.",
    ),
    "tokens_overlap_merged": (
        quietly(  # one is merged already
            on(
                lambda lib, m: (
                    m.add_adapter("other", lib.TrainableTokensConfig(token_indices=[9, 3], target_modules=["emb"])),
                    m.merge_adapter(["default"]),
                    m.merge_adapter(["other"]),
                ),
                first("TRAINABLE_TOKENS", "embedding", "rows"),
            )
        ),
        ValueError,
        "Only disjunct token indices are currently supported.",
    ),
    "tokens_of_two": (
        on(
            lambda lib, m: (
                m.add_adapter("other", first("LORA", "llama", "tokens").config(lib)),
                m.base_model.set_adapter(["default", "other"]),
            ),
            first("LORA", "llama", "tokens"),
        ),
        ValueError,
        "Only one adapter can be set at a time for TrainableTokensWrapper",
    ),
    "replication": (inject("LoraConfig", "t5", target_modules=["q"], layer_replication=[(0, 2)]), ValueError,
                    "Could not locate the layers attribute"),
    "mamba": (inject("LoraConfig", lambda: tree(["a.conv1d", "a.q"], config=Config("mamba")),
                     target_modules=["conv1d"]), ValueError, "is incompatible with Mamba-based models"),
    # several adapters
    "add_existing": (on(lambda lib, m: m.add_adapter("default", LORA.config(lib))), ValueError,
                     "Adapter with name 'default' already exists."),
    "other_method": (on(lambda lib, m: m.add_adapter("b", VERA.config(lib))), ValueError,
                     "Cannot combine adapters with different peft types. Found"),
    "second_bias": (
        on(
            lambda lib, m: m.add_adapter("b", lib.LoraConfig(**BIAS)),
            start=lambda lib, s: lib.get_peft_model(models.make("mlp"), lib.LoraConfig(**BIAS)),
        ),
        ValueError,
        "supports only 1 adapter with bias. When using multiple adapters, set bias to 'none' for all adapters.",
    ),
    "set_unknown": (on(lambda lib, m: m.set_adapter("zz")), ValueError, "Adapter zz not found."),
    "delete_unknown": (on(lambda lib, m: m.delete_adapter("zz")), ValueError, "Adapter zz does not exist"),
    "delete_merged": (on(lambda lib, m: (m.merge_adapter(), m.delete_adapter("default"))), ValueError,
                      "Cannot delete adapter(s) ['default'] while they are merged. Please unmerge them first."),
    "merge_str": (on(lambda lib, m: m.merge_adapter(adapter_names="default")), TypeError, "list"),
    "heads_together": (on(lambda lib, m: m.base_model.set_adapter(["default", "b"]), HEAD, two), ValueError,
                       "Only one adapter can be set at a time for"),
    "norms_together": (on(two_norms, norms, two), ValueError, "LN"),
    "name_of_a_target": (inject("LoraConfig", lambda: tree(["q.k", "z"]), "k", target_modules=["q.k"],
                                modules_to_save=["k"]), ValueError, "No modules were targeted for adaptation"),
    "vera_keys": (on(lambda lib, m: m.add_adapter("b", VERA.config(lib, projection_prng_key=9)), VERA), ValueError,
                  "projection"),
    "vera_saves": (on(lambda lib, m: m.add_adapter("b", VERA.config(lib, save_projection=False)), VERA), ValueError,
                   "VeRA"),
    "vera_larger": (
        on(
            lambda lib, m: m.add_adapter("b", lib.VeraConfig(r=5, target_modules=["lin0"])),
            start=lambda lib, s: lib.get_peft_model(models.make("mlp"), lib.VeraConfig(r=5, target_modules=["head"])),
        ),
        ValueError,
        "or greater is required",
    ),
    # mixed batches
    "mixed_unknown": (forward(["default", "x", "a"]), ValueError, "Trying to infer with non-existing adapter(s): a, x"),
    "mixed_length": (
        forward(["default", "b"]),
        ValueError,
        "Length of `adapter_names` should be the same as the number of inputs, but got 2 and 3 respectively.",
    ),
    "mixed_merged": (
        forward(["default", "b", "b"], prepare=lambda m: m.merge_adapter()),
        ValueError,
        "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first.",
    ),
    # files
    "selected": (lambda lib, p: adapt(lib, LORA).save_pretrained(p, selected_adapters=["zz"]), ValueError,
                 "You passed an invalid `selected_adapters` arguments"),
    "save_on_file": (lambda lib, p: adapt(lib, LORA).save_pretrained(touch(p)), ValueError,
                     "should be a directory, not a file"),
    "missing_folder": (lambda lib, p: lib.PeftModel.from_pretrained(models.make("mlp"), str(p / "nowhere")), ValueError,
                       "Can't find 'adapter_config.json' at"),
    "missing_weights": (load(lambda p: (p / "adapter_model.safetensors").unlink()), ValueError, ""),
    "shape": (load(reshape), RuntimeError, "lora_A"),
    "config_type": (load(lambda p: None, config="lora"), ValueError, "The input config must be a PeftConfig, got"),
    "config_missing": (lambda lib, p: lib.PeftConfig.from_pretrained(str(p)), ValueError,
                       "Can't find 'adapter_config.json' at"),
    "config_to_file": (lambda lib, p: LORA.config(lib).save_pretrained(touch(p)), AssertionError,
                       "should be a directory, not a file"),
    # functional
    "inject_shared": (lambda lib, p: lib.inject_adapter_in_model(VERA.config(lib), models.make("mlp")), ValueError,
                      "Please use `get_peft_model` instead."),
    "base_strict": (on(lambda lib, m: lib.set_base_model_state_dict(m, {"lin0.weight": torch.zeros(12, 10)})),
                    RuntimeError, "Missing key(s) in state_dict"),
    "base_unexpected": (
        on(lambda lib, m: lib.set_base_model_state_dict(m, {**lib.get_base_model_state_dict(m), "zz": torch.zeros(1)})),
        RuntimeError,
        "Unexpected key(s)",
    ),
    "status_of_none": (lambda lib, p: lib.get_layer_status(models.make("mlp")), ValueError,
                       "No adapter layers found in the model"),
    "model_status_of_none": (lambda lib, p: lib.get_model_status(models.make("mlp")), ValueError,
                             "No adapter layers found in the model"),
    "auto_instance": (lambda lib, p: lib.AutoPeftModelForCausalLM(), EnvironmentError, "from_pretrained"),
}  # fmt: skip


@pytest.mark.parametrize("lib", LIBS)
@pytest.mark.parametrize("case", CASES)
def test_refused(case, lib, tmp_path):
    call, error, fragment = CASES[case]
    refuses(error, re.escape(fragment) or None, call, lib, tmp_path)


@pytest.mark.parametrize("lib", LIBS)
@over(each(models="mlp"))
def test_unknown_adapters_of_every_method(sample, lib):
    model = adapt(lib, sample)
    for call, words in ((model.set_adapter, "not found"), (model.delete_adapter, "does not exist")):
        refuses(ValueError, f"nope.*{words}", call, "nope")


BARE = sorted(METHODS.keys() - {"LORA", "TINYLORA", "LN_TUNING", "TRAINABLE_TOKENS"})
OTHERWISE = {"GLORA", "LILY", "OSF", "PEANUT"}  # of which PEFT says nothing, or something else


@pytest.mark.differs("unsupported layer")
@pytest.mark.parametrize(
    "method, lib", [(m, lib) for m in BARE for lib in LIBS if lib is LIBS[0] or m not in OTHERWISE]
)
def test_unsupported_layers(method, lib):
    """A bare module is no layer that any of them can adapt."""
    sample = first(method)
    base = tree(["a.b", "c"])
    config = sample.config(lib, target_modules=["a"], **({"feedforward_modules": []} if method == "IA3" else {}))
    refuses((TypeError, ValueError), r"supported|compatible", lib.get_peft_model, base, config)


@pytest.mark.parametrize("lib", LIBS)
def test_no_match_is_its_own_class(lib):
    assert issubclass(lib.NoMatchingPeftModuleError, lib.PeftError)
    assert issubclass(lib.NoMatchingPeftModuleError, ValueError)
    with pytest.raises(lib.NoMatchingPeftModuleError):
        lib.get_peft_model(nn.Sequential(nn.Linear(2, 2)), lib.LoraConfig(target_modules=["nope"]))
