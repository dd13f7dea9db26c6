"""Bottleneck adapters against the papers' equations, written out."""

import pytest
import torch
from torch.nn import functional as F

from labkit.alternatives.bottleneck import BottleneckConfig, add_bottleneck, bottlenecks
from tests.alternatives.cases import MAKERS, gpt2, llama, randomize, text


def reference_llama(base, ids, adapt):
    """A Llama written out, with `adapt(which, f, x)` in place of each sub-layer f(x)."""
    h = base.model.embed_tokens(ids)
    angles = base.model.rotary_emb(h, torch.arange(ids.shape[1])[None])
    for i, block in enumerate(base.model.layers):
        h = h + adapt(
            (i, "self_attn"),
            lambda x, b=block: b.self_attn(hidden_states=x, position_embeddings=angles)[0],
            block.input_layernorm(h),
        )
        h = h + adapt((i, "mlp"), block.mlp, block.post_attention_layernorm(h))
    return base.lm_head(base.model.norm(h))


def reference_gpt2(base, ids, adapt):
    h = base.transformer.wte(ids) + base.transformer.wpe(torch.arange(ids.shape[1]))
    for i, block in enumerate(base.transformer.h):
        h = h + adapt((i, "attn"), lambda x, b=block: b.attn(x)[0], block.ln_1(h))
        h = h + adapt((i, "mlp"), block.mlp, block.ln_2(h))
    return base.lm_head(base.transformer.ln_f(h))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("form", ["serial", "parallel"])
@pytest.mark.parametrize(
    ("make", "reference"), [(llama, reference_llama), (gpt2, reference_gpt2)], ids=MAKERS
)
def test_bottleneck_adapters_equal_the_papers_equations(make, reference, form, activation):
    config = BottleneckConfig(size=8, form=form, scale=1.5, activation=activation)
    model = randomize(add_bottleneck(make(), config))
    weights = {
        (int(name.split(".")[-2]), name.split(".")[-1]): [
            p.detach().clone().requires_grad_()
            for p in (layer.down.weight, layer.down.bias, layer.up.weight, layer.up.bias)
        ]
        for name, layer in bottlenecks(model).items()
    }

    def adapt(which, f, x):
        down, b_down, up, b_up = weights[which]
        y = f(x)
        h = y if form == "serial" else x
        return y + 1.5 * (getattr(F, activation)(h @ down.T + b_down) @ up.T + b_up)

    expected, logits = reference(make(), text(), adapt), model(text()).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    logits.logsumexp(-1).mean().backward()
    expected.logsumexp(-1).mean().backward()
    for name, layer in bottlenecks(model).items():
        own = (layer.down.weight, layer.down.bias, layer.up.weight, layer.up.bias)
        for a, b in zip(own, weights[int(name.split(".")[-2]), name.split(".")[-1]]):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_houlsbys_start_is_nearly_the_base_and_within_two_deviations():
    with torch.no_grad():
        expected = llama()(text()).logits
        model = add_bottleneck(llama(), BottleneckConfig(size=8, init="near-identity"))
        torch.testing.assert_close(model(text()).logits, expected, rtol=0, atol=0.02)
    for layer in bottlenecks(model).values():
        for part in (layer.down, layer.up):
            assert 0.005 < part.weight.std() < 0.01 and part.weight.abs().max() <= 0.02
            assert torch.all(part.bias == 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"form": "both"},
        {"where": "mlp"},
        {"where": ("ffn",)},
        {"activation": "swish"},
        {"scale": 0},
        {"init": "random"},
    ],
    ids=str,
)
def test_config_out_of_range_says_what_is_allowed(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BottleneckConfig(**wrong)
