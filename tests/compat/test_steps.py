# SPDX-License-Identifier: Apache-2.0
"""Steps of tuners that clients replace: what the same wrapper makes PEFT do; and that bad ones change nothing."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import Any

import peft
import pytest
import torch
from torch import nn

import graft
from graft.compat.peft.modules import resolve
from graft.inject import steps
from graft.model import mixed

BOTH = pytest.mark.parametrize("lib", ["peft", "graft"])


class Library:
    """What wrappers and tests take of PEFT, or of graft under its name."""

    def __init__(self, name: str):
        self.api: Any = {"peft": peft, "graft": graft}[name]
        self.theirs = name == "peft"

    def get(self, module: str, name: str) -> Any:
        return getattr(__import__(module, fromlist=[name]), name) if self.theirs else resolve(module, name)

    def tuner(self, name: str = "LoraModel") -> Any:
        return getattr(self.api, name)

    @property
    def base(self) -> Any:
        return self.get("peft.tuners.tuners_utils", "BaseTuner")

    def wrap(self, model: nn.Module, config: dict, kind: str = "LoraConfig", **options: Any) -> Any:
        return self.api.get_peft_model(model, getattr(self.api, kind)(**config), **options)

    def shapes(self, model: Any, **options: Any) -> dict:
        state = self.api.get_peft_model_state_dict(model, **options)
        return {name: (tuple(t.shape), t.dtype) for name, t in state.items()}


PEFT, GRAFT = Library("peft"), Library("graft")


class Clipped(nn.Module):
    """A linear layer inside a module of its name."""

    def __init__(self, i: int, o: int):
        super().__init__()
        self.linear = nn.Linear(i, o)

    def forward(self, x):
        return self.linear(x).clamp(-1, 1)


class Odd(nn.Linear):
    pass


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 7))
        self.down = nn.Parameter(torch.randn(3, 7, 6))

    def forward(self, x):
        return (x @ self.up @ self.down).sum(0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.experts = Clipped(6, 7), Odd(6, 7), nn.Linear(7, 6), Experts()

    def forward(self, x):
        return self.experts(self.v(self.q(x) + self.k(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Tied(nn.Module):
    """An embedding and a head on its weight, with what tells PEFT of it."""

    config: Any = {"model_type": "custom", "tie_word_embeddings": True}
    _tied_weights_keys: Any = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head


def base() -> Model:
    torch.manual_seed(0)
    return Model()


TARGETS: dict = {"target_modules": ["q", "k", "v"]}
LINEAR: dict = {"target_modules": ["k", "v"]}
STACKS: dict = {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]}
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def by_clients(cls: Any, seen: list | None = None) -> Any:
    """A wrapper of clients' kind: modules of one class are left out, of another's an inner one is adapted."""
    original = cls._create_and_replace

    def create_and_replace(self, config, adapter, target, target_name, parent, current_key=None, **options):
        if seen is not None:
            seen.append(current_key)
            assert not hasattr(target, "base_layer") and parent._modules[target_name] is target
        if isinstance(target, Odd):
            return None
        if isinstance(target, Clipped):
            target, target_name, parent = target.linear, "linear", target
        return original(self, config, adapter, target, target_name, parent, current_key=current_key, **options)

    return create_and_replace


@pytest.fixture
def both(monkeypatch):
    """A function that replaces a step in both libraries by what `make(class, library)` returns."""

    def replace(step: str, make: Any, tuner: str | None = "LoraModel") -> None:
        for lib in (PEFT, GRAFT):
            cls = lib.base if tuner is None else lib.tuner(tuner)
            monkeypatch.setattr(cls, step, make(cls, lib))

    return replace


def same_shapes(config: dict, kind: str = "LoraConfig", build: Any = base) -> Any:
    """Assert that both libraries adapt the same under the same names; return the models."""
    theirs, ours = (lib.wrap(build(), config, kind) for lib in (PEFT, GRAFT))
    assert PEFT.shapes(theirs) == GRAFT.shapes(ours) and PEFT.shapes(theirs)
    return theirs, ours


# what wrappers may do


def test_a_module_left_out_and_one_within_the_target(both, tmp_path):
    both("_create_and_replace", lambda cls, lib: by_clients(cls))
    theirs, ours = same_shapes(TARGETS | {"rank_pattern": {"q": 3}, "init_lora_weights": False})
    assert not any(".k." in name for name in GRAFT.shapes(ours))
    assert any(".q.linear." in name for name in GRAFT.shapes(ours))
    report = ours._registry.reports["default"]
    assert [s.name for s in report.skipped] == ["blocks.0.k", "blocks.1.k"]
    assert "LoraModel._create_and_replace" in report.skipped[0].why

    theirs.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(base(), tmp_path)
    assert GRAFT.shapes(loaded) == PEFT.shapes(theirs)
    expected = theirs.eval()(X)
    assert not torch.equal(expected, base()(X))
    torch.testing.assert_close(loaded.eval()(X), expected)
    torch.testing.assert_close(loaded.merge_and_unload()(X), expected)

    for model, lib in ((theirs, PEFT), (ours, GRAFT)):
        model.add_adapter("other", lib.api.LoraConfig(**TARGETS, r=2))
    assert GRAFT.shapes(ours, adapter_name="other") == PEFT.shapes(theirs, adapter_name="other")


@pytest.mark.differs(
    "replacing `_create_and_replace`, `_check_target_module_exists`, `_inject_parameters` or `_cast_adapter_dtype` "
    "of a tuner class"
)
def test_each_target_is_asked_for_once_and_before_anything_is_built(both):
    seen: dict = {}
    both("_create_and_replace", lambda cls, lib: by_clients(cls, seen.setdefault(lib.theirs, [])))
    same_shapes(TARGETS)
    assert seen[True] == seen[False] == [f"blocks.{i}.{name}" for i in (0, 1) for name in "qkv"]


def test_a_changed_config(both):
    """A copy, and the adapter's own changed for the time of one call."""

    def make(cls, lib):
        original = cls._create_and_replace

        def create_and_replace(self, config, adapter, target, *args, **options):
            if options["current_key"].endswith("k"):
                return original(self, dataclasses.replace(config, r=3), adapter, target, *args, **options)
            config.r, before = 5, config.r
            try:
                return original(self, config, adapter, target, *args, **options)
            finally:
                config.r = before

        return create_and_replace

    both("_create_and_replace", make)
    _, ours = same_shapes(LINEAR)
    ranks = {layer.site.key[-1]: layer.r["default"] for layer in ours._registry.layers.values()}
    assert ranks == {"k": 3, "v": 5} and ours.peft_config["default"].r == 8


