# SPDX-License-Identifier: Apache-2.0
"""SHADOW: its blocks, its network and its loss are PEFT's; what follows in mixed batches, generation and files."""

import copy
import pickle
from functools import partial
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, LlamaConfig, LlamaForSequenceClassification, MambaConfig, MambaForCausalLM

import graft
from graft.core.rows import CACHES, list_forward_arguments
from graft.methods.shadow.detached import classification, no_cache_for
from tests import models
from tests.leaves_out import OWN_CACHES, WHOLE_GRAPHS
from tests.pair import LIBS, close, close_dicts, randomize, shapes, trainable
from tests.raised import refuses
from tests.samples import Sample

X = models.inputs("llama")
IDS = X["input_ids"]
ROWS = ["b", "__base__", "default"]
CONFIGS = {
    "plain": {},
    "narrow": dict(shadow_hidden_size=16, shadow_num_attention_heads=2, shadow_intermediate_size=20),
    "deep": dict(shadow_num_hidden_layers=2, update_hidden_size=5, r=3, shadow_alpha=0.37),
    "own words": dict(share_embeddings=False, init_weights=False, auxiliary_loss_weight=0.3),
    "some blocks": dict(target_modules=["layers.1"]),
    "range": dict(target_modules=["layers.0", "layers.1"], layers_to_transform=1, layers_pattern="model"),
}
CELLS = [(config, "llama") for config in CONFIGS if config != "range"]
CELLS += [("plain", name) for name in ("gpt2", "opt", "neox", "gemma3")]


def with_shadow(lib=graft, name="llama", adapter="default", base=None, **options):
    base = models.make(name) if base is None else base
    models.seed(1)
    return lib.get_peft_model(base, lib.ShadowConfig(**{"task_type": "CAUSAL_LM"} | options), adapter)


