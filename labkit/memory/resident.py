"""What the operating system sees of a training step in a process of its own: a third witness of memory.

A process does not give back all that it frees: glibc keeps blocks that it may need again, between others that
are in use. That is the allocator's overhead on a CPU, and it can be larger than the step.

Source: Linux's /proc, VmRSS and VmHWM.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

from torch.optim import AdamW

from labkit.data.batches import Batch
from labkit.memory.measurement import TrainingStep, static_all, storages
from labkit.memory.setup import Setup, setup_of
from labkit.memory.subjects import make_batch, real_model

# what the process of its own runs
TAKE_STEPS = """
import json, sys
from labkit.memory.resident import take_steps

print(json.dumps(take_steps(**json.loads(sys.argv[1]))))
"""
LONGEST = 3600  # seconds
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # of glibc


def measure_resident(name: str, method: str = "qlora", give_back: bool = True, **settings) -> dict[str, int]:
    """Take a few steps in a process of its own, and read its resident memory.

    Args:
        name: of a model that `labkit.models.load` knows.
        method, settings: as for `labkit.memory.plan`.
        give_back: tell glibc to give back every freed block of 64 kB or more at once: then resident memory is
            what is in use.

    Returns:
        Bytes: `before` (resident at the start of a step, with model and optimizer state), `peak` (the most in
        the step), `step` (peak - before), `allocated` (the same by PyTorch's allocator: its peak less what is
        static).

    Raises:
        ValueError: an unknown setting, or one that is out of its range.
        RuntimeError: the process failed or took more than an hour, or this system has no /proc.
    """
    setup = setup_of(method, settings)
    arguments = json.dumps({"name": name, **setup.as_dict()})
    environment = os.environ | (GIVE_BACK if give_back else {})
    command = [sys.executable, "-c", TAKE_STEPS, arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=LONGEST
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(
            f"the step in a process of its own did not end within {LONGEST // 60} minutes, and was stopped; "
            "choose a smaller model, batch_size or max_length"
        ) from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise RuntimeError(f"the step in a process of its own failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def take_steps(name: str, **settings) -> dict[str, int]:
    """What the process of its own does; see `measure_resident`."""
    setup = Setup(**settings)
    model = real_model(name, setup)
    batch = make_batch(model.config.vocab_size, setup.batch_size, setup.max_length, setup.supervised)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)

    def step_on(batch: Batch) -> TrainingStep:
        return TrainingStep(model, batch, optimizer, parameters, setup.checkpointing, setup.logits, clip=1.0)

    step, small = step_on(batch), step_on(make_batch(model.config.vocab_size, 1, 2))
    with step.prepared():
        small()  # makes the optimizer's state, compiles the kernels
        gc.collect()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
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
        raise RuntimeError("resident memory is read from Linux's /proc, which this system does not have")
    return 1024 * int(path.read_text().split(f"{key}:")[1].split()[0])
