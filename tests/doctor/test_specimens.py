"""Healthy specimens learn at a rate that a recorded sweep of their task found good."""

import pytest

from labkit.doctor.specimens import LR, RATES, TASKS, valley_for


@pytest.mark.parametrize("task", TASKS)
def test_healthy_runs_of_a_task_have_a_rate_in_its_swept_valley(task):
    valley = valley_for(task)
    assert valley.seeds == 3 and valley.low < RATES[task] < valley.high


def test_ten_times_more_or_less_is_measurably_worse_on_orders():
    valley = valley_for("orders")
    assert valley.high < 10 * LR and valley.low > LR / 10
