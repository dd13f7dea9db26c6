"""What Python runs first in a process of `tests.gpu.hiding.environment`: it hides packages, and blocks the network.

A hidden package is not found by `import`, by `importlib.util.find_spec` or by `importlib.metadata`, as if it had never been
installed. A connection to another machine fails, and is noted in a file.

To see what is missed without one package, and without another, one process is enough for all. Up to the moment when a
package is asked for, whether it is there makes no difference. Then the process forks: a child goes on to the end without
that package, in a folder with its name, and only then the parent goes on with it. A list of everything installed, as of all
entry points, is no question about one package.
"""

import os
import socket
import sys

HIDDEN = set(os.environ.get("HIDDEN_PACKAGES", "").split())
HIDDEN_DISTRIBUTIONS = HIDDEN | set(os.environ.get("HIDDEN_DISTRIBUTIONS", "").split())
NOT_ASKED_FOR = set(os.environ.get("FORKS_WITHOUT", "").split())
ATTEMPTS = os.environ.get("NETWORK_ATTEMPTS")


class Hiding:
    """A finder of modules and distributions that does not find what is hidden."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        fork_without(package)
        return None if package in HIDDEN else self.finder.find_spec(name, path, target)

    def find_distributions(self, *context):
        find = getattr(self.finder, "find_distributions", lambda *context: ())
        fork_without(getattr(context[0], "name", None) if context else None)
        return (found for found in find(*context) if found.name.lower() not in HIDDEN_DISTRIBUTIONS)


def fork_without(package):
    """When a package is first asked for, let a child go on without it, and wait for its end."""
    if package not in NOT_ASKED_FOR:
        return
    NOT_ASKED_FOR.remove(package)
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    NOT_ASKED_FOR.clear()
    HIDDEN.add(package)
    HIDDEN_DISTRIBUTIONS.add(package)
    os.mkdir(package)
    os.chdir(package)


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
