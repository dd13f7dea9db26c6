"""One word names a lesson in its checks, its explorer, its pictures and its tests."""

import pkgutil
from pathlib import Path

from labkit.lab import check, explore, figures


def modules(package):
    return {module.name for module in pkgutil.iter_modules(package.__path__)}


SHARED = {"compare", "injection"}  # modules of checks that are no lesson's own
WORDS = modules(check) - SHARED
PARTS = {
    "knobs",
    "panel",
    "answers",
    "background",
    "messages",
    "supervision",
    "training",
}  # that are no lesson's own
READERS = {"engines", "multitask", "prices"}  # of recorded results; a lesson has other pictures, too


def test_checks_explorers_pictures_and_tests_of_a_lesson_share_a_word():
    assert modules(explore) - PARTS == WORDS
    assert modules(figures) - PARTS - READERS <= WORDS
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert tests >= WORDS


def test_each_lesson_has_a_check_and_an_explorer_that_lab_offers():
    for package in (check, explore):
        offered = {getattr(package, name).__module__.rpartition(".")[2] for name in package.__all__}
        assert offered >= WORDS and offered - WORDS <= SHARED | PARTS


def test_every_explorer_is_offered():
    for word in WORDS:
        module = getattr(explore, word)
        made = {
            n for n, f in vars(module).items() if n.endswith("_explorer") and f.__module__ == module.__name__
        }
        assert made <= set(explore.__all__), word
