"""The furniture of `15_failure_zoo`: checks that name mistakes, its pictures, its explorer in both forms."""

import math

import numpy as np
import pytest
import torch

import labkit
from labkit import models
from labkit.lab.check import failures as check
from labkit.lab.explore import failures as explore
from labkit.lab.figures import failures as figures
from labkit.lora.inject import lora_layers
from tests.lab import exercise_checks, explorers


def counts(ids, labels, answer, end, place=0, edge=0, last=0):
    """By a loop over places, where the check collects them first."""
    other = prompt = 0
    for i, label in enumerate(labels):
        if label == -100:
            continue
        other += [*ids, None][min(i + place, len(ids))] != label
        prompt += i < answer + edge
    place_of_end = len(ids) - 1 if last else end
    return other, prompt, int(labels[answer] == -100), int(labels[place_of_end] == -100)


def silent(p, step, both=True, width=None):
    p = p.to(width) if width else p
    up, down = p.add(step).eq(p), p.sub(step).eq(p)
    return torch.stack([up, down]).all(0).double().mean() if both else up.double().mean()


def rate(lr, alpha, r, rslora, power=None, by=2.0):
    return lr * alpha * r ** -(power or (0.5 if rslora else 1.0)) / by


def found(line, words=("sick",)):
    return [name for name, outcome in line["findings"].items() if outcome in words]


def shares(lines, hit=lambda line: (found(line) or [None])[0] == line["expected"], words=("sick",)):
    sick = [hit(line) for line in lines if line["expected"]]
    sound = [bool(found(line, words)) for line in lines if not line["expected"]]
    return float(np.mean(sick)), float(np.mean(sound))


def right_and_wrong():
    """Each check with the right function, and wrong ones with what the message must say."""
    yield (
        check.label_counts,
        counts,
        [
            (lambda *row: counts(*row, place=1), "shifts them"),
            (lambda i, x, a, e: (sum(p != q for p, q in zip(i, x)), *counts(i, x, a, e)[1:]), "no label"),
            (lambda *row: counts(*row, edge=1), "places < answer"),
            (lambda *row: counts(*row, last=1), "padding"),
            (lambda *row: (*counts(*row)[:2], *(1 - n for n in counts(*row)[2:])), "yours is 1 where it is"),
        ],
    )
    yield (
        check.silent_share,
        silent,
        [
            (lambda p, step: silent(p, step, both=False), "either way"),
            (lambda p, step: ((p + step == p) | (p - step == p)).float().mean(), "silent in one"),
            (lambda p, step: 1 - silent(p, step), "that moves"),
            (lambda p, step: silent(p, step, width=torch.float32), "32 bits"),
            (
                lambda p, step: (2.0 ** (p.abs().double().log2().floor() - 7) > step).double().mean(),
                "\\*half\\*",
            ),
        ],
    )
    yield (
        check.effective_rate,
        rate,
        [
            (lambda lr, a, r, rs: rate(lr, a, r, rs, power=1.0), "root of r$"),
            (lambda lr, a, r, rs: rate(lr, a, r, rs, power=0.5), "plain LoRA divides by r"),
            (lambda lr, a, r, rs: rate(lr, a, r, rs, by=1.0), "divide by it"),
            (lambda lr, a, r, rs: lr * lr / rate(lr, a, r, rs), "multiply"),
            (lambda lr, a, r, rs: lr * a / 2, "not for 2"),
        ],
    )
    yield (
        check.matrix_rates,
        shares,
        [
            (lambda lines: shares(lines, lambda x: x["expected"] in found(x)), "among them"),
            (lambda lines: shares(lines, lambda x: (found(x) or [None])[-1] == x["expected"]), "the last"),
            (
                lambda lines: shares(
                    lines,
                    lambda x: found(x, ("sick", "cannot say"))[:1] == [x["expected"]],
                    ("sick", "cannot say"),
                ),
                "no finding",
            ),
            (lambda lines: shares(lines)[::-1], "the order"),
            (lambda lines: (shares(lines)[0], 1 - shares(lines)[1]), "\\*with\\*"),
            (over_all, "divides by all"),
            (
                lambda lines: (
                    float(np.mean([(found(x) or [None])[0] == x["expected"] for x in lines])),
                    shares(lines)[1],
                ),
                "are right too",
            ),
        ],
    )


