# SPDX-License-Identifier: Apache-2.0
"""Lives of adapters by a seed: steps of the public API, after each of which a model does what a dense reference does.

`python -m tests.trust.simulator --seconds 120` (`make simulate`) lives one life after another. `--seed 17` replays one,
`--seed 17 --steps 0,4,9` some of its steps, as the report of a failure says.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import graft
from tests.looks import get_registry
from tests.models import seeded
from tests.raised import refuses
from tests.threads import at_once, in_child
from tests.trust.dense import ADD, CONTAINERS, LAYERS, Adapter, Reference, Together
from tests.trust.folders import faults, killed

NAMES = ("a", "0", "first", "weight_b")  # some are names of layers, or of parameters
PLACES = ("0", "1", "2")  # folders of saved adapters
TARGETS = (["first"], ["second"], ["first", "second"])
X = torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5).sin()
RATE, MOMENTUM = 0.03, 0.9
STEPS = 40  # of a life
Values = dict[str, list[Tensor]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(i, o, dtype=torch.float64) for o, i in LAYERS.values())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).tanh()


def config(kind: str, targets: list[str]) -> Any:
    """Return the config of an adapter that begins with values of its own, which calls in other threads may see."""
    if kind in ("LORA", "DORA"):
        options = dict(r=2, lora_alpha=3, use_dora=kind == "DORA", init_lora_weights=False)
        return graft.LoraConfig(target_modules=targets, **options)
    if kind == "LOHA":
        return graft.LoHaConfig(r=2, alpha=5, target_modules=targets, init_weights=False)
    if kind == "HIRA":
        return graft.HiraConfig(r=2, target_modules=targets, init_weights=False)
    return graft.IA3Config(target_modules=targets, feedforward_modules=[], init_ia3_weights=False)


def value_of(active: Sequence[Together]) -> Any:
    """Return the composition that `set_adapter` and `compose=` take."""
    parts = [
        graft.Stack(*each.names) if each.weights is None else graft.Average(*each.names, weights=each.weights)
        for each in active
    ]
    return parts[0] if len(parts) == 1 else graft.Parallel(*parts)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted)


class Life:
    """A model and its reference. Each step gets dice of its own, so that the others are the same without it.

    Args:
        seed: of all that is drawn, and of whether the adapters are of one kind or mixed.
    """

    def __init__(self, seed: int, folder: Path):
        self.seed, self.folder = seed, folder
        self.saved: dict[str, tuple[str, Adapter]] = {}  # by place: the name in the file, and the adapter
        self.story: list[str] = []
        self.passed: Counter[str] = Counter()
        dice = random.Random(f"{seed}")
        self.kind = dice.choice([*CONTAINERS, None, None, None])  # None: mixed
        with seeded(seed):
            net = Net()
        base = {key: (getattr(net, key).weight.detach(), getattr(net, key).bias.detach()) for key in LAYERS}
        self.reference = Reference(base)
        self.begin(net, "a", self.kind_for(dice), dice)

    def begin(self, net: nn.Module, name: str, kind: str, dice: random.Random) -> None:
        """Make a model with one adapter of a net."""
        with seeded(dice.randrange(2**16)):
            made = graft.get_peft_model(net, config(kind, dice.choice(TARGETS)), name, mixed=self.kind is None)
        self.model: Any = made.eval()
        self.remember(name, kind)
        self.reference.set([Together((name,))])

    # what there is, and choices

    def kind_for(self, dice: random.Random) -> str:
        return self.kind or dice.choice([*CONTAINERS])

    @property
    def names(self) -> list[str]:
        return [*self.reference.adapters]

    @property
    def is_parallel(self) -> bool:
        return len(self.reference.active) > 1

    def some(self, dice: random.Random, most: int = 3, kinds: Sequence[str] = tuple(CONTAINERS)) -> tuple[str, ...]:
        """Return different adapters of these kinds, one at least if there is any."""
        fitting = [name for name in self.names if self.reference.adapters[name].kind in kinds]
        return tuple(dice.sample(fitting, dice.randint(1, min(most, len(fitting))))) if fitting else ()

    def composition(self, dice: random.Random, parallel: bool = True) -> list[Together]:
        """Return adapters to act together; empty if there are none that can."""
        if parallel and dice.random() < 0.3:
            parts = [part for _ in range(2) for part in self.composition(dice, False)]
            return parts if len(parts) > 1 else []
        if dice.random() < 0.5:
            names = self.some(dice, kinds=ADD)
            return [Together(names, tuple(dice.choice([0.5, -1.25, 0.0]) for _ in names))] if names else []
        names = self.some(dice)
        return [Together(names)] if names else []

    def tensors(self, name: str, kind: str) -> Values:
        """Return the adapter's own tensors in the model, by layer."""
        found: Values = {}
        for key, layer in get_registry(self.model).layers.items():
            if name in layer.methods:
                held = [getattr(layer, container)[name] for container in CONTAINERS[kind]]
                found[key] = [t.weight if isinstance(t, nn.Module) else t for t in held]
        return found

    def remember(self, name: str, kind: str) -> None:
        """Tell the reference of an adapter that has come to the model."""
        held = self.tensors(name, kind)
        self.reference.add(name, Adapter(kind, {key: [t.detach().clone() for t in ts] for key, ts in held.items()}))

    def say(self, text: str) -> None:
        self.story[-1] += f" {text}"

    # adapters come and go

    def add(self, dice: random.Random) -> None:
        name, kind, targets = dice.choice(NAMES), self.kind_for(dice), dice.choice(TARGETS)
        self.say(f"{name} {kind} {targets}")
        if name in self.names:
            refuses(graft.AdapterNameError, None, self.model.add_adapter, name, config(kind, targets))
            return
        with seeded(dice.randrange(2**16)):
            self.model.add_adapter(name, config(kind, targets))
        self.remember(name, kind)

    def delete(self, dice: random.Random) -> None:
        name = dice.choice(NAMES)
        self.say(name)
        if name not in self.names or name in self.reference.merged:
            refuses(ValueError, None, self.model.delete_adapter, name)
            return
        self.model.delete_adapter(name)
        self.reference.delete(name)

    # which act

    def activate(self, dice: random.Random) -> None:
        names = self.some(dice)
        self.say(f"{names}")
        if names:
            self.model.base_model.set_adapter([*names])
            self.reference.set([Together(names)])

    def activate_one(self, dice: random.Random) -> None:
        name = dice.choice(NAMES)
        self.say(name)
        if name not in self.names:
            refuses(graft.AdapterNotFoundError, None, self.model.set_adapter, name)
            return
        self.model.set_adapter(name)
        self.reference.set([Together((name,))])

    def compose(self, dice: random.Random) -> None:
        active = self.composition(dice)
        self.say(f"{active}")
        if active:
            self.model.set_adapter(value_of(active))
            self.reference.set(active)

    def compose_one_call(self, dice: random.Random) -> None:
        parts = self.composition(dice)
        self.say(f"{parts}")
        if not parts:
            return
        if self.reference.merged:
            refuses(graft.RoutingError, None, self.model, X, compose=value_of(parts))
            return
        close(self.model(X, compose=value_of(parts)), self.composed(self.reference, parts))

    @staticmethod
    def composed(reference: Reference, parts: Sequence[Together]) -> Tensor:
        return torch.cat([reference.run(X, Together() if reference.disabled else part) for part in parts])

    def refuse_average(self, dice: random.Random) -> None:
        """An adapter that does more than add is in no average."""
        names = self.some(dice, 1, [kind for kind in CONTAINERS if kind not in ADD])
        self.say(f"{names}")
        if names:
            refuses(graft.RoutingError, None, self.model.set_adapter, graft.Average(*names, weights=[0.5]))

    # on, off, merged

    def switch(self, dice: random.Random) -> None:
        off = dice.random() < 0.5
        self.say("off" if off else "on")
        tuner = self.model.base_model
        (tuner.disable_adapter_layers if off else tuner.enable_adapter_layers)()
        self.reference.disable(off)

    def switch_within_a_block(self, dice: random.Random) -> None:
        before = self.reference.disabled
        with self.model.disable_adapter():
            close(self.model(X), self.reference.run(X, Together()))
        self.reference.disable(True)  # unmerges
        self.reference.disable(before)

    def merge(self, dice: random.Random) -> None:
        names = None if dice.random() < 0.5 else self.some(dice)
        safe = dice.random() < 0.5
        self.say(f"{names} {'safe' if safe else ''}")
        if names == ():
            return
        asked = self.reference.active_names if names is None else names
        wanted = [n for n in asked if n not in self.reference.merged]
        merge = self.model.base_model.merge_adapter
        given = None if names is None else [*names]
        if wanted and (self.reference.disabled or self.is_parallel):
            refuses(NotImplementedError if self.is_parallel else ValueError, None, merge, given, safe_merge=safe)
            return
        merge(given, safe_merge=safe)
        if wanted:
            self.reference.merge(wanted)

    def merge_broken(self, dice: random.Random) -> None:
        names = self.some(dice, 1)
        if not names or names[0] in self.reference.merged or self.reference.disabled or self.is_parallel:
            return
        bad = dice.choice([float("nan"), float("inf")])
        self.say(f"{names[0]} {bad}")
        held = self.tensors(names[0], self.reference.adapters[names[0]].kind)
        first = next(iter(held.values()))[0].data.view(-1)
        value = first[0].item()
        first[0] = bad
        refuses(ValueError, "NaNs detected", self.model.base_model.merge_adapter, [*names])
        first[0] = value

    def unmerge(self, dice: random.Random) -> None:
        self.model.base_model.unmerge_adapter()
        self.reference.merged = {}

    # training

    @property
    def trains(self) -> bool:
        r = self.reference
        return bool(r.active_names) and not r.disabled and not r.merged and not self.is_parallel

    def own_tensors(self) -> list[Tensor]:
        r = self.reference
        return [t for n in r.active_names for ts in r.adapters[n].tensors.values() for t in ts]

    def run_steps(self, optimizers: Sequence[torch.optim.Optimizer], inputs: Tensor, steps: int = 2) -> None:
        """Train the model and the reference."""
        for model, optimizer in zip((self.model.train(), self.reference.run), optimizers):
            for _ in range(steps):
                model(inputs).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        self.model.eval()

    def optimizer(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM)

    def train(self, dice: random.Random, resume: bool = False) -> None:
        if not self.trains:
            return
        with seeded(dice.randrange(2**16)):
            inputs = torch.randn(6, 5, dtype=torch.float64)
        mine = self.own_tensors()
        for t in mine:
            t.requires_grad_()
        optimizer, of_reference = self.optimizer(), torch.optim.SGD(mine, lr=RATE, momentum=MOMENTUM)
        assert len(optimizer.param_groups[0]["params"]) == len(mine)
        self.run_steps((optimizer, of_reference), inputs)
        if resume:
            folder = self.folder / "training"
            shutil.rmtree(folder, ignore_errors=True)
            graft.save_training(folder, self.model, optimizer, step=2)
            self.load_all(folder)
            optimizer = self.optimizer()
            assert graft.resume(folder, self.model, optimizer).step == 2
            self.run_steps((optimizer, of_reference), inputs)
        for t in mine:
            t.requires_grad_(False)

    def train_and_resume(self, dice: random.Random) -> None:
        """Train, save, load all into a fresh model, resume, train on."""
        self.train(dice, resume=True)

    # rows

    def rows(self, dice: random.Random) -> None:
        if not self.names:
            return
        choices: list[Together] = []
        for _ in range(len(X)):
            one = self.composition(dice, False) if dice.random() < 0.4 else [Together((dice.choice(self.names),))]
            choices.append(Together() if dice.random() < 0.2 or not one else one[0])
        self.say(f"{choices}")
        given = [self.row_name(each) for each in choices]
        if self.reference.merged:
            refuses(graft.RoutingError, None, self.model, X, adapter_names=given)
            return
        close(self.model(X, adapter_names=given), self.by_row(self.reference, choices))

    @staticmethod
    def row_name(together: Together) -> Any:
        if not together.names:
            return "__base__"
        return together.names[0] if len(together.names) == 1 and not together.weights else value_of([together])

    @staticmethod
    def by_row(reference: Reference, choices: Sequence[Together]) -> Tensor:
        acting = [Together() if reference.disabled else each for each in choices]
        return torch.cat([reference.run(x[None], each) for x, each in zip(X, acting)])

    # files

    def save(self, dice: random.Random) -> None:
        name, place = dice.choice(NAMES), dice.choice(PLACES)
        self.say(f"{name} in {place}")
        if name not in self.names:
            refuses(ValueError, None, self.model.save_pretrained, self.folder / place, selected_adapters=[name])
            return
        shutil.rmtree(self.folder / place, ignore_errors=True)
        self.model.save_pretrained(
            self.folder / place, selected_adapters=[name], safe_serialization=dice.random() < 0.8
        )
        self.saved[place] = name, self.reference.adapters[name].copy()

    def load(self, dice: random.Random) -> None:
        name, place, train = dice.choice(NAMES), dice.choice(PLACES), dice.random() < 0.5
        self.say(f"{name} from {place}{' to train' if train else ''}")
        if place not in self.saved:
            refuses(ValueError, None, self.model.load_adapter, self.folder / place, name)
            return
        of_file, adapter = self.saved[place]
        path = self.folder / place / of_file
        mine = self.reference.adapters.get(name)
        if mine is not None and (mine.kind, mine.tensors.keys()) != (adapter.kind, adapter.tensors.keys()):
            refuses((graft.PeftError, ValueError), None, self.model.load_adapter, path, name)
            return
        self.model.load_adapter(path, name, is_trainable=train)
        if mine is None:
            self.reference.add(name, adapter.copy())
        else:
            mine.tensors = adapter.copy().tensors
        if train and name not in self.reference.active_names:  # it trains all the same; take that back
            held = [layer for layer in get_registry(self.model).layers.values() if name in layer.methods]
            assert all(p.requires_grad for layer in held for p in layer.parameters_of(name))
            self.model.set_requires_grad(name, False)

    def kill(self, dice: random.Random) -> None:
        """A process that saves an adapter over another is killed: the folder holds the old one or the new one."""
        places = [place for place, (name, _) in self.saved.items() if name in self.names]
        if not places:
            return
        place, at, safe = dice.choice(places), dice.randrange(40), dice.random() < 0.8
        name, old = self.saved[place]
        new = self.reference.adapters[name]
        self.say(f"{name} in {place} at call {at}")

        def run() -> None:
            with faults(self.folder / place, at, killed):
                self.model.save_pretrained(self.folder / place, selected_adapters=[name], safe_serialization=safe)

        code = in_child(run)
        assert code in (0, 9), "the save failed"
        found = graft.PeftModel.from_pretrained(self.net(), self.folder / place / name, "x")
        kept = [adapter for adapter in (new, old) if self.holds(found, adapter)]
        assert kept, "the folder holds neither the old adapter nor the new one"
        assert code or kept[0] is new, "a whole save left the old adapter"
        self.saved[place] = name, kept[0].copy()

    @staticmethod
    def holds(model: Any, adapter: Adapter) -> bool:
        """Return True if a model has an adapter "x" with these tensors."""
        layers = {key: layer for key, layer in get_registry(model).layers.items() if "x" in layer.methods}
        if layers.keys() != adapter.tensors.keys():
            return False
        pairs = [(layer.parameters_of("x"), adapter.tensors[key]) for key, layer in layers.items()]
        norms = [sorted(t.norm().item() for t in ts) for pair in pairs for ts in pair]
        return norms[::2] == [pytest.approx(own) for own in norms[1::2]]

    def net(self) -> Net:
        """Return the base model anew."""
        net = Net()
        with torch.no_grad():
            for key, (W, b) in self.reference.base.items():
                getattr(net, key).weight.copy_(W)
                getattr(net, key).bias.copy_(b)
        return net

    def load_all(self, folder: Path) -> None:
        """Load all adapters from their folders onto the base, in place of the model, and make active what was."""
        reference = self.reference
        first, *others = self.names
        kind = graft.PeftMixedModel if self.kind is None else graft.PeftModel
        self.model = kind.from_pretrained(self.net(), folder / first, first, is_trainable=True).eval()
        for name in others:
            self.model.load_adapter(folder / name, name, is_trainable=True)
        reference.methods = {key: [] for key in LAYERS}
        for name, adapter in reference.adapters.items():
            reference.add(name, adapter)
        reference.merged, reference.disabled = {}, False
        if reference.active_names:
            self.model.set_adapter(value_of(reference.active))
        else:  # no call for it: the first is active
            reference.active = (Together((first,)),)
            self.model.set_adapter(first)

    def reload(self, dice: random.Random) -> None:
        if self.names:
            folder = self.folder / "all"
            shutil.rmtree(folder, ignore_errors=True)
            self.model.save_pretrained(folder)
            self.load_all(folder)

    # copies, dtypes

    def copied(self, dice: random.Random) -> None:
        if dice.random() < 0.5:
            self.model = copy.deepcopy(self.model)
            return
        stream = io.BytesIO()
        torch.save(self.model, stream)
        stream.seek(0)
        self.model = torch.load(stream, weights_only=False)

    def cast(self, dice: random.Random) -> None:
        if not self.reference.merged:
            self.model.float().double()
            self.reference.round()

    # out of the model

    def leave(self, dice: random.Random, merges: bool) -> None:
        """Unload adapters from a copy, or from the model, which then begins again."""
        reference, on_a_copy, safe = self.reference, dice.random() < 0.7, dice.random() < 0.5
        self.say("a copy" if on_a_copy else "the model")
        tuner = (copy.deepcopy(self.model) if on_a_copy else self.model).base_model
        acting = {name: reference.merged[name] for name in reference.merged_names}
        if merges:
            if not reference.active_names:
                return
            if self.is_parallel:
                refuses(NotImplementedError, None, tuner.merge_and_unload, safe_merge=safe)
                return
            (active,) = reference.active
            weights = active.weights or (1.0,) * len(active.names)
            acting = {**dict(zip(active.names, weights)), **acting}
        plain = tuner.merge_and_unload(safe_merge=safe) if merges else tuner.unload()
        together = Together(tuple(acting), tuple(acting.values()))
        close(plain(X), reference.run(X, together))
        assert type(plain) is Net and plain.state_dict().keys() == Net().state_dict().keys()
        assert all(p.requires_grad for p in plain.parameters())
        if not on_a_copy:
            reference.fold(together)
            self.begin(plain, dice.choice(NAMES), self.kind_for(dice), dice)

    def unload(self, dice: random.Random) -> None:
        self.leave(dice, merges=False)

    def merge_and_unload(self, dice: random.Random) -> None:
        self.leave(dice, merges=True)

    def combine(self, dice: random.Random) -> None:
        name, how, held = dice.choice(NAMES), dice.choice(["cat", "svd", "exact"]), self.reference.adapters
        names = self.some(dice, 2)
        self.say(f"{names} as {name} by {how}")
        if self.kind not in ("LORA", "LOHA") or not names or name in names or name in self.names:
            return
        if self.kind == "LOHA" and how == "cat":
            return
        weights, options = [0.5, -1.25][: len(names)], {"svd_rank": 8} if how == "svd" else {}
        self.model.base_model.add_weighted_adapter([*names], weights, name, combination_type=how, **options)
        for key, layer in get_registry(self.model).layers.items():
            if name in layer.methods:
                W0 = self.reference.base[key][0]
                wanted = [w * held[n].delta(key, W0) for n, w in zip(names, weights) if key in held[n].tensors]
                close(layer.get_delta_weight(name), sum(wanted))
        self.model.delete_adapter(name)

    # several threads

    def threads(self, dice: random.Random) -> None:
        """Calls in three threads next to changes in another: each call sees one state from its beginning to its end."""
        quiet = not self.reference.merged and dice.random() < 0.5
        changes = ["add", "delete", "activate", "activate_one", "compose", "load"]
        changes += [] if quiet else ["merge", "unmerge", "switch"]  # of which a block that disables undoes some
        calls = [[self.call_for(dice, quiet) for _ in range(3)] for _ in range(3)]
        states, errors = [self.reference.snapshot()], list[BaseException]()
        results: list[list[Any]] = [[] for _ in calls]

        def change() -> None:
            try:
                for _ in range(3):
                    step = dice.choice(changes)
                    self.say(step)
                    getattr(self, step)(dice)
                    states.append(self.reference.snapshot())
            except BaseException as e:
                errors.append(e)

        def run(number: int) -> None:
            for call in calls[number]:
                results[number].append(outcome_of(call.run))

        at_once(change, *(lambda n=n: run(n) for n in range(len(calls))))  # type: ignore[misc]
        if errors:
            raise errors[0]
        for call, result in ((c, r) for n in range(len(calls)) for c, r in zip(calls[n], results[n])):
            wanted = [outcome_of(lambda state=state, call=call: call.wanted(state)) for state in states]
            assert any(is_same(result, each) for each in wanted), f"{call.what}: {result} is none of {wanted}"

    def call_for(self, dice: random.Random, quiet: bool) -> Call:
        kind = dice.choice(["plain", "rows", "compose", "save", *(["block", "block"] if quiet else [])])
        model = self.model
        if kind == "plain" or not self.names:
            return Call("plain", lambda: model(X), lambda state: state.run(X))
        if kind == "block":
            return Call("block", lambda: off(model), lambda state: state.run(X, Together()))
        if kind == "save":
            name, folder = dice.choice(self.names), Path(tempfile.mkdtemp(dir=self.folder))
            return Call(f"save {name}", lambda: saved(model, name, folder), lambda state: held(state, name))
        if kind == "rows":
            names = [dice.choice(self.names) for _ in range(len(X))]
            return Call(
                f"rows {names}", lambda: model(X, adapter_names=[*names]),
                lambda state: refusing(state, names, lambda: self.by_row(state, [Together((n,)) for n in names])),
            )  # fmt: skip
        parts = self.composition(dice) or [Together((self.names[0],))]
        return Call(
            f"compose {parts}", lambda: model(X, compose=value_of(parts)),
            lambda state: refusing(state, [n for p in parts for n in p.names], lambda: self.composed(state, parts)),
        )  # fmt: skip

    # what holds after every step

    def look(self) -> None:
        reference, registry = self.reference, get_registry(self.model)
        close(self.model(X), reference.run(X))
        assert set(registry.peft_config) == set(self.names)
        assert registry.active_adapters == reference.active_names
        assert set(registry.merged_adapters) == set(reference.merged)
        for key, layer in registry.layers.items():
            close(layer.W0, reference.base[key][0])
            for name in layer.methods:
                trains = {p.requires_grad for p in layer.parameters_of(name)}
                assert trains == {name in reference.active_names}, (key, name)

    def live(self, steps: Sequence[int]) -> None:
        """Take the steps of these numbers, and look after each."""
        for number in steps:
            name, dice = draw_step(self.seed, number)
            self.story.append(f"{number}: {name}")
            getattr(self, name)(dice)
            self.look()
            self.passed[name] += 1


