# SPDX-License-Identifier: Apache-2.0
"""What is asked for in vain is said, at the line that asked; a plan and a report agree with what trains."""

import copy
import warnings

import pytest
import torch
from torch import nn

import graft
from tests import models
from tests.looks import get_registry

pytestmark = pytest.mark.graft_only


def lora(**options):
    return graft.LoraConfig(r=2, **options)


def said(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [w for w in caught if issubclass(w.category, graft.PeftWarning)]


@pytest.mark.differs(
    "an entry of `target_modules`, `exclude_modules`, `modules_to_save` or `layers_to_transform` that matches "
    "nothing (others do)"
)
@pytest.mark.parametrize(
    "field, value, entry, similar",
    [
        ("target_modules", ["q_proj", "v_prj"], "v_prj", "v_proj"),
        ("exclude_modules", ["layers.0.self_attn.q_proj", "layers.0.self_attn.q_prj"], "q_prj", "q_proj"),
        ("modules_to_save", ["lm_hed"], "lm_hed", "lm_head"),
        ("layers_to_transform", [1, 9], "9", ""),
    ],
)
def test_entries_that_match_nothing(field, value, entry, similar):
    config = lora(**{"target_modules": ["q_proj"], field: value})
    warned = said(lambda: graft.get_peft_model(models.make("llama"), config))
    assert len(warned) == 1
    text = str(warned[0].message)
    assert text.startswith(field) and entry in text and similar in text
    assert warned[0].filename == __file__
    report = graft.plan(models.make("llama"), config)
    assert len(report.unmatched_targets) == 1 and entry in str(report)


@pytest.mark.parametrize(
    "field, value",
    [("exclude_modules", ["lm_hed"]), ("rank_pattern", {"k_proj": 4, "q_proj": 2}), ("alpha_pattern", {"k_proj": 4})],
)
def test_a_plan_says_what_an_injection_warns_of(field, value):
    config = lora(target_modules=["q_proj"], **{field: value})
    with pytest.warns(UserWarning if field == "exclude_modules" else RuntimeWarning) as warned:
        graft.get_peft_model(models.make("llama"), config)
    assert len(warned) == 1 and field in str(warned[0].message)
    (entry,) = graft.plan(models.make("llama"), config).unmatched_targets
    assert entry.startswith(f"{field}: ") and ("lm_hed" in entry or entry.endswith("k_proj"))


def test_a_plan_refuses_what_an_injection_does():
    for use in (graft.get_peft_model, graft.plan):
        with pytest.raises(NotImplementedError, match=r"Requested bias: al,.*lora_only"):
            use(models.make("llama"), lora(target_modules=["q_proj"], bias="al"))


def test_heads_that_a_task_has_by_default_may_be_missing(tmp_path):
    config = lora(target_modules=["query"], task_type="SEQ_CLS")
    base = models.make("bert-seq")

    def use():
        graft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
        graft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)

    assert said(use) == []


@pytest.mark.differs(
    "a keyword argument that `save_pretrained`, `from_pretrained`, `load_adapter` or `hotswap_adapter` does not know"
)
def test_keywords_that_have_no_effect(tmp_path):
    config = lora(target_modules=["q_proj"])
    model = graft.get_peft_model(models.make("llama"), config)
    calls = {
        "selected_adapters": lambda: model.save_pretrained(tmp_path, selected_adapter=["default"]),
        "strict": lambda: graft.PeftModel.from_pretrained(models.make("llama"), tmp_path, strct=False),
        "subfolder": lambda: model.load_adapter(tmp_path, "other", sub_folder="x"),
        "key_mapping": lambda: graft.hotswap_adapter(model, tmp_path, "default", key_maping={}),
    }
    for meant, call in calls.items():
        warned = [w for w in said(call) if "knows no argument" in str(w.message)]
        assert len(warned) == 1 and f"'{meant}'" in str(warned[0].message), meant
        assert warned[0].filename == __file__
    known = dict(token=None, max_shard_size="1GB", save_function=torch.save)
    assert said(lambda: model.save_pretrained(tmp_path, **known)) == []
    assert said(lambda: model.load_adapter(tmp_path, "third", torch_device="cpu", revision=None)) == []


class TakesTasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 4)

    def forward(self, x, task_ids=None):
        return self.q(x), task_ids


