# SPDX-License-Identifier: Apache-2.0
"""Prompts in files and state dicts: interchangeable with PEFT's, every key accounted for."""

from dataclasses import replace

import pytest
import torch
from safetensors import torch as safetensors
from safetensors.torch import save_file
from torch import nn

import graft
from tests import models
from tests.pair import LIBS, close, close_dicts, json_of, outcome
from tests.prompts.samples import EMBEDS, MODEL, SAMPLES, adapt, added, batch, both, each, forward, make, randomize
from tests.prompts.test_adapters import longer

WEIGHTS = "adapter_model.safetensors"
ALL = SAMPLES + each("t5", "gemma") + each("bert-seq", methods=EMBEDS) + each("bert-qa", methods=EMBEDS[:2])
ALL += each("bert", methods=("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"))
NETWORKS = [s for s in SAMPLES if s.name in ("mlp", "lstm", "projection", "zero_projection")]
ONE_OF_EACH = each(MODEL)


def load_file(path):
    """Read, not mapped, which safetensors 0.4 does: tests write over these files."""
    return safetensors.load(path.read_bytes())


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def load(lib, sample, folder, **options):
    models.seed(2)
    return lib.PeftModel.from_pretrained(make(sample.model), folder, **options)


def seen(model, sample):
    """Of forward passes with and without a mask."""
    with torch.no_grad():
        parts = {p: forward(model.eval(), batch(sample, p)) for p in ("left", "none")}
    return {f"{p} {k}": v for p, out in parts.items() for k, v in out.items()}


@pytest.mark.parametrize("sample", ALL, ids=str)
def test_saved_by_one_loaded_by_the_other(sample, tmp_path):
    ours, theirs = (randomize(m).eval() for m in both(sample))
    expected = seen(theirs, sample)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")

    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    close_dicts(load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS), 1e-6)
    configs = [json_of(tmp_path / name) for name in ("ours", "theirs")]
    for config in configs:  # PEFT names modules to save twice
        config["modules_to_save"] = config["modules_to_save"] and sorted(set(config["modules_to_save"]))
    assert configs[0] == configs[1]

    reference = load(LIBS[1], sample, tmp_path / "theirs")
    for lib, source in ((LIBS[0], "theirs"), (LIBS[1], "ours"), (LIBS[0], "ours")):
        result = outcome(lambda lib=lib, source=source: load(lib, sample, tmp_path / source))
        assert result.error is None, (lib.__name__, source, result.error)
        assert not result.warned("missing adapter keys") and not result.warned("Unexpected keyword arguments")
        close_dicts(added(result.value), added(reference), 1e-6)
        close_dicts(seen(result.value, sample), expected)


@pytest.mark.parametrize("sample", each(MODEL, "t5") + each("bert-seq", methods=EMBEDS), ids=str)
def test_loaded_model_state(sample, tmp_path):
    """What trains, and the configuration. In PEFT a loaded prompt trains; that of graft does not: see below."""
    adapt(LIBS[1], sample).save_pretrained(tmp_path)
    ours, theirs = (lib.PeftModel.from_pretrained(make(sample.model).train(), tmp_path) for lib in LIBS)
    assert ours.training is theirs.training is False
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    mine, other = (m.peft_config["default"] for m in (ours, theirs))
    assert mine.inference_mode is other.inference_mode is True
    for name in ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
        assert getattr(mine, name) == getattr(other, name)


