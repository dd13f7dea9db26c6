"""Kills, Ctrl-C, a second run and a full disk, for a training run with a checkpoint after each step.

Whatever happens, the run that goes on ends with the bits of one that nothing happened to: weights, losses, held-out
losses. With dropout, so that the random numbers must come back too, and with both optimizers, in memory and paged.
"""

import hashlib
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from labkit import files, models
from labkit.files import InUse
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.training import checkpoint
from labkit.training.config import TrainConfig
from labkit.training.history import History, TrainingWarning
from labkit.training.loop import train
from tests.campaign.harness import duration, kill_after, moments, rounds, small_disk, start

RECORDS = [
    {"prompt": f"{a} and", "completion": f" {b}"} for a in ("sun", "tea") for b in ("moon", "milk", "so on")
]
OPTIMIZERS = (
    {"optimizer": "adamw"},
    {"optimizer": "adamw8bit"},
    {"optimizer": "adamw8bit", "state_budget_bytes": 40_000},
)
KEPT = [".run.lock", "run.safetensors"]


def run(folder: Path, optimizer: dict, steps: int = 8) -> tuple[torch.nn.Module, History]:
    """The run, or what is left of it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, attention_dropout=0.1, **sizes))
    add_lora(
        model, LoRAConfig(r=64, alpha=64, dropout=0.2, targets=["q_proj", "o_proj"])
    )  # in 8 bits: 4096 numbers
    settings = {
        "lr": 1e-2,
        "steps": steps,
        "batch_size": 2,
        "accumulation": 2,
        "eval_every": 3,
        "progress": False,
    }
    config = TrainConfig(**settings, **optimizer, checkpoint_folder=folder, checkpoint_every=1)
    return model, train(model, models.load("tiny-llama")[1], RECORDS, config, held_out=RECORDS[:2])


def outcome(model: torch.nn.Module, history: History) -> dict:
    """All that a run comes to, but for its seconds."""
    trained = [p.detach().numpy().tobytes() for p in model.parameters() if p.requires_grad]
    steps = [{key: value for key, value in record.items() if key != "seconds"} for record in history.steps]
    return {"weights": hashlib.sha256(b"".join(trained)).hexdigest(), "steps": steps, "evals": history.evals}


def work(folder: Path, optimizer: dict) -> None:
    """The run in a process of its own; what it comes to is written beside its folder when it is done."""
    try:
        model, history = run(folder, optimizer)
    except KeyboardInterrupt:
        return  # before the first step, or after the last
    if history.stopped == "finished":
        files.write_json(folder.with_suffix(".json"), outcome(model, history))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[tuple[dict, float]]:
    """For each optimizer what the run comes to, and the seconds that it takes in a process of its own."""
    found = []
    for n, optimizer in enumerate(OPTIMIZERS):
        folder = tmp_path_factory.mktemp("undisturbed") / str(n)
        seconds = duration(work, folder, optimizer)
        found.append((files.read_json(folder.with_suffix(".json")), seconds))
    assert found[1][0] == found[2][0] != found[0][0], "paging changes no bit"
    return found


def goes_on_to(expected: dict, folder: Path, optimizer: dict) -> bool:
    """Does the run, started again, come to what is expected, and leave nothing but its checkpoint?"""
    work(folder, optimizer)
    assert sorted(os.listdir(folder)) == KEPT
    return files.read_json(folder.with_suffix(".json")) == expected


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(tmp_path, undisturbed):
    killed, begun = 0, 0
    for n, share in enumerate(moments(rounds(4, 100), 1.0, seed=1)):
        (expected, seconds), optimizer = undisturbed[n % 3], OPTIMIZERS[n % 3]
        folder = tmp_path / str(n)
        killed += kill_after(share * seconds, work, folder, optimizer)
        begun += checkpoint.exists(folder)
        assert goes_on_to(expected, folder, optimizer), f"round {n}"
        shutil.rmtree(folder)
    assert killed > 0 and begun > 0, "no kill fell into the steps of a run"


def test_a_run_killed_again_and_again_loses_no_step_that_it_kept(tmp_path, undisturbed):
    expected, seconds = undisturbed[1]
    folder, kept = tmp_path / "run", 0
    for moment in moments(rounds(2, 30), seconds, seed=2):
        kill_after(moment, work, folder, OPTIMIZERS[1])
        if checkpoint.exists(folder):
            done = checkpoint.read(folder / checkpoint.FILE)[1]["steps_done"]
            assert done >= kept
            kept = done
    assert kept > 0 and goes_on_to(expected, folder, OPTIMIZERS[1])


def test_a_run_interrupted_at_any_moment_keeps_its_steps_and_goes_on_to_the_same_bits(tmp_path, undisturbed):
    interrupted = 0
    for n, share in enumerate(moments(rounds(3, 100), 1.0, seed=3)):
        (expected, seconds), optimizer = undisturbed[n % 3], OPTIMIZERS[n % 3]
        folder = tmp_path / str(n)
        process = start(work, folder, optimizer)
        process.join(share * seconds)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGINT)
        process.join()
        assert process.exitcode in (0, 1), "1: an interrupt outside of train"
        if checkpoint.exists(folder):
            state = checkpoint.read(folder / checkpoint.FILE)[1]
            interrupted += state["steps_done"] < len(expected["steps"])
        assert goes_on_to(expected, folder, optimizer), f"round {n}"
        shutil.rmtree(folder)
    assert interrupted > 0, "no interrupt fell into the steps of a run"


def test_a_second_run_in_the_folder_refuses_and_the_first_is_undisturbed(tmp_path, undisturbed):
    folder = tmp_path / "run"
    process = start(work, folder, OPTIMIZERS[1])
    while not checkpoint.exists(folder):
        assert process.exitcode is None
        time.sleep(0.005)
    refused = 0
    while process.exitcode is None and refused < rounds(1, 20):
        try:
            run(folder, OPTIMIZERS[1])
        except InUse as error:
            assert "another run keeps its checkpoints in" in str(error)
            refused += 1
        else:
            assert process.exitcode is not None, "both ran"
        process.join(0.01)
    process.join()
    assert refused > 0 and files.read_json(folder.with_suffix(".json")) == undisturbed[1][0]
    assert sorted(os.listdir(folder)) == KEPT


def test_on_a_full_disk_the_run_goes_on_and_the_last_checkpoint_is_whole(tmp_path, undisturbed):
    expected = undisturbed[1][0]
    run(tmp_path / "large", OPTIMIZERS[1], steps=1)
    size = (tmp_path / "large" / checkpoint.FILE).stat().st_size
    with small_disk(tmp_path / "disk", kilobytes=int(1.6 * size / 1024)) as disk:  # one and a half fit
        if disk is None:
            pytest.skip("no permission to mount a small disk")
        with pytest.warns(TrainingWarning) as told:
            model, history = run(disk / "run", OPTIMIZERS[1])
        assert outcome(model, history) == expected
        messages = [str(warning.message) for warning in told]
        assert len(messages) == 7 and all(
            f"no checkpoint after step {n} of 8: cannot write {disk}" in message
            and "the disk is full" in message
            for n, message in enumerate(messages, 2)
        )
        assert sorted(os.listdir(disk / "run")) == KEPT
        assert checkpoint.read(disk / "run" / checkpoint.FILE)[1]["steps_done"] == 1
        shutil.copytree(disk / "run", tmp_path / "run")
    assert goes_on_to(expected, tmp_path / "run", OPTIMIZERS[1])
