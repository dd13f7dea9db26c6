from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.serving.times import read, understood, written

NOW = datetime(2026, 11, 29, 23, 30, tzinfo=UTC)
MOMENTS = st.datetimes(min_value=datetime(1900, 1, 2), max_value=datetime(9999, 12, 30))


@given(MOMENTS, MOMENTS, st.integers(-14, 14))
def test_written_times_are_read_back_and_sort_as_they_follow_each_other(one, other, hours):
    zone = timezone(timedelta(hours=hours))
    one, other = one.replace(tzinfo=zone), other.replace(tzinfo=UTC)
    assert read(written(one)) == one
    assert (written(one) < written(other)) == (one < other)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("2026-11-01", datetime(2026, 11, 1, tzinfo=UTC)),
        ("2026-11-01T14:05", datetime(2026, 11, 1, 14, 5, tzinfo=UTC)),
        ("2026-11-01 14:05:07Z", datetime(2026, 11, 1, 14, 5, 7, tzinfo=UTC)),
        ("2026-11-01T14:05+01:00", datetime(2026, 11, 1, 13, 5, tzinfo=UTC)),
        ("14:05", datetime(2026, 11, 29, 14, 5, tzinfo=UTC)),
    ],
)
def test_times_are_understood_as_people_write_them(text, want):
    assert understood(text, NOW) == want


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "25:00", "1764424800", "14.05"])
def test_other_times_are_refused(text):
    with pytest.raises(ValueError, match="is not a time; give 2026-11-29"):
        understood(text, NOW)


@pytest.mark.parametrize("when", [datetime(2026, 11, 1), "2026-11-01", None])
def test_a_time_without_a_zone_is_refused(when):
    with pytest.raises(ValueError, match="is not a time with a zone"):
        written(when)
