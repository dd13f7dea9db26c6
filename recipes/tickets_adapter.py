"""Make data/adapters/tickets: the adapter of a recorded run on tickets, rounded to bf16, and judged as it is shipped.

    python -m labkit.sweep experiments/tickets_long.toml --keep build/adapters --out build/tickets_long.jsonl
    python -m recipes.tickets_adapter build/adapters/FOLDER

An adapter of this rank is 20 MB in fp32. Rounded to bf16 it is half of that. What the rounding costs is
measured: the rounded adapter is asked all test tickets again, and its own result is what the folder records.
"""

import argparse
from pathlib import Path

import labkit
from labkit import models
from labkit.data.tickets import TICKET_TOKENS, load_tickets, ticket_chat
from labkit.hardware import product_dtype
from labkit.paths import data_folder
from labkit.training.evaluate import chat_prompts, generate
from labkit.training.metrics import score_json

BASE = "smollm2-135m"


def ship(kept: Path, target: Path) -> Path:
    """Write the adapter in `kept` to `target` in bf16, with its share of right test tickets.

    Raises:
        labkit.AdapterMismatch: it was not trained on this base in four bits.
    """
    model, tokenizer = models.load(BASE)
    labkit.quantize_model(model, compute_dtype=product_dtype(next(model.parameters()).device), progress=False)
    labkit.load_adapter(model, kept)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.bfloat16().float()
    tickets = load_tickets("test")
    prompts = chat_prompts([ticket_chat(t) for t in tickets], tokenizer)
    score = score_json(generate(model, tokenizer, prompts, TICKET_TOKENS, 110), [t["label"] for t in tickets])
    print(score)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.bfloat16()
    return labkit.save_adapter(model, target, metrics={"exact_match": score.exact_match, **score.per_field})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kept", type=Path, help="folder that the sweep kept the adapter in")
    parser.add_argument("--to", type=Path, default=data_folder() / "adapters" / "tickets")
    arguments = parser.parse_args()
    print(ship(arguments.kept, arguments.to))


if __name__ == "__main__":
    main()
