"""`python -m labkit.serve` as a process of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.serving.servers import TOKEN, Running

PATIENCE = 600  # seconds: on a busy machine the imports alone take minutes


class Process(Running):
    """A server in a process.

    Args:
        port: where it answers.
        popen: the process.
        log: what it printed.
    """

    def __init__(self, port: int, popen: subprocess.Popen, log: Path):
        super().__init__(port)
        self.popen, self.log = popen, log

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; the exit status."""
        self.popen.send_signal(how)
        return self.popen.wait(PATIENCE)


def begin(log: Path, *arguments: str) -> subprocess.Popen:
    """A process that begins to serve; what it prints goes to `log`."""
    environment = os.environ | {"LABKIT_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "labkit.serve", *arguments]
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def ready(popen: subprocess.Popen, log: Path) -> Process:
    """The server, once it answers."""
    for _ in range(PATIENCE * 10):
        assert popen.poll() is None, f"it ended before it answered: {log.read_text()}"
        said = re.search(r"serving at http://[^ ]*:(\d+)/v1", log.read_text())
        if said and "startup complete" in log.read_text():
            return Process(int(said[1]), popen, log)
        time.sleep(0.1)
    raise AssertionError(f"it does not answer: {log.read_text()}")


@contextmanager
def serving(log: Path, *arguments: str) -> Iterator[Process]:
    """A server on a free port, for as long as the block."""
    popen = begin(log, "--port", "0", *arguments)
    try:
        yield ready(popen, log)
    finally:
        popen.kill()
        popen.wait()
