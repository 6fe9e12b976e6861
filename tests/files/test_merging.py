# SPDX-License-Identifier: Apache-2.0
"""Merging into files: the same bits as merging in memory, whatever the method and the names; all or nothing."""

import errno
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

import graft
from graft.config import atomic
from graft.core.errors import BaseModelMismatchError, CheckpointError, LossError, NonFiniteError
from graft.files import formats
from graft.files.convert import convert_adapter_file
from graft.files.errors import OptionError, OutputExistsError
from graft.files.merging.merge import merge_adapters, merge_files
from graft.files.merging.stream import Workplace
from tests import fresh, samples
from tests.leaves_out import FUSED_EXPERTS
from tests.models import adapted

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of ties and of PiSSA, which other tests have
SMALL = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=96,
)  # fmt: skip
MOE, EIGHTS = dict(SMALL, num_experts_per_tok=2), dict(num_experts=4, moe_intermediate_size=48, head_dim=8)
MODELS = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL)),
    "tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64)),
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(**{k: v for k, v in SMALL.items() if "key" not in k})),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**MOE, num_local_experts=4)),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**MOE, **EIGHTS)),
}
TARGETS = {"gpt2": ["c_attn", "c_proj"], "bert": ["query", "output.dense"]}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(10)[None]


def base_of(kind, folder):
    """Save a model in several shards; return its folder."""
    MODELS[kind]().save_pretrained(folder / "base", max_shard_size="60KB")
    return folder / "base"


def saved_adapter(kind, folder, config, lib=graft, name="adapter", seed=0):
    """Save an adapter with values on the base in `folder`; return the model with it, and the adapter's folder."""
    cls = type(MODELS[kind]())
    model = lib.get_peft_model(cls.from_pretrained(folder / "base"), config).eval()
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(folder / name)
    return model, folder / name


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A base, a LoRA on it, and the two merged in memory."""
    folder = tmp_path_factory.mktemp("plain")
    base = base_of("llama", folder)
    model, adapter = saved_adapter("llama", folder, lora())
    return base, adapter, model.merge_and_unload()


def trained(model, spread=0.05):
    """The model in eval mode, all that trains moved."""
    for p in model.eval().parameters():
        if p.requires_grad:
            p.data += spread * torch.randn_like(p)
    return model


def weights_in(folder):
    return {key: t for f in folder.glob("*.safetensors") for key, t in load_file(f).items()}


def lora(lib=graft, kind="llama", **fields):
    fields = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS.get(kind, ["q_proj", "up_proj"]), **fields}
    return lib.LoraConfig(**fields)


def loaded(kind, folder):
    return type(MODELS[kind]()).from_pretrained(folder).eval()


def assert_same(merged, plain, base, ulps=0):
    """All tensors are equal, bit for bit or nearly, and some differ from the base's."""
    a, b, before = merged.state_dict(), plain.state_dict(), base.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=ulps * 2**-22, atol=ulps * 1e-9)
    assert any(not torch.equal(a[name], before[name]) for name in before)


def assert_merges_as_in_memory(kind, config, folder, merge=merge_files, ulps=0):
    base = base_of(kind, folder)
    model, adapter = saved_adapter(kind, folder, config)
    merge(base, [adapter], folder / "out")
    assert_same(loaded(kind, folder / "out"), model.merge_and_unload(), loaded(kind, base), ulps)


@torch.no_grad()
def assert_same_outputs(merged, model, ids):
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


def with_both(base, first, second):
    """Return the base with two adapters in memory, both active."""
    model = graft.PeftModel.from_pretrained(loaded("llama", base), first, "a")
    model.load_adapter(second, "b")
    model.base_model.set_adapter(["a", "b"])
    return model


LORAS = [
    ("llama", {}),
    ("llama", {"lora_bias": False, "use_rslora": True, "rank_pattern": {"up_proj": 2}}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "wte"]}),
    ("bert", {"target_modules": ["query", "word_embeddings"], "modules_to_save": ["LayerNorm"]}),
    ("bert", {"bias": "all"}),
    ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("tied", {"trainable_token_indices": [1, 7]}),
    ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
]


CASES = [(*case, dora) for case in LORAS for dora in (False, True) if not (dora and "target_parameters" in case[1])]


