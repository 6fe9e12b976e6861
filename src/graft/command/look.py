# SPDX-License-Identifier: Apache-2.0
"""`graft inspect`, `diff`, `lint`: the contents of adapters, their differences, their faults."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

from graft.command import show
from graft.command.app import LOOK, Result, verb
from graft.config.reading import Json
from graft.core.errors import shorten_text


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


@verb(LOOK)
def diff(a: str, b: str, *, base: str | None = None, tol: float = 1e-6) -> Result:
    """Compare two adapters by what they do to each weight, whatever their format and ranks. Exit code 1: unequal.

    Example: graft diff before after --tol 1e-3

    Args:
        a: Folder, file, or hub id (user/repo@revision).
        b: Folder, file, or hub id (user/repo@revision).
        tol: Relative ‖ΔW_a - ΔW_b‖ that counts as equal.
    """
    if base is None:
        show.one_thread()
    from graft.files.inspect import difference
    from graft.files.sources import adapter_at, local, with_base

    one, two = local(a), local(b)
    found = with_base(one, base, lambda model: difference(adapter_at(one, model), adapter_at(two, model), tol))

    def report() -> None:
        values = {name: [shorten_text(repr(value), 40) for value in two] for name, two in found["config"].items()}
        show.table("Settings", ["field", "a", "b"], [(name, *two) for name, two in values.items()])
        show.facts([("only in a", found["only_a"]), ("only in b", found["only_b"])])
        show.table(
            "Modules", ["module", "ranks", "cosine", "relative difference", "largest angle"],
            [
                (m["module"], m.get("ranks"), m.get("cosine"), m["relative"], degrees(m.get("angle")))
                for m in found["modules"]
            ],
        )  # fmt: skip
        show.table("Tensors", ["tensor", "relative difference"], [t.values() for t in found["tensors"]])
        more = "".join(f", another {name}" for name in found["acts_otherwise"])
        if alone := len(found["only_a"]) + len(found["only_b"]):
            more += f", {alone} names of one alone"
        show.say("equal" if found["equal"] else f"not equal: largest relative difference {found['largest']:.4g}{more}")

    return Result(found, report, not found["equal"])


def degrees(angle: float | None) -> str | None:
    return None if angle is None else f"{angle:.2f}°"


@verb(LOOK)
def lint(adapter: str, *, base: str | None = None, strict: bool = False) -> Result:
    """Look for what is wrong with an adapter: numbers, scales, keys, the config, the card. Exit code 1: a problem.

    Example: graft lint my-adapter --base my-model --strict

    Args:
        strict: Warnings count as problems.
    """
    from graft.files.bases import base_of
    from graft.files.lint import lint as findings_of
    from graft.files.sources import adapter_at, find_base, local, own_names

    source = local(adapter)
    model = own_names(source) if base is None else base_of(find_base(base))
    found = findings_of(adapter_at(source, model), model)
    bad = [f for f in found if f.severity == "error" or (strict and f.severity == "warning")]

    def report() -> None:
        for f in found:
            show.say(f"{f.severity:<8} {f.rule:<15} {f.text}")
            show.say(f"{'':<24} {f.remedy}")
        show.say(f"{len(bad)} problems, {len(found) - len(bad)} remarks")

    document = {"adapter": adapter, "findings": [asdict(f) for f in found], "problems": len(bad)}
    return Result(document, report, bool(bad))
