"""llama.cpp's server in a process of its own, by the package xllamacpp, which has no command for it.

    python -m recipes.serving_engines.llama_server base.gguf sql.gguf prose.gguf --port 8090

It has as many adapters as it was started with, numbered from 0, all off unless a request turns one on. It serves until
it is killed, and does not begin if a file cannot be loaded.
"""

import argparse
import signal
from pathlib import Path

from labkit.checks import needed
from labkit.formats import llama_cpp

ERRORS = 1  # llama.cpp's level that prints what went wrong, and nothing else


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("adapters", type=Path, nargs="*")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rows", type=int, default=16, help="requests at once")
    parser.add_argument("--context", type=int, default=512, help="tokens of each")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    params = llama_cpp.settings(
        chosen.model, chosen.adapters, context=chosen.context, threads=chosen.threads, rows=chosen.rows
    )
    params.port, params.lora_init_without_apply, params.verbosity = chosen.port, True, ERRORS
    server = needed("xllamacpp", "running llama.cpp").Server(params)
    print(f"serving at {server.listening_address}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
