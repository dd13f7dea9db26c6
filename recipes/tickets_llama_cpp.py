"""Make data/results/tickets_llama_cpp.jsonl: what llama.cpp answers to test tickets, held against the adapted model.

    python -m labkit.sweep experiments/tickets_long.toml --keep build/adapters --out build/tickets_long.jsonl
    python -m recipes.tickets_llama_cpp build/adapters/FOLDER [--tickets 50] [--files "merged F32" …]

The adapter was trained on a base in four bits. It is put on that base dequantized, in fp32: this model is what all files
are made from, and what llama.cpp's answers are compared with. Each answer is given to it token by token, so a difference
at one token does not make all later ones differ.

A line for each file and ticket: the answer, whether each token is the likeliest of the model too (and if not, at which
step and by how little), and the largest difference of a log-probability among llama.cpp's five likeliest tokens, of the
first token and of all. Kill it when you like: it goes on where it was.
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import labkit
from labkit import models
from labkit.checks import version_of
from labkit.data.tickets import TICKET_TOKENS, load_tickets, ticket_chat
from labkit.data.tokens import prompt_ids
from labkit.formats import llama_cpp
from labkit.formats.gguf_adapter import save_gguf_adapter
from labkit.formats.gguf_model import save_gguf
from labkit.paths import data_folder
from labkit.sweeps.records import append, mend_last_line
from labkit.training.evaluate import chat_prompts
from recipes import jsonl

BASE = "smollm2-135m"
RESULTS = "results/tickets_llama_cpp.jsonl"
FILES = (
    "merged F32",
    "adapter F32",
    "merged Q4_1",
    "merged Q8_0",
    "merged Q4_0",
    "merged F16",
    "merged F32, defaults",
)


def reference(folder: Path) -> tuple[nn.Module, Any]:
    """The adapted model that everything is compared with, in fp32, and its tokenizer."""
    model, tokenizer = models.load(BASE, dtype="float32")
    labkit.quantize_model(model, progress=False)
    labkit.load_adapter(model, folder)
    return labkit.dequantize_model(model).eval(), tokenizer


def load_in_llama_cpp(name: str, model: nn.Module, tokenizer, folder: Path) -> Any:
    """Write one of `FILES` and load it in llama.cpp, with keys and values in fp32 and no flash attention.

    Args:
        name: "merged" and a number type, "adapter" for one in fp32 on its base in fp32; "defaults" after it leaves
            llama.cpp's own settings.
        model: the adapted model; it is not changed.
        tokenizer: its own.
        folder: to write into.
    """
    numbers = name.partition(",")[0].split()[1]
    exact = not name.endswith("defaults")
    if name.startswith("adapter"):
        adapter = save_gguf_adapter(model, folder / "adapter.gguf", numbers)
        base = labkit.unload(copy.deepcopy(model), merged=False)
        return llama_cpp.engine(save_gguf(base, tokenizer, folder / "base.gguf", numbers), adapter, exact)
    return llama_cpp.engine(save_gguf(model, tokenizer, folder / "merged.gguf", numbers), exact=exact)


@torch.no_grad()
def compare(model: nn.Module, tokenizer, server: Any, ids: list[int], tokens: int = TICKET_TOKENS) -> dict:
    """llama.cpp's greedy answer to a prompt, and the adapted model's opinion of each of its tokens.

    Returns:
        "answer", the text; "tokens", how many; "same", whether each is the model's likeliest; "step" and "gap", the
        first that is not, and how much likelier the model finds its own (None if there is none); "first" and "largest",
        differences of log-probabilities at the first token and at all.
    """
    said = llama_cpp.answer(server, ids, tokens)
    whole = torch.tensor([ids + said.ids])
    logs = model(input_ids=whole).logits[0, len(ids) - 1 : -1].float().log_softmax(-1)  # (tokens, vocabulary)
    apart = [
        max(abs(logs[i, token].item() - value) for token, value in step.items())
        for i, step in enumerate(said.top)
    ]
    behind = logs.amax(-1) - logs[torch.arange(len(said.ids)), torch.tensor(said.ids)]  # (tokens,)
    step = next((i for i, gap in enumerate(behind.tolist()) if gap > 0), None)
    return {
        "answer": tokenizer.decode(said.ids, skip_special_tokens=True).strip(),
        "tokens": len(said.ids),
        "same": step is None,
        "step": step,
        "gap": None if step is None else round(behind[step].item(), 7),
        "first": round(apart[0], 7),
        "largest": round(max(apart), 7),
    }


def record(
    model: nn.Module, tokenizer, prompts: Sequence[str], path: Path, files: Sequence[str], **about
) -> None:
    """Make or complete the lines of `path`.

    Args:
        model: the adapted model.
        tokenizer: its own.
        prompts: of the tickets; a line names one by its place.
        path: of the JSON lines.
        files: some of `FILES`.
        about: what each line says besides.
    """
    mend_last_line(path)
    done = {(line["file"], line["ticket"]) for line in jsonl.read(path)}
    for name in files:
        left = [i for i in range(len(prompts)) if (name, i) not in done]
        if not left:
            continue
        with tempfile.TemporaryDirectory() as folder:
            server = load_in_llama_cpp(name, model, tokenizer, Path(folder))
            for i in left:
                found = compare(model, tokenizer, server, prompt_ids(prompts[i], tokenizer))
                append(path, {"file": name, "ticket": i} | found | about)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", type=Path, help="folder that the sweep kept the adapter in")
    parser.add_argument("--tickets", type=int, default=50, help="of the test tickets, the first so many")
    parser.add_argument("--files", nargs="+", choices=FILES, default=FILES)
    parser.add_argument("--to", type=Path, default=data_folder() / RESULTS)
    arguments = parser.parse_args()
    model, tokenizer = reference(arguments.adapter)
    about = {"adapter": arguments.adapter.name, "xllamacpp": version_of("xllamacpp")}
    chats = [ticket_chat(ticket) for ticket in load_tickets("test")[: arguments.tickets]]
    record(model, tokenizer, chat_prompts(chats, tokenizer), arguments.to, arguments.files, **about)


if __name__ == "__main__":
    main()
