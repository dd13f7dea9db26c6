"""The training loop: the right gradients, the right steps, and what ends a run."""

import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from labkit.data.batches import collate
from labkit.data.encoding import encode_all
from labkit.lora.inject import lora_layers
from labkit.quant.model import quantize_model
from labkit.training.config import TrainConfig
from labkit.training.history import TrainingDiverged, TrainingWarning
from labkit.training.loop import train
from labkit.training.loss import supervised_loss
from labkit.training.recompute import checkpoint_blocks
from tests.training.small_runs import QUIET, SHORT, adapted, batch_of, tiny_adapted, tiny_llama, weights


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
    checkpoint_blocks(model)
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
        if module.training:
            calls.append(1)
        return output * float("nan") if len(calls) > 4 else output

    model.model.norm.register_forward_hook(poison)
    settings = QUIET | {"checkpoint_folder": tmp_path, "checkpoint_every": 2}
    with pytest.raises(TrainingDiverged, match=r"at step 5 of 6, records \[\[\d+, \d+\]\]") as error:
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

    def press_stop(module, *_):
        calls.extend([1] * module.training)
        if len(calls) == 4:
            raise KeyboardInterrupt

    model.model.norm.register_forward_hook(press_stop)
    history = train(model, tokenizer, records, TrainConfig(**QUIET))
    assert history.stopped == "interrupted" and len(history.steps) == 3


def test_too_long_records_are_told_counted_and_never_cut(records, tokenizer):
    long = {"prompt": "x", "completion": "word " * 600}
    with pytest.warns(TrainingWarning) as told:
        settings = QUIET | {"steps": 1, "eval_every": 1}
        data, held_out = [*records[:4], long], [long, records[5], long]
        history = train(adapted(), tokenizer, data, TrainConfig(**settings), held_out)
    assert history.left_out == [4] and history.held_out_left_out == [0, 2]
    assert [str(warning.message) for warning in told] == [
        "1 of 5 records of data are longer than max_length=512 tokens and are left out: 4",
        "2 of 3 records of held_out are longer than max_length=512 tokens and are left out: 0, 2",
    ]
    with pytest.raises(ValueError, match="all 1 records are longer than max_length=512"):
        train(adapted(), tokenizer, [long], TrainConfig(**QUIET))


def test_the_records_of_a_diverged_step_are_counted_as_they_were_given(tiny):
    """The one that is left out counts, so that the number finds the record."""
    model = tiny_adapted()
    long = {"prompt": "x", "completion": "word " * 600}
    model.model.norm.register_forward_hook(lambda m, _, output: output * (float("nan") if m.training else 1))
    with pytest.raises(TrainingDiverged, match=r"records \[\[1\]\]"), pytest.warns(TrainingWarning):
        train(model, tiny[1], [long, SHORT[0]], TrainConfig(**QUIET))


def test_a_record_without_a_target_is_refused_by_its_number_before_a_weight_moves(tiny):
    """Its only token has nothing before it; the loss of its batch would be 0 / 0."""
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.eos_token = None
    model, data = tiny_adapted(), [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "a"}]
    before = weights(model)
    for arguments in ((data,), (data[:1], TrainConfig(**QUIET, eval_every=1), data)):
        with pytest.raises(
            ValueError, match="record 1: nothing of .* would be learned: its only token has nothing"
        ):
            train(model, tokenizer, *arguments)
    assert torch.equal(weights(model), before)


def test_what_the_model_has_no_row_or_position_for_is_refused_before_a_weight_moves(tiny):
    long = [SHORT[0], {"prompt": "word " * 60, "completion": "x"}]
    for model in (tiny_llama(max_position_embeddings=32), tiny_llama(vocab_size=100)):
        before = weights(model)
        for arguments in ((long,), (SHORT[:1], TrainConfig(**QUIET, eval_every=1), long)):
            with pytest.raises(ValueError, match=r"record \d has (\d\d tokens|the token id \d+), and Llama"):
                train(model, tiny[1], *arguments)
        assert torch.equal(weights(model), before)


