# SPDX-License-Identifier: Apache-2.0
"""Stages of a pipeline and equal processes, as one process sees them; tests/distributed has several."""

import copy

import pytest
import torch
from torch import nn

import graft
from graft.core.errors import CheckpointError, UnsupportedLayerError
from graft.inject import job, stage
from graft.inject.parts import find_carriers
from graft.io.load import CheckpointValues
from tests import samples
from tests.looks import layers
from tests.models import seeded


def test_paths_below_absent_modules():
    values = object.__new__(CheckpointValues)
    values.absent = dict.fromkeys(["model.layers.1", "head"], "model")
    paths = ["model.layers.1", "model.layers.1.fc", "head.weight", "model.layers.10", "model.layers", "header"]
    assert [values.is_absent(path) for path in paths] == [True] * 3 + [False] * 3


class Team:
    """Processes of which some have other bytes, as the last of them sees it."""

    def __init__(self, *differs):
        self.differs = differs

    def gather(self, checksum):
        return {rank: checksum + differs for rank, differs in enumerate(self.differs)}


def test_processes_with_other_values_are_named():
    data = torch.arange(4, dtype=torch.uint8)
    for equal in ([False], [False] * 3):
        stage.check_equal_data(data, "a", Team(*equal))
    with pytest.raises(CheckpointError, match=r"'a' has other values on rank\(s\) \[1, 3\] than on rank 0"):
        stage.check_equal_data(data, "a", Team(False, True, False, True))


class FailingTeam(stage.ProcessTeam):
    """Processes of which the first fails, as each of them sees it."""

    def __init__(self, error):
        self.of_first = []
        with pytest.raises(type(error)):
            self.run_on_all(make_failure(error))

    def gather(self, thing):
        self.of_first = self.of_first or [thing]
        return {0: self.of_first[0], 1: thing}


def make_failure(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(("error", "text"), [(OSError("no room"), "no room"), (AssertionError(), "AssertionError")])
def test_an_error_of_one_process_is_raised_on_all(error, text):
    with pytest.raises(CheckpointError, match=rf"Rank\(s\) \[0\] cannot load the adapter: .*{text}"):
        FailingTeam(error).run_on_all(lambda: 3)


class LaterTeam(stage.ProcessTeam):
    """Processes as the second of them sees them: a broadcast brings the bytes that the first has sent."""

    def __init__(self):
        super().__init__(None, None)
        self.sent = []

    def broadcast(self, data):
        data.copy_(self.sent.pop(0))


class FirstTeam(stage.ProcessTeam):
    """The same processes as the first of them sees them."""

    def __init__(self, later):
        super().__init__(None, None)
        self.later = later

    def broadcast(self, data):
        self.later.sent.append(data.clone())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sample", samples.BY_THEMSELVES, ids=str)
def test_all_processes_take_the_values_of_the_first(sample):
    """Also those that no generator of torch has drawn."""
    later = LaterTeam()
    held = []
    for seed, team in ((1, FirstTeam(later)), (2, later)):
        with seeded(0):
            model = nn.Sequential(nn.Linear(10, 6))
        config = sample.make()
        config.target_modules = ["0"]
        model = graft.get_peft_model(model, config)
        parts = find_carriers(model, "default")[0]
        with seeded(seed):
            for t in stage.list_adapter_tensors(parts, "default"):
                if isinstance(t, nn.Parameter):  # places that a seed has drawn are cached for all layers
                    t.data.copy_(torch.rand(t.shape) * 10)
        stage.synchronize_tensors(parts, "default", team, loads=False)
        held.append([t.clone() for t in stage.list_adapter_tensors(parts, "default")])
    assert held[0] and all(map(torch.equal, *held))


def test_a_tensor_that_layers_share_is_listed_once():
    model = nn.Sequential(nn.Linear(10, 6), nn.Linear(10, 6))
    model = graft.get_peft_model(model, graft.WaveFTConfig(n_frequency=5, target_modules=["0", "1"]))
    shared, other = (layer.methods["default"].waveft_indices for layer in layers(model).values())
    assert shared is other
    listed = [*stage.list_adapter_tensors(find_carriers(model, "default")[0], "default")]
    assert sum(t is shared for t in listed) == 1


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(10, 6), nn.LayerNorm(6)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layers, self.last = (
            nn.Linear(10, 6),
            nn.ModuleList([Block() for _ in range(4)]),
            nn.Linear(10, 6),
        )


class PipelineIdentityLayer(nn.Identity):
    """The name of transformers' placeholder."""


def stage_of(model, here, empty):
    """Return a model that lacks the blocks outside `here`, and what comes before or after them."""
    for i in set(range(4)) - set(here):
        model.layers._modules[str(i)] = empty()
    if empty is PipelineIdentityLayer:
        setattr(model, "last" if 0 in here else "first", empty())
    return model


def start(model, sample, targets):
    config = sample.make()
    config.target_modules = targets
    with seeded(1):
        model = graft.get_peft_model(model, config)
        after = torch.rand(3)
    return {name: t.clone() for name, t in model.state_dict().items() if ".layers." in name} | {"after": after}


TOGETHER = {  # what adapters need of layers on other stages
    "ADALORA": "divides a budget", "BOTTLENECK-compacter": "trains 'bottleneck_rule'", "FROD": "decomposes the weights",
    "LILY": "uses tensors of layer", "TINYLORA": "trains 'tinylora_v'", "UNILORA": "trains 'unilora_theta_d'",
    "VBLORA": "trains 'vblora_vector_bank'",
}  # fmt: skip
FORMS = [((0, 1), lambda: None), ((2, 3), nn.Identity), ((1, 2), PipelineIdentityLayer)]


@pytest.mark.filterwarnings("ignore", "error:.* adapts nothing on this stage")
@pytest.mark.parametrize("sample", samples.BY_THEMSELVES, ids=str)
def test_a_stage_begins_with_the_values_of_the_whole_model(monkeypatch, sample):
    with seeded(0):
        whole = Blocks()
    targets = r"layers\.\d\.layer"
    expected = start(copy.deepcopy(whole), sample, targets)
    monkeypatch.setattr(stage, "processes", lambda: 2)
    monkeypatch.setattr(job, "processes", lambda: 2)
    if str(sample) in TOGETHER:
        with pytest.raises(
            UnsupportedLayerError, match=rf"{TOGETHER[str(sample)]}.*lacks 2 modules, such as 'layers\.0'"
        ):
            start(stage_of(whole, (2, 3), nn.Identity), sample, targets)
        return
    for here, empty in FORMS:
        values = start(stage_of(copy.deepcopy(whole), here, empty), sample, targets)
        assert {n for n in expected if n == "after" or int(n.split(".layers.")[1][0]) in here} == values.keys()
        for name, t in values.items():
            # with `rewrites` the start on other stages would change weights that are not there
            assert sample.rewrites or torch.equal(t, expected[name]), (here, name)
