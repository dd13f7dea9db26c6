"""Disks that are full, failing, missing or in memory."""

import copy
import errno
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from labkit.optim import page_store
from labkit.optim.paging import attach_paging
from tests.optim.conftest import assert_same, make, run


def limited(budget_of_file, store, body):
    """Run `body` in a process that may not write files larger than that."""
    script = f"""
        import resource, sys, torch
        from labkit.optim.paging import attach_paging
        from labkit.optim.adamw import AdamW
        resource.setrlimit(resource.RLIMIT_FSIZE, ({budget_of_file}, {budget_of_file}))
        parameters = [torch.nn.Parameter(torch.ones(10_000)) for _ in range(10)]
        optimizer = AdamW(parameters)
    """
    script = textwrap.dedent(script) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", script, str(store)], capture_output=True, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX systems can")
def test_a_disk_that_is_too_small_is_reported_when_attaching_and_nothing_has_changed(store):
    done = limited(
        400_000,
        store,
        """
        try:
            attach_paging(optimizer, 100_000, sys.argv[1])
        except OSError as error:
            print(error)
        assert not optimizer.state and "step" not in optimizer.__dict__
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert len(optimizer.state) == 10
        """,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "cannot grow from 327,680 to 409,600 bytes" in done.stdout
        and "give store= another folder" in done.stdout
    )
    assert os.listdir(store) == []


def test_a_write_that_fails_in_the_middle_of_a_step_loses_nothing(store, monkeypatch):
    plain, paged = make("ours"), make("ours")
    pager = attach_paging(paged[1], 170_000, store, prefetch=False)
    for pair in (plain, paged):
        run(*pair, 4, first=1)
    kept = copy.deepcopy(paged[1].state_dict()["state"]), [p.detach().clone() for p in paged[0]]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(page_store.os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            run(*paged, 1, first=6)
    now = paged[1].state_dict()["state"]
    changed = [n for n, p in enumerate(paged[0]) if not torch.equal(p, kept[1][n])]
    for n in kept[0]:
        if n not in changed:
            assert all(torch.equal(value, now[n][key]) for key, value in kept[0][n].items())
        else:
            assert now[n]["step"] == kept[0][n]["step"] + 1
    assert pager.table.resident_bytes <= 170_000
    with torch.no_grad():  # from the checkpoint, with space again, the run goes on as if nothing had been
        for p, value in zip(paged[0], kept[1]):
            p.copy_(value)
    paged[1].load_state_dict({**paged[1].state_dict(), "state": kept[0]})
    for pair in (plain, paged):
        run(*pair, 4, first=6)
    assert_same(plain, paged)


def test_a_read_that_fails_leaves_the_state_in_the_store(store, monkeypatch):
    plain, paged = make("ours"), make("ours")
    attach_paging(paged[1], 170_000, store, prefetch=False)
    for pair in (plain, paged):
        run(*pair, 4, first=1)

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(page_store.os, "preadv", broken)
        with pytest.raises(OSError, match="Input/output"):
            run(*paged, 1, first=5)
    for pair in (plain, paged):
        run(*pair, 1, first=5)
    assert_same(plain, paged)


def test_the_space_of_a_store_is_given_back_when_it_closes(store):
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    for _ in range(3):
        parameters, optimizer = make("ours")
        with attach_paging(optimizer, 170_000, store):
            run(parameters, optimizer, 2)
        assert os.listdir(store) == []
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before


def test_a_store_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(TypeError, match="store=3 must be the path of a folder"):
        attach_paging(make("ours")[1], 10**6, 3)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="the page store cannot use the folder"):
            attach_paging(make("ours")[1], 10**6, path)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a folder in memory")
def test_a_store_in_memory_is_warned_about():
    with (
        pytest.warns(UserWarning, match="saves nothing"),
        attach_paging(make("ours")[1], 10**6, "/dev/shm/labkit-test"),
    ):
        pass
    os.rmdir("/dev/shm/labkit-test")
