"""The furniture of `12_beyond_lora`: checks that name mistakes, the picture of a block, and the explorer."""

import math

import pytest
import torch
from matplotlib import pyplot as plt
from torch.nn import functional as F

from labkit.alternatives.bottleneck import Bottleneck, BottleneckConfig, add_bottleneck
from labkit.alternatives.cost import cost
from labkit.alternatives.ia3 import add_ia3
from labkit.alternatives.prefixes import PrefixConfig, add_prefix
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.lab.check import alternatives as check
from labkit.lab.explore import alternatives as explore
from labkit.lab.figures import alternatives
from labkit.lab.plots import canvas
from labkit.lora.config import LoRAConfig
from labkit.lora.count import trainable
from labkit.lora.inject import add_lora
from labkit.models.shapes import config_of, meta_model
from tests.lab import exercise_checks, explorers


def by_torch(q, k, v, prefix_k, prefix_v):
    """Attention over a prefix by PyTorch's own kernel."""
    mask = torch.cat([torch.ones(len(q), len(prefix_k)), torch.ones(len(q), len(q)).tril()], 1).bool()
    return F.scaled_dot_product_attention(
        q, torch.cat([prefix_k, k]), torch.cat([prefix_v, v]), attn_mask=mask
    )


def right_and_wrong():
    """Each check with the right function, and wrong ones with what the message must say."""
    linear = F.linear
    yield (
        check.bottleneck_parameters,
        lambda d, m, n: (
            2
            * n
            * sum(p.numel() for p in Bottleneck(torch.nn.Identity(), d, BottleneckConfig(m)).parameters())
        ),
        [
            (lambda d, m, n: 4 * n * m * d, "biases are missing"),
            (lambda d, m, n: n * (2 * m * d + m + d), "one after attention and one after"),
            (lambda d, m, n: 2 * (2 * m * d + m + d), "one block"),
            (lambda d, m, n: 2 * m * d + m + d, "one adapter; each"),
            (lambda d, m, n: 2 * n * (m * d + m + d), "one matrix is counted"),
            (lambda d, m, n: 4 * n * (m + 1) * d, "`width` twice"),
            (lambda d, m, n: 4 * n * m * (d + 1), "`size` twice"),
            (lambda d, m, n: 4 * n * d * (d + 1), "full matrix"),
        ],
    )
    yield (
        check.bottleneck_forward,
        lambda f, x, down, up, form: f(x) + linear(linear(f(x) if form == "serial" else x, *down).relu(), *up),
        [
            (lambda f, x, down, up, form: f(x) + linear(linear(x if form == "serial" else f(x), *down).relu(), *up), "swapped"),
            (lambda f, x, down, up, form: f(x) + linear(linear(f(x), *down).relu(), *up), "f's output in both"),
            (lambda f, x, down, up, form: f(x) + linear(linear(x, *down).relu(), *up), "reads x in both"),
            (lambda f, x, down, up, form: linear(linear(f(x) if form == "serial" else x, *down).relu(), *up), "own output is lost"),
            (lambda f, x, down, up, form: x + linear(linear(f(x) if form == "serial" else x, *down).relu(), *up), "x is added"),
            (lambda f, x, down, up, form: f(x) + linear(linear(f(x) if form == "serial" else x, *down), *up), "would be LoRA"),
            (lambda f, x, down, up, form: f(x) + linear(linear(f(x) if form == "serial" else x, *down), *up).relu(), "not after up"),
            (lambda f, x, down, up, form: f(x) + linear(linear(f(x) if form == "serial" else x, down[0]).relu(), up[0]), "biases are missing"),
        ],
    )  # fmt: skip
    yield (
        check.ia3_merge,
        lambda w, v, on_input: w @ torch.diag(v) if on_input else torch.diag(v) @ w,
        [
            (
                lambda w, v, on_input: torch.diag(v) @ w if on_input else w @ torch.diag(v),
                "sides are swapped",
            ),
            (lambda w, v, on_input: w * v, "broadcasts a vector along the last"),
            (lambda w, v, on_input: w * v[:, None], "rows are multiplied in both"),
            (
                lambda w, v, on_input: w * (1 + v) if on_input else w * (1 + v[:, None]),
                "is the factor itself",
            ),
            (lambda w, v, on_input: w + v if on_input else w + v[:, None], "it should multiply"),
            (lambda w, v, on_input: w / v if on_input else w / v[:, None], "which unmerges"),
            (lambda w, v, on_input: w @ v, "product of the matrix and the vector"),
        ],
    )
    yield (
        check.prefix_cache_bytes,
        lambda n, layers, heads, kv_heads, dim, size: n * layers * kv_heads * dim * (size + size),
        [
            (
                lambda n, layers, heads, kv_heads, dim, size: 2 * n * layers * heads * dim * size,
                "grouped-query",
            ),
            (lambda n, layers, heads, kv_heads, dim, size: n * layers * kv_heads * dim * size, "holds both"),
            (lambda n, layers, heads, kv_heads, dim, size: 2 * n * kv_heads * dim * size, "one layer"),
            (
                lambda n, layers, heads, kv_heads, dim, size: 2 * n * layers * kv_heads * dim,
                "how many numbers there are",
            ),
            (
                lambda n, layers, heads, kv_heads, dim, size: 2 * layers * kv_heads * dim * size,
                "one position",
            ),
            (lambda n, layers, heads, kv_heads, dim, size: 2 * n * layers * dim * size, "one key head"),
            (
                lambda n, layers, heads, kv_heads, dim, size: 16 * n * layers * kv_heads * dim * size,
                "those are bits",
            ),
        ],
    )
    yield (
        check.prefix_attention,
        by_torch,
        [
            (lambda q, k, v, pk, pv: F.scaled_dot_product_attention(q, torch.cat([pk, k]), torch.cat([pv, v]), is_causal=True), "hides part of the prefix"),
            (lambda q, k, v, pk, pv: F.scaled_dot_product_attention(q, torch.cat([pk, k]), torch.cat([pv, v])), "no causal mask"),
            (lambda q, k, v, pk, pv: F.scaled_dot_product_attention(q, k, v, is_causal=True) + F.scaled_dot_product_attention(q, pk, pv), "adds two softmaxes"),
            (lambda q, k, v, pk, pv: by_torch(q * math.sqrt(q.shape[-1]), k, v, pk, pv), "not divided by the square root"),
            (lambda q, k, v, pk, pv: F.scaled_dot_product_attention(q, k, v, is_causal=True), "text alone"),
            (lambda q, k, v, pk, pv: F.scaled_dot_product_attention(q, pk, pv), "prefix alone"),
        ],
    )  # fmt: skip


