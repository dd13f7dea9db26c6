"""tiny-llama as it is shipped, and the recipe that made it."""

import hashlib
import json
import re
import signal
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from labkit import models
from labkit.paths import data_folder
from recipes.tiny_llama import card as model_card
from recipes.tiny_llama import corpus, evaluate, finish, ngram, pages, pretrain, tokens

FOLDER = data_folder() / "tiny-llama"
MICRO = {
    **pretrain.ARCHITECTURE,
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
}
STREAM = np.random.default_rng(0).integers(64, size=700).astype(np.uint16)
PLAN = pretrain.Plan(tokens=8 * 2 * 16, batch=2, context=16, warmup=2, lr=1e-2)  # 8 steps, decay from 6


@pytest.fixture(scope="module")
def made() -> dict:
    return json.loads((FOLDER / "provenance.json").read_text())


@pytest.fixture(scope="module")
def loaded():
    return models.load("tiny-llama")


# The shipped model


def test_loads_without_network_as_fp32_and_in_eval_mode(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, tokenizer = models.load("tiny-llama")
    assert type(model) is LlamaForCausalLM and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(tokenizer) == model.config.vocab_size == 4096


def test_has_the_parameters_and_widths_that_the_card_states(loaded, made):
    model, _ = loaded
    count = sum(p.numel() for p in model.parameters())
    assert count == made["parameters"]
    assert f"{count:,} parameters" in (FOLDER / "README.md").read_text()
    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert len(linear) == 28
    assert all(size % 64 == 0 for m in linear for size in m.weight.shape)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_files_are_those_of_the_provenance_and_take_less_than_12_mb(made):
    files = {str(p.relative_to(FOLDER)): p for p in FOLDER.rglob("*") if p.is_file()}
    found = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if path.name not in ("README.md", "provenance.json")
    }
    assert found == made["sha256"]
    assert sum(path.stat().st_size for path in files.values()) < 12_000_000
    assert not [name for name in files if re.search(r"\.(bin|pt|pth|pkl|pickle)$", name)]


def test_held_out_loss_of_a_slice_is_the_recorded_one(loaded, made):
    # 2,044 tokens; other machines and thread counts add up in another order, which moves a mean loss by far less
    assert finish.slice_nats(*loaded, FOLDER / "heldout") == pytest.approx(made["slice_nats"], abs=1e-3)


def test_bits_per_byte_of_a_whole_domain_is_the_recorded_one(loaded, made):
    model, tokenizer = loaded
    lines = (FOLDER / "heldout/docstrings.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    score, _ = evaluate.bits_per_byte(lambda ids: evaluate.model_nats(model, ids), texts, tokenizer)
    assert score == pytest.approx(made["bits_per_byte"]["docstrings"]["tiny-llama"], abs=1e-3)


def test_beats_kneser_ney_on_every_trained_domain(made):
    for domain in corpus.DOMAINS:
        row = made["bits_per_byte"][domain]
        assert row["tiny-llama"] < row["Kneser–Ney 5"], domain


def test_card_has_the_measured_numbers(made):
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for domain, row in made["bits_per_byte"].items():
        line = next(line for line in card.splitlines() if line.startswith(f"| {model_card.NAMES[domain]} |"))
        assert f"{row['tiny-llama']:.3f} | {row['Kneser–Ney 5']:.3f}" in line
    assert f"{made['tokens_seen']:,}" in card


def test_generates_text(loaded):
    model, tokenizer = loaded
    ids = tokenizer("In the beginning", return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert text.startswith("In the beginning") and len(text) > 30


@pytest.mark.parametrize(
    "text", ["naïve → 42 ☃\n\n\tx = [1]", "SELECT a, b FROM t WHERE c = 10;", "  two  spaces "]
)
def test_tokenizer_gives_back_any_text(loaded, text):
    _, tokenizer = loaded
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 0 and tokenizer.pad_token_id == 1 and not {0, 1} & set(ids)


def test_held_out_text_is_within_300_kb_and_has_every_domain():
    sizes = {path.stem: path.stat().st_size for path in (FOLDER / "heldout").glob("*.jsonl")}
    assert set(sizes) == {*corpus.DOMAINS, corpus.NEW_DOMAIN}
    assert sum(path.stat().st_size for path in (FOLDER / "heldout").iterdir()) < 300_000


def test_missing_folder_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path))
    with pytest.raises(models.ModelUnavailable, match=r"tiny-llama comes with the checkout.*LABKIT_DATA"):
        models.load("tiny-llama")


