# SPDX-License-Identifier: Apache-2.0
"""`graft inspect`: what an adapter file holds."""

from __future__ import annotations

from functools import partial

from graft.command import show
from graft.command.app import LOOK, Result, verb
from graft.config.reading import Json


@verb(LOOK)
def inspect(adapter: str, *, base: str | None = None, spectrum: bool = False, plot: str | None = None) -> Result:
    """Show what an adapter holds: method, base, ranks and scales by group of modules, bytes, sizes of the changes.

    Example: graft inspect my-adapter --spectrum

    Args:
        spectrum: Singular values and ranks of each module.
        plot: Draw spectra and sizes into a picture.
    """
    if base is None:
        show.one_thread()
    from graft.files.inspect import inspect as report_of
    from graft.files.inspect import plot as draw
    from graft.files.sources import adapter_at, local, with_base

    source, with_spectra = local(adapter), spectrum or plot is not None
    report = with_base(source, base, lambda model: report_of(adapter_at(source, model), model, with_spectra))
    if plot is not None:
        draw(report, plot)
    return Result(report, partial(print_report, report, spectrum))


def print_report(report: Json, spectrum: bool) -> None:
    show.facts([
        ("adapter", report["path"]), ("format", report["format"]), ("method", report["method"]),
        ("base", report["base"]), ("changed by", report["changed_base"]), ("written by", report["writer"]),
        ("licence", report["licence"]), ("parameters", show.amount(report["parameters"])),
        ("bytes", f"{show.amount(report['bytes'])} ({show.text(report['dtypes'])})"),
        ("whole", list(report["full"])), ("rows", [f"{n} of {name}" for name, n in report["rows"].items()]),
        ("shared", list(report["shared"])), ("not known", report["unread"]),
    ])  # fmt: skip
    show.table(
        "", ["modules", "count", "rank", "scale", "parameters", "‖ΔW‖ least", "median", "largest"],
        [
            (g["modules"] if g["method"] == "LORA" else f"{g['modules']} ({g['method']})", g["count"],
             show.shape_of(g["ranks"]), g["scales"][0] if len(g["scales"]) == 1 else g["scales"] or None,
             show.amount(g["parameters"]), *(g["norms"] or (None, None, None)))
            for g in report["groups"]
        ],
    )  # fmt: skip
    modules = [m for m in report["modules"] if "norm" in m]
    if any("relative" in m for m in modules):
        show.table(
            "Beside the base", ["module", "‖ΔW‖", "‖W‖", "‖ΔW‖/‖W‖"],
            [(m["module"], m["norm"], m["weight_norm"], m["relative"]) for m in modules],
        )  # fmt: skip
    if spectrum:
        show.table(
            "Spectra", ["module", "rank", "σ₁", "‖ΔW‖", "stable rank", "effective rank", "used"],
            [
                (m["module"], m["rank"], m["singular_values"][0], m["norm"], m["stable_rank"], m["effective_rank"],
                 f"{m['utilisation']:.0%}")
                for m in modules
            ],
        )  # fmt: skip
