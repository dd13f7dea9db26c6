"""Folders are written whole or not at all, and read with suspicion."""

import json
import os

import pytest

from labkit.formats import peft_folder
from labkit.formats.adapters import load_adapter, save_adapter
from labkit.lora.inject import lora_layers
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
    with pytest.raises(OSError, match="No space left"):
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
