"""What references mean, and how aliases are moved, rolled back and remembered."""

from datetime import timedelta

import pytest

from labkit.serving import AliasMoved, UnknownAdapter
from tests.serving.cases import START

MINUTE = timedelta(minutes=1)


def test_references_resolve_to_versions(filled):
    resolved = {
        ref: filled.resolve(ref).label for ref in ("support", "support@production", "support@v1", "sales@v1")
    }
    assert resolved == {
        "support": "support@v2",
        "support@production": "support@v2",
        "support@v1": "support@v1",
        "sales@v1": "sales@v1",
    }


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("suport", "there is no adapter 'suport'; there are 2: sales, support; did you mean 'support'?"),
        ("sales", "there is no alias sales@production; 'sales' has no alias; or name a version, as sales@v1"),
        ("support@staging", "there is no alias support@staging; its aliases are support@production"),
        ("support@v3", "there is no version v3 of 'support'; there is v1, v2"),
        ("nothing@v1", "there is no adapter 'nothing'"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(filled, reference, said):
    with pytest.raises(UnknownAdapter) as error:
        filled.resolve(reference)
    assert str(error.value).startswith(said)


def test_an_alias_is_moved_rolled_back_and_removed_and_its_history_stays(filled, folders):
    filled.publish("support", folders[2], "ann")
    filled.set_alias("support@production", 3)
    assert filled.rollback("support@production", "bob", "wrong refunds").number == 2
    assert filled.rollback("support@production").number == 1, "the second rollback goes back one more"
    with pytest.raises(ValueError, match="has pointed to nothing before v1; set it to a version"):
        filled.rollback("support@production")
    filled.set_alias("support@production", 3)
    assert filled.rollback("support@production").number == 1, (
        "to what it pointed to before, not to what was rolled back"
    )
    filled.remove_alias("support@production")
    with pytest.raises(UnknownAdapter, match="there is no alias support@production"):
        filled.resolve("support")
    moves = [(move.kind, move.number) for move in filled.history("support@production")]
    assert moves == [
        ("set", 1), ("set", 2), ("set", 3), ("rollback", 2), ("rollback", 1), ("set", 3), ("rollback", 1), ("remove", None),
    ]  # fmt: skip
    third = filled.history("support@production")[3]
    assert (third.author, third.note) == ("bob", "wrong refunds")
    filled.set_alias("support@production", 2)
    with pytest.raises(ValueError, match="nothing before v2"):
        filled.rollback("support@production")


def test_an_alias_that_points_there_already_is_not_moved(filled):
    before = filled.history("support@production")
    assert filled.set_alias("support@production", 2) == before[-1]
    assert filled.history("support@production") == before


def test_of_two_who_move_an_alias_at_once_the_second_hears_of_it(filled):
    with pytest.raises(AliasMoved, match=r"support@production points to v2, and not to v1"):
        filled.set_alias("support@production", 1, expected=1)
    with pytest.raises(AliasMoved, match="not to v1"):
        filled.rollback("support@production", expected=1)
    with pytest.raises(AliasMoved, match="points to nothing, and not to v1"):
        filled.set_alias("support@staging", 1, expected=1)
    assert filled.aliases() == {"support@production": 2}
    assert filled.rollback("support@production", expected=2).number == 1


@pytest.mark.parametrize(
    ("alias", "number", "kind"),
    [
        ("support@production", 9, UnknownAdapter),
        ("support@production", 0, ValueError),
        ("support@production", True, ValueError),
        ("support@v1", 1, ValueError),
        ("support", 1, ValueError),
        ("nothing@production", 1, UnknownAdapter),
        ("support@Production", 1, ValueError),
    ],
)
def test_an_alias_points_to_versions_only(filled, alias, number, kind):
    with pytest.raises(kind):
        filled.set_alias(alias, number)
    assert filled.aliases() == {"support@production": 2}


def test_what_served_at_a_time_stays_known(filled):
    filled.set_alias("sales@production", 1)
    filled.rollback("support@production")
    filled.remove_alias("support@production")
    pointed = [filled.at(START + n * MINUTE) for n in range(2, 8)]
    support = [{}, {"support@production": 1}, {"support@production": 2}, {"support@production": 2}]
    assert [{k: v for k, v in one.items() if k.startswith("support")} for one in pointed] == [
        *support, {"support@production": 1}, {},
    ]  # fmt: skip
    assert filled.at(START + 5 * MINUTE, "sales@production") == {"sales@production": 1}
    assert filled.at(START + 4 * MINUTE, "sales@production") == {}
    filled.delete("support@v2")
    assert filled.at(START + 4 * MINUTE) == {"support@production": 2}, "after its files are gone too"


def test_a_clock_that_goes_back_does_not_move_an_alias_back(registry, folders):
    registry.publish("support", folders[0], "ann")
    registry.publish("support", folders[1], "ann")
    registry.set_alias("support@production", 1)
    registry.clock = lambda: START - timedelta(days=1)
    registry.set_alias("support@production", 2)
    assert registry.resolve("support").number == 2 and registry.rollback("support@production").number == 1
