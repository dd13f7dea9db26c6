"""Start the course from this folder, for instance a USB stick, without a network.

    python3 start.py            # set up ~/lora-lab once (three minutes), then open JupyterLab
    python3 start.py --check    # only look whether every file is as it was made
    python3 start.py --fits     # only look whether the packages here are for this machine

Nothing is written to this folder, so it may be read-only. Before the first package is installed, every file is held
against SHA256SUMS; then pip holds each package against the hash in the course's locks. LORA_LAB is another place than
~/lora-lab. Written for any Python 3, because it must be able to say that one is too old.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
NEEDS_GB = 4.0  # packages, unpacked, and the model


def fail(sentence):
    sys.exit("error: " + sentence)


def this_platform():
    """What packages must be made for: system, processor, Python."""
    return "%s-%s-py%d.%d" % (platform.system().lower(), platform.machine().lower(), *sys.version_info[:2])


def packages_here():
    """The folder with packages for this machine."""
    there = sorted(os.listdir(os.path.join(HERE, "packages")))
    if this_platform() not in there:
        fail(
            "the packages here are for %s, and this machine is %s; start it with that Python if you have it, or run "
            "`make bundle` on a machine like this one that has a network. Nothing was installed"
            % (", ".join(there) or "no machine at all", this_platform())
        )
    return os.path.join(HERE, "packages", this_platform())


def read_sums():
    """{path below this folder: sha256}."""
    try:
        with open(os.path.join(HERE, "SHA256SUMS"), encoding="utf-8") as file:
            rows = [line.rstrip("\n").split("  ", 1) for line in file]
        return {path: digest for digest, path in rows}
    except (OSError, ValueError):
        fail("SHA256SUMS is missing or damaged: copy the whole folder again. Nothing was installed")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def verify(sums):
    """Stop with one sentence unless every file that this machine uses is as it was made."""
    mine = "packages/" + this_platform() + "/"
    for path, expected in sorted(sums.items()):
        if path.startswith("packages/") and not path.startswith(mine):
            continue
        try:
            if sha256(os.path.join(HERE, *path.split("/"))) == expected:
                continue
            what = "is damaged"
        except FileNotFoundError:
            what = "is missing"
        except OSError as error:
            what = "cannot be read (%s)" % error.strerror
        fail(
            "%s %s: copy the whole folder again, from where it is whole. Nothing was installed" % (path, what)
        )


def copy_course(sums, place):
    """Put the course into `place`, whole or not at all; what is there already, with somebody's work in it, stays."""
    if os.path.isdir(os.path.join(place, "labkit")):
        return
    if os.path.isdir(place) and os.listdir(place):
        fail("%s is a folder of something else: move it away, or set LORA_LAB to another place" % place)
    part = place + ".part"
    shutil.rmtree(part, ignore_errors=True)
    for path in sums:
        if path.startswith("course/"):
            target = os.path.join(part, *path.split("/")[1:])
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copyfile(
                os.path.join(HERE, *path.split("/")), target
            )  # without the stick's read-only bits
    if os.path.isdir(place):
        os.rmdir(place)
    os.rename(part, place)


def first_notebook(place):
    """The student's copy of the first lesson if the bundle has one, else the lesson."""
    for folder in ("build/student", "notebooks"):
        name = folder + "/00_start_here.ipynb"
        if os.path.exists(os.path.join(place, *name.split("/"))):
            return name
    fail("%s holds no lesson: remove that folder, and start again" % place)


def environment(packages):
    """The variables of this process, and that pip takes packages from here alone."""
    ours = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": packages, "PIP_CONFIG_FILE": os.devnull}
    return dict(os.environ, **ours)


def run(command, place, variables):
    done = subprocess.run(command, cwd=place, env=variables)
    if done.returncode:
        sys.exit(done.returncode)


def main(arguments):
    if sys.version_info < (3, 11):
        fail("Python %d.%d is too old; start this with Python 3.11 or newer" % sys.version_info[:2])
    packages = packages_here()
    if "--fits" in arguments:
        return print("%s, for this machine (%s)" % (HERE, this_platform()))
    place = os.path.abspath(os.path.expanduser(os.environ.get("LORA_LAB") or "~/lora-lab"))
    sums = read_sums()
    is_new = not os.path.exists(os.path.join(place, ".venv", ".labkit-ready"))
    if is_new or "--check" in arguments:
        print("Checking %d files of this bundle." % len(sums), flush=True)
        verify(sums)
    if "--check" in arguments:
        return print("Every file is as it was made.")
    os.makedirs(os.path.dirname(place), exist_ok=True)
    free = shutil.disk_usage(os.path.dirname(place)).free / 1e9
    if is_new and free < NEEDS_GB:
        fail("%.1f GB free for %s, but %.0f GB are needed; free some space first" % (free, place, NEEDS_GB))
    copy_course(sums, place)
    variables = environment(packages)
    run([sys.executable, os.path.join("scripts", "setup_env.py"), ".venv"], place, variables)
    python = os.path.join(
        place, ".venv", *(["Scripts", "python.exe"] if os.name == "nt" else ["bin", "python"])
    )
    with open(os.path.join(place, "bundle.json"), "w") as file:
        json.dump({"from": HERE, "packages": os.path.basename(packages)}, file)
    run([python, "-m", "labkit.models", "fetch", "smollm2-135m"], place, variables)
    if "--no-lab" in arguments:
        return print("Ready: %s" % place)
    run([python, os.path.join("scripts", "open_lab.py"), first_notebook(place)], place, variables)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        fail("interrupted; start again, it goes on with what is there")
    except OSError as error:
        fail("cannot set up the course: %s" % error)