def test_held_out_records_that_nothing_measures_are_told(tiny):
    with pytest.warns(TrainingWarning, match="held_out was given, and eval_every was not"):
        train(tiny_adapted(), tiny[1], SHORT, TrainConfig(**QUIET | {"steps": 1}), held_out=SHORT)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_module_is_left_in_its_own_mode(tiny, checkpointing):
    model = tiny_adapted().train()
    model.model.layers[0].eval()
    checkpoint_blocks(model)
    model.model.layers[0].gradient_checkpointing = False
    before = [
        (module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()
    ]
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, *_: seen.append(module.training))
    train(model, tiny[1], SHORT, TrainConfig(**QUIET, checkpointing=checkpointing))
    after = [(module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
    assert after == before and True in seen


def test_experts_that_no_token_chose_are_named_and_do_not_stop_the_run(tiny):
    """A layer that only some steps call, as an expert: its LoRA has no gradient in the first, and has one
    later.
    """
    model, calls = tiny_adapted(targets=["up_proj"]), []
    expert, plain = model.model.layers[1].mlp.up_proj, torch.nn.Linear(32, 48, bias=False)

    def choose(module, arguments):
        calls.append(1)
        return (
            plain(arguments[0])
            if module.training and len(calls) < 4
            else type(expert).forward(expert, *arguments)
        )

    expert.forward = lambda x: choose(expert, (x,))
    with pytest.warns(
        TrainingWarning, match=r"2 of the 4 parameters that train got no gradient in the first step: model"
    ):
        history = train(model, tiny[1], SHORT, TrainConfig(**QUIET))
    assert history.without_gradient == [] and len(history.steps) == 6
    expert.forward = plain.forward
    with pytest.warns(TrainingWarning):
        history = train(model, tiny[1], SHORT, TrainConfig(**QUIET | {"steps": 2}))
    name = "model.layers.1.mlp.up_proj"
    assert history.without_gradient == [f"{name}.lora_A", f"{name}.lora_B"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data set is empty"),
        ([{"prompt": "x"}], r"record 0: a record needs .*'completion'"),
        ([{"messages": [{"role": "user", "content": "x"}]}], "must end with the assistant"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "x"}], "record 1: a record needs"),
        (
            "file.jsonl",
            r"data='file.jsonl' is a text, and must be a list of records; .* labkit.data.read_jsonl\(path\)",
        ),
        (Path("file.jsonl"), "is a text, and must be a list of records"),
        (None, "data=None must be a list of records"),
        ({"prompt": "a", "completion": "b"}, r"data is a dict .*put a single record into a list"),
        ((record for record in ()), "data set is empty"),
        (np.zeros((2, 3)), "record 0 of data: .* is a ndarray, and must be a dict"),
        (["a", "b"], "record 0 of data: 'a' is a str, and must be a dict"),
        (
            [{"prompt": "a", "completion": "b"}, None],
            "record 1 of data: None is a NoneType, and must be a dict",
        ),
        (
            pd.DataFrame({"prompt": ["a"]}),
            r"is a str, and must be a dict.*data.to_dict\('records'\) makes records",
        ),
    ],
)
def test_bad_data_is_named(tokenizer, data, message):
    with pytest.raises(ValueError, match=message):
        train(adapted(), tokenizer, data, TrainConfig(**QUIET))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": (1, 2)}, r"model is a tuple, and must be a model; models.load returns two things"),
        ({"model": "tiny-llama"}, r"model is a str, and must be a model; load one with"),
        ({"tokenizer": None}, "tokenizer=None must be the model's tokenizer"),
        ({"config": {"lr": 1}}, r"config is a dict, and must be a TrainConfig: TrainConfig\(\*\*config\)"),
        ({"held_out": "file.jsonl"}, "held_out='file.jsonl' is a text"),
    ],
)
def test_arguments_of_another_kind_are_named(tiny, arguments, message):
    good = {"model": tiny[0], "tokenizer": tiny[1], "data": SHORT, "config": TrainConfig(**QUIET)}
    with pytest.raises(ValueError, match=message):
        train(**good | arguments)


def test_nothing_to_train_is_an_error(small_llama, records, tokenizer):
    quantize_model(small_llama, progress=False)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        train(small_llama, tokenizer, records, TrainConfig(**QUIET))
