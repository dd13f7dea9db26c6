"""The door to a server of many adapters (`labkit.serving.server`) from the command line.

    export LABKIT_TOKEN=$(python -c "import secrets; print(secrets.token_urlsafe())")
    python -m labkit.serve --registry ~/adapters --port 8000

Any client of OpenAI's API speaks to http://127.0.0.1:8000/v1 with that token. Ctrl-C finishes what is being answered.
"""

import argparse
import os
import sys
from pathlib import Path

from labkit import models
from labkit.checks import needed
from labkit.serving.adapter_cache import AdapterCache
from labkit.serving.arguments import PLACE
from labkit.serving.batched import AdapterBank
from labkit.serving.engine import Engine
from labkit.serving.registry import Registry
from labkit.serving.rows import EngineLimits

TOKEN = "LABKIT_TOKEN"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m labkit.serve",
        description="Serve a base and the adapters of a registry, as OpenAI does.",
    )
    parser.add_argument("--registry", type=Path, default=os.environ.get(PLACE), help=f"default: {PLACE}")
    parser.add_argument("--base", help="as labkit.models.load takes it; default: that of the registry")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    parser.add_argument("--token", default=os.environ.get(TOKEN), help=f"default: {TOKEN}")
    parser.add_argument("--adapters", type=Path, help="adapters below this folder may be loaded by path")
    parser.add_argument("--rows", type=int, default=16, help="requests that are written at once")
    parser.add_argument("--queue", type=int, default=256, help="requests that wait")
    parser.add_argument("--seconds", type=float, default=120.0, help="that a request may take")
    parser.add_argument("--budget", type=int, default=256, help="MiB of adapters in memory")
    parser.add_argument("--drain", type=int, default=30, help="seconds to finish answers at the end")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Serve until a signal ends it."""
    chosen = make_parser().parse_args(arguments)
    try:
        uvicorn = needed("uvicorn", "python -m labkit.serve")
        for package in ("fastapi", "prometheus_client"):
            needed(package, "python -m labkit.serve")
        app = app_of(chosen)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    uvicorn.run(
        app,
        host=chosen.host,
        port=chosen.port,
        timeout_graceful_shutdown=chosen.drain,
        timeout_keep_alive=5,
        server_header=False,
    )


def app_of(chosen: argparse.Namespace):
    """The application that the arguments ask for.

    Raises:
        ValueError: no base, no token, or a setting out of its range.
        FileNotFoundError: there is no such registry.
    """
    from labkit.serving.server import make_app
    from labkit.serving.service import Service

    if not chosen.token:
        raise ValueError(f"no token; set {TOKEN}, which every request must bring")
    registry = None if chosen.registry is None else Registry(chosen.registry)
    name = chosen.base or (registry.base.name if registry else None)
    if name is None:
        raise ValueError("give --registry, or --base with the name of a model")
    limits = EngineLimits(rows=chosen.rows, queue=chosen.queue, seconds=chosen.seconds)
    model, tokenizer = models.load(name, dtype=chosen.dtype)
    bank = AdapterBank(model)
    engine = Engine(bank, {}, limits, AdapterCache(bank, chosen.budget * 2**20))
    return make_app(Service(engine, tokenizer, name, registry, chosen.adapters), chosen.token)


if __name__ == "__main__":
    main()
