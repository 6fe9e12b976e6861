# SPDX-License-Identifier: Apache-2.0
"""Adapters of AdapterHub's library compute what they compute there, by files and outputs of its own, or are refused."""

import copy
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

import graft
from graft.files.convert import convert_adapter_file
from graft.files.errors import BaseNeededError
from graft.files.formats.adapterhub_places import COMPARED
from tests.leaves_out import EMBEDDINGS_APART
from tests.models import seeded

HERE = Path(__file__).parent / "fixtures" / "adapterhub"
MODELS = sorted(folder.name for folder in HERE.iterdir())
ELSEWHERE = {  # what the library puts elsewhere than graft
    "albert": ["houlsby"], "beit": ["houlsby", "parallel"], "gemma2": ["pfeiffer", "invertible"],
    "gemma3_text": ["pfeiffer", "invertible"], "gptj": ["parallel"], "phi": ["pfeiffer", "invertible"],
    "clip_text_model": ["invertible"], "whisper": ["invertible"],
}  # fmt: skip


@cache
def said(name):
    with safe_open(HERE / name / "adapters.safetensors", "pt") as f:
        return json.loads(f.metadata()["configs"])


CASES = [
    pytest.param(name, label, marks=EMBEDDINGS_APART if label == "invertible" and name in ("t5", "mt5") else ())
    for name in MODELS
    for label in said(name)
    if label not in ELSEWHERE.get(name, ())
]


@cache
def loaded(name):
    import transformers as t

    kind = t.AutoModelForSeq2SeqLM if name in ("t5", "mt5") else t.AutoModel
    return kind.from_pretrained(HERE / name, attn_implementation="eager").eval()


def base(name):
    return copy.deepcopy(loaded(name))


@cache
def tensors(name, file):
    return load_file(HERE / name / f"{file}.safetensors")


@cache
@torch.no_grad()
def run_plain(name):
    """Return the inputs of a model and its output without adapters."""
    inputs = {k[3:]: v for k, v in tensors(name, "outputs").items() if k.startswith("in.")}
    return inputs, output(loaded(name), inputs)


def test_an_invertible_adapter_needs_an_encoder_with_an_embedding_of_its_own(tmp_path):
    model = base("t5")
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared  # as transformers 4 has them
    with pytest.raises(graft.CheckpointError, match="have one module for their embeddings"):
        graft.load_adapter(model, folder("t5", "invertible", tmp_path))
    with pytest.raises(graft.UnsupportedLayerError, match="have one module for their embeddings"):
        graft.get_peft_model(model, graft.BottleneckConfig.preset("seq_bn_inv"))


def folder(name, label, where):
    """The adapter as the library saves it."""
    held = tensors(name, "adapters")
    own = {k.partition("/")[2]: v.clone() for k, v in held.items() if k.startswith(f"{label}/")}
    where.mkdir(exist_ok=True)
    torch.save(own, where / "pytorch_adapter.bin")
    (where / "adapter_config.json").write_text(json.dumps(said(name)[label]))
    return where


def output(model, given):
    y = model(**given)
    return y.logits if "logits" in y else y.last_hidden_state