class Call(NamedTuple):
    """A call in a thread, and what it computes in a state of the reference."""

    what: str
    run: Callable[[], Tensor]
    wanted: Callable[[Reference], Tensor]


def off(model: Any) -> Tensor:
    with model.disable_adapter():
        return model(X)


def saved(model: Any, name: str, folder: Path) -> Tensor:
    """Save an adapter; return the lengths of the tensors in its file."""
    model.save_pretrained(folder, selected_adapters=[name])
    return lengths(load_file(folder / name / "adapter_model.safetensors").values())


def held(state: Reference, name: str) -> Tensor:
    """Return the lengths of an adapter's tensors in a state of the reference."""
    if name not in state.adapters:
        raise graft.AdapterNotFoundError(name)
    return lengths(t for ts in state.adapters[name].tensors.values() for t in ts)


def lengths(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).sort().values


def refusing(state: Reference, names: Sequence[str], compute: Callable[[], Tensor]) -> Tensor:
    """Compute for a call that names adapters, which is refused while some are merged, and if one is not there."""
    if state.merged or not state.adapters.keys() >= {*names}:
        raise graft.RoutingError("refused")
    return compute()


def outcome_of(run: Callable[[], Tensor]) -> Tensor | str:
    """Return what a call returns, or "refused": adapters are merged, or one is not there (any more)."""
    try:
        return run().detach()
    except ValueError:  # of which graft's errors are
        return "refused"


