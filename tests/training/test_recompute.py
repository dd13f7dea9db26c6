"""Activations that are made again in the backward pass: the same bits, and their memory free in between."""

import weakref

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM

from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.training import recompute
from labkit.training.recompute import checkpoint_blocks, keep_blocks, recompute_activations
from tests.conftest import make_small_llama
from tests.training.small_runs import tiny_llama, with_random_adapter

IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


def small_gemma():
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16
    )
    return GemmaForCausalLM(GemmaConfig(vocab_size=256, num_key_value_heads=1, **sizes))  # gelu, by tanh


def forward(model):
    """A number that depends on every logit."""
    scores = model(input_ids=IDS, use_cache=False).logits
    return (scores * torch.linspace(-1, 1, scores.numel()).view_as(scores)).sum()


def gradients(model, value):
    model.zero_grad(set_to_none=True)
    value.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_bits_again(model) -> None:
    expected = forward(model)
    without = gradients(model, expected)
    with recompute_activations(model):
        value = forward(model)
    again = gradients(model, value)
    assert torch.equal(value, expected)
    assert without and without.keys() == again.keys()
    assert all(torch.equal(again[name], without[name]) for name in without)


def made_again(monkeypatch) -> list:
    """The shapes of what is made again from here on."""
    shapes = []

    def counted(outer_pack, outer_unpack, make=recompute.hooks_within):
        pack, unpack = make(outer_pack, outer_unpack)
        note = lambda kept: shapes.append(kept.argument.shape) if isinstance(kept, recompute.Recipe) else None  # noqa: E731
        return pack, lambda kept: note(kept) or unpack(kept)

    monkeypatch.setattr(recompute, "hooks_within", counted)
    return shapes


@pytest.mark.parametrize("make", [make_small_llama, small_gemma])
@pytest.mark.parametrize("full", [False, True])
def test_loss_and_gradients_are_the_same_bits(monkeypatch, make, full):
    shapes, model = (
        made_again(monkeypatch),
        make().requires_grad_(True) if full else with_random_adapter(make()),
    )
    assert_same_bits_again(model)
    assert shapes == model.config.num_hidden_layers * [(2, 16, model.config.intermediate_size)]


def test_the_output_is_gone_after_the_forward_pass_and_kept_without():
    model, outputs = with_random_adapter(make_small_llama()), []
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda _, __, y: outputs.append(weakref.ref(y)))
    plain = forward(model)
    assert [y() is None for y in outputs] == len(model.model.layers) * [False]
    outputs.clear()
    with recompute_activations(model):
        value = forward(model)
    assert [y() is None for y in outputs] == len(model.model.layers) * [True]
    del plain, value


def test_hooks_of_the_caller_see_all_that_is_kept():
    """A hook that counts sees everything but the outputs.

    One that moves (`save_on_cpu`) moves all, and the bits are the same.
    """
    model, kept = with_random_adapter(make_small_llama()), []
    expected = gradients(model, forward(model))
    wide = lambda: sum(t.shape == (2, 16, model.config.intermediate_size) for t in kept)  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        forward(model)
        plain = wide()
        kept.clear()
        with recompute_activations(model):
            forward(model)
    assert wide() == plain  # the output's place is taken by the gate, which is there twice now
    assert len({t.data_ptr() for t in kept}) < len(kept)
    with torch.autograd.graph.save_on_cpu(), recompute_activations(model):
        value = forward(model)
    again = gradients(model, value)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_where_no_gradient_flows_to_the_gate_nothing_is_made_again(monkeypatch):
    shapes, model = made_again(monkeypatch), make_small_llama()
    add_lora(model, LoRAConfig(r=4, targets=("up_proj",)))
    assert_same_bits_again(model)
    assert len(shapes) == len(model.model.layers) - 1  # all but the first, before which nothing trains


def test_under_checkpointing_the_blocks_are_as_without(monkeypatch):
    shapes, model = made_again(monkeypatch), with_random_adapter(make_small_llama()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_bits_again(model)
    assert shapes == []


def test_without_gradients_nothing_is_kept():
    model = with_random_adapter(make_small_llama())
    with torch.no_grad(), recompute_activations(model):
        assert torch.equal(forward(model), forward(model))


def test_a_function_that_works_in_place_is_left_alone(monkeypatch):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.SiLU(inplace=True)

        def forward(self, x):
            return self.act(self.a(x) * 2) * self.b(x)

    shapes, model, x = made_again(monkeypatch), InPlace(), torch.randn(3, 4)
    plain = gradients(model, model(x).sum())
    with recompute_activations(model):
        value = model(x).sum()
    assert all(torch.equal(g, plain[n]) for n, g in gradients(model, value).items()) and shapes == []


def test_after_the_block_the_model_is_as_before_also_after_an_error():
    model = with_random_adapter(make_small_llama())
    with pytest.raises(RuntimeError, match="stop"), recompute_activations(model):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks for m in model.modules())
    x = torch.randn(3, requires_grad=True)
    assert (x * x).grad_fn._saved_self is x  # no hook packs it any more


def test_what_a_failed_backward_pass_kept_is_freed():
    model, gone = make_small_llama().requires_grad_(True), []

    def watch(_, arguments):
        weakref.finalize(arguments[0].untyped_storage(), gone.append, True)

    def fail(*_):
        raise torch.OutOfMemoryError("no room for a gradient")

    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(watch)
    model.lm_head.register_full_backward_pre_hook(fail)
    with recompute_activations(model):
        value = forward(model)
    assert not gone
    with pytest.raises(torch.OutOfMemoryError):
        value.backward()
    del value
    assert gone, "nothing that the graph keeps keeps the graph"


def test_blocks_are_checkpointed_by_either_name_that_transformers_gives_it():
    """5.23 has both names, and warns of the older one; before there is the older one only."""

    class Older(nn.Module):
        is_on = None

        def gradient_checkpointing_enable(self, settings):
            self.is_on = settings

        def gradient_checkpointing_disable(self):
            self.is_on = None

    model = Older()
    checkpoint_blocks(model)
    assert model.is_on == {"use_reentrant": False}
    keep_blocks(model)
    assert model.is_on is None
    model = tiny_llama()
    checkpoint_blocks(model)
    assert model.model.gradient_checkpointing and model.model.layers[0].gradient_checkpointing
    keep_blocks(model)
    assert not model.model.gradient_checkpointing and not model.model.layers[0].gradient_checkpointing
