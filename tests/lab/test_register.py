"""The ledger: 81 claims with verdict, evidence, source and advice, and links that lead to their headings."""

import json
import re
from collections import Counter
from pathlib import Path

import nbformat
import pytest

from labkit.lab import claims
from labkit.lab.explore import capstone as explore
from labkit.lab.explore.capstone import chosen
from labkit.lab.figures.capstone import guide_table, register_table, verdict_bars
from labkit.lab.register import (
    IN_PARTS,
    MOST_DEPENDS,
    OPEN,
    counted,
    read_guide,
    read_register,
)
from tests.lab import explorers

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


@pytest.fixture(scope="module")
def register():
    return read_register(NOTEBOOKS)


def notebook(folder, name, cells):
    """A notebook of markdown texts, and of claims as dicts, one cell each."""
    made = [
        {"cell_type": "markdown", "id": f"cell-{i}", "source": one}
        if isinstance(one, str)
        else {"cell_type": "code", "id": f"cell-{i}", "source": "", "outputs": [{"data": {claims.MIME: one}}]}
        for i, one in enumerate(cells)
    ]
    (folder / name).write_text(json.dumps({"cells": made}))


def ruling(number, verdict, evidence="1 > 0. 3 seeds · a model · measured.", statement="s"):
    return {"claim": number, "statement": statement, "verdict": verdict, "evidence": evidence}


def test_there_are_81_claims_and_each_says_who_what_and_what_to_do(register):
    assert [claim.number for claim in register] == [f"C{n}" for n in range(1, 82)]
    for claim in register:
        assert claim.said and claim.do.endswith(".") and claim.do[0].isupper() and claim.statement


def test_every_claim_is_settled_with_evidence_of_a_kind(register):
    assert [claim.number for claim in register if claim.verdict == OPEN] == []
    for claim in register:
        for one in claim.rulings:
            assert one.kinds, f"{claim.number} in {one.notebook} does not say how its evidence came about"
            assert one.sample or "counted" in one.kinds or "planned" in one.kinds or "measured" in one.kinds


def test_at_most_a_third_depends_and_each_says_where_it_turns(register):
    depends = [claim for claim in register if claim.is_depends]
    assert len(depends) <= MOST_DEPENDS, [claim.number for claim in depends]
    for claim in depends:
        turning = [one.first for one in claim.rulings if one.verdict == "depends"]
        assert all(re.search(r"\d", text) for text in turning), claim.number


def test_lessons_that_differ_say_which_condition_each_means(register):
    for claim in register:
        lessons = {one.notebook for one in claim.rulings}
        if len(lessons) > 1 and len({one.verdict for one in claim.rulings}) > 1:
            assert all(claim.path_of(one) for one in claim.rulings), claim.number
        assert set(claim.paths) <= {name.removesuffix(".ipynb") for name in lessons}, claim.number


def test_links_lead_to_cells_below_the_headings_that_they_name(register):
    ids = {}
    for one in (one for claim in register for one in claim.rulings):
        if one.notebook not in ids:
            cells = json.loads((NOTEBOOKS / one.notebook).read_text(encoding="utf-8"))["cells"]
            ids[one.notebook] = (
                [cell.get("id") for cell in cells],
                [
                    heading
                    for cell in cells
                    if cell["cell_type"] == "markdown"
                    for heading in claims.headings_of("".join(cell["source"]))
                ],
            )
        cells, headings = ids[one.notebook]
        assert one.heading in headings and cells.count(one.cell) == 1, one
        assert one.link == f"{one.notebook}#cell-id={one.cell}"


