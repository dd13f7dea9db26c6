"""The third witness of a step's memory: what the operating system saw of it, in a process of its own."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

from torch.optim import AdamW

from labkit.memory.measurement import TrainingStep, static_all, storages
from labkit.memory.setup import Setup
from labkit.memory.subjects import make_batch, real_model

TAKE_STEPS = "import json, sys; from labkit.memory.resident import take_steps; print(json.dumps(take_steps(**json.loads(sys.argv[1]))))"
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # of glibc


def measure_resident(name: str, method: str = "qlora", give_back: bool = True, **settings) -> dict[str, int]:
    """What the operating system sees of a step in a process of its own: the third witness.

    A process does not give back all that it frees: glibc keeps blocks that it may need again, between others that are in use.
    That is the allocator's overhead on a CPU, and it can be larger than the step.

    Args:
        name: of a model that `labkit.models.load` knows; method, settings: as for `labkit.memory.plan`.
        give_back: tell glibc to give back every freed block of 64 kB or more at once: then resident memory is what is in use.

    Returns:
        Bytes: `before` (resident when model and optimizer state are there, at the start of a step), `peak` (the most while
        stepping), `step` (peak - before), `allocated` (the same of PyTorch's allocator: its peak less what is static).

    Raises:
        RuntimeError: the process failed, or this system does not tell (it takes Linux's /proc).
    """
    arguments = json.dumps({"name": name, "method": method, **settings})
    environment = os.environ | (GIVE_BACK if give_back else {})
    command = [sys.executable, "-c", TAKE_STEPS, arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise RuntimeError(f"the step in a process of its own failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def take_steps(name: str, method: str, **settings) -> dict[str, int]:
    setup = Setup(method=method, **settings)
    model = real_model(name, setup)
    batch = make_batch(model.config.vocab_size, setup.batch, setup.sequence, setup.supervised)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
    step = TrainingStep(model, batch, optimizer, parameters, setup.checkpointing, setup.logits, 1.0)
    small = make_batch(model.config.vocab_size, 1, 2)
    with step.prepared():
        TrainingStep(
            model, small, optimizer, parameters, setup.checkpointing, setup.logits, 1.0
        )()  # state, kernels
        gc.collect()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        for _ in range(2):
            step()
        peak = status("VmHWM")
        _, allocated, _ = step.by_allocator()
        static = sum(storages(static_all(model, optimizer, batch)))
    return {"before": before, "peak": peak, "step": peak - before, "allocated": allocated - static}


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    path = Path("/proc/self/status")
    if not path.exists():
        raise RuntimeError("resident memory is read from Linux's /proc, which is not here")
    return 1024 * int(path.read_text().split(f"{key}:")[1].split()[0])