def over_all(lines):
    share = sum(line["expected"] is not None for line in lines) / len(lines)
    hits, alarms = shares(lines)
    return hits * share, alarms * (1 - share)


(
    test_a_check_accepts_the_solution_and_names_each_mistake,
    test_a_check_survives_stubs_exceptions_and_nonsense,
) = exercise_checks.tests_of(list(right_and_wrong()))


# The pictures


def test_the_running_mean_keeps_the_length_and_a_nan():
    assert figures.smooth([3.0] * 7).tolist() == [3.0] * 7
    assert figures.smooth([1.0, 2.0, 3.0])[1] == 2.0
    assert math.isnan(figures.smooth([1.0, None, 3.0])[0]) and len(figures.smooth([])) == 0


def test_a_run_without_a_curve_says_so():
    figure = figures.curve_wall({"one": [2.0, 1.0], "two": [], "three": [2.0, None]}, [2.0, 1.0])
    words = [axes.texts[0].get_text() for axes in figure.axes[:3]]
    assert words == ["", "no curve was kept", "NaN"]


def test_the_matrix_counts_seeds_and_frames_the_expected_probe():
    def line(name, expected, **outcomes):
        return {"specimen": name, "expected": expected} | {
            "findings": {k: {"outcome": v} for k, v in outcomes.items()}
        }

    lines = [
        line("a", "rate", rate="sick", size="healthy"),
        line("a", "rate", rate="sick", size="sick"),
        line("healthy", None, rate="healthy", size="cannot say"),
    ]
    figure = figures.matrix_figure(lines, ["rate", "size"])
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["1 of 2"]
    assert len(axes.patches) == 1 and axes.patches[0].get_xy() == (-0.5, -0.5)
    assert figures.share_of(lines[:2], "size", "sick") == 0.5


# The explorer


@pytest.fixture(scope="module")
def sound():
    model, _ = models.load("tiny-llama", torch.float32)
    torch.manual_seed(0)
    labkit.add_lora(model, labkit.LoRAConfig(r=2))
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_()
    return model


def show(sound, **values):
    layer = list(lora_layers(sound))[1]
    first = {"name": "broken", "layer": layer, "part": "B"} | values
    return lambda: explore.tensor_explorer(lambda name: sound, ["broken"], sound, [first])


def test_the_explorer_draws_every_tensor_of_every_form(sound):
    (figure,) = explorers.shown(explore, show(sound))
    assert explorers.title(figure) == "broken: B"
    explorer = explorers.Explorer(explore, show(sound), interactive=True)
    assert set(explorer.controls) == {"name", "layer", "part"}
    for part in explore.PARTS:
        assert explorers.title(explorer.figure(part=part)) == f"broken: {part}"


def test_a_layer_without_an_adapter_and_a_tensor_of_nan_are_drawn_too(sound):
    base, _ = models.load("tiny-llama", torch.float32)
    layer = next(iter(lora_layers(sound)))
    assert explore.tensor_of(base, layer, "B") is None
    assert torch.equal(explore.tensor_of(base, layer, "W"), explore.tensor_of(sound, layer, "W"))
    values = {"name": "broken", "layer": layer, "part": "B"}
    (figure,) = explorers.shown(
        explore, lambda: explore.tensor_explorer(lambda name: base, ["broken"], sound, [values])
    )
    assert "no adapter" in figure.axes[0].texts[0].get_text()
    assert "50% not finite" in explore.described(torch.tensor([1.0, math.nan]))
