"""Create a virtual environment and install the course into it; quick when that is done already.

Written for any Python 3, because its first job is to say so when Python is too old. It leaves a stamp with a hash of
pyproject.toml and constraints.txt as its last step: an interrupted set-up has no stamp and is done again.
"""

import hashlib
import os
import shutil
import subprocess
import sys

NEEDS_GB = 3.0
EXTRAS = "lab,test"


def fail(sentence):
    sys.exit("error: " + sentence)


def wanted_stamp(root):
    digest = hashlib.sha256(sys.version.encode() + EXTRAS.encode())
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(root, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def is_ready(stamp_path, stamp, python):
    if not (os.path.exists(stamp_path) and os.path.exists(python)):
        return False
    with open(stamp_path) as file:
        return file.read().strip() == stamp


def run(command, what):
    if subprocess.call(command) != 0:
        fail(
            "could not %s (the reason is above); check the network and the free disk space, then run make again: "
            "it goes on where it stopped" % what
        )


def main(venv):
    if sys.version_info < (3, 11):
        fail(
            "Python %d.%d is too old; install Python 3.11 or newer and run `make PYTHON=python3.11 lab`"
            % sys.version_info[:2]
        )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    python = os.path.join(venv, "bin", "python")
    stamp_path, stamp = os.path.join(venv, ".labkit-ready"), wanted_stamp(root)
    if is_ready(stamp_path, stamp, python):
        return
    free = shutil.disk_usage(root).free / 1e9
    if free < NEEDS_GB:
        fail(
            "%.1f GB free on the disk of this folder, but the packages need %.0f GB; free some space first"
            % (free, NEEDS_GB)
        )
    print("Setting up %s: about a minute, and 1 GB of packages the first time." % venv, flush=True)
    if not os.path.exists(python):
        run(
            [sys.executable, "-m", "venv", venv],
            "create the virtual environment (on Debian: apt install python3-venv)",
        )
    constraints = os.path.join(root, "constraints.txt")
    pip = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--constraint",
        constraints,
    ]
    run([*pip, "--editable", "%s[%s]" % (root, EXTRAS)], "install the packages")
    with open(stamp_path + ".part", "w") as file:
        file.write(stamp)
    os.replace(stamp_path + ".part", stamp_path)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        fail("interrupted; run make again, it goes on where it stopped")