def moved(model, name="llama"):
    """Every value of the adapters away from where it starts; nothing is dropped."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return randomize(model, Sample("SHADOW", "", name, {})).eval()


def two(**options):
    model = with_shadow(**options)
    model.add_adapter("b", graft.ShadowConfig(task_type="CAUSAL_LM"))
    return moved(model)


def classifier(labels=3, kind=None):
    config = LlamaConfig(
        vocab_size=41, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.25, pad_token_id=0, num_labels=labels, problem_type=kind,
    )  # fmt: skip
    with models.seeded(0):
        return LlamaForSequenceClassification(config).eval()


@pytest.mark.parametrize("config, name", CELLS, ids=str)
def test_it_is_that_of_peft(config, name):
    """Names, initial values, outputs, losses and gradients."""
    made = [with_shadow(lib, name, **CONFIGS[config]) for lib in LIBS]
    ours, theirs = made
    close_dicts(dict(ours.state_dict()), dict(theirs.state_dict()), 0)
    assert shapes(ours) == shapes(theirs) and trainable(ours) == trainable(theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert ours.peft_config["default"].target_modules == theirs.peft_config["default"].target_modules
    found, inputs = [], models.inputs(name)
    for lib, model in zip(LIBS, made):
        moved(model, name).train()
        close_dicts(lib.get_peft_model_state_dict(model), graft.get_peft_model_state_dict(ours), 0)
        output = model(**inputs, labels=inputs["input_ids"])
        output.loss.backward()
        close(model.base_model.last_shadow_loss, output.shadow_loss)
        found.append((output, {n: p.grad for n, p in model.named_parameters()}))
    (a, ours_grads), (b, theirs_grads) = found
    for key in ("logits", "loss", "shadow_loss"):
        close(getattr(a, key), getattr(b, key))
    close_dicts(ours_grads, theirs_grads)


@pytest.mark.parametrize("labels, kind", [(3, None), (1, None), (3, "multi_label_classification")])
def test_classification_is_that_of_peft(labels, kind, tmp_path):
    ids = IDS.clone()
    ids[0, -2:] = 0
    wanted = {(3, None): torch.tensor([0, 2, 1]), (1, None): torch.tensor([0.3, 0.1, 0.9])}
    y = wanted.get((labels, kind), torch.eye(3))
    found = []
    for lib in LIBS:
        model = moved(with_shadow(lib, base=classifier(labels, kind), task_type="SEQ_CLS"))
        output = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=y)
        output.loss.backward()
        found.append((output, {n: p.grad for n, p in model.named_parameters()}, lib.get_peft_model_state_dict(model)))
        model.save_pretrained(tmp_path / lib.__name__)
    close(found[0][0].loss, found[1][0].loss)
    close(found[0][0].shadow_loss, found[1][0].shadow_loss)
    close_dicts(found[0][1], found[1][1])
    close_dicts(found[0][2], found[1][2], 0)
    for source in LIBS:
        loaded = graft.PeftModel.from_pretrained(classifier(labels, kind), tmp_path / source.__name__)
        close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(graft.ConfigError, match="one adapter only for SEQ_CLS"):
        loaded.add_adapter("b", graft.ShadowConfig(task_type="SEQ_CLS"))


def test_classification_needs_a_head():
    base = models.make("llama")
    base.lm_head.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in base.named_parameters()}
    cfg = graft.ShadowConfig(task_type="SEQ_CLS")
    text = "LlamaForCausalLM has no 'score' or 'classifier'.*AutoModelForSequenceClassification"
    refuses(graft.ConfigError, text, graft.get_peft_model, base, cfg)
    assert {n: p.requires_grad for n, p in base.named_parameters()} == flags


@pytest.mark.parametrize(
    "kind, width, labels, loss",
    [
        (None, 1, torch.tensor([0.3, 1.0]), nn.MSELoss()),
        ("regression", 2, torch.eye(2).long(), nn.MSELoss()),
        (None, 2, torch.eye(2), nn.BCEWithLogitsLoss()),
        ("multi_label_classification", 2, torch.eye(2).long(), nn.BCEWithLogitsLoss()),
        (None, 2, torch.tensor([1, 0]), nn.CrossEntropyLoss()),
    ],
)
def test_the_loss_follows_from_the_kind_of_problem_and_the_labels(kind, width, labels, loss):
    logits = torch.tensor([[0.5, -1.0], [2.0, 0.25]])[:, :width].half()
    found = classification(SimpleNamespace(problem_type=kind), logits, labels)
    wanted = labels if isinstance(loss, nn.CrossEntropyLoss) else labels.float()
    assert torch.equal(found, loss(logits.float().squeeze(), wanted)) and found.dtype == torch.float32


@pytest.mark.parametrize("source, target", [LIBS, LIBS[::-1], (graft, graft)], ids=lambda lib: lib.__name__)
def test_files(source, target, tmp_path):
    model = moved(with_shadow(source))
    model.save_pretrained(tmp_path)
    for name in ("default", "other"):
        loaded = target.PeftModel.from_pretrained(models.make("llama"), tmp_path, adapter_name=name).eval()
        close(loaded(**X).logits, model(**X).logits)


@pytest.mark.differs("SHADOW: `low_cpu_mem_usage=True` on loading")
def test_loading_beside_another_and_without_memory(tmp_path):
    """PEFT cannot load it with low_cpu_mem_usage."""
    model = two()
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(models.make("llama"), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path / "b", "b")
    for name in ("b", "default"):
        model.set_adapter(name), loaded.set_adapter(name)
        close(loaded(**X).logits, model(**X).logits)
    with pytest.raises(NotImplementedError):
        peft.PeftModel.from_pretrained(models.make("llama"), tmp_path, low_cpu_mem_usage=True)


def test_a_fresh_adapter_and_a_disabled_one_change_nothing():
    base, model = models.make("llama"), with_shadow()
    assert torch.equal(model(**X).logits, base(**X).logits)
    moved(model)
    assert not torch.allclose(model(**X).logits, base(**X).logits, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(model(**X).logits, base(**X).logits)


def test_hidden_states_are_pefts():
    ours, theirs = (moved(with_shadow(lib))(**X, output_hidden_states=True) for lib in LIBS)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        close(a, b)


# mixed batches


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_the_loss_of_a_mixed_batch_is_of_the_rows_of_each(task):
    """The shadow loss of an adapter is what it has alone on its rows, whatever rows others have."""
    tokens = task == "CAUSAL_LM"
    base = models.make("llama") if tokens else LlamaForSequenceClassification(models.make("llama").config)
    model = with_shadow(base=base, task_type=task)
    if tokens:  # the other task takes one adapter
        model.add_adapter("b", graft.ShadowConfig(task_type=task))
    moved(model).train()
    labels, names = (IDS, ["b", "default", "b"]) if tokens else (torch.tensor([0, 1, 0]), ["default", "__base__"] * 2)
    names = names[: len(labels)]

    def own(output, labels):
        y = output.logits
        y, labels = (y[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) if tokens else (y, labels)
        return output.loss - nn.functional.cross_entropy(y, labels)

    found, expected = own(model(**X, labels=labels, adapter_names=names), labels), 0.0
    for name in {*names} - {"__base__"}:
        rows = [i for i, n in enumerate(names) if n == name]
        model.set_adapter(name)
        expected += own(model(**{k: v[rows] for k, v in X.items()}, labels=labels[rows]), labels[rows])
    close(found, expected, 1e-5)


# generation


@pytest.mark.differs("SHADOW: `generate` with a cache, under transformers 5.24")
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_a_cache_is_that_without(beams):
    """PEFT's differs, under transformers 5.24."""
    whole = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False, num_beams=beams)
    ours, theirs = (moved(with_shadow(lib)) for lib in LIBS)
    plain = ours.generate(**whole, use_cache=False)
    assert torch.equal(ours.generate(**whole), plain)
    assert torch.equal(theirs.generate(**whole, use_cache=False), plain)


