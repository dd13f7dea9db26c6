"""Combined adapters are their closed forms in float64, and PEFT's where PEFT computes those."""

import math

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model

from labkit.lora.adapters import active_adapter, adapter_configs, add_adapter, use_adapter
from labkit.lora.combining import COMBINATIONS, combine
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.merging import merge
from labkit.lora.qlora import add_qlora
from tests.lora.cases import logits, make_model, randomize
from tests.lora.test_adapters import two_adapters

PATH = "model.layers.0.self_attn.q_proj"
ALONE = "model.layers.0.mlp.up_proj"  # "clerk" has no layer there


def peft_with(model):
    """PEFT with the adapters of `model`."""
    theirs = None
    for name, config in adapter_configs(model).items():
        use_adapter(model, name)
        wanted = PeftConfig(
            r=config.r,
            lora_alpha=config.alpha,
            use_rslora=config.is_rslora,
            target_modules=[n.rpartition(".")[2] for n in lora_layers(model)],
        )
        if theirs is None:
            theirs = get_peft_model(make_model(), wanted, adapter_name=name)
        else:
            theirs.add_adapter(name, wanted)
        modules = dict(theirs.get_base_model().named_modules())
        for path, layer in lora_layers(model).items():
            modules[path].lora_A[name].weight.data.copy_(layer.lora_A.data)
            modules[path].lora_B[name].weight.data.copy_(layer.lora_B.data)
    return theirs.eval()


def of_both(model):
    """{path: {name: (delta, scaling, A, B)}} in float64."""
    found = {}
    for name in adapter_configs(model):
        for path, layer in lora_layers(use_adapter(model, name)).items():
            A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
            found.setdefault(path, {})[name] = (layer.scaling * B @ A, layer.scaling, A, B)
    return found


def best_of_rank(matrix, r):
    U, S, Vh = torch.linalg.svd(matrix)
    return U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]


def deltas_of(model):
    return {path: layer.delta().detach().double() for path, layer in lora_layers(model).items()}


def assert_close(found, wanted):
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize(
    "how", ["cat", "linear", "svd", "ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"]
)
def test_combinations_of_one_rank_equal_pefts(how):
    model = two_adapters(r=4)
    theirs = peft_with(model)
    settings = {} if how in ("cat", "linear", "svd") else {"density": 0.5}
    # PEFT's TIES elects before it weighs: the two agree where the weights are equal, scalings (2 and 1.5) counted
    weights = {"ties": [0.6, 0.8], "ties_svd": [0.7, 0.7]}.get(how, [0.7, -0.4])
    combine(model, dict(zip(("poet", "clerk"), weights)), "both", how, **settings)
    theirs.add_weighted_adapter(["poet", "clerk"], weights, "both", combination_type=how, **settings)
    theirs.set_adapter("both")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variants", [("lora", "lora"), ("rslora", "lora"), ("rslora", "rslora")])
@pytest.mark.parametrize("how", ["cat", "svd"])
def test_sums_of_other_ranks_and_scalings_are_those_of_the_corrections(how, variants):
    model = randomize(add_lora(make_model(), LoRAConfig(r=4, alpha=8, variant=variants[0]), "poet"))
    second = LoRAConfig(r=3, alpha=5, targets="attention", variant=variants[1])
    randomize(add_adapter(model, "clerk", second), seed=2)
    parts = of_both(model)
    combine(model, {"poet": 0.7, "clerk": -0.4}, "both", how)
    for path, found in deltas_of(model).items():
        weights = {"poet": 0.7, "clerk": -0.4}
        wanted = sum(weights[n] * delta for n, (delta, *_) in parts[path].items())
        assert_close(found, wanted if how == "cat" else best_of_rank(wanted, 4))
    ranks = {path: layer.r for path, layer in lora_layers(model).items()}
    assert (ranks[PATH], ranks[ALONE]) == ((7, 4) if how == "cat" else (4, 4))


def pruned(tensor, density):
    kept = tensor.abs().flatten().sort(descending=True).values[round(density * tensor.numel()) - 1]
    return torch.where(tensor.abs() >= kept, tensor, 0)


