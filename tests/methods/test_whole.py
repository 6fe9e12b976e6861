# SPDX-License-Identifier: Apache-2.0
"""Laws of methods on whole attentions, MLPs, blocks and models, on language models: rows, checkpointing, life, tokens.

The matrix of tests/conformance has the laws of methods on single layers.
"""

import copy
import pickle
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import graft
from tests.covering import Case, law
from tests.looks import get_registry
from tests.models import adapted, checkpoint, inputs, make, output, seeded
from tests.raised import refuses

ROWS = ["other", "__base__", "default"]
LM = "CAUSAL_LM"
TOKENS = [11, 10]  # that invoke aLoRA


class Setup(NamedTuple):
    """A model with two adapters of one method, and how they differ from what most methods do."""

    config: Any
    base: str = "llama"
    other: dict[str, Any] = {}  # changes of the config of the second adapter
    scale: float = 0.3
    reentrant: bool = True  # checkpointing of this kind works
    beams: bool = True
    unmergeable: str = "in a way that no weight can"

    def fresh(self) -> Any:
        config, second = copy.deepcopy(self.config), copy.deepcopy(self.config)
        for key, value in self.other.items():
            setattr(second, key, value)
        return adapted(make(self.base), {"default": config, "other": second}, scale=self.scale)

    def batch(self) -> dict[str, Tensor]:
        batch = inputs(self.base)
        ids = batch["input_ids"] = batch["input_ids"].clone()
        if getattr(self.config, "alora_invocation_tokens", None):
            ids[:, 1:3] = torch.tensor(TOKENS)
        return batch | ({"task_ids": torch.tensor([2, 0, 1])} if self.config.peft_type == "POLY" else {})


def bottleneck(preset: str, base: str = "llama", **changes) -> Setup:
    return Setup(graft.BottleneckConfig.preset(preset, reduction_factor=3), base, scale=0.2, **changes)


PROMPT = graft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type=LM)
BESIDE = "a branch next to the layer has no merged form"
MIXLORA = graft.MixLoraConfig(r=2, lora_alpha=4, num_experts=3)
REFT = graft.ReftConfig(r=2, prefix_positions=2, suffix_positions=1, dropout=0.0)
STEERING = graft.SteeringConfig(min_token_index=2)
SHADOW = graft.ShadowConfig(task_type=LM, shadow_dropout=0.0)
POLY = graft.PolyConfig(r=3, n_tasks=3, n_skills=3, target_modules=["q_proj", "down_proj"], task_type=LM)
ALORA = graft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], alora_invocation_tokens=TOKENS, task_type=LM)
CASES = {
    "adaption-prompt": Setup(PROMPT, other=dict(adapter_len=5, adapter_layers=1), unmergeable=BESIDE),
    "adaption-prompt-gpt2": Setup(PROMPT, "gpt2", dict(adapter_len=2), unmergeable=BESIDE),
    "mixlora": Setup(MIXLORA, reentrant=False, unmergeable="router chooses experts for each token"),
    "shadow": Setup(SHADOW, unmergeable="by a state that changes from token to token"),
    **{preset: bottleneck(preset) for preset in ("seq_bn", "double_seq_bn", "par_bn", "adapter_plus", "seq_bn_inv")},
    "seq_bn-bert": bottleneck("seq_bn", "bert"),
    "par_bn-bert": bottleneck("par_bn", "bert", unmergeable="a layer that runs later reads its input"),
    "reft": Setup(REFT),
    "reft-bert": Setup(REFT, "bert"),
    "steering": Setup(STEERING, scale=1),
    "poly": Setup(POLY, unmergeable="no weight is that of all tasks"),
    "alora": Setup(ALORA, beams=False, unmergeable="aLoRA does not support merging"),
}
AGAIN = [
    Case((name, *more))
    for name in CASES
    for more in product((False, True), repeat=2)
    if CASES[name].reentrant >= more[0]
]  # reentrant, mixed
WRITING = [Case((name, n)) for name, case in CASES.items() if case.base != "bert" for n in (1, 2)[: 1 + case.beams]]
every = pytest.mark.parametrize("case", CASES)


