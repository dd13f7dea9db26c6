"""The furniture of `14_many_adapters`: checks that name mistakes, its pictures, its explorer in both forms."""

import math
from itertools import accumulate, chain, pairwise

import pytest
import torch

from labkit import models
from labkit.lab.check import serving as check
from labkit.lab.explore import serving as explore
from labkit.lab.figures import serving as figures
from labkit.serving.costs import Machine, copies_step, count_sizes, deal, shared_step
from tests.lab import exercise_checks, explorers

MACHINE = Machine(bandwidth=1e10, flops=1e11)


def sort(rows, kept=lambda row: row is not None, key=None):
    """By one pass for each name, where the check makes one for all."""
    names = [row for i, row in enumerate(rows) if kept(row) and row not in rows[:i]]
    names = sorted(names, key=key) if key else names
    groups = [[i for i, row in enumerate(rows) if row == name] for name in names]
    return names, list(chain(*groups)), [0, *accumulate(map(len, groups))]


def changed(order=lambda o, s: o, starts=lambda s: s):
    def answer(rows):
        names, found, at = sort(rows)
        return names, order(found, at), starts(at)

    return answer


def turned(order, starts):
    return list(chain(*(order[a:b][::-1] for a, b in pairwise(starts))))


def inverse(order, starts):
    return [order.index(row) for row in sorted(order)]


def mixed(x, W, adapters, rows, alone=None, scaled=True, base=True):
    out = []
    for one, row in zip(x, rows):
        y = W @ one if base else torch.zeros(len(W))
        if (name := row or alone) is not None:
            A, B, scaling = adapters[name]
            y = y + (scaling if scaled else 1) * (B @ (A @ one))
        out.append(y)
    return torch.stack(out)


def unsorted(x, W, adapters, rows):
    """Corrections at the places of the sorted rows."""
    added = mixed(x, W, adapters, rows, base=False)
    order = sort(rows)[1]
    y = x @ W.T
    y[: len(order)] += added[order]
    return y


def seconds(b, n, W, a, P, Pa, bandwidth, flops, combine=max, per_row=False, base_per_row=False, work=None):
    read = (W * (b if base_per_row else 1) + (b if per_row else n) * a) / bandwidth
    return combine(read, (2 * b * (P + Pa) if work is None else work) / flops)


def reused(kept, who, ids, same=lambda one, me: (one[0], one[2:]) == (me[0], me[2:]), left=1, whole=False):
    best = 0
    for one, theirs in kept:
        if not same(one, who):
            continue
        n = 0
        while n < len(ids) - left and n < len(theirs) and theirs[n] == ids[n]:
            n += 1
        if whole and n < len(theirs):
            continue
        best = max(best, n)
    return best


def right_and_wrong():
    """Each check with the right function, and wrong ones with what the message must say."""
    yield (
        check.segment_rows,
        sort,
        [
            (lambda rows: sort(rows, kept=lambda row: True), "base's own"),
            (changed(starts=lambda s: [b - a for a, b in pairwise(s)]), "counts"),
            (changed(starts=lambda s: s[1:]), "begins at 0"),
            (changed(starts=lambda s: s[:-1]), "ends with"),
            (changed(order=inverse), "at which place"),
            (changed(order=turned), "turned round"),
            (lambda rows: sort(rows, key=str), "alphabet"),
        ],
    )
    yield (
        check.mixed_forward,
        mixed,
        [
            (lambda x, W, a, rows: mixed(x, W, a, rows, alone=list(a)[-1]), "-1 is a valid index"),
            (lambda x, W, a, rows: mixed(x, W, a, rows, alone=next(iter(a))), "the first adapter"),
            (lambda *given: mixed(*given, scaled=False), "scaling"),
            (lambda *given: mixed(*given, base=False), "output of the base"),
            (unsorted, "where its row came from"),
            (
                lambda x, W, a, rows: mixed(x, W, a, [next(r for r in rows if r)] * len(rows)),
                "one adapter",
            ),
            (
                lambda x, W, a, rows: x @ W.T + sum(s * x @ A.T @ B.T for A, B, s in a.values()),
                "sum of all adapters",
            ),
        ],
    )
    yield (
        check.step_seconds,
        seconds,
        [
            (lambda *g: seconds(*g, combine=lambda one, other: one + other), "not their sum"),
            (lambda *g: seconds(*g, combine=min), "takes the faster"),
            (lambda *g: seconds(*g, per_row=True), "not one for each row"),
            (lambda *g: seconds(*g, base_per_row=True), "read once for all rows"),
            (lambda b, n, W, a, *rest: seconds(b, 0, W, a, *rest), "bytes are missing"),
            (lambda b, n, W, a, P, Pa, *rest: seconds(b, n, W, a, P, Pa, *rest, work=b * (P + Pa)), ": 2$"),
            (
                lambda b, n, W, a, P, Pa, *rest: seconds(b, n, W, a, P, Pa, *rest, work=2 * b * (P + n * Pa)),
                "own adapter alone",
            ),
            (
                lambda b, n, W, a, P, Pa, *rest: seconds(b, n, W, a, P, Pa, *rest, work=2 * b * P),
                "products are missing",
            ),
            (
                lambda b, n, W, a, P, Pa, *rest: seconds(b, n, W, a, P, Pa, *rest, work=2 * (P + Pa)),
                "every row",
            ),
        ],
    )
    yield (
        check.reusable_tokens,
        reused,
        [
            (lambda *given: reused(*given, same=lambda one, me: True), "text alone"),
            (
                lambda *given: reused(*given, same=lambda one, me: (*one[:2], one[3]) == (*me[:2], me[3])),
                "no identity",
            ),
            (lambda *given: reused(*given, same=lambda one, me: one == me), "renamed"),
            (
                lambda *given: reused(*given, same=lambda one, me: (one[0], one[2]) == (me[0], me[2])),
                "strength",
            ),
            (lambda *given: reused(*given, same=lambda one, me: one[2:] == me[2:]), "the base is part"),
            (lambda *given: reused(*given, left=0), "left to compute"),
            (lambda *given: reused(*given, whole=True), "common beginning"),
            (
                lambda kept, *given: next((n for pair in kept if (n := reused([pair], *given))), 0),
                "takes the first",
            ),
        ],
    )


