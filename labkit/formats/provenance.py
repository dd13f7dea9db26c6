"""`labkit.json` beside an adapter: where it comes from, whether its base is the one at hand, and whether the
folder is as it was saved.

    base          the fingerprint of the base model, without the modules that the adapter brings whole
    replaces      own names of those modules
    depends_on    weights of the base that nobody else has, and that are not in the folder either
    config, data, metrics, versions, start
    hashes        of the tensors, of the settings in `adapter_config.json`, and of all the rest of this file

A flipped bit in the data of a tensor, in a setting or in this file is seen. Whoever edits the folder on purpose
deletes `labkit.json`, which PEFT does not have either. Folders of version 0.1.0 have no hashes; only their base is
compared.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from labkit.checks import version_of
from labkit.files import reading
from labkit.formats.peft_settings import MAX_CONFIG, are_names, canonical, hash_settings
from labkit.lora.fingerprint import (
    AdapterMismatch,
    check_recorded,
    differences,
    fingerprint,
    hash_tensors,
)

PROVENANCE = "labkit.json"
VERSIONS = ("labkit", "torch", "transformers", "safetensors")
BEFORE = {
    "base",
    "config",
    "data",
    "metrics",
    "versions",
}  # what a folder of version 0.1.0 has; perhaps "start"
SINCE = {"replaces", "depends_on", "hashes"}
INSIST = f"delete {PROVENANCE} to insist"


def record(
    base: dict, config: dict, data: object, metrics: Mapping[str, float] | None, **others: Any
) -> dict:
    """What `labkit.json` holds before it is sealed.

    Args:
        base: the fingerprint of the base.
        config: of the adapter.
        data: what it was trained on, as the user says it.
        metrics: its results.
        others: `start`, `replaces`, `depends_on`.

    Raises:
        ValueError: JSON cannot hold `data` or `metrics`.
    """
    made = {"base": base, "config": config, "data": data, "metrics": metrics, "versions": versions()}
    made |= {"replaces": [], "depends_on": []} | others
    for name in ("data", "metrics"):
        try:
            json.dumps(made[name])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name} cannot be recorded as JSON ({error}); give text, numbers, lists and dictionaries of them"
            ) from None
    return json.loads(json.dumps(made))


def seal(provenance: dict, tensors: Mapping[str, Tensor], config: dict) -> dict:
    """`provenance` with the hashes of what is saved beside it, and of itself."""
    hashes = {"tensors": hash_named(tensors), "settings": hash_settings(config)}
    made = provenance | {"hashes": hashes}
    return made | {"hashes": hashes | {"record": hash_record(made)}}


def hash_named(tensors: Mapping[str, Tensor]) -> str:
    """A hash of tensors with their names, dtypes and shapes, in whatever order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {hash_tensors([tensor])}\n".encode())
    return digest.hexdigest()


def hash_record(provenance: dict) -> str:
    """A hash of all that a provenance says, but for this hash."""
    hashes = {key: value for key, value in provenance["hashes"].items() if key != "record"}
    return hashlib.sha256(canonical(provenance | {"hashes": hashes})).hexdigest()


def versions() -> dict[str, str]:
    """The versions of the packages that an adapter was made with."""
    return {name: version_of(name) for name in VERSIONS}


def read_provenance(path: Path) -> dict | None:
    """What `labkit.json` records; None if there is none.

    Raises:
        ValueError: it is damaged, or was edited.
    """
    try:
        return checked_record(reading.read_json(path / PROVENANCE, MAX_CONFIG))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path / PROVENANCE} is damaged ({error}); copy the folder again, or delete this file to load the adapter "
        "without checking its base"
    )


def checked_record(provenance: object) -> dict:
    """`provenance`, if it is one.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if not isinstance(provenance, dict) or set(provenance) - {"start"} not in (BEFORE, BEFORE | SINCE):
        raise ValueError(f"it has other entries than {', '.join(sorted(BEFORE | SINCE))}")
    check_recorded(provenance["base"])
    for key in ("replaces", "depends_on"):
        if not are_names(provenance.get(key)):
            raise ValueError(f"its {key} is no list of names")
    if "start" in provenance:
        start = provenance["start"]
        if not isinstance(start, dict) or set(start) != {"init", "origin", "quantization"}:
            raise ValueError("its start has other entries than init, origin, quantization")
        check_recorded(start["origin"])
        if not isinstance(start["init"], str) or not isinstance(start["quantization"], dict):
            raise ValueError("its start does not say the init and the quantization")
    if "hashes" in provenance:
        hashes = provenance["hashes"]
        if not isinstance(hashes, dict) or set(hashes) != {"tensors", "settings", "record"}:
            raise ValueError("its hashes are not those of tensors, settings and record")
        if hashes["record"] != hash_record(provenance):
            raise ValueError("it is not as it was saved: its hash is another")
    return provenance


def check_saved(raw: dict, tensors: Mapping[str, Tensor], path: Path, provenance: dict | None) -> None:
    """Raise a `ValueError` if a folder's settings or tensors are not the very ones that were saved."""
    if not provenance or "hashes" not in provenance:
        return
    hashes = {"settings": hash_settings(raw), "tensors": hash_named(tensors)}
    differ = [part for part, value in hashes.items() if value != provenance["hashes"][part]]
    if differ:
        raise ValueError(
            f"the {' and '.join(differ)} in {path} are not those that were saved: the folder was damaged or edited. "
            f"Copy it again, or {INSIST}"
        )


def check_base(
    model: nn.Module, path: Path, provenance: dict | None, known: dict[str, str] | None = None
) -> None:
    """Compare the recorded fingerprint of the base with that of `model`; a folder without one passes.

    Args:
        model: the base at hand.
        path: of the folder.
        provenance: its `labkit.json`.
        known: the fingerprint of `model` with all its modules, where it has been computed before.

    Raises:
        AdapterMismatch: saying what differs.
    """
    if provenance is None:
        return
    recorded = provenance["base"]
    replaces = provenance.get("replaces", ())
    mine = known if known and not replaces else fingerprint(model, replaces)
    differs = differences(recorded, mine)
    if differs == ["shapes"]:
        raise AdapterMismatch(
            f"the adapter in {path} was made for a model, a {recorded['class']}, of other layers or sizes than this "
            f"{mine['class']}. Load the base that it was trained on"
        )
    if differs:
        hashes = ", ".join(f"{part} {recorded[part][:8]}… against {mine[part][:8]}… here" for part in differs)
        alone = provenance.get("depends_on")
        because = (
            f" It depends on {', '.join(alone)}, newly made in the model that it was trained on, which only "
            "who saved that model has."
            if alone
            else ""
        )
        raise AdapterMismatch(
            f"the adapter in {path} was trained on a base of the same shape but with other weights "
            f"(fingerprints: {hashes}). On this base it would be noise.{because} Load the base that it was trained "
            f"on, or {INSIST}"
        )