def test_a_config_changed_for_good(both):
    """Targets before the change have the config as it was."""

    def make(cls, lib):
        original = cls._create_and_replace

        def create_and_replace(self, config, adapter, target, *args, **options):
            if isinstance(target, Odd):
                original(self, config, adapter, target, *args, **options)
                config.r = 3
            else:
                original(self, config, adapter, target, *args, **options)

        return create_and_replace

    both("_create_and_replace", make)
    _, ours = same_shapes(LINEAR)
    assert [layer.r["default"] for layer in ours._registry.layers.values()] == [8, 3, 3, 3]
    assert ours.peft_config["default"].r == 3


def test_dora_on_some_layers(both):
    def make(cls, lib):
        original = cls._create_and_replace

        def create_and_replace(self, config, adapter, target, *args, **options):
            config = dataclasses.replace(config, use_dora=isinstance(target, Odd))
            return original(self, config, adapter, target, *args, **options)

        return create_and_replace

    both("_create_and_replace", make)
    theirs, ours = (lib.wrap(base(), LINEAR | {"init_lora_weights": False}) for lib in (PEFT, GRAFT))
    assert sum("magnitude" in name for name in ours.state_dict()) == 2
    ours.load_state_dict(theirs.state_dict())  # strictly: the same names
    torch.testing.assert_close(ours.eval()(X), theirs.eval()(X))


def test_a_parameter_of_the_target(both):
    def make(cls, lib):
        original = cls._create_and_replace

        def create_and_replace(self, config, adapter, target, target_name, parent, current_key):
            options = {"parameter_name": "up"} if isinstance(target, Experts) else {}
            return original(self, config, adapter, target, target_name, parent, current_key=current_key, **options)

        return create_and_replace

    both("_create_and_replace", make)
    same_shapes({"target_modules": ["v", "experts"]})


def test_the_answer_of_the_check_counts(both):
    def make(cls, lib):
        original = cls._check_target_module_exists

        def check(config, key):
            return key.endswith(("0.k", "1.v")) if key[-1] in "kv" else original(config, key)

        return staticmethod(check)

    both("_check_target_module_exists", make, tuner=None)
    _, ours = same_shapes({"target_modules": ["k"], "lora_alpha": 4})
    assert list(ours._registry.layers) == ["blocks.0.k", "blocks.1.v"]
    found = [lib.get("peft.tuners.tuners_utils", "inspect_matched_modules") for lib in (PEFT, GRAFT)]
    assert found[1](ours.base_model)["matched"] == ["blocks.0.k", "blocks.1.v"]