# Kneser–Ney


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_sums_to_one_after_seen_and_unseen_contexts(order):
    train = np.random.default_rng(1).zipf(1.5, 4000) % 50
    model = ngram.fit(train, order, vocab=64)
    for context in ([7, 1, 2, 1], list(train[100:104]), [63, 62, 61, 60], [1]):
        last = [model.probabilities(np.array([*context, w]))[-1] for w in range(64)]
        assert sum(last) == pytest.approx(1, abs=1e-12)


def test_kneser_ney_bigram_equals_the_closed_form():
    # "a b a c a b", D = 0.5, V = 4. Bigrams: ab 2, ba 1, ac 1, ca 1. Continuation counts: a 2 (b, c), b 1, c 1; all: 4.
    a, b, c, d = range(4)
    model = ngram.fit(np.array([a, b, a, c, a, b]), order=2, vocab=4, discount=0.5)

    def lower(n):  # 3 words discounted by a half; d was never seen
        return max(n - 0.5, 0) / 4 + 3 * 0.5 / 4 / 4

    expected = {
        (a, b): (2 - 0.5) / 3 + 2 * 0.5 / 3 * lower(1),
        (a, c): (1 - 0.5) / 3 + 2 * 0.5 / 3 * lower(1),
        (a, a): 2 * 0.5 / 3 * lower(2),
        (a, d): 2 * 0.5 / 3 * lower(0),
        (b, a): (1 - 0.5) / 1 + 0.5 * lower(2),
        (d, a): lower(2),  # a context that was never seen
    }
    for (first, second), p in expected.items():
        assert model.probabilities(np.array([first, second]))[0] == pytest.approx(p, rel=1e-12)


def test_kneser_ney_trigram_equals_a_recursion_over_strings():
    train = np.random.default_rng(2).integers(5, size=300)
    model = ngram.fit(train, order=3, vocab=5, discount=0.75)
    text = "".join(map(str, train))

    def count(gram: str, order: int) -> int:
        seen = [text[i : i + order] for i in range(len(text) - order + 1)]
        if order == 3:
            return seen.count(gram)
        longer = {text[i : i + len(gram) + 1] for i in range(len(text) - len(gram))}
        return sum(one.endswith(gram) for one in longer)

    def p(word: str, history: str) -> float:
        lower = p(word, history[1:]) if history else 1 / 5
        counts = [count(history + w, len(history) + 1) for w in "01234"]
        if not sum(counts):
            return lower
        return (
            max(counts[int(word)] - 0.75, 0) / sum(counts)
            + 0.75 * sum(n > 0 for n in counts) / sum(counts) * lower
        )

    probe = np.array([0, 1, 2, 3, 4, 4, 1, 0, 0, 3])
    expected = [p(str(probe[1]), str(probe[0]))]
    expected += [p(str(probe[i]), f"{probe[i - 2]}{probe[i - 1]}") for i in range(2, len(probe))]
    assert model.probabilities(probe) == pytest.approx(expected, rel=1e-12)


def test_kneser_ney_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="order can be 1 to 5"):
        ngram.fit(np.arange(10), order=6, vocab=16)


def test_windows_score_every_token_once():
    class Uniform:
        def __call__(self, input_ids):
            shape = (*input_ids.shape, 16)
            return type("Out", (), {"logits": torch.zeros(shape)})

    for n in (2, 300, 512, 513, 768, 769, 1500):
        assert evaluate.model_nats(Uniform(), [1] * n) == pytest.approx((n - 1) * np.log(16), rel=1e-5)


# Pretraining


