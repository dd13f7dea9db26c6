"""Records of a GPU that is made up."""

import json
from pathlib import Path

CARD = {
    "device": "NVIDIA Imaginary 1",
    "memory_bytes": 80 * 2**30,
    "capability": "9.0",
    "multiprocessors": 132,
    "driver": "580.95.05",
    "processor": "a CPU",
    "cpus": 16,
}


VERSIONS = {
    "python": "3.12.3",
    "torch": "2.11.0+cu130",
    "transformers": "5.17.0",
    "numpy": "2.5.0",
    "safetensors": "0.7.0",
}


def write(folder, section, rows, card="imaginary", skipped=(), /, **changes) -> Path:
    """A record, as `make gpu` writes it, of a GPU that is made up."""
    row = {"seconds": 1.0, "code": "0" * 12}
    found = [{"key": key, "outcome": "measured", **row, "numbers": numbers} for key, numbers in rows.items()]
    found += [
        {"key": key, "outcome": "skipped", **row, "reason": "it needs 80.1 GB", "numbers": {}}
        for key in skipped
    ]
    record = {"schema": 1, "section": section, "title": "A section", "rehearsal": False, "date": "2027-01-02"}
    record |= {
        "hardware": CARD,
        "versions": VERSIONS,
        "dtype": "bfloat16",
    }
    record |= {"seed": 0, "left_out": {}, "complete": True, "conclusions": [], "rows": found} | changes
    path = folder / card / f"{section}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path