def parameters_one_by_one(cls, lib):
    """A replacement in the form of those that clients write: each parameter of the model that the config names."""
    get_submodules = lib.get("peft.utils.other", "_get_submodules")

    def inject_parameters(self, peft_config, model, adapter_name, low_cpu_mem_usage):
        done = []
        for path, module in model.named_modules():
            path = path.replace(".base_layer", "")
            for name, _ in module.named_parameters(recurse=False):
                if f"{path}.{name}".endswith(tuple(f".{t}" for t in peft_config.target_parameters)):
                    parent, target, target_name = get_submodules(model, path)
                    self._check_target_module_compatiblity(peft_config, model, target_name)
                    self._create_and_replace(
                        peft_config,
                        adapter_name,
                        target,
                        target_name,
                        parent,
                        current_key=f"{path}.{name}",
                        parameter_name=name,
                    )
                    done.append(f"{path}.{name}")
        self.targeted_parameter_names.extend(done)
        return done

    return inject_parameters


@pytest.mark.parametrize("further", [{}, {"target_modules": ["v"]}, {"rank_pattern": {"experts.up": 2}}])
def test_parameters_one_by_one(both, further):
    both("_inject_parameters", parameters_one_by_one, tuner=None)
    theirs, ours = same_shapes(STACKS | further)
    ours.add_adapter("other", graft.LoraConfig(**STACKS | further))
    before = {name.replace(".default", ".other"): s for name, s in PEFT.shapes(theirs).items()}
    assert before == GRAFT.shapes(ours, adapter_name="other")


def test_parameters_that_a_wrapper_adds(both):
    """It hands a config with further names on to the original."""

    def make(cls, lib):
        original = cls._inject_parameters

        def inject_parameters(self, peft_config, model, adapter_name, low_cpu_mem_usage):
            further = dataclasses.replace(peft_config, target_parameters=["experts.down", "experts.up"])
            return original(self, further, model, adapter_name, low_cpu_mem_usage)

        return inject_parameters

    both("_inject_parameters", make, tuner=None)
    both("_create_and_replace", lambda cls, lib: by_clients(cls))
    _, ours = same_shapes({"target_modules": ["q"], "target_parameters": ["experts.up"]})
    assert sum("experts" in name for name in GRAFT.shapes(ours)) == 8


@pytest.mark.parametrize("answer", [False, True, None])
def test_half_precision(both, answer):
    """None: the original is not called."""

    def make(cls, lib):
        original = cls._cast_adapter_dtype

        def cast(self, adapter_name, autocast_adapter_dtype=True):
            if self.peft_config[adapter_name].r == 3 and answer is not None:
                return original(self, adapter_name, answer)
            return None

        return cast

    both("_cast_adapter_dtype", make)
    _, ours = same_shapes(LINEAR | {"r": 3}, build=lambda: base().bfloat16())
    assert {d for _, d in GRAFT.shapes(ours).values()} == {torch.float32 if answer else torch.bfloat16}


@pytest.mark.parametrize("name", ["AdaLora", "Vera", "BOFT", "FourierFT", "IA3", "LoHa", "Miss"])
def test_tuners_of_other_methods(both, name):
    """Each has its own: what replaces LoRA's leaves the others alone."""

    def nothing(cls, lib):
        return lambda *args, **kwargs: pytest.fail("LoRA's step")

    both("_create_and_replace", nothing)
    both("_create_and_replace", lambda cls, lib: by_clients(cls), tuner=f"{name}Model")
    further = {"AdaLora": {"total_step": 9}, "IA3": {"feedforward_modules": []}, "FourierFT": {"n_frequency": 5}}
    further |= {"BOFT": {"boft_block_size": 1}, "Miss": {"r": 2}}
    _, ours = same_shapes({"target_modules": ["linear", "k", "v"]} | further.get(name, {}), f"{name}Config")
    assert list(ours._registry.layers) == [f"blocks.{i}.{n}" for i in (0, 1) for n in ("q.linear", "v")]


def test_a_mixed_model_asks_the_tuner_of_the_method(both):
    both("_create_and_replace", lambda cls, lib: by_clients(cls))
    for lib in (PEFT, GRAFT):
        model = lib.wrap(base(), LINEAR, mixed=True)
        assert not any(".k.lora" in name for name, _ in model.named_parameters())
        model.add_adapter("two", lib.api.LoHaConfig(target_modules=["k"]))
        assert any(".k.hada" in name for name, _ in model.named_parameters())
    assert mixed.MixedModel._create_and_replace in steps.STEPS["_create_and_replace"]


