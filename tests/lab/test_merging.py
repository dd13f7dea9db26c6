"""The furniture of `13_merging_and_export`: checks that name mistakes, its explorers in both forms, its picture."""

import pytest
import torch

import labkit
from labkit import models
from labkit.data import passages
from labkit.lab import plots
from labkit.lab.check import merging as check
from labkit.lab.explore import merging as explore
from labkit.lab.figures.merging import crossings, reach
from labkit.quant.tensor import quantize
from tests.lab import exercise_checks, explorers


def moved(codes, delta, levels, absmax):
    """By the middles between levels, where the check looks for the nearest."""
    middles = absmax * (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(absmax * levels[codes] + delta, middles) != codes


def in_half_gaps(codes, delta, levels, absmax):
    gaps = torch.cat([torch.full((1,), torch.inf), absmax * levels.diff(), torch.full((1,), torch.inf)])
    return delta.abs() / gaps[codes + 1].minimum(gaps[codes]) * 2


def cat(adapters, weights, in_A=lambda w, s: 1.0, in_B=lambda w, s: w * s):
    pairs = list(zip(adapters, weights))[::-1]  # in another order
    A = torch.cat([in_A(w, s) * A for (A, _, s), w in pairs])
    return A, torch.cat([in_B(w, s) * B for (_, B, s), w in pairs], 1)


def interleave(B, heads):
    """By explicit indices, where the check reshapes."""
    dim = len(B) // heads
    order = [h * dim + i // 2 + (i % 2) * dim // 2 for h in range(heads) for i in range(dim)]
    return B[order]


def right_and_wrong():
    """Each check with the right function, and wrong ones with what the message must say."""
    yield (
        check.survival_share,
        lambda W, M, D: (((M - W) * D).sum() / D.norm() ** 2).item(),
        [
            (lambda W, M, D: (M * D).sum() / (D * D).sum(), "take W away"),
            (
                lambda W, M, D: ((M - W) * D).sum() / (M - W).norm() / D.norm(),
                "cosine",
            ),
            (lambda W, M, D: (M - W).norm() / D.norm(), "ratio of lengths"),
            (lambda W, M, D: (M - W - D).norm() / D.norm(), "in lengths of delta"),
            (lambda W, M, D: ((M - W) * D).sum() / D.norm(), "the \\*square\\*"),
            (lambda W, M, D: ((M - W) * D).sum() / (M - W).norm() ** 2, "not on delta"),
            (lambda W, M, D: (D * D).sum() / ((M - W) * D).sum(), "other way round"),
            (lambda W, M, D: 1 - ((M - W) * D).sum() / (D * D).sum(), "what was lost"),
        ],
    )
    yield (
        check.moved_codes,
        moved,
        [
            (lambda c, d, v, a: moved(c, d, v, 1.0), "units of absmax"),
            (lambda c, d, v, a: moved(c, d, v, a * a), "twice"),
            (lambda c, d, v, a: in_half_gaps(c, d, v, a) > 1, "on the side"),
            (lambda c, d, v, a: d.abs() > a * (v[-1] - v[0]) / 30, "yours uses their mean"),
            (lambda c, d, v, a: ~moved(c, d, v, a), "that stay"),
            (lambda c, d, v, a: moved(c, d, v, a) & (d > 0), "upwards"),
            (
                lambda c, d, v, a: ((a * v[c] + d)[:, None] - a * v).abs().argmin(1),
                "compare them with the old",
            ),
            (lambda c, d, v, a: whole_gap(c, d, v, a), "\\*half\\*"),
        ],
    )
    yield (
        check.cat_factors,
        cat,
        [
            (
                lambda ads, ws: (sum(A for A, _, _ in ads), sum(w * s * B for (_, B, s), w in zip(ads, ws))),
                "cross terms",
            ),
            (lambda ads, ws: cat(ads, ws, in_B=lambda w, s: w), "scaling of its own"),
            (lambda ads, ws: cat(ads, ws, in_B=lambda w, s: s), "weights are missing"),
            (lambda ads, ws: cat(ads, ws, in_A=lambda w, s: w), "the weight is in both"),
            (lambda ads, ws: cat(ads, ws, in_A=lambda w, s: s), "the scaling is in both"),
            (lambda ads, ws: cat(ads, ws, in_A=lambda w, s: w * s), "weight and scaling are in both"),
            (lambda ads, ws: (cat(ads, ws)[0], cat(ads, ws)[1] / 2), "that is the mean"),
            (lambda ads, ws: cat(ads, ws)[::-1], "swapped"),
        ],
    )
    yield (
        check.gguf_rows,
        interleave,
        [
            (lambda B, h: B[torch.argsort(interleave(torch.arange(len(B)), h))], "the way back"),
            (lambda B, h: interleave(B, 1), "as one head"),
            (lambda B, h: interleave(B, len(B) // h), "wrong way round"),
            (lambda B, h: interleave(B.T, h).T, "columns"),
            (lambda B, h: B, "as they were"),
            (lambda B, h: B.view(h, 2, -1, B.shape[1])[:, [1, 0]].reshape(B.shape), "interleaved"),
        ],
    )


def whole_gap(codes, delta, levels, absmax):
    """A weight moves if its update is as long as the gap on its side."""
    ends = torch.full((1,), torch.inf)
    gaps = torch.cat([ends, absmax * levels.diff(), ends])
    return delta.abs() > torch.where(delta > 0, gaps[codes + 1], gaps[codes])


(
    test_a_check_accepts_the_solution_and_names_each_mistake,
    test_a_check_survives_stubs_exceptions_and_nonsense,
) = exercise_checks.tests_of(list(right_and_wrong()))


# The picture


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator)
    return weight, torch.randn(48, 4, generator=generator) @ torch.randn(4, 64, generator=generator)


@pytest.mark.parametrize("name", explore.FOUR_BITS)
def test_a_bar_beyond_one_is_a_code_that_changes(layer, name):
    """Against quantizing again with the scale from before, which a block's largest weight holds in place."""
    weight, delta = layer[0].flatten()[:64], 0.1 * layer[1].flatten()[:64]
    delta[weight.abs().argmax()] = 0
    before = quantize(weight, name, 64, False)
    again = quantize(before.dequantize() + delta, name, 64, False)
    assert torch.equal(again.absmax, before.absmax)
    changed = before.dequantize() != again.dequantize()
    assert torch.equal(reach(weight, delta, name).abs() > 1, changed) and 5 < changed.sum() < 60


def test_the_picture_has_a_bar_for_each_weight_of_a_block(layer):
    figure, axes = plots.canvas()
    moved = crossings(layer[0], 0.1 * layer[1], axes, "title")
    assert len(moved) == 64 and explorers.title(figure) == "title"
    assert [abs(bar.get_height()) > 1 for bar in axes.patches] == moved.tolist()


# The explorers


def test_what_survives_is_that_of_a_merge_of_the_library(layer):
    """The share of `merged_survival`, for a layer merged into NF4 as a student would."""
    from labkit.lora.inject import lora_layers
    from labkit.lora.survival import merged_survival

    model = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False))
    model[0].weight.data = layer[0].clone()
    labkit.quantize_model(model, double_quant=False, progress=False)
    labkit.add_lora(model, labkit.LoRAConfig(r=4, alpha=4, targets=["0"]))
    (adapter,) = lora_layers(model).values()
    torch.nn.init.normal_(adapter.lora_B, std=0.02, generator=torch.Generator().manual_seed(1))
    delta = adapter.delta().detach()
    labkit.merge(model, requantize=True)
    expected = merged_survival(model)[""]
    found = explore.merged_as(layer[0], delta, expected.rho, "nf4")
    assert found.share == pytest.approx(expected.share, abs=1e-3) and 0 < found.rho < 1
    assert found.error == pytest.approx(expected.error, rel=1e-3)


def test_sixteen_bits_keep_the_update_and_blocks_matter_to_four(layer):
    weight, delta = layer
    assert (
        explore.merged_as(weight, delta, 0.02, "fp16").error
        < explore.merged_as(weight, delta, 0.02, "bf16").error
        < 0.2
    )
    small, large = (explore.merged_as(weight, delta, 0.06, "nf4", size).share for size in (32, 512))
    assert small > large


def test_the_survival_explorer_draws_headless_and_needs_an_update(layer):
    first, second = explorers.shown(explore, lambda: explore.survival_explorer(*layer))
    assert "survives" in explorers.title(first) and "codes change" in explorers.title(second, 1)
    with pytest.raises(ValueError, match="of one shape"):
        explore.survival_explorer(layer[0], torch.zeros_like(layer[0]))


@pytest.mark.parametrize("kind", explore.FORMATS)
def test_the_survival_explorer_draws_every_format_at_its_ends(layer, kind):
    explorer = explorers.Explorer(explore, lambda: explore.survival_explorer(*layer), interactive=True)
    assert set(explorer.controls) == {"rho", "kind", "blocksize"}
    for rho in (explore.RATIOS[0], explore.RATIOS[-1]):
        for blocksize in (explore.BLOCKSIZES[0], explore.BLOCKSIZES[-1]):
            figure = explorer.figure(rho=rho, kind=kind, blocksize=blocksize)
            assert explorers.title(figure).startswith(kind) and len(figure.axes) == 2


@pytest.fixture(scope="module")
def two():
    """tiny-llama with two random adapters, its tokenizer, and a passage for each."""
    model, tokenizer = models.load("tiny-llama", torch.float32)
    for name in ("prose", "queries"):
        labkit.add_adapter(model, name, labkit.LoRAConfig(r=2)) if labkit.active_adapter(
            model
        ) else labkit.add_lora(model, labkit.LoRAConfig(r=2), name)
    labkit.use_adapter(model, "prose")
    return model.eval(), tokenizer, {name: passages.load_austen("test")[:1] for name in ("prose", "queries")}


def test_the_mixing_explorer_leaves_the_model_as_it_was(two):
    model, tokenizer, records = two
    whole, half = explorers.shown(explore, lambda: explore.mixing_explorer(model, tokenizer, records))
    assert explorers.title(whole).startswith("cat: 1 × prose + 1 × queries")
    assert explorers.title(half).startswith("cat: 0.5 × prose + 0.5 × queries")
    assert labkit.active_adapter(model) == "prose" and set(labkit.adapter_configs(model)) == set(records)
    with pytest.raises(ValueError, match="two adapters of the model, which has prose, queries"):
        explore.mixing_explorer(model, tokenizer, {"prose": records["prose"]})


@pytest.mark.parametrize("how", explore.METHODS)
def test_the_mixing_explorer_draws_every_method_and_both_at_zero(two, how):
    explorer = explorers.Explorer(explore, lambda: explore.mixing_explorer(*two), interactive=True)
    assert set(explorer.controls) == {"first", "second", "how"}
    for first, second in ((0.0, 0.0), (0.5, 1.5)):
        figure = explorer.figure(first=first, second=second, how=how)
        assert explorers.title(figure).startswith(f"{how}: {first:g} × prose")