(
    test_a_check_accepts_the_solution_and_names_each_mistake,
    test_a_check_survives_stubs_exceptions_and_nonsense,
) = exercise_checks.tests_of(list(right_and_wrong()))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda m: add_prompt(m, PromptConfig(20)), {("embed", "before")}),
        (lambda m: add_prefix(m, PrefixConfig(20)), {("k_proj", "before"), ("v_proj", "before")}),
        (lambda m: add_bottleneck(m, BottleneckConfig(4)), {("self_attn", "serial"), ("mlp", "serial")}),
        (lambda m: add_bottleneck(m, BottleneckConfig(4, "parallel", ("mlp",))), {("mlp", "parallel")}),
        (add_ia3, {("k_proj", "output"), ("v_proj", "output"), ("down_proj", "input")}),
        (lambda m: add_lora(m, LoRAConfig(r=2, targets=["q_proj", "down_proj"])), {("q_proj", "sum"), ("down_proj", "sum")}),
    ],
)  # fmt: skip
def test_the_picture_shows_each_place_with_its_count(make, expected):
    model = make(meta_model(config_of("tiny-llama")))
    figure, axes = canvas(9.5, 2.3)
    drawn = alternatives.block_picture(model, axes, "a title")
    assert set(drawn) == expected
    blocks = 1 if ("embed", "before") in expected else model.config.num_hidden_layers
    assert blocks * sum(drawn.values()) == trainable(model).trainable, (
        "the blocks together are all that trains"
    )
    texts = " ".join(text.get_text() for text in axes.texts)
    assert all(f"{count:,}" in texts for count in drawn.values()) and explorers.title(figure) == "a title"
    plt.close(figure)


@pytest.mark.parametrize("name", ["tiny-llama", "llama-3-8b"])
def test_costs_of_the_explorer_are_those_of_the_methods(name):
    config = config_of(name)
    assert explore.cost_on(name, "bottleneck", 3) == cost(
        add_bottleneck(meta_model(config, dtype=torch.bfloat16), BottleneckConfig(3))
    )
    assert (
        explore.cost_on(name, "LoRA", 4).kept
        == trainable(add_lora(meta_model(config), LoRAConfig(r=4))).trainable
    )
    # grouped: fewer than the heads
    kv_width = config.num_key_value_heads * 2 * (64 if name == "tiny-llama" else 128)
    prefix = explore.cost_on(name, "prefix", 5)
    assert (
        prefix.kept == 5 * config.num_hidden_layers * kv_width
        and prefix.cache_bytes_per_layer == 5 * kv_width * 2
    )
    assert explore.cost_on(name, "(IA)³", 1).merges and not hasattr(explore.shape_of(name), "added_method")
    with pytest.raises(ValueError, match="is not a bottleneck"):
        explore.cost_on(name, "bottleneck", config.hidden_size)
    assert not hasattr(explore.shape_of(name), "added_method"), "a refusal leaves the model bare"


def test_the_explorer_draws_headless_and_refuses_unknown_models():
    figures = explorers.shown(explore, lambda: explore.cost_explorer(["tiny-llama"]))
    titles = [explorers.title(figure) for figure in figures]
    assert len(titles) == 2 and "20,480 parameters" in titles[0] and titles[1].startswith("bottleneck 64:")
    with pytest.raises(ValueError, match="at least one model"):
        explore.cost_explorer([])
    with pytest.raises(ValueError, match="not a known config"):
        explore.cost_explorer(["lama-2"])


def test_the_explorer_has_a_control_for_each_choice():
    explorer = explorers.Explorer(explore, lambda: explore.cost_explorer(["tiny-llama"]), interactive=True)
    assert set(explorer.controls) == {"model", "method", "size"}
    for method, told in (("prefix", "20,480"), ("prompt", "5,120"), ("(IA)³", "3,840"), ("LoRA", "373,760")):
        explorer.controls["method"].value = method
        figure = explorer.figure_at_controls()
        assert told in explorers.title(figure)
    merged = figure.axes[1].texts[-1].get_text()
    assert "until it is merged" in merged and "0 positions lost" in merged