@pytest.mark.parametrize(
    "kind, fields, dora",  # there is no DoRA of parameters
    [pytest.param(*case, marks=FUSED_EXPERTS if "target_parameters" in case[1] else ()) for case in CASES],
)
def test_lora_merges_to_the_same_bits_as_in_memory(kind, fields, dora, tmp_path):
    config = lora(kind=kind, use_dora=dora, **fields)
    assert_merges_as_in_memory(kind, config, tmp_path, merge_adapters, ulps=dora)  # which adds B A in place


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "tied", "mixtral"])
def test_an_adapter_of_peft_gives_the_outputs_that_it_has_in_peft(kind, tmp_path):
    base = base_of(kind, tmp_path)
    extra = {"target_modules": ["q_proj"], "target_parameters": EXPERTS} if kind == "mixtral" else {}
    if kind == "tied":
        extra = {"target_modules": ["q_proj", "embed_tokens"]}
    model, adapter = saved_adapter(kind, tmp_path, lora(peft, kind, **extra), peft)
    merge_adapters(base, [adapter], tmp_path / "out")
    with torch.no_grad():
        there, here = model(input_ids=IDS).logits, loaded(kind, tmp_path / "out")(input_ids=IDS).logits
        plain = loaded(kind, base)(input_ids=IDS).logits
    torch.testing.assert_close(here, there, rtol=0, atol=1e-6)
    assert (plain - there).abs().max() > 1e-3


T = ["q_proj", "up_proj"]
METHODS = {
    "vera": lambda: graft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "vblora": lambda: graft.VBLoRAConfig(r=4, vector_length=16, num_vectors=8, target_modules=T),
    "randlora": lambda: graft.RandLoraConfig(r=4, target_modules=T),
    "hra": lambda: graft.HRAConfig(r=4, target_modules=T),
    "oft": lambda: graft.OFTConfig(oft_block_size=8, r=0, target_modules=T),
    "loha": lambda: graft.LoHaConfig(r=4, target_modules=T),
    "hira": lambda: graft.HiraConfig(r=4, target_modules=T),
    "ia3": lambda: graft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": lambda: graft.AdaLoraConfig(init_r=4, target_r=4, total_step=10, target_modules=T),
    "ln_tuning": lambda: graft.LNTuningConfig(target_modules=["input_layernorm"]),
    "tokens": lambda: graft.TrainableTokensConfig(token_indices=[3, 5], target_modules=["embed_tokens"]),
    "svft": lambda: graft.SvftConfig(off_diag=1, target_modules=T),
    "svft_topk": lambda: graft.SvftConfig(off_diag=1, r=8, pattern="top_k", target_modules=["q_proj", "o_proj"]),
    "loraxs": lambda: graft.LoraXsConfig(r=4, save_projection=False, target_modules=T),
    "osf": lambda: graft.OSFConfig(target_modules=T),
    "frod": lambda: graft.FrodConfig(target_modules=T),
    "adamss": lambda: graft.AdamssConfig(r=8, num_subspaces=2, target_modules=T),
    "supertuning": lambda: graft.SupertuningConfig(save_precomputed_indices=False, target_modules=T),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "loftq": lambda: lora(init_lora_weights="loftq", loftq_config=graft.LoftQConfig(loftq_bits=4)),
}


