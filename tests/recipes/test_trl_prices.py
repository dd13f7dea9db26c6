"""The recipe of `data/results/trl_prices.jsonl`: each run changes what its name says, and nothing else."""

import os
from concurrent.futures.process import BrokenProcessPool

import pytest

pytest.importorskip("trl")

from peft import LoraConfig
from trl import SFTConfig

from labkit.data.tickets import load_tickets, ticket_answer
from labkit.training.metrics import score_json
from recipes import trl_prices as recipe

TOGETHER = {"packing", "packing, as many tokens a step"}


def changes(setting):
    """What a setting's options have that the reference's do not, one entry each."""
    ours, reference = recipe.options(setting), recipe.options("reference")
    found = {}
    for name, value in ours.items():
        pairs = value.items() if isinstance(value, dict) else [(name, value)]
        before = reference[name] if isinstance(value, dict) else reference
        found |= {key: one for key, one in pairs if one != before[key]}
    return found


def test_every_setting_switches_one_thing_alone_except_those_that_say_so():
    for setting in recipe.SETTINGS:
        expected = 0 if setting == "reference" else 1
        assert len(changes(setting)) == expected or setting in TOGETHER, setting
    assert set(changes("packing")) == {"packing", "max_length"}


def test_what_is_called_a_default_is_one(tmp_path):
    args, lora = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), LoraConfig()
    for setting, name in (("lr 2e-5", "learning_rate"), ("checkpointing", "gradient_checkpointing")):
        assert recipe.options(setting)["args"][name] == getattr(args, name), setting
    assert recipe.options("q and v only")["lora"]["target_modules"] == lora.target_modules
    assert lora.lora_alpha == lora.r and lora.lora_dropout == 0 and args.packing is False


@pytest.mark.parametrize("setting", recipe.SETTINGS)
def test_trl_and_peft_take_the_options_of_every_setting(setting, tmp_path):
    chosen = recipe.options(setting)
    SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], **chosen["args"])
    LoraConfig(**chosen["lora"])


def test_the_plan_has_every_run_once_and_three_seeds_of_the_telling_settings_first():
    plan = recipe.plan()
    assert len(plan) == len(set(plan)) == len(recipe.SETTINGS) * len(recipe.SEEDS)
    first = plan[: len(recipe.FIRST) * len(recipe.SEEDS)]
    assert {name for name, _ in first} == set(recipe.FIRST)
    assert [seed for name, seed in first if name == "reference"] == list(recipe.SEEDS)


def test_the_columns_of_the_data_hold_the_same_chat():
    tickets = load_tickets("train")[:3]
    whole, apart = (recipe.data_set(columns, tickets) for columns in ("messages", "prompt, completion"))
    assert whole.column_names == ["messages"] and apart.column_names == ["prompt", "completion"]
    assert [row["messages"] for row in whole] == [row["prompt"] + row["completion"] for row in apart]


def test_the_fields_right_are_those_that_the_lesson_counts():
    labels = [ticket["label"] for ticket in load_tickets("test")[:4]]
    answers = [
        ticket_answer(labels[0]),
        ticket_answer(labels[1] | {"urgency": "never"}),
        "no JSON",
        ticket_answer({k: v for k, v in labels[3].items() if k != "order"}),
    ]
    right = [recipe.fields_right(answer, label) for answer, label in zip(answers, labels)]
    score = score_json(answers, labels)
    assert [all(one) for one in right] == [i not in score.wrong for i in range(4)]
    for place, field in enumerate(recipe.TICKET_FIELDS):
        assert sum(one[place] for one in right) / 4 == score.per_field[field]


def test_a_run_whose_process_dies_is_an_error_and_not_a_wait_without_end():
    with pytest.raises(BrokenProcessPool):
        recipe.alone(os._exit, 1)
