"""The tests that are marked gpu, and the interpreter's script, each in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

from gpu.machine import ROOT
from gpu.measurement import Numbers, Skipped, Stage

MOST = 150  # seconds
KINDS = ("passed", "failed", "skipped", "errors")


def gpu_test_files(root: Path = ROOT) -> list[str]:
    """The files with tests that are marked gpu."""
    marker = "mark." + "gpu"
    files = sorted((root / "tests").rglob("test_*.py"))
    return [path.relative_to(root).as_posix() for path in files if marker in path.read_text(encoding="utf-8")]


def run_gpu_tests(stage: Stage) -> Numbers:
    """How many passed, failed and were skipped; without a GPU all are skipped."""
    files = gpu_test_files()
    if not files:
        raise Skipped("there are no tests here: labkit was installed without them")
    options = [
        "-q",
        "-m",
        "gpu",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
    ]
    command = [sys.executable, "-m", "pytest", *options, "--tb=short", "-rfE", *files]
    alone = os.environ | {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"
    }  # a plugin that lacks a package of its own would stop all
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=MOST)
    numbers = counts(done.stdout)
    if numbers["failed"]:
        print(done.stdout[-6000:], flush=True)
    if not any(numbers[kind] for kind in KINDS[:3]):
        raise RuntimeError(
            f"pytest ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-200:]}"
        )
    return numbers


def counts(output: str) -> Numbers:
    """What pytest's last line counts, and the names of what failed; a file that cannot be read has failed."""
    last = output.strip().splitlines()[-1] if output.strip() else ""
    found = {kind: re.search(rf"(\d+) {kind.rstrip('s')}", last) for kind in KINDS}
    count = {kind: int(match[1]) if match else 0 for kind, match in found.items()}
    failures = re.findall(r"^(?:FAILED|ERROR) (?:\S*/)?(\S+)", output, re.MULTILINE)
    return {
        "passed": count["passed"],
        "failed": count["failed"] + count["errors"],
        "skipped": count["skipped"],
        "failures": failures[:20],
    }


def interpret(stage: Stage) -> Numbers:
    """The kernels of a GPU in Triton's interpreter, on tiny weights, against the reference."""
    command = [sys.executable, "-m", "tests.quant.kernels.interpreted", "--few"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=MOST)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1][:200])
    return {"equal_bits": done.stdout.strip() == "equal bits"}