TRANSPOSED = {
    "hra": lambda: graft.HRAConfig(r=4, target_modules=["c_attn", "c_fc"]),
    "lokr": lambda: graft.LoKrConfig(r=4, target_modules=["c_attn", "c_fc"]),
    "ia3": lambda: graft.IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_merge_to_the_same_bits_as_in_memory(method, tmp_path):
    assert_merges_as_in_memory("llama", METHODS[method](), tmp_path)


@pytest.mark.parametrize("method", TRANSPOSED)
def test_other_methods_merge_into_weights_that_are_stored_transposed(method, tmp_path):
    assert_merges_as_in_memory("gpt2", TRANSPOSED[method](), tmp_path)


@pytest.mark.parametrize("method", ["svft", "loraxs", "osf"])
def test_what_a_file_lacks_is_found_in_half_precision_too(method, tmp_path):
    MODELS["llama"]().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    plain = loaded("llama", tmp_path / "base").to(torch.bfloat16)
    before = {name: W.clone() for name, W in plain.state_dict().items()}
    model = graft.get_peft_model(plain, METHODS[method]())
    trained(model).save_pretrained(tmp_path / "adapter")
    state = torch.get_rng_state()
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert torch.equal(state, torch.get_rng_state())
    whole, found = model.merge_and_unload().state_dict(), loaded("llama", tmp_path / "out").to(torch.bfloat16)
    assert any(not torch.equal(W, before[name]) for name, W in found.state_dict().items())
    for name, W in found.state_dict().items():
        assert torch.equal(W, whole[name])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_kasa_takes_its_components_out_of_the_files(kind, tmp_path):
    base = base_of(kind, tmp_path)
    model, adapter = saved_adapter(kind, tmp_path, lora(kind=kind, kasa_config=graft.KasaConfig(), r=3))
    merge_files(base, adapter, tmp_path / "out")
    merged, whole = loaded(kind, tmp_path / "out").state_dict(), model.merge_and_unload().state_dict()
    before = loaded(kind, base).state_dict()
    for name, W in merged.items():
        torch.testing.assert_close(W, whole[name], rtol=0, atol=5e-6)
    assert sum(not torch.equal(W, before[name]) for name, W in merged.items()) == len(formats.read(adapter).modules)


FIRST = {sample.adapter: sample for sample in reversed([*samples.LAWS, *samples.CALLED]) if sample.prepare is None}
ROWS = [s for s in samples.SAMPLES if s.model == "llama" and s.name in ("unsaved", "lm_head", "alora", "replicated")]
IN_MEMORY_ONLY = ("FROD-unsaved-llama", "LORA-replicated-llama")  # of which files say too little


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """A folder with a model whose sizes all methods take."""
    folder = tmp_path_factory.mktemp("wide")
    config = t.LlamaConfig(**SMALL | dict(hidden_size=60, num_attention_heads=3, num_key_value_heads=3))
    t.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("sample", [*FIRST.values(), *ROWS], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_what_memory_cannot_merge_files_do_not_and_all_else_to_the_same_values(sample, wide_base, tmp_path):
    config = sample.make() if sample in FIRST.values() else sample.config(graft)
    config.target_modules = {"q_proj"} if config.target_modules in ({"layer"}, ["layer"]) else config.target_modules
    adapted(t.LlamaForCausalLM.from_pretrained(wide_base), config).save_pretrained(tmp_path / "a")
    model = graft.PeftModel.from_pretrained(t.LlamaForCausalLM.from_pretrained(wide_base), tmp_path / "a")
    if str(sample) in IN_MEMORY_ONLY:
        with pytest.raises(LossError, match=r"Merge it in memory|on a model in memory"):
            merge_files(wide_base, tmp_path / "a", tmp_path / "out")
        return
    try:
        whole = model.merge_and_unload()
    except NotImplementedError:
        with pytest.raises((LossError, BaseModelMismatchError)):
            merge_files(wide_base, tmp_path / "a", tmp_path / "out")
        assert os.listdir(tmp_path) == ["a"]
        return
    merge_files(wide_base, tmp_path / "a", tmp_path / "out")
    base = t.LlamaForCausalLM.from_pretrained(wide_base)
    assert_same(t.LlamaForCausalLM.from_pretrained(tmp_path / "out"), whole, base, ulps=100)


@pytest.mark.parametrize(
    "fields", [{"alora_invocation_tokens": [1]}, {"arrow_config": graft.ArrowConfig(top_k=1)},
               {"layer_replication": [(0, 2), (0, 2)]}],
    ids=str,
)  # fmt: skip
def test_factors_that_do_another_thing_than_add_are_refused(fields, tmp_path):
    base = base_of("llama", tmp_path)
    _, adapter = saved_adapter("llama", tmp_path, lora(target_modules=["q_proj"], task_type="CAUSAL_LM", **fields))
    for run in (merge_adapters, merge_files):
        with pytest.raises(LossError, match=r"which no weight of the base can take over\. Keep it unmerged"):
            run(base, [adapter], tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_two_adapters_that_replace_the_same_are_refused(tmp_path):
    """As where both are merged in memory."""
    base = base_of("llama", tmp_path)

    def pair(*configs):
        return [saved_adapter("llama", tmp_path, c, name=f"{c.peft_type}{i}", seed=i)[1] for i, c in enumerate(configs)]

    norms = pair(*[graft.LNTuningConfig(target_modules=["norm"])] * 2)
    tokens = pair(*[graft.TrainableTokensConfig(token_indices=[3, n]) for n in (5, 3 + 4)])
    rows = pair(*[lora(trainable_token_indices=[n, 9]) for n in (1, 2)])
    embeddings = "rows of 'model.embed"
    for adapters, what in ((norms, "model.norm.weight"), (tokens, embeddings), (rows, embeddings)):
        with pytest.raises(OptionError, match=f"each replace .*{what}"):
            merge_files(base, adapters, tmp_path / "out")
    apart = pair(*[graft.TrainableTokensConfig(token_indices=[n, n + 1]) for n in (3, 5)])
    merge_files(base, apart, tmp_path / "out")
    whole = with_both(base, *apart).merge_and_unload()
    assert_same(loaded("llama", tmp_path / "out"), whole, loaded("llama", base))


def test_weights_scale_updates_and_several_adapters_add_up(tmp_path):
    base = base_of("llama", tmp_path)
    _, a = saved_adapter("llama", tmp_path, lora(), name="a", seed=1)
    _, b = saved_adapter("llama", tmp_path, lora(r=2, use_rslora=True), name="b", seed=2)
    merge_adapters(base, [a, b], tmp_path / "out", weights=[0.5, -2.0])
    W0 = loaded("llama", base).state_dict()
    expected = {name: W.double() for name, W in W0.items()}
    for folder, weight in ((a, 0.5), (b, -2.0)):
        whole = graft.PeftModel.from_pretrained(loaded("llama", base), folder).merge_and_unload().state_dict()
        for name in expected:
            expected[name] += weight * (whole[name].double() - W0[name].double())
    for name, W in loaded("llama", tmp_path / "out").state_dict().items():
        torch.testing.assert_close(W.double(), expected[name], rtol=0, atol=1e-6)


def test_a_weight_puts_dora_part_of_the_way(tmp_path):
    base = base_of("llama", tmp_path)
    model, a = saved_adapter("llama", tmp_path, lora(use_dora=True))
    merge_adapters(base, [a], tmp_path / "out", weights=[0.25])
    W0, W1 = loaded("llama", base).state_dict(), model.merge_and_unload().state_dict()
    for name, W in loaded("llama", tmp_path / "out").state_dict().items():
        torch.testing.assert_close(W, W0[name].lerp(W1[name], 0.25), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "fields",
    [{"use_dora": True}, {"init_lora_weights": "loftq", "loftq_config": graft.LoftQConfig(loftq_bits=4)}],
    ids=["dora", "loftq"],
)
def test_what_stands_on_the_base_is_not_changed_by_an_adapter_merged_before(fields, tmp_path):
    base = base_of("llama", tmp_path)
    _, a = saved_adapter("llama", tmp_path, lora(), name="a", seed=1)
    _, b = saved_adapter("llama", tmp_path, lora(**fields), name="b", seed=2)
    whole = with_both(base, a, b).merge_and_unload()
    for name, weight in ("one", 1.0), ("nearly", 1 - 1e-7):
        merge_adapters(base, [a, b], tmp_path / name, weights=[1.0, weight])
        assert_same(loaded("llama", tmp_path / name), whole, loaded("llama", base), ulps=100)


def test_a_head_that_the_base_lacks_comes_along_with_its_class(tmp_path):
    base = base_of("llama", tmp_path)
    config = t.AutoConfig.from_pretrained(base, num_labels=3)
    model = t.AutoModelForSequenceClassification.from_pretrained(base, config=config)
    model.config.pad_token_id = 0
    model = trained(graft.get_peft_model(model, lora(task_type="SEQ_CLS")))
    model.save_pretrained(tmp_path / "adapter")
    merge_adapters(base, [tmp_path / "adapter"], tmp_path / "out")
    merged = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    merged.config.pad_token_id = 0
    assert_same_outputs(merged, model, IDS)


@pytest.mark.parametrize("kinds", [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=["32", "16"])
def test_a_new_tensor_has_the_first_of_the_dtypes_that_most_have(kinds, tmp_path):
    """In every process: a run that was killed goes on in another."""
    for name, kind in zip("kq", kinds):
        (tmp_path / "base").mkdir(exist_ok=True)
        save_file({f"{name}.weight": torch.ones(4, 4, dtype=kind)}, tmp_path / "base" / f"{name}.safetensors")
    base = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4, bias=False) for name in ("k", "q", "score")})
    config = graft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["score"])
    graft.get_peft_model(base, config).save_pretrained(tmp_path / "a")
    merge_adapters(tmp_path / "base", [tmp_path / "a"], tmp_path / "out")
    held = weights_in(tmp_path / "out")
    assert held["score.weight"].dtype == kinds[0]


