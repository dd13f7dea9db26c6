"""Quick runs to sweep over, and what two ways to one sweep must agree in."""

import json
from pathlib import Path

from labkit.sweeps import grid, records
from labkit.sweeps.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"task": "facts", "examples": 8, "steps": 3, "r": 2}


def configs(**axes) -> list[RunConfig]:
    return grid.expand({"seeds": [0, 1], "fixed": QUICK, "grid": [axes]})


def table(results: records.Results) -> list[dict]:
    """What must be equal between two ways to the same sweep: everything but times."""
    rows = []
    for record in sorted(results.records, key=lambda r: json.dumps(r["config"])):
        metrics = {k: v for k, v in record.get("metrics", {}).items() if k != "train_seconds"}
        rows.append({"config": record["config"], "status": record["status"], "metrics": metrics})
    return rows
