# SPDX-License-Identifier: Apache-2.0
"""`graft inspect`, `diff`, `lint`: the contents of adapters, their differences, their faults."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

from graft.command import show
from graft.command.app import Result, add_verb
from graft.config.reading import Json
from graft.core.errors import shorten_text


@add_verb
def inspect(adapter: str, *, base: str | None = None, spectrum: bool = False, plot: str | None = None) -> Result:
    """Show the contents of an adapter: method, base, ranks and scales by group of modules, bytes, sizes of the updates.

    Example: graft inspect my-adapter --spectrum

    Args:
        spectrum: Singular values and ranks of each module.
        plot: Draw spectra and sizes into a picture.

    Returns:
        The document is `inspect_adapter`'s, with spectra if `spectrum` or `plot` is given. The base is only read if the
        format needs one, or `base` is given. Without `base`, numpy gets one thread.
    """
    if base is None:
        show.limit_numpy_threads()
    from graft.files.inspect import inspect_adapter as report_of
    from graft.files.inspect import plot_spectra as draw
    from graft.files.sources import open_adapter, resolve_adapter, run_with_base

    source, with_spectra = resolve_adapter(adapter), spectrum or plot is not None
    report = run_with_base(source, base, lambda model: report_of(open_adapter(source, model), model, with_spectra))
    if plot is not None:
        draw(report, plot)
    return Result(report, partial(print_inspection, report, spectrum))


def print_inspection(report: Json, spectrum: bool) -> None:
    """Print the facts of an adapter, then a table of its groups.

    If a module has a relative size, a table of all modules with a norm against the base's weights follows. With
    `spectrum`, a table of spectra of the same modules comes last. Nothing is returned.
    """
    show.print_facts([
        ("adapter", report["path"]), ("format", report["format"]), ("method", report["method"]),
        ("base", report["base"]), ("changed by", report["changed_base"]), ("written by", report["writer"]),
        ("licence", report["licence"]), ("parameters", show.format_amount(report["parameters"])),
        ("bytes", f"{show.format_amount(report['bytes'])} ({show.format_value(report['dtypes'])})"),
        ("whole", list(report["full"])), ("rows", [f"{n} of {name}" for name, n in report["rows"].items()]),
        ("shared", list(report["shared"])), ("not known", report["unread"]),
    ])  # fmt: skip
    show.print_table(
        "", ["modules", "count", "rank", "scale", "parameters", "‖ΔW‖ least", "median", "largest"],
        [
            (g["modules"] if g["method"] == "LORA" else f"{g['modules']} ({g['method']})", g["count"],
             show.format_ranks(g["ranks"]), g["scales"][0] if len(g["scales"]) == 1 else g["scales"] or None,
             show.format_amount(g["parameters"]), *(g["norms"] or (None, None, None)))
            for g in report["groups"]
        ],
    )  # fmt: skip
    modules = [m for m in report["modules"] if "norm" in m]
    if any("relative" in m for m in modules):
        show.print_table(
            "Compared with the base", ["module", "‖ΔW‖", "‖W‖", "‖ΔW‖/‖W‖"],
            [(m["module"], m["norm"], m["weight_norm"], m["relative"]) for m in modules],
        )  # fmt: skip
    if spectrum:
        show.print_table(
            "Spectra", ["module", "rank", "σ₁", "‖ΔW‖", "stable rank", "effective rank", "used"],
            [
                (m["module"], m["rank"], m["singular_values"][0], m["norm"], m["stable_rank"], m["effective_rank"],
                 f"{m['utilisation']:.0%}")
                for m in modules
            ],
        )  # fmt: skip


@add_verb
def diff(a: str, b: str, *, base: str | None = None, tol: float = 1e-6) -> Result:
    """Compare the effects of two adapters on each weight, in any format and rank. Exit code 1: unequal.

    Example: graft diff before after --tol 1e-3

    Args:
        a: Folder, file, or hub id (user/repo@revision).
        b: Folder, file, or hub id (user/repo@revision).
        tol: Relative ‖ΔW_a - ΔW_b‖ that counts as equal.

    Returns:
        The document is `compare_adapters`'s; a problem if it is not `equal`. The base is read as in `inspect`, by the
        config of `a`. Without `base`, numpy gets one thread.
    """
    if base is None:
        show.limit_numpy_threads()
    from graft.files.inspect import compare_adapters
    from graft.files.sources import open_adapter, resolve_adapter, run_with_base

    one, two = resolve_adapter(a), resolve_adapter(b)
    differences = run_with_base(
        one, base, lambda model: compare_adapters(open_adapter(one, model), open_adapter(two, model), tol)
    )

    def report() -> None:
        """Print the differing settings, with values cut to 40 characters, names in only one adapter, and the
        differences of modules and tensors. Tables without rows are left out.

        The last line is "equal", or "not equal" with the largest relative difference. It ends with the config
        fields that make the two act otherwise, and the number of names that one of them lacks.
        """
        values = {name: [shorten_text(repr(value), 40) for value in two] for name, two in differences["config"].items()}
        show.print_table("Settings", ["field", "a", "b"], [(name, *two) for name, two in values.items()])
        show.print_facts([("only in a", differences["only_a"]), ("only in b", differences["only_b"])])
        show.print_table(
            "Modules", ["module", "ranks", "cosine", "relative difference", "largest angle"],
            [
                (m["module"], m.get("ranks"), m.get("cosine"), m["relative"], format_degrees(m.get("angle")))
                for m in differences["modules"]
            ],
        )  # fmt: skip
        show.print_table("Tensors", ["tensor", "relative difference"], [t.values() for t in differences["tensors"]])
        more = "".join(f", another {name}" for name in differences["acts_otherwise"])
        if alone := len(differences["only_a"]) + len(differences["only_b"]):
            more += f", {alone} names of one alone"
        show.print_line(
            "equal"
            if differences["equal"]
            else f"not equal: largest relative difference {differences['largest']:.4g}{more}"
        )

    return Result(differences, report, not differences["equal"])


def format_degrees(angle: float | None) -> str | None:
    """Return an angle as a text with two decimals, such as "1.50°"; None for None."""
    return None if angle is None else f"{angle:.2f}°"


@add_verb
def lint(adapter: str, *, base: str | None = None, strict: bool = False) -> Result:
    """Find faults of an adapter: numbers, scales, keys, the config, the card. Exit code 1: a problem.

    Example: graft lint my-adapter --base my-model --strict

    Args:
        strict: Warnings count as problems.

    Returns:
        The document has adapter, findings and problems, their number. Without `base`, names and shapes of the adapter's
        own base are used, if it is on this machine.
    """
    from graft.files.bases import open_base
    from graft.files.lint import lint_adapter as findings_of
    from graft.files.sources import describe_named_base, find_base, open_adapter, resolve_adapter

    source = resolve_adapter(adapter)
    model = describe_named_base(source) if base is None else open_base(find_base(base))
    findings = findings_of(open_adapter(source, model), model)
    bad = [f for f in findings if f.severity == "error" or (strict and f.severity == "warning")]

    def report() -> None:
        """Print two lines for each fault: severity, rule and text, then the remedy.

        The last line has the number of problems (errors, and with --strict warnings) and of the other findings. It is
        the only one without faults.
        """
        for f in findings:
            show.print_line(f"{f.severity:<8} {f.rule:<15} {f.text}")
            show.print_line(f"{'':<24} {f.remedy}")
        show.print_line(f"{len(bad)} problems, {len(findings) - len(bad)} remarks")

    document = {"adapter": adapter, "findings": [asdict(f) for f in findings], "problems": len(bad)}
    return Result(document, report, bool(bad))