def test_a_larger_vocabulary_is_written_with_its_size(tmp_path):
    base = base_of("llama", tmp_path)
    model = loaded("llama", base)
    model.resize_token_embeddings(100)
    model = trained(graft.get_peft_model(model, lora(modules_to_save=["embed_tokens", "lm_head"])))
    model.save_pretrained(tmp_path / "adapter")
    merge_adapters(base, [tmp_path / "adapter"], tmp_path / "out")
    merged = loaded("llama", tmp_path / "out")
    assert_same_outputs(merged, model, IDS + 90)
    assert merged.config.vocab_size == 100


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_the_old_vocabulary_after_one_that_resizes_it(target, tmp_path):
    base = base_of("llama", tmp_path)
    model = loaded("llama", base)
    model.resize_token_embeddings(100)
    graft.get_peft_model(model, lora(modules_to_save=["embed_tokens", "lm_head"])).save_pretrained(tmp_path / "large")
    _, small = saved_adapter("llama", tmp_path, lora(target_modules=[target]))
    with pytest.raises(OptionError, match=rf"adapter takes '.*{target}\.weight' for \(\d+, .*makes that \(100, "):
        merge_adapters(base, [tmp_path / "large", small], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    _, other = saved_adapter("llama", tmp_path, lora(target_modules=["q_proj"]), name="other")
    merge_adapters(base, [tmp_path / "large", other], tmp_path / "out")
    assert loaded("llama", tmp_path / "out").lm_head.weight.shape[0] == 100


def test_a_head_that_takes_the_place_of_what_came_before_is_told(tmp_path):
    base = base_of("llama", tmp_path)
    _, factors = saved_adapter("llama", tmp_path, lora(target_modules=["lm_head"]), name="factors")
    _, head = saved_adapter("llama", tmp_path, lora(modules_to_save=["lm_head"]), name="head")
    for first, last in ((factors, head), (head, factors)):  # a file of factors on a head has the base's head, too
        notes = merge_adapters(base, [first, last], tmp_path / "out", force=True).notes
        assert len(notes) == 1 and f"'lm_head.weight' is as {last} brings it" in notes[0]
    assert not merge_adapters(base, [head, head], tmp_path / "out", force=True).notes


@pytest.mark.parametrize("kind", ["llama", "tied"])
@pytest.mark.parametrize("lib", [graft, peft], ids=["ours", "theirs"])
def test_trained_rows_of_a_larger_vocabulary(lib, kind, tmp_path):
    base = base_of(kind, tmp_path)
    model = loaded(kind, base)
    model.resize_token_embeddings(100)
    config = lora(lib, target_modules=["q_proj"], trainable_token_indices=[97, 98])
    model = trained(lib.get_peft_model(model, config))
    model.save_pretrained(tmp_path / "adapter")
    convert_adapter_file(tmp_path / "adapter", "peft", tmp_path / "copy")
    for source in ("adapter", "copy"):
        merge_adapters(base, [tmp_path / source], tmp_path / "out", force=True)
        assert_same_outputs(loaded(kind, tmp_path / "out"), model, IDS + 90)


def test_names_that_lack_a_prefix_are_found(tmp_path):
    """A checkpoint of the model inside, and an adapter trained on the one with a head."""
    base = base_of("bert", tmp_path)
    config = lora(kind="bert", bias="lora_only", modules_to_save=["output.LayerNorm"])
    model, adapter = saved_adapter("bert", tmp_path, config)
    inner = loaded("bert", base).bert
    shutil.rmtree(base)
    inner.save_pretrained(base)
    merge_adapters(base, [adapter], tmp_path / "out")
    whole, got = model.merge_and_unload().state_dict(), load_file(tmp_path / "out/model.safetensors")
    assert {f"bert.{name}" for name in got} <= whole.keys()
    assert all(torch.equal(W, whole[f"bert.{name}"]) for name, W in got.items())
    for name in ("attention.self.query.weight", "attention.self.query.bias", "output.LayerNorm.weight"):
        name = f"encoder.layer.0.{name}"
        assert not torch.equal(got[name], inner.state_dict()[name])


def test_untied_embeddings_are_told_and_all_of_them_written(tmp_path):
    base = base_of("tied", tmp_path)
    _, adapter = saved_adapter("tied", tmp_path, lora(target_modules=["embed_tokens"]))
    account = merge_adapters(base, [adapter], tmp_path / "out")
    assert "tie_word_embeddings" in account.notes[0]
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    held, old = weights_in(tmp_path / "out"), weights_in(base)["model.embed_tokens.weight"]
    assert torch.equal(held["lm_head.weight"], old) and not torch.equal(held["model.embed_tokens.weight"], old)


def test_the_same_rows_on_both_sides_leave_them_tied(tmp_path):
    base = base_of("tied", tmp_path)
    _, adapter = saved_adapter("tied", tmp_path, lora(trainable_token_indices=[1, 7]))
    assert merge_adapters(base, [adapter], tmp_path / "out").notes == []
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


# what is written


def bf16_base(folder):
    model = MODELS["llama"]().to(torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="30KB")
    return folder / "base"


def test_untouched_tensors_are_the_same_bytes_and_changed_ones_rounded_once(tmp_path):
    base = bf16_base(tmp_path)
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"the same weights, unmerged")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling/config.json").write_text("{}")
    (base / "notes").mkdir()
    _, adapter = saved_adapter("llama", tmp_path, lora())
    account = merge_adapters(base, [adapter], tmp_path / "out")
    assert account.notes == ["Not copied from the base: [notes/, pytorch_model.bin]."]
    wide = loaded("llama", base).float().state_dict()
    factors = load_file(adapter / "adapter_model.safetensors")
    got = weights_in(tmp_path / "out")
    for name, W in got.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in factors:
            A, B = factors[f"{key}A.weight"].float(), factors[f"{key}B.weight"].float()
            assert torch.equal(W, (wide[name].addmm(B * 1.5, A)).bfloat16())
        else:
            assert torch.equal(W, wide[name].bfloat16())
    names = {f.relative_to(tmp_path / "out").as_posix() for f in (tmp_path / "out").rglob("*") if f.is_file()}
    shards = {f.name for f in base.glob("*.safetensors")}
    assert len(shards) > 1
    assert names == {*shards, "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
                     "1_Pooling/config.json"}  # fmt: skip


