"""Folders are written whole or not at all, and read with suspicion."""

import json
import os

import pytest
import torch

from labkit.files import writing
from labkit.formats import peft_folder
from labkit.formats.adapters import load_adapter, save_adapter
from labkit.lora.inject import lora_layers
from tests.campaign.harness import small_disk
from tests.conftest import make_small_llama
from tests.formats.cases import adapted


def test_pickle_truncated_and_foreign_folders_are_refused(tmp_path):
    model = make_small_llama()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        load_adapter(model, tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="pickle"):
        load_adapter(model, tmp_path)
    folder = save_adapter(adapted(), tmp_path / "a")
    weights = folder / peft_folder.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load_adapter(model, folder)
    folder = save_adapter(adapted(), tmp_path / "b")
    config = json.loads((folder / peft_folder.CONFIG).read_text())
    (folder / peft_folder.CONFIG).write_text(json.dumps(config | {"lora_bias": True}))
    with pytest.raises(ValueError, match="lora_bias=True"):
        load_adapter(model, folder)
    assert not lora_layers(model)


def test_saving_replaces_an_adapter_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = save_adapter(adapted(), tmp_path / "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(
        peft_folder,
        "save_file",
        lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(
        writing.CannotWrite, match=r"cannot write .*a: the disk is full; what was .* is intact"
    ):
        save_adapter(adapted(seed=2), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["a"], "temporary files are gone"
    monkeypatch.undo()
    save_adapter(adapted(r=2), folder)
    assert json.loads((folder / peft_folder.CONFIG).read_text())["r"] == 2
    assert os.listdir(tmp_path) == ["a"]


def test_nothing_to_save_or_nan_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no LoRA adapter to save"):
        save_adapter(make_small_llama(), tmp_path / "a")
    model = adapted()
    next(iter(lora_layers(model).values())).lora_A.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        save_adapter(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_what_else_lies_in_the_folder_stays(tmp_path):
    folder = tmp_path / "my-run"
    (folder / "logs").mkdir(parents=True)
    (folder / "notes.txt").write_text("a week of work")
    (folder / "logs" / "1.txt").write_text("loss 2.1")
    (folder / "latest").symlink_to("notes.txt")
    others = {"notes.txt", "logs", "latest"}
    for seed in (1, 2, 3):  # into somebody's folder; then in place of an old adapter
        model = adapted(seed=seed)
        save_adapter(model, folder)
        assert {entry.name for entry in folder.iterdir()} == others | set(peft_folder.OURS)
        assert (folder / "latest").is_symlink() and (folder / "latest").read_text() == "a week of work"
        assert (folder / "logs" / "1.txt").read_text() == "loss 2.1"
        loaded, wanted = load_adapter(make_small_llama(seed), folder), lora_layers(model)
        assert all(torch.equal(m.lora_A, wanted[n].lora_A) for n, m in lora_layers(loaded).items())
        assert os.listdir(tmp_path) == ["my-run"], "no temporary folder is left"


def test_a_file_that_is_open_in_the_folder_can_be_written_on(tmp_path):
    save_adapter(adapted(), tmp_path / "a")
    with (tmp_path / "a" / "log.txt").open("w") as log:
        save_adapter(adapted(seed=2), tmp_path / "a")
        log.write("step 2")
    assert (tmp_path / "a" / "log.txt").read_text() == "step 2"


def test_a_file_system_without_hard_links_gets_copies(tmp_path, monkeypatch):
    save_adapter(adapted(), tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    monkeypatch.setattr(
        os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(1, "Operation not permitted"))
    )
    save_adapter(adapted(seed=2), tmp_path / "a")
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_a_link_to_a_folder_is_followed_and_a_file_is_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for seed in (1, 2):
        save_adapter(adapted(seed=seed), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / peft_folder.WEIGHTS).exists()
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(NotADirectoryError, match="file is a file; an adapter is saved as a folder"):
        save_adapter(adapted(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o022)
    try:
        folder = save_adapter(adapted(), tmp_path / "a")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert all(entry.stat().st_mode & 0o044 == 0o044 for entry in folder.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_the_files_of_others_keep_their_permissions_and_stay_the_same_files(tmp_path):
    save_adapter(adapted(), tmp_path / "a")
    script, secret = tmp_path / "a" / "run.sh", tmp_path / "a" / "key"
    for path, mode in ((script, 0o755), (secret, 0o600)):
        path.write_text("mine")
        path.chmod(mode)
    before = [(path.stat().st_ino, path.stat().st_mode) for path in (script, secret)]
    save_adapter(adapted(seed=2), tmp_path / "a")
    assert [(path.stat().st_ino, path.stat().st_mode) for path in (script, secret)] == before


def test_a_folder_that_a_killed_writer_had_moved_out_of_the_way_is_put_back_and_read(tmp_path):
    model = adapted(r=2)
    save_adapter(model, tmp_path / "a")
    scratch = (
        tmp_path / ".a.0123abcd.part"
    )  # as it is between two renames, where folders cannot change places
    scratch.mkdir()
    (tmp_path / "a").rename(scratch / writing.OLD)
    assert lora_layers(load_adapter(make_small_llama(), tmp_path / "a"))
    assert os.listdir(tmp_path) == ["a"]


def test_the_root_of_a_disk_is_refused_in_one_sentence(tmp_path):
    with small_disk(tmp_path / "disk", kilobytes=4000) as disk:
        if disk is None:
            pytest.skip("no permission to mount a small disk")
        with pytest.raises(writing.CannotWrite, match="it is the root of .*disk.*; name a folder inside it"):
            save_adapter(adapted(r=2), disk)
        assert os.listdir(disk) == [] and os.listdir(tmp_path) == ["disk"]


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    for what in ({"data": tmp_path}, {"metrics": {"loss": torch.ones(1)}}):
        with pytest.raises(ValueError, match=rf"{next(iter(what))} cannot be recorded as JSON"):
            save_adapter(adapted(r=2), tmp_path / "a", **what)
    assert not list(tmp_path.iterdir())


def test_a_file_that_comes_while_an_adapter_is_saved_stays(tmp_path, monkeypatch):
    save_adapter(adapted(r=2), tmp_path / "a")
    for exchanges in (writing.exchange, lambda one, other: False):  # with and without a way to change places

        def late(one, other, exchanges=exchanges):
            (tmp_path / "a" / "late.txt").write_text("written just now")
            return exchanges(one, other)

        monkeypatch.setattr(writing, "exchange", late)
        save_adapter(adapted(seed=2, r=2), tmp_path / "a")
        assert (tmp_path / "a" / "late.txt").read_text() == "written just now"
        (tmp_path / "a" / "late.txt").unlink()
    assert os.listdir(tmp_path) == ["a"]


def test_the_folder_that_one_is_in_and_those_of_other_things_are_refused_and_stay(tmp_path, monkeypatch):
    for name in ("here/inside", "model", "odd/adapter_config.json"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "model" / "labkit.json").write_text(
        '{"format": 1, "sha256": "ab"}'
    )  # as a fetched model has it
    monkeypatch.chdir(tmp_path / "here" / "inside")
    cases = {
        ".": "the folder that you are in",
        str(tmp_path / "here"): "the folder that you are in, or around it",
        str(tmp_path / "model"): "labkit.json is not of an adapter",
        str(tmp_path / "odd"): "adapter_config.json is a folder",
    }
    model = adapted(r=2)
    for place, message in cases.items():
        with pytest.raises(ValueError, match=message):
            save_adapter(model, place)
    assert os.listdir(".") == [] and os.getcwd() == str(tmp_path / "here" / "inside")
    assert (tmp_path / "model" / "labkit.json").read_text() == '{"format": 1, "sha256": "ab"}'
    save_adapter(model, "a")  # beside other things is fine
    assert set(os.listdir("a")) == set(peft_folder.OURS)
