"""Claims: a verdict is shown, carried as data in the output, and gathered into a ledger."""

import json

import pytest

from labkit.lab import claims


def test_claims_are_recorded_in_the_output_and_gathered(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(claims, "display", lambda data, raw: shown.append(data))
    claims.claim("C10", "later", "refuted", "3 > 2")
    claims.claim("C2", "earlier", "confirmed", "0 == 0")
    cell = {
        "cell_type": "code",
        "outputs": [{"output_type": "display_data", "data": json.loads(json.dumps(d))} for d in shown],
    }
    (tmp_path / "02_x.ipynb").write_text(json.dumps({"cells": [cell]}))
    rows = claims.ledger(tmp_path)
    assert [(r["claim"], r["verdict"], r["notebook"]) for r in rows] == [
        ("C2", "confirmed", "02_x.ipynb"), ("C10", "refuted", "02_x.ipynb"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="choose one of"):
        claims.claim("C1", "x", "true", "y")
    with pytest.raises(ValueError, match="said='S9'"):
        claims.claim("C1", "x", "confirmed", "y", said="S1 S9")
    with pytest.raises(ValueError, match="needs evidence"):
        claims.claim("C1", "x", "confirmed", " ")


def test_a_claim_names_who_makes_it(monkeypatch):
    shown = []
    monkeypatch.setattr(claims, "display", lambda data, raw: shown.append(data))
    claims.claim("C2", "x", "confirmed", "0 == 0.", said="S1 S4")
    assert shown[0][claims.MIME]["said"] == ["S1", "S4"]
    assert all(claims.SOURCES[source] in shown[0]["text/markdown"] for source in ("S1", "S4"))


def test_a_verdict_is_one_line_and_the_rest_is_folded(monkeypatch):
    shown = []
    monkeypatch.setattr(claims, "display", lambda data, raw: shown.append(data))
    claims.claim(
        "C9", "x", "refuted", "1.50 GB on 33B, i.e. 3.2 bits. Counted on the layers. Do: count.", said="S1"
    )
    line, _, folded = shown[0]["text/markdown"].partition("<details>")
    assert line.strip() == "**C9** “x” — **refuted.** 1.50 GB on 33B, i.e. 3.2 bits."
    assert "Counted on the layers. Do: count." in folded and claims.SOURCES["S1"] in folded
    assert shown[0][claims.MIME]["evidence"].endswith("Do: count."), "the data have all of it"
    claims.claim("C9", "x", "refuted", "1 > 0")
    assert "<details>" not in shown[1]["text/markdown"]
