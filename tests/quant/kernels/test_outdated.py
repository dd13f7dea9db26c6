"""Compiled kernels are forgotten when their sources change."""

import os

from labkit.quant.kernels.outdated import forget_outdated


def test_compiled_kernels_older_than_any_of_their_sources_are_forgotten(tmp_path):
    kept = tmp_path / "__pycache__"
    kept.mkdir()
    for name, seconds in (("tasks.py", 100), ("lookups.py", 300)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (seconds, seconds))
    for name, seconds in (
        ("tasks.a.nbi", 200),
        ("tasks.a.1.nbc", 200),
        ("tasks.pyc", 200),
        ("tasks.b.nbi", 400),
    ):
        (kept / name).touch()
        os.utime(kept / name, (seconds, seconds))
    forget_outdated(tmp_path)
    assert sorted(path.name for path in kept.iterdir()) == ["tasks.b.nbi", "tasks.pyc"]
    forget_outdated(tmp_path)  # and nothing more
