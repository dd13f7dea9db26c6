"""From the trained weights to data/tiny-llama: fp16 weights, held-out text, measurements, figure, model card.

    python -m recipes.tiny_llama.finish --work build/tiny-llama       # again, from the last checkpoint there

Everything is measured on the weights as they are shipped: rounded to fp16, computed in fp32.
"""

import argparse
import csv
import hashlib
import json
import platform
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import LlamaForCausalLM

from labkit.files.writing import new_file, write_json, write_text
from recipes.jsonl import write
from recipes.tiny_llama import corpus, tokens
from recipes.tiny_llama.card import card
from recipes.tiny_llama.checkpoint import load_checkpoint
from recipes.tiny_llama.corpus import DOMAINS, HELD_OUT_BYTES, overlap
from recipes.tiny_llama.evaluate import WINDOW, baselines, bits_per_byte, held_out, model_nats
from recipes.tiny_llama.settings import ARCHITECTURE, Plan, make_model, make_optimizer
from recipes.tiny_llama.sources import Document
from recipes.tiny_llama.tokens import ids_of

PROMPTS = (
    "And it came to pass",
    "Return a list of",
    "The SELECT statement",
    ":hacker: n.\n\n",
    'def open(filename, mode):\n    """',
)
HELD_OUT_README = """# Held-out text of tiny-llama

One JSON object per line, `{"name", "text"}`, one per document. None of it was trained on. Documents of `devil` are a domain
that was not trained on at all; the others are whole chapters, entries, pages and modules of trained domains.

| file | from (Debian 12 package) | licence |
|---|---|---|
| `kjv.jsonl` | King James Version (`bible-kjv-text`): Ruth, Jonah, Malachi, Philippians, James | public domain |
| `jargon.jsonl` | Jargon File 4.4.7, edited by Eric S. Raymond (`jargon-text`): 1 entry in 24 | public domain |
| `pydocs.jsonl` | Python 3.11 documentation (`python3.11-doc`): pages of the library reference | PSF, see `PSF-LICENSE.txt` |
| `docstrings.jsonl` | docstrings of Python 3.11's library (`libpython3.11-stdlib`) | PSF, see `PSF-LICENSE.txt` |
| `sqlite.jsonl` | SQLite 3.40 documentation (`sqlite3-doc`) | public domain |
| `devil.jsonl` | Ambrose Bierce, The Devil's Dictionary, 1911 (`dict-devil`): the first entries, A to H | public domain |

Changes: HTML pages became plain text without navigation and images; of modules, signatures and docstrings are left;
hard-wrapped paragraphs became one line each; verse numbers are left out.
"""


def finish(
    model, tokenizer, documents: list[Document], state: dict, made: dict, out: Path, work: Path
) -> None:
    """Write everything under `out`, and measure it.

    Args:
        model: the trained model, fp32.
        tokenizer: its tokenizer.
        documents: the corpus.
        state: of the training run (`pretrain`), for the log.
        made: provenance so far; results and checksums are added.
        out: the folder to write.
        work: the folder of the run, for the PSF licence and for the baselines, which are kept there.
    """
    heldout = out / "heldout"
    for domain in HELD_OUT_BYTES:
        rows = [{"name": d.name, "text": d.text} for d in documents if d.held_out and d.domain == domain]
        write(heldout / f"{domain}.jsonl", rows)
    write_text(heldout / "README.md", HELD_OUT_README)
    write_text(heldout / "PSF-LICENSE.txt", psf_licence(work))
    export(model, tokenizer, out)
    write_log(state["log"], out / "training_log.csv")
    draw(state["log"], made["plan"], out / "loss_curve.png")

    shipped = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    made["parameters"] = sum(p.numel() for p in shipped.parameters())
    made["training_bytes"] = {
        domain: sum(len(d.text.encode()) for d in documents if d.domain == domain and not d.held_out)
        for domain in DOMAINS
    }
    kept = work / "baselines.json"
    if not kept.exists():
        write_json(kept, baselines(documents, tokenizer), indent=None)
    results = json.loads(kept.read_text())
    for domain, row in results.items():
        texts = held_out(documents, domain)
        score, nats = bits_per_byte(lambda ids: model_nats(shipped, ids), texts, tokenizer)
        ids = ids_of(texts, tokenizer)
        results[domain] = {
            "bytes": sum(len(text.encode()) for text in texts),
            "tokens": sum(map(len, ids)),
            "tiny-llama": score,
            "tiny-llama nats per token": nats,
            **row,
        }
    made["bits_per_byte"] = results
    made["overlap_12_words"] = overlap(documents)
    made["slice_nats"] = slice_nats(shipped, tokenizer, heldout)
    made["samples"] = {prompt: sample(shipped, tokenizer, prompt) for prompt in PROMPTS}
    made["sha256"] = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("README.md", "provenance.json")
    }
    write_json(out / "provenance.json", made, indent=1)
    write_text(out / "README.md", card(made))


