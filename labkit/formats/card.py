"""An adapter with its model card: one folder that says what it is, as Hugging Face's hub shows it.

A card is `README.md` with a head in YAML. This one states what can be known here: the base, the file it was trained on
with its sha256 and counts, the settings, and results before and after with their intervals. Who may use it, and for
what, only its author can say: those places are marked `FILL_IN` and stand out.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from labkit.checks import needed
from labkit.files.writing import new_folder, write_text
from labkit.formats.adapters import save_adapter
from labkit.formats.peft_folder import link_others

CARD = "README.md"
FILL_IN = "[FILL IN]"


@dataclass(frozen=True)
class CardFacts:
    """What a card states.

    Args:
        base: name of the base model.
        files: the sha256 of each file with records (`labkit.files.sha256`), by its name, taken when it was read.
        counts: records by what they were for: `{"training": 150, "held out": 37}`.
        settings: of the run, as text or numbers.
        results: rows of a table, each `(measure, before, after)` as text with its interval.
        baselines: rows `(what, result)`.
        limits: sentences to know before use.
        chat: is it to be asked in the chat template, and not with a plain prompt?
    """

    base: str
    files: Mapping[str, str]
    counts: Mapping[str, int]
    settings: Mapping[str, object]
    results: Sequence[tuple[str, str, str]]
    baselines: Sequence[tuple[str, str]] = ()
    limits: Sequence[str] = ()
    chat: bool = False


def model_card(facts: CardFacts, name: str) -> str:
    """The card of an adapter called `name`: Markdown with a head in YAML."""
    hub = needed("huggingface_hub", "a model card")
    head = hub.ModelCardData(
        base_model=facts.base, library_name="peft", pipeline_tag="text-generation", tags=["lora", "labkit"]
    )
    asked = "in the base's chat template" if facts.chat else "with plain text, which it goes on from"
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {name}",
        f"A LoRA adapter for `{facts.base}`, asked {asked}. It is of use with that base only.",
        f"**Intended use:** {FILL_IN}: for what, for whom, and for what not.",
        f"**Licence:** {FILL_IN}: your choice, within the licences of the base and of the data. Add it to the head too: "
        "`license: …`.",
        "## Data",
        table(("file", "sha256"), [(f"`{file}`", f"`{digest}`") for file, digest in facts.files.items()]),
        ", ".join(f"{n:,} records {what}" for what, n in facts.counts.items()) + ".",
        f"**Source and licence of the data:** {FILL_IN}.",
        "## Results on held-out records",
        table(("measure", "base", "adapted"), facts.results),
        "Intervals are 95 %: Wilson's for shares, drawn records for losses.",
    ]
    if facts.baselines:
        parts += [
            "Without a language model, or without training one:",
            table(("baseline", "result"), facts.baselines),
        ]
    parts += [
        "## Settings",
        table(("setting", "value"), [(k, str(v)) for k, v in facts.settings.items()]),
        "## Limits",
    ]
    parts.append(
        "\n".join(f"- {limit}" for limit in (*facts.limits, f"{FILL_IN}: what else a user must know."))
    )
    return hub.ModelCard("\n\n".join(parts) + "\n").content


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; what would end a cell or a row is replaced."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def save_with_card(
    model: nn.Module,
    path: str | Path,
    facts: CardFacts,
    metrics: Mapping[str, float] | None = None,
    plain: bool = True,
) -> Path:
    """Save the mounted adapter of `model` and its card as a new folder, whole or not at all.

    Args:
        model: with an adapter.
        path: a folder that is not there yet, or is empty.
        facts: for the card; hashes and counts go into `labkit.json` too.
        metrics: results, for `labkit.json`.
        plain: see `save_adapter`.

    Returns:
        `path`.

    Raises:
        FileExistsError: there is something at `path`; nothing is written.
        ValueError: as `save_adapter`.
        labkit.files.CannotWrite: no space, no permission.
    """
    path = Path(path)
    taken = f"{path} is there already and is left as it is; give another name, or move it away first"
    if not is_free(path):
        raise FileExistsError(taken)

    def take_along(old: Path, new: Path) -> None:
        if os.path.realpath(old) == os.path.realpath(path) and not is_free(
            old
        ):  # it came while this was written
            raise FileExistsError(taken)
        link_others(old, new)

    with new_folder(path, take_along) as made:
        save_adapter(model, made, plain, {"files": dict(facts.files), **facts.counts}, metrics)
        write_text(made / CARD, model_card(facts, path.name))
    return path


def is_free(path: Path) -> bool:
    """Is there nothing at `path`, or an empty folder?"""
    return not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir()))
