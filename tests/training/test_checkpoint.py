"""Checkpoints: a killed run goes on to the same numbers; none of another run is taken, and none is lost."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from labkit import models
from labkit.data.passages import load_austen
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.quant.model import quantize_model
from labkit.training import checkpoint
from labkit.training.config import TrainConfig
from labkit.training.history import History
from labkit.training.loop import train
from tests.conftest import make_small_llama
from tests.training.small_runs import QUIET, adapted

SCRIPT = textwrap.dedent(
    """
    import hashlib, json, sys, torch
    from labkit.data.tickets import load_tickets, ticket_chat
    from labkit.lora.config import LoRAConfig
    from labkit.lora.inject import add_lora
    from labkit.paths import cache_folder
    from labkit.quant.model import quantize_model
    from labkit.training.config import TrainConfig
    from labkit.training.loop import train
    from tests.conftest import make_small_llama
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(cache_folder() / "smollm2-135m")
    model = make_small_llama()
    quantize_model(model, progress=False)
    torch.manual_seed(3)
    add_lora(model, LoRAConfig(r=4, dropout=0.1))
    records = [ticket_chat(t) for t in load_tickets("train")[:16]]
    config = TrainConfig(lr=1e-2, steps=30, batch_size=2, accumulation=2, progress=False, eval_every=10,
                         checkpoint_folder=sys.argv[1], checkpoint_every=4)
    history = train(model, tokenizer, records, config, held_out=records[:4])
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    print(json.dumps([history.losses, [e["loss"] for e in history.evals], hashlib.sha256(weights.numpy().tobytes()).hexdigest()]))
    """
)


@pytest.mark.slow
def test_a_run_killed_in_mid_training_reaches_the_same_loss_and_weights_bit_for_bit(tmp_path, smollm2):
    """With dropout, so that the random state must come back too. Killed with SIGKILL, twice."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}

    def start(folder):
        return subprocess.Popen(
            [sys.executable, script, folder], env=environment, stdout=subprocess.PIPE, text=True
        )

    unbroken = start(tmp_path / "unbroken").communicate()[0]
    killed = 0
    for _ in range(2):
        state = tmp_path / "killed" / "run.safetensors"
        before = state.stat().st_mtime_ns if state.exists() else 0
        process = start(tmp_path / "killed")
        deadline = time.time() + 120
        while time.time() < deadline and process.poll() is None:
            if state.exists() and state.stat().st_mtime_ns > before:
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.002)
        process.communicate()
    assert killed == 2, "the run must really have been killed between its checkpoints"
    resumed = start(tmp_path / "killed").communicate()[0]
    assert resumed == unbroken != ""


