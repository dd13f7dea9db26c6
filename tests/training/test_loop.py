"""The training loop: the right gradients, the right steps, and what ends a run."""

import pytest
import torch
from torch.nn import functional as F

from labkit.data.batches import collate
from labkit.data.encoding import encode_all
from labkit.lora.inject import lora_layers
from labkit.quant.model import quantize_model
from labkit.training.config import TrainConfig
from labkit.training.history import TrainingDiverged
from labkit.training.loop import train
from labkit.training.loss import supervised_loss
from tests.training.small_runs import QUIET, adapted, batch_of, weights


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
