"""Predictions: headless they list the choices, with widgets they remember what the reader chose."""

import pytest

from labkit.lab import predictions
from labkit.lab.predictions import Prediction, predict


def test_prediction_headless_shows_the_choices_then_the_answer(monkeypatch, capsys):
    monkeypatch.setenv("LABKIT_STATIC", "1")
    prediction = predict("How many?", ["one", "two"])
    assert prediction.choice is None
    prediction.reveal("two", "Because.")
    with pytest.raises(ValueError, match="not one of the choices"):
        prediction.reveal("three", "")
    with pytest.raises(ValueError, match="at least two different"):
        Prediction("?", ["same", "same"])


def test_prediction_with_widgets_tells_the_reader_what_they_said(monkeypatch):
    shown = []
    monkeypatch.setenv("LABKIT_STATIC", "0")
    monkeypatch.setattr(predictions, "display", lambda item: shown.append(getattr(item, "data", item)))
    prediction = predict("How many?", ["one", "two"])
    prediction.reveal("two", "Because.")
    assert "made no prediction" in shown[-1]
    prediction.buttons.value = "one"
    prediction.reveal("two", "Because.")
    assert "You said: one." in shown[-1]
    prediction.buttons.value = "two"
    prediction.reveal("two", "Because.")
    assert "You had it." in shown[-1]