def test_a_checkpoint_of_another_run_is_refused(tmp_path, records, tokenizer):
    settings = QUIET | {"checkpoint_folder": tmp_path}
    train(adapted(), tokenizer, records, TrainConfig(**settings))
    with pytest.raises(ValueError, match=r"belongs to another run \(different: lr\)"):
        train(adapted(), tokenizer, records, TrainConfig(**settings | {"lr": 1e-3}))
    with pytest.raises(ValueError, match="different: data"):
        train(adapted(), tokenizer, records[:8], TrainConfig(**settings))
    (tmp_path / "run.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        train(adapted(), tokenizer, records, TrainConfig(**settings))


@pytest.mark.parametrize(
    "change, part",
    [
        ({"alpha": 128}, "adapter"),
        ({"dropout": 0.1}, "adapter"),
        ({"variant": "rslora"}, "adapter"),
        ({"init": "pissa"}, "model"),
        ({"r": 2}, "trained parameters"),
        ({"targets": ["q_proj"]}, "trained parameters"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_adapter_is_refused(tmp_path, records, tokenizer, change, part):
    def fresh(**settings):
        return add_lora(make_small_llama(), LoRAConfig(**{"r": 4, "targets": "attention"} | settings))

    config = TrainConfig(**QUIET | {"steps": 1, "checkpoint_folder": tmp_path})
    train(fresh(), tokenizer, records, config)
    other = fresh(**change)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=f"belongs to another run .different: .*{part}"):
        train(other, tokenizer, records, config)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    assert train(fresh(), tokenizer, records, config).stopped == "finished", "its own run takes it"


@pytest.mark.parametrize("other", ["another seed", "4 bits", "bf16"])
def test_a_checkpoint_of_another_base_is_refused(tmp_path, records, tokenizer, other):
    config = TrainConfig(**QUIET | {"steps": 1, "checkpoint_folder": tmp_path})
    train(add_lora(make_small_llama(), LoRAConfig(r=4)), tokenizer, records, config)
    base = make_small_llama(seed=1 if other == "another seed" else 0)
    if other == "4 bits":
        quantize_model(base, progress=False)
    if other == "bf16":
        base.bfloat16()
    with pytest.raises(ValueError, match=r"belongs to another run \(different: model\)"):
        train(add_lora(base, LoRAConfig(r=4)), tokenizer, records, config)


def test_a_full_disk_loses_no_earlier_checkpoint(tmp_path, records, tokenizer, monkeypatch):
    settings = QUIET | {"checkpoint_folder": tmp_path, "checkpoint_every": 3}
    train(adapted(), tokenizer, records, TrainConfig(**settings))
    before = (tmp_path / "run.safetensors").read_bytes()
    monkeypatch.setattr(
        checkpoint.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    parameters = {"p": torch.nn.Parameter(torch.ones(2))}
    optimizer = torch.optim.AdamW(parameters.values())
    with pytest.raises(OSError, match="No space left.*intact"):
        checkpoint.save(tmp_path, {}, 1, parameters, optimizer, History(), None)
    assert (tmp_path / "run.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["run.safetensors"]


def test_a_run_that_version_0_1_0_left_half_done_goes_on_to_its_numbers(tmp_path):
    """The fixture is its checkpoint after 3 of 6 steps; the losses are those of its run without a stop."""
    shutil.copy(
        Path(__file__).parents[1] / "fixtures" / "saved_before" / "checkpoint" / "run.safetensors", tmp_path
    )
    model, tokenizer = models.load("tiny-llama", dtype=torch.float32)
    torch.manual_seed(1)
    add_lora(model, LoRAConfig(r=2, alpha=4, dropout=0.1, targets=["q_proj"]))
    settings = {
        "lr": 3e-3,
        "lora_plus": 4.0,
        "steps": 6,
        "batch_size": 2,
        "max_length": 192,
        "seed": 5,
        "progress": False,
    }
    config = TrainConfig(**settings, checkpoint_folder=tmp_path, checkpoint_every=3)
    losses = train(model, tokenizer, load_austen("train")[:12], config).losses
    assert losses[:3] == [5.353868007659912, 4.7897748947143555, 4.622648239135742]
    assert losses[3:] == pytest.approx([4.778805732727051, 5.128652572631836, 4.753376007080078], rel=1e-4)


def test_settings_that_change_no_result_may_differ_between_the_parts_of_a_run(tmp_path, records, tokenizer):
    settings = QUIET | {"checkpoint_folder": tmp_path}
    whole = train(adapted(), tokenizer, records, TrainConfig(**settings))
    again = train(
        adapted(), tokenizer, records, TrainConfig(**settings, checkpoint_every=1, state_budget_bytes=10**6)
    )
    assert again.steps == whole.steps, "all steps were done, so none was taken again"


def test_a_refused_checkpoint_leaves_the_model_in_its_mode(tmp_path, records, tokenizer):
    settings = QUIET | {"checkpoint_folder": tmp_path}
    train(adapted(), tokenizer, records, TrainConfig(**settings))
    model = adapted()
    with pytest.raises(ValueError, match="belongs to another run"):
        train(model, tokenizer, records, TrainConfig(**settings | {"lr": 1e-3}))
    assert not model.training
