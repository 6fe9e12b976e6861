# SPDX-License-Identifier: Apache-2.0
"""Watch: an audit in transformers' Trainer, after the first steps and at the end."""

from __future__ import annotations

from typing import Any

from graft.inject.parts import registry_of, unwrapped
from graft.model.audit import SECTIONS, AuditReport, audit, parts_of_active
from graft.model.watch import gradients_elsewhere

FIRST = 3  # steps before the first look: a schedule may begin at 0
OF_GRADIENTS = ("no_gradient", "zero_gradient")


def look(model: Any, optimizer: Any, half: bool, early: bool) -> AuditReport:
    """Audit a model in Trainer's hands.

    Args:
        half: float16 is trained by a scaler, which may have skipped the first steps.
        early: the look after the first steps. Small updates are no finding yet, those of 0 are; and a layer without
            gradients may belong to an expert without tokens: the model's own watch says so after some passes.
    """
    model = unwrapped(model)
    registry = registry_of(model)
    elsewhere = registry is not None and gradients_elsewhere(model, parts_of_active(registry.carriers()))
    report = audit(model, None if elsewhere else optimizer)
    if early:
        waiting = half or optimizer is None or not any([group["lr"] for group in optimizer.param_groups])
        report.not_moved = [part for part in report.not_moved if not (waiting or report.updates[part])]
        if any(report.updates.values()):
            for name in OF_GRADIENTS:
                getattr(report, name).clear()
    return report


def line(report: AuditReport, when: str) -> str:
    """Return what a report says in one line."""
    found = {name: len(getattr(report, name)) for name in SECTIONS}
    sizes = f"updates are {report.range_of_updates()} of their weights" if report.updates else ""
    if report.ok:
        return f"graft, {when}: nothing is wrong with the adapters" + (f"; {sizes}." if sizes else ".")
    wrong = ", ".join(f"{SECTIONS[name][0]} ({n})" for name, n in found.items() if n)
    return f"graft, {when}: {wrong}" + (f"; {sizes}" if sizes else "") + ". print(watch.report) names them."


def ignore(*_: Any, **__: Any) -> None:
    """Leave an event alone."""


class Watch:
    """Audits the adapters after the first steps and at the end, and prints one line each:
    `Trainer(…, callbacks=[graft.train.Watch()])`. No step waits for it but the one at which it looks.

    Args:
        first: steps before the first look.

    Attributes:
        report: the AuditReport of the last look.
    """

    def __init__(self, first: int = FIRST):
        self.first, self.steps = first, 0
        self.report: AuditReport | None = None

    def __getattr__(self, name: str) -> Any:
        """Return what does nothing, for the other events; their base class would need transformers."""
        if name.startswith("on_"):
            return ignore
        raise AttributeError(f"'Watch' object has no attribute '{name}'")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        if self.steps == self.first:
            self._look(args, state, f"after {self.steps} steps", early=True, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(args, state, f"at the end, after {self.steps} steps", early=False, **kwargs)

    def _look(
        self, args: Any, state: Any, when: str, early: bool, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        self.report = look(model, optimizer, bool(getattr(args, "fp16", False)), early)
        if state.is_world_process_zero:
            print(line(self.report, when), flush=True)
