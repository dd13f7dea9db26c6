"""Where PEFT's `add_weighted_adapter` and labkit differ: which is right, by the closed form, and why.

These hold for the PEFT that the tests are pinned to. When one fails because PEFT was mended, labkit and PEFT
agree, and the case moves to `test_combining.py`.
"""

import math

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from peft.utils import merge_utils
from torch import nn

from labkit.lora.adapters import use_adapter
from labkit.lora.combining import combine
from labkit.lora.inject import lora_layers
from labkit.lora.task_arithmetic import add_updates, drop
from tests.lora.test_adapters import two_adapters
from tests.lora.test_combining import PATH, assert_close, deltas_of, of_both, peft_with


def theirs_of(peft_model, name):
    return dict(peft_model.get_base_model().named_modules())[PATH].get_delta_weight(name).detach().double()


def test_rslora_comes_out_of_pefts_cat_too_large_by_the_root_of_the_new_rank():
    """The new adapter has alpha = r and keeps use_rslora, so its scaling is r / sqrt(r) instead of 1."""
    model = two_adapters(r=4, variant="rslora")
    parts = of_both(model)[PATH]
    theirs = peft_with(model)
    theirs.add_weighted_adapter(["clerk", "poet"], [1.0, 1.0], "both", combination_type="cat")
    combine(model, {"poet": 1, "clerk": 1}, "both")
    wanted = parts["poet"][0] + parts["clerk"][0]
    assert_close(deltas_of(model)[PATH], wanted)
    assert (theirs_of(theirs, "both").norm() / wanted.norm()).item() == pytest.approx(math.sqrt(8), rel=1e-5)


def test_a_taken_name_returns_silently_from_peft_with_the_old_adapter():
    model = two_adapters(r=4)
    theirs = peft_with(model)
    before = theirs_of(theirs, "poet")
    theirs.add_weighted_adapter(["poet", "clerk"], [0.5, 0.5], "poet", combination_type="cat")
    assert torch.equal(theirs_of(theirs, "poet"), before), "the caller believes that this is the combination"
    with pytest.raises(ValueError, match="named 'poet' already"):
        combine(model, {"poet": 0.5, "clerk": 0.5}, "poet")


def test_pissa_as_pefts_first_source_changes_the_base_weight():
    """The new adapter takes its config from the first, and with it the start that splits the base once more."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 64))
    before = net[0].weight.detach().clone()
    pissa = PeftConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights="pissa")
    theirs = get_peft_model(net, pissa, adapter_name="poet")
    theirs.add_adapter("clerk", PeftConfig(r=4, lora_alpha=4, target_modules=["0"]))
    layer = theirs.get_base_model()[0]
    split_once = layer.base_layer.weight.detach().clone()
    theirs.add_weighted_adapter(["poet", "clerk"], [1.0, 1.0], "both", combination_type="cat")
    moved = (layer.base_layer.weight - split_once).norm() / before.norm()
    assert moved > 0.05, "every other adapter now stands on another base"


@pytest.mark.filterwarnings("ignore:The density 1.0")
@pytest.mark.parametrize(("how", "settings"), [("linear", {}), ("ties", {"density": 1.0})])
def test_on_factors_both_libraries_add_cross_terms_and_only_the_corrections_themselves_have_none(
    how, settings
):
    model = two_adapters(r=4)
    parts = of_both(model)[PATH]
    theirs = peft_with(model)
    wanted = 0.75 * parts["poet"][0] + parts["clerk"][0]
    theirs.add_weighted_adapter(["poet", "clerk"], [0.75, 1.0], "both", combination_type=how, **settings)
    combine(model, {"poet": 0.75, "clerk": 1}, "both", how, **settings)
    mine = deltas_of(model)[PATH]
    torch.testing.assert_close(mine, theirs_of(theirs, "both"), rtol=1e-4, atol=1e-5)
    assert (mine - wanted).norm() > 0.5 * wanted.norm()
    combine(model, {"poet": 0.75, "clerk": 1}, "exact", "cat")
    assert_close(deltas_of(model)[PATH], wanted)


def test_an_adapter_of_weight_zero_has_a_say_in_pefts_ties_and_none_here():
    """PEFT elects the sign, and counts who agrees, before the weights are applied."""
    one, other = torch.tensor([1.0, 1.0]), torch.tensor([-3.0, 2.0])
    with pytest.warns(UserWarning, match="no pruning"):
        theirs = merge_utils.ties([one, other], torch.tensor([1.0, 0.0]), density=1.0)
    assert theirs.tolist() == [0.0, 0.5], "outvoted, and halved, by what does not count"
    assert add_updates([one, other], [1.0, 0.0], "ties").tolist() == one.tolist()


def test_a_negative_weight_votes_for_the_other_sign_here_and_for_its_own_in_peft():
    one, other = torch.tensor([1.0]), torch.tensor([0.5])
    stack = torch.stack([one, other])
    mask = merge_utils.calculate_majority_sign_mask(stack)
    weighted = stack * torch.tensor([[1.0], [-1.0]])
    assert merge_utils.disjoint_merge(weighted, mask).item() == 0.25, (
        "a mean of two that pull apart, which TIES is to avoid"
    )
    assert add_updates([one, other], [1.0, -1.0], "ties").item() == 1.0


def test_with_the_same_entries_drawn_dare_is_pefts(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(16, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    drawn = torch.Generator().manual_seed(5)
    bernoulli = torch.bernoulli
    for method, theirs in (("dare_linear", merge_utils.dare_linear), ("dare_ties", merge_utils.dare_ties)):
        mine = add_updates(tensors, [1.0, 1.0], method, 0.6, torch.Generator().manual_seed(5))
        drawn.manual_seed(5)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "bernoulli", lambda p, **_: bernoulli(p.double(), generator=drawn).to(p))
            torch.testing.assert_close(mine, theirs(tensors, torch.ones(2, dtype=torch.float64), 0.6))


def test_dropping_keeps_the_mean_and_about_the_density():
    ones = torch.ones(200, 200)
    dropped = drop(ones, 0.3, torch.Generator().manual_seed(0))
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    assert (dropped != 0).double().mean().item() == pytest.approx(0.3, abs=0.01)


def test_the_mounted_adapter_is_the_new_one_and_the_sources_stay_as_they_were():
    model = two_adapters(r=4)
    before = of_both(model)[PATH]
    combine(model, {"poet": 1, "clerk": 1}, "both", "ties_svd", density=0.5)
    for name in ("poet", "clerk"):
        layer = lora_layers(use_adapter(model, name))[PATH]
        assert torch.equal(layer.lora_A.double(), before[name][2])
        assert torch.equal(layer.lora_B.double(), before[name][3])