def weights(result):
    return {name: p.detach().clone() for name, p in result[0].named_parameters()}


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    whole = pretrain.pretrain(STREAM, PLAN, tmp_path / "whole", MICRO, every=3)
    pretrain.pretrain(STREAM, PLAN, tmp_path / "cut", MICRO, every=3, stop_at=5)
    (tmp_path / "cut" / "part").mkdir()  # what a kill in the middle of writing leaves
    (tmp_path / "cut" / "part" / "state.safetensors").write_bytes(b"half")
    resumed = pretrain.pretrain(STREAM, PLAN, tmp_path / "cut", MICRO, every=3)
    assert resumed[1]["sessions"] == 2
    for name, one in weights(whole).items():
        assert torch.equal(one, weights(resumed)[name]), name
    rows = [
        [(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in result[1]["log"]]
        for result in (whole, resumed)
    ]
    assert rows[0] == rows[1]


def test_sigterm_saves_and_stops(tmp_path, monkeypatch):
    rate = pretrain.Plan.rate

    def rate_and_signal(plan, step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return rate(plan, step)

    monkeypatch.setattr(pretrain.Plan, "rate", rate_and_signal)
    _, state = pretrain.pretrain(STREAM, PLAN, tmp_path, MICRO)
    assert state["step"] == 4 and [p.name for p in tmp_path.iterdir()] == ["step-000004"]


def test_checkpoints_are_not_pickles(tmp_path):
    pretrain.pretrain(STREAM, PLAN, tmp_path, MICRO, stop_at=1)
    assert {p.name for p in (tmp_path / "step-000001").iterdir()} == {"state.safetensors", "state.json"}


def test_the_budget_may_change_before_the_decay_and_gives_the_run_of_that_budget(tmp_path):
    longer = replace(PLAN, tokens=2 * PLAN.tokens)
    whole = pretrain.pretrain(STREAM, PLAN, tmp_path / "whole", MICRO)
    pretrain.pretrain(STREAM, longer, tmp_path / "changed", MICRO, stop_at=6)
    changed = pretrain.pretrain(STREAM, PLAN, tmp_path / "changed", MICRO)
    assert all(torch.equal(one, weights(changed)[name]) for name, one in weights(whole).items())
    with pytest.raises(ValueError, match=r"the budget cannot change .* Go on with --tokens 256"):
        pretrain.pretrain(STREAM, longer, tmp_path / "changed", MICRO)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    pretrain.pretrain(STREAM, PLAN, tmp_path, MICRO, stop_at=1)
    with pytest.raises(ValueError, match=r"another run \(lr 0.01 -> 0.02\)"):
        pretrain.pretrain(STREAM, replace(PLAN, lr=2e-2), tmp_path, MICRO)
    with pytest.raises(ValueError, match="the training text"):
        pretrain.pretrain(STREAM[::-1].copy(), PLAN, tmp_path, MICRO)


def test_an_epoch_shows_every_window_once_and_the_next_another_cut():
    stream = np.arange(700, dtype=np.uint16)
    steps = (700 - 17) // 16 // 2
    first = [pretrain.windows(stream, PLAN, step) for step in range(steps)]
    starts = sorted(int(row[0]) for batch in first for row in batch)
    assert np.diff(starts).tolist() == [16] * (2 * steps - 1)
    later = sorted(
        int(row[0]) for step in range(steps, 2 * steps) for row in pretrain.windows(stream, PLAN, step)
    )
    assert later != starts


def test_learning_rate_warms_up_stays_and_decays_to_zero():
    plan = pretrain.Plan(tokens=1000 * 2048, warmup=100, decay=0.25, lr=1.0)
    rates = [plan.rate(step) for step in range(plan.steps)]
    assert rates[0] == 0.01 and rates[99:750] == [1.0] * 651
    assert np.diff(rates[750:]) == pytest.approx(-1 / 250) and rates[-1] == pytest.approx(1 / 250)


# Text


def test_training_text_has_no_line_of_held_out_text(monkeypatch, tmp_path):
    secret = "this sentence of more than forty characters is held out"
    page = corpus.Document("pydocs", "library/a", f"Title\n{secret}\nshort\n", True)
    other = corpus.Document("pydocs", "library/b", f"Other\n{secret.upper()}!\nshort\n", False)
    for name in ("kjv", "jargon", "docstrings", "sqlite", "devil"):
        monkeypatch.setattr(corpus, name, lambda folder: [])
    monkeypatch.setattr(corpus, "pydocs", lambda folder: [page, other])
    train, held = corpus.collect(tmp_path)
    assert train.text == "Other\nshort\n" and held == page


def test_page_text_keeps_code_and_leaves_out_navigation():
    html = "<nav>menu</nav><h1>Title<a class='headerlink'>¶</a></h1><p>one\n two</p><pre>x = 1\n  y</pre><svg>z</svg><p>end"
    assert pages.page_text(html) == "Title\n\none two\n\nx = 1\n  y\n\nend\n"


def test_docstrings_are_read_with_their_signatures():
    source = 'import os\nclass A(B):\n    """A."""\n    def f(self, x=1):\n        """Do\n        it."""\n'
    lines = "\n".join(corpus.described(corpus.ast.parse(source), ""))
    assert lines == 'class A(B):\n    """A."""\n\n    def f(self, x=1):\n        """Do\n        it."""\n'


def test_tokenizer_is_the_same_for_the_same_text():
    texts = ["In the beginning God created the heaven and the earth. " * 3, "def f(x): return x 1234"]
    one, two = (tokens.train_tokenizer(texts, vocab=300).backend_tokenizer.to_str() for _ in range(2))
    assert one == two
