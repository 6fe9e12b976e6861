# SPDX-License-Identifier: Apache-2.0
"""Slots by rank: what each group holds, and that a batch over groups gives what a PeftModel gives."""

import pytest
import torch
from torch.testing import assert_close

from graft.core.errors import ConfigError, RoutingError
from graft.serving import AdapterSlots
from tests import models
from tests.serving.test_gains import CONFIGS, NAMES, base
from tests.serving.test_gains import carrying as with_gains
from tests.serving.test_slots import ADAPTERS, BASE, TARGETS, carrying, expected, folders, out  # noqa: F401


def grouped(folders, sizes, names=ADAPTERS, **options):  # noqa: F811
    slots = AdapterSlots(models.make("llama"), sizes, targets=TARGETS, **options)
    for name in names:
        slots.load(name, folders[name])
    return slots


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "gathered anew"])
def test_batches_over_groups(folders, keep):  # noqa: F811
    slots, model = grouped(folders, {2: 2, 3: 1, 5: 2}, keep_gathered=keep), carrying(folders)
    for names in (["a", "b", "c", "d", BASE], ["b", "b", BASE, "b", "c"], ["c", BASE, "c", "c", BASE], ["d"] * 5):
        for _ in range(3):
            assert_close(out(slots, names), expected(model, names))


def test_an_adapter_gets_a_slot_of_the_smallest_rank_that_is_enough(folders):  # noqa: F811
    slots = grouped(folders, {3: 1, 5: 2})  # ranks: a 3, b 5, c 2, d 1 and 4
    slots.pin("c")
    slots.pin("b", "d")
    assert slots.report().resident == {"c": 1, "b": 2, "d": 3}
    with pytest.raises(RoutingError, match=r"1 adapters are needed at once beside .*max_adapters is \{3: 1, 5: 2\}"):
        slots.pin("a")
    slots.unpin("c")
    out(slots, ["a"] * 5)
    assert slots.report().resident["a"] == 1 and "c" not in slots.report().resident
    with pytest.raises(RoutingError, match="2 adapters are needed"):
        out(slots, ["a", "c", "a", "c", "a"])
    slots.unload("b")
    slots.load("b", folders["a"])
    assert_close(out(slots, ["b"] * 5), expected(carrying(folders), "a"))


def test_groups_take_the_memory_of_their_ranks(folders):  # noqa: F811
    few, all_high = grouped(folders, {2: 6, 5: 2}), grouped(folders, {5: 8})
    widths = sum(layer.in_features + layer.out_features for layer in few.layers.values())
    assert few.report().slot_bytes == 4 * widths * (7 * 2 + 3 * 5)  # each group has a place of zeros
    assert all_high.report().slot_bytes == 4 * widths * 9 * 5
    out(few, ["c", BASE, "c", BASE, "c"])
    out(few, ["c", BASE, "c", BASE, "c"])
    assert few.report().gathered_bytes == 4 * widths * 5 * 2  # of the group in use alone


def test_groups_with_gains():
    model = with_gains()
    slots = AdapterSlots(base(), {2: 2, 4: 2}, targets=TARGETS, gains=True)
    for name in CONFIGS:
        slots.load(name, model, adapter=name)
    for _ in range(2):
        assert_close(out(slots, NAMES), out(model, NAMES))
    moved = AdapterSlots.of(model, max_adapters={2: 2, 4: 2}, gains=True)
    assert torch.equal(out(moved, NAMES), out(slots, NAMES)) and moved.sizes == {2: 2, 4: 2}


def test_compiled_code_takes_any_mix_of_groups(folders):  # noqa: F811
    torch._dynamo.reset()
    slots = grouped(folders, {3: 2, 5: 2})
    layer = next(iter(slots.layers.values()))
    compiled, x = torch.compile(layer, fullgraph=True, backend="eager"), torch.randn(4, 3, layer.in_features)
    for names in (["a", "b", "c", BASE], ["c"] * 4, ["b", BASE, "b", BASE]):
        with slots.using(names), torch.no_grad():
            assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    "arguments, text", [((3,), "one of the two forms"), (({3: 1}, 3), "one of the two forms"),
                        (({3: 0},), "max_adapters must be"), (({0: 3},), "max_rank must be"),
                        (({},), "max_adapters must be")]
)  # fmt: skip
def test_sizes_that_are_none(arguments, text):
    model = models.make("llama")
    with pytest.raises(ConfigError, match=text):
        AdapterSlots(model, *arguments, targets=TARGETS)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
