"""The model card of a version: what the registry knows of it, as Hugging Face's hub shows it."""

import json
from collections.abc import Iterator
from pathlib import Path

from labkit.checks import needed
from labkit.files.writing import write_text
from labkit.formats.card import FILL_IN, table
from labkit.serving import times
from labkit.serving.contents import card_of
from labkit.serving.versions import Version

LONGEST_SETTING = 300  # letters of a setting that a card shows


def version_card(version: Version, base: str) -> str:
    """The card of a version: Markdown with a head in YAML.

    Args:
        version: of an adapter.
        base: name of the base model.
    """
    hub = needed("huggingface_hub", "a model card")
    head = hub.ModelCardData(
        base_model=base, library_name="peft", pipeline_tag="text-generation", tags=["lora", "labkit"]
    )
    facts = version.facts
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {version.label}",
        f"A LoRA adapter for `{base}`. It is of use with that base only.",
        version.note,
        table(("", ""), [("owner", version.owner), ("published", times.written(version.published)),
                         ("code", version.code or "not recorded"), ("content", f"`{version.content}`"),
                         ("base", f"{facts['base_checked']}")]),
        f"**Intended use:** {FILL_IN}: for what, for whom, and for what not.",
        f"**Licence:** {FILL_IN}: your choice, within the licences of the base and of the data.",
        "## Adapter",
        table(("", ""), [(key, f"{facts[key]:,}" if isinstance(facts[key], int) else str(facts[key]))
                         for key in ("variant", "r", "alpha", "modules", "parameters", "bytes", "dtype")]),
        "## Results",
        results_of(version),
        "## Data",
        settings_of(version.data),
        "## Settings",
        settings_of(version.config),
        "## Files",
        table(("file", "sha256"), [(f"`{file}`", f"`{digest}`") for file, digest in version.files.items()]),
        "## Limits",
        "\n".join(f"- {limit}" for limit in limits_of(version)),
    ]  # fmt: skip
    return hub.ModelCard("\n\n".join(part for part in parts if part) + "\n").content


def results_of(version: Version) -> str:
    rows = [
        (data, metric, f"{value:g}")
        for data, found in version.results.items()
        for metric, value in found.items()
    ]
    return table(("data set", "metric", "value"), rows) if rows else "Not recorded."


def settings_of(value: object) -> str:
    """What was recorded of data or settings: a table of a dictionary, JSON of anything else."""
    if value is None:
        return "Not recorded."
    if not isinstance(value, dict):
        return f"`{shortened(value)}`"
    return table(("", ""), [(key, f"`{shortened(entry)}`") for key, entry in value.items()])


def shortened(value: object) -> str:
    """A value as JSON, without what would end a span of code, and not all of a long one."""
    text = json.dumps(value, ensure_ascii=False).replace("`", "'")
    return text if len(text) <= LONGEST_SETTING else text[: LONGEST_SETTING - 1] + "…"


def limits_of(version: Version) -> Iterator[str]:
    for reason in version.facts["alone"]:
        yield f"It cannot be served in one batch with other adapters: {reason}."
    yield f"{FILL_IN}: what else a user must know."


def write_card(root: Path, version: Version, base: str) -> None:
    """Write `adapters/NAME/vNUMBER.md`, unless it is there."""
    place = card_of(root, version.name, version.number)
    if not place.exists():
        write_text(place, version_card(version, base))