def test_tied_modules(both):
    """A module tied to the embedding is asked for as well, after it, and may be left out."""
    config, seen = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, {}

    def make(cls, lib):
        original, asked = cls._create_and_replace, seen.setdefault(lib.theirs, [])

        def create_and_replace(self, config, adapter, target, name, *args, **options):
            asked.append(name)
            if name != "lm_head" or self.peft_config[adapter].r == 2:
                original(self, config, adapter, target, name, *args, **options)

        return create_and_replace

    both("_create_and_replace", make)
    for r, many in ((2, 2), (3, 1)):
        theirs, ours = (lib.wrap(Tied(), config | {"r": r}) for lib in (PEFT, GRAFT))
        assert len(ours._registry.layers) == many
        assert {n for n, _ in theirs.named_parameters()} == {n for n, _ in ours.named_parameters()}
    assert seen[True] == seen[False] == ["embed_tokens", "lm_head"] * 2


def test_restored(monkeypatch):
    """What is replaced counts as long as it stands there; the original is none."""
    cls = graft.LoraModel
    original, expected = cls._create_and_replace, GRAFT.shapes(GRAFT.wrap(base(), LINEAR))
    assert not steps.names_of_replaced(graft.get_peft_model(base(), graft.LoraConfig(**LINEAR)).base_model, None)
    with monkeypatch.context() as within:
        within.setattr(cls, "_create_and_replace", by_clients(cls))
        model = GRAFT.wrap(base(), LINEAR)
        assert steps.names_of_replaced(model.base_model, None) == ["_create_and_replace"]
        assert len(GRAFT.shapes(model)) == len(expected) / 2
    assert cls._create_and_replace is original
    assert GRAFT.shapes(GRAFT.wrap(base(), LINEAR)) == expected


def test_a_replacement_on_one_tuner():
    model = GRAFT.wrap(base(), {"target_modules": ["linear"]})
    model.base_model._create_and_replace = by_clients(graft.LoraModel).__get__(model.base_model)
    model.add_adapter("other", graft.LoraConfig(**LINEAR))
    assert len(GRAFT.shapes(model, adapter_name="other")) == 4


def test_a_plan_shows_it(monkeypatch):
    monkeypatch.setattr(graft.LoraModel, "_create_and_replace", by_clients(graft.LoraModel))
    model = base()
    report = graft.plan(model, graft.LoraConfig(**TARGETS))
    assert [m.name for m in report.matched] == [f"blocks.{i}.{n}" for i in (0, 1) for n in ("q.linear", "v")]
    wrapped = GRAFT.wrap(model, TARGETS)
    again = graft.plan(wrapped, graft.LoraConfig(**TARGETS), "default2")
    assert [m.name for m in again.matched] == [m.name for m in report.matched]
    assert list(wrapped.peft_config) == ["default"]


# what they may not do


def everything(model: nn.Module) -> dict:
    return {name: (id(m), type(m)) for name, m in model.named_modules()} | {
        name: (id(p), p.requires_grad, p.detach().clone().tolist()) for name, p in model.named_parameters()
    }


def raises(original, *args, **options):
    raise LookupError("mine")


def outside(original, self, config, adapter, target, *args, **options):
    original(self, config, adapter, nn.Linear(6, 7), *args, **options)


def twice(original, *args, **options):
    original(*args, **options)
    original(*args, **options)


def elsewhere(original, self, config, adapter, target, name, parent, **options):
    original(self, config, adapter, target, "q", parent, **options)


def of_another(original, self, config, adapter, *args, **options):
    original(self, config, "other", *args, **options)


def no_config(original, self, config, *args, **options):
    original(self, {"r": 8}, *args, **options)


def own_layer(original, self, config, adapter, target, name, parent, **options):
    setattr(parent, name, nn.Sequential(target))


def own_layer_of_all(original, self, config, adapter, target, name, parent, **options):
    original(self, config, adapter, target, name, parent, **options)
    parent._modules[name] = nn.Sequential(target)


def internals(original, self, config, adapter, target, name, parent, **options):
    self._replace_module(parent, name, self._create_new_module(config, adapter, target), target)


def swallows(original, self, config, adapter, target, *args, **options):
    with contextlib.suppress(Exception):
        original(self, config, adapter, None, *args, **options)


def nothing(original, *args, **options):
    pass