def test_the_certificate_says_what_rounding_left(tmp_path):
    base = bf16_base(tmp_path)
    _, adapter = saved_adapter("llama", tmp_path, lora())
    merge_adapters(base, [adapter], tmp_path / "out", certificate=True)
    held = json.loads((tmp_path / "out/merge.json").read_text())
    wide, factors = loaded("llama", base).float().state_dict(), load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    exact = wide[name].double() + 1.5 * factors[f"{key}B.weight"].double() @ factors[f"{key}A.weight"].double()
    stored = loaded("llama", tmp_path / "out").state_dict()[name].double()
    row = held["tensors"][name]
    delta = exact - wide[name].double()
    assert row["update"] == pytest.approx(float(delta.norm()), rel=1e-5)
    assert row["largest_difference"] == pytest.approx(float((stored - exact).abs().max()), rel=1e-3)
    assert row["unchanged"] == pytest.approx(float((stored == wide[name].double()).double().mean()), abs=2e-3)
    assert row["kept"] == pytest.approx(
        float(((stored - wide[name].double()) * delta).sum() / delta.square().sum()), rel=1e-4
    )
    import hashlib

    for shard, digest in held["output"].items():
        assert hashlib.sha256((tmp_path / "out" / shard).read_bytes()).hexdigest() == digest