def elected_mean(tensors):
    stack = torch.stack(tensors)
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0).double()
    agree = stack * sign > 0
    return torch.where(agree, stack, 0).sum(0) / agree.sum(0).clamp(min=1)


@pytest.mark.parametrize("how", ["linear", "magnitude_prune", "ties", "magnitude_prune_svd", "ties_svd"])
def test_each_method_is_its_closed_form_in_float64(how):
    ranks = {} if how.endswith("svd") else {"r": 4}
    model = two_adapters(**ranks, variant="rslora")
    parts, weights = of_both(model), {"poet": 0.9, "clerk": -0.4}
    density = {} if how == "linear" else {"density": 0.5}
    combine(model, weights, "both", how, **density)
    found = deltas_of(model)

    def together(tensors, scales):
        tensors = [t if how == "linear" else pruned(t, 0.5) for t in tensors]
        scaled = [scale * t for scale, t in zip(scales, tensors)]
        return elected_mean(scaled) if "ties" in how else sum(scaled)

    for path in (PATH, ALONE):
        names = list(parts[path])
        w = [weights[n] for n in names]
        if how.endswith("svd"):
            wanted = best_of_rank(together([parts[path][n][0] for n in names], w), 4)
        else:
            root = [math.sqrt(abs(x) * parts[path][n][1]) for x, n in zip(w, names)]
            A = together([parts[path][n][2] for n in names], [math.copysign(r, x) for r, x in zip(root, w)])
            wanted = together([parts[path][n][3] for n in names], root) @ A
        assert_close(found[path], wanted)


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties_svd"])
def test_dare_is_the_same_for_one_seed_and_another_for_another(how):
    def drawn(seed):
        model = two_adapters(r=4)
        combine(model, {"poet": 1, "clerk": 1}, "both", how, density=0.5, seed=seed)
        return logits(model)

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))


def test_concatenation_is_exact_and_addition_is_not():
    model = two_adapters(r=4)
    parts = of_both(model)[PATH]
    wanted = 0.7 * parts["poet"][0] + 0.3 * parts["clerk"][0]
    combine(model, {"poet": 0.7, "clerk": 0.3}, "exact")
    assert_close(deltas_of(model)[PATH], wanted)
    assert lora_layers(model)[PATH].r == 8 and lora_layers(model)[ALONE].r == 4
    combine(model, {"poet": 0.7, "clerk": 0.3}, "sum", "linear")
    assert lora_layers(model)[PATH].r == 4
    assert (deltas_of(model)[PATH] - wanted).norm() > 0.1 * wanted.norm()


