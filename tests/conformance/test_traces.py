# SPDX-License-Identifier: Apache-2.0
"""Methods compute what they computed, under every value of their configs."""

import pytest

from tests.conformance import traces

REMEDY = f"If that is meant, write the file anew: python -m {traces.__name__}."
GROUPS: dict[str, list[str]] = {}
for _name in traces.rows():
    GROUPS.setdefault(traces.plain(_name), []).append(_name)


@pytest.fixture(scope="module", autouse=True)
def same_generator():
    if not traces.FILE.exists():
        pytest.skip("the source distribution has no traces.txt")
    if traces.differ(traces.generator_print(), traces.read()["torch"]):
        pytest.skip("this torch draws or decomposes in another way than the one that wrote traces.txt")


def test_the_file_has_these_rows():
    assert traces.read().keys() - {"torch"} == traces.rows().keys(), REMEDY


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.replace(" ", "-"))
def test_numbers_and_refusals_are_those_of_the_file(group):
    for name in GROUPS[group]:
        ours, theirs = traces.trace(*traces.rows()[name]), traces.read().get(name, [])
        assert not traces.differ(ours, theirs), f"{name}: {' '.join(ours)}, and was {' '.join(theirs)}. {REMEDY}"
