# SPDX-License-Identifier: Apache-2.0
"""Random module trees and random rules: graft adapts the modules that PEFT adapts."""

import re

import peft
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graft
from graft.inject.match import find_unmatched, minimize_names
from tests.covering import EVERYTHING
from tests.pair import outcome
from tests.trees import tree

part = st.sampled_from(["a", "b", "ab", "q", "aq", "layers", "h", "0", "1", "10", "q_proj", "x"])
path = st.lists(part, min_size=1, max_size=5).map(".".join)
trees = st.lists(path, min_size=1, max_size=9, unique=True)


def suffixes(names: list[str]) -> st.SearchStrategy[str]:
    """Endings of real names, and names that need not exist."""
    endings = [".".join(n.split(".")[i:]) for n in names for i in range(n.count(".") + 1)]
    return st.sampled_from(sorted(set(endings))) | path


def patterns(names: list[str]) -> st.SearchStrategy[str]:
    return st.sampled_from(names).map(lambda n: rf".*{n[-2:]}".replace("..", ".")) | st.sampled_from(
        [r".*q", r".*\.q", r"a.*", r".*\.\d+\..*", r".*(q|ab)", r"[^.]*", r".*\.[qa]+", r"layers\.[01]\..*", "q"]
    )


@st.composite
def problems(draw):
    names = draw(trees)
    config = {"target_modules": draw(st.lists(suffixes(names), min_size=1, max_size=4) | patterns(names))}
    if draw(st.booleans()):
        config["exclude_modules"] = draw(st.lists(suffixes(names), min_size=1, max_size=2) | patterns(names))
    if draw(st.booleans()):
        config["modules_to_save"] = draw(st.lists(suffixes(names), min_size=1, max_size=1))
    if isinstance(config["target_modules"], list) and draw(st.booleans()):
        config["layers_to_transform"] = draw(st.sampled_from([0, 1, 10, [0], [1, 10], []]))
        if config["layers_to_transform"] != [] and draw(st.booleans()):  # graft refuses no layer of a pattern
            config["layers_pattern"] = draw(st.sampled_from(["layers", "h", ["h", "layers"], "a", "0", []]))
    return names, config


def run(lib, names, cls, config):
    return outcome(lambda: list(lib.get_peft_model(tree(names), getattr(lib, cls)(**config)).targeted_module_names))


def check(names, cls, config):
    ours, theirs = (run(lib, names, cls, config) for lib in (graft, peft))
    if theirs.error is None:
        assert ours.error is None and ours.value == theirs.value
    elif "modules_to_save cannot be applied to modules of type <class 'peft" in str(theirs.error):
        pass  # PEFT takes a name for an ending here and a whole component there, and then trips over its own layer
    else:
        assert isinstance(ours.error, theirs.kind), (ours.error, theirs.error)


MANY = 5 if EVERYTHING else 1
quick = settings(max_examples=60 * MANY, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@given(problems())
@quick
def test_targets(problem):
    check(problem[0], "LoraConfig", problem[1])


@given(problems())
@settings(quick, max_examples=30 * MANY)
def test_targets_of_ia3(problem):
    names, config = problem
    config = {k: v for k, v in config.items() if not k.startswith("layers")}
    check(names, "IA3Config", {**config, "feedforward_modules": []})


@given(trees, st.data())
@settings(quick, max_examples=40 * MANY)
def test_rank_patterns(names, data):
    keys = data.draw(st.lists(suffixes(names) | patterns(names), min_size=1, max_size=3, unique=True))
    ranks = {key: 2 + i for i, key in enumerate(keys)}
    leaves = [n for n in names if not any(other.startswith(n + ".") for other in names)]
    found = []
    for lib in (graft, peft):
        config = lib.LoraConfig(
            target_modules="|".join(map(re.escape, leaves)), rank_pattern=ranks, alpha_pattern=ranks
        )
        base = lib.get_peft_model(tree(names), config).base_model.model
        modules = dict(base.named_modules())
        found.append({n: (modules[n].r["default"], modules[n].lora_alpha["default"]) for n in leaves})
    assert found[0] == found[1]


@given(st.integers(20, 40), st.data())
@settings(quick, max_examples=10)
def test_shortened_targets(size, data):
    """Long lists are saved as the shortest endings that select the same modules."""
    names = [f"layers.{i}.{p}.{n}" for i in range(6) for p in ("attn", "mlp") for n in ("q", "k", "v", "o")]
    targets = data.draw(st.lists(st.sampled_from(names), min_size=size, max_size=size, unique=True))
    found = []
    for lib in (graft, peft):
        model = lib.get_peft_model(tree(names), lib.LoraConfig(target_modules=targets))
        found.append((model.peft_config["default"].target_modules, list(model.targeted_module_names)))
    assert found[0] == found[1]
    assert sorted(found[0][1]) == sorted(targets)


@pytest.mark.parametrize(
    "targets, others",
    [
        (["a.q", "b.q"], ["a.v"]), (["a.0.q", "a.1.q"], ["b.0.q"]), (["x", "y.x"], ["z.y"]), (["a", ""], ["b"]),
        ("a", ["b"]), ([], ["b"]), (["a"], ["a", "b"]),
    ],
)  # fmt: skip
def test_fewest_names_and_refusals_are_pefts(targets, others):
    theirs = outcome(lambda: peft.tuners.tuners_utils._find_minimal_target_modules(targets, others))
    ours = outcome(lambda: minimize_names(targets, others))
    assert ours.value == theirs.value and type(ours.error) is type(theirs.error)
    assert str(ours.error)[:50] == str(theirs.error)[:50]


def test_at_most_two_similar_names_are_said():
    paths = [f"{block}.{name}" for block in "ab" for name in ("query_a", "query_b", "query_c")]
    similar = find_unmatched(["query_x", "a.query_a"], {"a.query_a"}, paths)
    assert list(similar) == ["query_x"]
    assert [n for _, n in similar["query_x"]] == [2, 2]
