"""The door to a server of many adapters (`labkit.serving.server`) from the command line.

    export LABKIT_TOKEN=$(python -c "import secrets; print(secrets.token_urlsafe())")
    python -m labkit.serve --registry ~/adapters --port 8000

Any client of OpenAI's API speaks to http://127.0.0.1:8000/v1 with that token, and http://127.0.0.1:8000/dashboard shows
what the server does. Ctrl-C or SIGTERM finishes what is being answered, and the exit status is 0; 1 is an error, with
one line that says which; 2 is an option that does not exist. `docs/serving.md` has the rest.
"""

import argparse
import errno
import os
import signal
import socket
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from labkit import models
from labkit.checks import check_whole, needed
from labkit.lora.fingerprint import differences
from labkit.serving.adapter_cache import AdapterCache
from labkit.serving.arguments import PLACE
from labkit.serving.batched import AdapterBank
from labkit.serving.engine import Engine
from labkit.serving.registry import Registry
from labkit.serving.rows import EngineLimits
from labkit.serving.trial_options import add_trial_options, rollouts_of

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
    add_trial_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Serve until a signal ends it."""
    chosen = make_parser().parse_args(arguments)
    try:
        for package in ("uvicorn", "fastapi", "prometheus_client"):
            needed(package, "python -m labkit.serve")
        check_token(chosen.token)
        # a port that is taken is noticed before a model is read
        with bound(chosen.host, chosen.port) as listener:
            app = app_of(chosen)
            announce(chosen.host, listener.getsockname()[1])
            run(app, listener, chosen.drain)
    except (ValueError, LookupError, RuntimeError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # while the model was being read
        sys.exit(130)


def leave(number: int, frame: Any) -> None:
    """End the process as it was asked to; uvicorn has finished the answers when it hands on a signal."""
    sys.exit(0)


def check_token(token: str | None) -> None:
    """Raise a `ValueError` unless there is a token."""
    if not (token or "").strip():
        raise ValueError(f"no token; set {TOKEN}, which every request must bring")


def bound(host: str, port: int) -> socket.socket:
    """A socket at that address, on which nothing is accepted yet.

    Raises:
        ValueError: the port is taken or out of range, or the host is none of this machine's.
    """
    if not 0 <= port < 2**16:  # the resolver would take it modulo 65,536
        raise ValueError(f"port={port} must be from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"--host {host} is no address of this machine ({error})") from None
    try:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} of {host} is in use; give another --port, or 0 for any") from None
        raise ValueError(f"--host {host} --port {port} cannot be used: {error}") from None
    return listener


def announce(host: str, port: int) -> None:
    """Say where the server is, and who may reach it."""
    shown = f"[{host}]" if ":" in host else host
    print(f"serving at http://{shown}:{port}/v1; dashboard: http://{shown}:{port}/dashboard", flush=True)
    if not is_own(host):
        warning = "other machines reach this port, and tokens and texts cross the network unencrypted"
        print(f"warning: {warning}; put a proxy with TLS before it", file=sys.stderr, flush=True)


def is_own(host: str) -> bool:
    """Does the address reach this machine alone?"""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def app_of(chosen: argparse.Namespace) -> Any:
    """The application that the arguments ask for.

    Raises:
        ValueError: no base, another base than the registry's, or a setting out of its range.
        FileNotFoundError: there is no such registry.
    """
    from labkit.serving.server import make_app
    from labkit.serving.service import Service

    registry = None if chosen.registry is None else Registry(chosen.registry)
    name = chosen.base or (registry.base.name if registry else None)
    if name is None:
        raise ValueError("give --registry, or --base with the name of a model")
    check_whole("drain", chosen.drain, at_least=0)
    limits = EngineLimits(rows=chosen.rows, queue=chosen.queue, seconds=chosen.seconds)
    model, tokenizer = models.load(name, dtype=chosen.dtype)
    bank = AdapterBank(model)
    if registry is not None:
        check_same_base(registry, name, bank.fingerprint)
    engine = Engine(bank, {}, limits, AdapterCache(bank, chosen.budget * 2**20))
    rollouts = rollouts_of(registry, chosen)
    service = Service(engine, tokenizer, name, registry, chosen.adapters, rollouts)
    return make_app(service, chosen.token)


def check_same_base(registry: Registry, name: str, here: dict[str, str]) -> None:
    """Raise a `ValueError` unless the model is the one that the registry's adapters are for.

    A form of it that the registry does not know, such as bf16 beside fp32, has other bytes, and nothing to compare.
    """
    differs = sorted({part for form in registry.base.forms for part in differences(form, here)})
    if differs:
        raise ValueError(
            f"the adapters in {registry.root} are for {registry.base.name}, and {name} is another model (they differ "
            f"in: {', '.join(differs)}); leave out --base, or give another --registry"
        )


def run(app: Any, listener: socket.socket, drain: int) -> None:
    """Answer until a signal comes, and finish what is being answered then, for at most `drain` seconds."""
    import uvicorn

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    config = uvicorn.Config(app, timeout_graceful_shutdown=drain, timeout_keep_alive=5, server_header=False)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
