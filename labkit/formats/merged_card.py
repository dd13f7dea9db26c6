"""The model card of a merged model: what it was made from, and what a user must know, for the hub."""

from labkit.checks import needed
from labkit.formats.card import FILL_IN, CardFacts, table
from labkit.lora.config import LoRAConfig


def merged_card(
    name: str, base: str, dtype: str, config: LoRAConfig | None, facts: CardFacts | None = None
) -> str:
    """The card of a merged model: Markdown with a head in YAML.

    Args:
        name: of the model.
        base: name of the base model, or its folder.
        dtype: of the weights: "bfloat16".
        config: of the adapter that is merged; None for a model without one.
        facts: data and results, if they are known.
    """
    hub = needed("huggingface_hub", "a model card")
    head = hub.ModelCardData(
        base_model=base or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["labkit"] + (["lora", "merged"] if config else []),
    )
    of = f"`{base}`" if base else f"{FILL_IN}: the base model"
    what = (
        f"{of} with a LoRA adapter merged into its weights, in {dtype}. It loads as any model of its class; no adapter "
        "is left to take off."
        if config
        else f"{of}, in {dtype}."
    )
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {name}",
        what,
        f"**Intended use:** {FILL_IN}: for what, for whom, and for what not.",
        f"**Licence:** {FILL_IN}: your choice, within the licences of the base and of the data. Add it to the head too: "
        "`license: …`.",
    ]
    if config:
        adapter = [
            ("variant", config.variant),
            ("rank", config.r),
            ("alpha", config.alpha),
            ("targets", config.targets if isinstance(config.targets, str) else ", ".join(config.targets)),
        ]
        parts += ["## Adapter", table(("setting", "value"), [(key, str(value)) for key, value in adapter])]
    if facts:
        parts += known(facts)
    limits = [*(facts.limits if facts else ()), f"{FILL_IN}: what else a user must know."]
    parts += ["## Limits", "\n".join(f"- {limit}" for limit in limits)]
    return hub.ModelCard("\n\n".join(parts) + "\n").content


def known(facts: CardFacts) -> list[str]:
    """The parts of a card that state data, results and settings."""
    parts = ["## Data"]
    if facts.files:
        parts.append(
            table(("file", "sha256"), [(f"`{file}`", f"`{digest}`") for file, digest in facts.files.items()])
        )
    if facts.counts:
        parts.append(", ".join(f"{n:,} records {what}" for what, n in facts.counts.items()) + ".")
    parts.append(f"**Source and licence of the data:** {FILL_IN}.")
    if facts.results:
        parts += ["## Results on held-out records", table(("measure", "base", "adapted"), facts.results)]
    if facts.baselines:
        parts += [
            "Without a language model, or without training one:",
            table(("baseline", "result"), facts.baselines),
        ]
    if facts.settings:
        parts += [
            "## Settings",
            table(("setting", "value"), [(k, str(v)) for k, v in facts.settings.items()]),
        ]
    return parts