def rows_of(batch: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {key: value[i : i + 1] for key, value in batch.items()}


def use(model: Any, name: str) -> None:
    """Have one adapter act, or none."""
    model.base_model.set_adapter([name] if name != "__base__" else [])
    model.set_requires_grad(["default", "other"])


def gradients(model: Any) -> dict[str, Tensor]:
    """Take the gradients out of a model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.differs(
    "adaption prompts: mixed batches, layer status, `inject_adapter_in_model`, `set_adapter(inference_mode=True)`"
)
@pytest.mark.differs("SHADOW: mixed batches, also in `generate` and in training")
@every
def test_a_mixed_batch_has_the_outputs_and_gradients_of_its_rows(case):
    model, batch = CASES[case].fresh(), CASES[case].batch()
    model.set_requires_grad(["default", "other"])
    mixed = output(model, batch | {"adapter_names": ROWS})
    plain = output(make(CASES[case].base), {key: value for key, value in batch.items() if key != "task_ids"})
    with seeded(4):
        weight = torch.randn(mixed.shape)
    (mixed * weight).sum().backward()
    got = gradients(model)
    for i, name in enumerate(ROWS):
        use(model, name)
        y = output(model, rows_of(batch, i))
        assert_close(mixed[i : i + 1], y, rtol=1e-4, atol=1e-4)
        assert ((y - plain[i]).abs().max() > 1e-3) == (name != "__base__")
        if y.requires_grad:
            (y * weight[i]).sum().backward()
    assert len(got) >= 2
    assert_close(got, gradients(model), rtol=1e-3, atol=1e-4)


@law("case, reentrant, mixed", AGAIN, lambda cell: [cell[0], cell[1:]])
def test_gradients_under_checkpointing_are_those_without(case, reentrant, mixed):
    grads = []
    for again in (False, True):
        model, batch = CASES[case].fresh().train(), CASES[case].batch()
        model.set_requires_grad(["default", "other"])
        if again:
            checkpoint(model, reentrant)
            model.enable_input_require_grads()
        batch |= {"adapter_names": ROWS} if mixed else {}
        for _ in range(2):
            with seeded(3):  # the router of Poly draws
                if CASES[case].base == "bert":
                    output(model, batch).square().mean().backward()
                else:
                    model(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append(gradients(model))
        state = get_registry(model).call
        assert not state.context and not state.thread_state.tapped
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) >= 2
    assert_close(*grads, rtol=1e-4, atol=1e-5)


@every
@torch.no_grad()
def test_saved_copied_switched_deleted_and_unloaded(case, tmp_path):
    model, batch, alone = CASES[case].fresh(), CASES[case].batch(), {}
    plain = {key: value for key, value in batch.items() if key != "task_ids"}
    for name in ("other", "default"):
        model.set_adapter(name)
        alone[name] = output(model, batch)
        assert all(name in key.split(".") for key, p in model.named_parameters() if p.requires_grad)
    assert (alone["default"] - alone["other"]).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(make(CASES[case].base), tmp_path).eval()
    loaded.load_adapter(tmp_path / "other", "other")
    for twin in (model, loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(output(twin, batch), alone["default"], rtol=1e-5, atol=1e-5)
        twin.set_adapter("other")
        assert_close(output(twin, batch), alone["other"], rtol=1e-5, atol=1e-5)
    base = make(CASES[case].base)
    with model.disable_adapter():
        assert torch.equal(output(model, plain), output(base, plain))
    model.delete_adapter("default")
    assert not any("default" in key.split(".") for key in model.state_dict())
    assert_close(output(model, batch), alone["other"])
    unloaded = model.unload()
    assert unloaded.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(output(unloaded, plain), output(base, plain))


@every
@torch.no_grad()
def test_merging_is_refused_and_changes_nothing(case):
    model, batch = CASES[case].fresh(), CASES[case].batch()
    expected = output(model, batch)
    for merge in (model.merge_adapter, model.merge_and_unload):
        refuses(NotImplementedError, CASES[case].unmergeable, merge)
    assert torch.equal(output(model, batch), expected)


@law("case, beams", WRITING, lambda cell: cell)
@torch.no_grad()
def test_generating_with_a_cache_is_that_without_and_rows_that_of_each(case, beams):
    model, batch = CASES[case].fresh(), CASES[case].batch()
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=beams)
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))
    mixed = model.generate(**batch, **options, adapter_names=ROWS)
    assert torch.equal(mixed, model.generate(**batch, **options, adapter_names=ROWS, use_cache=False))
    for i, name in enumerate(ROWS):
        use(model, name)
        assert torch.equal(mixed[i : i + 1], model.generate(**rows_of(batch, i), **options))
    assert not get_registry(model).call.context
