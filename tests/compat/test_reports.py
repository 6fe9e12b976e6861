# SPDX-License-Identifier: Apache-2.0
"""What loading reports, as callers filter it: what is missing has its name in the model, with the adapter's name."""

from __future__ import annotations

import re

import pytest
import torch

import graft
from tests import models
from tests.pair import LIBS, UNLIKE, adapt, both, outcome, randomize
from tests.samples import each, first, over

NAME = "styl"  # in no other name, as callers look for it anywhere in a key


def filtered(report, prefix: str) -> tuple[set[str], set[str]]:
    """Which of (missing, unexpected) keys a caller takes for the adapter's, as diffusers does."""
    return {k for k in report.missing_keys if prefix in k and NAME in k}, {
        k for k in report.unexpected_keys if prefix in k
    }


def spoiled(state: dict, prefix: str) -> dict:
    """Without the last tensor of a container, and with a container in a layer that is not there."""
    own = sorted(k for k in state if f".{prefix}" in k and not UNLIKE.search(k))
    left = {k: v for k, v in state.items() if k != own[-1]}
    return left | {re.sub(r"\.([^.]*)\.(?=" + prefix + ")", r".nowhere.\1.", own[0]): state[own[0]]}


PLAIN = [s for s in each("plain", "mlp") if s.method != "SHIRA" and not graft.method_of(s.method).shares]


@over(PLAIN)
def test_keys_of_a_peft_model(sample):
    """PEFT also reports every tensor of the base; callers filter those away."""
    reports = []
    for lib, model in zip(LIBS, both(sample, NAME)):
        prefix = LIBS[1].mapping.PEFT_TYPE_TO_PREFIX_MAPPING[sample.method]
        state = lib.get_peft_model_state_dict(randomize(model, sample), adapter_name=NAME)
        reports.append(lib.set_peft_model_state_dict(model, spoiled(state, prefix), NAME))
    ours, theirs = (filtered(report, prefix) for report in reports)
    assert ours == theirs and all(ours)


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("model", ["llama", "mlp"])
def test_keys_of_an_injected_model(model, bare):
    """Without a wrapper names have no prefix, whether the file's have one or not."""
    sample, reports = first("LORA", model), []
    for lib in LIBS:
        base = lib.inject_adapter_in_model(sample.config(lib), models.make(model), NAME)
        state = lib.get_peft_model_state_dict(base, adapter_name=NAME)
        state = state if bare else {f"base_model.model.{k}": v for k, v in state.items()}
        reports.append(filtered(lib.set_peft_model_state_dict(base, spoiled(state, "lora_"), NAME), "lora_"))
    assert reports[0] == reports[1] and all(reports[0])


def test_keys_of_a_file_without_the_prefix():
    """PEFT loads nothing then; graft does, and names what is missing as it stands in the PeftModel."""
    model = adapt(LIBS[0], first("LORA"), NAME)
    state = LIBS[0].get_peft_model_state_dict(model, adapter_name=NAME)
    bare = {k.removeprefix("base_model.model."): v for k, v in spoiled(state, "lora_").items()}
    report = LIBS[0].set_peft_model_state_dict(model, bare, NAME)
    assert set(report.missing_keys) < set(model.state_dict())
    assert [k.startswith("base_model.model.layers.") for k in report.unexpected_keys] == [True]


@pytest.mark.parametrize("injected", [True, False])
def test_size_mismatches(injected):
    """An error names them, and with `ignore_mismatched_sizes` the report and a warning."""
    sample, named = first("LORA"), []
    for lib in LIBS:
        base = models.make("mlp")
        model = (
            lib.inject_adapter_in_model(sample.config(lib), base, NAME)
            if injected
            else adapt(lib, sample, NAME, base=base)
        )
        state = lib.get_peft_model_state_dict(model, adapter_name=NAME)
        key = next(k for k in state if "lora_A" in k)
        state |= {key: torch.zeros(2, 2)}
        error = outcome(lambda: lib.set_peft_model_state_dict(model, dict(state), NAME)).error  # noqa: B023
        assert isinstance(error, RuntimeError)
        tolerant = outcome(
            lambda: lib.set_peft_model_state_dict(model, dict(state), NAME, ignore_mismatched_sizes=True)  # noqa: B023
        )
        assert tolerant.error is None and len(tolerant.warnings) == 1
        text = str(tolerant.warnings[0].message)
        named.append(
            (re.findall(r"size mismatch for ([^\s:]+): ", str(error)), re.findall(r"\S*lora_A\.\w*\.weight", text))
        )
    ours, theirs = named
    assert ours == theirs and len(ours[0]) == 1 and NAME in ours[0][0]
    assert tolerant.value.unexpected_keys == []


def test_missing_keys_of_load_adapter(tmp_path):
    """PEFT leaves those of the base out here, too; what is left over it does not report."""
    from tests.parity.test_differences import spoil

    sample = first("LORA")
    adapt(LIBS[1], sample).save_pretrained(tmp_path)
    spoil(tmp_path, lambda t: t.pop(max(t)))
    ours, theirs = both(sample)
    strict = outcome(lambda: ours.load_adapter(tmp_path, NAME)).error
    report = ours.load_adapter(tmp_path, NAME, strict=False)
    assert set(report.missing_keys) == set(theirs.load_adapter(tmp_path, NAME).missing_keys) != set()
    assert report.missing_keys[0] in str(strict)
