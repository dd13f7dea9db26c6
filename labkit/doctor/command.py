"""The doctor on the command line.

    python -m labkit.doctor runs/support --base tiny-llama --data train.jsonl --held-out test.jsonl
    python -m labkit.doctor --base merged/support --data train.jsonl --json

Its exit status is 0 if nothing was found, 1 if something is sick, 2 if it could not look.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from labkit.data.own.reading import read_records
from labkit.doctor.examine import check_folder, doctor
from labkit.formats.adapters import load_adapter
from labkit.lora.fingerprint import AdapterMismatch
from labkit.models.fetching import ModelUnavailable
from labkit.models.loading import load

SOUND, SICK, FAILED, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine what the command line names; the exit status."""
    given = parser().parse_args(arguments)
    try:
        report = doctor(**examined(given))
    except (ModelUnavailable, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) if given.json else report)
    return SICK if report.is_sick else SOUND


def examined(given: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `doctor`.

    An adapter that does not fit the base is not mounted; the probe of the origin then says why.
    """
    folder = (
        None if given.folder is None else check_folder(given.folder)
    )  # before a base is loaded for nothing
    files = {"data": given.data, "held_out": given.held_out}
    records = {name: None if path is None else read_records(path)[0] for name, path in files.items()}
    model, tokenizer = load(given.base, device=given.device)
    if folder is not None:
        mount_if_it_fits(model, folder)
    return {
        "model": model,
        "tokenizer": tokenizer,
        "adapter": folder,
        "valley": None if given.valley is None else tuple(given.valley),
        **records,
    }


def mount_if_it_fits(model: nn.Module, folder: Path) -> None:
    """Load the adapter in `folder`, unless it is of another base or lacks tensors."""
    try:
        load_adapter(model, folder)
    except AdapterMismatch as error:
        print(f"not loaded: {error}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """What the command line may hold."""
    made = argparse.ArgumentParser(
        prog="python -m labkit.doctor", description="Probe a fine-tuned model for what usually goes wrong."
    )
    made.add_argument("folder", nargs="?", help="a PEFT folder; leave it out for a merged model")
    made.add_argument("--base", required=True, help="name, folder or hub id of the model")
    made.add_argument("--data", help="file with the training records")
    made.add_argument("--held-out", help="file with records that were not trained on")
    made.add_argument(
        "--valley", nargs=2, type=float, metavar=("LOW", "HIGH"), help="learning rates swept as good"
    )
    made.add_argument("--device", help="such as cuda; the CPU if left out")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made
