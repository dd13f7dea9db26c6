"""The instructor's pages: minutes add up, sections exist, predictions and mistakes are those of the lessons."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEACH = ROOT / "docs" / "teach"
PLANS = [TEACH / f"{name}.md" for name in ("three-hours", "one-day", "four-weeks")]
LESSONS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "notebooks").glob("*.ipynb")}
CHECKS = "".join(path.read_text() for path in (ROOT / "labkit" / "lab" / "check").glob("*.py"))


def bare(heading):
    """A heading without number and tier, which may change: “3 · Merge (core, 5 minutes)” is “Merge”."""
    return re.sub(r" \((core|optional).*?\)$", "", re.sub(r"^(\d+|Appendix \w) ?[·:] ", "", heading.strip()))


def headings(lesson):
    cells = (c for c in LESSONS[lesson]["cells"] if c["cell_type"] == "markdown")
    return {bare(h) for c in cells for h in re.findall(r"^#{2,4} (.+)$", "".join(c["source"]), re.M)}


def tables(plan):
    """(title, stated minutes, rows) of every table of a plan."""
    for title, minutes, body in re.findall(
        r"^## (.*?) \((\d+) minutes\)\n(.*?)(?=^## |\Z)", plan.read_text(), re.M | re.S
    ):
        rows = [
            [part.strip() for part in line.strip("|").split("|")]
            for line in body.splitlines()
            if line.startswith("| ")
        ]
        yield title, int(minutes), rows[1:]


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.stem)
def test_the_minutes_of_a_plan_add_up(plan):
    made = list(tables(plan))
    assert made
    for title, stated, rows in made:
        now = 0
        for at, minutes, *_ in rows:
            assert at == f"{now // 60}:{now % 60:02}", (title, at)
            now += int(minutes)
        assert now == stated, title


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.stem)
def test_every_section_in_a_plan_is_in_its_lesson(plan):
    named = 0
    for title, _, rows in tables(plan):
        for *_, cells in rows:
            for lesson, sections in re.findall(r"`(\w+)` “(.*?)”(?=$|; `)", cells):
                for section in sections.split("”, “"):
                    named += 1
                    assert bare(section) in headings(lesson), f"{title}: {lesson} has no section “{section}”"
    assert named > 15


def kits():
    """{number of a lesson: its part of the page}."""
    return dict(
        re.findall(r"^## (\w+) · .*?\n(.*?)(?=^## |\Z)", (TEACH / "lessons.md").read_text(), re.M | re.S)
    )


def test_every_lesson_has_an_aim_two_questions_predictions_mistakes_and_a_sketch():
    assert {stem.split("_")[0] for stem in LESSONS} <= set(kits())
    for number, kit in kits().items():
        asked = re.search(r"^\*\*Ask\.\*\* (.*)$", kit, re.M)[1]
        assert asked.count("?") == 2 and asked.count(" · ") == 1, number
        assert "**Aim.**" in kit and "| they predict |" in kit and "```text" in kit, number


def test_predictions_are_quoted_from_the_lessons_and_mistakes_from_the_checks():
    for number, kit in kits().items():
        lesson = next((n for s, n in LESSONS.items() if s.startswith(f"{number}_")), None)
        if lesson is None:
            continue
        source = "".join("".join(c["source"]) for c in lesson["cells"])
        outputs = json.dumps([c.get("outputs") for c in lesson["cells"]], ensure_ascii=False)
        for row in re.findall(r"^\| “.*$", kit, re.M):
            for option in re.findall(
                r"“(.*?)”", " | ".join(row.split("|")[1:3]).replace("<|", "<").replace("|>", ">")
            ):
                said = option.replace("<im_end>", "<|im_end|>")
                assert said in source or said in outputs, f"{number}: no such option: {said}"
        for mistake in re.search(r"^\*\*Stuck\.\*\* (.*)$", kit, re.M)[1].strip("“”").split("” · “"):
            assert mistake in CHECKS, f"{number}: no check says “{mistake}”"


def test_shares_are_called_guesses():
    text = (TEACH / "lessons.md").read_text()
    assert "The shares are guesses" in text and text.count("| guess |") == len(kits())
