"""The recipe that holds three engines against each other: its cheap cases against the real labkit and llama.cpp."""

import copy

import pytest
import torch

import labkit
from labkit import models
from labkit.data.tokens import prompt_ids
from labkit.formats.gguf_adapter import save_gguf_adapter
from labkit.formats.gguf_model import save_gguf
from labkit.lora.inject import lora_layers
from labkit.serving.registry import Registry
from recipes import jsonl
from recipes.serving_engines import __main__ as command
from recipes.serving_engines import agreement, behaviours, speed
from recipes.serving_engines.engines import LABKIT, LabkitServer, LlamaServer, Said
from tests.conftest import make_small_llama
from tests.serving.registries import PROMPT, make_served_registry

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed here: pip install xllamacpp")
pytest.importorskip("fastapi", reason="fastapi is not installed here: pip install fastapi")
NAMES = ("sql", "support")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A registry of tiny-llama, its adapters as GGUF files, and adapters of two other bases."""
    made = tmp_path_factory.mktemp("engines")
    make_served_registry(made)
    model, tokenizer = models.load("tiny-llama", dtype=torch.float32)
    save_gguf(model, tokenizer, made / "base.gguf", "F32")
    for name, folder in (("sql", "sql"), ("support", "one")):
        adapted = labkit.load_adapter(copy.deepcopy(model), made / folder)
        save_gguf_adapter(adapted, made / f"{name}.gguf")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    for name, other in (("other-shape", make_small_llama()), ("other-weights", model)):
        labkit.add_lora(other, labkit.LoRAConfig(r=4, alpha=8))
        for layer in lora_layers(other).values():
            layer.lora_B.data.normal_(std=0.1)
        labkit.save_adapter(other, made / name)
        save_gguf_adapter(other, made / f"{name}.gguf")
    return made


@pytest.fixture(scope="module")
def ids():
    return prompt_ids(PROMPT, models.load("tiny-llama", dtype=torch.float32)[1])


@pytest.fixture(scope="module")
def ours(root):
    server = LabkitServer(root / "registry", root, command.free_port(), root / "labkit.log", threads=1)
    server.base = "tiny-llama"
    yield server
    server.close()


def start_llama(root, files):
    return LlamaServer(root / "base.gguf", files, command.free_port(), root / "llama.log", threads=1)


@pytest.fixture(scope="module")
def llama(root):
    server = start_llama(root, {name: root / f"{name}.gguf" for name in NAMES})
    yield server
    server.close()


@pytest.mark.slow
def test_an_unknown_adapter_is_refused_by_labkit_and_is_the_base_in_llama_cpp(ours, llama, ids):
    [refused] = behaviours.unknown_name(ours, ids)
    assert (refused["outcome"], refused["status"]) == ("refused", 404)
    *unknown, unnamed = behaviours.unknown_name(llama, ids)
    for row in unknown:
        assert (row["outcome"], row["status"]) == ("wrong", 200) and "as the base" in row["words"]
    assert unnamed["outcome"] == "wrong" and "all adapters added up" in unnamed["words"]


@pytest.mark.slow
def test_in_a_mixed_batch_every_answer_is_the_one_that_it_is_alone(ours, llama, ids, monkeypatch):
    monkeypatch.setattr(behaviours, "TRIES", 1)
    for server in (ours, llama):
        rows = list(behaviours.mixed_batch(server, ids, ids, NAMES))
        assert [row["adapter"] for row in rows] == [None, *NAMES]
        assert {row["outcome"] for row in rows} == {"right"}


@pytest.mark.slow
def test_an_adapter_of_another_base_is_refused_by_labkit_and_by_llama_cpp_only_if_its_shape_differs(
    ours, root, ids
):
    assert [row["outcome"] for row in behaviours.other_base(ours, ids, root)] == ["refused", "refused"]
    theirs = behaviours.other_base_of_llama(lambda files: start_llama(root, files), ids, root)
    assert [row["outcome"] for row in theirs] == ["refused", "wrong"]


@pytest.mark.slow
def test_an_alias_that_moves_changes_the_next_answer_and_not_the_one_under_way(ours, root, ids):
    [row] = behaviours.alias_moved(ours, ids, Registry(root / "registry"))
    assert "False; the next" not in row["words"] and row["words"].endswith("the new one's: True")


@pytest.mark.slow
def test_llama_cpp_computes_a_prompt_anew_for_another_adapter(llama, ids):
    prompt, loading = behaviours.same_prompt_of_llama(llama, 3 * ids, NAMES)
    assert prompt["outcome"] == "right" and loading["outcome"] == "cannot"


@pytest.mark.slow
def test_llama_cpp_gives_the_log_probabilities_of_transformers(llama, root, ids):
    model, _ = models.load("tiny-llama", dtype=torch.float32)
    for name, folder in ((None, None), ("sql", "sql")):
        adapted = copy.deepcopy(model)
        if folder:
            labkit.load_adapter(adapted, root / folder)
        with torch.no_grad():
            wanted = agreement.top_of(adapted(input_ids=torch.tensor([ids])).logits[0, -1])
        said = llama.complete(ids, name, 1, agreement.TOP)
        line = agreement.line_of(
            "llama.cpp", {"adapter": name, "prompt": 0, "top": said.top[0]}, {(name, 0): wanted}
        )
        assert line["same_token"] and line["apart"] < 1e-4 and line["compared"] >= 4


class Fake:
    """A server that answers at once."""

    name = LABKIT

    def __init__(self):
        self.asked = []

    def complete(self, ids, adapter, tokens):
        self.asked.append(adapter)
        return Said(200, "x", tokens) if adapter != "bad" else Said(404, "there is none")


def test_requests_at_once_take_adapters_in_turn_and_a_failed_one_ends_the_run():
    server = Fake()
    found = speed.at_once(server, [[1, 2]] * 16, ["a", "b"], 5)
    assert sorted(server.asked) == ["a"] * 8 + ["b"] * 8
    assert (found["requests"], found["prompt_tokens"], found["tokens"]) == (16, 32, 80)
    with pytest.raises(RuntimeError, match="there is none"):
        speed.at_once(server, [[1]], ["bad"])


def test_a_lap_is_recorded_whole_or_not_at_all(tmp_path):
    path, about = (
        tmp_path / "lines.jsonl",
        {"versions": {"labkit": "1", "vLLM": "2"}, "cores": 2, "work": "/w/"},
    )

    def made(laps):
        for lap in range(laps):
            yield {"kind": "speed", "engine": "labkit", "lap": lap}
            if lap == 2:
                raise KeyboardInterrupt
            yield {"kind": "speed", "engine": "vLLM", "lap": lap}

    with pytest.raises(KeyboardInterrupt):
        command.keep(path, made(3), about)
    lines = jsonl.read(path)
    assert [(line["engine"], line["lap"], line["version"]) for line in lines] == [
        (engine, lap, version) for lap in (0, 1) for engine, version in (("labkit", "1"), ("vLLM", "2"))
    ]
