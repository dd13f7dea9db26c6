"""Labelled docstrings: balanced, as the datasheet says, without a word that gives the label away."""

import hashlib
import re

import pytest
import torch

from labkit.data.docstrings import PACKAGES, load_docstrings
from labkit.data.encoding import encode
from labkit.data.splits import SPLITS
from labkit.paths import data_folder
from tests.data.overlap import words


@pytest.fixture(scope="module")
def labelled():
    return {split: load_docstrings(split) for split in SPLITS}


def test_docstrings_are_balanced_and_as_many_as_the_sheet_says(labelled, tiny):
    _, tokenizer = tiny
    sheet = (data_folder() / "docstrings" / "README.md").read_text(encoding="utf-8")
    for split, records in labelled.items():
        each = {label: sum(r["completion"] == label for r in records) for label in PACKAGES}
        assert len(set(each.values())) == 1 and sum(each.values()) == len(records)
        modules = len({r["module"] for r in records})
        assert f"| {split} | {len(records)} | {each['A']} | {modules} |" in sheet
        for record in records:
            one = encode(record, tokenizer)
            assert one.prompt[0] == 0 and one.completion[1:] == [0] and len(one) <= 192
            assert tokenizer.decode(one.prompt[-7:]).endswith("\nPackage: ")
    for split in SPLITS:
        digest = hashlib.sha256((data_folder() / "docstrings" / f"{split}.jsonl").read_bytes()).hexdigest()
        assert f"| `{split}.jsonl` | `{digest}` |" in sheet
    assert all(len(labelled[s]) // 8 >= n for s, n in zip(SPLITS, (60, 15, 20)))
    for label, name in PACKAGES.items():
        assert f"| {label} | {name} |" in sheet


def test_no_module_and_no_near_duplicate_is_in_two_splits(labelled):
    modules = [{r["module"] for r in records} for records in labelled.values()]
    assert not (modules[0] & modules[1] or modules[0] & modules[2] or modules[1] & modules[2])
    texts = [words(body(r), 3) for records in labelled.values() for r in records]
    for i, one in enumerate(texts):
        for other in texts[:i]:
            assert not one or len(one & other) < 0.5 * len(one | other)
    assert len({body(r) for records in labelled.values() for r in records}) == len(texts)


def body(record):
    return record["prompt"].removeprefix("<|endoftext|>").removesuffix("\nPackage: ")


def test_no_docstring_names_its_package(labelled):
    for record in (r for records in labelled.values() for r in records):
        top = record["module"].split(".")[0].removeprefix("_py").strip("_")
        assert not re.search(rf"(?<![a-z]){top}", body(record), re.I), record
        assert 40 <= len(body(record)) <= 500


def test_the_sheets_baseline_is_naive_bayes_written_with_matrices(labelled):
    """Classes are equally frequent, so that only words count: counts @ log((count + 1) / total)."""
    vocabulary = sorted({w for r in labelled["train"] for w in re.findall(r"[a-z]+", body(r).lower())})
    index = {word: i for i, word in enumerate(vocabulary)}

    def counts(records):
        x = torch.zeros(len(records), len(index), dtype=torch.float64)
        for row, record in zip(x, records):
            for word in re.findall(r"[a-z]+", body(record).lower()):
                if word in index:
                    row[index[word]] += 1
        return x, torch.tensor(["ABCDEFGH".index(r["completion"]) for r in records])

    x, y = counts(labelled["train"])
    per_class = torch.stack([x[y == c].sum(0) for c in range(8)]) + 1
    weights = (per_class / per_class.sum(1, keepdim=True)).log()
    sheet = (data_folder() / "docstrings" / "README.md").read_text(encoding="utf-8")
    row = re.search(r"^\| naive Bayes on words \| ([\d.]+) % \| ([\d.]+) % \|", sheet, re.M)
    for split, stated in zip(("validation", "test"), row.groups()):
        x, y = counts(labelled[split])
        accuracy = ((x @ weights.T).argmax(1) == y).double().mean().item()
        assert 100 * accuracy == pytest.approx(float(stated), abs=0.05)


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="split='all'.*train.*validation.*test"):
        load_docstrings("all")
