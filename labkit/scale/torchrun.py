"""Ranks started by `torchrun`, as on a cluster: a script, its environment, and exit codes.

`labkit.scale.ranks` starts a function and hears from each rank. torchrun starts a *script* once per rank, with RANK,
WORLD_SIZE and the place where they find one another in its environment (`world.joined` reads them), and sees whether
each ends well. It picks a free port (`--standalone`), and ends all ranks when one fails.

Source: `torch/distributed/run.py`; its ranks are sessions of their own, so only torchrun itself can end them: it is
asked to (SIGTERM), and given time for it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from labkit.checks import check_positive, check_whole

TO_END = 20.0  # seconds for torchrun to end its ranks
ERROR = re.compile(r"(?:\[rank\d+\]:\s*)?([A-Za-z_.]*(?:Error|Exception|Failed|Ranks|Sharded)(?:: .*)?)$")


class ScriptFailed(RuntimeError):
    """A script under torchrun failed, or took too long; the message says what the first rank that failed said."""


def torchrun(script: str | Path, ranks: int, *arguments: str, seconds: float = 120.0) -> str:
    """Run `torchrun --standalone --nproc-per-node RANKS SCRIPT ARGUMENTS`, and give what it printed.

    Args:
        script: a Python file that joins the ranks (`with labkit.scale.joined(): …`).
        ranks: how many, on this machine.
        arguments: of the script.
        seconds: after which all are ended.

    Raises:
        ScriptFailed: a rank failed, or it took longer.
        ValueError: there is no such script, or a setting is out of range.
    """
    check_whole("ranks", ranks, usual="one per GPU, or 2 to try it on a CPU")
    check_positive("seconds", seconds)
    if not Path(script).is_file():
        raise ValueError(f"script={str(script)!r} is not a file; give a Python file that joins the ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    paths = [
        entry for entry in (*sys.path, os.environ.get("PYTHONPATH", "")) if entry
    ]  # what is found here is found there
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    process = subprocess.Popen(
        [*command, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    try:
        printed, complained = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise ScriptFailed(
            f"{Path(script).name} took more than {seconds:g} seconds on {ranks} ranks; all were ended"
        ) from None
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.communicate(timeout=TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
    if process.returncode:
        raise ScriptFailed(f"{Path(script).name} failed on {ranks} ranks: {first_error(complained)}")
    return printed


def first_error(complained: str) -> str:
    """The line of the first exception in what the ranks wrote to stderr."""
    lines = [ERROR.match(line.strip()) for line in complained.splitlines()]
    errors = [found[1] for found in lines if found and "ChildFailedError" not in found[1]]
    return errors[0] if errors else "it said nothing; run the script alone to see more"
