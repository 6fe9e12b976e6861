# SPDX-License-Identifier: Apache-2.0
"""An adapter on one of two modules that share a weight changes that one alone, merged or not."""

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import graft
from graft.inject.survey import get_site, survey_model
from graft.inject.targets import find_tied_modules, find_weight
from tests import models
from tests.looks import layers
from tests.models import adapted, disturb, seeded

IDS = torch.tensor([[1, 2, 5], [4, 4, 0]])


class Tied(nn.Module):
    """An embedding and a head on its weight."""

    def __init__(self):
        super().__init__()
        self.emb, self.lin, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.lin(self.emb(ids))))


CONFIGS = {
    "LORA": dict(r=2, lora_alpha=6),
    "LOHA": dict(r=2),
    "HRA": dict(r=2),
    "OFT": dict(oft_block_size=2),
    "VERA": dict(r=3),
    "IA3": dict(feedforward_modules=[]),
}


def with_two(method, targets):
    config = graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](target_modules=targets, **CONFIGS[method])
    with seeded(0):
        return adapted(Tied(), dict.fromkeys(["default", "b"], config))


def parts(model):
    net = model.get_base_model()
    bare = [getattr(m, "base_layer", m) for m in (net.emb, net.head)]
    return (*bare, net)


def tied(model):
    emb, head, _ = parts(model)
    return emb.weight is head.weight


@pytest.mark.differs("merging an adapter on a tied embedding")
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("targets", [["emb"], ["head"], ["emb", "head"]], ids=str)
def test_merging_leaves_the_other_one(method, targets):
    model = with_two(method, targets)
    emb, head, _ = parts(model)
    weight, before, expected = emb.weight, emb.weight.clone(), model(IDS)
    assert tied(model)
    model.merge_adapter()
    assert not tied(model)
    assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)
    left = [m for name, m in (("emb", emb), ("head", head)) if name not in targets]
    assert all(m.weight is weight for m in left) and torch.equal(weight, before)
    model.unmerge_adapter()
    assert tied(model) and emb.weight is weight and torch.equal(weight, before)
    assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize("method", ["LORA", "HRA"])
def test_merging_in_steps_and_unmerging_ties_again(method):
    model = with_two(method, ["emb"])
    emb, _, _ = parts(model)
    weight, before = emb.weight, emb.weight.clone()
    model.merge_adapter(["default"])
    model.merge_adapter(["b"])
    model.unmerge_adapter()
    assert tied(model) and emb.weight is weight and torch.equal(weight, before)


def test_a_failed_merge_leaves_them_tied():
    model = with_two("LORA", ["emb", "head"])
    with torch.no_grad():
        layers(model)["head"].lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert tied(model)


def test_a_merged_model_stays_whole_when_it_moves_or_is_copied():
    model = with_two("LORA", ["emb"])
    expected = model(IDS)
    model.merge_adapter()
    other = copy.deepcopy(model).double()
    other.unmerge_adapter()
    assert tied(other)
    assert_close(other(IDS).float(), expected, rtol=1e-5, atol=1e-5)
    assert not tied(model)


