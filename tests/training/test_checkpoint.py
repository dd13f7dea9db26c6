"""Checkpoints: a killed run goes on to the same numbers; none of another run is taken, and none is lost."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from labkit import models
from labkit.data.passages import load_austen
from labkit.files import writing
from labkit.files.writing import CannotWrite, InUse
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.optim.adamw import AdamW8bit
from labkit.quant.model import quantize_model
from labkit.training import checkpoint, run
from labkit.training.config import TrainConfig
from labkit.training.history import BestWeights, EvaluationRecord, History, StepRecord, TrainingWarning
from labkit.training.loop import train
from labkit.training.optimizer import make_optimizer
from tests.training import to_kill
from tests.training.small_runs import QUIET, SHORT, tiny_adapted, tiny_llama, weights


@pytest.mark.slow
def test_a_run_killed_in_mid_training_reaches_the_same_loss_and_weights_bit_for_bit(tmp_path, one_thread):
    """With dropout, so that the random state must come back too. Killed with SIGKILL, in the middle of a step, twice."""
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.training.to_kill", str(tmp_path / "killed"), "7"]
    for kept in (4, 8):  # of the first process's six whole steps, and of the second's
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, ""), ended.stderr
        state = load_file(tmp_path / "killed" / checkpoint.FILE)[checkpoint.STATE]
        assert json.loads(state.numpy().tobytes())["steps_done"] == kept
    assert to_kill.run(tmp_path / "killed") == to_kill.run(tmp_path / "unbroken")


def test_a_checkpoint_of_another_run_is_refused(tmp_path, tiny):
    settings = QUIET | {"checkpoint_folder": tmp_path}
    train(tiny_adapted(), tiny[1], SHORT, TrainConfig(**settings))
    with pytest.raises(
        ValueError, match=r"belongs to another run \(different: lr 0.01 there, 0.001 here\); choose"
    ):
        train(tiny_adapted(), tiny[1], SHORT, TrainConfig(**settings | {"lr": 1e-3}))
    with pytest.raises(ValueError, match=r"different: data\)"):
        train(tiny_adapted(), tiny[1], SHORT[:6], TrainConfig(**settings))
    (tmp_path / "run.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        train(tiny_adapted(), tiny[1], SHORT, TrainConfig(**settings))


@pytest.mark.parametrize(
    "change, difference",
    [
        ({"alpha": 128}, "adapter alpha 32 there, 128 here"),
        ({"dropout": 0.1}, "adapter dropout 0.0 there, 0.1 here"),
        ({"variant": "rslora"}, "adapter variant lora there, rslora here"),
        ({"init": "pissa"}, "base values"),
        ({"r": 1}, "adapter r 2 there, 1 here"),
        ({"targets": ["q_proj"]}, "trained parameters: .*v_proj.lora_A .* there, none here, and 3 more"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_adapter_is_refused(tmp_path, tiny, change, difference):
    config = TrainConfig(**QUIET | {"steps": 1, "checkpoint_folder": tmp_path})
    train(tiny_adapted(), tiny[1], SHORT, config)
    other = tiny_adapted(**change)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=f"belongs to another run .different: .*{difference}"):
        train(other, tiny[1], SHORT, config)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    assert train(tiny_adapted(), tiny[1], SHORT, config).stopped == "finished", "its own run takes it"


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ("another seed", "base values"),
        ("4 bits", "class of model.layers.*.self_attn.q_proj.* Linear there, QuantLinear here"),
        ("bf16", "base dtypes float32 there, bfloat16 here"),
    ],
)
def test_a_checkpoint_of_another_base_is_refused(tmp_path, tiny, other, difference):
    config = TrainConfig(**QUIET | {"steps": 1, "checkpoint_folder": tmp_path})
    train(tiny_adapted(), tiny[1], SHORT, config)
    base = tiny_llama(seed=1 if other == "another seed" else 0)
    if other == "4 bits":
        quantize_model(base, progress=False)
    if other == "bf16":
        base.bfloat16()
    model = add_lora(base, LoRAConfig(r=2, targets=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match=rf"belongs to another run \(different: .*{difference}"):
        train(model, tiny[1], SHORT, config)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_parameters_in_another_precision_are_another_run(tmp_path, tiny, optimizer):
    """Of full fine-tuning all is in the checkpoint but the precision that it is taken up in."""
    config = TrainConfig(**QUIET | {"steps": 1, "checkpoint_folder": tmp_path, "optimizer": optimizer})
    train(tiny_llama().requires_grad_(True), tiny[1], SHORT, config)
    with pytest.raises(
        ValueError, match=r"lm_head.weight \(4096, 32\) float32 there, \(4096, 32\) bfloat16 here"
    ):
        train(tiny_llama().bfloat16(), tiny[1], SHORT, config)


def test_an_interrupted_run_goes_on_compiled_to_the_losses_of_a_whole_one(tmp_path, tiny):
    """`torch.compile` renames everything in a model; its parameters keep their own names here."""
    config = TrainConfig(**QUIET | {"checkpoint_folder": tmp_path / "whole"})
    whole = train(tiny_adapted(dropout=0.1), tiny[1], SHORT, config)
    config = TrainConfig(**QUIET | {"checkpoint_folder": tmp_path / "parts"})
    model = tiny_adapted(dropout=0.1)
    interrupt_in_step(model, 4)
    first = train(model, tiny[1], SHORT, config)
    assert (first.stopped, len(first.steps)) == ("interrupted", 3)
    with torch._dynamo.config.patch(
        disable=True
    ):  # the names are what matters here, and compiling takes long
        again = train(torch.compile(tiny_adapted(dropout=0.1)), tiny[1], SHORT, config)
    assert (again.stopped, again.losses) == ("finished", whole.losses)


def interrupt_in_step(model, number, at=KeyboardInterrupt):
    """Raise in the forward pass of a step."""
    calls = []

    def press_stop(module, *_):
        calls.extend([1] * module.training)
        if len(calls) == number and module.training:
            raise at

    return model.model.norm.register_forward_hook(press_stop)


def test_an_interrupt_keeps_a_checkpoint_and_the_same_model_goes_on_with_it(tmp_path, tiny):
    """In a forward pass, with dropout, so that random numbers of half a step have been drawn."""
    settings = QUIET | {"optimizer": "adamw8bit", "eval_every": 2}
    expected = tiny_adapted(dropout=0.2)
    whole = train(expected, tiny[1], SHORT, TrainConfig(**settings), held_out=SHORT[:3])
    config = TrainConfig(**settings, checkpoint_folder=tmp_path)
    model = tiny_adapted(dropout=0.2)
    for stopped_at in (4, 2):
        hook = interrupt_in_step(model, stopped_at)
        history = train(model, tiny[1], SHORT, config, held_out=SHORT[:3])
        hook.remove()
        assert history.stopped == "interrupted"
    assert len(history.steps) == 4
    history = train(model, tiny[1], SHORT, config, held_out=SHORT[:3])
    assert history.stopped == "finished" and history.losses == whole.losses and history.evals == whole.evals
    assert torch.equal(weights(model), weights(expected))


def test_an_interrupt_between_two_parameters_of_a_step_waits_for_its_end(tmp_path, tiny, monkeypatch):
    """A real signal, while the optimizer is at work."""
    expected = tiny_adapted()
    whole = train(expected, tiny[1], SHORT, TrainConfig(**QUIET, optimizer="adamw8bit"))
    update, calls = AdamW8bit.update, []

    def update_and_interrupt(*arguments):
        calls.append(1)
        if len(calls) == 19:  # of 8 parameters, in the third step
            os.kill(os.getpid(), signal.SIGINT)
        update(*arguments)

    config = TrainConfig(**QUIET, optimizer="adamw8bit", checkpoint_folder=tmp_path)
    model = tiny_adapted()
    with monkeypatch.context() as patch:
        patch.setattr(AdamW8bit, "update", update_and_interrupt)
        history = train(model, tiny[1], SHORT, config)
    assert (history.stopped, len(history.steps)) == ("interrupted", 3) and len(calls) == 24
    history = train(model, tiny[1], SHORT, config)
    assert history.losses == whole.losses and torch.equal(weights(model), weights(expected))


def test_an_interrupt_in_an_evaluation_loses_neither_the_step_nor_the_evaluation(tmp_path, tiny, monkeypatch):
    settings = QUIET | {"eval_every": 3, "patience": 2}
    whole = train(tiny_adapted(), tiny[1], SHORT, TrainConfig(**settings), held_out=SHORT[:3])
    measure, calls = run.loss_of_examples, []

    def measure_and_interrupt(*arguments):
        calls.append(1)
        if len(calls) in (1, 3):
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(run, "loss_of_examples", measure_and_interrupt)
    config, parts = TrainConfig(**settings, checkpoint_folder=tmp_path), []
    for _ in range(3):
        parts.append(train(tiny_adapted(), tiny[1], SHORT, config, held_out=SHORT[:3]))
    assert [(p.stopped, len(p.steps), len(p.evals)) for p in parts] == [
        ("interrupted", 3, 0), ("interrupted", 6, 1), ("finished", 6, 2),
    ]  # fmt: skip
    assert parts[-1].evals == whole.evals and parts[-1].losses == whole.losses


def test_the_folder_is_one_runs_at_a_time(tmp_path, tiny):
    config = TrainConfig(**QUIET | {"checkpoint_folder": tmp_path})
    with (
        checkpoint.in_use(tmp_path),
        pytest.raises(InUse, match="another run keeps its checkpoints in .*; wait for it"),
    ):
        train(tiny_adapted(), tiny[1], SHORT, config)
    assert train(tiny_adapted(), tiny[1], SHORT, config).stopped == "finished"


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_step(tmp_path, tiny, monkeypatch):
    (tmp_path / "file").write_text("")
    model, before = tiny_adapted(), weights(tiny_adapted())
    for folder, said in (
        ("file", "is a file; give a folder"),
        ("file/below", "a part of the path is a file"),
    ):
        with pytest.raises(CannotWrite, match=said):
            train(model, tiny[1], SHORT, TrainConfig(**QUIET | {"checkpoint_folder": tmp_path / folder}))

    def read_only(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(CannotWrite, match="cannot write .*there: the disk is read-only"):
        train(model, tiny[1], SHORT, TrainConfig(**QUIET | {"checkpoint_folder": tmp_path / "there"}))
    assert torch.equal(weights(model), before)


def test_a_tilde_is_the_home_folder(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    train(tiny_adapted(), tiny[1], SHORT, TrainConfig(**QUIET | {"steps": 1, "checkpoint_folder": "~/run"}))
    assert (tmp_path / "run" / "run.safetensors").exists()


def test_a_full_disk_loses_no_earlier_checkpoint_and_not_what_the_model_learns(tmp_path, tiny, monkeypatch):
    settings = QUIET | {"checkpoint_folder": tmp_path, "checkpoint_every": 3}
    model = tiny_adapted()
    hook = interrupt_in_step(model, 4)
    train(model, tiny[1], SHORT, TrainConfig(**settings))
    hook.remove()
    before = (tmp_path / "run.safetensors").read_bytes()
    whole = tiny_adapted()
    losses = train(whole, tiny[1], SHORT, TrainConfig(**QUIET)).losses

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "replace", full)
        with pytest.warns(TrainingWarning) as told:
            history = train(model, tiny[1], SHORT, TrainConfig(**settings))
    (message,) = {str(warning.message) for warning in told}
    assert message.startswith(f"no checkpoint after step 6 of 6: cannot write {tmp_path}")
    assert "the disk is full; what was there before is intact. The model keeps what it has learned" in message
    assert history.losses == losses and torch.equal(weights(model), weights(whole))
    assert (tmp_path / "run.safetensors").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == [".run.lock", "run.safetensors"]
    assert train(tiny_adapted(), tiny[1], SHORT, TrainConfig(**settings)).losses == losses


class Saved:
    """A checkpoint after 3 of 6 steps of a tiny model, what it says, and a run that could take it up."""

    def __init__(self, folder, optimizer="adamw8bit"):
        self.folder, self.optimizer_name = folder, optimizer
        self.model, self.optimizer = self.fresh()
        self.parameters = dict(self.model.named_parameters())
        self.identity = {"lr": 0.1, "total": 6}
        for step in range(3):
            self.learn(step)
        steps = [
            StepRecord(step=i + 1, loss=1.0, lr=0.1, grad_norm=1.0, tokens=4, supervised=2, seconds=0.1)
            for i in range(3)
        ]
        best = BestWeights(1.5, {n: p.detach().clone() for n, p in self.parameters.items()})
        self.history = History(steps, [EvaluationRecord(step=3, loss=1.5, tokens=4)])
        checkpoint.save(folder, self.identity, 3, self.parameters, self.optimizer, self.history, best)
        self.path = folder / checkpoint.FILE
        self.bytes = self.path.read_bytes()

    def fresh(self):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 65), torch.nn.Linear(65, 3))
        return model, make_optimizer(self.optimizer_name, list(model.parameters()), None, lr=0.1)

    def learn(self, seed):
        for p in self.parameters.values():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        self.optimizer.step()

    def written(self, change, trust_hash=True):
        """Write the file again with other contents: `change(tensors, state)` in place."""
        tensors = load_file(self.path)
        state = json.loads(tensors.pop("state").numpy().tobytes())
        change(tensors, state)
        tensors["state"] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        digest = checkpoint.hash_of(tensors) if trust_hash else "0" * 64
        save_file(tensors, self.path, metadata={"sha256": digest})

    def is_refused(self, said=None):
        """Loading raises one sentence, and model, optimizer and random numbers are as they were."""
        model, optimizer = self.fresh()
        parameters = dict(model.named_parameters())
        before, rng = {n: p.detach().clone() for n, p in parameters.items()}, torch.get_rng_state()
        with pytest.raises(ValueError, match=said):
            checkpoint.load(self.folder, self.identity, parameters, optimizer)
        assert all(torch.equal(p, before[n]) for n, p in parameters.items())
        assert not optimizer.state_dict()["state"] and torch.equal(torch.get_rng_state(), rng)
        return True

    def loads(self):
        model, optimizer = self.fresh()
        parameters = dict(model.named_parameters())
        done, history, best = checkpoint.load(self.folder, self.identity, parameters, optimizer)
        assert done == 3 and history == self.history and best.loss == 1.5
        assert all(torch.equal(p, self.parameters[n]) for n, p in parameters.items())
        for name, p in parameters.items():
            kept = self.optimizer.state[self.parameters[name]]
            assert optimizer.state[p].keys() == kept.keys()
            assert all(torch.equal(optimizer.state[p][key], kept[key]) for key in kept)
        return True


def test_a_flipped_bit_or_a_cut_anywhere_is_seen_and_changes_nothing(tmp_path):
    saved, chance = Saved(tmp_path), random.Random(0)
    places = [chance.randrange(8 * len(saved.bytes)) for _ in range(60)] + [
        8 * i for i in range(0, 4000, 100)
    ]
    taken = 0
    for place in places:
        damaged = bytearray(saved.bytes)
        damaged[place // 8] ^= 1 << place % 8
        saved.path.write_bytes(damaged)
        try:
            saved.is_refused()
        except pytest.fail.Exception:  # a space in the padding of the header
            taken += saved.loads()
    assert taken <= 2
    for length in (0, 7, 8, 200, len(saved.bytes) // 2, len(saved.bytes) - 1):
        saved.path.write_bytes(saved.bytes[:length])
        saved.is_refused("not a readable checkpoint")
    saved.path.write_bytes(saved.bytes)
    assert saved.loads()


def without(prefix):
    def change(tensors, state):
        name = next(name for name in tensors if name.startswith(prefix))
        del tensors[name]

    return change


def with_tensor(name, make):
    def change(tensors, state):
        tensors[name] = make(tensors[name]).contiguous()

    return change


def with_state(**values):
    def change(tensors, state):
        state.update(values)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("optimizer/exp_avg/0.weight"), r"parameter 0.weight of shape \(65, 64\) lacks exp_avg"),
        (without("optimizer/step/1.bias"), r"parameter 1.bias of shape \(3,\) lacks step"),
        (without("optimizer/exp_avg_sq_absmax"), "parameter 0.weight .* lacks exp_avg_sq_absmax"),
        (without("parameter/1.bias"), "trained parameters: 1.bias none there"),
        (without("best/0.weight"), "the best weights, of loss 1.5, are not those of the parameters"),
        (without("rng/cpu"), "rng/cpu.* is missing"),
        (
            with_tensor("parameter/0.weight", lambda w: w[:1]),
            r"trained parameters: 0.weight \(1, 64\) float32 there",
        ),
        (
            with_tensor("parameter/0.weight", lambda w: w.half()),
            "trained parameters: 0.weight .* float16 there",
        ),
        (
            with_tensor("parameter/0.weight", lambda w: w * float("nan")),
            "parameter/0.weight has numbers that are NaN",
        ),
        (with_tensor("best/1.bias", lambda w: w / 0), "best/1.bias has numbers that are NaN or infinite"),
        (
            with_tensor("optimizer/exp_avg/0.weight", lambda w: w[:1]),
            r"parameter 0.weight .* has exp_avg of shape \(1,\), not \(4160,\)",
        ),
        (
            with_tensor("optimizer/exp_avg/0.weight", lambda w: w.float()),
            "0.weight .* has exp_avg in torch.float32, not torch.uint8",
        ),
        (
            with_tensor("optimizer/step/0.weight", lambda w: w * 1e9),
            "0.weight took 3000000000.0 steps, and the run 3",
        ),
        (
            with_tensor("optimizer/step/0.weight", lambda w: w / 2),
            "0.weight .* has step=1.5, which is no number of steps",
        ),
        (with_tensor("rng/cpu", lambda w: w[:7]), "not a readable checkpoint"),
        (with_state(steps_done=10**9), "steps_done=1000000000 is not one of the 6 steps of this run"),
        (with_state(steps_done=-1), "steps_done=-1 is not one of"),
        (with_state(steps_done="3"), "steps_done='3' is not one of"),
        (with_state(steps_done=2), "it has records of 3 steps, and 2 were done"),
        (with_state(steps=[]), "it has records of 0 steps, and 3 were done"),
        (with_state(steps=[{"step": 1}] * 3), "a StepRecord has step, loss, lr"),
        (
            with_state(evals=[{"step": 9, "loss": 1.0, "tokens": 2}]),
            "an evaluation after step 9, and 3 were done",
        ),
        (
            with_state(evals=[{"step": 2, "loss": float("nan"), "tokens": 2}]),
            "loss=nan in a EvaluationRecord",
        ),
        (with_state(stopped="paused"), "stopped='paused'"),
        (with_state(best="1.5"), "the best weights, of loss '1.5'"),
        (with_state(identity=[]), "its identity is no object"),
        (
            with_state(identity={"lr": 0.2, "total": 6}),
            r"belongs to another run \(different: lr 0.2 there, 0.1 here",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # two processes must give the same names
)
def test_whatever_cannot_be_is_refused_before_anything_is_taken(tmp_path, change, said):
    """With a hash that fits, as of a file that was written like this."""
    saved = Saved(tmp_path)
    saved.written(change)
    assert saved.is_refused(said)


def test_the_hash_in_the_header_is_compared(tmp_path):
    saved = Saved(tmp_path)
    saved.written(lambda tensors, state: None, trust_hash=False)
    assert saved.is_refused("its contents are not what was written: the hash in its header is another one")


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_the_optimizer_goes_on_bit_for_bit(tmp_path, optimizer):
    saved = Saved(tmp_path, optimizer)
    model, again = saved.fresh()
    parameters = dict(model.named_parameters())
    checkpoint.load(tmp_path, saved.identity, parameters, again)
    saved.learn(9)
    for name, p in parameters.items():
        p.grad = saved.parameters[name].grad.clone()
    again.step()
    assert all(torch.equal(p, saved.parameters[name]) for name, p in parameters.items())


def test_a_history_of_any_length_can_be_read_again(tmp_path):
    """150,000 steps have more JSON than a header may be long."""
    saved = Saved(tmp_path)
    steps = [StepRecord(saved.history.steps[0], step=i + 1) for i in range(150_000)]
    saved.identity["total"] = len(steps)
    kind = History(steps)
    checkpoint.save(tmp_path, saved.identity, len(steps), saved.parameters, saved.optimizer, kind, None)
    model, optimizer = saved.fresh()
    done, history, _ = checkpoint.load(tmp_path, saved.identity, dict(model.named_parameters()), optimizer)
    assert done == 150_000 and history.steps[-1] == steps[-1]


def test_a_damaged_checkpoint_of_version_0_1_0_is_refused_too(tmp_path):
    """It has no hash; what can be known is checked all the same."""
    path = Path(__file__).parents[1] / "fixtures" / "saved_before" / "checkpoint" / "run.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = json.loads(metadata["state"])
    tensors = load_file(path)
    parameters = {
        name.removeprefix("parameter/"): torch.nn.Parameter(torch.zeros_like(value))
        for name, value in tensors.items()
        if name.startswith("parameter/")
    }
    identity = state["identity"]
    optimizer = make_optimizer("adamw", list(parameters.values()), None)
    name = next(name for name in tensors if name.startswith("optimizer/exp_avg_sq/"))
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / checkpoint.FILE, metadata)
    with pytest.raises(ValueError, match="parameter .* lacks exp_avg_sq"):
        checkpoint.load(tmp_path, identity, parameters, optimizer)
    assert all((p == 0).all() for p in parameters.values()) and not optimizer.state
    shutil.copy(path, tmp_path)
    assert checkpoint.load(tmp_path, identity, parameters, optimizer)[0] == 3


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


def test_settings_that_change_no_result_may_differ_between_the_parts_of_a_run(tmp_path, tiny):
    settings = QUIET | {"checkpoint_folder": tmp_path}
    whole = train(tiny_adapted(), tiny[1], SHORT, TrainConfig(**settings))
    again = train(
        tiny_adapted(), tiny[1], SHORT, TrainConfig(**settings, checkpoint_every=1, state_budget_bytes=10**6)
    )
    assert again.steps == whole.steps, "all steps were done, so none was taken again"


def test_a_refused_checkpoint_leaves_the_model_in_its_mode(tmp_path, tiny):
    settings = QUIET | {"checkpoint_folder": tmp_path}
    train(tiny_adapted(), tiny[1], SHORT, TrainConfig(**settings))
    model = tiny_adapted()
    with pytest.raises(ValueError, match="belongs to another run"):
        train(model, tiny[1], SHORT, TrainConfig(**settings | {"lr": 1e-3}))
    assert not model.training
