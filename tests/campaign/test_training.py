"""Kills, Ctrl-C, a second run and a full disk, for a training run with a checkpoint after each step.

Whatever happens, the run that goes on ends with the bits of one that nothing happened to: weights, losses,
held-out losses. With dropout, so that the random numbers must come back too, and with both optimizers, in
memory and paged.
"""

import hashlib
import os
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from labkit.files import reading, writing
from labkit.files.writing import InUse
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.models.loading import shipped
from labkit.training import checkpoint
from labkit.training.config import TrainConfig
from labkit.training.history import History, TrainingWarning
from labkit.training.loop import train
from tests.campaign.harness import moments, rounds, small_disk, start

RECORDS = [
    {"prompt": f"{a} and", "completion": f" {b}"} for a in ("sun", "tea") for b in ("moon", "milk", "so on")
]
OPTIMIZERS = (
    {"optimizer": "adamw"},
    {"optimizer": "adamw8bit"},
    {"optimizer": "adamw8bit", "state_budget_bytes": 40_000},
)
KEPT = [".run.lock", "run.safetensors"]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """That of tiny-llama."""
    return PreTrainedTokenizerFast.from_pretrained(shipped("tiny-llama"))


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
    return model, train(model, tokenizer(), RECORDS, config, held_out=RECORDS[:2])


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
        writing.write_json(folder.with_suffix(".json"), outcome(model, history))


@dataclass
class Undisturbed:
    """What a run comes to, and the seconds in a process of its own before its first step is kept, and after
    it.
    """

    outcome: dict
    before: float
    steps: float


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[Undisturbed]:
    """Of each optimizer."""
    found = []
    for n, optimizer in enumerate(OPTIMIZERS):
        folder = tmp_path_factory.mktemp("undisturbed") / str(n)
        begin, process = time.monotonic(), start(work, folder, optimizer)
        has_begun(process, folder)
        first = time.monotonic()
        process.join()
        outcome = reading.read_json(folder.with_suffix(".json"))
        found.append(Undisturbed(outcome, first - begin, time.monotonic() - first))
    assert found[1].outcome == found[2].outcome != found[0].outcome, "paging changes no bit"
    return found


def has_begun(process: BaseProcess, folder: Path) -> bool:
    """Wait for the first checkpoint; False if the process ends before."""
    while not checkpoint.exists(folder):
        if process.exitcode is not None:
            return False
        time.sleep(0.002)
    return True


def disturb(number: int, n: int, share: float, folder: Path, usual: Undisturbed) -> int:
    """Send a signal to a run: of every two, to one at any moment, to one after its first step was kept.

    Returns:
        the exit code.
    """
    process = start(work, folder, OPTIMIZERS[n % 3])
    if n % 2:
        assert has_begun(process, folder)
    process.join(share * (usual.steps if n % 2 else usual.before + usual.steps))
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    process.join()
    return process.exitcode


def goes_on_to(expected: dict, folder: Path, optimizer: dict) -> bool:
    """Does the run, started again, come to what is expected, and leave nothing but its checkpoint?"""
    work(folder, optimizer)
    assert sorted(os.listdir(folder)) == KEPT
    return reading.read_json(folder.with_suffix(".json")) == expected


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(tmp_path, undisturbed):
    killed = 0
    for n, share in enumerate(moments(rounds(4, 100), 1.0, seed=1)):
        folder, usual = tmp_path / str(n), undisturbed[n % 3]
        killed += disturb(signal.SIGKILL, n, share, folder, usual) == -signal.SIGKILL
        assert goes_on_to(usual.outcome, folder, OPTIMIZERS[n % 3]), f"round {n}"
        shutil.rmtree(folder)
    assert killed > 0, "every run was done before its kill"


def test_a_run_killed_again_and_again_loses_no_step_that_it_kept(tmp_path, undisturbed):
    folder, usual, kept = tmp_path / "run", undisturbed[1], 0
    for share in moments(rounds(2, 30), 0.3, seed=2):
        disturb(signal.SIGKILL, 1, share, folder, usual)
        done = steps_kept(folder)
        assert done >= max(kept, 1)
        kept = done
    assert goes_on_to(usual.outcome, folder, OPTIMIZERS[1])


def steps_kept(folder: Path) -> int:
    """How many steps the checkpoint in the folder has."""
    return checkpoint.read(folder / checkpoint.FILE)[1]["steps_done"]


def test_a_run_interrupted_at_any_moment_keeps_its_steps_and_goes_on_to_the_same_bits(tmp_path, undisturbed):
    interrupted = 0
    for n, share in enumerate(moments(rounds(4, 100), 1.0, seed=3)):
        folder, usual = tmp_path / str(n), undisturbed[n % 3]
        code = disturb(signal.SIGINT, n, share, folder, usual)
        assert code in (0, 1), "1: an interrupt before the work or after it"
        if checkpoint.exists(folder):
            interrupted += steps_kept(folder) < len(usual.outcome["steps"])
        assert goes_on_to(usual.outcome, folder, OPTIMIZERS[n % 3]), f"round {n}"
        shutil.rmtree(folder)
    assert interrupted > 0, "no interrupt fell into the steps of a run"


def test_a_second_run_in_the_folder_refuses_and_the_first_is_undisturbed(tmp_path, undisturbed):
    folder, refused = tmp_path / "run", 0
    process = start(work, folder, OPTIMIZERS[1])
    assert has_begun(process, folder)
    while process.exitcode is None and refused < rounds(1, 20):
        try:
            run(folder, OPTIMIZERS[1])
        except InUse as error:
            assert "another run keeps its checkpoints in" in str(error)
            refused += 1
        else:
            process.join(1)
            assert process.exitcode is not None, "both ran"
    process.join()
    assert refused > 0 and reading.read_json(folder.with_suffix(".json")) == undisturbed[1].outcome
    assert sorted(os.listdir(folder)) == KEPT


def test_on_a_full_disk_the_run_goes_on_and_the_last_checkpoint_is_whole(tmp_path, undisturbed):
    expected = undisturbed[1].outcome
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
