"""Make data/results/activations.jsonl: why the shipped Q4_1 file says other things in llama.cpp than its weights in fp32.

    python -m recipes.activations

SmolLM2's published file has the very weights of our fp32 base. llama.cpp computes the next token's log-probabilities from
it, and from the same weights written as F32; PyTorch computes them in fp32, and once more with activations rounded as
llama.cpp rounds them (`labkit.formats.activations`). A line for each text: the largest and the rms difference to
PyTorch in fp32 of "F32" and of "file", and to PyTorch with rounded activations of "file" ("rounded"). In thirty layers a
last bit flips codes that flip others: "nudged" is how far PyTorch with rounded activations moves by itself, if the
embedding changes by a millionth. No other program can come nearer to it than that.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from labkit import models
from labkit.checks import version_of
from labkit.data.tickets import load_tickets, ticket_chat
from labkit.data.tokens import prompt_ids
from labkit.formats import llama_cpp
from labkit.formats.activations import rounded_activations, types_of
from labkit.formats.gguf_model import save_gguf
from labkit.models.fetching import GGUF, fetch
from labkit.paths import data_folder
from labkit.training.evaluate import chat_prompts
from recipes.jsonl import write

BASE = "smollm2-135m"
SHORT = ("The", "Once upon a time", "Mr. Darcy looked at Elizabeth, and she said")
TICKETS = 3
NUDGE = 1e-6  # relative, of each number of the embedding


@torch.no_grad()
def of_model(model, ids: list[int]) -> Tensor:
    """(vocabulary,): log-probabilities of the next token."""
    return model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def of_llama_cpp(server, ids: list[int], vocabulary: int) -> Tensor:
    """The same, by llama.cpp."""
    said = llama_cpp.answer(server, ids, tokens=1, top=vocabulary).top[0]
    return torch.tensor([said[token] for token in range(vocabulary)])


def apart(one: Tensor, other: Tensor) -> dict[str, float]:
    difference = one - other
    return {"largest": difference.abs().max().item(), "rms": difference.square().mean().sqrt().item()}


@contextmanager
def nudged(model) -> Iterator[None]:
    """Within the block the embedding is off by about a millionth, as if in the last bits."""
    generator = torch.Generator().manual_seed(0)

    def nudge(_, __, output: Tensor) -> Tensor:
        return output * (1 + NUDGE * torch.randn(output.shape, generator=generator))

    hook = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        yield
    finally:
        hook.remove()


def rows(file: Path, model, tokenizer, texts: list[str], folder: Path) -> list[dict]:
    """A row for each text; `model` has the weights of `file`."""
    types, vocabulary = types_of(file), model.config.vocab_size
    servers = {"F32": save_gguf(model, tokenizer, folder / "same.gguf", "F32"), "file": file}
    prompts = [prompt_ids(text, tokenizer) for text in texts]
    said: dict[str, list[Tensor]] = {}
    for name, path in servers.items():  # one llama.cpp at a time in memory
        server = llama_cpp.engine(path)
        said[name] = [of_llama_cpp(server, ids, vocabulary) for ids in prompts]
    found = []
    for i, ids in enumerate(prompts):
        plain = of_model(model, ids)
        with rounded_activations(model, types):
            rounded = of_model(model, ids)
            with nudged(model):
                moved = of_model(model, ids)
        found.append(
            {
                "text": texts[i],
                "tokens": len(ids),
                "F32": apart(said["F32"][i], plain),
                "file": apart(said["file"][i], plain),
                "rounded": apart(said["file"][i], rounded),
                "nudged": apart(moved, rounded),
            }
        )
    return found


def main() -> None:
    model, tokenizer = models.load(BASE, dtype="float32")
    chats = [ticket_chat(ticket) for ticket in load_tickets("test")[:TICKETS]]
    with tempfile.TemporaryDirectory() as folder:
        file = fetch(BASE) / GGUF
        texts = [*SHORT, *chat_prompts(chats, tokenizer)]
        found = rows(file, model, tokenizer, texts, Path(folder))
    about = {"xllamacpp": version_of("xllamacpp")}
    write(data_folder() / "results" / "activations.jsonl", [row | about for row in found])


if __name__ == "__main__":
    main()
