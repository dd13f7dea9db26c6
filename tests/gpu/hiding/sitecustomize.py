"""What Python runs first in a process of `tests.gpu.hiding.environment`: it hides packages, and blocks the network.

A hidden package is not found by `import`, by `importlib.util.find_spec` or by `importlib.metadata`, as if it had never been
installed. A connection to another machine fails, and is noted in a file.
"""

import os
import socket
import sys

HIDDEN = frozenset(os.environ.get("HIDDEN_PACKAGES", "").split())
HIDDEN_DISTRIBUTIONS = HIDDEN | frozenset(os.environ.get("HIDDEN_DISTRIBUTIONS", "").split())
ATTEMPTS = os.environ.get("NETWORK_ATTEMPTS")


class Hiding:
    """A finder of modules and distributions that does not find what is hidden."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

    def find_distributions(self, *context):
        find = getattr(self.finder, "find_distributions", lambda *context: ())
        return (found for found in find(*context) if found.name.lower() not in HIDDEN_DISTRIBUTIONS)


def refuse(itself, address, *_):
    """Connect to nothing but a process of this machine."""
    if itself.family == socket.AF_UNIX:
        return real_connect(itself, address)
    return unreachable(address)


def unreachable(host, *_, **__):
    """Note the attempt, and fail as a machine without a network does."""
    with open(ATTEMPTS, "a") as file:
        print(host, file=file)
    raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


if HIDDEN_DISTRIBUTIONS:
    sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
if ATTEMPTS:
    real_connect = socket.socket.connect
    socket.socket.connect = socket.socket.connect_ex = refuse
    socket.getaddrinfo = unreachable
