"""The optimizer of a run: what trains, at which rate (LoRA+: that of PEFT), under which budget."""

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.optim.adamw import AdamW8bit
from labkit.optim.paging import detach_paging
from labkit.training.config import TrainConfig
from labkit.training.loop import train
from labkit.training.optimizer import OPTIMIZERS, make_optimizer, parameter_groups
from tests.conftest import make_small_llama
from tests.lora.cases import make_model, peft_model


def test_lora_plus_gives_the_rates_of_peft():
    ours, theirs = add_lora(make_model(), LoRAConfig(r=4)), peft_model(make_model())
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {n.split("lora_")[1][0]: rates[id(p)] for n, p in theirs.named_parameters() if id(p) in rates}
    groups = parameter_groups(ours, 1e-3, 16)
    names = {id(p): n for n, p in ours.named_parameters()}
    got = {names[id(p)][-1]: group["lr"] for group in groups for p in group["params"]}
    assert got == expected == {"A": 1e-3, "B": 16e-3}
    assert sum(len(group["params"]) for group in groups) == 2 * 14
    assert not any("weight_decay" in group for group in groups)


def test_a_training_step_moves_b_at_its_own_rate(tokenizer, records):
    for ratio in (1, 16):
        model = add_lora(make_small_llama(num_hidden_layers=1), LoRAConfig(r=4))
        config = TrainConfig(
            lr=1e-4, lora_plus=ratio, steps=1, batch_size=1, schedule="constant", warmup=0, progress=False
        )
        history = train(model, tokenizer, records[:1], config)
        B = torch.cat([layer.lora_B.abs().flatten() for layer in lora_layers(model).values()])
        assert B.max().item() == pytest.approx(ratio * 1e-4, rel=1e-3)  # Adam's first step is the rate
        assert history.steps[0]["lr"] == 1e-4


def test_lora_plus_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="this model has none"):
        parameter_groups(make_model(), 1e-3, 16)
    with pytest.raises(ValueError, match="positive"):
        parameter_groups(add_lora(make_model(), LoRAConfig(r=4)), 1e-3, 0)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("budget", [None, 65_536])
def test_an_optimizer_has_the_settings_that_it_was_given_and_is_paged_under_a_budget(name, budget):
    model = nn.Linear(64, 64)
    adam = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = make_optimizer(name, list(model.parameters()), budget, **adam)
    assert isinstance(optimizer, AdamW8bit if name == "adamw8bit" else torch.optim.AdamW)
    assert adam.items() <= optimizer.param_groups[0].items()
    assert hasattr(optimizer, "pager") == (budget is not None)
    if budget is not None:
        detach_paging(optimizer)


@pytest.mark.parametrize("ratio", [1, 16])
def test_all_that_trains_is_in_the_groups_once(ratio):
    model = add_lora(make_model(), LoRAConfig(r=4))
    groups = parameter_groups(model, 1e-3, ratio)
    expected = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(expected)
    assert all(group["lr"] == 1e-3 * group["lr_ratio"] for group in groups)


@pytest.mark.parametrize("ratio", [-1, float("nan"), "16", True])
def test_a_ratio_that_is_not_a_positive_number_is_refused(ratio):
    with pytest.raises(ValueError, match=f"lora_plus={ratio!r} must be a positive number; the paper's is 16"):
        parameter_groups(make_model(), 1e-3, ratio)
