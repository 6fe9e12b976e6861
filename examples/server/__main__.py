# SPDX-License-Identifier: Apache-2.0
"""OpenAI's completions from one base model and any number of adapters, which share batches."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

try:
    import uvicorn

    from .app import make_app
except ImportError as e:
    raise SystemExit(f"The server needs {e.name}: in a clone of graft, pip install -e '.[server]' brings it.") from e

from .models import Models


def main() -> None:
    parser = argparse.ArgumentParser("server", description=__doc__)
    parser.add_argument(
        "--base", metavar="FOLDER", help="a causal language model (default: SmolLM2, as the demo has it)"
    )
    parser.add_argument("--name", help="the base's name in requests (default: that of its folder)")
    parser.add_argument("--adapter", metavar="NAME=FOLDER", action="append", default=[], help="may come several times")
    parser.add_argument("--host", default="127.0.0.1", help="no request is asked who it is: keep to this machine")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--allow-host", metavar="NAME", action="append", default=[], help="a name by which clients know this server"
    )
    parser.add_argument("--connections", type=int, default=1000, help="open at once; more are answered 503")
    parser.add_argument("--most", type=int, default=16, help="rows in a batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    base = args.base
    if base is None:
        try:
            from examples.demo_lm.model import model_source
        except ModuleNotFoundError:  # installed by itself, without the demos
            parser.error("--base is needed: only a clone of graft has SmolLM2 as its default")
        base = model_source(None)
    models = Models(base, args.name or Path(base).name, args.device, args.most)
    for pair in args.adapter:
        name, _, folder = pair.partition("=")
        models.load(name, folder)
    app = make_app(models, {"localhost", args.host, *args.allow_host})
    uvicorn.run(app, host=args.host, port=args.port, limit_concurrency=args.connections)


if __name__ == "__main__":
    main()
