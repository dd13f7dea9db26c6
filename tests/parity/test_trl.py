"""The ladder between labkit and TRL over PEFT: ids, labels, loss, gradients, steps, answers, on two architectures."""

import pytest
import torch

from labkit.data.batches import IGNORE
from labkit.training.evaluate import generate
from tests.parity import ladder
from tests.parity.ladder import with_settings

pytestmark = pytest.mark.usefixtures("one_thread")
ARCHITECTURES = ("tiny-llama", "neox")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request, tmp_path_factory):
    if request.param == "tiny-llama":
        return ladder.tiny_llama()
    return ladder.small_neox(tmp_path_factory.mktemp("neox"))


def batch_of(trainer):
    """The first batch that TRL's trainer would take."""
    return next(iter(trainer.get_train_dataloader()))


def test_ids_and_labels_of_plain_records_are_the_same(case, tmp_path):
    mine = ladder.ours(case)
    theirs = batch_of(ladder.their_trainer(case, mine, tmp_path))
    batch = ladder.first_batch(case, mine)
    assert torch.equal(
        theirs["input_ids"][theirs["attention_mask"] == 1], batch.ids[theirs["attention_mask"] == 1]
    )
    assert torch.equal(theirs["labels"], batch.targets)
    assert (batch.targets != IGNORE).any(1).all() and theirs["input_ids"].shape == batch.ids.shape


def test_the_first_loss_and_every_gradient_are_the_same(case, tmp_path):
    mine = ladder.ours(case)
    trainer = ladder.their_trainer(case, mine, tmp_path)
    loss, theirs = ladder.first_losses(case, mine, trainer)
    assert abs(loss.item() - theirs.item()) < 1e-6 < loss.item()
    for name, (a, b) in ladder.pairs(mine, trainer.model).items():
        assert a.grad.abs().max() > 0, name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


SETTINGS = {
    "plain": {},
    "all at once": {
        "accumulation": 2,
        "weight_decay": 0.1,
        "schedule": "cosine",
        "clip": 0.05,
        "checkpointing": True,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_after_six_steps_losses_and_weights_are_the_same(case, tmp_path, settings):
    config = with_settings(**SETTINGS[settings])
    mine = ladder.ours(case)
    trainer = ladder.their_trainer(case, mine, tmp_path, config)
    before = ladder.loss_of_first(case, mine)
    gap = ladder.train_both(case, mine, trainer, config)
    assert gap.loss < 1e-5 and gap.weight < 1e-3
    # something was learned, so that to agree says something
    assert ladder.loss_of_first(case, mine) < before - 0.1
    assert ladder.loss_of_first(case, trainer.model) == pytest.approx(
        ladder.loss_of_first(case, mine), abs=1e-5
    )


@pytest.mark.slow
def test_after_many_steps_greedy_answers_are_the_same_and_so_is_exact_match(tmp_path):
    case = ladder.tiny_llama()
    rows, config = ladder.records()[:8], with_settings(steps=32, lr=1e-2)
    mine = ladder.ours(case)
    trainer = ladder.their_trainer(case, mine, tmp_path, config, rows=rows)
    ladder.train_both(case, mine, trainer, config, rows)
    prompts = [row["prompt"] for row in rows]
    answers = generate(mine, case.tokenizer, prompts, max_new_tokens=12, progress=False)
    assert answers == [ladder.their_answer(trainer.model, case.tokenizer, prompt, 12) for prompt in prompts]
    right = sum(a == row["completion"].strip() for a, row in zip(answers, rows))
    assert right >= 2, "an exact match of zero would be the same by accident"