def test_an_argument_of_one_method_belongs_to_the_base_with_others():
    model = graft.get_peft_model(TakesTasks(), lora(target_modules=["q"]))
    assert model(torch.ones(1, 4), task_ids=5)[1] == 5
    model = graft.get_peft_model(models.make("llama"), lora(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ids = torch.ones(1, 3, dtype=torch.long)
    assert model(input_ids=ids, task_ids=torch.tensor([0])).logits.shape[:2] == (1, 3)  # as in PEFT's task classes


def tied():
    model = models.make("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    return model


CAUSAL = dict(num_virtual_tokens=3, task_type="CAUSAL_LM")
PLANNED = {
    "bias all": (
        lambda: models.make("bert-seq"),
        lambda: lora(target_modules=["query"], task_type="SEQ_CLS", bias="all", lora_bias=True),
    ),
    "bias of layers": (lambda: models.make("bert-seq"), lambda: lora(target_modules=["query"], bias="lora_only")),
    "token rows": (
        lambda: models.make("llama"),
        lambda: lora(target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    ),
    "tied token rows": (tied, lambda: lora(target_modules=["q_proj"], trainable_token_indices=[1, 2])),
    "tied tokens": (tied, lambda: graft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 2])),
    "tied": (tied, lambda: lora(target_modules=["embed_tokens"], ensure_weight_tying=True)),
    "tied head": (
        tied,
        lambda: lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "replicated": (
        lambda: models.make("llama"),
        lambda: lora(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]),
    ),
    "adalora": (
        lambda: models.make("llama"),
        lambda: graft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj"]),
    ),
    "prompt": (lambda: models.make("llama"), lambda: graft.PromptTuningConfig(**CAUSAL)),
    "prompt and head": (
        lambda: models.make("bert-seq"),
        lambda: graft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    ),
    "p-tuning": (lambda: models.make("llama"), lambda: graft.PromptEncoderConfig(**CAUSAL, encoder_hidden_size=5)),
    "prefix": (
        lambda: models.make("llama"),
        lambda: graft.PrefixTuningConfig(**CAUSAL, prefix_projection=True, encoder_hidden_size=4),
    ),
    "cartridge": (lambda: models.make("llama"), lambda: graft.CartridgeConfig(**CAUSAL)),
    "adaption prompt": (
        lambda: models.make("llama"),
        lambda: graft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
    ),
}


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_and_a_report_count_what_trains(name):
    make, config = PLANNED[name]
    base, cfg = make(), config()
    before, generator = dict(vars(cfg)), torch.get_rng_state()
    flags = {n: (p.requires_grad, p._version) for n, p in base.named_parameters()}
    plan = graft.plan(base, cfg)
    assert vars(cfg) == before and torch.equal(generator, torch.get_rng_state())
    assert flags == {n: (p.requires_grad, p._version) for n, p in base.named_parameters()}
    model = graft.get_peft_model(base, cfg)
    report = get_registry(model).reports["default"]
    trains = model.get_nb_trainable_parameters()[0]
    assert plan.trainable_parameters == report.trainable_parameters == trains
    assert [m[:3] for m in plan.matched] == [m[:3] for m in report.matched]
    assert [m[:3] for m in plan.modules_to_save] == [m[:3] for m in report.modules_to_save]
    assert plan.peft_type in str(plan) and "PeftType" not in str(plan)


def test_the_original_of_a_module_trained_whole_keeps_its_bias():
    config = lora(target_modules=["query"], task_type="SEQ_CLS", bias="all")
    model = graft.get_peft_model(models.make("bert-seq"), config)
    head = model.get_base_model().classifier
    assert head.modules_to_save["default"].bias.requires_grad and not head.original_module.bias.requires_grad


def test_configs_of_a_model_without_a_wrapper_follow_deletion():
    model = graft.inject_adapter_in_model(lora(target_modules=["q_proj"]), models.make("llama"), "a")
    graft.inject_adapter_in_model(lora(target_modules=["q_proj"]), model, "b")
    from graft.model.functional import delete_adapter

    delete_adapter(model, "b")
    assert list(model.peft_config) == ["a"]
    graft.inject_adapter_in_model(lora(target_modules=["q_proj"]), model, "b")


def test_a_tuner_begins_with_one_adapter():
    base = models.make("llama")
    config = lora(target_modules=["q_proj"])
    with pytest.raises(graft.ConfigError, match=r"LoraModel begins with one adapter, 'a'.*\['a', 'b'\].*add_adapter"):
        graft.LoraModel(base, {"a": config, "b": config}, "a")
    assert not any(isinstance(m, graft.AdapterLayer) for m in base.modules())
    assert list(graft.LoraModel(base, {"a": config}, "a").peft_config) == ["a"]