def test_an_update_that_rounding_loses_is_told(tmp_path):
    base = bf16_base(tmp_path)
    _, adapter = saved_adapter("llama", tmp_path, lora())
    account = merge_adapters(base, [adapter], tmp_path / "out", weights=[1e-3])
    assert "Rounding lost" in account.notes[0]
    assert merge_adapters(base, [adapter], tmp_path / "wide", weights=[1e-3], dtype="float32").notes == []
    assert loaded("llama", tmp_path / "wide").dtype == torch.float32


def test_shards_of_another_size_hold_the_same(merged, tmp_path):
    base, adapter, whole = merged
    merge_adapters(base, [adapter], tmp_path / "one", shard_size=10**9)
    merge_adapters(base, [adapter], tmp_path / "many", shard_size=20_000)
    assert [f.name for f in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    assert len([*(tmp_path / "many").glob("*.safetensors")]) > 5
    for folder in ("one", "many"):
        assert_same(loaded("llama", tmp_path / folder), whole, loaded("llama", base))


def test_a_whole_file_beside_an_index_of_others_is_the_model(merged, tmp_path):
    """As transformers takes it."""
    base, adapter, whole = merged
    merge_adapters(base, [adapter], tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "both")
    loaded("llama", base).save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "model.safetensors", tmp_path / "both")
    assert_same(loaded("llama", tmp_path / "one"), whole, loaded("llama", tmp_path / "both"))
    merge_adapters(tmp_path / "both", [adapter], tmp_path / "out")
    assert_same(loaded("llama", tmp_path / "out"), loaded("llama", tmp_path / "one"), loaded("llama", base))
    assert [f.name for f in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_an_adapter_of_few_bits_merges_as_in_memory(dtype, tmp_path):
    base = base_of("llama", tmp_path)
    _, adapter = saved_adapter("llama", tmp_path, lora(modules_to_save=["norm"]))
    weights = adapter / "adapter_model.safetensors"
    save_file({key: t.to(dtype) for key, t in load_file(weights).items()}, weights)
    merge_adapters(base, [adapter], tmp_path / "out")
    whole = graft.PeftModel.from_pretrained(loaded("llama", base), adapter).merge_and_unload()
    assert_same(loaded("llama", tmp_path / "out"), whole, loaded("llama", base))


# what is refused, before anything is written


def edited(adapter, folder, change):
    """Copy an adapter, its tensors changed."""
    shutil.copytree(adapter, folder)
    weights = folder / "adapter_model.safetensors"
    save_file(change(load_file(weights)), weights)
    return folder


def test_bad_input_is_refused_and_leaves_nothing(merged, tmp_path):
    base, adapter, _ = merged
    own, out = tmp_path / "own", tmp_path / "out"
    other = base_of("gpt2", own)
    made = lambda name, config: saved_adapter("llama", base.parent, config, name=own / name)[1]
    prompt = made("prompt", graft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    biased, dora = made("biased", lora(lora_bias=True)), made("dora", lora(use_dora=True))
    nan = float("nan")
    unknown = edited(adapter, own / "unknown", lambda held: held | {"base_model.model.extra.weight": torch.ones(2)})
    short = edited(dora, own / "short", lambda held: {k: t[:-1] if "magnitude" in k else t for k, t in held.items()})
    broken = edited(
        adapter, own / "nan", lambda held: {k: t * nan if "layers.1.mlp.up" in k else t for k, t in held.items()}
    )
    for call, error, text in (
        (lambda: merge_adapters(other, [adapter], out), BaseModelMismatchError, "does not hold 4 of the 4"),
        (lambda: merge_adapters(base, [adapter], out, weights=[1, 2]), OptionError, "one for each"),
        (lambda: merge_adapters(base, [adapter], base / "merged"), OptionError, "one lies in the other"),
        (lambda: merge_adapters(base, [adapter], base.parent, force=True), OptionError, "one lies in the other"),
        (lambda: merge_adapters(base, [adapter], adapter, force=True), OptionError, "one lies in the other"),
        (lambda: merge_adapters(tmp_path / "nowhere", [adapter], out), CheckpointError, ""),
        (lambda: merge_adapters(base, [adapter], out, keep_quantized=True), OptionError, "not quantized"),
        (lambda: merge_files(base, prompt, out), LossError, "an input of the model"),
        (lambda: merge_adapters(base, [biased], out), BaseModelMismatchError, "shifts the bias"),
        (lambda: merge_adapters(base, [unknown], out), BaseModelMismatchError, r"'extra\.weight': .* modules_to_save"),
        (lambda: merge_adapters(base, [short], out), BaseModelMismatchError, "its magnitude is"),
        (lambda: merge_adapters(base, [broken], out), NonFiniteError, r"layers\.1\.mlp\.up_proj"),
    ):
        with pytest.raises(error, match=text):
            call()
        assert os.listdir(tmp_path) == ["own"] and sorted(os.listdir(base.parent)) == ["adapter", "base"]


def test_an_output_that_exists_stays_without_force(merged, tmp_path):
    base, adapter, whole = merged
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("precious")
    with pytest.raises(OutputExistsError, match="--force"):
        merge_adapters(base, [adapter], tmp_path / "out")
    with pytest.raises(OutputExistsError, match=r"holds \[mine\]"):
        merge_adapters(base, [adapter], tmp_path / "out", force=True)
    assert (tmp_path / "out/mine").read_text() == "precious"
    (tmp_path / "out/mine").rename(tmp_path / "out/model.safetensors")
    merge_adapters(base, [adapter], tmp_path / "out", force=True)
    assert_same(loaded("llama", tmp_path / "out"), whole, loaded("llama", base))
    assert os.listdir(tmp_path) == ["out"]


def test_a_full_disk_is_told_before_anything_is_written(merged, tmp_path, monkeypatch):
    base, adapter, _ = merged
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="are free") as e:
        merge_adapters(base, [adapter], tmp_path / "out")
    assert e.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_a_dry_run_writes_nothing(merged, tmp_path):
    base, adapter, _ = merged
    account = merge_adapters(base, [adapter], tmp_path / "out", dry_run=True)
    assert len(account.tensors) == 4 and sum(account.shards.values()) > 80_000
    assert os.listdir(tmp_path) == []


# killed


KILLED = """
import os, signal, sys
from graft.files.merging import stream
from graft.files.merging.merge import merge_adapters
whole, left = stream.write_shard, int(sys.argv[4])
def killed(path, outs):
    global left
    made = whole(path, outs) if left else None
    left -= 1
    if left < 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return made
stream.write_shard = killed
merge_adapters(sys.argv[1], [sys.argv[2]], sys.argv[3])
"""


@pytest.mark.skipif(os.name != "posix", reason="no kill -9")
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_run_that_was_killed_goes_on(merged, after, tmp_path):
    """After so many shards, of which the last had not been noted as finished."""
    base, adapter, whole = merged
    done = fresh.run("-c", KILLED, base, adapter, tmp_path / "out", after)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    assert merge_adapters(base, [adapter], tmp_path / "out").resumed == max(after - 1, 0)
    assert_same(loaded("llama", tmp_path / "out"), whole, loaded("llama", base))
    assert os.listdir(tmp_path) == ["out"]


def test_what_another_call_left_is_not_taken_up(merged, tmp_path):
    """A state of the same output with other options, and one with its first shard finished."""
    base, adapter, whole = merged

    def stop(name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_adapters(base, [adapter], tmp_path / "out", step=stop)
    assert (tmp_path / ".out.graft-merge/state.json").exists()
    assert merge_adapters(base, [adapter], tmp_path / "out", weights=[2.0]).resumed == 0
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        merge_adapters(base, [adapter], tmp_path / "out", step=stop)
    assert merge_adapters(base, [adapter], tmp_path / "out").resumed == 1
    assert_same(loaded("llama", tmp_path / "out"), whole, loaded("llama", base))


@pytest.mark.parametrize("at", [1, 2, 3, None])
def test_an_interrupt_between_the_names(merged, at, tmp_path, monkeypatch):
    """What stood there comes back, or the new one is there, and nothing of the other; None: the two are swapped."""
    base, adapter, whole = merged
    merge_adapters(base, [adapter], tmp_path / "out", weights=[2.0])
    weights = lambda: {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.safetensors")}
    before = weights()
    original, swap, calls = os.rename, atomic.swap_by_system, []

    def interrupted(*args):
        original(*args)
        calls.append(args)
        if len(calls) == at:
            raise KeyboardInterrupt

    def swapped(*args):
        assert swap(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    monkeypatch.setattr(atomic, "swap_by_system", swapped if at is None else lambda *_: False)
    with pytest.raises(KeyboardInterrupt):
        merge_adapters(base, [adapter], tmp_path / "out", force=True)
    monkeypatch.undo()
    assert before and weights() and (weights() == before) is (at == 1)
    merge_adapters(base, [adapter], tmp_path / "out", force=True)
    assert_same(loaded("llama", tmp_path / "out"), whole, loaded("llama", base))
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_that_comes_while_this_one_waits(merged, tmp_path, monkeypatch):
    """Two at once, without force: the second one leaves what the first has written."""
    base, adapter, _ = merged
    original = Workplace.lock

    def later(*args):
        monkeypatch.undo()
        merge_adapters(base, [adapter], tmp_path / "out", weights=[2.0])
        return original(*args)

    monkeypatch.setattr(Workplace, "lock", later)
    with pytest.raises(OutputExistsError, match="exists"):
        merge_adapters(base, [adapter], tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
