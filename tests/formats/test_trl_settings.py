"""Our settings in the words of TRL, PEFT and bitsandbytes; that such a run takes our steps is tested in tests/parity."""

import dataclasses

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainingArguments

import labkit
from labkit.formats.trl_settings import OPTIONS, bitsandbytes_settings, peft_settings, sft_settings


def fields(kind):
    return {field.name for field in dataclasses.fields(kind)}


def test_every_option_names_settings_that_there_are_each_once():
    ours = {
        "TrainConfig": labkit.TrainConfig,
        "LoRAConfig": labkit.LoRAConfig,
        "QuantConfig": labkit.QuantConfig,
    }
    assert (
        len({option.ours for option in OPTIONS}) == len({option.theirs for option in OPTIONS}) == len(OPTIONS)
    )
    for option in OPTIONS:
        kind, _, name = option.ours.partition(".")
        assert name in fields(ours[kind]), option
        kind, _, name = option.theirs.partition(".")
        if kind == "SFTConfig":  # what TRL adds to transformers' is two names of these
            assert name in fields(TrainingArguments) | {"max_length", "packing"}, option
        elif kind == "LoraConfig":
            assert name in fields(LoraConfig), option
        else:
            assert hasattr(BitsAndBytesConfig(), name), option


def test_settings_say_what_the_config_says():
    config = labkit.TrainConfig(
        lr=2e-3,
        steps=7,
        clip=None,
        optimizer="adamw8bit",
        betas=(0.8, 0.9),
        batching="packed",
        patience=2,
        eval_every=5,
    )
    made = sft_settings(config)
    assert (made["learning_rate"], made["max_steps"], made["max_grad_norm"]) == (2e-3, 7, 0.0)
    assert (made["optim"], made["adam_beta1"], made["adam_beta2"]) == ("adamw_8bit", 0.8, 0.9)
    assert (made["packing"], made["bf16"], made["load_best_model_at_end"]) == (True, False, True)
    assert made["save_steps"] == made["eval_steps"] == 5
    assert sft_settings(labkit.TrainConfig(epochs=2))["max_steps"] == -1
    assert (
        sft_settings(labkit.TrainConfig(schedule="constant"))["lr_scheduler_type"] == "constant_with_warmup"
    )
    assert sft_settings(labkit.TrainConfig(checkpoint_folder="a"))["save_strategy"] == "steps"


def test_an_adapter_that_is_made_from_the_settings_is_ours(tiny):
    config = labkit.LoRAConfig(r=8, alpha=4, targets=["q_proj"], variant="rslora", rank_pattern={"v_proj": 2})
    theirs = LoraConfig(**peft_settings(config))
    assert (theirs.r, theirs.lora_alpha, theirs.use_rslora) == (8, 4, True)
    assert theirs.target_modules == {"q_proj"} and theirs.rank_pattern == {"v_proj": 2}
    assert LoraConfig(**peft_settings(labkit.LoRAConfig())).target_modules == "all-linear"
    assert LoraConfig(**peft_settings(labkit.LoRAConfig(init="pissa"))).init_lora_weights == "pissa"


def test_a_quantization_made_from_the_settings_is_ours():
    theirs = BitsAndBytesConfig(**bitsandbytes_settings(labkit.QuantConfig(compute_dtype=torch.bfloat16)))
    assert (theirs.bnb_4bit_quant_type, theirs.bnb_4bit_use_double_quant) == ("nf4", True)
    assert theirs.load_in_4bit and theirs.bnb_4bit_compute_dtype == torch.bfloat16
    assert "bnb_4bit_compute_dtype" not in bitsandbytes_settings(labkit.QuantConfig())


@pytest.mark.parametrize(
    ("translate", "config", "message"),
    [
        (sft_settings, labkit.TrainConfig(lora_plus=16), "lora_plus=16.* allowed: 1"),
        (sft_settings, labkit.TrainConfig(state_budget_bytes=1000), "state_budget_bytes=1000.* optim="),
        (sft_settings, labkit.TrainConfig(batching="packed, unmasked"), "batching='packed, unmasked'"),
        (peft_settings, labkit.LoRAConfig(init="b_random"), "init='b_random' is ours alone"),
        (peft_settings, labkit.LoRAConfig(targets="attention"), "targets='attention' is ours alone"),
        (bitsandbytes_settings, labkit.QuantConfig(blocksize=128), "blocksize=128"),
        (bitsandbytes_settings, labkit.QuantConfig(codebook="int4"), "codebook='int4'"),
    ],
)  # fmt: skip
def test_what_they_have_no_word_for_is_refused(translate, config, message):
    with pytest.raises(ValueError, match=message):
        translate(config)
