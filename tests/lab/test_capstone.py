"""Gates: each says its number, its limit and what to do; what is refused leaves nothing behind."""

import copy
import json
import re

import pytest
import torch

import labkit
from labkit.lab import gates, release
from labkit.lab.check import capstone as check
from labkit.lab.figures.capstone import gate_table, prompt_or_adapter
from labkit.training import TrainConfig
from tests.lab import exercise_checks

TRAINING = TrainConfig(lr=5e-3, steps=6, batch_size=4, batching="shuffled", warmup=0.0, progress=False)
LORA = labkit.LoRAConfig(r=4, alpha=8)
COLOURS = ("red", "green", "blue", "grey", "pink", "black", "white", "brown")


def line(i):
    return {
        "prompt": f"What colour has box number {i}{i % 7}{i % 3}?\nAnswer:",
        "completion": f" {COLOURS[i % 8]}",
    }


def written(path, lines):
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


@pytest.fixture
def split(tmp_path, tiny):
    return gates.read_split(written(tmp_path / "boxes.jsonl", [line(i) for i in range(240)]), tiny[1])


def test_a_sound_file_passes_and_walks_go_on(split):
    walked = gates.walk([lambda: gates.data_gate(split), lambda: gates.size_gate(split)])
    assert [gate.passed for gate in walked] == [True, True]
    assert (walked[0].number, len(split.held)) == (0, 48) and 0.13 < walked[1].number < 0.15


@pytest.mark.parametrize(
    ("lines", "test", "gate", "words"),
    [
        ([line(i) for i in range(40)], None, "size", "with 8 held out, a share of 50 % is known to ±28 points"),
        ([line(i) for i in range(200)], [line(i) for i in range(198, 260)], "data", "2 leaks; held-out record 0 is training record 198"),
        ([line(i) for i in range(200)] + ["no JSON"], None, "data", "1 faulty line,"),
        ([line(0)], None, "size", "with 0 held out"),
    ],
)  # fmt: skip
def test_a_bad_file_is_stopped_with_a_sentence_and_nothing_behind_it_is_begun(
    lines, test, gate, words, tmp_path, tiny
):
    file = written(tmp_path / "a.jsonl", lines)
    other = test and written(tmp_path / "b.jsonl", test)
    split = gates.read_split(file, tiny[1], test=other)
    walked = gates.walk(
        [lambda: gates.data_gate(split), lambda: gates.size_gate(split), lambda: pytest.fail("was begun")]
    )
    assert walked[-1].name == gate and not walked[-1].passed and walked[-1].do
    assert re.search(words, walked[-1].says), walked[-1].says
    assert "STOP" in str(walked[-1]) and "To do:" in gate_table({"x": walked}).data


def test_the_first_steps_are_those_of_peft_and_another_rate_is_found(split, tiny, monkeypatch):
    model, tokenizer = tiny
    gate = gates.parity_gate(model, tokenizer, split.train, LORA, TRAINING, steps=3)
    assert gate.passed and gate.number < 1e-4
    monkeypatch.setattr(gates, "learning_rate", lambda *_: 5e-2)
    assert not gates.parity_gate(model, tokenizer, split.train, LORA, TRAINING, steps=3).passed


def test_the_worst_seed_has_to_beat_the_best_rival():
    good, fair, poor = [1] * 80 + [0] * 20, [1] * 60 + [0] * 40, [1] * 30 + [0] * 70
    assert gates.seeds_gate({0: good, 1: good}, {"a": poor, "b": fair}).passed
    behind = gates.seeds_gate({0: good, 1: poor}, {"a": poor, "b": fair})
    assert not behind.passed and "use b until" in behind.do and "80%, 30% (2 seeds)" in behind.says


