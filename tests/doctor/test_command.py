"""python -m labkit.doctor: its exit status, and what it prints."""

import json

import pytest

from labkit.doctor.command import FAILED, SICK, SOUND, main
from labkit.doctor.specimens import train_records
from labkit.doctor.zoo import other_base
from labkit.formats.adapters import save_adapter


@pytest.fixture
def folder(moved, tmp_path):
    return save_adapter(moved[0], tmp_path / "adapter")


def test_a_sound_folder_ends_with_0(folder, capsys):
    assert main([str(folder), "--base", "tiny-llama", "--json"]) == SOUND
    said = json.loads(capsys.readouterr().out)
    assert said["first"] is None and said["findings"][0]["outcome"] == "healthy"


def test_something_sick_ends_with_1_and_is_named(folder, tmp_path, capsys):
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in train_records()[:2]))
    assert main([str(folder), "--base", "tiny-llama", "--data", str(data)]) == SICK
    assert "first finding: effect" in capsys.readouterr().out


def test_another_base_is_a_finding_and_not_a_crash(folder, tmp_path, tiny, capsys):
    other_base(0).save_pretrained(tmp_path / "other")
    tiny[1].save_pretrained(tmp_path / "other")
    assert main([str(folder), "--base", str(tmp_path / "other")]) == SICK
    out = capsys.readouterr()
    assert "first finding: origin" in out.out and "not loaded" in out.err


@pytest.mark.parametrize("damage", ["unfinished", "another method", "no folder"])
def test_what_cannot_be_examined_ends_with_2(folder, damage, capsys):
    config = folder / "adapter_config.json"
    if damage == "unfinished":
        (folder / "adapter_model.safetensors").unlink()
    elif damage == "another method":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "IA3"}))
    else:
        folder = folder / "nowhere"
    assert main([str(folder), "--base", "tiny-llama"]) == FAILED
    assert capsys.readouterr().err.startswith("error: ")
