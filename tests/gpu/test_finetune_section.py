"""Section finetune: what it trains with, what its rows say, and what it does where a model is missing."""

import json
from dataclasses import replace

import pytest
import torch
from gpu import finetune
from gpu.finetune import ANSWER_TOKENS, EVAL_BATCH, SECTION, TRAINING, conclude, first_steps, tickets
from gpu.measurement import Skipped

from labkit.data.tickets import load_tickets, ticket_answer

FIELDS = {
    "field_match",
    *("model", "exact_match_before", "exact_match", "parse_rate", "n_test", "minutes", "tokens_per_second"),
    *("dtype", "peak_bytes"),
}


def test_the_flagship_has_the_settings_of_the_gpu_profile(monkeypatch, capsys):
    profiles = pytest.importorskip("labkit.lab.profiles")
    monkeypatch.setattr(profiles, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(profiles, "compute_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(profiles, "memory_bytes", lambda device: 2**34)
    profile, training = profiles.profile(name="gpu"), TRAINING["smollm2-135m"]
    assert (profile.batch_size, profile.epochs) == (training.batch_size, training.epochs)
    assert (profile.eval_batch, profile.train_examples) == (EVAL_BATCH, None)


def test_the_longest_right_answer_of_tiny_llama_fits_into_what_it_may_write(tiny):
    _, tokenizer = tiny
    longest = max(len(tokenizer(ticket_answer(t["label"]))["input_ids"]) for t in load_tickets("test"))
    assert longest < ANSWER_TOKENS["tiny-llama"]


def test_the_row_of_a_fine_tune_has_what_lessons_read(stage):
    row = tickets(stage, "tiny-llama")
    assert row.keys() >= FIELDS and row["dtype"] == "float32" and row["peak_bytes"] is None
    assert row["n_test"] == 2 and row["steps"] == 2 and len(row["runs"]) == row["seeds"] == 1
    assert row["held_out_loss"] < row["held_out_loss_before"], (
        "two steps are enough to learn the form's first tokens"
    )
    json.dumps(row, allow_nan=False)


def test_the_first_steps_are_those_of_the_cpu_and_close_to_them_in_bf16(stage):
    row = first_steps(stage)
    assert row["largest_difference"] == 0 == row["weights_difference"], "here both are on the CPU"
    assert 0 < row["largest_difference_low_precision"] < 0.05 * row["losses_cpu"][0]
    assert row["losses_cpu"][1] < row["losses_cpu"][0]


def test_without_the_flagships_folder_there_is_a_sentence_and_no_download(stage, monkeypatch, tmp_path):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("nothing is fetched"))
    with pytest.raises(Skipped, match="smollm2-135m is not in labkit's cache; copy its folder"):
        tickets(stage, "smollm2-135m")
    monkeypatch.setenv("LABKIT_CACHE", "~nobody-of-this-name/x")
    with pytest.raises(Skipped, match="set LABKIT_CACHE to an absolute path"):
        tickets(stage, "smollm2-135m")


def test_a_further_seed_is_begun_only_while_there_is_time(stage, monkeypatch):
    monkeypatch.setattr(finetune, "load_tickets", lambda split: load_tickets(split)[:2])
    monkeypatch.setitem(
        finetune.TRAINING, "tiny-llama", replace(TRAINING["tiny-llama"], steps=1, batch_size=1)
    )
    monkeypatch.setitem(finetune.ANSWER_TOKENS, "tiny-llama", 1)
    whole_day = replace(stage, rehearsal=False)
    assert tickets(whole_day, "tiny-llama")["seeds"] == 3
    monkeypatch.setattr(finetune, "ENOUGH", 0.0)
    assert tickets(whole_day, "tiny-llama")["seeds"] == 1


def test_the_conclusions_say_what_was_learned_and_how_far_the_gpu_is_from_the_cpu():
    rows = {
        "a": {
            "model": "tiny-llama",
            "steps": 8,
            "losses_cpu": [],
            "largest_difference": 2e-6,
            "low_precision": None,
        },
        "b": {
            **{
                "model": "smollm2-135m",
                "exact_match_before": 0.0,
                "exact_match": 0.81,
                "steps": 189,
                "n_test": 100,
            },
            **{"seeds": 1, "minutes": 0.42},
        },
    }
    assert conclude(rows) == [
        "tiny-llama: over 8 steps the losses in fp32 are at most 2.0e-06 nats from the CPU's",
        "smollm2-135m: exact match 0% before and 81% after 189 steps (100 test tickets, 1 seed), trained in 0.42 minutes",
    ]


def test_what_is_checked_first_is_whether_the_gpu_computes_the_same(stage):
    assert next(iter(SECTION.measurements(stage))).run is first_steps
