"""The training loop: the right loss, the right gradients, the right numbers after a kill."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch.nn import functional as F

from labkit.data.batches import collate
from labkit.data.encoding import encode_all
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.quant.model import quantize_model
from labkit.training.config import TrainConfig, learning_rate
from labkit.training.history import TrainingDiverged
from labkit.training.loop import train
from labkit.training.loss import supervised_loss
from tests.conftest import make_small_llama

QUIET = {"progress": False, "batch_size": 2, "steps": 6, "lr": 1e-2}


def adapted(quantized=False, **config):
    model = make_small_llama()
    if quantized:
        quantize_model(model, progress=False)
    torch.manual_seed(3)
    return add_lora(model, LoRAConfig(r=4, **config))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def batch_of(records, tokenizer):
    return collate(encode_all(records[:4], tokenizer, 512)[0], tokenizer.pad_token_id)


@pytest.mark.parametrize("logits", ["supervised", "all"])
def test_loss_equals_transformers_own_with_labels(small_llama, records, tokenizer, logits):
    batch = batch_of(records, tokenizer)
    reference = small_llama(
        input_ids=batch.ids, attention_mask=(batch.ids != -1).long(), labels=batch.targets
    ).loss
    ours = supervised_loss(small_llama, batch, logits) / batch.n_supervised
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_padding_changes_no_supervised_loss(small_llama, records, tokenizer):
    examples = encode_all(records[:4], tokenizer, 512)[0]
    together = supervised_loss(small_llama, collate(examples, 2))
    alone = sum(supervised_loss(small_llama, collate([e], 2)) for e in examples)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_logits_are_made_at_supervised_positions_only(small_llama, records, tokenizer):
    batch, shapes = batch_of(records, tokenizer), []
    hook = small_llama.lm_head.register_forward_hook(lambda _, __, out: shapes.append(out.shape))
    supervised_loss(small_llama, batch)
    hook.remove()
    assert shapes == [(1, batch.n_supervised, 49152)]
    assert batch.n_supervised < batch.ids.numel() / 2


def gradients(model, batch):
    supervised_loss(model, batch).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("quantized", [False, True])
def test_gradient_checkpointing_over_a_frozen_base_gives_the_same_gradients(records, tokenizer, quantized):
    model, batch = adapted(quantized).train(), batch_of(records, tokenizer)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    without = gradients(model, batch)
    model.activation_checkpointing_enable({"use_reentrant": False})
    with_ = gradients(model, batch)
    assert with_.keys() == without.keys() and len(with_) == 42
    assert all(torch.equal(with_[n], without[n]) for n in with_)
    assert all(g.abs().max() > 0 for g in with_.values())


def test_training_with_checkpointing_reaches_the_same_weights(records, tokenizer):
    results = []
    for checkpointing in (False, True):
        model = adapted()
        train(model, tokenizer, records, TrainConfig(**QUIET, checkpointing=checkpointing))
        results.append(weights(model))
    assert torch.equal(*results)


def test_steps_equal_a_plain_torch_loop_with_adamw(records, tokenizer):
    """Batches in order of `batch_order`; loss by transformers; AdamW and clipping of torch."""
    from labkit.data.batches import batch_order

    ours = adapted()
    history = train(ours, tokenizer, records, TrainConfig(**QUIET, schedule="constant", warmup=0, clip=0.5))
    model = adapted().train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0)
    examples = encode_all(records, tokenizer, 512)[0]
    losses = []
    for indices in batch_order([len(e) for e in examples], 2, seed=0, epoch=0)[:6]:
        batch = collate([examples[i] for i in indices], 2)
        logits = model(input_ids=batch.ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        losses.append(loss.item())
    assert history.losses == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(weights(ours), weights(model), rtol=1e-3, atol=1e-4)


def test_accumulation_equals_one_large_batch(records, tokenizer):
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        model = adapted()
        settings = QUIET | {
            "steps": 1,
            "batch_size": batch_size,
            "accumulation": accumulation,
            "schedule": "constant",
            "warmup": 0,
        }
        history = train(model, tokenizer, records[:8], TrainConfig(**settings))
        results.append((history.losses[0], history.steps[0]["grad_norm"], history.steps[0]["supervised"]))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_only_adapters_change_and_the_loss_falls(records, tokenizer):
    model = adapted(quantized=True)
    frozen = {n: b.clone() for n, b in model.named_buffers()}
    history = train(model, tokenizer, records, TrainConfig(**QUIET | {"steps": 20}))
    assert history.losses[-1] < history.losses[0] - 0.2, "a random frozen base learns little, but it learns"
    assert all(torch.equal(b, frozen[n]) for n, b in model.named_buffers())


def test_schedules():
    def rates(**c):
        return [learning_rate(s, 10, TrainConfig(lr=1.0, **c)) for s in range(10)]

    assert rates(schedule="constant", warmup=0) == [1.0] * 10
    assert rates(schedule="linear", warmup=0.2) == pytest.approx(
        [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    cosine = rates(schedule="cosine", warmup=0)
    assert cosine == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 10)) for s in range(10)])


SCRIPT = textwrap.dedent(
    """
    import hashlib, json, sys, torch
    from labkit.data.encoding import ticket_chat, tickets
    from labkit.lora.layer import LoRAConfig
    from labkit.lora.inject import add_lora
    from labkit.paths import cache_folder
    from labkit.quant.linear import quantize_model
    from labkit.train import TrainConfig, train
    from tests.conftest import make_small_llama
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(cache_folder() / "smollm2-135m")
    model = make_small_llama()
    quantize_model(model, progress=False)
    torch.manual_seed(3)
    add_lora(model, LoRAConfig(r=4, dropout=0.1))
    records = [ticket_chat(t) for t in tickets("train")[:16]]
    config = TrainConfig(lr=1e-2, steps=30, batch_size=2, accumulation=2, progress=False, eval_every=10,
                         checkpoint_folder=sys.argv[1], checkpoint_every=4)
    history = train(model, tokenizer, records, config, held_out=records[:4])
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    print(json.dumps([history.losses, [e["loss"] for e in history.evals], hashlib.sha256(weights.numpy().tobytes()).hexdigest()]))
    """
)


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


def test_a_full_disk_loses_no_earlier_checkpoint(tmp_path, records, tokenizer, monkeypatch):
    from labkit.training import checkpoint

    settings = QUIET | {"checkpoint_folder": tmp_path, "checkpoint_every": 3}
    train(adapted(), tokenizer, records, TrainConfig(**settings))
    before = (tmp_path / "run.safetensors").read_bytes()
    monkeypatch.setattr(
        checkpoint.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    parameters = {"p": torch.nn.Parameter(torch.ones(2))}
    optimizer = torch.optim.AdamW(parameters.values())
    from labkit.training.history import History

    with pytest.raises(OSError, match="No space left.*intact"):
        checkpoint.save(tmp_path, {}, 1, parameters, optimizer, History(), None)
    assert (tmp_path / "run.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["run.safetensors"]


def test_nan_stops_the_run_says_where_and_keeps_the_weights_of_the_step_before(tmp_path, records, tokenizer):
    model = adapted()
    calls = []

    def poison(module, _, output):
        calls.append(1)
        return output * float("nan") if len(calls) > 4 else output

    model.model.norm.register_forward_hook(poison)
    settings = QUIET | {"checkpoint_folder": tmp_path, "checkpoint_every": 2}
    with pytest.raises(TrainingDiverged, match=r"at step 5 of 6, examples \[\[\d+, \d+\]\]") as error:
        train(model, tokenizer, records, TrainConfig(**settings))
    assert len(error.value.history.steps) == 4 and error.value.checkpoint == tmp_path
    assert torch.isfinite(weights(model)).all()
    assert (tmp_path / "run.safetensors").exists()


def test_early_stop_goes_back_to_the_best_weights(records, tokenizer):
    from labkit.training.evaluate import held_out_loss

    model = adapted()
    settings = QUIET | {"lr": 0.5, "steps": 40, "eval_every": 2, "patience": 2, "schedule": "constant"}
    history = train(model, tokenizer, records[:8], TrainConfig(**settings), held_out=records[8:])
    assert history.stopped == "early" and len(history.steps) < 40
    best = min(row["loss"] for row in history.evals)
    assert history.evals[-1]["loss"] > best
    assert held_out_loss(model, tokenizer, records[8:])[0] == pytest.approx(best, rel=1e-5)


def test_an_interrupt_returns_what_there_is(records, tokenizer):
    model = adapted()
    calls = []

    def press_stop(*_):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    model.model.norm.register_forward_hook(press_stop)
    history = train(model, tokenizer, records, TrainConfig(**QUIET))
    assert history.stopped == "interrupted" and len(history.steps) == 3


def test_too_long_records_are_counted_and_never_cut(records, tokenizer):
    long = {"prompt": "x", "completion": "word " * 600}
    history = train(adapted(), tokenizer, [*records[:4], long], TrainConfig(**QUIET | {"steps": 1}))
    assert history.left_out == [4]
    with pytest.raises(ValueError, match="all 1 records are longer than max_length=512"):
        train(adapted(), tokenizer, [long], TrainConfig(**QUIET))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data set is empty"),
        ([{"prompt": "x"}], r"record 0: a record needs .*'completion'"),
        ([{"messages": [{"role": "user", "content": "x"}]}], "must end with the assistant"),
    ],
)
def test_bad_data_is_named(tokenizer, data, message):
    with pytest.raises(ValueError, match=message):
        train(adapted(), tokenizer, data, TrainConfig(**QUIET))


def test_nothing_to_train_is_an_error(small_llama, records, tokenizer):
    quantize_model(small_llama, progress=False)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        train(small_llama, tokenizer, records, TrainConfig(**QUIET))


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0}, {"lr": float("nan")}, {"steps": 0}, {"batch_size": -1}, {"schedule": "step"}, {"warmup": 1}, {"clip": 0},
     {"logits": "some"}, {"patience": 2}],
)  # fmt: skip
def test_config_out_of_range_says_which(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainConfig(**wrong)
