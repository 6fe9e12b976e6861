# SPDX-License-Identifier: Apache-2.0
"""What PEFT warns about, graft warns about too."""

import peft
import pytest

from tests import models
from tests.pair import LIBS, adapt, outcome, output
from tests.samples import each, first, over

LORA = first("LORA")


def inject(cls, model="mlp", adapter="default", **config):
    return lambda lib, tmp_path: lib.get_peft_model(models.make(model), getattr(lib, cls)(**config), adapter)


def config(cls, **values):
    return lambda lib, tmp_path: getattr(lib, cls)(**values)


def twice(lib, tmp_path):
    model = adapt(lib, LORA)
    return lib.get_peft_model(model.base_model.model, LORA.config(lib))


def switch_while_merged(lib, tmp_path):
    model = adapt(lib, LORA)
    model.add_adapter("b", LORA.config(lib))
    model.merge_adapter()
    model.set_adapter("b")


def disable_with_bias(lib, tmp_path):
    with lib.get_peft_model(models.make("mlp"), lib.LoraConfig(target_modules=["lin0"], bias="all")).disable_adapter():
        pass


def half_disabled(lib, tmp_path):
    model = adapt(lib, LORA)
    model.base_model.model.lin0.enable_adapters(False)
    with model.disable_adapter():
        pass


def renamed_base(lib, tmp_path):
    base = models.make("mlp")
    base.name_or_path = "foo/bar"
    lib.get_peft_model(base, LORA.config(lib, base_model_name_or_path="x"))


def revision(lib, tmp_path):
    lib.get_peft_model(models.make("mlp"), LORA.config(lib, revision="A"), revision="B")


def unmerge_ia3(lib, tmp_path):
    model = adapt(lib, first("IA3"))
    model.merge_adapter()
    model.unmerge_adapter()


def merge_another(lib, tmp_path):
    model = adapt(lib, LORA)
    model.add_adapter("b", LORA.config(lib))
    model.merge_adapter(adapter_names=["default"])
    model.merge_adapter(adapter_names=["default", "b"])


def embedding_saved(lib, tmp_path):
    adapt(lib, first("LORA", "llama", "embed")).save_pretrained(tmp_path)