@pytest.mark.slow
def test_exports_registry_and_traffic_let_a_good_version_pass_and_take_back_a_worse_one(
    split, tiny, tmp_path
):
    """A registry for tiny-llama: the adapter as it is, one that says nothing, and one of another base."""
    model, tokenizer = tiny
    base = copy.deepcopy(model).requires_grad_(False).eval()
    records = [{"prompt": one["prompt"], "completion": " red"} for one in split.train]
    torch.manual_seed(0)
    adapted = labkit.add_lora(copy.deepcopy(base), LORA)
    labkit.train(adapted, tokenizer, records, TrainConfig(lr=1e-2, steps=20, batch_size=8, progress=False))
    adapted.eval()
    exports = gates.export_gate(
        adapted, base, tokenizer, split.held[0]["prompt"], ways=("PEFT", "merged", "vLLM")
    )
    assert exports.passed and exports.number < 1e-3
    lost = gates.export_gate(adapted, base, tokenizer, split.held[0]["prompt"], ways=("PEFT", "base alone"))
    assert not lost.passed and "base alone" in lost.do

    registry = release.open_registry(tmp_path / "registry", "tiny-llama", base)
    ids = torch.tensor([tokenizer(split.held[0]["prompt"])["input_ids"]])
    folder = labkit.save_adapter(adapted, tmp_path / "good")
    gate, first = release.registry_gate(registry, "boxes", folder, adapted, base, ids, "ann", "first")
    assert gate.passed and gate.number == 0
    registry.set_alias("boxes@production", first.number, "ann")

    stranger = copy.deepcopy(base)
    with torch.no_grad():
        stranger.model.layers[0].mlp.up_proj.weight.add_(1.0)
    foreign = labkit.save_adapter(labkit.add_lora(stranger, LORA), tmp_path / "foreign")
    gate, nothing = release.publish(registry, "boxes", foreign, "bob", "other base")
    assert not gate.passed and nothing is None and "\n" not in gate.says
    assert [version.label for version in registry.versions()] == ["boxes@v1"]

    silent = labkit.save_adapter(labkit.add_lora(copy.deepcopy(base), LORA), tmp_path / "silent")
    _, second = release.publish(registry, "boxes", silent, "bob", "untrained")
    questions = [{"prompt": one["prompt"], "completion": "red"} for one in split.held]
    for mode in ("shadow", "split"):
        trial = release.on_trial(registry, base, tokenizer, second, questions, mode, share=0.5, visitors=200)
        verdict = release.trial_gate(trial)
        assert trial.verdict == "roll back" and not verdict.passed and verdict.number >= 20
        assert verdict.name == ("shadow" if mode == "shadow" else "canary")
        assert registry.aliases("boxes") == {"boxes@production": 1}


def test_the_picture_has_a_row_for_every_way():
    figure = prompt_or_adapter({"a": {"prompt": [[1, 0]], "adapter": [[1, 1], [0, 1]]}, "b": {"x": [[1]]}})
    assert [len(axes.get_yticks()) for axes in figure.axes] == [2, 1]


def shares(lists):
    return [sum(scores) / len(scores) for scores in lists]


def ahead(runs, rivals):
    return min(shares(runs)) - max(shares(rivals))


def until(pairs, alpha, betting=False, ties=False):
    evidence, total, unequal = 1.0, 0.0, 0
    for n, (control, candidate) in enumerate(pairs, 1):
        if control == candidate and not ties:
            continue
        d, q = (1 + candidate - control) / 2, (total + 0.5) / (unequal + 1)
        if q < 0.5 or betting:
            evidence *= (2 * q) ** d * (2 * (1 - q)) ** (1 - d)
        total, unequal = total + d, unequal + 1
        if evidence >= 1 / alpha:
            return n
    return 0


test_the_checks_name_the_mistake, test_the_checks_survive_anything = exercise_checks.tests_of(
    [
        (
            check.ahead,
            ahead,
            [
                (lambda runs, rivals: max(shares(runs)) - max(shares(rivals)), "the \\*best\\* seed"),
                (lambda runs, rivals: min(shares(runs)) - min(shares(rivals)), "weakest"),
                (lambda runs, rivals: -ahead(runs, rivals), "the sign"),
            ],
        ),
        (
            check.pairs_until,
            until,
            [
                (lambda pairs, alpha: until(pairs, alpha, ties=True), "equal scores say nothing"),
                (lambda pairs, alpha: until(pairs, alpha, betting=True), "only where q < 1/2"),
            ],
        ),
    ],
    times=10,
)
