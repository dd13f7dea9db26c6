"""Progress: noted by itself where somebody reads, one file a person, and nothing is lost by whatever happens to it."""

import json
import multiprocessing
from pathlib import Path

import pytest

from labkit.lab import check, diary, predictions, standing


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder for progress, and a kernel that has noted nothing."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("LABKIT_PROGRESS", "yes")
    monkeypatch.delenv("LABKIT_PERSON", raising=False)
    monkeypatch.setattr(diary, "_kernel", diary.Kernel())
    return tmp_path / "labkit"


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    """What is displayed."""
    made: list[str] = []
    monkeypatch.setattr(standing, "display", lambda item: made.append(item.data))
    return made


def lesson(name: str = "me") -> dict:
    (part,) = diary.read(name)["lessons"].values()
    return part


def note_twenty(kernel: str, both) -> None:
    """As another kernel, as soon as both are there."""
    diary._kernel = diary.Kernel()
    both.wait(60)
    for n in range(20):
        diary.note_exercise(f"{kernel} {n}", True)


def solve() -> None:
    check.weight_bytes(lambda parameters, bits: parameters * bits / 8)


def fail() -> None:
    with pytest.raises(check.NotYet):
        check.weight_bytes(lambda parameters, bits: parameters * bits)


def test_checks_and_predictions_note_themselves(folder, monkeypatch):
    fail()
    solve()
    fail()  # an exercise that passed has passed
    monkeypatch.setenv("LABKIT_STATIC", "0")
    monkeypatch.setattr(predictions, "display", lambda item: None)
    question = predictions.predict("How many?", ["one", "two"])
    question.reveal("two", "Because.")  # nothing was chosen: nothing to note
    question.buttons.value = "one"
    question.reveal("two", "Because.")
    question.buttons.value = "two"  # now that the answer is known
    question.reveal("two", "Because.")
    assert lesson()["exercises"] == {"weight_bytes": {"passed": True, "tries": 2}}
    assert lesson()["predictions"] == {"How many?": {"choice": "one", "right": False}}


@pytest.mark.parametrize("name", ["quant_backward", "strict_match", "diagnose"])
def test_checks_that_compare_nothing_note_themselves_too(folder, name):
    with pytest.raises(check.NotYet):
        getattr(check, name)(lambda *_: None)
    assert lesson()["exercises"] == {name: {"passed": False, "tries": 1}}


def test_headless_and_in_tests_nothing_is_noted(folder, monkeypatch, shown):
    monkeypatch.setenv("LABKIT_PROGRESS", "no")
    solve()
    monkeypatch.delenv("LABKIT_PROGRESS")
    monkeypatch.setenv("LABKIT_STATIC", "1")
    solve()
    diary.tick()
    standing.progress()
    assert not folder.exists() and shown == [standing.NOT_KEPT]


def test_two_people_on_one_account_have_a_file_each(folder, monkeypatch, shown):
    standing.progress("Ada")
    solve()
    monkeypatch.setenv("LABKIT_PERSON", "Bo")  # a kernel of Bo's
    monkeypatch.setattr(diary, "_kernel", diary.Kernel())
    fail()
    assert (
        lesson("Ada")["exercises"]["weight_bytes"]["passed"]
        and not lesson("Bo")["exercises"]["weight_bytes"]["passed"]
    )
    monkeypatch.delenv("LABKIT_PERSON")
    monkeypatch.setattr(diary, "_kernel", diary.Kernel())
    assert diary.person() == "Ada"  # whoever chose last
    assert diary.file_of("ADA") == diary.file_of("Ada") != diary.file_of("Bo")


def test_no_name_leads_out_of_the_folder_or_into_the_page(folder, shown):
    for name in ("../../etc/passwd", "a/b", "..", "C:\\x", "<b>bold</b>"):
        assert diary.file_of(name).parent == folder
    standing.progress("<script>alert(1)</script>")
    assert "<script>" not in shown[-1] and "&lt;script&gt;" in shown[-1]
    for name in ("", "  ", "x" * 61, "two\nlines"):
        with pytest.raises(ValueError, match="1 to 60 letters"):
            standing.progress(name)


@pytest.mark.parametrize(
    "damage",
    [
        b"{half a",
        b"\xff\xfe",
        b"[]",
        b'{"format": 1, "person": "me", "lessons": {"a": {"minutes": "x"}}}',
        b'{"format": 1}',
    ],
)
def test_a_damaged_file_is_kept_aside_and_said_and_a_new_one_begins(folder, damage, capsys):
    solve()
    path = diary.file_of("me")
    for n in (1, 2):
        path.write_bytes(damage)
        solve()
        said = capsys.readouterr().out
        aside = folder / f"person-me.damaged-{n}.json"
        assert str(aside) in said and "could not be read" in said
        assert aside.read_bytes() == damage and lesson()["exercises"]["weight_bytes"]["passed"]


def test_a_file_of_a_later_version_stays_as_it_is(folder, capsys):
    solve()
    later = json.dumps({"format": 2, "people": []})
    diary.file_of("me").write_text(later)
    solve()
    assert "later version" in capsys.readouterr().out and diary.file_of("me").read_text() == later


def test_what_cannot_be_written_is_said_once_and_written_later(folder, monkeypatch, capsys):
    folder.write_text("a file in the way")
    solve()
    fail()
    assert capsys.readouterr().out.count("not noted for now") == 1
    folder.unlink()
    solve()
    assert lesson()["exercises"]["weight_bytes"] == {"passed": True, "tries": 1}


def test_kernels_that_write_at_once_lose_nothing(folder):
    # forks where that is usual: importing labkit.lab takes seconds
    usual = multiprocessing.get_all_start_methods()[0]
    context = multiprocessing.get_context("fork" if usual != "spawn" else usual)
    both = context.Barrier(2)
    workers = [context.Process(target=note_twenty, args=(kernel, both)) for kernel in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(lesson()["exercises"]) == 40


def test_minutes_leave_out_breaks(folder, monkeypatch):
    now = iter([0.0, 60.0, 180.0, 180.0 + 3600.0])
    monkeypatch.setattr(diary.time, "monotonic", lambda: next(now))
    for _ in range(4):
        diary.tick()
    assert lesson()["minutes"] == 1 + 2 + diary.PAUSE


def test_progress_is_deleted_when_asked(folder, capsys, shown):
    solve()
    standing.forget_progress()
    standing.forget_progress()
    assert not diary.file_of("me").exists()
    assert "is deleted" in (said := capsys.readouterr().out) and "There is no record" in said


def test_the_table_counts_the_course_and_escapes_what_it_shows(folder, shown):
    solve()
    diary.note_prediction("Is 1 < 2?", "<i>yes</i>", True)
    standing.progress()
    page = shown[-1]
    assert "1 right of 1 made" in page and "Is 1 &lt; 2?" in page and "&lt;i&gt;yes" in page
    assert len(standing.course()) >= 18 and sum(n for _, n in standing.course().values()) > 60
    assert f"0 of {standing.course()['02_lora_from_scratch'][1]}" in page