def test_unloading_a_merged_transformer_says_that_it_is_no_longer_tied():
    base = models.make("gpt2")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    assert base.lm_head.weight is base.transformer.wte.weight
    with seeded(0):
        model = graft.get_peft_model(base, graft.LoraConfig(target_modules=["wte"], r=2, task_type="CAUSAL_LM"))
    disturb(model)
    batch = models.inputs("gpt2")
    expected = models.output(model, batch)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        plain = model.merge_and_unload()
    assert plain.config.tie_word_embeddings is False
    assert_close(models.output(plain, batch), expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_was_not_merged_stays_tied():
    base = models.make("gpt2")
    base.tie_weights()
    model = graft.get_peft_model(base, graft.LoraConfig(target_modules=["wte"], r=2))
    plain = model.unload()
    assert plain.config.tie_word_embeddings and plain.lm_head.weight is plain.transformer.wte.weight


# a partner that carries something already

CARRIED = {
    "adapter": lambda other: dict(target_modules=[other]),
    "trained whole": lambda other: dict(target_modules=["lin"], modules_to_save=[other]),
    "rows": lambda other: dict(target_modules=["lin"], trainable_token_indices={other: [4]}),
}


def beside(carried, other, target, merged=False):
    """A model in which `other` carries something of "default" and `target` an adapter "b", added later."""
    with seeded(0):
        model = graft.get_peft_model(Tied(), graft.LoraConfig(r=2, **CARRIED[carried](other)))
        disturb(model)
        if merged:
            model.merge_adapter()
        model.add_adapter("b", graft.LoraConfig(r=2, target_modules=[target]))
    return disturb(model).eval()


@pytest.mark.parametrize("other, target", [("head", "emb"), ("emb", "head")])
@pytest.mark.parametrize("carried", CARRIED)
def test_merging_beside_a_partner_that_carries_something(carried, other, target):
    model = beside(carried, other, target)
    for name in ("b", "default"):
        model.set_adapter(name)
        expected = model(IDS)
        model.merge_adapter()
        assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)
    model.set_adapter("b")
    expected = model(IDS)
    assert_close(model.merge_and_unload()(IDS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("carried", ["adapter", "rows"])
def test_a_partner_that_was_merged_when_the_adapter_came(carried):
    """It has a weight of its own then, and shares the old one again afterwards."""
    model = beside(carried, "head", "emb", merged=True)
    layer = layers(model)["emb"]
    weight, before = layer.base_layer.weight, layer.base_layer.weight.clone()
    assert layer.site.shared
    model.merge_adapter(["b"])
    assert layer.base_layer.weight is not weight and torch.equal(weight, before)
    model.unmerge_adapter()
    assert layer.base_layer.weight is find_weight(model.get_base_model().head) is weight and torch.equal(weight, before)


def test_a_model_whose_head_is_merged_is_still_seen_as_tied():
    model = graft.get_peft_model(llm(), graft.LoraConfig(target_modules=["lm_head"], r=2))
    disturb(model)
    model.merge_adapter()
    model.add_adapter("rows", graft.LoraConfig(target_modules=["c_attn"], r=2))
    with pytest.raises(graft.UnsupportedLayerError, match=r"lm_head.*follows 'transformer.wte'.*'default'"):
        model.add_adapter("b", graft.LoraConfig(target_modules=["c_attn"], r=2, trainable_token_indices=[1]))


# token rows of an embedding and of the head on its weight

ROWS = {
    "head after both": ([1, 5], {"lm_head": [4]}),
    "both after head": ({"lm_head": [4]}, [1, 5]),
    "both after each": ({"wte": [2], "lm_head": [4]}, [1, 5]),
    "each after both": ([1, 5], {"wte": [2], "lm_head": [4]}),
}


def llm():
    base = models.make("gpt2")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    return base


def with_rows(indices, name, model=None):
    config = graft.LoraConfig(target_modules=["c_attn"], r=2, trainable_token_indices=indices)
    if model is None:
        return graft.get_peft_model(llm(), config, name)
    model.add_adapter(name, config)
    return model


@pytest.mark.differs("which token rows of a tied head are its own")
@pytest.mark.parametrize("case", ROWS)
def test_rows_that_follow_the_embedding_in_one_adapter_only(case, tmp_path):
    """Which rows of the head are its own, and saved, differs from adapter to adapter."""
    model = with_rows(ROWS[case][1], "second", with_rows(ROWS[case][0], "first"))
    batch = models.inputs("gpt2")
    disturb(model).eval().save_pretrained(tmp_path)
    for name, indices in zip(("first", "second"), ROWS[case]):
        own = {"wte", "lm_head"}.intersection(indices) or {"wte"}
        saved = {k.split(".")[-3] for k in graft.load_peft_weights(tmp_path / name) if "token_adapter" in k}
        assert saved == own
        model.set_adapter(name)
        expected = models.output(model, batch)
        fresh = graft.PeftModel.from_pretrained(llm(), tmp_path / name, name)
        assert torch.equal(models.output(fresh, batch), expected)
        for wrapper in (model.get_base_model().lm_head, model.get_base_model().transformer.wte):
            mapped = wrapper.adapter_state_dict_load_map(name) if name in wrapper.adapters else {}
            assert bool(mapped) == (wrapper.key.split(".")[-1] in own)
    for first, second in (("first", "second"), ("second", "first")):
        loaded = graft.PeftModel.from_pretrained(llm(), tmp_path / first, first)
        loaded.load_adapter(tmp_path / second, second)
        for name in (first, second):
            loaded.set_adapter(name)
            model.set_adapter(name)
            assert torch.equal(models.output(loaded, batch), models.output(model, batch))


# what cannot stand on one module, or on two that share a weight

TOKENS, WHOLE = dict(target_modules=["c_attn"], trainable_token_indices=[1, 5]), lambda m: dict(modules_to_save=[m])
ON_HEAD, ON_WORDS = dict(target_modules=["lm_head"]), dict(target_modules=["wte"])
TYING = dict(ensure_weight_tying=True)

CLASHES = {
    "adapter after rows": (TOKENS, ON_WORDS, "transformer.wte.*trained in single rows.*'default'"),
    "adapter after rows that follow": (TOKENS, ON_HEAD, "lm_head.*trained in single rows.*'default'"),
    "rows after adapter": (ON_WORDS, TOKENS, "'transformer.wte': it carries.*'default'.*another model"),
    "rows that follow after adapter": (ON_HEAD, TOKENS, "'lm_head', which follows 'transformer.wte'.*'default'"),
    "whole after rows": (TOKENS, WHOLE("wte"), "transformer.wte.*trained in single rows.*'default'"),
    "whole after rows that follow": (TOKENS, WHOLE("lm_head"), "lm_head.*trained in single rows.*'default'"),
    "rows after whole": (WHOLE("wte"), TOKENS, "'transformer.wte': it is already trained whole.*'default'"),
    "rows that follow after whole": (WHOLE("lm_head"), TOKENS, "'lm_head', which follows.*trained whole.*'default'"),
    "adapters that follow after whole": (WHOLE("lm_head"), ON_WORDS | TYING, "lm_head.*trained whole.*'default'"),
    "whole that follows after adapter": (ON_HEAD, WHOLE("wte") | TYING, "lm_head.*carries adapter.*'default'"),
    "whole that follows after rows": (TOKENS, WHOLE("wte") | TYING, "wte.*trained in single rows.*'default'"),
    "whole after adapter": (ON_HEAD, WHOLE("lm_head"), "lm_head.*carries adapter.*'default'"),
}


@pytest.mark.differs(
    "token rows, an adapter and `modules_to_save` on one module, or on two of one weight that go together"
)
@pytest.mark.parametrize("case", CLASHES)
def test_what_is_refused_beside_another_adapter(case):
    first, second, text = CLASHES[case]
    model = graft.get_peft_model(llm(), graft.LoraConfig(**{"target_modules": ["c_attn"], "r": 2} | first))
    before = {k: v.clone() for k, v in disturb(model).eval().state_dict().items()}
    kinds = {k: type(m) for k, m in model.named_modules()}
    expected = models.output(model, models.inputs("gpt2"))
    with pytest.raises(graft.UnsupportedLayerError, match=text) as raised:
        model.add_adapter("b", graft.LoraConfig(**{"target_modules": ["c_attn"], "r": 2} | second))
    assert "'b'" in str(raised.value)
    assert kinds == {k: type(m) for k, m in model.named_modules()} and list(model.peft_config) == ["default"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(models.output(model, models.inputs("gpt2")), expected)


@pytest.mark.parametrize(
    "config, error",
    [(ON_HEAD | TOKENS | ON_HEAD, graft.UnsupportedLayerError), (TOKENS | WHOLE("lm_head"), ValueError)],
    ids=["adapted", "whole"],
)
def test_rows_that_would_follow_where_the_same_adapter_does_something_else(config, error):
    """They took the place of the other without a word."""
    base = llm()
    with pytest.raises(error, match=r"'lm_head', which follows 'transformer.wte' as it shares its weight"):
        graft.get_peft_model(base, graft.LoraConfig(r=2, **config))
    assert type(base.lm_head) is nn.Linear and all(p.requires_grad for p in base.parameters())


@pytest.mark.differs("trainable tokens of a tied embedding whose head is a target too")
@pytest.mark.parametrize("name, targets", [("opt", None), ("gpt2", None), ("opt", ["embed_tokens", "lm_head"])])
def test_rows_of_a_tied_table_are_the_heads_too(name, targets, tmp_path):
    """In PEFT's files under both names. PEFT puts one layer around the other if both are targets."""
    made = {}
    for lib in (graft, peft):
        given = None if targets is not None and lib is peft else targets
        cfg = lib.TrainableTokensConfig(token_indices=[3, 1, 7], target_modules=given)
        model = lib.get_peft_model(models.make(name), cfg).eval()
        with torch.no_grad():
            (rows,) = [p for n, p in model.named_parameters() if "trainable_tokens" in n]
            rows.copy_(torch.linspace(-1, 1, rows.numel()).view(rows.shape))
        model.save_pretrained(tmp_path / lib.__name__)
        made[lib] = models.output(model, models.inputs(name))
    keys = [load_file(tmp_path / lib.__name__ / "adapter_model.safetensors").keys() for lib in (graft, peft)]
    assert keys[0] == keys[1] and any("lm_head" in key for key in keys[0]) and len(keys[0]) == 2
    torch.testing.assert_close(made[graft], made[peft])
    for writer, reader in ((graft, peft), (peft, graft), (graft, graft)):
        loaded = reader.PeftModel.from_pretrained(models.make(name), tmp_path / writer.__name__)
        torch.testing.assert_close(models.output(loaded, models.inputs(name)), made[peft])


@pytest.mark.parametrize("indices", [{"embed_tokens": [1, 5]}, {"embed_tokens": [1, 5], "lm_head": [1, 5]},
                                     {"embed_tokens": [1], "lm_head": [5]}], ids=str)  # fmt: skip
def test_rows_by_name_on_a_tied_model_are_pefts(indices):
    states = []
    for lib in (graft, peft):
        config = lib.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices)
        states.append(lib.get_peft_model_state_dict(lib.get_peft_model(models.make("opt"), config)))
    assert states[0].keys() == states[1].keys()
    assert sum("trainable_tokens" in key for key in states[0]) == len({tuple(v) for v in indices.values()})


@pytest.mark.parametrize("config", [
    dict(modules_to_save=["lm_head"]), dict(target_modules=["lm_head", "q_proj"]),
    dict(modules_to_save=["embed_tokens"]), dict(target_modules=r".*(embed_tokens|q_proj)"),
], ids=str)  # fmt: skip
def test_whatever_names_one_of_two_tied_modules(config):
    """The config says the embedding's path afterwards, in graft where PEFT makes a longer pattern as well."""
    found = []
    for lib in (graft, peft):
        values = dict(r=2, target_modules=["q_proj"], ensure_weight_tying=True) | config
        cfg = lib.LoraConfig(**values)
        model = lib.get_peft_model(models.make("opt"), cfg)
        trained = sorted(n for n, p in model.named_parameters() if p.requires_grad)
        targets = None if isinstance(cfg.target_modules, str) else cfg.target_modules
        found.append((trained, cfg.modules_to_save, targets))
    assert found[0] == found[1]


SIDE = dict(layers=1, attention_heads=2, ffn_dim=16)


def make(kind):
    if kind == "t5":
        return models.make("t5")
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIDE.items()}
    with seeded(0):
        return transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=41, d_model=16, **sides))


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("target", ["shared", "embed_tokens", "lm_head"])
def test_several_embeddings_and_a_head_follow_the_embedding(kind, target, tmp_path):
    config = graft.LoraConfig(r=2, target_modules=[target], ensure_weight_tying=True, init_lora_weights=False)
    base = make(kind)
    names = {key.rpartition(".")[2] for key, _ in base.named_modules()} & {"shared", "embed_tokens", "lm_head"}
    if target not in names:
        assert transformers.__version__.startswith("4."), "a model of today has a module of each name"
        pytest.skip("in transformers 4 the encoder's and the decoder's embedding are the module `shared` itself")
    model = graft.get_peft_model(base, config).eval()
    here = {key.rpartition(".")[2]: layer for key, layer in layers(model).items()}
    assert set(here) == names and len(here) > 1
    change = here["shared"].get_delta_weight("default")
    assert all(torch.equal(layer.get_delta_weight("default"), change) for layer in here.values())
    model.save_pretrained(tmp_path)
    again = graft.PeftModel.from_pretrained(make(kind), tmp_path).eval()
    ids = dict(input_ids=IDS, decoder_input_ids=IDS)
    assert_close(again(**ids).logits, model(**ids).logits)


