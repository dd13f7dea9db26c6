"""Who is asked: users stay with their version, and shares are kept."""

import math

import pytest

from labkit.serving.assignment import assign, person_of

USERS = [f"user-{n}" for n in range(4000)]


def test_users_stay_with_their_version_and_the_shares_are_kept():
    shares = {"a@v3": 0.2, "a@v2": 0.8}
    given = [assign(user, shares) for user in USERS]
    assert given == [assign(user, shares) for user in USERS]
    assert abs(given.count("a@v3") / len(USERS) - 0.2) < 3 * math.sqrt(0.16 / len(USERS))


def test_a_growing_share_takes_nobody_back():
    before = {user for user in USERS if assign(user, {"a@v3": 0.2, "a@v2": 0.8}) == "a@v3"}
    after = {user for user in USERS if assign(user, {"a@v3": 0.5, "a@v2": 0.5}) == "a@v3"}
    assert before < after


def test_another_trial_draws_other_users():
    one, other = ({u for u in USERS if assign(u, {"a": 0.5, "b": 0.5}, salt) == "a"} for salt in ("x", "y"))
    assert abs(len(one & other) / len(USERS) - 0.25) < 0.03


def test_a_version_without_a_share_is_never_given():
    assert {assign(user, {"a": 0.0, "b": 1.0, "c": 0}) for user in USERS} == {"b"}


@pytest.mark.parametrize(
    "shares", [{}, {"a": 0.5}, {"a": 0.7, "b": 0.7}, {"a": -0.5, "b": 1.5}, {"a": math.nan, "b": 1}]
)
def test_shares_that_do_not_add_up_are_refused(shares):
    with pytest.raises(ValueError, match="must"):
        assign("user", shares)


def test_a_person_in_a_record_is_the_user_to_whoever_knows_the_name_and_another_one_in_another_trial():
    assert person_of("ann", "trial 1") == person_of("ann", "trial 1") != person_of("ann", "trial 2")
    assert len({person_of(user, "t") for user in USERS}) == len(USERS) and "ann" not in person_of("ann", "")


@pytest.mark.parametrize("user", ["", "ä" * 256, "\ud800", "a\nb"])
def test_any_text_is_a_user(user):
    assert assign(user, {"a": 0.5, "b": 0.5}, "t") in ("a", "b") and len(person_of(user, "t")) == 16
