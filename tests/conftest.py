"""How tests are spread over workers, and the models that they share, loaded once per worker."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from labkit import models

# What takes half a minute or more, the longest first: a worker that starts one of them last keeps the others waiting.
# All other notebooks follow, then all other files of tests, of which none takes long.
LONGEST_FIRST = (
    *("08", "17", "16", "18", "06", "02", "03", "10", "05", "04", "09", "11", "07", "00"),
    *(
        "test_notebook_service",
        "test_absent_packages",
        "test_grading",
        "test_training_panel",
        "test_catching_up",
    ),
    *("test_cluster", "test_explorer"),
)


def pytest_configure():
    """Share the cores between the workers; kernels and child processes inherit the environment.

    No test is anybody's progress. What a shell starts in the background ignores Ctrl-C, and so would the tests that send it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["LABKIT_PROGRESS"] = "no"
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ |= {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Files that take long first, in the order that workers are given them (`--no-loadscope-reorder`)."""

    def place(item: pytest.Item) -> int:
        name = item.path.name
        others = len(LONGEST_FIRST) + (item.path.suffix != ".ipynb")
        return next((i for i, start in enumerate(LONGEST_FIRST) if name.startswith(start)), others)

    items.sort(key=place)


def make_small_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    """A Llama with random weights and the real vocabulary."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}
    rest = {"vocab_size": 49152, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = LlamaConfig(**sizes | rest | changes)
    return LlamaForCausalLM(config).eval()


@contextmanager
def on_threads(number: int) -> Iterator[None]:
    """Within the block PyTorch computes on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    with on_threads(1):
        yield


@pytest.fixture
def two_threads():
    with on_threads(2):
        yield


@pytest.fixture
def small_llama():
    return make_small_llama()


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer) of the real base; read only."""
    return models.load("smollm2-135m")


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    return smollm2[1]


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer) of tiny-llama in fp32; read only."""
    return models.load("tiny-llama", dtype=torch.float32)


@pytest.fixture(scope="session")
def records():
    """Sixteen chat records to train on."""
    from labkit.data.tickets import load_tickets, ticket_chat

    return [ticket_chat(ticket) for ticket in load_tickets("train")[:16]]
