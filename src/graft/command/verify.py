# SPDX-License-Identifier: Apache-2.0
"""`graft verify`: does a running server apply an adapter?"""

from __future__ import annotations

from typing import Annotated

import typer

from graft.command import show
from graft.command.app import SERVE, Result, verb

LEAST = 1e-6


@verb(SERVE)
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
    """Ask a running server for log-probabilities, and compare them with graft's own on the same weights.

    Prompts of token ids go to the base's name and to the adapter's. The verdict: applied; not applied; scale off by k;
    lm_head (or another part) missing; patterns not read; another adapter. Exit code 1 unless it is applied, 4 if the
    server's base is another.

    Example: graft verify --url http://localhost:8000 --model tuned --adapter out/adapter --base models/llama

    Args:
        adapter: The adapter, of any format, as it was trained or exported.
        url: Of the server: http://host:port
        model: The adapter's name on the server.
        base_name: The base's name there.
        server: vllm, sglang, llama.cpp or openai, if the server does not tell.
        dtype: In which the server computes: float32, float16, bfloat16.
        tolerance: Of a log-probability, in the mean.
        timeout: Seconds for each answer.
        api_key: Sent as a bearer token.
        device: On which graft computes.
    """
    from graft.command.models import load_base, on
    from graft.files.sources import local, need_base
    from graft.serving.ask import Connection, server_of
    from graft.serving.verify import check_options
    from graft.serving.verify import verify as compare

    check_options(dtype, tolerance)
    connection = Connection(url, timeout, api_key)
    kind = server_of(connection, server)  # before the base is loaded, which takes minutes
    source = local(adapter)
    own = load_base(need_base(source, base), device=device)
    found = compare(connection, own, lambda _: on(own, source), model, base_name, dtype, tolerance, kind)

    def report() -> None:
        show.say(found.text)
        show.say(f"  the adapter changes log-probabilities by {found.effect:.3g}; on the base the two differ by")
        show.say(f"  {figure(found.noise)}; what counts as equal: {found.tolerance:.2g}. The server's adapter is from")
        for what, by in sorted(found.deviations.items(), key=lambda item: item[1]):
            show.say(f"    {what:<20} {figure(by)}")

    return Result(found.as_dict(), report, not found.ok)


def figure(value: float) -> str:
    """Return a difference of log-probabilities; what is below float32's rounding differs between machines."""
    return f"{value:.3g}" if value >= LEAST else f"below {LEAST:.0e}"