@pytest.mark.differs("SHADOW: a cache that holds tokens which only the base model has seen")
@torch.no_grad()
def test_a_cache_goes_on_by_hand():
    model = moved(with_shadow())
    whole = model(input_ids=IDS).logits
    first = model(input_ids=IDS[:, :4])
    kept = pickle.loads(pickle.dumps(copy.deepcopy(first.past_key_values)))
    close(model(input_ids=IDS[:, 4:], past_key_values=first.past_key_values).logits, whole[:, 4:])
    order = torch.tensor([2, 0, 1])
    kept.reorder_cache(order)
    kept.crop(-1)
    assert kept.get_seq_length() == 3
    close(model(input_ids=IDS[order, 3:], past_key_values=kept).logits, whole[order, 3:])
    plain = DynamicCache()
    model(input_ids=IDS[:, :4], past_key_values=plain)
    with pytest.raises(ValueError, match="tokens that the shadow network has not seen"):
        model(input_ids=IDS[:, 4:], past_key_values=plain)
    cache = model(input_ids=IDS[:, :4]).past_key_values
    by_place = [cache if name in CACHES else None for name in list_forward_arguments(model.get_base_model())]
    with pytest.raises(ValueError, match="Pass past_key_values by its name"):
        model.base_model(IDS[:, 4:], *by_place[1 : by_place.index(cache) + 1])


@pytest.mark.differs("SHADOW: a call of the model inside, past the PeftModel")
def test_other_ways_to_call():
    model = moved(with_shadow())
    expected = model(**X, labels=IDS)
    embeds = model.get_input_embeddings()(IDS)
    close(model(inputs_embeds=embeds, attention_mask=X["attention_mask"]).logits, expected.logits)
    close(model(IDS, X["attention_mask"]).logits, expected.logits)
    close(model(**X, labels=IDS, return_dict=False)[0], expected.loss)
    close(model.base_model(**X).logits, expected.logits)
    refuses(graft.core.errors.RoutingError, r"has no state to read. Call the PeftModel", model.get_base_model(), **X)


# training


class Checkpointed(nn.Module):
    """A block that is checkpointed as a whole, adapter and all, as models with code of their own do it."""

    def __init__(self, block, reentrant):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, h, **kwargs):
        return checkpoint(partial(self.block, **kwargs), h, use_reentrant=self.reentrant)