@pytest.mark.parametrize("name, label", CASES)
@torch.no_grad()
def test_an_adapter_computes_what_it_computes_there(name, label, tmp_path):
    inputs, plain = run_plain(name)
    model = graft.load_adapter(base(name), folder(name, label, tmp_path / label)).eval()
    y = output(model, inputs)
    assert (y - plain).abs().max() > 1e-2
    assert_close(y, tensors(name, "outputs")[label], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name, label", [(name, label) for name, labels in ELSEWHERE.items() for label in labels])
def test_what_stands_elsewhere_there_is_refused(name, label, tmp_path):
    model = base(name)
    with pytest.raises(graft.CheckpointError, match=r"acts at another place than graft|has no embedding"):
        graft.load_adapter(model, folder(name, label, tmp_path / label))
    assert not any(isinstance(m, graft.AdapterLayer) for m in model.modules())


@pytest.mark.parametrize("label", ["houlsby", "loreft"])
def test_models_that_no_fixture_compares_are_refused(label, tmp_path, monkeypatch):
    assert set(COMPARED) == set(MODELS)
    model = base("bert")
    monkeypatch.setattr(type(model.config), "model_type", "xmod")
    with pytest.raises(graft.CheckpointError, match=r"type 'xmod': no test compares"):
        graft.load_adapter(model, folder("bert", label, tmp_path / label))


def test_reft_of_an_encoder_and_a_decoder_is_refused(tmp_path):
    with pytest.raises(graft.CheckpointError, match="the encoder's positions to both"):
        graft.load_adapter(base("t5"), folder("llama", "loreft", tmp_path / "a"))


PRESETS = {
    "pfeiffer": "seq_bn", "houlsby": "double_seq_bn", "parallel": "par_bn", "plus": "adapter_plus",
    "compacter": "compacter", "compacterpp": "compacter++", "invertible": "seq_bn_inv",
}  # fmt: skip


@pytest.mark.parametrize("label, preset", PRESETS.items())
def test_a_preset_has_the_values_that_it_has_there(label, preset):
    theirs = said("bert")[label]["config"]
    ours = graft.BottleneckConfig.preset(preset).to_dict()
    chosen = {"reduction_factor", "inv_adapter_reduction_factor", "stochastic_depth"}  # the fixtures' own
    same = ours.keys() & theirs.keys() - chosen
    assert len(same) > 15 and {k: ours[k] for k in same} == {k: theirs[k] for k in same}


def test_a_compacters_file_lacks_what_its_layers_share():
    with pytest.raises(graft.CheckpointError, match=r"phm_rule.*does not save"):
        graft.load_adapter(base("bert"), HERE / "bert" / "compacter")


@torch.no_grad()
def test_a_folder_of_the_library_loads_as_it_is():
    held = load_file(HERE / "bert" / "outputs.safetensors")
    given = {k[3:]: v for k, v in held.items() if k.startswith("in.")}
    model = graft.load_adapter(base("bert"), HERE / "bert" / "houlsby").eval()
    assert_close(output(model, given), held["houlsby"], rtol=2e-5, atol=2e-5)


def test_reft_that_lacks_a_tensor(tmp_path):
    where = folder("llama", "loreft", tmp_path / "a")
    held = torch.load(where / "pytorch_adapter.bin")
    del held[next(key for key in held if key.endswith("0.learned_source.bias"))]
    torch.save(held, where / "pytorch_adapter.bin")
    with pytest.raises(graft.CheckpointError, match=r"lacks 'learned_source.bias' of 'layers.0'"):
        graft.load_adapter(base("llama"), where)


@pytest.mark.parametrize("label", ["pfeiffer", "parallel"])
@torch.no_grad()
def test_a_base_of_files_tells_the_places_too(label, tmp_path):
    held = load_file(HERE / "bert" / "outputs.safetensors")
    given = {k[3:]: v for k, v in held.items() if k.startswith("in.")}
    source, made = folder("bert", label, tmp_path / label), tmp_path / "made"
    convert_adapter_file(source, "peft", made, base=HERE / "bert")
    model = graft.PeftModel.from_pretrained(base("bert"), made).eval()
    assert_close(output(model, given), held[label], rtol=2e-5, atol=2e-5)
    unknown = shutil.copytree(HERE / "bert", tmp_path / "unknown")
    (unknown / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BaseNeededError, match=r"no installed library makes a model of .*unknown.*graft.load_adapter"):
        convert_adapter_file(source, "peft", tmp_path / "other", base=unknown)


HEADS = {  # of AdapterHub's library → the model with the same head, and its layers
    "bert-pooled": ("BertForSequenceClassification", ["classifier"]),
    "bert-tagging": ("BertForTokenClassification", ["classifier"]),
    "bert-answers": ("BertForQuestionAnswering", ["qa_outputs"]),
    "roberta-plain": ("RobertaForSequenceClassification", ["classifier.dense", "classifier.out_proj"]),
}


def with_head(label, kind, where):
    """A model of a kind with the weights of the fixture's base, the folder of an adapter with a head, and outputs."""
    import transformers as t

    weights = base(label.partition("-")[0]).state_dict()
    config = t.AutoConfig.from_pretrained(HERE / label.partition("-")[0])
    config.num_labels = 2 if label == "bert-answers" else 3
    with seeded(5):
        model = getattr(t, kind)(config).eval()
    model.base_model.load_state_dict(weights, strict=False)
    held = load_file(HERE.parent / "adapterhub_heads" / label / "outputs.safetensors")
    return model, shutil.copytree(HERE.parent / "adapterhub_heads" / label, where), held


@pytest.mark.parametrize("label", HEADS)
@torch.no_grad()
def test_a_head_goes_where_the_model_has_the_same(label, tmp_path):
    kind, names = HEADS[label]
    model, path, held = with_head(label, kind, tmp_path / "a")
    adapted = graft.load_adapter(model, path).eval()
    given = {k[3:]: v for k, v in held.items() if k.startswith("in.")}
    y = adapted(**given)
    logits = y.logits if "logits" in y else torch.stack([y.start_logits, y.end_logits])
    assert_close(logits, held["y"], rtol=2e-5, atol=2e-5)
    assert adapted.peft_config["default"].modules_to_save == names
    with adapted.disable_adapter():  # the base's own head
        plain = adapted(**given)
    again = with_head(label, kind, tmp_path / "b")[0](**given)
    assert all(torch.equal(plain[key], again[key]) for key in plain)


@pytest.mark.parametrize(
    "label, kind",
    [
        ("bert-plain", "BertForSequenceClassification"),  # whose head has one layer, of the pooler's output
        ("bert-pooled", "BertForTokenClassification"),  # of the same shape, of each token
        ("bert-tagging", "BertForSequenceClassification"),
        ("roberta-plain", "RobertaForTokenClassification"),
        ("bert-pooled", "BertModel"),
    ],
)
def test_a_head_that_the_model_lacks_is_refused(label, kind, tmp_path):
    model, path, _ = with_head(label, kind, tmp_path / "a")
    with pytest.raises(graft.LossError, match=r"pytorch_model_head.bin: heads.a.1.weight.*lossy=True"):
        graft.load_adapter(model, path)
    assert not any(isinstance(m, graft.AdapterLayer) for m in model.modules())
    assert graft.load_adapter(model, path, lossy=True).peft_config["default"].modules_to_save is None


@pytest.mark.parametrize("key", ["weight", "1.weight", "heads.a.one.weight"])
def test_a_head_with_a_damaged_key_is_refused(key, tmp_path):
    model, path, _ = with_head("bert-pooled", "BertForSequenceClassification", tmp_path / "a")
    head = torch.load(path / "pytorch_model_head.bin")
    torch.save(head | {key: torch.zeros(3)}, path / "pytorch_model_head.bin")
    with pytest.raises(graft.LossError, match=f"pytorch_model_head.bin: .*{key}"):
        graft.load_adapter(model, path)


@torch.no_grad()
def test_a_head_by_the_models_own_names(tmp_path):
    """As the library saves one of transformers' models, which have no heads of its own."""
    model, path, held = with_head("bert-pooled", "BertForSequenceClassification", tmp_path / "a")
    head = {f"classifier.{k.rpartition('.')[2]}": v for k, v in torch.load(path / "pytorch_model_head.bin").items()}
    torch.save(head, path / "pytorch_model_head.bin")
    (path / "head_config.json").write_text('{"config": null, "model_class": "BertForSequenceClassification"}')
    adapted = graft.load_adapter(model, path).eval()
    given = {k[3:]: v for k, v in held.items() if k.startswith("in.")}
    assert_close(adapted(**given).logits, held["y"], rtol=2e-5, atol=2e-5)
    model, path, _ = with_head("bert-pooled", "BertForSequenceClassification", tmp_path / "b")
    torch.save({k: v.clone() for k, v in model.classifier.state_dict(prefix="classifier.").items()}, path / "head.bin")
    for name, of in (
        ("pytorch_model_head.bin", path / "head.bin"),
        ("head_config.json", tmp_path / "a/head_config.json"),
    ):
        shutil.copy(of, path / name)
    assert graft.load_adapter(model, path).peft_config["default"].modules_to_save is None  # the base has it
