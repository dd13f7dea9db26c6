"""Is this machine ready for a lesson? A line for each thing that matters, and what to do about it.

    python scripts/check_room.py                  # or: make room
    ssh pc17 'cd lora-lab && make -s room' | tail -1     # the last line sums it up, for a table of thirty machines

It runs before anything is installed, on any Python 3. Where the course is installed already, its own Python says what
the machine gives to a program (a container may have less than the machine), and how fast it multiplies. The exit status
is 0 if lessons will run, 1 if something must be done first.
"""

import ctypes
import getpass
import os
import platform
import shutil
import socket
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(ROOT, "scripts"))

import setup_env  # noqa: E402

OK, WARNING, PROBLEM = "OK", "WARNING", "PROBLEM"
PORT = 8888
NEEDS_GB, MODEL_GB, MEMORY_GB, SLOW = 3.0, 0.9, 4.0, 30.0
ASK = """
import json
from labkit.hardware import best_device, limits
from labkit.lab.machine import gflops, model_line
mine, model = limits(), model_line()
print(json.dumps({"cores": mine.cpus, "memory": mine.memory, "free": mine.free, "device": str(best_device()),
                  "speed": gflops(0.3), "model": [model.state, model.found, model.advice]}))
"""


def python_line(version=None):
    version = tuple(version or sys.version_info[:3])
    found = "%d.%d.%d on %s %s" % (*version[:3], platform.system(), platform.machine())
    if version < (3, 11):
        return (
            "Python",
            PROBLEM,
            found,
            "install Python 3.11 or newer; `make PYTHON=python3.12 room` asks another one",
        )
    return "Python", OK, found, ""


def packages_line(venv):
    if setup_env.is_ready(venv, setup_env.wanted_stamp(ROOT)):
        return "packages", OK, "installed in .venv, at the locked versions", ""
    found = "an older set in .venv" if os.path.isdir(venv) else "not installed"
    return (
        "packages",
        WARNING,
        found,
        "run `make model`, or start.py of a bundle: 3 minutes and no network needed with it",
    )


def bundle_line(folders):
    for folder in folders:
        script = os.path.join(folder, "start.py")
        if os.path.exists(script):
            done = subprocess.run(
                [sys.executable, "-B", script, "--fits"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            said = (done.stdout.decode().strip().splitlines() or ["start.py says nothing"])[-1]
            if done.returncode == 0:
                return "bundle", OK, said, ""
            return "bundle", WARNING, "in %s, for other machines" % folder, said[len("error: ") :]
    return "bundle", OK, "none here", "only needed without a network: `make bundle` makes one"


def disk_line(ready):
    free = shutil.disk_usage(ROOT).free / 1e9
    needed = 1.0 if ready else NEEDS_GB + MODEL_GB
    if free < needed:
        return "disk", PROBLEM, "%.1f GB free" % free, "free space until there are %.0f GB" % needed
    return "disk", OK, "%.0f GB free" % free, ""


def memory_bytes():
    """(all, free or None) of the machine, by what each system offers without a package; (None, None) if nothing does."""
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            rows = dict(line.split(":")[:2] for line in file)
        return tuple(1024 * int(rows[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    if sys.platform == "darwin":
        return int(subprocess.check_output(["sysctl", "-n", "hw.memsize"])), None
    if os.name == "nt":
        rows = (ctypes.c_ulonglong * 8)()  # MEMORYSTATUSEX: length and load, total, free, …
        ctypes.cast(rows, ctypes.POINTER(ctypes.c_ulong))[0] = ctypes.sizeof(rows)
        if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(rows)):
            return rows[1], rows[2]
    return None, None


def memory_line(total, free):
    if total is None:
        return "memory", WARNING, "unknown", "lessons that train need 4 GB"
    found = "%.1f GB" % (total / 1e9) + (", %.1f free" % (free / 1e9) if free is not None else "")
    if total < MEMORY_GB * 1e9 * 0.95:
        return "memory", WARNING, found, "lessons 08 and 10 need 4 GB: pair this seat with another for them"
    if free is not None and free < 2e9:
        return "memory", WARNING, found, "close other programs: lessons that train need 2 to 3 GB"
    return "memory", OK, found, ""


def cores_line(cores):
    if cores < 2:
        return "cores", WARNING, str(cores), "lessons run at half the stated speed or less"
    return "cores", OK, str(cores), ""


def port_line(port=PORT):
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return (
                "port",
                WARNING,
                "%d is taken" % port,
                "JupyterLab takes the next one: use the link that it prints",
            )
    return "port", OK, "%d is free" % port, ""


def write_line():
    """May this account write here? Two people on one account share what they write, so it is said which account."""
    try:
        account = getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as in some containers
        account = "this account"
    if not os.access(ROOT, os.W_OK):
        return (
            "folder",
            PROBLEM,
            "%s may not write to it" % account,
            "copy the course into a folder of your own",
        )
    return (
        "folder",
        OK,
        "%s may write to it" % account,
        "one account for each seat, or two people save over each other",
    )


def speed_line(speed, device):
    if speed is None:
        return "speed", OK, "not measured yet", "is measured once the packages are there"
    found = "%.0f GFLOP/s on %s" % (speed, device)
    if speed < SLOW:
        return (
            "speed",
            WARNING,
            found,
            "start 08 early, and take the stated minutes times %.0f" % (140 / speed),
        )
    return "speed", OK, found, ""


def ask_labkit(venv):
    """What the installed course says about the machine, as a dictionary; empty if it is not there or fails."""
    import json

    python = setup_env.python_of(venv)
    if not os.path.exists(python):
        return {}
    done = subprocess.run([python, "-c", ASK], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        return json.loads(done.stdout.decode().strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {}


def check(venv, bundles):
    """All lines, each as (what, state, what was found, what to do)."""
    ready = packages_line(venv)
    known = ask_labkit(venv)
    total, free = (known["memory"], known["free"]) if known else memory_bytes()
    model = (
        ("model", *known["model"])
        if known
        else ("model", WARNING, "not looked for", "comes with `make model`")
    )
    return [
        python_line(),
        ready,
        model,
        bundle_line(bundles),
        disk_line(ready[1] == OK and model[1] == OK),
        memory_line(total, free),
        cores_line(known.get("cores") or os.cpu_count() or 1),
        port_line(),
        write_line(),
        speed_line(known.get("speed"), known.get("device")),
    ]


def main(arguments):
    venv = os.path.join(ROOT, ".venv")
    lines = check(
        venv, [*arguments, os.environ.get("LABKIT_BUNDLE", ""), os.path.join(ROOT, "build", "bundle")]
    )
    for what, state, found, advice in lines:
        print("%-8s %-9s %s%s" % (state, what, found, "  ->  " + advice if advice and state != OK else ""))
    problems, warnings = ([w for w, state, *_ in lines if state == s] for s in (PROBLEM, WARNING))
    verdict = "not ready: " + ", ".join(problems) if problems else "ready"
    print(
        "%s: %s%s" % (socket.gethostname(), verdict, "; look at " + ", ".join(warnings) if warnings else "")
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
