"""The ledger itself: sums, ratios, and what it refuses."""

import math

import pytest

from labkit.memory.formulas import plan
from labkit.memory.ledger import COMPONENTS, Ledger, LedgerRow, size
from tests.memory.conftest import SMALL


def test_a_ledger_adds_up():
    ledger = plan("smollm2-135m", "full")
    assert ledger.peak == sum(ledger.components(at_peak=True).values()) <= ledger.total
    assert ledger.total == sum(ledger.components().values()) == sum(row.bytes for row in ledger)
    assert list(ledger.components()) == list(COMPONENTS)
    assert all(isinstance(row.bytes, int) and row.formula for row in ledger)
    assert ledger.fits(ledger.peak / 1e9) and not ledger.fits(ledger.peak / 1e9, reserve=0.1)
    assert list(ledger.to_frame().columns) == ["component", "kind", "bytes", "at_peak", "formula", "source"]
    assert size(ledger.peak) in str(ledger)


def test_comparison_gives_ratios():
    one = Ledger([LedgerRow("weights", "fp32", 100, 100), LedgerRow("activations", "mlp", 50, 0)])
    other = Ledger([LedgerRow("weights", "fp32", 50, 50)])
    frame = one.compare(other).set_index(["component", "kind"])["ratio"]
    assert frame["weights", "all"] == 2 and frame["peak", "all"] == 2
    assert math.isinf(frame["activations", "mlp"])


def test_a_ledger_refuses_what_is_no_row():
    with pytest.raises(ValueError, match="component='weight' is not known; choose one of \\('weights'"):
        LedgerRow("weight", "", 1, 1)
    with pytest.raises(TypeError, match="whole number of bytes"):
        LedgerRow("weights", "", 1.5, 1)
    with pytest.raises(KeyError, match="the components are weights"):
        plan(SMALL, "lora")["weigths"]
    with pytest.raises(KeyError, match="activations has the kinds"):
        plan(SMALL, "lora")["activations/mpl"]


@pytest.mark.parametrize("gigabytes", ["8", -1, math.nan, None])
def test_a_card_of_no_size_is_refused(gigabytes):
    with pytest.raises(ValueError, match="gigabytes=.* must be a number of at least 0"):
        Ledger([LedgerRow("weights", "fp32", 1, 1)]).fits(gigabytes)
