"""Austen and the held-out text: passages fit and lose nothing, splits share nothing, datasheets are right."""

import hashlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.data.encoding import encode
from labkit.data.passages import HELD_OUT_DOMAINS, cut_passages, fits, load_austen, load_held_out
from labkit.data.splits import SPLITS, read_jsonl
from labkit.paths import data_folder
from labkit.training.evaluate import text_loss
from tests.data.overlap import words


def test_every_passage_starts_with_the_document_token_ends_with_it_and_fits_into_192_tokens(tiny):
    _, tokenizer = tiny
    records = [r for split in SPLITS for r in load_austen(split)]
    records += [r for domain in HELD_OUT_DOMAINS for r in load_held_out(domain)]
    for record in records:
        one = encode(record, tokenizer)
        assert one.prompt == [0] and one.completion[-1] == 0 and 0 not in one.completion[:-1]
        assert len(one) <= 192 and len(record["completion"]) <= 600


@pytest.mark.parametrize("domain", HELD_OUT_DOMAINS)
def test_held_out_passages_are_the_whole_text_said_once(domain):
    rows = read_jsonl(data_folder() / "tiny-llama" / "heldout" / f"{domain}.jsonl")
    passages = [cut_passages(row["text"]) for row in rows]
    for row, cut in zip(rows, passages):
        assert "".join("".join(cut).split()) == "".join(row["text"].split())
    assert sorted(r["completion"] for r in load_held_out(domain)) == sorted(
        passage for cut in passages for passage in cut
    )


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab .,;-\n☃é", max_size=3000))
def test_passages_of_any_text_fit_and_lose_only_space(text):
    cut = cut_passages(text)
    assert all(passage and fits(passage) for passage in cut)
    assert "".join("".join(cut).split()) == "".join(text.split())


def test_passages_prefer_paragraphs_and_do_not_end_after_mr():
    first, second = "One two three four. " * 20, "Mr. Darcy bowed. " * 20
    assert cut_passages(f"{first}\n\n{second}") == [first.strip(), second.strip()]
    assert not any(passage.endswith("Mr.") for passage in cut_passages("We saw Mr. Darcy there, and " * 200))
    long = ("It is Mr. Bennet's own. " * 60).strip()
    assert len(cut_passages(long)) > 1
    assert all(passage.startswith("It is") and passage.endswith("own.") for passage in cut_passages(long))


def test_a_limit_gives_a_prefix_of_at_least_so_many_bytes_from_several_documents():
    everything = load_held_out("kjv")
    some = load_held_out("kjv", limit_bytes=8000)
    assert some == everything[: len(some)] == load_held_out("kjv", limit_bytes=8000)
    sizes = [len(r["completion"].encode()) for r in some]
    assert sum(sizes) >= 8000 > sum(sizes[:-1])
    assert len({r["name"] for r in some}) > 5
    assert load_held_out("kjv", limit_bytes=10**9) == everything


@pytest.fixture(scope="module")
def novels():
    return {split: load_austen(split) for split in SPLITS}


def test_austen_is_split_by_whole_novels_and_shares_no_eight_words(novels):
    names = {split: {r["novel"] for r in records} for split, records in novels.items()}
    assert [len(names[split]) for split in SPLITS] == [4, 1, 1] and len(set.union(*names.values())) == 6
    seen = {split: set().union(*(words(r["completion"], 8) for r in novels[split])) for split in SPLITS}
    assert len(seen["test"]) > 5000
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_training_passages_come_in_equal_parts_and_random_order(novels):
    size = dict.fromkeys({r["novel"] for r in novels["train"]}, 0)
    for record in novels["train"]:
        size[record["novel"]] += len(record["completion"].encode())
    assert all(149_000 < n <= 150_000 for n in size.values())
    first = [r["novel"] for r in novels["train"][:100]]
    assert all(10 < first.count(novel) < 45 for novel in size)


def test_austen_has_no_headings_wraps_italics_or_editors(novels):
    for record in (r for records in novels.values() for r in records):
        text = record["completion"]
        assert not re.search(
            r"^(?:chapter|volume) (?:[ivxl]+|\d+)$|finis$|_|  |Signet|\* \*", text, re.I | re.M
        )


def test_austens_sheet_counts_what_is_there(novels, tiny):
    _, tokenizer = tiny
    sheet = (data_folder() / "austen" / "README.md").read_text(encoding="utf-8")
    for split, records in novels.items():
        texts = [r["completion"] for r in records]
        size = sum(len(text.encode()) for text in texts)
        tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        names = ", ".join(sorted({r["novel"] for r in records}))
        assert f"| {split} | {names} | {len(texts)} | {size} | {tokens} |" in sheet
        digest = hashlib.sha256((data_folder() / "austen" / f"{split}.jsonl").read_bytes()).hexdigest()
        assert f"| `{split}.jsonl` | `{digest}` |" in sheet


def test_austens_sheet_has_the_loss_before_adaptation(novels, tiny):
    sheet = (data_folder() / "austen" / "README.md").read_text(encoding="utf-8")
    row = re.search(r"^\| validation \| (\d\.\d+) \|", sheet, re.M)
    loss, _ = text_loss(*tiny, novels["validation"])
    assert loss == pytest.approx(float(row[1]), abs=2e-3)


def test_a_missing_data_folder_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="set LABKIT_DATA"):
        load_austen("test")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_austen("dev"), "split='dev'.*train.*validation.*test"),
        (lambda: load_held_out("bible"), "domain='bible'.*kjv.*devil"),
        (lambda: load_held_out("kjv", limit_bytes=0), "limit_bytes=0 must be a whole number of at least 1"),
        (lambda: load_held_out("kjv", limit_bytes=2.5), "limit_bytes=2.5 must be a whole number"),
    ],
)
def test_errors_name_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
