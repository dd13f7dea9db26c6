"""Loading a state: what does not belong is refused, by name, and nothing has changed."""

import copy
import pickle

import pytest
import torch
from torch.nn import Parameter

from labkit.optim.adamw import AdamW, AdamW8bit
from labkit.optim.paging import PagedAdamW, attach_paging
from labkit.optim.saved_state import check_state, check_state_dict
from tests.optim.conftest import OPTIMIZERS, assert_same, make, run

SHAPES = ((64, 128), (3,))


def parameters():
    return [Parameter(torch.ones(shape)) for shape in SHAPES]


def stepped(make_one):
    """An optimizer after two steps."""
    mine = parameters()
    optimizer = make_one(mine)
    for _ in range(2):
        for p in mine:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer


def paged(optimizer, folder):
    attach_paging(optimizer, 10**6, folder)
    return optimizer


KINDS = {
    "AdamW": AdamW,
    "AdamW8bit": AdamW8bit,
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
    "AMSGrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "Adam, not decoupled": torch.optim.Adam,
    "RMSprop": torch.optim.RMSprop,
}


def of_bitsandbytes(p):
    import bitsandbytes as bnb

    return bnb.optim.AdamW8bit(p)


def snapshot(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def assert_unchanged(optimizer, before):
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"] and after["state"].keys() == before["state"].keys()
    for number, state in before["state"].items():
        assert list(state) == list(after["state"][number])
        assert all(torch.equal(value, after["state"][number][key]) for key, value in state.items())


@pytest.mark.parametrize("into", ["AdamW", "AdamW8bit"])
@pytest.mark.parametrize("of", [*KINDS, "bitsandbytes"])
@pytest.mark.parametrize("is_paged", [False, True])
def test_a_state_of_another_kind_of_optimizer_is_refused_and_nothing_changed(into, of, is_paged, store):
    if into == of:
        return
    saved = stepped(of_bitsandbytes if of == "bitsandbytes" else KINDS[of]).state_dict()
    optimizer = stepped(KINDS[into])
    if is_paged:
        paged(optimizer, store)
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError, match=f"not a state of {into} with these parameters: .* Nothing was changed"
    ):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("into", ["SGD", "Adagrad", "AMSGrad", "RMSprop"])
@pytest.mark.parametrize("of", ["AdamW", "AdamW8bit", "SGD", "Adagrad"])
def test_paged_optimizers_of_pytorch_refuse_it_too(into, of, store):
    if into == of:
        return
    optimizer = paged(stepped(KINDS[into]), store)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="Nothing was changed"):
        optimizer.load_state_dict(stepped(KINDS[of]).state_dict())
    assert_unchanged(optimizer, before)