@pytest.mark.parametrize("rows", [None, ROWS], ids=["", "mixed"])
def test_blocks_that_are_checkpointed_around_the_adapter(rows):
    def grads(wrap):
        model = two()
        model.set_requires_grad(["default", "b"])
        stack = model.get_base_model().model.layers
        for i, block in enumerate(stack):
            stack[i] = wrap(block)
        model.get_base_model().enable_input_require_grads()
        more = {} if rows is None else {"adapter_names": rows}
        model.train()(**X, labels=IDS, use_cache=False, **more).loss.backward()
        return {n.replace(".block", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}

    close_dicts(grads(lambda block: Checkpointed(block, False)), grads(lambda block: block))
    refuses(NotImplementedError, "Pass use_reentrant=False", grads, lambda block: Checkpointed(block, True))


def test_dtypes_in_half_precision_are_pefts():
    """Blocks train in float32, the network has the base's dtype."""
    ours, theirs = (with_shadow(lib, base=models.make("llama").bfloat16()) for lib in LIBS)
    assert shapes(ours) == shapes(theirs)
    exact = moved(with_shadow())(**X).logits
    assert (moved(ours)(**X).logits - exact).norm() < 0.02 * exact.norm()


@WHOLE_GRAPHS
@pytest.mark.slow
def test_it_compiles_without_a_break():
    torch._dynamo.reset()
    model = moved(with_shadow())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        close(compiled(**X, use_cache=False).logits, model(**X).logits)
    torch._dynamo.reset()


# the life of an adapter


@pytest.mark.differs("SHADOW: `unmerge_adapter`")
def test_one_is_active_and_none_is_merged():
    model = two()
    for lib in LIBS:
        refuses(NotImplementedError, None, with_shadow(lib).merge_adapter)
    refuses(ValueError, "exactly one active adapter at a time", model.base_model.set_adapter, ["default", "b"])
    with pytest.raises(ValueError, match="`inject_adapter_in_model` does not support"):
        graft.inject_adapter_in_model(graft.ShadowConfig(), models.make("llama"))
    model.set_adapter("b")
    assert all(".b." in name for name in trainable(model))
    model.delete_adapter("default")
    assert not any(".default." in name for name in model.state_dict())
    assert torch.equal(model.unload()(**X).logits, models.make("llama")(**X).logits)


@pytest.mark.differs("SHADOW: `unload_shadow`, saved and named in `shadow_model`")
@pytest.mark.parametrize("sizes", ["plain", "narrow"])
def test_the_network_by_itself(sizes, tmp_path):
    """PEFT writes such a model, too, and reads random values from the file."""
    pair = [moved(with_shadow(lib, **CONFIGS[sizes])) for lib in LIBS]
    ours, theirs = (m.base_model.unload_shadow() for m in pair)
    close(ours(**X).logits, theirs(**X).logits)
    assert ours.state_dict().keys() - theirs.state_dict().keys() <= {"backbone.embed_tokens.weight"}
    apart = pair[0].base_model.unload_shadow(copy=True).eval()
    close(apart(**X).logits, ours(**X).logits)
    assert not {p.data_ptr() for p in apart.parameters()} & {p.data_ptr() for p in pair[0].parameters()}
    close(apart(**X, labels=IDS).loss, pair[0](**X, labels=IDS).shadow_loss)
    options = dict(max_new_tokens=3, do_sample=False)
    assert torch.equal(apart.generate(**X, **options), apart.generate(**X, **options, use_cache=False))
    assert torch.equal(pickle.loads(pickle.dumps(apart))(**X).logits, apart(**X).logits)
    for number, model in enumerate((apart, pair[1].base_model.unload_shadow(copy=True))):
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        again = with_shadow(shadow_model=str(folder)).eval()
        close(again.base_model.unload_shadow()(**X).logits, ours(**X).logits)
        assert not any(p.requires_grad for p in again.base_model.shadow_backbone["default"].embed_tokens.parameters())


def test_a_network_from_a_folder(tmp_path):
    """Any backbone, with a projection that is new."""
    models.make("gpt2").transformer.save_pretrained(tmp_path)
    pair = [with_shadow(lib, shadow_model=str(tmp_path)) for lib in LIBS]
    close_dicts(dict(pair[0].state_dict()), dict(pair[1].state_dict()), 0)
    assert trainable(pair[0]) == trainable(pair[1])
    close(*(moved(m)(**X).logits for m in pair))


@pytest.mark.differs("SHADOW: r ≤ 0, sizes ≤ 0")
@pytest.mark.parametrize("options", [dict(shadow_model="a/b", shadow_hidden_size=8), dict(layers_pattern="layers")])
def test_bad_configs(options):
    for lib in LIBS:
        refuses(ValueError, None, lib.ShadowConfig, **options)
    refuses(graft.ConfigError, "should be a positive integer", graft.ShadowConfig, r=0)


@pytest.mark.differs("SHADOW: diffusion transformers")
def test_models_without_blocks():
    for name in ("mlp", "t5"):
        before = models.make(name)
        with pytest.raises((AttributeError, graft.ConfigError), match=r"blocks|hidden_size"):
            graft.get_peft_model(before, graft.ShadowConfig())
        assert before.state_dict().keys() == models.make(name).state_dict().keys()


def test_models_whose_network_would_have_their_head():
    """Where no stack of blocks is found, the network would be like the whole model."""
    sizes = dict(vocab_size=41, d_model=16, n_layer=2, n_head=2, d_inner=24)
    base = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**sizes))
    before = list(base.state_dict())
    with pytest.raises(graft.ConfigError, match="finds no stack of blocks in a XLNetLMHeadModel to build"):
        with_shadow(base=base, target_modules=["transformer.layer.0"])
    assert list(base.state_dict()) == before


