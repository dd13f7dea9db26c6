"""Definitions of a dictionary: as many as the datasheet says, the bytes that it names, and what the recipe makes of its source."""

import hashlib
import re
from collections import Counter

from labkit.data import find_leaks, hold_out, read_records
from labkit.paths import data_folder
from recipes import definitions

FOLDER = data_folder() / "definitions"


def test_the_file_is_what_the_datasheet_says():
    records, report = read_records(FOLDER / "definitions.csv", columns=definitions.COLUMNS)
    counts = Counter(record["completion"].strip() for record in records)
    assert not report.faults and counts == dict.fromkeys(definitions.KINDS.values(), definitions.EACH)
    sheet = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"| {len(records)} | {definitions.EACH} |" in sheet
    assert hashlib.sha256((FOLDER / "definitions.csv").read_bytes()).hexdigest() in sheet
    assert "Princeton University" in (FOLDER / "LICENSE.txt").read_text(encoding="utf-8")


def test_what_is_held_out_has_no_copies_among_the_rest():
    records, _ = read_records(FOLDER / "definitions.csv", columns=definitions.COLUMNS)
    train, held = hold_out(records, share=100 / len(records), seed=0)
    assert len(held) == 100 and not find_leaks(train, held)


def test_examples_and_other_kinds_are_left_out(tmp_path):
    source = tmp_path / "data.noun"
    source.write_text(
        "  1 a licence | with a bar\n"
        '00015388 05 n 01 beast 0 000 | a living organism that moves; "the beast ran"; "it sat"\n'
        "00015389 13 n 01 stew 0 000 | food cooked slowly in a closed pot\n"
        "00015390 04 n 01 act 0 000 | something that people do or cause\n"
        "00015391 05 n 01 it 0 000 | too short\n"
    )
    found = definitions.read(source)
    assert found["animal"] == ["a living organism that moves"]
    assert found["food"] == ["food cooked slowly in a closed pot"] and sum(map(len, found.values())) == 2


def test_the_draw_is_even_and_always_the_same():
    many = {
        kind: [f"{kind} number {n} of a long list" for n in range(200)] for kind in definitions.KINDS.values()
    }
    rows = definitions.drawn(many)
    assert rows == definitions.drawn(many) and len(set(rows)) == len(rows) == 6 * definitions.EACH
    assert re.match(r"definition,kind\n.+,\w+\n", definitions.as_csv(rows))
