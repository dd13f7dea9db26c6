"""tiny-llama as it is shipped: its files, its card, and the measurements that the card states."""

import hashlib
import json
import re
import socket

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from labkit import models
from labkit.paths import data_folder
from recipes.tiny_llama import card as model_card
from recipes.tiny_llama import corpus, evaluate, finish

FOLDER = data_folder() / "tiny-llama"


@pytest.fixture(scope="module")
def made() -> dict:
    return json.loads((FOLDER / "provenance.json").read_text())


@pytest.fixture(scope="module")
def loaded():
    return models.load("tiny-llama")


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
    # 2,044 tokens; other machines and thread counts add up in another order, which moves a mean loss by far
    # less
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


def test_card_is_the_one_that_the_recipe_writes_but_for_a_note_on_this_run(made):
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    start = card.index("The budget of this run was raised")
    end = card.index("## Make it again")
    assert card[:start] + card[end:] == model_card.card(made)
    assert (FOLDER / "heldout" / "README.md").read_text(encoding="utf-8") == finish.HELD_OUT_README


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


def test_windows_score_every_token_once():
    class Uniform:
        def __call__(self, input_ids):
            shape = (*input_ids.shape, 16)
            return type("Out", (), {"logits": torch.zeros(shape)})

    for n in (2, 300, 512, 513, 768, 769, 1500):
        assert evaluate.model_nats(Uniform(), [1] * n) == pytest.approx((n - 1) * np.log(16), rel=1e-5)
