"""`labkit.json` beside an adapter: where it comes from, and whether its base is the one at hand."""

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from labkit.lora.fingerprint import AdapterMismatch, differences, fingerprint

PROVENANCE = "labkit.json"
VERSIONS = ("labkit", "torch", "transformers", "safetensors")


def record(base: dict, config: dict, data: object, metrics: Mapping[str, float] | None) -> dict:
    """What `labkit.json` holds.

    Args:
        base: the fingerprint of the base.
        config: of the adapter.
        data: what it was trained on, as the user says it.
        metrics: its results.
    """
    return {"base": base, "config": config, "data": data, "metrics": metrics, "versions": versions()}


def versions() -> dict[str, str]:
    """The versions of the packages that an adapter was made with."""
    return {name: importlib.metadata.version(name) for name in VERSIONS}


def read_provenance(path: Path) -> dict | None:
    """What `labkit.json` records; None if there is none."""
    try:
        provenance = json.loads((path / PROVENANCE).read_text())
        provenance["base"]["shapes"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path / PROVENANCE} is damaged; delete it to load the adapter without checking its base"
        ) from None
    return provenance


def check_base(model: nn.Module, path: Path, provenance: dict | None) -> None:
    """Compare the recorded fingerprint of the base with that of `model`; a folder without one passes."""
    if provenance is None:
        return
    recorded, mine = provenance["base"], fingerprint(model)
    differs = differences(recorded, mine)
    if differs == ["shapes"]:
        raise AdapterMismatch(
            f"the adapter in {path} was made for a model of other layers or sizes than this {mine['class']}"
        )
    if differs:
        hashes = ", ".join(f"{part} {recorded[part][:8]}… against {mine[part][:8]}… here" for part in differs)
        raise AdapterMismatch(
            f"the adapter in {path} was trained on a base of the same shape but with other weights "
            f"(fingerprints: {hashes}). On this base it would be noise. Load the base that it was trained "
            f"on, or delete {PROVENANCE} to insist"
        )