def damaged(saved, how):
    saved = copy.deepcopy(saved)
    state, group = saved["state"][0], saved["param_groups"][0]
    match how:
        case "missing":
            del state["exp_avg_sq"]
        case "one row":
            state["exp_avg"] = state["exp_avg"][:1]
        case "transposed":
            state["exp_avg"] = state["exp_avg"].t()
        case "integers":
            state["exp_avg"] = state["exp_avg"].int()
        case "negative":
            state["exp_avg_sq"] = -state["exp_avg_sq"]
        case "no count":
            state["step"] = torch.tensor(1.5)
        case "NaN count":
            state["step"] = torch.tensor(torch.nan)
        case "fewer":
            group["params"] = group["params"][:1]
        case "stranger":
            saved["state"][7] = state
        case "lr":
            group["lr"] = "1e-3"
        case "betas":
            group["betas"] = (0.9, 1.0)
        case "maximize":
            group["maximize"] = True
        case "empty":
            saved = {}
        case "none":
            saved = None
    return saved


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "parameter 0 of shape .* lacks exp_avg_sq"),
        ("one row", r"exp_avg of shape \(1, 128\), not \(64, 128\)"),
        ("transposed", r"exp_avg of shape \(128, 64\)"),
        ("integers", "exp_avg in torch.int32, not torch.float32"),
        ("negative", "negative numbers in exp_avg_sq"),
        ("no count", "step=1.5, which is no number of steps"),
        ("NaN count", "step=nan"),
        ("fewer", r"groups have \[1\] parameters, and those here \[2\]"),
        ("stranger", r"a state for \[7\], which are in none of its groups"),
        ("lr", "lr='1e-3' must be a number"),
        ("betas", "up to, not including, 1"),
        ("maximize", "maximize=True"),
        ("empty", "no 'state' and 'param_groups'"),
        ("none", "no 'state' and 'param_groups'"),
    ],
)
def test_a_damaged_state_is_refused_by_name(how, message):
    optimizer = stepped(AdamW)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(damaged(before, how))
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_scales_of_8_bit_moments_that_cannot_be_are_refused(value):
    optimizer = stepped(AdamW8bit)
    before = snapshot(optimizer)
    saved = copy.deepcopy(before)
    saved["state"][0]["exp_avg_absmax"][3] = value
    with pytest.raises(ValueError, match="scales in exp_avg_absmax that are negative, infinite or NaN"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_its_own_state_is_never_refused(kind, store):
    one, other = make(kind), make(kind)
    run(*one, 3)
    check_state_dict(other[1], one[1].state_dict())
    paged(other[1], store)
    other[1].load_state_dict(one[1].state_dict())
    saved, mine = one[1].state_dict()["state"], other[1].state_dict()["state"]
    assert saved.keys() == mine.keys()


def test_small_tensors_in_8_bits_and_step_counts_as_numbers_load():
    saved = stepped(lambda p: AdamW8bit(p, min_8bit_size=0)).state_dict()
    assert saved["state"][1]["exp_avg"].dtype == torch.uint8
    optimizer = AdamW8bit(parameters())
    optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, saved)
    plain = stepped(AdamW).state_dict()
    for state in plain["state"].values():
        state["step"] = int(state["step"])  # as PyTorch 1.11 and before saved it
    AdamW(parameters()).load_state_dict(plain)


def test_states_of_single_parameters_can_be_checked():
    """What a checkpoint asks before it changes anything."""
    optimizer = torch.optim.AdamW(parameters(), fused=True)
    group, saved = optimizer.param_groups[0], stepped(torch.optim.AdamW).state_dict()["state"]
    check_state(optimizer, group["params"][0], saved[0], group, "a.weight")
    with pytest.raises(
        ValueError, match=r"parameter a.weight of shape \(64, 128\) has exp_avg of shape \(3,\)"
    ):
        check_state(optimizer, group["params"][0], saved[1], group, "a.weight")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_of_an_8_bit_optimizer_makes_new_states_like_the_original(copied):
    optimizer = copied(AdamW8bit(parameters(), min_8bit_size=2))
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(state["exp_avg"].dtype == torch.uint8 for state in optimizer.state.values())


@pytest.mark.parametrize("kind", [AdamW, AdamW8bit])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": "1e-3"}, "lr='1e-3' must be a number"),
        ({"eps": float("inf")}, "eps=inf must be a number"),
        ({"weight_decay": True}, "weight_decay=True"),
        ({"betas": None}, "betas=None must be two numbers"),
        ({"betas": (0.9,)}, "two numbers"),
        ({"betas": ("0.9", 0.99)}, "two numbers"),
        ({"betas": (0.9, float("nan"))}, "two numbers"),
    ],
)
def test_settings_of_a_group_are_checked_as_those_of_all(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(parameters(), **settings)
    with pytest.raises(ValueError, match=message):
        kind([{"params": parameters(), **settings}])
    optimizer = kind(parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))], **settings})
    assert len(optimizer.param_groups) == 1


def test_a_paged_optimizer_keeps_its_pager_when_a_state_is_refused(store):
    mine = parameters()
    optimizer = PagedAdamW(mine, budget_bytes=10**6, store=store)
    twin = AdamW(parameters())
    with pytest.raises(ValueError, match="Nothing was changed"):
        optimizer.load_state_dict(stepped(AdamW8bit).state_dict())
    for each in ((mine, optimizer), (twin.param_groups[0]["params"], twin)):
        run(*each, 4)
    assert_same((mine, optimizer), (twin.param_groups[0]["params"], twin))
    assert optimizer.pager.table.counts["create"] == 2
