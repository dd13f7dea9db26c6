"""An adapter and its model card: one folder, written whole or not at all, that the hub's own library reads."""

import json
import os

import pytest
import torch
from huggingface_hub import ModelCard

from labkit.files.reading import sha256
from labkit.formats import card
from labkit.formats.adapters import load_adapter
from labkit.formats.card import CARD, FILL_IN, CardFacts, is_free, model_card, save_with_card
from tests.training.small_runs import tiny_adapted, tiny_llama


@pytest.fixture
def facts(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    return CardFacts(
        base="example/base",
        files={file.name: sha256(file)},
        counts={"training": 150, "held out": 37},
        settings={"learning rate": 2e-3, "steps": 120},
        results=[("exact match", "0 of 37 (0–9 %)", "20 of 37 (38–69 %)")],
        baselines=[("commonest answer", "3 of 37")],
        limits=["English only."],
    )


def test_the_card_is_read_by_the_hubs_library_and_states_the_facts(facts):
    text = model_card(facts, "my-adapter")
    read = ModelCard(text)
    assert read.data.base_model == "example/base" and read.data.library_name == "peft"
    assert read.data.license is None  # the author's to give
    for stated in (
        "# my-adapter",
        *facts.files,
        *facts.files.values(),
        "150 records training",
        "37 records held out",
    ):
        assert stated in text
    assert "| exact match | 0 of 37 (0–9 %) | 20 of 37 (38–69 %) |" in text and "- English only." in text


def test_what_only_the_author_knows_is_marked(facts):
    text = model_card(facts, "x")
    assert text.count(FILL_IN) == 4
    for line in ("**Licence:**", "**Intended use:**", "**Source and licence of the data:**"):
        assert f"{line} {FILL_IN}" in text


def test_a_bar_or_a_line_break_in_a_cell_does_not_break_the_table():
    rows = card.table(("a", "b"), [("x|y", "two\nlines")]).split("\n")
    assert len(rows) == 3 and rows[2] == "| x\\|y | two lines |"


def test_the_folder_holds_adapter_and_card_and_loads_again(facts, tmp_path):
    model = tiny_adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)
    place = save_with_card(model, tmp_path / "made" / "here", facts, {"exact match": 0.54})
    assert sorted(os.listdir(place)) == [
        CARD,
        "adapter_config.json",
        "adapter_model.safetensors",
        "labkit.json",
    ]
    recorded = json.loads((place / "labkit.json").read_text())
    assert recorded["data"] == {"files": dict(facts.files), "training": 150, "held out": 37}
    assert recorded["metrics"] == {"exact match": 0.54}
    assert ModelCard.load(place / CARD).data.base_model == "example/base"
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(load_adapter(tiny_llama(), place)(ids).logits, model(ids).logits)
    assert os.listdir(tmp_path / "made") == ["here"]  # nothing is left beside it


@pytest.mark.parametrize("what", ["adapter", "notes", "file", "link to nothing"])
def test_nothing_that_is_there_is_overwritten(facts, tmp_path, what):
    place, model = tmp_path / "here", tiny_adapted()
    if what == "adapter":
        save_with_card(model, place, facts)
    elif what == "notes":
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    elif what == "file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / "nowhere")
    before = sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="is there already and is left as it is"):
        save_with_card(model, place, facts)
    assert sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")) == before


def test_an_empty_folder_is_filled(facts, tmp_path):
    (tmp_path / "here").mkdir()
    assert is_free(tmp_path / "here")
    assert not is_free(save_with_card(tiny_adapted(), tmp_path / "here", facts))


def test_what_comes_while_it_is_written_is_not_overwritten(facts, tmp_path, monkeypatch):
    place = tmp_path / "here"

    def late(path, text):
        path.write_text(text)
        place.mkdir()
        (place / "adapter_model.safetensors").write_text("another's")

    monkeypatch.setattr(card, "write_text", late)
    with pytest.raises(FileExistsError):
        save_with_card(tiny_adapted(), place, facts)
    assert (place / "adapter_model.safetensors").read_text() == "another's"
    assert sorted(os.listdir(tmp_path)) == ["here", "lines.jsonl"]


def test_a_card_that_cannot_be_made_leaves_nothing(facts, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no card")

    monkeypatch.setattr(card, "model_card", fail)
    with pytest.raises(RuntimeError, match="no card"):
        save_with_card(tiny_adapted(), tmp_path / "here", facts)
    assert os.listdir(tmp_path) == ["lines.jsonl"]
