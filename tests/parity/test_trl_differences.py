"""Where TRL's run is another one than ours unless told: each difference alone, with what makes it go away."""

import copy

import pytest

import labkit
from labkit.data.batches import IGNORE
from labkit.data.encoding import encode
from labkit.data.tickets import load_tickets, ticket_chat
from labkit.training.evaluate import held_out_loss
from tests.parity import ladder
from tests.parity.ladder import with_settings

pytestmark = pytest.mark.usefixtures("one_thread")

# SmolLM2's turns, with the newline before a turn instead of after it
BEFORE_EACH_TURN = (
    "{% for message in messages %}{{ ('' if loop.first else '\n') + '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def case():
    return ladder.tiny_llama()


def prepared(case, tokenizer, folder, rows, **settings):
    """The rows of TRL's training set, as its trainer prepares them."""
    from datasets import Dataset

    with ladder.quiet():
        arguments = {"bf16": False, "use_cpu": True, "report_to": "none", "activation_checkpointing": False}
        trainer = ladder.trl.SFTTrainer(
            model=case.model(),
            args=ladder.trl.SFTConfig(output_dir=str(folder), **arguments | settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    return trainer.train_dataset


def as_prompt_and_completion(chat):
    return {"prompt": chat["messages"][:-1], "completion": chat["messages"][-1:]}


def learned(labels):
    return [token for token in labels if token != IGNORE]


def test_a_chat_template_has_trl_learn_one_token_more_a_newline_after_the_end_mark(case, tokenizer, tmp_path):
    chats = [ticket_chat(ticket) for ticket in load_tickets("train")[:6]]
    encoded = [encode(chat, tokenizer) for chat in chats]
    rows = prepared(case, copy.deepcopy(tokenizer), tmp_path, list(map(as_prompt_and_completion, chats)))
    newline = tokenizer("\n")["input_ids"]
    for row, one in zip(rows, encoded):
        assert row["input_ids"] == one.prompt + one.completion + newline
        assert learned(row["labels"]) == one.completion + newline
        assert tokenizer.decode(one.completion[-1:]) == "<|im_end|>"
    # a template that writes the newline before a turn, and not after it, has TRL learn what we do
    other = copy.deepcopy(tokenizer)
    other.chat_template = BEFORE_EACH_TURN
    rows = prepared(case, other, tmp_path, list(map(as_prompt_and_completion, chats)))
    for row, one in zip(rows, encoded):
        assert (row["input_ids"], learned(row["labels"])) == (one.prompt + one.completion, one.completion)


def test_a_column_of_messages_has_trl_learn_the_prompt_too(case, tokenizer, tmp_path):
    """Which columns there are decides what is learned: no setting says so, and no warning."""
    chat = ticket_chat(load_tickets("train")[0])
    (row,) = prepared(case, copy.deepcopy(tokenizer), tmp_path, [chat])
    assert row["labels"] == row["input_ids"]
    (row,) = prepared(case, copy.deepcopy(tokenizer), tmp_path, [as_prompt_and_completion(chat)])
    assert len(learned(row["labels"])) < len(row["input_ids"]) / 2


def test_assistant_only_loss_raises_for_the_template_of_smollm2(case, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="generation"):
        prepared(
            case,
            copy.deepcopy(tokenizer),
            tmp_path,
            [ticket_chat(load_tickets("train")[0])],
            assistant_only_loss=True,
        )


def test_a_record_that_is_too_long_loses_its_end_in_trl_and_is_left_out_here(case, tmp_path):
    row = ladder.records()[0]
    one = encode(row, case.tokenizer)
    (cut,) = prepared(case, copy.deepcopy(case.tokenizer), tmp_path, [row], max_length=len(one) - 1)
    assert learned(cut["labels"]) == one.completion[:-1], "the end mark is gone, and nothing says so"
    with pytest.raises(ValueError, match="longer than max_length"):
        labkit.train(ladder.ours(case), case.tokenizer, [row], with_settings(max_length=len(one) - 1))


def test_the_first_step_of_a_warm_up_of_theirs_is_at_a_rate_of_zero(case, tmp_path):
    config = with_settings(warmup=0.5, steps=4)
    mine = ladder.ours(case)
    trainer = ladder.their_trainer(case, mine, tmp_path, config)
    gap = ladder.train_both(case, mine, trainer, config)
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert rates == pytest.approx([0, config.lr / 2, config.lr, config.lr / 2])
    assert gap.rates == pytest.approx([config.lr / 2, config.lr, config.lr, config.lr / 2])


def test_their_held_out_loss_is_a_mean_over_batches_and_ours_one_over_tokens(case, tmp_path):
    from datasets import Dataset

    rows = ladder.records()[:5]
    rows[0] = rows[0] | {"completion": rows[0]["completion"] * 12}  # long answers count for more tokens
    mine = ladder.ours(case)
    trainer = ladder.their_trainer(case, mine, tmp_path, per_device_eval_batch_size=1)
    with ladder.quiet():
        theirs = trainer.evaluate(Dataset.from_list(rows))["eval_loss"]
    each = [held_out_loss(mine, case.tokenizer, [row]) for row in rows]
    over_tokens, _ = held_out_loss(mine, case.tokenizer, rows)
    assert theirs == pytest.approx(sum(loss for loss, _ in each) / len(each), abs=1e-5)
    assert over_tokens == pytest.approx(sum(loss * n for loss, n in each) / sum(n for _, n in each), abs=1e-5)
    assert abs(theirs - over_tokens) > 0.01


@pytest.mark.slow
def test_on_a_cpu_a_paged_optimizer_is_the_same_without_pages(case, tmp_path):
    losses = []
    for optim in ("paged_adamw_8bit", "adamw_8bit"):
        mine = ladder.ours(case)
        trainer = ladder.their_trainer(case, mine, tmp_path, with_settings(steps=3), optim=optim)
        with ladder.quiet():
            trainer.train()
        losses.append(trainer.losses())
    assert losses[0] == losses[1]
