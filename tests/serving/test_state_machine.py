"""A registry against a model of it in a few lines of Python, over random sequences of operations."""

import os
import tempfile
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from labkit.serving import UnknownAdapter, repair, verify
from labkit.serving.contents import content_of, hash_files
from tests.serving.cases import START, make_registry, write_adapter

NAMES = st.sampled_from(["support", "sales"])
ALIASES = st.sampled_from(["production", "staging"])
NUMBERS = st.integers(1, 4)
FOLDERS = 3


class RegistryMachine(RuleBasedStateMachine):
    """`versions`: name → its folders by number; `gone`: deleted ones; `stacks`: alias → versions, the last one on top."""

    @initialize()
    def begin(self):
        self.no_fsync = patch.object(os, "fsync", lambda descriptor: None)
        self.no_fsync.start()
        self.place = tempfile.TemporaryDirectory()
        root = Path(self.place.name)
        self.folders = [write_adapter(root / str(n), n) for n in range(FOLDERS)]
        self.contents = [content_of(hash_files(folder)) for folder in self.folders]
        self.now = START
        self.registry = make_registry(root / "registry", clock=lambda: self.now)
        self.versions, self.gone = defaultdict(list), set()
        self.stacks, self.served = defaultdict(list), []

    def teardown(self):
        if hasattr(self, "place"):
            assert verify(self.registry) == []
            self.no_fsync.stop()
            self.place.cleanup()

    def tick(self):
        """Remember what is served now, and let a minute pass."""
        self.served.append((self.now, self.pointing()))
        self.now += timedelta(minutes=1)

    def pointing(self):
        return {alias: stack[-1] for alias, stack in self.stacks.items() if stack}

    def is_there(self, name, number):
        return 0 < number <= len(self.versions[name]) and (name, number) not in self.gone

    @rule(name=NAMES, n=st.integers(0, FOLDERS - 1))
    def publish(self, name, n):
        made = self.registry.publish(name, self.folders[n], "ann")
        self.versions[name].append(n)
        assert made.number == len(self.versions[name]) and made.content == self.contents[n]
        self.tick()

    @rule(name=NAMES, alias=ALIASES, number=NUMBERS)
    def set_alias(self, name, alias, number):
        alias = f"{name}@{alias}"
        if not self.is_there(name, number):
            with pytest.raises(UnknownAdapter):
                self.registry.set_alias(alias, number)
            return
        self.registry.set_alias(alias, number)
        if self.stacks[alias][-1:] != [number]:
            self.stacks[alias].append(number)
        self.tick()

    @rule(name=NAMES, alias=ALIASES)
    def rollback(self, name, alias):
        alias = f"{name}@{alias}"
        stack = self.stacks[alias]
        if not stack or (len(stack) > 1 and not self.is_there(name, stack[-2])):
            with pytest.raises(UnknownAdapter):
                self.registry.rollback(alias)
        elif len(stack) == 1:
            with pytest.raises(ValueError, match="has pointed to nothing before"):
                self.registry.rollback(alias)
        else:
            stack.pop()
            assert self.registry.rollback(alias).number == stack[-1]
            self.tick()

    @rule(name=NAMES, alias=ALIASES)
    def remove_alias(self, name, alias):
        alias = f"{name}@{alias}"
        if self.stacks[alias]:
            self.registry.remove_alias(alias)
            self.stacks[alias] = []
            self.tick()
        else:
            with pytest.raises(UnknownAdapter):
                self.registry.remove_alias(alias)

    @rule(name=NAMES, number=NUMBERS)
    def delete(self, name, number):
        if not self.is_there(name, number):
            with pytest.raises(UnknownAdapter):
                self.registry.delete(f"{name}@v{number}")
        elif any(
            number in stack[-2:] for alias, stack in self.stacks.items() if alias.startswith(f"{name}@")
        ):
            with pytest.raises(ValueError, match="cannot be deleted"):
                self.registry.delete(f"{name}@v{number}")
        else:
            self.registry.delete(f"{name}@v{number}")
            self.gone.add((name, number))
            self.tick()

    @rule()
    def repair_has_nothing_to_do(self):
        assert repair(self.registry, remove_orphans=True) == []

    @invariant()
    def it_is_as_the_model_says(self):
        if not hasattr(self, "registry"):
            return
        there = {
            f"{name}@v{number}": self.contents[n]
            for name, folders in self.versions.items()
            for number, n in enumerate(folders, start=1)
            if (name, number) not in self.gone
        }
        assert {version.label: version.content for version in self.registry.versions()} == there
        assert self.registry.aliases() == self.pointing()
        layout = self.registry.root / "adapters"
        assert {
            f"{p.parent.name}@{p.name}": p.resolve().name for p in layout.glob("*/*") if p.suffix == ""
        } == there
        assert {p.name for p in (self.registry.root / "contents").glob("*")} == set(there.values())
        for when, pointing in self.served[-4:]:
            assert self.registry.at(when + timedelta(seconds=59)) == pointing, "what served then is another"


TestRegistry = RegistryMachine.TestCase
TestRegistry.settings = settings(
    max_examples=8,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
