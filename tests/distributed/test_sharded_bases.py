# SPDX-License-Identifier: Apache-2.0
"""Bases that were sharded before their adapters came: checks of three modules, in processes that start once for each.

`make test-distributed` runs all of them; else a few on two processes.
"""

import pytest

from tests.distributed import recipes, sharded_bases, sharded_refusals
from tests.distributed.processes import run
from tests.distributed.tensor_parallel import ALL_LAWS
from tests.leaves_out import not_under

pytestmark = [
    not_under("torch", "2.7", "transformers shards at load from torch 2.8 on"),
    not_under("transformers", "5.16", "it has no DistributedConfig with these sizes"),
]
WORLDS = (2, 4) if ALL_LAWS else (2,)
LOOPS = {"Trainer", "Trainer AdamW", "Resumable", "accelerate", *recipes.AT_LOAD}  # whose module installs PEFT's name


def failures(found, names):
    """Return what went wrong by check; a check that was not reached counts."""
    return {name: text for name in names if (text := found.get(name, found.get("end", "not reached")))}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Four processes start anew for each layout: with the process groups of all, checks take several times longer."""
    ends: dict[int, dict[str, str]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for world in WORLDS:
            layouts = [name for name, way in sharded_bases.WAYS.items() if way.world == world]
            for only in [f"{name} " for name in [*layouts, "law"]] if world > 2 else [""]:
                patch.setenv("GRAFT_DISTRIBUTED_ONLY", only)
                folder = tmp_path_factory.mktemp(f"bases{world}")
                ends.setdefault(world, {}).update(run("tests.distributed.sharded_bases", folder, world=world))
    return ends


@pytest.mark.parametrize("name", [name for name, way in sharded_bases.WAYS.items() if way.world in WORLDS])
def test_an_adapter_on_a_sharded_base_is_that_of_one_process(name, found):
    world = sharded_bases.WAYS[name].world
    names = [case for case in sharded_bases.names(world) if case.startswith(f"{name} ")]
    assert f"{name} drift" in names and not failures(found[world], names)


@pytest.mark.skipif(not ALL_LAWS, reason="make test-distributed")
@pytest.mark.parametrize("world", WORLDS)
def test_every_method_on_sharded_layers_is_that_of_one_process(world, found):
    names = [case for case in sharded_bases.names(world) if case.startswith("law ")]
    assert len(names) >= 16 and not failures(found[world], names)


@pytest.mark.parametrize("world", WORLDS)
def test_bad_input_is_an_error_on_all_processes(world, tmp_path):
    patience = "8" if world == 2 else "60"
    refusals = run("tests.distributed.sharded_refusals", tmp_path, world=world, timeout=200, GRAFT_PATIENCE=patience)
    names = sharded_refusals.TWO if world == 2 else sharded_refusals.FOUR
    assert not failures(refusals, names) and "end" not in refusals


@pytest.mark.skipif(not ALL_LAWS, reason="make test-distributed")
@pytest.mark.parametrize("name", sorted(LOOPS))
def test_loops_of_others(name, loops):
    assert not failures(loops, [name])


@pytest.fixture(scope="module")
def loops(tmp_path_factory):
    root, ends = tmp_path_factory.mktemp("loops"), {}
    for world, name in ((1, "one"), (2, "two")):
        (folder := root / name).mkdir()
        ends[world] = run("tests.distributed.sharded_loops", folder, world=world, timeout=200)
    assert not any(ends[1].values()) and ends[1].keys() == LOOPS, ends[1]
    return ends[2]


@pytest.mark.parametrize("world", WORLDS)
def test_the_processes_end(world, found):
    assert "end" not in found[world], found[world]["end"]