def is_same(a: Tensor | str, b: Tensor | str) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return isinstance(a, str) and isinstance(b, str)
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-7, atol=1e-7)


WEIGHTS = {  # how often a step is drawn
    "add": 4, "delete": 2, "activate": 3, "activate_one": 2, "compose": 3, "compose_one_call": 2, "refuse_average": 1,
    "switch": 2, "switch_within_a_block": 1, "merge": 4, "merge_broken": 1, "unmerge": 3, "train": 4,
    "train_and_resume": 1, "rows": 3, "save": 3, "load": 3, "kill": 1, "reload": 1, "copied": 1, "cast": 1, "unload": 1,
    "merge_and_unload": 1, "combine": 2, "threads": 2,
}  # fmt: skip


def draw_step(seed: int, number: int) -> tuple[str, random.Random]:
    """Return the name of a step of a life, and its dice."""
    dice = random.Random(f"{seed}/{number}")
    return dice.choices([*WEIGHTS], [*WEIGHTS.values()])[0], dice


def fate(seed: int, steps: Sequence[int]) -> tuple[Exception | None, Life]:
    """Live the steps of a seed; return the error that ended the life early, if one did, and the life."""
    folder = Path(tempfile.mkdtemp(prefix="graft-life-"))
    try:
        life = Life(seed, folder)
        try:
            life.live(steps)
        except (Exception, pytest.fail.Exception) as e:
            return e, life
        return None, life
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def shortest(seed: int, steps: Sequence[int], error: BaseException) -> list[int]:
    """Return steps of a failing life without those that the same kind of error does without."""
    left, size = [*steps], max(1, len(steps) // 2)
    while True:
        for at in range(0, len(left) - 1, size):  # the last step is the one that failed
            fewer = left[:at] + left[at + size :]
            if fewer and type(fate(seed, fewer)[0]) is type(error):
                left = fewer
                break
        else:
            if size == 1:
                return left
            size //= 2


def report_of(seed: int, error: Exception, life: Life) -> str:
    """Return what failed in a life, in as few steps as show it, and how to replay it."""
    taken = [int(line.partition(":")[0]) for line in life.story]
    again, story = fate(seed, taken)[0], life.story
    if again is not None:
        taken = shortest(seed, taken, again)
        again, fewer = fate(seed, taken)
        story = fewer.story
    note = "" if again else " It did not come again: threads take turns as they like."
    numbers = ",".join(map(str, taken))
    return "\n".join([
        f"Life {seed} ({life.kind or 'mixed'}) failed; python -m tests.trust.simulator --seed {seed} --steps {numbers}",
        *story, "".join(traceback.format_exception(again or error)) + note,
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to go on")
    parser.add_argument("--seed", type=int, help="one life")
    parser.add_argument("--steps", help="of that life, by commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.seed is not None:
        steps = range(STEPS) if options.steps is None else [*map(int, options.steps.split(","))]
        error, life = fate(options.seed, steps)
        print("nothing failed" if error is None else report_of(options.seed, error, life))
        sys.exit(error is not None)
    begin, first, failures, passed = time.monotonic(), random.randrange(10**6), 0, Counter[str]()
    for seed in itertools.count(first):
        if time.monotonic() - begin > options.seconds:
            break
        error, life = fate(seed, range(STEPS))
        passed += life.passed
        if error is not None:
            failures += 1
            print(report_of(seed, error, life), flush=True)
    print(f"{seed - first} lives from seed {first}: {failures} failed; {dict(passed.most_common())}")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
