# SPDX-License-Identifier: Apache-2.0
"""`graft check`, `export`, `verify`: verdicts of servers on an adapter, its form for them, a test of a running one."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated

import typer

from graft.command import show
from graft.command.app import Result, add_verb
from graft.core.errors import escape_controls
from graft.files.errors import OptionError
from graft.files.serving import Finding, ServerOptions, get_server, list_servers


def complete_server_list(incomplete: str) -> list[str]:
    """Return completions of a text with server names by commas, for the shell: each server that it does not
    name yet.
    """
    before, comma, _ = incomplete.rpartition(",")
    return [before + comma + name for name in list_servers() if name not in before.split(",")]


COLOURS = {"refused": "yellow", "wrong": "red", "ignored": "red", "ok": "green"}


@add_verb
def check(
    adapter: str,
    *,
    servers_: Annotated[str, typer.Option("--for", autocompletion=complete_server_list)] = "",
    base: str | None = None,
    max_rank: Annotated[int | None, typer.Option(min=1)] = None,
    targets: Annotated[str | None, typer.Option("--lora-target-modules")] = None,
) -> Result:
    """Show how servers would treat an adapter: refuse it, compute something else, or ignore it.

    A server that ignores an adapter answers as its base, without a message. Verdicts come from a data file, with the
    version and date of each server that was run or read. Exit code 1 if a server would not apply the adapter as it is.

    Example: graft check out/adapter --for vllm,sglang --base models/llama

    Args:
        servers_: Servers, by commas: vllm,sglang,llama.cpp,lorax,mlx,diffusers,…
        max_rank: --max-lora-rank of the server.
        targets: The server's option of that name, by commas.

    Returns:
        The document has adapter, servers and findings. A problem if a finding is not "ok". Without `base`, the
        adapter's own base is compared, if it is on this machine.

    Raises:
        OptionError: no server is named.
    """
    from graft.files import serving
    from graft.files.bases import open_base
    from graft.files.sources import describe_named_base, find_base, open_adapter, resolve_adapter

    options = ServerOptions(max_rank, None if targets is None else tuple(show.split_commas(targets)))
    names = [get_server(name).name for name in show.split_commas(servers_)]
    if not names:
        raise OptionError(f"--for names no server. Choose one of {', '.join(list_servers())}.")
    source = resolve_adapter(adapter)
    model = describe_named_base(source) if base is None else open_base(find_base(base))
    findings = serving.check_servers(open_adapter(source, model), names, model, options)
    document = {"adapter": adapter, "servers": names, "findings": [asdict(f) for f in findings]}
    return Result(
        document, partial(print_findings, names, findings, model is not None), not all(f.ok for f in findings)
    )


def print_findings(names: list[str], all_findings: list[Finding], compared: bool) -> None:
    """Print each server with its version and date, and its findings with evidence (unless "run") and remedies, or "ok"
    if there are none. Verdicts are coloured.

    Without `compared`, a line says that module names were not compared with a base.
    """
    known = list_servers()
    for name in names:
        typer.echo(f"{typer.style(name, bold=True)} {known[name].version}, as of {known[name].date}")
        findings = [f for f in all_findings if f.server == name]
        for f in findings:
            note = "" if f.evidence == "run" else f" ({f.evidence})"
            line = escape_controls(f": {name} {f.does}{note}: {f.what}")
            typer.echo(f"  {typer.style(f.verdict, fg=COLOURS[f.verdict])}{line}")
            if f.remedy:
                show.print_line(f"    → {f.remedy}")
        if not findings:
            typer.echo(f"  {typer.style('ok', fg='green')}: no problem is known")
    if not compared:
        show.print_line("Names of modules were not compared: give the model with --base.")


@add_verb
def export(
    adapter: str,
    *,
    server: Annotated[str, typer.Option("--for", autocompletion=lambda: [*list_servers()])],
    output: str,
    base: str | None = None,
    rank: str | None = None,
    lossy: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Result:
    """Write an adapter so that a server reads it correctly: plain LoRA with the same update of the same base.

    The scale is multiplied into B, all modules have one rank, and target_modules are suffixes. PiSSA, OLoRA and KaSA
    get twice the rank, for the original base. Other methods with a ΔW become LoRA of the lowest rank that holds it.
    Methods that plain LoRA cannot hold (DoRA, modules_to_save) are refused with exit code 5: merge them.

    Example: graft export out/adapter --for vllm --base models/llama -o out/for_vllm

    Args:
        server: The server: vllm, sglang, llama.cpp, mlx, …
        rank: For methods other than LoRA: a rank, or the share of ‖ΔW‖² to keep. Default: the lowest that holds it.
        lossy: Allow a rank that loses much of ‖ΔW‖.

    Returns:
        The document has output (None in a dry run) and the fields of `ExportReport`. LoRA and AdaLoRA without `rank`,
        and without an undescribed change of the base, are converted as files. All else is loaded onto the base with
        transformers.
    """
    from graft.files import export as files
    from graft.files.base import read_base_files
    from graft.files.formats import read
    from graft.files.sources import check_output, place_when_done, require_base, resolve_adapter

    server = get_server(server).name
    rank_or_share = None if rank is None else parse_rank(rank)
    source = resolve_adapter(adapter)
    folder = require_base(source, base)
    check_output(output, [source, folder], force)
    model = read_base_files(folder)
    file = read(source, model)
    with place_when_done(output, not dry_run) as out:
        if rank_or_share is None and (file.method in ("LORA", "ADALORA") and file.changed_base is None):
            report = files.export_adapter_file(file, server, model, out)
        else:
            from graft.command.models import attach_adapter, load_base
            from graft.files.export_model import export_model_adapter as of_model

            report = of_model(attach_adapter(load_base(folder), source), "default", server, out, rank_or_share, lossy)

    def print_report() -> None:
        """Print a line with the output, or "(dry run)", rank, number of modules and server, then a line for each note.

        One for the rounding of B follows unless it is 0.
        """
        where = "(dry run)" if dry_run else output
        show.print_line(f"{where}: rank {report.rank} on {report.modules} modules, for {server}")
        for note in report.notes:
            show.print_line(f"  {note}")
        if report.rounding:
            show.print_line(f"  the dtype of the file rounds B by {report.rounding:.1g} of it")

    return Result({"output": None if dry_run else output, **vars(report)}, print_report)


def parse_rank(text: str) -> int | float:
    """Return a rank as int ≥ 1 for a text of digits, or a share of ‖ΔW‖² as float in (0, 1), without both ends.

    Raises OptionError for other texts, such as "0" and "1.0".
    """
    try:
        value: int | float = int(text) if text.isdigit() else float(text)
    except ValueError:
        value = 0
    if not (value >= 1 if isinstance(value, int) else 0 < value < 1):
        raise OptionError(f"--rank {text} is not possible. Give a rank such as 16, or a share of ‖ΔW‖² such as 0.99.")
    return value


LEAST = 1e-6


@add_verb
def verify(
    *,
    adapter: str,
    url: str,
    base: str | None = None,
    model: str = "adapter",
    base_name: str = "base",
    server: str | None = None,
    dtype: str = "float32",
    tolerance: Annotated[float | None, typer.Option(min=0)] = None,
    timeout: Annotated[float, typer.Option(min=0.01)] = 60,
    api_key: Annotated[str | None, typer.Option(envvar="GRAFT_API_KEY")] = None,
    device: str = "cpu",
) -> Result:
    """Ask a running server for log-probabilities, and compare them with graft's on the same weights.

    Prompts of token ids go to the base's name and to the adapter's. The verdict: applied; not applied; scale off by k;
    lm_head (or another part) missing; patterns not read; another adapter. Exit code 1 unless it is applied, 4 if the
    server's base is another.

    Example: graft verify --url http://localhost:8000 --model tuned --adapter out/adapter --base models/llama

    Args:
        adapter: The adapter, of any format, as it was trained or exported.
        url: Of the server: http://host:port
        model: The adapter's name on the server.
        base_name: The base's name there.
        server: vllm, sglang, llama.cpp or openai, if the server does not say it.
        dtype: Of the server: float32, float16, bfloat16.
        tolerance: Of a log-probability, in the mean.
        timeout: Seconds for each answer.
        api_key: Sent as a bearer token.
        device: Device for graft's own run.

    Returns:
        The document has the fields of `Verdict`, and ok; a problem unless ok. Options and the server are checked before
        the base is loaded.
    """
    from graft.command.models import attach_adapter, load_base
    from graft.files.ask import Connection, identify_server
    from graft.files.sources import require_base, resolve_adapter
    from graft.files.verify import check_verify_options
    from graft.files.verify import verify_server as compare

    check_verify_options(dtype, tolerance)
    connection = Connection(url, timeout, api_key)
    kind = identify_server(connection, server)  # first, since loading the base takes minutes
    source = resolve_adapter(adapter)
    local = load_base(require_base(source, base), device=device)
    answer = compare(
        connection, local, lambda _: attach_adapter(local, source), model, base_name, dtype, tolerance, kind
    )

    def report() -> None:
        """Print the verdict, the adapter's effect, the difference of both sides on the base and the tolerance.

        Then "The server's adapter is from" and a line for each deviation, with its name and value, the smallest first.
        """
        show.print_line(answer.text)
        show.print_line(
            f"  the adapter changes log-probabilities by {answer.effect:.3g}; on the base the two differ by"
        )
        show.print_line(
            f"  {format_difference(answer.noise)}; what counts as equal: {answer.tolerance:.2g}. "
            "The server's adapter is from"
        )
        for what, by in sorted(answer.deviations.items(), key=lambda item: item[1]):
            show.print_line(f"    {what:<20} {format_difference(by)}")

    return Result(asdict(answer) | {"ok": answer.ok}, report, not answer.ok)


def format_difference(value: float) -> str:
    """Return a difference of log-probabilities as a text with three significant digits.

    Values below float32's rounding are "below 1e-06", since they vary between machines.
    """
    return f"{value:.3g}" if value >= LEAST else f"below {LEAST:.0e}"
