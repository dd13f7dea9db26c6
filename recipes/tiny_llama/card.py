"""The model card, data/tiny-llama/README.md, written from measurements: no number is typed by hand."""

NAMES = {
    "kjv": "King James Bible",
    "jargon": "Jargon File",
    "pydocs": "Python documentation",
    "docstrings": "Python docstrings",
    "sqlite": "SQLite documentation",
    "devil": "Devil's Dictionary (never trained on)",
}
SOURCES = {
    "kjv": ("`bible-kjv-text`", "public domain", "chapters of Ruth, Jonah, Malachi, Philippians, James"),
    "jargon": ("`jargon-text` 4.4.7", "public domain", "1 entry in 24, by a hash of its head word"),
    "pydocs": (
        "`python3.11-doc`",
        "PSF",
        "8 pages: bisect, calendar, cmd, colorsys, fractions, getpass, graphlib, linecache",
    ),
    "docstrings": (
        "`libpython3.11-stdlib`",
        "PSF",
        "11 modules: cgitb, cmd, colorsys, fractions, getpass, graphlib, mailcap, pprint, queue, tabnanny, zipapp",
    ),
    "sqlite": (
        "`sqlite3-doc` 3.40",
        "public domain",
        "5 pages: autoinc, isolation, lang_upsert, nulls, partialindex",
    ),
    "devil": ("`dict-devil`", "public domain", "all of it; the first 60 kB (A to H) are shipped"),
}


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def card(made: dict) -> str:
    """The card of a model from its provenance (`data/tiny-llama/provenance.json`)."""
    plan, results = made["plan"], made["bits_per_byte"]
    columns = ["tiny-llama", "Kneser–Ney 5", "Kneser–Ney 5, own domain"]
    columns += [f"{name} {how}" for name in ("xz -9e", "gzip -9") for how in ("after training text", "alone")]
    scores = [
        [
            NAMES[domain],
            *(f"{row[c]:.3f}" if c in row else "–" for c in columns),
            f"{row['tiny-llama nats per token']:.3f}",
        ]
        for domain, row in results.items()
    ]
    data = [
        [
            f"`{domain}`",
            NAMES[domain],
            *SOURCES[domain][:2],
            f"{made['training_bytes'].get(domain, 0) / 1e6:.2f} MB",
            f"{row['bytes'] / 1e3:.0f} kB",
            SOURCES[domain][2],
            f"{made['overlap_12_words'][domain]:.1%}",
        ]
        for domain, row in results.items()
    ]
    trained = [row for domain, row in results.items() if domain in made["training_bytes"]]
    gains = [1 - row["tiny-llama"] / row["Kneser–Ney 5"] for row in trained]
    own = [1 - row["tiny-llama"] / row["Kneser–Ney 5, own domain"] for row in trained]
    new = 1 - results["devil"]["tiny-llama"] / results["devil"]["Kneser–Ney 5"]
    samples = "\n\n".join(f"```text\n{text.strip()}\n```" for text in made["samples"].values())
    products = (
        "matrix products in bfloat16 (`--bf16`), everything else in fp32: weights, gradients, moments, normalisation, loss"
        if plan["bf16"]
        else "fp32 throughout"
    )
    flags = "".join(f" --{flag}" for flag in ("compile", "bf16") if plan[flag])
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    bits = ", ".join(
        f"`{name}` {100 * gain:.0f} %" for name, gain in zip(made["training_bytes"], gains, strict=True)
    )
    against_own = ", ".join(
        f"`{name}` {100 * gain:.0f} %" for name, gain in zip(made["training_bytes"], own, strict=True)
    )
    return f"""# tiny-llama

A language model of {made["parameters"]:,} parameters, pretrained for this course and **never quantized**: the weights on which the
course judges 4-bit codebooks and runs its sweeps. It has the architecture of Llama, writes fluent fragments, and knows nothing.

```python
import labkit

model, tokenizer = labkit.models.load("tiny-llama")  # fp32, offline
```

| | |
|---|---|
| architecture | `LlamaForCausalLM`: hidden 256, 4 layers, 4 heads (2 for keys and values), MLP 704, context 512, tied embeddings |
| parameters | {made["parameters"]:,}, of them 1,048,576 in the embedding and 2,949,120 in the linear layers |
| widths of the linear layers | 256, 128 and 704: all multiples of 64 |
| tokenizer | byte-level BPE of 4,096, trained on the training text; single digits; `<|endoftext|>` is id 0 (before every document), `<|pad|>` id 1 |
| weights | trained as fp32, shipped as fp16 safetensors; `load` gives fp32. All numbers below are of the shipped weights |
| licence | weights: Apache-2.0, like the course. Held-out text: see `heldout/README.md` |

## Held-out results, in bits per byte
Lower is better. Bits per byte divide by the text, not by its tokens, so that models and compressors can be compared.

{table(["text", *columns, "tiny-llama, nats per token"], scores)}

- **Kneser–Ney 5** is an interpolated 5-gram model with modified discounts on the same tokens and the same training text
  (`recipes/tiny_llama/ngram.py`); "own domain" counts only that domain's training text. The order 5 was better than 3 and 4.
- **xz, gzip**: "after training text" is what the held-out text adds to the compressed training text; "alone" compresses it by itself.
- Bits that tiny-llama saves (negative: needs more) against Kneser–Ney 5: {bits}, `devil` {100 * new:.0f} %. Against the 5-gram of the own domain: {against_own}.
- Each document is scored by itself after `<|endoftext|>`, in windows of 512 tokens that overlap by half.
- One training run, one seed: these are point values. The held-out files are small (35 to 60 kB), so differences of 1 or 2 % mean little.

![training loss and held-out loss per domain against tokens seen](loss_curve.png)

`training_log.csv` has the numbers behind the curve. Its held-out columns are quick: four windows per domain, in the middle of training.

## Text
{table(["domain", "what", "Debian 12 package", "licence", "trained on", "held out here", "held out are", "overlap"], data)}

*Overlap* is the share of the held-out runs of 12 words that also occur in the training text. Whole documents were held out. Training
lines of 40 characters or more that also occur in held-out text were removed, and so were repeated training lines of 80 or more.
For `docstrings` the overlap is short formulas that the library repeats, and signatures of methods; treat its score as the least strict.
The pages of `pydocs` were held out together with the docstrings of the same modules. `pydoc_data.topics` was left out, because it repeats
the reference manual. The licence of Python's text is in `heldout/PSF-LICENSE.txt`; it asks that this notice be kept with the text.
The other sources ask for nothing; the Jargon File asks for the courtesy of citation: *The Jargon File, version 4.4.7, 29 Dec 2003*.

### The held-out text in a notebook
```python
import json
from labkit.paths import data_folder


def held_out(domain):  # kjv, jargon, pydocs, docstrings, sqlite, devil
    path = data_folder() / "tiny-llama" / "heldout" / f"{{domain}}.jsonl"
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


ids = [
    [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    for text in held_out("kjv")
]
```
Score the tokens after the first; a document longer than 512 tokens has to be cut into windows. `devil` is a domain for adapting to: split it.

## Training
| | |
|---|---|
| tokens seen | {made["tokens_seen"]:,} in {made["steps"]:,} steps of {plan["batch"]} × {plan["context"]} |
| optimizer | AdamW, betas {plan["betas"][0]} and {plan["betas"][1]}, weight decay {plan["weight_decay"]} on matrices, gradients clipped to norm {plan["clip"]} |
| learning rate | {plan["lr"]:g}: warm-up over {plan["warmup"]} steps, constant, linear to zero over the last {plan["decay"]:.0%} (WSD) |
| precision | {products} |
| hardware | {made["hardware"]["cpu"]}, {made["hardware"]["threads"]} thread, shared with other work |
| time | {made["seconds"] / 60:.0f} minutes ({made["cpu_seconds"] / 60:.0f} minutes of CPU), in {made["sessions"]} session{"s" if made["sessions"] > 1 else ""} |
| versions | {versions} |

The learning rate was set from common practice for this width and was not tuned beyond two trials of 100 steps (3e-3 and 6e-3), which came
out alike. A sweep of it, of the batch size and of the length would very likely give a better model of the same size. `provenance.json` has all this with the versions and checksums of the
Debian packages and the sha256 of every file here.

## Make it again
On Debian 12 (x86-64), in the course's environment, from the root of the checkout:

```
python -m recipes.tiny_llama.pretrain --tokens {plan["tokens"]}{flags}
```

It downloads seven Debian packages with `apt-get download` (no root; nothing is installed), cuts and splits the text, trains the
tokenizer and the model, measures, and writes this folder. Progress is printed; `build/tiny-llama` keeps everything in between. Stop it
at any time and run it again: it goes on from the last checkpoint (every 100 steps), with the same result bit for bit (tested without `--compile`). `--tokens` governs
the end, nothing depends on the clock; a resumed run may be given another `--tokens` while neither decay has begun.
`--compile` needs a C++ compiler; `--bf16` is fast only on a CPU with bfloat16 instructions and can be left out. Other machines round
differently, so the weights come out similar, not equal. On a system without apt, fetch the packages elsewhere and pass `--debs FOLDER`;
the King James text also needs the Linux program in `bible-kjv` that unpacks it.

## What it writes
Temperature 0.8, top 50, seed 0; nothing was selected.

{samples}

## Limits
- {made["parameters"] / 1e6:.0f} M parameters and {made["tokens_seen"] / 1e6:.1f} M tokens: fluent fragments, no knowledge, no instructions. Not for any use outside the course.
- It is undertrained: the curve is still falling where it ends. Results on weights like these need not hold for large models.
- The text is English of 1611, of hackers of 1990 and of manuals, with the views and the slang of each.
- It was trained on most of the King James text and of Python's and SQLite's documentation: only the held-out files measure generalisation
  there, and `devil` is the only domain here that is new to it.
- Python's documentation is {made["training_bytes"]["pydocs"] / sum(made["training_bytes"].values()):.0%} of the training text, and that is what most samples sound like.
"""
