# SPDX-License-Identifier: Apache-2.0
"""`make mutations`: break one thing at a time in a copy of the package. The default tests must notice each.

python -m tests.mutations [name …]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """One change, and the tests that run against it."""

    name: str
    file: str  # below src/graft
    old: str
    new: str
    tests: str = "tests/conformance tests/core"


MUTATIONS = [
    Mutation(
        "fused path: half of a low-rank product",
        "kernels/low_rank.py",
        "flat.addmm_(h, W.T, alpha=scale)\n        return y",
        "flat.addmm_(h, W.T, alpha=scale / 2)\n        return y",
    ),
    Mutation("fused path: the scale is lost", "core/fused.py", "1.0 if f.scale is None else f.scale", "1.0"),
    Mutation("fused path: a vector is lost", "core/fused.py", "A if f.inner is None else f.inner[:, None] * A", "A"),
    Mutation(
        "fold order: the newest first", "core/plan.py", "for i in sorted(groups)", "for i in sorted(groups)[::-1]"
    ),
    Mutation(
        "fold order: inward adapters outward",
        "core/plan.py",
        "steps.insert(0, (m, effect))",
        "steps.append((m, effect))",
        "tests/parity/test_adapters.py",
    ),
    Mutation("merging on top, whatever acts before", "core/merging.py", "new if on_top and", "new if"),
    Mutation(
        "a rounded weight is rounded for each merge",
        "core/merging.py",
        "on_top and layer.store.exact",
        "on_top",
        "tests/storage/test_bnb.py",
    ),
    Mutation(
        "4 bits are rearranged under an adapter",
        "storage/bnb.py",
        "m.support_avx512bf16_for_cpu = False",
        "pass",
        "tests/storage/test_bnb.py",
    ),
    Mutation(
        "parts of tensors are saved",
        "io/save.py",
        "    values |= gathered(values)\n",
        "",
        "tests/compat/test_callers.py",
    ),
    Mutation(
        "nobody asks who averages gradients",
        "model/watch.py",
        "    if names:\n        raise",
        "    if not names:\n        raise",
        "tests/distributed",
    ),
    Mutation(
        "a slot: buffers are forgotten",
        "core/containers.py",
        "for name, b in module._buffers.items():",
        "for name, b in ():",
    ),
    Mutation(
        "a slot: what never trains does",
        "core/containers.py",
        "tensor.requires_grad if never is None else",
        "True if never is None else",
    ),
    Mutation(
        "a gate is ignored",
        "core/plan.py",
        "if layer.call.open and layer.call.weights() is not None:\n            return self.gated",
        "if False:\n            return self.gated",
    ),
    Mutation("a gate of other rows", "core/rows.py", "self.gates.rows(index)", "self.gates.rows(index.flip(0) * 0)"),
    Mutation(
        "W₀ is the weight as it is",
        "core/layer.py",
        "if self.state.undo else self.weight_now",
        "if False else self.weight_now",
    ),
    Mutation(
        "rows in another order",
        "core/rows.py",
        "constant((*listed, *places), torch.long",
        "constant((*listed, *places[::-1]), torch.long",
    ),
    Mutation(
        "rows of another adapter",
        "core/mixed.py",
        "plan: Any = self.plans[name]\n",
        "plan: Any = self.plans[rows.names[-1]]\n",
    ),
    Mutation(
        "a saved name",
        "io/entries.py",
        "stem = there + container",
        'stem = there + container + "x"',
        "tests/parity/test_files.py tests/io",
    ),
    Mutation("a merge in training mode", "core/folding.py", 'self.own["training"] = False', "pass"),
    Mutation(
        "half of the shift of a bias",
        "core/effect.py",
        "bias if self.scale is None else bias * self.scale",
        "bias if self.scale is None else bias * self.scale / 2",
    ),
    Mutation(
        "a failed injection leaves its layers",
        "inject/inject.py",
        "            layer.rollback()\n",
        "",
        "tests/core tests/inject tests/model/test_bad_input.py",
    ),
    Mutation(
        "an inactive adapter trains",
        "core/carrier.py",
        "state.let_train(name, False)",
        "True",
    ),
]


def run(mutation: Mutation, folder: Path) -> tuple[bool, str]:
    """Whether the tests noticed, and which was the first."""
    target = folder / "graft" / mutation.file
    text = target.read_text()
    if text.count(mutation.old) < 1:
        return False, f"nothing to change in {mutation.file}: {mutation.old!r}"
    mutated = text.replace(mutation.old, mutation.new, 1)
    compile(mutated, mutation.file, "exec")  # what cannot be imported is not noticed by a law
    target.write_text(mutated)
    try:
        environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-n",
            "2",
            "-p",
            "no:cacheprovider",
            *mutation.tests.split(),
        ]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    finally:
        target.write_text(text)
    first = next(
        (line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), done.stdout[-200:]
    )
    return first.startswith(("FAILED", "ERROR")), first  # xdist ends with 2 after -x


def main(names: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not names or any(n in m.name for n in names)]
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "src" / "graft", Path(folder) / "graft")
        for tests in dict.fromkeys(m.tests for m in chosen):
            failed, first = run(Mutation("nothing", "__init__.py", "graft", "graft", tests), Path(folder))
            if failed:
                print(f"the tests fail as it is: {first}")
                return 1
        for mutation in chosen:
            caught, first = run(mutation, Path(folder))
            print(f"{'caught' if caught else 'MISSED'}  {mutation.name}: {first}", flush=True)
            missed += [] if caught else [mutation.name]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught")
    return len(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
