"""The recipe that isolates rounded activations, on tiny-llama; and what it recorded of SmolLM2's shipped file."""

import json

import pytest

from labkit.formats.gguf_model import save_gguf
from labkit.models.gguf import read_gguf
from labkit.paths import data_folder
from recipes.activations import rows

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed here: pip install xllamacpp")


def test_a_row_tells_the_weights_from_the_activations(tiny, tmp_path):
    model, tokenizer = tiny
    file = save_gguf(model, tokenizer, tmp_path / "q.gguf", "Q4_1")
    checkpoint = read_gguf(file)
    same = type(model)(checkpoint.config).eval()
    same.load_state_dict(checkpoint.tensors, strict=False)
    [row] = rows(file, same, tokenizer, ["The"], tmp_path)
    assert row["text"] == "The" and row["tokens"] == 1
    assert row["F32"]["rms"] < 0.01 * row["file"]["rms"]
    assert row["rounded"]["rms"] < 0.01 * row["file"]["rms"]
    assert (
        row["nudged"]["rms"] < 0.01 * row["file"]["rms"]
    )  # one token, four layers: no code was near an edge


def test_what_was_recorded_of_the_shipped_file_is_not_in_its_weights():
    lines = (data_folder() / "results" / "activations.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        assert row["F32"]["rms"] < 0.01 * row["file"]["rms"]
        assert row["nudged"]["rms"] > 10 * row["F32"]["rms"]  # rounding makes much of a last bit
