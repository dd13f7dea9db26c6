import os
import shutil
from datetime import timedelta

import pytest

from labkit.serving.registry import Registry
from tests.serving.cases import START, clock_from, make_registry, write_adapter


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """It is for a loss of power, which no test here brings about, and most of the time that a test takes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def registry(tmp_path) -> Registry:
    """An empty registry."""
    return make_registry(tmp_path / "registry")


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> list:
    """Three PEFT folders of other numbers; read only."""
    root = tmp_path_factory.mktemp("folders")
    return [write_adapter(root / str(seed), seed) for seed in range(3)]


@pytest.fixture(scope="session")
def template(tmp_path_factory, folders) -> Registry:
    """What `filled` is a copy of."""
    made = make_registry(tmp_path_factory.mktemp("template") / "registry")
    made.publish(
        "support", folders[0], "ann", "the first", results={"tickets": {"exact_match": 0.6, "loss": 1.2}}
    )
    made.publish(
        "support", folders[1], "ann", "the second", results={"tickets": {"exact_match": 0.8, "loss": 1.0}}
    )
    made.publish("sales", folders[2], "bob", results={"tickets": {"exact_match": 0.7}})
    made.set_alias("support@production", 1, "ann")
    made.set_alias("support@production", 2, "ann", "better on refunds")
    return made


@pytest.fixture
def filled(template, tmp_path) -> Registry:
    """A registry with two versions of support, of which production is the second, and one of sales."""
    shutil.copytree(template.root, tmp_path / "registry", symlinks=True)
    return Registry(tmp_path / "registry", clock=clock_from(START + timedelta(minutes=5)))