@pytest.mark.differs("prompts: `requires_grad` of inactive prompts, and of those loaded for inference")
@pytest.mark.graft_only
@pytest.mark.parametrize("sample", ONE_OF_EACH, ids=str)
def test_loaded_prompts_do_not_train(sample, tmp_path):
    """PEFT's require gradients, though they were loaded for inference."""
    adapt(graft, sample).save_pretrained(tmp_path)
    loaded = load(graft, sample, tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded.load_adapter(tmp_path, "b")
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("sample", ONE_OF_EACH, ids=str)
def test_cannot_go_on_training(sample, tmp_path):
    """The file has the prompt, not what computed it."""
    adapt(LIBS[1], sample).save_pretrained(tmp_path)
    for lib in LIBS:
        refused = [outcome(lambda lib=lib: load(lib, sample, tmp_path, is_trainable=True))]
        model = load(lib, sample, tmp_path)
        refused.append(outcome(lambda model=model: model.load_adapter(tmp_path, "b", is_trainable=True)))
        for result in refused:
            assert result.kind is ValueError
            assert "Cannot set a prompt learning adapter to trainable" in str(result.error)
        assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("is_trainable", [True, False])
@pytest.mark.parametrize("sample", [s for s in ONE_OF_EACH if s not in NETWORKS], ids=str)
def test_new_values_for_a_prompt_that_trains(sample, is_trainable, tmp_path):
    """Which is how Trainer resumes, and goes back to the best checkpoint."""
    randomize(adapt(LIBS[1], sample)).save_pretrained(tmp_path / "first")
    for lib in LIBS:
        model = adapt(lib, sample)
        before = {n: p.requires_grad for n, p in model.named_parameters()}
        model.load_adapter(tmp_path / "first", "default", is_trainable=is_trainable)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before
        model.save_pretrained(tmp_path / lib.__name__)
        close_dicts(load_file(tmp_path / lib.__name__ / WEIGHTS), load_file(tmp_path / "first" / WEIGHTS), 0)


@pytest.mark.graft_only
@pytest.mark.parametrize("sample", NETWORKS, ids=str)
def test_the_network_of_a_prompt_that_trains(sample, tmp_path):
    """It is in no file: who resumes is told."""
    randomize(adapt(graft, sample)).save_pretrained(tmp_path)
    for is_trainable in (True, False):
        model = adapt(graft, sample)
        result = outcome(lambda m=model, t=is_trainable: m.load_adapter(tmp_path, "default", is_trainable=t))
        assert result.error is None and next(model.prompt_encoder["default"].parameters()).requires_grad
        assert result.warned("does not fit") == [graft.PeftWarning] * is_trainable


@pytest.mark.parametrize("sample", SAMPLES + each("bert-seq", methods=EMBEDS), ids=str)
def test_saved_again(sample, tmp_path):
    """What was loaded is saved as it came."""
    randomize(adapt(LIBS[1], sample)).save_pretrained(tmp_path / "first")
    for lib in LIBS:
        load(lib, sample, tmp_path / "first").save_pretrained(tmp_path / lib.__name__)
        close_dicts(load_file(tmp_path / lib.__name__ / WEIGHTS), load_file(tmp_path / "first" / WEIGHTS), 0)


SEVERAL = ONE_OF_EACH + each("t5", methods=("PREFIX_TUNING", "MULTITASK_PROMPT_TUNING"))
SEVERAL += each("bert-seq", methods=EMBEDS)


@pytest.mark.parametrize("sample", SEVERAL, ids=str)
def test_several_adapters_in_sub_folders(sample, tmp_path):
    for lib, name in zip(LIBS, ("ours", "theirs")):
        model = adapt(lib, sample)
        model.add_adapter("other", longer(sample).config(lib))
        randomize(model).save_pretrained(tmp_path / name)
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    for part in ("", "other"):
        close_dicts(*(load_file(tmp_path / name / part / WEIGHTS) for name in ("ours", "theirs")), 1e-6)

    results = []
    for lib, name in ((LIBS[1], "theirs"), (LIBS[0], "theirs"), (LIBS[1], "ours"), (LIBS[0], "ours")):
        model = load(lib, sample, tmp_path / name)
        model.load_adapter(tmp_path / name / "other", "other")
        assert model.active_adapters == ["default"]
        before = seen(model, sample)
        model.set_adapter("other")
        results.append({**before, **{f"other {k}": v for k, v in seen(model, sample).items()}})
    for other in results[1:]:
        close_dicts(other, results[0])


@pytest.mark.parametrize("sample", ONE_OF_EACH, ids=str)
def test_selected_adapters(sample, tmp_path):
    for lib, name in zip(LIBS, ("ours", "theirs")):
        model = adapt(lib, sample)
        model.add_adapter("other", longer(sample).config(lib))
        model.save_pretrained(tmp_path / name, selected_adapters=["other"])
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


@pytest.mark.parametrize("sample", ONE_OF_EACH, ids=str)
def test_loaded_under_another_name(sample, tmp_path):
    model = randomize(adapt(LIBS[1], sample)).eval()
    model.save_pretrained(tmp_path)
    ours, theirs = (load(lib, sample, tmp_path, adapter_name="renamed") for lib in LIBS)
    close_dicts(added(ours), added(theirs), 0)
    assert ours.active_adapters == theirs.active_adapters == ["renamed"]
    assert any(name.startswith("prompt_encoder.renamed.") for name in added(ours))
    unlabelled = batch(sample, "left", labels=False)  # PEFT's loss of CPT needs the name "default"
    with torch.no_grad():
        close_dicts(forward(ours, unlabelled), forward(model, unlabelled))


@pytest.mark.parametrize("sample", ONE_OF_EACH + each("bert-seq", methods=EMBEDS), ids=str)
def test_bin_files(sample, tmp_path):
    for writer, reader in (LIBS, LIBS[::-1]):
        folder = tmp_path / writer.__name__
        model = randomize(adapt(writer, sample))
        expected = seen(model, sample)
        model.save_pretrained(folder, safe_serialization=False)
        assert "adapter_model.bin" in files(folder) and WEIGHTS not in files(folder)
        close_dicts(seen(load(reader, sample, folder), sample), expected)


@pytest.mark.parametrize("sample", ONE_OF_EACH, ids=str)
def test_half_precision_base(sample, tmp_path):
    """The prompt comes back in float32."""
    base = lambda: make(sample.model).bfloat16()
    randomize(adapt(LIBS[1], sample, base=base())).save_pretrained(tmp_path)
    results = [added(lib.PeftModel.from_pretrained(base(), tmp_path)) for lib in LIBS]
    close_dicts(*results, 0)
    assert {p.dtype for p in results[0].values()} == {torch.float32}


@pytest.mark.graft_only
def test_head_with_another_number_of_labels(tmp_path):
    """A base of 3 labels takes a prompt whose head has 5; PEFT cannot load that."""
    sample = each("bert-seq", methods=["PROMPT_TUNING"])[0]
    base = make("bert-seq")
    base.classifier, base.num_labels, base.config.num_labels = nn.Linear(24, 5), 5, 5
    wide = randomize(adapt(LIBS[1], sample, base=base)).eval()
    wide.save_pretrained(tmp_path)
    inputs = {**batch(sample), "labels": torch.tensor([0, 4, 1])}
    close_dicts(forward(load(graft, sample, tmp_path), inputs), forward(wide, inputs))
    model = randomize(adapt(graft, sample)).eval()
    model.load_adapter(tmp_path, "wide")
    model.set_adapter("wide")
    close_dicts(forward(model, inputs), forward(wide, inputs))
    model.set_adapter("default")
    close_dicts(forward(model, batch(sample)), forward(randomize(adapt(graft, sample)).eval(), batch(sample)))


# state dicts


@pytest.mark.parametrize("sample", ALL, ids=str)
def test_state_dicts(sample):
    """Taken from one library and put into the other, under another name."""
    pair = [randomize(m).eval() for m in both(sample)]
    dicts = [lib.get_peft_model_state_dict(m) for lib, m in zip(LIBS, pair)]
    close_dicts(*dicts, 1e-6)
    assert "prompt_embeddings" in dicts[0]

    expected, frozen = seen(pair[1], sample), replace(sample, kwargs={**sample.kwargs, "inference_mode": True})
    for lib in LIBS:
        for given in dicts:
            model = adapt(lib, frozen, seed=9)
            lib.set_peft_model_state_dict(model, {k: v.detach().clone() for k, v in given.items()})
            close_dicts(seen(model, sample), expected)


@pytest.mark.parametrize("sample", SEVERAL, ids=str)
def test_state_dict_of_a_second_adapter(sample):
    dicts = []
    for lib in LIBS:
        model = adapt(lib, sample)
        model.add_adapter("b", longer(sample).config(lib))
        dicts.append(lib.get_peft_model_state_dict(randomize(model), adapter_name="b"))
    close_dicts(*dicts, 1e-6)


@pytest.mark.graft_only
@pytest.mark.parametrize("sample", SAMPLES + each("bert-seq", methods=EMBEDS), ids=str)
def test_explicit_state_dict(sample):
    """Its values are taken, not the model's: PEFT takes the prompt from the model all the same."""
    model, other = randomize(adapt(graft, sample)), randomize(adapt(graft, sample), 0.4)
    for name, p in other.named_parameters():
        if ".modules_to_save." in name:
            p.data.add_(1.0)
    expected = graft.get_peft_model_state_dict(other)
    before = graft.get_peft_model_state_dict(model)
    given = {k: v.clone() for k, v in other.state_dict().items()}
    close_dicts(graft.get_peft_model_state_dict(model, state_dict=given), expected, 1e-6)
    close_dicts(graft.get_peft_model_state_dict(model), before, 1e-6)
    assert not torch.equal(before["prompt_embeddings"], expected["prompt_embeddings"])


@pytest.mark.graft_only
@pytest.mark.parametrize("sample", SEVERAL, ids=str)
def test_explicit_state_dict_that_lacks_a_tensor(sample):
    model = adapt(graft, sample)
    for lost in added(model):
        given = {k: v for k, v in model.state_dict().items() if k != lost}
        failed = outcome(lambda given=given: graft.get_peft_model_state_dict(model, state_dict=given))
        assert isinstance(failed.error, graft.AdapterKeyError) and lost in str(failed.error)


@pytest.mark.parametrize("sample", SEVERAL, ids=str)
def test_explicit_state_dict_of_the_model(sample):
    """The model's own is as good as none."""
    dicts = []
    for lib, model in zip(LIBS, both(sample)):
        randomize(model)
        dicts.append(lib.get_peft_model_state_dict(model, state_dict=model.state_dict()))
    close_dicts(*dicts, 1e-6)


# into an adapter that is there


@pytest.mark.differs(
    "prompts: reloading a trained prompt into an encoder with a network (`load_adapter` under its name)"
)
@pytest.mark.graft_only
@pytest.mark.parametrize("way", ["load_adapter", "set_peft_model_state_dict"])
@pytest.mark.parametrize("sample", SAMPLES + each("bert-seq", methods=EMBEDS), ids=str)
def test_into_an_adapter_that_is_there(sample, way, tmp_path):
    """It then is what was saved: a network that computed its prompt is gone, of which PEFT keeps the old one."""
    saved = randomize(adapt(LIBS[1], sample))
    expected = seen(saved, sample)
    saved.save_pretrained(tmp_path)
    model = randomize(adapt(graft, sample), 0.4)
    if way == "load_adapter":
        report = model.load_adapter(tmp_path, "default")
    else:
        report = graft.set_peft_model_state_dict(model, load_file(tmp_path / WEIGHTS), strict=True)
    assert not report.missing_keys and not report.unexpected_keys
    assert "prompt_embeddings" in report.loaded
    close_dicts(seen(model, sample), expected)
    fresh = load(graft, sample, tmp_path)
    assert {n: p.shape for n, p in added(model).items()} == {n: p.shape for n, p in added(fresh).items()}
    model.save_pretrained(tmp_path / "again")
    close_dicts(load_file(tmp_path / "again" / WEIGHTS), load_file(tmp_path / WEIGHTS), 0)


@pytest.mark.graft_only
@pytest.mark.parametrize("sample", NETWORKS, ids=str)
def test_training_goes_on_without_the_network(sample, tmp_path):
    """The prompt itself is then the parameter."""
    randomize(adapt(LIBS[1], sample)).save_pretrained(tmp_path)
    model = randomize(adapt(graft, sample))
    graft.set_peft_model_state_dict(model, load_file(tmp_path / WEIGHTS))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["prompt_encoder.default.embedding.weight"]
    weight = added(model)["prompt_encoder.default.embedding.weight"]
    forward(model, batch(sample))["loss"].backward()
    assert weight.grad.abs().max() > 0
    before = seen(model, sample)
    with torch.no_grad():
        weight -= weight.grad
    assert not torch.equal(seen(model, sample)["left loss"], before["left loss"])
    model.set_adapter("default", inference_mode=True)
    assert not weight.requires_grad


# what does not fit


def damaged(tensors, way):
    """A file's tensors with one thing wrong, and what an error must name."""
    if way == "shape":
        return {**tensors, "prompt_embeddings": tensors["prompt_embeddings"][:-1].contiguous()}, "prompt_embeddings"
    if way == "missing":
        return {k: v for k, v in tensors.items() if k != "prompt_embeddings"}, "prompt_embeddings"
    return {**tensors, "prompt_embedding": torch.zeros(2)}, "prompt_embedding"


WAYS = pytest.mark.parametrize("way", ["shape", "missing", "unexpected"])
FILES = ONE_OF_EACH + NETWORKS + each("bert-seq", methods=EMBEDS)


@pytest.mark.graft_only
@WAYS
@pytest.mark.parametrize("sample", FILES, ids=str)
def test_files_that_do_not_fit(sample, way, tmp_path):
    """PEFT ignores keys it does not know. The model is as it was, whichever way they were to come in."""
    randomize(adapt(LIBS[1], sample)).save_pretrained(tmp_path)
    wrong, name = damaged(load_file(tmp_path / WEIGHTS), way)
    model = randomize(adapt(graft, sample), 0.4)
    before, parameters = seen(model, sample), {n: p.detach().clone() for n, p in added(model).items()}
    modules = {n: type(m) for n, m in model.named_modules()}
    state = graft.set_peft_model_state_dict
    save_file(wrong, tmp_path / WEIGHTS)
    for call in (
        lambda: model.load_adapter(tmp_path, "default"),
        lambda: model.load_adapter(tmp_path, "new"),
        lambda: state(model, wrong, strict=True),
    ):
        failed = outcome(call)
        assert isinstance(failed.error, graft.AdapterKeyError) and name in str(failed.error)
        assert list(model.peft_config) == list(model.prompt_encoder) == ["default"]
        assert {n: type(m) for n, m in model.named_modules()} == modules
        # what CPT has projected may be rounded once more when it is projected again
        close_dicts(added(model), parameters, 1e-7 if sample.method == "CPT" else 0)
    close_dicts(seen(model, sample), before)

    base = make(sample.model)
    failed = outcome(lambda: graft.PeftModel.from_pretrained(base, tmp_path))
    assert isinstance(failed.error, graft.AdapterKeyError)
    assert {n: type(m) for n, m in base.named_modules()} == {n: type(m) for n, m in make(sample.model).named_modules()}
    assert not any(m._forward_pre_hooks for m in base.modules())


@pytest.mark.graft_only
@pytest.mark.parametrize("sample", each("bert-seq", methods=EMBEDS), ids=str)
def test_heads_that_are_missing(sample, tmp_path):
    randomize(adapt(LIBS[1], sample)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if k != "base_model.classifier.bias"}, tmp_path / WEIGHTS)
    failed = outcome(lambda: load(graft, sample, tmp_path))
    assert isinstance(failed.error, graft.AdapterKeyError)
    assert "base_model.classifier.modules_to_save.default.bias" in str(failed.error)
    lenient = outcome(lambda: load(graft, sample, tmp_path, strict=False))
    assert lenient.error is None and lenient.warned("missing adapter keys")
    close(
        added(lenient.value)["base_model.classifier.modules_to_save.default.weight"],
        tensors["base_model.classifier.weight"],
        0,
    )


@pytest.mark.graft_only
@WAYS
@pytest.mark.parametrize("sample", ONE_OF_EACH, ids=str)
def test_what_fits_is_loaded_if_asked(sample, way, tmp_path):
    randomize(adapt(LIBS[1], sample)).save_pretrained(tmp_path)
    sound = load_file(tmp_path / WEIGHTS)
    wrong, name = damaged(sound, way)
    save_file(wrong, tmp_path / WEIGHTS)
    model = adapt(graft, sample)
    result = outcome(lambda: model.load_adapter(tmp_path, "b", strict=False, ignore_mismatched_sizes=True))
    assert result.error is None and result.warned(name)
    report = result.value
    name = name if way == "unexpected" else f"prompt_encoder.b.{name}"
    left = {"shape": report.mismatched_keys, "missing": report.missing_keys, "unexpected": report.unexpected_keys}
    assert left.pop(way) == [name] and not any(left.values())
    loaded = graft.get_peft_model_state_dict(model, adapter_name="b")
    assert torch.equal(loaded["prompt_embeddings"], sound["prompt_embeddings"]) == (way == "unexpected")
