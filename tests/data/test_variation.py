"""Variations of tickets: other names and numbers, the same reading."""

import copy
import random
import re

import pytest

from labkit.data.tickets import load_tickets
from labkit.data.variation import reshuffled, varied, vary

TRAIN = load_tickets("train")
NEW = varied(TRAIN, seed=1)
COPIED = ("customer", "product", "order")


@pytest.mark.parametrize("field", COPIED)
def test_what_is_to_be_copied_stands_in_the_message_as_often_as_before(field):
    for old, new in zip(TRAIN, NEW):
        before, after = old["label"][field], new["label"][field]
        assert (before is None) == (after is None)
        if after is not None:
            assert new["message"].count(after) == old["message"].count(before) == 1, (old, new)


def test_nearly_all_of_it_is_new():
    for field, least in (("customer", 0.95), ("product", 0.95), ("order", 0.99)):
        pairs = [(a["label"][field], b["label"][field]) for a, b in zip(TRAIN, NEW) if a["label"][field]]
        assert sum(a != b for a, b in pairs) >= least * len(pairs), field


def test_what_is_to_be_understood_stays():
    for old, new in zip(TRAIN, NEW):
        assert {k: v for k, v in new["label"].items() if k not in COPIED} == {
            k: v for k, v in old["label"].items() if k not in COPIED
        }
        gone, kept = old["message"].split(), new["message"].split()
        assert len(gone) == len(kept), "word for word"
        spans = {word.lower() for f in COPIED for word in re.findall(r"\w+", str(old["label"][f]))}
        for was, now in zip(gone, kept):
            assert was == now or spans & set(re.findall(r"\w+", was.lower())), (was, now)


def test_names_come_from_training_tickets_only():
    known = {
        word
        for t in TRAIN
        for word in re.findall(r"\w+", f"{t['label']['customer']} {t['label']['product']}")
    }
    for new in NEW:
        words = re.findall(r"\w+", f"{new['label']['customer']} {new['label']['product']}")
        assert {word.lower() for word in words} <= {word.lower() for word in known}


def test_the_seed_decides_and_the_tickets_are_unchanged():
    tickets = copy.deepcopy(TRAIN[:50])
    first, again, other = (varied(tickets, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert tickets == TRAIN[:50]


def test_a_number_keeps_its_pattern():
    for number in ("SL-16-3", "7-404", "28-N-0", "88210-C", "A/12.b"):
        new = reshuffled(number, random.Random(3))
        shape = [("d" if c.isdigit() else "U" if c.isupper() else "l" if c.islower() else c) for c in number]
        assert shape == [
            ("d" if c.isdigit() else "U" if c.isupper() else "l" if c.islower() else c) for c in new
        ]


def test_a_name_that_stands_twice_changes_in_both_places():
    ticket = {
        "message": "Verbena Box is fine, Ana says. The Verbena Chest, order VC-11, is not. Ana Dahl",
        "label": {"customer": "Ana Dahl", "product": "Verbena Chest", "order": "VC-11", "category": "fault"},
    }
    draw = random.Random(0)
    new = vary(ticket, ["Bo Ek"], ["Umeå"], draw)
    assert new["label"]["customer"] == "Bo Ek"
    assert re.fullmatch(
        r"Umeå Box is fine, Bo says. The Umeå Chest, order [A-Z]{2}-[1-9]\d, is not. Bo Ek", new["message"]
    )