HYBRID = dict(
    vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=2, pad_token_id=0,
)  # fmt: skip
STATES = dict(mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1)
NO_CACHE = {  # the first layer, of which the network is a copy, keeps a state and no keys; or the cache is another
    "Jamba": dict(num_experts=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
                  use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4),
    "Bamba": STATES | dict(attn_layer_indices=[1]),
    "GraniteMoeHybrid": STATES | dict(num_local_experts=2, num_experts_per_tok=1, shared_intermediate_size=12,
                                      layer_types=["mamba", "attention"] * 2),
    "Lfm2": dict(layer_types=["conv", "full_attention"] * 2),
    "MiniMax": dict(num_local_experts=2, num_experts_per_tok=1, head_dim=8,
                    layer_types=["linear_attention", "full_attention"] * 2),
}  # fmt: skip
OWN = ("Jamba", "Bamba", "GraniteMoeHybrid")  # these make caches of their own under transformers 4


@pytest.mark.filterwarnings("ignore:.*fast path is not available")
@pytest.mark.parametrize("family", [pytest.param(f, marks=OWN_CACHES if f in OWN else ()) for f in NO_CACHE])
def test_a_network_that_cannot_run_with_a_cache(family):
    """Its generation is refused before the first call, and works without a cache."""
    config = getattr(transformers, f"{family}Config")(**HYBRID | NO_CACHE[family])
    with models.seeded(0):
        base = getattr(transformers, f"{family}ForCausalLM")(config)
    model = with_shadow(base=base)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert any(p.grad is not None and p.grad.any() for p in trained)
    model.eval()
    greedy = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
    for call in (lambda: model.generate(**greedy), lambda: model(input_ids=IDS, use_cache=True)):
        refuses(NotImplementedError, r"adapter 'default' cannot run with a cache: .*use_cache=False", call)
    plain = model.generate(**greedy, use_cache=False)
    deep = with_shadow(base=model.unload(), shadow_num_hidden_layers=2).eval()
    if deep.base_model.model._supports_default_dynamic_cache():
        assert torch.equal(deep.generate(**greedy), plain)


SEQ2SEQ = dict(
    vocab_size=41, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=40,
)  # fmt: skip


def test_decoders_of_encoder_decoders():
    base = transformers.BartForConditionalGeneration(transformers.BartConfig(**SEQ2SEQ))
    model, greedy = with_shadow(base=base).eval(), dict(input_ids=IDS, max_new_tokens=3, do_sample=False)
    refuses(NotImplementedError, r"the decoder of an encoder-decoder.*Pass use_cache=False", model.generate, **greedy)
    model.generate(**greedy, use_cache=False)
    config = transformers.BartConfig(**SEQ2SEQ, is_decoder=True, is_encoder_decoder=False)
    model = moved(with_shadow(base=transformers.BartForCausalLM(config)))
    assert torch.equal(model.generate(**greedy), model.generate(**greedy, use_cache=False))


def test_layers_that_are_no_blocks_are_refused_before_anything_changes():
    before = models.make("llama")
    for targets in ("all-linear", ["down_proj"]):
        with pytest.raises(
            graft.UnsupportedLayerError, match=r"_proj \(Linear\).* blocks do: leave target_modules out"
        ):
            graft.get_peft_model(before, graft.ShadowConfig(target_modules=targets))
    assert before.state_dict().keys() == models.make("llama").state_dict().keys()


def test_a_base_whose_config_counts_its_layers_in_a_property():
    """Mamba's `layer_types` follow from the number of layers, and cannot be set."""
    sizes = dict(vocab_size=41, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4)
    model = graft.get_peft_model(MambaForCausalLM(MambaConfig(**sizes)), graft.ShadowConfig(task_type="CAUSAL_LM"))
    assert len(model.base_model.shadow_backbone["default"].layers) == 1
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_network_with_attention_has_a_cache_next_to_a_model_without_a_config():
    assert no_cache_for(SimpleNamespace(config=models.make("llama").config), nn.Linear(2, 2)) is None