def test_pages_made_of_a_notebook_have_the_fragment_of_a_link(tmp_path):
    """Those of JupyterLab resolve `#cell-id=` too (its notebook panel's `setFragment`)."""
    exporters = pytest.importorskip("nbconvert.exporters")
    notebook(tmp_path, "01_a.ipynb", ["# A", ruling("C1", "refuted")])
    made = json.loads((tmp_path / "01_a.ipynb").read_text()) | {
        "metadata": {},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    made["cells"] = [cell | {"metadata": {}} for cell in made["cells"]]
    made["cells"][1] |= {"execution_count": None, "outputs": []}
    page, _ = exporters.HTMLExporter().from_notebook_node(nbformat.from_dict(made))
    assert 'id="cell-id=cell-1"' in page


def test_the_table_has_a_row_and_a_link_for_every_ruling(register):
    table = register_table(register).data
    assert table.count("<tr") == 1 + sum(max(1, len(claim.rulings)) for claim in register)
    for claim in register:
        assert f'id="{claim.number}"' in table
        assert all(f'href="{one.link}"' in table for one in claim.rulings)
        assert all(
            f"“{re.search('“(.+?)”', claims.SOURCES[source])[1]}” " not in source for source in claim.said
        )


def test_the_guide_rests_on_verdicts_that_the_ledger_still_has(register):
    numbers = {claim.number for claim in register}
    guide = read_guide()
    for line in guide:
        assert set(line.because) <= numbers and line.changed(register) == [], line
    assert "read this line again" not in guide_table(guide, register).data


def test_verdicts_that_differ_on_one_statement_depend_and_parts_stay_apart(tmp_path):
    data = tmp_path / "claims.json"
    lines = [
        {"claim": f"C{n}", "statement": "s", "said": ["S1"], "theme": "t", "do": "Do."} for n in range(1, 5)
    ]
    lines[0]["paths"] = {"01_a": "slow", "02_b": "fast"}
    data.write_text(json.dumps(lines))
    notebook(tmp_path, "01_a.ipynb", ["# A\n\n## `One` *two*", ruling("C1", "confirmed")])
    parts = [ruling("C2", "confirmed", statement="x"), ruling("C2", "refuted", statement="y")]
    notebook(tmp_path, "02_b.ipynb", ["## B", ruling("C1", "refuted"), *parts, ruling("C3", "refuted")])
    found = read_register(tmp_path, data)
    assert [claim.verdict for claim in found] == ["depends", IN_PARTS, "refuted", OPEN]
    assert [claim.is_depends for claim in found] == [True, False, False, False]
    assert [found[0].path_of(one) for one in found[0].rulings] == ["slow", "fast"]
    assert found[0].rulings[0].link == "01_a.ipynb#cell-id=cell-1"
    assert found[0].rulings[0].heading == "One two"
    assert counted(found) == Counter({"depends": 1, IN_PARTS: 1, "refuted": 1, OPEN: 1})
    assert [c.number for c in chosen(found, verdict="refuted")] == ["C1", "C2", "C3"]
    notebook(tmp_path, "03_c.ipynb", [ruling("C9", "refuted")])
    with pytest.raises(ValueError, match="rules on C9, which claims.json does not have"):
        read_register(tmp_path, data)


@pytest.mark.parametrize(
    ("evidence", "kinds", "sample"),
    [
        ("A. 3 seeds · tiny-llama, r = 8 · measured, recorded. Do: x.", ("measured", "recorded"), "3 seeds · tiny-llama, r = 8 · measured, recorded"),
        ("It is 5. Planned, not measured on a GPU yet.", ("planned",), ""),
        ("It holds (1 seed · a model · measured). More.", ("measured",), "1 seed · a model · measured"),
        ("Counted. Do: count.", ("counted",), ""),
    ],
)  # fmt: skip
def test_kind_and_sample_are_read_off_the_evidence(tmp_path, evidence, kinds, sample):
    data = tmp_path / "claims.json"
    data.write_text(
        json.dumps([{"claim": "C1", "statement": "s", "said": ["S1"], "theme": "t", "do": "Do."}])
    )
    notebook(tmp_path, "01_a.ipynb", ["# A", ruling("C1", "refuted", evidence)])
    (one,) = read_register(tmp_path, data)[0].rulings
    assert (one.kinds, one.sample) == (kinds, sample)


def test_headings_in_code_are_none():
    assert claims.headings_of("## A `b` *c*\n```\n# no\n```\ntext\n### D #") == ["A b c", "D"]


def test_bars_count_what_they_show(register):
    figure = verdict_bars({"all": counted(register), "S1": counted(register[:9])}, "x")
    written = [int(text.get_text()) for text in figure.axes[0].texts]
    assert sum(written) == 81 + 9


def test_the_explorer_filters_by_theme_verdict_source_and_word(register):
    def show():
        explore.ledger_explorer(register, [{"theme": "merging"}])

    figure, table = explorers.shown(explore, show)
    merging = [claim for claim in register if claim.theme == "merging"]
    assert explorers.title(figure) == f"{len(merging)} of 81 claims: merging"
    assert all(f'id="{claim.number}"' in table.data for claim in merging[: explore.SHOWN])
    explorer = explorers.Explorer(explore, show, interactive=True)
    assert list(explorer.controls) == ["theme", "verdict", "said", "word"]
    assert set(explorer.controls["verdict"].options) <= {"all", *claims.VERDICTS}
    assert [claim.number for claim in chosen(register, word="c77")] == ["C77"]
    assert all("S3" in claim.said for claim in chosen(register, said="S3"))


def test_the_explorer_says_when_nothing_matches(register, capsys):
    explorers.Explorer(explore, lambda: explore.ledger_explorer(register, [{}])).draw(word="no such word")
    assert "no claim matches no such word" in capsys.readouterr().out
