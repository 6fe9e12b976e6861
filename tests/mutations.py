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
    tests: str


MUTATIONS = [
    Mutation("fused path: half of a low-rank product", "kernels/low_rank.py",
             "flat.addmm_(h, W.T, alpha=scale)\n        return y",
             "flat.addmm_(h, W.T, alpha=scale / 2)\n        return y", "tests/conformance/test_blocks.py"),
    Mutation("fused path: the scale is lost", "core/fused.py", "1.0 if f.scale is None else f.scale", "1.0",
             "tests/conformance/test_matrix.py"),
    Mutation("fused path: a vector is lost", "core/fused.py", "A if f.inner is None else f.inner[:, None] * A", "A",
             "tests/conformance/test_matrix.py"),
    Mutation("fold order: the newest first", "core/plan.py", "for i in sorted(by_kind)",
             "for i in sorted(by_kind)[::-1]", "tests/conformance/test_blocks.py"),
    Mutation("fold order: inward adapters outward", "core/plan.py", "steps.insert(0, (m, effect))",
             "steps.append((m, effect))", "tests/parity/test_adapters.py"),
    Mutation("merging on top, whatever acts before", "core/merging.py", "new if on_top and", "new if",
             "tests/conformance/test_pairs.py"),
    Mutation("a rounded weight is rounded for each merge", "core/merging.py", "on_top and layer.store.exact", "on_top",
             "tests/storage/test_bnb.py"),
    Mutation("4 bits are rearranged under an adapter", "storage/bnb.py", '"support_avx512bf16_for_cpu": False, ', "",
             "tests/storage/test_bnb.py"),
    Mutation("parts of tensors are saved", "io/save.py", "    values |= gather_tensors(values)\n", "",
             "tests/compat/test_callers.py"),
    Mutation("nobody asks who averages gradients", "model/averaging.py", "    if names:\n        raise",
             "    if not names:\n        raise", "tests/distributed/test_pipeline.py"),
    Mutation("adapters on a sharded base: each process keeps its gradients", "model/averaging.py",
             "            dist.all_reduce(row, group=group)\n", "", "tests/distributed/test_layouts.py"),
    Mutation("adapters on a sharded base: each process draws its own", "inject/stage.py",
             "        team.broadcast(sent)\n", "", "tests/distributed/test_sharded.py"),
    Mutation("adapters on a sharded base: each process keeps its values", "inject/stage.py",
             "        team.broadcast(data)\n", "", "tests/inject/test_stage.py"),
    Mutation("dispatched experts: each process takes the first experts' part", "storage/dispatch.py",
             "return t[self.first : self.first + self.count]", "return t[: self.count]",
             "tests/distributed/test_sharded.py"),
    Mutation("dispatched experts: processes of one batch keep their gradients", "storage/dispatch.py",
             "if mesh.size() > 1 and t.requires_grad:", "if False:", "tests/distributed/test_sharded.py"),
    Mutation("a slot: buffers are forgotten", "core/containers.py", "for name, b in module._buffers.items():",
             "for name, b in ():", "tests/conformance/test_matrix.py"),
    Mutation("a slot: what never trains does", "core/containers.py", "tensor.requires_grad if never is None else",
             "True if never is None else", "tests/conformance/test_matrix.py"),
    Mutation("a gate is ignored", "core/plan.py",
             "if layer.call.open and layer.call.current_gates() is not None:\n            x = once(x)",
             "if False:\n            x = once(x)", "tests/conformance/test_called.py"),
    Mutation("a gate of other rows", "core/rows.py", "self.gates.rows(index)", "self.gates.rows(index.flip(0) * 0)",
             "tests/conformance/test_blocks.py"),
    Mutation("W₀ is the weight as it is", "core/layer.py", "if self.state.undo else self.weight_now",
             "if False else self.weight_now", "tests/conformance/test_called.py"),
    Mutation("rows in another order", "core/rows.py", "make_index((*listed, *places)",
             "make_index((*listed, *places[::-1])", "tests/conformance/test_auxiliary.py"),
    Mutation("rows of another adapter", "core/mixed.py",
             "plan = self.plans[name]\n            if plan is None:\n                continue",
             "plan = self.plans[rows.names[-1]]\n            if plan is None:\n                continue",
             "tests/conformance/test_blocks.py"),
    Mutation("a saved name", "io/entries.py", "stem = stem_in_file + container",
             'stem = stem_in_file + container + "x"', "tests/parity/test_files.py tests/io"),
    Mutation("a merge in training mode", "core/folding.py", 'self.attributes["training"] = False', "pass",
             "tests/core/test_w0.py"),
    Mutation("half of the shift of a bias", "core/effect.py", "bias if self.scale is None else bias * self.scale",
             "bias if self.scale is None else bias * self.scale / 2", "tests/conformance/test_matrix.py"),
    Mutation("a failed injection leaves its layers", "inject/job.py", "            layer.rollback()\n",
             "            pass\n", "tests/core tests/inject tests/model/test_bad_input.py"),
    Mutation("an inactive adapter trains", "core/carrier.py", "state.set_trainable(name, False)", "True",
             "tests/core/test_layer.py"),
    Mutation("the loss of an adapter counts padding", "model/auxiliary.py",
             "real.to(value.device, value.dtype).flatten()", "None",
             "tests/conformance/test_auxiliary.py tests/methods/test_mixtures.py"),
    Mutation("the loss of an adapter for each batch of a step", "core/rows.py", "return share * (labels != -100)",
             "return share + 0 * (labels != -100)", "tests/conformance/test_auxiliary.py"),
    Mutation("what runs again notes again", "core/call.py", "torch._C._current_graph_task_id() != -1", "False",
             "tests/conformance/test_auxiliary.py tests/methods/test_mixtures.py"),
    Mutation("AdapterFusion attends to tokens", "methods/fusion.py", "scores.softmax(-1)", "scores.softmax(-2)",
             "tests/methods/test_fusion.py"),
    Mutation("AdapterFusion draws all values to zero", "methods/fusion.py",
             "(W - torch.eye(len(W), device=W.device, dtype=W.dtype))", "W", "tests/methods/test_fusion.py"),
    Mutation("SDT: the weakest states", "methods/sdt.py", "squared[some].topk(states, 1)",
             "squared[some].topk(states, 1, largest=False)", "tests/methods/test_sdt.py"),
    Mutation("SDT: rows of the time step in place of B and C", "methods/sdt.py",
             "torch.arange(out - 2 * self.mixer.states, out, ", "torch.arange(2 * self.mixer.states, ",
             "tests/methods/test_sdt.py"),
    Mutation("a failed injection keeps what a calibration had left", "core/method.py",
             "self.layer.on_rollback(lambda: setattr(module, mark, left))", "pass",
             "tests/methods/test_sdt.py tests/methods/test_corda.py tests/methods/test_loraga.py"),
    Mutation("banks: gradients of the step before", "many/bank.py", "row.received = [False] * len(row.received)",
             "pass", "tests/many/test_bank.py tests/many/test_flat.py"),
    Mutation("banks: other memory goes unseen", "many/bank.py",
             "list(map(Tensor.data_ptr, self.parameters)) == self.addresses", "True",
             "tests/many/test_bank.py tests/many/test_flat.py"),
    Mutation("banks: the norm of another adapter", "many/bank.py", "compute_norms(order, [*numbers.values()])",
             "compute_norms(order, [0 for _ in numbers])", "tests/many/test_bank.py tests/many/test_flat.py"),
    Mutation("banks: the first of accumulated batches is lost", "many/bank.py",
             "additions.append((gradient, addend))", "pass",
             "tests/many/test_bank.py tests/many/test_flat.py"),
    Mutation("banks: adapters of other places share products", "many/bank.py",
             "one[:2] == two[:2] and one[2] + 1 == two[2]", "one[:2] == two[:2]",
             "tests/many/test_bank.py tests/many/test_flat.py"),
    Mutation("a run's file has the optimizer's vectors", "many/run.py",
             "nullcontext() if self._flat is None else self._flat.show_parameters()", "nullcontext()",
             "tests/many/test_resume.py"),
    Mutation("a resumed run draws as at the beginning of its epoch", "many/loader.py", "self.draws.states = now",
             "pass", "tests/many/test_resume.py"),
    Mutation("a loader's generator is everyone's", "many/draws.py",
             "for generator, state in zip(self.loader_generators, self.loader_states):", "for generator, state in ():",
             "tests/many/test_resume.py"),
    Mutation("validation: each batch counts the same", "many/runs.py",
             'weights = torch.tensor(rows, dtype=torch.float64, device="cpu")',
             "weights = torch.ones(len(rows), dtype=torch.float64)", "tests/many/test_runs.py"),
    Mutation("experts: (in, out) is taken as (out, in)", "storage/experts.py",
             "return W.mT if ExpertBlock(m).is_transposed else W\n", "return W\n", "tests/storage/test_experts.py"),
    Mutation("experts: parts of another group of tokens", "kernels/experts.py", "a += sum(sizes[:group])",
             "a += sum(sizes[group:]) - sizes[group]", "tests/kernels/test_experts.py"),
    Mutation("experts: rows without an expert count", "kernels/experts.py", "if local_rows < len(counts):", "if False:",
             "tests/kernels/test_experts.py"),
    Mutation("versions: one in use is unloaded", "serving/versions.py", "if not self._used[name]]", "]",
             "tests/serving/test_versions.py"),
    Mutation("versions: one that could not be loaded stays", "serving/versions.py",
             "self._unload([name], self.leftovers)", "pass", "tests/serving/test_versions.py"),
    Mutation("versions: a number comes again", "serving/versions.py", 'self.number = state["number"]', "pass",
             "tests/serving/test_versions.py"),
    Mutation("Resumable: the loader draws after the generators are back", "train/resumable.py",
             "lr_scheduler, None), job", "lr_scheduler, None), None",
             "tests/train/test_resumable.py"),
    Mutation("resuming: states in the order of the parameters", "train/resuming.py", "(p, group, states[name])",
             "(p, group, [*states.values()][i])", "tests/train/test_resuming.py"),
    Mutation("resuming: another base", "io/fingerprint.py",
             'return differs if differs or match_values(of_file, now) else "its weights have other values"',
             "return differs", "tests/train/test_resuming.py"),
    Mutation("resuming: the rate of the new optimizer", "train/resuming.py", "if k not in OF_THIS_MACHINE:",
             'if k not in (*OF_THIS_MACHINE, "lr"):', "tests/train/test_resuming.py"),
    Mutation("a result that cannot come leaves nothing where one was", "config/atomic.py",
             "            os.rename(third, one if os.path.lexists(other) else other)\n", "            pass\n",
             "tests/files/test_hostile.py tests/command/test_app.py"),
    Mutation("a result over its own source", "files/sources.py", "in (output, source_path)", "== output",
             "tests/command/test_bad_input.py"),
    Mutation("a verb that failed leaves its folder", "files/sources.py", "delete_folder(room)", "pass",
             "tests/files/test_hostile.py tests/command/test_app.py"),
]  # fmt: skip


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
        options = ["-m", "pytest", "-q", "-x", "-n", "2", "-p", "no:cacheprovider", *mutation.tests.split()]
        done = subprocess.run([sys.executable, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
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