(
    test_a_check_accepts_the_solution_and_names_each_mistake,
    test_a_check_survives_stubs_exceptions_and_nonsense,
) = exercise_checks.tests_of(list(right_and_wrong()))


# The pictures


def test_the_batch_picture_has_a_box_for_each_row_and_each_sorted_row():
    rows = ["sql", None, "prose", "sql"]
    names, order, starts = sort(rows)
    (axes,) = figures.batch_picture(rows, order, starts, names).axes
    said = [text.get_text() for text in axes.texts]
    assert len(axes.patches) == 4 + 3
    assert "rows[0:2] += s · (x Aᵀ) Bᵀ of sql" in said and "base rows: in no segment" in said


def test_names_are_readable_on_their_colours():
    assert figures.ink_on("#ffffff") == "black" and figures.ink_on("#000000") == "white"
    names = ["a", "b", "c"]
    assert len({figures.shade_of(name, names) for name in [*names, None]}) == 4


def test_a_request_is_drawn_from_its_first_token_to_its_end():
    spans = [figures.Span("sql", 0, 2, 5, 4), figures.Span(None, 1, 6, 6, 1)]
    (axes,) = figures.schedule_picture(spans, ["sql"], "two").axes
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(1.5, 4), (5.5, 1)]
    assert [text.get_text() for text in axes.texts] == ["sql", "base"]


def test_costs_are_over_the_base_alone():
    from labkit.lab.plots import canvas

    _, axes = canvas()
    figures.cost_curves(axes, {1: {0: 2.0, 4: 3.0}}, {1: {0: 1.0, 4: 1.25}}, "costs")
    line, points, _ = axes.lines
    assert list(line.get_ydata()) == [1, 1.25] and list(points.get_ydata()) == [1, 1.5]


def test_evidence_ends_at_its_threshold():
    (axes,) = figures.evidence_picture({"worse": [1.0, 5.0, 22.0], "better": [1.0, 0.6, 0.4]}, 20, "t").axes
    said = [text.get_text() for text in axes.texts]
    assert said == ["it is worse", "it is better", "20: enough, at α = 0.05"]


# The explorer


@pytest.fixture(scope="module")
def model():
    return models.load("tiny-llama", torch.float32)[0]


def test_an_outlook_follows_from_the_closed_forms(model):
    sizes = count_sizes(model, 16)
    one = explore.look_ahead(sizes, MACHINE, 1, 1.0, 16, math.inf)
    assert one.distinct == 1 and one.hit_rate == 1
    assert one.shared == pytest.approx(16 / shared_step(sizes, MACHINE, 16, 1))
    assert one.copies == pytest.approx(16 / copies_step(sizes, MACHINE, deal(16, 1)))
    many = explore.look_ahead(sizes, MACHINE, 64, 0.0, 16, 5 * sizes.resident_bytes)
    assert many.copies is None and many.shared < one.shared
    assert many.copies_bytes == 64 * sizes.resident_bytes
    assert 0 < many.hit_rate < 1
    none = explore.look_ahead(sizes, MACHINE, 4, 0.0, 16, sizes.resident_bytes // 2)
    assert none.shared is None and none.copies is None and none.hit_rate == 0


def show(model, **given):
    return lambda: explore.serving_explorer(model, MACHINE, **given)


def test_the_explorer_draws_at_every_end_of_its_controls(model):
    assert len(explorers.shown(explore, show(model))) == 2
    explorer = explorers.Explorer(explore, show(model, memory=1e8), interactive=True)
    assert set(explorer.controls) == {"tenants", "skew", "r", "batch", "bits"}
    assert "64 tenants" in explorers.title(explorer.figure_at_controls())
    for values in (
        {"tenants": 1, "batch": 1},
        {"tenants": 1000, "skew": 0.0, "r": 64, "batch": 64},
        {"bits": 4, "r": 2},
    ):
        assert "hit rate" in explorers.title(explorer.figure(**values))


def test_where_even_the_base_does_not_fit_it_says_so(model):
    explorer = explorers.Explorer(explore, show(model, memory=1e6))
    assert "does not fit" in explorers.title(explorer.figure())
    with pytest.raises(ValueError, match="memory"):
        explore.serving_explorer(model, MACHINE, memory=0)