def provenance(state: dict, packages: dict) -> dict:
    """What the weights came from: versions, machine, tokens, seconds."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "plan": state["plan"],
        "steps": state["step"],
        "tokens_seen": state["step"] * state["plan"]["batch"] * state["plan"]["context"],
        "seconds": round(state["seconds"]),
        "cpu_seconds": round(state["cpu_seconds"]),
        "sessions": state["sessions"],
        "training_stream_sha256": state["data"],
        "packages": packages,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "hardware": {"cpu": cpu, "threads": torch.get_num_threads(), "weights": "float32"},
    }


def export(model, tokenizer, out: Path) -> None:
    """Write the weights, rounded to fp16, and the tokenizer.

    The tokenizer gets a class name that every version of transformers knows.
    """
    half = LlamaForCausalLM(model.config).to(torch.float16)
    half.load_state_dict(model.state_dict())  # copies and rounds
    half.config.dtype = torch.float16
    with tempfile.TemporaryDirectory() as work:
        half.save_pretrained(work)
        tokenizer.save_pretrained(work)
        path = Path(work, "tokenizer_config.json")
        config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        config.pop("backend", None)
        path.write_text(json.dumps(config, indent=2) + "\n")
        for file in sorted(Path(work).iterdir()):
            with new_file(out / file.name) as part:
                shutil.copyfile(file, part)


def slice_nats(model, tokenizer, heldout: Path) -> float:
    """Mean loss of 4 windows of 512 tokens: the first of kjv, pydocs, sqlite and jargon.

    The tests compute it again.
    """
    losses = []
    for domain in ("kjv", "pydocs", "sqlite", "jargon"):
        lines = (heldout / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
        text = "".join(json.loads(line)["text"] for line in lines)
        ids = [tokenizer.eos_token_id, *ids_of([text[:8000]], tokenizer)[0]]
        losses.append(model_nats(model, ids[:WINDOW]) / (WINDOW - 1))
    return sum(losses) / len(losses)


def sample(model, tokenizer, prompt: str, n: int = 60) -> str:
    """A continuation at temperature 0.8, the same for the same weights."""
    torch.manual_seed(0)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n,
        do_sample=True,
        temperature=0.8,
        top_k=50,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(made[0], skip_special_tokens=True)


def write_log(log: list[dict], path: Path) -> None:
    fields = list(dict.fromkeys(key for row in log for key in row))
    with new_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        for row in log:
            writer.writerow(
                {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
            )


def draw(log: list[dict], plan: dict, path: Path) -> None:
    """The loss curve: training loss, and held-out loss per domain."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), dpi=100)
    axis.plot(
        [r["tokens"] / 1e6 for r in log],
        [r["loss"] for r in log],
        color="0.6",
        label="training (mean of 50 steps)",
    )
    for domain in DOMAINS:
        points = [(r["tokens"] / 1e6, r[f"held_out/{domain}"]) for r in log if f"held_out/{domain}" in r]
        axis.plot(*zip(*points, strict=True), marker=".", label=f"held out: {domain}")
    start = (1 - plan["decay"]) * plan["tokens"] / 1e6
    axis.axvline(start, color="0.3", linestyle=":", linewidth=1)
    axis.text(start, axis.get_ylim()[1] * 0.97, " decay begins", va="top", fontsize=8, color="0.3")
    axis.set(xlabel="million tokens seen", ylabel="loss (nats per token)", title="tiny-llama: pretraining")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with new_file(path) as part:
        figure.savefig(part, metadata={"Software": None})
    plt.close(figure)


def psf_licence(work: Path) -> str:
    """The notice that the PSF licence asks to keep, from the package's copyright file."""
    text = (work / "packages/python3.11-doc/usr/share/doc/python3.11-doc/copyright").read_text(
        encoding="utf-8"
    )
    start, end = text.index("PYTHON SOFTWARE FOUNDATION LICENSE"), text.index("BEOPEN.COM LICENSE AGREEMENT")
    notice = "Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved\n\n"
    return notice + text[start:end].strip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/tiny-llama"))
    parser.add_argument("--out", type=Path, default=Path("data/tiny-llama"))
    args = parser.parse_args()
    documents = corpus.make(args.work)
    tokenizer = tokens.make_tokenizer(args.work, documents)
    model = make_model(ARCHITECTURE, 0)
    state = load_checkpoint(args.work / "checkpoints", model, make_optimizer(model, Plan()))
    if state is None:
        parser.error(f"{args.work} has no checkpoint; run python -m recipes.tiny_llama.pretrain first")
    packages = json.loads((args.work / "packages.json").read_text())
    finish(model, tokenizer, documents, state, provenance(state, packages), args.out, args.work)


if __name__ == "__main__":
    main()
