"""Create a virtual environment and install the course into it; quick when that is done already.

Written for any Python 3, because its first job is to say so when Python is too old. Every package is installed from
requirements/*.lock: at that version, and only if the file has a hash that stands there. PyTorch's CPU build is taken
where pip is set up to find it, and otherwise what PyPI has for this machine.

It leaves a stamp with a hash of what it installed from as its last step. If it was killed before that, the next call
begins with an empty environment: half a package looks like a whole one. (The downloads are in pip's cache.)
"""

import hashlib
import os
import shutil
import subprocess
import sys

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NEEDS_GB = 3.0
LOCKS = ["requirements/%s.lock" % name for name in ("all", "torch-cpu", "torch")]
STAMP, UNDER_WAY, LOCK = ".labkit-ready", ".labkit-under-way", ".labkit-lock"


def fail(sentence):
    sys.exit("error: " + sentence)


def wanted_stamp(root):
    digest = hashlib.sha256(sys.version.encode())
    for name in ["pyproject.toml", *LOCKS]:
        with open(os.path.join(root, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def is_ready(venv, stamp):
    path = os.path.join(venv, STAMP)
    if not (os.path.exists(path) and os.path.exists(python_of(venv))):
        return False
    with open(path) as file:
        return file.read().strip() == stamp


def python_of(venv):
    return os.path.join(venv, *(["Scripts", "python.exe"] if os.name == "nt" else ["bin", "python"]))


def run(command, what):
    if subprocess.call(command, close_fds=False) != 0:  # it keeps the lock, even if this process is killed
        fail(
            "could not %s (the reason is above); check the network and the free disk space, then run make again: "
            "what was downloaded is kept" % what
        )


def wait_for_others(file, venv):
    """Lock an open file; the system lets go of it when this process and pip, which inherits it, have ended."""
    os.set_inheritable(file.fileno(), True)
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("Another make is setting up %s; waiting for it." % venv, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)


def mark(path, text=""):
    """Write a small file whole or not at all."""
    with open(path + ".part", "w") as file:
        file.write(text)
    os.replace(path + ".part", path)


def has_pip(venv):
    command = [python_of(venv), "-c", "import pip"]
    return os.path.exists(command[0]) and subprocess.call(command, stderr=subprocess.DEVNULL) == 0


def make_venv(venv):
    """Make the virtual environment, unless there is one that was left in order."""
    begun = os.path.exists(os.path.join(venv, UNDER_WAY))
    mark(os.path.join(venv, UNDER_WAY))
    if begun or not has_pip(venv):
        for name in os.listdir(venv):
            path = os.path.join(venv, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            elif name not in (UNDER_WAY, LOCK):
                os.remove(path)
        run(
            [sys.executable, "-m", "venv", venv],
            "create the virtual environment (on Debian: apt install python3-venv)",
        )


def install(venv, root):
    pip = [python_of(venv), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    everything, torch_cpu, torch = (
        [*pip, "--require-hashes", "--requirement", os.path.join(root, name)] for name in LOCKS
    )
    run(everything, "install the packages")
    if subprocess.call(torch_cpu, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) != 0:
        run(torch, "install PyTorch")
    run([*pip, "--no-build-isolation", "--editable", root], "install the course itself")


def main(venv):
    if sys.version_info < (3, 11):
        fail(
            "Python %d.%d is too old; install Python 3.11 or newer and run `make PYTHON=python3.11 lab`"
            % sys.version_info[:2]
        )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    stamp = wanted_stamp(root)
    if is_ready(venv, stamp):
        return
    free = shutil.disk_usage(root).free / 1e9
    if free < NEEDS_GB:
        fail(
            "%.1f GB free on the disk of this folder, but the packages need %.0f GB; free some space first"
            % (free, NEEDS_GB)
        )
    os.makedirs(venv, exist_ok=True)
    with open(os.path.join(venv, LOCK), "w") as file:
        wait_for_others(file, venv)
        if is_ready(venv, stamp):
            return
        print("Setting up %s: about three minutes, and 1 GB of packages the first time." % venv, flush=True)
        make_venv(venv)
        install(venv, root)
        mark(os.path.join(venv, STAMP), stamp)
        os.remove(os.path.join(venv, UNDER_WAY))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        fail("interrupted; run make again, it begins with what was downloaded so far")
    except OSError as error:
        fail("cannot set up %s: %s" % (sys.argv[1], error))
