"""What is kept aside (a weight before a merge, the base of PiSSA, adapters put away) goes where the model goes.

Whatever the order of merging, casting, copying and putting away, the outputs are those of the model that was cast,
and adapted or not.
"""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from labkit.lora.adapters import add_adapter, base_only, use_adapter
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.merging import merge, unload, unmerge
from labkit.lora.mounting import adapters_of
from labkit.quant.model import quantize_model
from tests.lora.cases import IDS, logits, make_gpt2, make_model, randomize

STARTS = [
    ("lora", "default"),
    ("dora", "default"),
    ("rslora", "gaussian"),
    ("lora", "pissa"),
    ("lora", "olora"),
]
CASTS = {
    "bf16": lambda m: m.bfloat16(),
    "fp64": lambda m: m.double(),
    "there and back": lambda m: m.half().float(),
}


def adapted(variant, init, make=make_model):
    return randomize(
        add_lora(make(), LoRAConfig(r=4, variant=variant, init=init, modules_to_save=["down_proj"]))
    )


def assert_same(ours, expected, cast="bf16"):
    """Equal; what was put away is not rounded by a cast there and back, which it never sees."""
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if cast == "there and back" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(ours, expected, **tolerance)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize(("variant", "init"), STARTS)
def test_a_cast_while_merged_and_then_unmerged_is_the_cast_of_the_unmerged_model(variant, init, cast):
    model, expected = adapted(variant, init), CASTS[cast](adapted(variant, init))
    unmerge(CASTS[cast](merge(model)))
    assert_same(logits(model), logits(expected))
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in expected.parameters()}
    with base_only(model):
        assert_same(logits(model), logits(CASTS[cast](make_model())), cast)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize(("variant", "init"), STARTS)
def test_a_cast_reaches_the_base_of_a_mounted_adapter_and_the_adapters_that_are_not(variant, init, cast):
    model, bare = adapted(variant, init), logits(CASTS[cast](make_model()))
    expected = logits(CASTS[cast](adapted(variant, init)))
    CASTS[cast](model)
    with base_only(model):
        assert_same(logits(model), bare, cast)
    assert_same(logits(model), expected)
    model = CASTS[cast](use_adapter(adapted(variant, init), None))
    assert_same(logits(model), bare)
    assert_same(logits(use_adapter(model, "default")), expected, cast)
    randomize(add_adapter(model, "second", LoRAConfig(r=2)), seed=2)
    use_adapter(model.double(), "default")
    assert_same(logits(model), logits(CASTS[cast](adapted(variant, init)).double()), cast)


def test_a_module_that_was_cast_by_itself_keeps_its_dtype_while_it_is_put_away():
    model = add_lora(make_model().bfloat16(), LoRAConfig(r=4, modules_to_save=["lm_head"]))
    model.lm_head.float()  # a head in fp32 over a base in bf16, as some train it
    with base_only(model):
        assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_while_merged_unmerges_by_itself(make_copy, quantized):
    model = make_model()
    if quantized:
        quantize_model(model, progress=False)
    randomize(add_lora(model, LoRAConfig(r=4)))
    before = logits(model)
    other = make_copy(merge(model, requantize=quantized))
    unmerge(model)
    assert torch.equal(logits(unmerge(other)), before) and torch.equal(logits(model), before)


def test_what_is_kept_is_in_no_count_and_no_state_and_follows_to_meta():
    model = randomize(add_lora(make_model(), LoRAConfig(r=4)))
    names, bytes_before = list(model.state_dict()), sum(p.nbytes for p in model.parameters())
    merge(model)
    assert list(model.state_dict()) == names and sum(p.nbytes for p in model.parameters()) == bytes_before
    model.to("meta")
    assert all(layer.base_before_merge.is_meta for layer in lora_layers(model).values())


@pytest.mark.parametrize("cast", CASTS)
def test_a_requantized_merge_is_undone_after_a_cast(cast):
    def quantized():
        model = make_model()
        quantize_model(model, progress=False)
        return randomize(add_lora(model, LoRAConfig(r=4)))

    model = unmerge(CASTS[cast](merge(quantized(), requantize=True)))
    assert torch.equal(logits(model), logits(CASTS[cast](quantized())))


