"""The tickets: as many and as labelled as the datasheet says; train and test really apart."""

import collections
import re

import pytest

from labkit.data.splits import SPLITS
from labkit.data.tickets import TICKET_FIELDS, load_tickets
from labkit.paths import data_folder


@pytest.fixture(scope="module")
def splits():
    return {split: load_tickets(split) for split in SPLITS}


def test_there_are_as_many_as_the_datasheet_says(splits):
    sizes = {split: len(rows) for split, rows in splits.items()}
    assert sizes == {"train": 1272, "validation": 110, "test": 220}
    sheet = (data_folder() / "tickets" / "README.md").read_text()
    assert all(f"| {split} | {n} |" in sheet for split, n in sizes.items())


def test_every_label_follows_the_guide(splits):
    for ticket in (t for rows in splits.values() for t in rows):
        label, message = ticket["label"], ticket["message"]
        assert tuple(label) == TICKET_FIELDS, ticket["id"]
        for field in ("customer", "product", "order"):
            assert label[field] is None or label[field] in message, ticket["id"]
        assert label["category"] in ("delivery", "fault", "billing", "return", "question")
        assert label["urgency"] in ("high", "normal", "low") and label["contact"] in ("first", "again")


def test_no_message_occurs_twice(splits):
    messages = [re.sub(r"\W+", " ", t["message"].lower()) for rows in splits.values() for t in rows]
    assert len(set(messages)) == len(messages)


def test_test_has_products_names_and_orders_that_train_never_shows(splits):
    for field in ("customer", "product", "order"):
        seen = {t["label"][field] for t in splits["train"]} - {None}
        held_out = {t["label"][field] for t in splits["test"]} - {None}
        assert len(held_out) > 50 and not seen & held_out, field


def skeleton(ticket):
    """The message with its name, product and numbers taken out: what a template would leave."""
    text = ticket["message"]
    for field in ("customer", "product", "order"):
        if ticket["label"][field]:
            text = text.replace(ticket["label"][field], field.upper())
    return re.sub(r"\d+", "0", text.lower())


def test_messages_are_written_and_not_filled_into_templates(splits):
    skeletons = collections.Counter(skeleton(t) for rows in splits.values() for t in rows)
    assert max(skeletons.values()) == 1
    beginnings = collections.Counter(" ".join(t["message"].split()[:3]).lower() for t in splits["train"])
    assert beginnings.most_common(1)[0][1] <= 15


def test_the_announced_difficulties_are_there(splits):
    rows = [t for split in splits.values() for t in split]
    tags = collections.Counter(tag for t in rows for tag in t["tags"])
    assert all(
        tags[tag] >= 100
        for tag in (
            "two_orders",
            "other_number",
            "two_products",
            "other_person",
            "dates",
            "implied_contact",
            "typos",
        )
    )
    for field in ("customer", "product", "order"):
        assert sum(t["label"][field] is None for t in rows) >= 60


def test_unknown_split_and_missing_folder(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="split='dev' is not known"):
        load_tickets("dev")
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="set LABKIT_DATA"):
        load_tickets("train")