@pytest.mark.parametrize(
    ("settings", "rank"), [({"r": 2}, 2), ({"energy": 1.0}, 6), ({"r": 5, "energy": 1.0}, 5)]
)
def test_svd_keeps_the_rank_or_the_energy_that_is_asked_for(settings, rank):
    model = combine(two_adapters(), {"poet": 1, "clerk": 1}, "both", "svd", **settings)
    assert lora_layers(model)[PATH].r == rank and lora_layers(model)[ALONE].r == min(rank, 4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base_is_added_as_the_correction_that_it_is(init):
    model = randomize(add_lora(make_model(), LoRAConfig(r=4, alpha=8), "poet"))
    second = LoRAConfig(r=2, alpha=6, init=init)
    randomize(add_adapter(model, "clerk", second), seed=2)
    base = make_model().get_submodule(PATH).weight.double()
    layer = lora_layers(model)[PATH]
    change = layer.base.weight.double() + layer.delta().double() - base
    wanted = deltas_of(use_adapter(model, "poet"))[PATH] + 0.5 * change
    combine(model, {"poet": 1, "clerk": 0.5}, "both")
    torch.testing.assert_close(deltas_of(model)[PATH], wanted.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(lora_layers(model)[PATH].base.weight, make_model().get_submodule(PATH).weight)


def test_the_changes_of_dora_are_combined_by_svd():
    model = two_adapters(variant="dora")
    change = lora_layers(model)[PATH].delta().double().detach()
    wanted = 0.5 * change + deltas_of(use_adapter(model, "poet"))[PATH]
    combine(model, {"poet": 1, "clerk": 0.5}, "both", "svd", r=64)
    torch.testing.assert_close(deltas_of(model)[PATH], wanted, rtol=1e-4, atol=1e-5)
    combine(model, {"poet": 1, "clerk": 0.5}, "low", "svd", r=3)
    torch.testing.assert_close(deltas_of(model)[PATH], best_of_rank(wanted, 3), rtol=1e-4, atol=1e-5)


REFUSED = [
    ({}, {}, "weights is empty"),
    ({"poet": 1, "clerk": -1}, {}, "sum to zero"),
    ({"poet": 0}, {}, "sum to zero"),
    ({"poet": float("nan")}, {}, "finite number"),
    ({"poet": float("inf")}, {}, "finite number"),
    ({"poet": True}, {}, "finite number"),
    ({"poet": 1}, {"how": "ties"}, "give density"),
    ({"poet": 1}, {"how": "cat", "density": 0.5}, "leave out density"),
    ({"poet": 1}, {"how": "ties", "density": 0}, "above 0 and at most 1"),
    ({"poet": 1}, {"how": "dare_linear", "density": 1.5}, "above 0 and at most 1"),
    ({"poet": 1}, {"how": "ties", "density": float("nan")}, "above 0 and at most 1"),
    ({"poet": 1}, {"how": "cat", "r": 4}, "leave out r"),
    ({"poet": 1}, {"how": "svd", "r": 0}, "r=0 must be"),
    ({"poet": 1}, {"how": "svd", "energy": 1.2}, "energy=1.2 must be"),
    ({"poet": 1}, {"how": "dare_ties", "density": 0.5, "seed": -1}, "seed=-1 must be"),
    ({"poet": 1}, {"how": "ties", "density": 0.5, "election": "none"}, "election='none' is not known"),
    ({"poet": 1, "clerk": 1}, {"how": "ties", "density": 0.5}, "how='ties_svd'"),
    ({"poet": 1, "clerk": 1}, {"how": "linear"}, "use how='cat', or how='svd'"),
]


def test_what_has_no_meaning_is_refused_and_nothing_changes():
    model = two_adapters()
    before = logits(model)
    for weights, settings, message in REFUSED:
        with pytest.raises(ValueError, match=message):
            combine(model, weights, "both", **settings)
        assert list(adapter_configs(model)) == ["poet", "clerk"] and active_adapter(model) == "clerk"
    with pytest.raises(ValueError, match="'poet' already"):
        combine(model, {"poet": 1, "clerk": 1}, "poet")
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="unmerge it first"):
        combine(merge(model), {"poet": 1}, "both")


@pytest.mark.parametrize("how", [how for how in COMBINATIONS if not how.endswith("svd")])
def test_dora_is_refused_where_only_factors_add_up_and_the_way_out_is_named(how):
    density = {} if how in ("cat", "linear") else {"density": 0.5}
    with pytest.raises(ValueError, match="full rank. how='svd'"):
        combine(two_adapters(r=4, variant="dora"), {"poet": 1, "clerk": 1}, "both", how, **density)


def test_an_adapter_that_is_not_finite_is_refused_and_no_other_is_made():
    model = two_adapters(r=4)
    lora_layers(model)[PATH].lora_B.data[0, 0] = float("inf")  # of the mounted one, "clerk"
    with pytest.raises(ValueError, match=f"lora_B of {PATH} holds NaN or infinity"):
        combine(model, {"poet": 1, "clerk": 1}, "both")
    assert list(adapter_configs(model)) == ["poet", "clerk"]


def test_modules_in_full_and_bases_that_were_not_kept_are_refused():
    with pytest.raises(ValueError, match="trains lm_head in full"):
        combine(two_adapters(modules_to_save=["lm_head"]), {"poet": 1, "clerk": 1}, "both")
    model = add_qlora(make_model(), LoRAConfig(r=4, init="pissa"))
    with pytest.raises(ValueError, match="onto the full-precision base"):
        combine(model, {"default": 1}, "both")