def test_doras_norms_are_those_of_the_weight_that_is_there_after_casts_and_loads():
    model = adapted("dora", "default")
    logits(model)  # the norms are measured
    other = randomize(
        add_lora(make_model(seed=5), LoRAConfig(r=4, variant="dora", modules_to_save=["down_proj"])), 3
    )
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model), logits(other))
    fresh = adapted("dora", "default").bfloat16().float()
    cast = adapted("dora", "default")
    logits(cast)
    assert torch.equal(logits(cast.bfloat16().float()), logits(fresh))


@pytest.mark.parametrize("make", [make_model, make_gpt2])
def test_any_order_of_merging_putting_away_and_casting_ends_where_it_began(make):
    """In fp64, where casts from fp32 lose nothing: orders of four steps out of these."""

    def toggle_merge(model):
        merged = any(layer.is_merged for layer in lora_layers(model).values())
        return unmerge(model) if merged else merge(model)

    def toggle_mounted(model):
        if any(layer.is_merged for layer in lora_layers(model).values()):
            with pytest.raises(ValueError, match="unmerge it first"):
                use_adapter(model, None)
            return model
        return use_adapter(model, None if adapters_of(model).active else "default")

    steps = {
        "merge": lambda m: toggle_merge(m) if adapters_of(m).active else m,
        "mount": toggle_mounted,
        "fp64": lambda m: m.double(),
        "copy": copy.deepcopy,
        "train": lambda m: m.train(not m.training),
    }
    config = LoRAConfig(r=4, init="pissa", targets="attention")
    start = randomize(add_lora(make(), config)).double()
    with_adapter = logits(start)
    without = logits(make().double())
    for order in list(itertools.permutations(steps, 4))[::5]:
        model = randomize(add_lora(make(), config))
        for step in order:
            model = steps[step](model)
        expected = with_adapter if adapters_of(model).active else without
        torch.testing.assert_close(logits(model.double()), expected, rtol=1e-4, atol=1e-5)


def test_adapters_made_and_merged_in_inference_mode_can_train():
    model = make_model()
    with torch.inference_mode():
        add_lora(model, LoRAConfig(r=4))
        unmerge(merge(model))
        add_adapter(model, "second", LoRAConfig(r=4, init="pissa"))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(layer.lora_A.grad is not None for layer in lora_layers(model).values())
    with torch.inference_mode():
        merge(model)
        plain = unload(model)
    plain.requires_grad_(True)
    plain(input_ids=IDS, labels=IDS).loss.backward()
    assert plain.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


def test_a_step_taken_while_merged_is_kept_and_the_base_is_not_touched_by_it():
    model = randomize(add_lora(make_model(), LoRAConfig(r=4)))
    base = {name: layer.base.weight.clone() for name, layer in lora_layers(model).items()}
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    merge(model)
    optimizer.step()
    unmerge(model)
    assert all(torch.equal(layer.base.weight, base[name]) for name, layer in lora_layers(model).items())
    stepped = logits(model)
    assert not torch.equal(stepped, logits(randomize(add_lora(make_model(), LoRAConfig(r=4)))))
    torch.testing.assert_close(logits(merge(model)), stepped, rtol=1e-4, atol=1e-5)


def test_functional_calls_and_checkpointed_passes_reach_the_adapter():
    model = randomize(add_lora(make_model(), LoRAConfig(r=4)))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters() if "lora_B" in n}
    out = torch.func.functional_call(model, zeros, kwargs={"input_ids": IDS}).logits
    torch.testing.assert_close(out, logits(make_model()))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([model.get_parameter(n).grad.clone() for n in names])
        model.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(*gradients))


def test_autocast_computes_adapters_as_it_does_linear_layers():
    model, plain = randomize(add_lora(make_model(), LoRAConfig(r=4))), make_model()
    with torch.autocast("cpu", torch.bfloat16):
        ours, merged = logits(model), logits(merge(model))
        assert ours.dtype == logits(plain).dtype
    torch.testing.assert_close(ours, merged, rtol=0.1, atol=0.05)


def test_a_layer_of_any_kind_that_is_nested_in_a_list_keeps_its_place():
    model = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))])
    add_lora(model, LoRAConfig(r=2))
    assert list(lora_layers(model)) == ["0.0", "0.1"] and len(model[0]) == 2