def test_a_model_that_ties_and_names_no_head():
    class Names(Tied):
        config = transformers.PretrainedConfig(tie_word_embeddings=True)

        def get_input_embeddings(self):
            return self.emb

    config = graft.LoraConfig(r=2, target_modules=["head"], ensure_weight_tying=True)
    assert set(layers(graft.get_peft_model(Names(), config))) == {"emb", "head"}


def test_a_model_that_ties_and_refuses_to_name_its_embedding(tmp_path):
    """As those of sound do in transformers 4, whose configs say all the same that they tie."""

    class Refuses(Tied):
        config = transformers.PretrainedConfig(tie_word_embeddings=True)

        def get_input_embeddings(self):
            raise NotImplementedError

    model = disturb(graft.get_peft_model(Refuses(), graft.LoraConfig(r=2, target_modules=["lin"])))
    y = model(IDS)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert {key.split(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")} == {"lin"}
    assert_close(model.merge_and_unload()(IDS), y)
    with pytest.raises(graft.NoMatchingPeftModuleError, match="no input embeddings"):
        graft.get_peft_model(Refuses(), graft.BottleneckConfig(mlp_modules=["lin"], inv_adapter="nice"))


def test_an_encoder_and_a_decoder_are_tied_again_after_a_merge():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(vocab_size=40, d_model=16, d_kv=4, d_ff=20, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = graft.get_peft_model(
        T5ForConditionalGeneration(T5Config(**sizes, tie_word_embeddings=True)).eval(),
        graft.TrainableTokensConfig(target_modules=["shared"], token_indices=[0, 1, 3]),
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    batch = dict(input_ids=torch.tensor([[0, 1, 2, 3]]), decoder_input_ids=torch.tensor([[0, 1, 3]]))
    y = model(**batch).logits
    plain = model.merge_and_unload()
    weight = plain.shared.weight
    assert plain.encoder.embed_tokens.weight is plain.decoder.embed_tokens.weight is plain.lm_head.weight is weight
    torch.testing.assert_close(plain(**batch).logits, y, rtol=1e-5, atol=1e-5)


def test_a_head_with_a_weight_of_its_own_is_not_tied_by_the_config():
    class Told(Tied):
        config = SimpleNamespace(tie_word_embeddings=True)

        def get_input_embeddings(self):
            return self.emb

        def get_output_embeddings(self):
            return self.head

    net = Told()
    assert find_tied_modules(net, survey_model(net)) == ("emb", ["head"])
    net.head.weight = nn.Parameter(net.head.weight.detach().clone())
    assert find_tied_modules(net, survey_model(net)) == ("emb", [])
    assert find_tied_modules(net.to("meta"), survey_model(net)) == ("emb", ["head"])


def test_the_site_of_a_module_beneath_the_layer_of_its_parameter():
    net = nn.Sequential(nn.Linear(4, 3))
    base = net[0]
    graft.inject_adapter_in_model(graft.LoraConfig(target_parameters=["0.weight"], r=2), net)
    tree = survey_model(net)
    assert net[0] is not base and tree.nests.keys() == {"0"}
    assert get_site("0", net[0], tree).module is base
