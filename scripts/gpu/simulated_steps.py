"""What `simulate` says of the steps of the section `ledger`: from a file, since a 70B takes a minute.

    PYTHONPATH=scripts:. python -m gpu.simulated_steps     # simulates what the file does not have, and completes it

A card's time is too dear for it: fake tensors of each operation are worked out in Python. The answer depends on
shapes and code alone, so it is the same on every machine.
"""

import json
from pathlib import Path

from gpu.ledger_steps import STEPS, Step
from labkit.files.writing import write_json
from labkit.memory.allocator import replay
from labkit.memory.setup import Setup
from labkit.memory.simulation import record_step

FILE = Path(__file__).with_name("simulated_steps.json")
Bytes = dict[str, int]


def known() -> dict[str, Bytes]:
    """Bytes of each step in the file, by its key."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def simulate_blocks(step: Step, setup: Setup) -> Bytes:
    """Bytes at the peak of a simulated step.

    Returns:
        `tensors_bytes`; on a card also `bytes` of the blocks that they are in, and `reserved_bytes`. On a CPU all
        three are the same.
    """
    record = record_step(step.config(), setup)
    tensors, _ = record.peak()
    if setup.device == "cpu":
        return {"bytes": tensors, "tensors_bytes": tensors, "reserved_bytes": tensors}
    card = replay(record)
    return {"bytes": card.peak_allocated, "tensors_bytes": tensors, "reserved_bytes": card.peak_reserved}


def main() -> None:
    """Complete the file."""
    found = known()
    for step in STEPS:
        if step.key not in found:
            found[step.key] = simulate_blocks(step, step.setup())
            write_json(FILE, found)
            print(step.key, found[step.key], flush=True)


if __name__ == "__main__":
    main()