CASES = {
    "fan_linear": (
        inject("LoraConfig", target_modules=["fc1"], fan_in_fan_out=True),
        "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. Setting fan_in_fan_out to False.",
    ),
    "fan_conv1D": (inject("LoraConfig", "conv1D", target_modules=["c_fc"]),
                   "fan_in_fan_out is set to False but the target module is `Conv1D`. Setting fan_in_fan_out to True."),
    "fan_ia3": (inject("IA3Config", "conv1D", target_modules=["c_fc"], feedforward_modules=[]),
                "Setting fan_in_fan_out to True."),
    "fan_vera": (inject("VeraConfig", "conv1D", target_modules=["c_fc"]), "Setting fan_in_fan_out to True."),
    "exclude": (inject("LoraConfig", target_modules=["fc1"], exclude_modules=["nope"]),
                "You have passed exclude_modules="),
    "rank_pattern": (inject("LoraConfig", target_modules=["fc1"], rank_pattern={"nope": 3}),
                     "The following rank_pattern keys did not match any targeted module and were ignored: ['nope']."),
    "alpha_pattern": (inject("LoHaConfig", target_modules=["fc1"], alpha_pattern={"nope": 3}),
                      "The following alpha_pattern keys did not match any targeted module and were ignored: ['nope']."),
    "lora_bias": (inject("LoraConfig", target_modules=["fc2"], lora_bias=True),
                  "`lora_bias=True` was passed but the targeted layer of type Linear has no bias."),
    "groups": (inject("LoraConfig", "conv2d", r=4, target_modules=["grouped"]), "Merging is not supported."),
    "oft_adjusted": (inject("OFTConfig", target_modules=["fc1"], oft_block_size=7), "oft_block_size"),
    "hra_odd": (inject("HRAConfig", target_modules=["fc1"], r=3), "odd"),
    "vera_unsaved": (config("VeraConfig", save_projection=False), "Specified to not save vera_A and vera_B"),
    "tied": (inject("LoraConfig", target_modules=["fc1"], ensure_weight_tying=True),
             "You have requested `ensure_weight_tying`, but no tied modules"),
    "tied_off": (inject("LoraConfig", "opt", target_modules=["lm_head"]),
                 "a tied layer is part of the adapter, but `ensure_weight_tying` is not set to True."),
    "tied_off_saved": (inject("LoraConfig", "opt", target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
                       "a tied layer is part of the adapter, but `ensure_weight_tying` is not set to True."),
    "tied_no_way": (inject("LoHaConfig", "opt", target_modules=["lm_head"]),
                    "a tied layer is part of the adapter, but no implementation exists to tie the adapters."),
    "untied": (inject("LoraConfig", "llama", target_modules=["embed_tokens"], ensure_weight_tying=True),
               "You have requested `ensure_weight_tying`, but no tied modules were found in the model"),
    "untied_tokens": (inject("LoraConfig", "llama", target_modules=["q_proj"], trainable_token_indices=[1],
                             ensure_weight_tying=True), "`ensure_weight_tying"),
    "eva_ignored": (config("LoraConfig", eva_config={}), "`eva_config` specified but will be ignored when"),
    "eva_default": (config("LoraConfig", init_lora_weights="eva"),
                    "`init_lora_weights` is 'eva' but `eva_config` is not specified. Using default EVA config."),
    "corda_ignored": (config("LoraConfig", corda_config={}), "`corda_config` specified but will be ignored when"),
    "corda_default": (
        config("LoraConfig", init_lora_weights="corda"),
        "`init_lora_weights` is 'corda' but `corda_config` is not specified. Using default CorDA config.",
    ),
    "loftq_ignored": (config("LoraConfig", loftq_config=dict(loftq_bits=4)),
                      "`loftq_config` specified but will be ignored when `init_lora_weights` is not 'loftq'."),
    "alora_task": (config("LoraConfig", alora_invocation_tokens=[1]),
                   "aLoRA is currently only supported for CAUSAL_LM task."),
    **{
        f"rslora_{how}": (
            config("LoraConfig", init_lora_weights=how, use_rslora=True, **{f"{kind}_pattern": {"fc1": 3}}),
            "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion",
        )
        for how, kind in (
            ("pissa", "rank"),
            ("pissa_niter_2", "alpha"),
            ("olora", "rank"),
            ("corda", "alpha"),
            ("lora_ga", "rank"),
        )
    },
    "prefix": (inject("LoraConfig", target_modules=["fc1"], adapter="lora"),
               "Adapter name 'lora' should not be contained in the prefix 'lora_'."),
    "twice": (twice, "You are trying to modify a model with PEFT for a second time."),
    "switch_while_merged": (switch_while_merged,
                            "Adapter cannot be set when the model is merged. Unmerging the model first."),
    "disable_with_bias": (
        disable_with_bias,
        "Careful, disabling adapter layers with bias configured to be 'all' does not produce the same output",
    ),
    "half_disabled": (half_disabled,
                      "The model contains some adapter layers that are enabled and others that are disabled."),
    "renamed_base": (renamed_base, "The PEFT config's `base_model_name_or_path` was renamed from 'x' to 'foo/bar'."),
    "revision": (revision, "peft config has already set base model revision to A, overwriting with revision B"),
    "merge_another": (merge_another, "Already following adapters were merged default."),
    "embedding_saved": (embedding_saved,
                        "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`."),
}  # fmt: skip


@pytest.mark.differs('`lora_ga_config` missing, or given without `init_lora_weights="lora_ga"`')
@pytest.mark.parametrize("lib", LIBS)
@pytest.mark.parametrize("case", CASES)
def test_warned(case, lib, tmp_path):
    call, fragment = CASES[case]
    result = outcome(lambda: call(lib, tmp_path))
    if case == "twice" and lib is not peft:  # a second injection: tests/model/test_bad_input.py
        assert result.warned(fragment) or result.error
        return
    assert result.error is None, result.error
    assert result.warned(fragment), [str(w.message) for w in result.warnings]


QUIET = [
    s for s in each("plain by_r") + each("classify", "bert-seq") + each("tokens", "llama")
    if s.method != "OFT" or s.name == "by_r"
]  # fmt: skip


@pytest.mark.graft_only
@over(QUIET)
def test_nothing_to_warn_about(sample, tmp_path):
    """A plain life: inject, run, switch, save, load. Nobody is warned."""
    lib = LIBS[0]

    def live():
        model = adapt(lib, sample)
        output(model, sample)
        model.add_adapter("second", sample.config(lib))
        model.set_adapter("second")
        model.save_pretrained(tmp_path)
        lib.PeftModel.from_pretrained(models.make(sample.model), tmp_path).load_adapter(tmp_path / "second", "second")

    result = outcome(live)
    assert result.error is None
    assert [str(w.message) for w in result.warnings] == []
