# SPDX-License-Identifier: Apache-2.0
"""The rows of the benchmark, in the order of its table."""

from __future__ import annotations

from benchmarks import (
    checkpoints,
    experts,
    files,
    imports,
    inference,
    injection,
    memory,
    merging,
    methods,
    mixtures,
    packed,
    packed_experts,
    plans,
    serving,
    switching,
    together,
    training,
    weighted,
)

GROUPS = (
    imports,
    injection,
    files,
    switching,
    merging,
    weighted,
    memory,
    checkpoints,
    plans,
    training,
    together,
    methods,
    packed,
    packed_experts,
    inference,
    experts,
    mixtures,
    serving,
)
BENCHES = [bench for group in GROUPS for bench in group.BENCHES]