BAD = {
    raises: (LookupError, "mine"),
    outside: (ValueError, "'blocks.0.k'.*a Linear that is no module of the model. Pass on the target"),
    twice: (ValueError, "'blocks.0.k' twice.*each once"),
    elsewhere: (ValueError, "places it as 'q' of a Block, where it is not"),
    of_another: (ValueError, "adapter 'other' instead of 'default'"),
    no_config: (ValueError, "a dict instead of the adapter's LoraConfig"),
    own_layer: (ValueError, "put a Sequential in the place of 'blocks.0.k'.*write an Op"),
    own_layer_of_all: (ValueError, "put a Sequential in the place of 'blocks.0.k'.*write an Op"),
    internals: (AttributeError, r"LoraModel\._replace_module is not in graft.*graft\.Method"),
    swallows: (ValueError, "a NoneType that is no module of the model"),
    nothing: (ValueError, r"adapts nothing: LoraModel\._create_and_replace, replaced by .*left out all 4 targets"),
}


@pytest.mark.differs("a replaced step that leaves out all targets; a module that VeRA sizes its shared tensors by")
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("further", [False, True])
def test_bad_wrappers_change_nothing(bad, further, monkeypatch):
    """For a first adapter, and beside one."""
    kind, text = BAD[bad]
    model = base()
    wrapped = GRAFT.wrap(model, {"target_modules": ["v"]}, adapter_name="first") if further else None
    config = graft.LoraConfig(**LINEAR)
    before, given = everything(model), copy.deepcopy(config)
    original = graft.LoraModel._create_and_replace
    with monkeypatch.context() as within:
        within.setattr(graft.LoraModel, "_create_and_replace", lambda *a, **k: bad(original, *a, **k))
        with pytest.raises(kind, match=text):
            if wrapped is None:
                graft.get_peft_model(model, config)
            else:
                wrapped.add_adapter("default", config)
    assert everything(model) == before and config == given
    if wrapped is None:
        wrapped = graft.get_peft_model(model, config)
    else:
        assert list(wrapped.peft_config) == ["first"]
        wrapped.add_adapter("default", config)
    assert len(GRAFT.shapes(wrapped, adapter_name="default")) == 8


def test_a_check_without_an_answer(monkeypatch):
    monkeypatch.setattr(graft.LoraModel, "_check_target_module_exists", staticmethod(lambda config, key: None))
    with pytest.raises(graft.NoMatchingPeftModuleError, match="all left out by the tuner's _check_target_module_exi"):
        GRAFT.wrap(base(), LINEAR)


def test_parameters_without_a_call(monkeypatch):
    monkeypatch.setattr(graft.LoraModel, "_inject_parameters", lambda *args, **kwargs: None)
    with pytest.raises(graft.NoMatchingPeftModuleError), pytest.warns(RuntimeWarning, match="no parameter was match"):
        GRAFT.wrap(base(), STACKS)
    with pytest.warns(RuntimeWarning, match="no parameter was matched"):
        GRAFT.wrap(base(), STACKS | LINEAR)


def test_originals_outside_of_an_injection():
    model = GRAFT.wrap(base().bfloat16(), LINEAR, autocast_adapter_dtype=False)
    tuner, block = model.base_model, model.base_model.model.blocks[0]
    with pytest.raises(RuntimeError, match=r"makes no layer:.*add_adapter"):
        tuner._create_and_replace(model.peft_config["default"], "default", block.q.linear, "linear", block.q)
    with pytest.raises(RuntimeError, match="makes no layer:"):
        tuner._inject_parameters(graft.LoraConfig(**STACKS), model, "default", False)
    assert tuner._check_target_module_exists(model.peft_config["default"], "blocks.0.k")
    assert not tuner._check_target_module_exists(model.peft_config["default"], "blocks.0.q")
    tuner._cast_adapter_dtype("default", False)
    assert block.k.lora_A["default"].weight.dtype == torch.bfloat16
    tuner._cast_adapter_dtype(adapter_name="default")
    assert block.k.lora_A["default"].weight.dtype == torch.float32


@pytest.mark.parametrize("step", steps.STEPS)
def test_a_class_body_that_overrides_a_step(step):
    mine = type(graft.LoraModel)("Mine", (graft.LoraModel,), {step: lambda *args, **kwargs: None})
    with pytest.raises(TypeError, match=rf"Mine overrides {step}.*graft\.Method"):
        mine(base(), graft.LoraConfig(**LINEAR))
    plain = type(graft.LoraModel)("Plain", (graft.LoraModel,), {})
    assert len(plain(base(), graft.LoraConfig(**LINEAR))._graft.layers) == 4
