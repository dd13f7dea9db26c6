"""The recipe that asks llama.cpp test tickets, on tiny-llama: what it records, and that it goes on where it was."""

import json

import pytest
import torch

from labkit.data.tickets import load_tickets
from labkit.data.tokens import prompt_ids
from labkit.formats import llama_cpp
from labkit.paths import data_folder
from labkit.training.evaluate import generate
from recipes import tickets_llama_cpp
from recipes.tickets_llama_cpp import FILES, RESULTS, compare, load_in_llama_cpp, record
from tests.formats.test_merged import adapted

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed here: pip install xllamacpp")
TOKENS = 12
PROMPTS = [ticket["message"] for ticket in load_tickets("test")[:2]]


@pytest.fixture(scope="module")
def model():
    return adapted(variant="rslora")


@pytest.mark.parametrize("name", ["merged F32", "adapter F32", "merged Q4_0"])
def test_an_answer_is_held_against_the_adapted_model_token_by_token(name, model, tmp_path):
    server = load_in_llama_cpp(name, *model, tmp_path)
    found = [compare(*model, server, prompt_ids(prompt, model[1]), TOKENS) for prompt in PROMPTS]
    said = generate(*model, PROMPTS, TOKENS, progress=False)
    if name.endswith("F32"):
        assert all(one["same"] and one["largest"] < 1e-3 and one["gap"] is None for one in found)
        assert [one["answer"] for one in found] == said
    else:
        assert all(one["largest"] > 0.05 for one in found)
    for one, whole in zip(found, said):
        assert one["same"] == (one["step"] is None) and one["first"] <= one["largest"]
        if one["same"]:
            assert one["answer"] == whole


def test_a_token_that_is_not_the_models_own_is_found_with_how_much_it_lacks(model, monkeypatch):
    ids = prompt_ids(PROMPTS[0], model[1])
    with torch.no_grad():
        logs = model[0](input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    best, second = logs.topk(2).indices.tolist()
    said = llama_cpp.Answer([second], [{second: logs[second].item()}])
    monkeypatch.setattr(llama_cpp, "answer", lambda *_: said)
    found = compare(*model, None, ids)
    assert not found["same"] and found["step"] == 0 and found["largest"] == 0
    assert found["gap"] == pytest.approx((logs[best] - logs[second]).item(), abs=1e-6)


def test_what_is_recorded_is_not_asked_again(model, tmp_path, monkeypatch):
    path, asked = tmp_path / "lines.jsonl", []
    monkeypatch.setattr(tickets_llama_cpp, "load_in_llama_cpp", lambda name, *_: asked.append(name))
    monkeypatch.setattr(tickets_llama_cpp, "compare", lambda *_: {"answer": "{}"})
    record(*model, ["a", "b"], path, FILES[:1], adapter="mine")
    for _ in range(2):
        record(*model, ["a", "b", "c"], path, FILES[:2])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["file"], line["ticket"]) for line in lines] == [(f, i) for f in FILES[:2] for i in range(3)]
    assert lines[0] == {"file": "merged F32", "ticket": 0, "answer": "{}", "adapter": "mine"}
    assert asked == ["merged F32", "merged F32", "adapter F32"]


def test_in_the_recorded_answers_fp32_files_have_the_models_own_tokens_unless_two_tie():
    lines = [json.loads(line) for line in (data_folder() / RESULTS).read_text().splitlines()]
    assert len({(line["file"], line["ticket"]) for line in lines}) == len(lines)
    whole = [line for line in lines if line["file"] in ("merged F32", "adapter F32")]
    assert {line["file"] for line in whole} == {"merged F32", "adapter F32"}
    assert all(line["same"] or line["gap"] < 1e-3 for line in whole)
    assert max(line["largest"] for line in whole) < 1e-3
    assert all(line["largest"] > 0.01 for line in lines if line["file"].startswith("merged Q4"))
