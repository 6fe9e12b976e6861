# SPDX-License-Identifier: Apache-2.0
"""ReFT on whole models: positions, files, rows, generation, pyreft's numbers; AdapterHub's are in test_adapterhub."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import AutoModel

import graft
from graft.core.errors import ConfigError, RoutingError
from graft.many import MultiTrain
from graft.methods.reft import orthonormal
from tests.leaves_out import MASKS_WITHOUT_CACHES, STATES_OF_MAMBA
from tests.looks import layers
from tests.many.alone import Spec, alone, as_alone, rows, tiny
from tests.methods.make_reft_steering import IDS
from tests.models import STD, VOCAB, adapted, inputs, make, output, seeded, transformer
from tests.raised import refuses

FIXTURES = Path(__file__).parent / "fixtures"
ENDS = dict(r=2, prefix_positions=2, suffix_positions=1, dropout=0.0)


def with_two(name="llama", **changes):
    return adapted(make(name), dict.fromkeys(["default", "other"], graft.ReftConfig(**{**ENDS, **changes})))


def padded(ids, mask, left):
    """The same rows with two tokens of padding."""
    more = torch.zeros(len(ids), 2, dtype=ids.dtype)
    parts = (more, ids) if left else (ids, more)
    masks = (more, mask) if left else (mask, more)
    return torch.cat(parts, 1), torch.cat(masks, 1)


def test_only_the_ends_of_the_prompt_change():
    model, ids = with_two(layers=[1]), inputs("llama")["input_ids"]
    plain, y = make("llama").model(input_ids=ids)[0], model.get_base_model().model(input_ids=ids)[0]
    changed = (y - plain).abs().amax((0, 2)) > 1e-4
    assert changed.tolist() == [True, True, *[False] * (ids.shape[1] - 3), True]


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(left):
    model, ids = with_two(), inputs("llama")["input_ids"]
    mask = torch.ones_like(ids)
    wide, masks = padded(ids, mask, left)
    places = masks.cumsum(1).sub(1).clamp(min=0)
    y = model(input_ids=wide, attention_mask=masks, position_ids=places).logits
    expected = model(input_ids=ids, attention_mask=mask).logits
    assert_close(y[:, 2:] if left else y[:, :-2], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [graft.ReftConfig(**ENDS), graft.SteeringConfig(min_token_index=1)], ids=type)
@torch.no_grad()
def test_a_mask_counts_by_its_place_as_by_its_name(config):
    model, ids = adapted(make("llama"), {"default": config}, scale=1), inputs("llama")["input_ids"]
    ids, mask = padded(ids, torch.ones_like(ids), True)
    expected = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(model(ids, mask).logits, expected)
    assert torch.equal(model.base_model(ids, mask).logits, expected)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "anew"])
@pytest.mark.parametrize("rows", [None, ["other", "__base__", "default"]], ids=["", "mixed"])
@torch.no_grad()
def test_generate_changes_the_prompt_alone(cached, rows):
    model, ids = with_two(), inputs("llama")["input_ids"]
    options = {} if rows is None else dict(adapter_names=rows)
    mask = torch.ones_like(ids)
    ids, mask = padded(ids, mask, True)
    ours = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0,
        use_cache=cached, **options,
    )  # fmt: skip
    cache, new, n = None, ids, ids.shape[1]
    for _ in range(4):  # with a cache of our own: the first call has the prompt
        out = model(
            input_ids=new, attention_mask=mask, past_key_values=cache, use_cache=True,
            position_ids=mask.cumsum(1).sub(1).clamp(min=0)[:, -new.shape[1] :], **options,
        )  # fmt: skip
        cache, new = out.past_key_values, out.logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    assert ours.shape[1] == n + 4 and torch.equal(ours, ids)


def answers(ids, *lengths):
    """Labels whose prompts have these lengths."""
    return torch.stack([row.index_fill(0, torch.arange(n), -100) for row, n in zip(ids, lengths)])


def states(model, **batch):
    """What the last block gives out."""
    seen = []
    layer = layers(model)["model.layers.1"]
    handle = layer.register_forward_hook(lambda _m, _a, y: seen.append(y if torch.is_tensor(y) else y[0]))
    model(**batch)
    handle.remove()
    return seen[0]


def test_a_suffix_trains_at_the_end_of_the_prompt():
    model, ids = with_two(prefix_positions=0), inputs("llama")["input_ids"]
    model(input_ids=ids, labels=answers(ids, 4, 2, 5)).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if ".default" in n]
    assert len(grads) == 6 and all(g.abs().max() > 1e-5 for g in grads)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("rows", [None, ["other", "__base__", "default"]], ids=["", "mixed"])
@pytest.mark.parametrize("side", ["left", "right", None], ids=str)
@torch.no_grad()
def test_training_changes_the_tokens_that_generating_changes(side, rows, training):
    """The states of a prompt with its answer are those of the prompt alone, whose end generate sees."""
    model, ids, lengths = with_two().train(training), inputs("llama")["input_ids"], (4, 2, 5)
    options = {} if rows is None else dict(adapter_names=rows)
    batch = dict(input_ids=ids, labels=answers(ids, *lengths))
    if side is not None:
        wide, mask = padded(ids, torch.ones_like(ids), side == "left")
        labels, _ = padded(batch["labels"] + 100, mask, side == "left")
        places = mask.cumsum(1).sub(1).clamp(min=0)
        batch = dict(input_ids=wide, attention_mask=mask, labels=labels - 100, position_ids=places)
    first = 2 if side == "left" else 0
    both = states(model, **batch, **options)
    labels = batch.pop("labels")
    for said in (lengths, list(lengths), torch.tensor(lengths)):
        assert torch.equal(states(model, **batch, **options, reft_prompt_lengths=said), both)
        zero = torch.zeros_like(labels)
        assert torch.equal(states(model, **batch, **options, labels=zero, reft_prompt_lengths=said), both)
    for row, n in enumerate(lengths):
        alone = {} if rows is None else dict(adapter_names=rows[row : row + 1])
        expected = states(model, input_ids=ids[row : row + 1, :n], **alone)
        assert_close(both[row, first : first + n], expected[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_labels_that_tell_no_prompt_change_nothing():
    model, ids = with_two(), inputs("llama")["input_ids"]
    expected = states(model, input_ids=ids)
    for labels in (ids, torch.full_like(ids, -100), ids.index_fill(1, torch.tensor([5, 6]), -100)):
        assert torch.equal(states(model, input_ids=ids, labels=labels), expected)
    assert torch.equal(states(model, input_ids=ids, reft_prompt_lengths=99), expected)
    model, batch = adapted(make("bert-tok"), graft.ReftConfig(**ENDS)), inputs("bert-tok")  # it cannot generate
    classes = torch.full_like(batch["input_ids"], -100).index_fill(1, torch.tensor([3]), 1)
    assert torch.equal(model(**batch | {"labels": classes}).logits, model(**batch).logits)


@torch.no_grad()
def test_a_decoder_trains_at_the_tokens_from_which_it_generates():
    model, batch = with_two("t5"), inputs("t5")
    last = layers(model)["decoder.block.1"]
    seen = []
    handle = last.register_forward_hook(lambda _m, _a, y: seen.append(y if torch.is_tensor(y) else y[0]))
    start = batch.pop("decoder_input_ids")
    for n in (1, 3):
        model(**batch, decoder_input_ids=start, labels=answers(start, *[n - 1] * 3))
        model(**batch, decoder_input_ids=start, reft_prompt_lengths=n)
        model(**batch, decoder_input_ids=start[:, :n])
        trained, said, generates = seen[-3:]
        assert torch.equal(trained, said)
        assert_close(trained[:, :n], generates, rtol=1e-4, atol=1e-4)
    handle.remove()


@torch.no_grad()
def test_generate_takes_lengths_of_prompts():
    """Also for beams, which have copies of the rows."""
    model, ids = with_two(prefix_positions=0), inputs("llama")["input_ids"]
    options = dict(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0, num_beams=2)
    options |= dict(return_dict_in_generate=True, output_scores=True)
    ends = [model.generate(**options, reft_prompt_lengths=n) for n in ([4, 2, 5], ids.shape[1], [4, 2, 5])]
    assert torch.equal(ends[0].sequences, ends[2].sequences)
    assert torch.equal(ends[1].scores[0], model.generate(**options).scores[0])
    assert (ends[0].scores[0] - ends[1].scores[0]).abs().max() > 1e-4
    anew = model.generate(**options, reft_prompt_lengths=[4, 2, 5], use_cache=False)
    assert_close(ends[0].scores[0], anew.scores[0])
    assert torch.equal(ends[0].sequences, anew.sequences)


@pytest.mark.parametrize(
    "lengths, text",
    [(0, "below 1"), (1.5, "not whole"), ([1, 2], r"shape \(2,\) for 3 rows"), ("a", "a number, or one")],
    ids=str,
)
def test_lengths_that_are_none(lengths, text):
    model = with_two()
    refuses(RoutingError, f"reft_prompt_lengths .*{text}", model, **inputs("llama"), reft_prompt_lengths=lengths)


class Prompted(Spec):
    """A run whose rows have prompts of three lengths."""

    def data(self):
        samples = [
            row | {"labels": row["labels"].index_fill(0, torch.arange(1 + i % 3), -100)}
            for i, row in enumerate(rows(self.seed, self.tokens))
        ]
        return DataLoader(samples, self.batch, shuffle=True)


@MASKS_WITHOUT_CACHES
def test_runs_at_once_train_at_the_ends_of_their_prompts():
    specs = [Prompted(graft.ReftConfig(**{**ENDS, "prefix_positions": 0}), seed=i) for i in range(2)]
    runs = MultiTrain(tiny())
    for i, spec in enumerate(specs):
        runs.add(f"r{i}", spec.config, **spec.options(3))
    runs.run()
    for i, spec in enumerate(specs):
        assert as_alone(runs[f"r{i}"].parameters, alone(spec, 3)[0])


@torch.no_grad()
def test_a_decoders_prompt_ends_where_generate_goes_on():
    """With a cache or without, and with a prompt of several tokens."""
    model, base = with_two("t5"), make("t5")
    batch = {k: v for k, v in inputs("t5").items() if k != "decoder_input_ids"}
    start = torch.tensor([[0, 7, 5]] * 3)
    options = dict(batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    for more in ({}, {"decoder_input_ids": start}):
        cached, anew = (model.generate(**options, **more, use_cache=cache).logits for cache in (True, False))
        assert_close(cached, anew, rtol=1e-4, atol=1e-4)
        assert (cached[0] - base.generate(**options, **more).logits[0]).abs().max() > 1e-2


def test_orthonormal_rows_are_themselves():
    with seeded(3):
        R = orthonormal(torch.randn(3, 8))
    assert_close(R @ R.T, torch.eye(3))
    assert_close(orthonormal(R), R)


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(prefix_positions=0), "nor both 0"),
        (dict(r=0), "positive integer"),
        (dict(r=99), "Choose a smaller r than 99"),
        (dict(layers=[2]), "the model has blocks 0 to 1"),
        (dict(non_linearity="glue"), "Unknown non_linearity"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_bad_configs_change_nothing(changes, text):
    base = make("llama")
    refuses(ConfigError, text, lambda: graft.get_peft_model(base, graft.ReftConfig(**changes)))
    assert not layers_in(base) and all(p.requires_grad for p in base.parameters())


def layers_in(base):
    return [m for m in base.modules() if isinstance(m, graft.AdapterLayer)]


def test_beside_another_adapter_of_its_blocks():
    model = with_two()
    model.base_model.set_adapter(["default", "other"])
    y = output(model, inputs("llama"))
    assert y.isfinite().all() and len(layers(model)) == 2


@pytest.mark.parametrize("kind", ["loreft", "noreft", "nodireft", "direft"])
@torch.no_grad()
def test_pyreft_computes_the_same(kind):
    held = load_file(FIXTURES / "pyreft" / f"{kind}.safetensors")
    config = graft.ReftConfig(
        r=2,
        prefix_positions=2,
        suffix_positions=1,
        tied_weights=True,
        orthogonality=kind in ("loreft", "direft"),
        subtract_projection=kind in ("loreft", "noreft"),
        non_linearity="gelu" if kind == "nodireft" else None,
    )
    base = AutoModel.from_pretrained(FIXTURES / "adapterhub" / "llama", attn_implementation="eager")
    model = graft.get_peft_model(base, config).eval()
    for i in range(2):
        layer = layers(model)[f"layers.{i}"]
        layer.reft_R["default"].copy_(held[f"{i}.R"])
        for name in ("weight", "bias"):
            getattr(layer.reft_A["default"], name).copy_(held[f"{i}.A.{name}"])
    assert_close(model(IDS).last_hidden_state, held["y"], rtol=2e-5, atol=2e-5)


_TOKENS = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
_MAMBA = dict(_TOKENS, state_size=8, initializer_range=STD)
WITH_STATES = {
    "mamba": transformer("MambaConfig", "MambaForCausalLM", **_MAMBA),
    "falcon_mamba": transformer("FalconMambaConfig", "FalconMambaForCausalLM", **_MAMBA),
    "mamba2": transformer(
        "Mamba2Config", "Mamba2ForCausalLM", num_heads=4, head_dim=16, n_groups=1, chunk_size=8, **_MAMBA
    ),
}
rwkv = transformer("RwkvConfig", "RwkvForCausalLM", attention_hidden_size=32, context_length=64, **_TOKENS)
ON_STATES = [
    graft.ReftConfig(target_modules=["0", "1"], **ENDS),
    graft.SteeringConfig(target_modules=["0", "1"], min_token_index=1),
]
BLOCKS = [*ON_STATES, graft.LoraConfig(target_modules=["out_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM")]


def with_states(made, config):
    with seeded(0):
        return adapted(made().eval(), {"default": config}, scale=1)


@STATES_OF_MAMBA
@pytest.mark.parametrize("config", BLOCKS, ids=lambda c: c.peft_type)
@pytest.mark.parametrize("name", WITH_STATES)
@torch.no_grad()
def test_caches_of_states_generate_as_without(name, config):
    model = with_states(WITH_STATES[name], config)
    for ids in (torch.tensor([[7, 5, 8, 9], [3, 4, 5, 6]]), torch.tensor([[5], [5]])):
        mask = torch.ones_like(ids)
        options = dict(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
        options |= dict(return_dict_in_generate=True, output_logits=True)
        cached, anew = (model.generate(**options, use_cache=cache) for cache in (True, False))
        assert torch.equal(cached.sequences, anew.sequences)
        assert_close(cached.logits, anew.logits, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            plain = model.generate(**options)
        assert (torch.stack(plain.logits) - torch.stack(cached.logits)).abs().max() > 1e-2
        if config.peft_type != "LORA":  # whose positions count from the end of what a call sees
            out = model(input_ids=ids, use_cache=True)
            states = "cache" if "cache" in out else "cache_params"  # as before transformers 5.2x
            step = {states: out[states], "use_cache": True}
            out = model(input_ids=cached.sequences[:, ids.shape[1] :][:, :1], **step)
            assert_close(out.logits[:, -1], anew.logits[1], rtol=1e-4, atol=1e-4)


@STATES_OF_MAMBA
@torch.no_grad()
def test_shadow_generates_without_a_cache_of_states():
    model, ids = with_states(WITH_STATES["mamba"], graft.ShadowConfig(task_type="CAUSAL_LM")), torch.tensor([[7, 5]])
    options = dict(input_ids=ids, max_new_tokens=2, do_sample=False, eos_token_id=None)
    refuses(NotImplementedError, "Pass use_cache=False", model.generate, **options)
    assert model.generate(**options, use_cache=False).shape == (1, 4)


@torch.no_grad()
def test_a_state_that_does_not_tell_is_after_the_prompt():
    """RWKV's numbers with its state differ from those without, also those of the base: compare with calls in a row."""
    model, ids = with_states(rwkv, ON_STATES[0]), torch.tensor([[7, 5, 8, 9]])
    ours = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    out = model(input_ids=ids, use_cache=True)
    with model.disable_adapter():
        for _ in range(3):
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
            out = model(input_ids=ids[:, -1:], state=out.state, use_cache=True)
    assert torch.equal(ours, ids)
