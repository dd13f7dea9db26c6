"""The furniture of `02_lora_from_scratch`: checks that name mistakes, and its explorer in both of its
forms.
"""

import copy
import math

import pytest
import torch

import labkit
from labkit.lab.check import NotYet, inject
from labkit.lab.check import lora as check
from labkit.lab.explore import lora as explore
from labkit.lora.inject import lora_layers
from labkit.lora.merging import adapter_strength
from labkit.training import evaluate
from tests.lab import exercise_checks, explorers


def llama_parameters(h, n, kv, d, mlp, layers, r):
    """Counted, not derived: the layers of a block with the adapters that `add_lora` gives them."""
    shapes = {"q": (h, n * d), "k": (h, kv * d), "v": (h, kv * d), "o": (n * d, h)}
    shapes |= {"gate": (h, mlp), "up": (h, mlp), "down": (mlp, h)}
    with torch.device("meta"):
        block = torch.nn.ModuleDict({name: torch.nn.Linear(*shape) for name, shape in shapes.items()})
        labkit.add_lora(block, labkit.LoRAConfig(r=r))
    return layers * labkit.trainable(block).trainable


def autograd(x, g, A, B, s):
    """The gradients as autograd has them."""
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    return torch.autograd.grad(s * (x @ A.T @ B.T), (A, B), g)


def in_place(W, A, B, alpha, r):
    W += alpha / r * (B @ A)
    return W


def sides(h, q, kv, mlp):
    return 2 * (h + q) + 2 * (h + kv) + 3 * (h + mlp)


def right_and_wrong():
    """Each check with the right function, and wrong ones with what the message must say."""
    yield (
        check.lora_forward,
        lambda x, W, A, B, a, r: x @ W.T + a / r * (x @ A.T @ B.T),
        [
            (lambda x, W, A, B, a, r: x @ W.T + a * (x @ A.T @ B.T), "yours looks like alpha"),
            (lambda x, W, A, B, a, r: x @ W.T + x @ A.T @ B.T, "scaling alpha / r is missing"),
            (lambda x, W, A, B, a, r: a / r * (x @ A.T @ B.T), "base's x W.T is missing"),
            (lambda x, W, A, B, a, r: x @ W.T + a / math.sqrt(r) * (x @ A.T @ B.T), "rsLoRA"),
            (lambda x, W, A, B, a, r: x @ W + a / r * (x @ A.T @ B.T), "x @ W.T; the transpose"),
            (lambda x, W, A, B, a, r: x @ W.T + a / r * (x @ A @ B.T), "x @ A.T; the transpose"),
            (lambda x, W, A, B, a, r: x @ W.T + a / r * (x @ A.T @ B), "z @ B.T; the transpose"),
        ],
    )
    yield (
        check.llama_lora_parameters,
        llama_parameters,
        [
            (lambda h, n, kv, d, m, L, r: L * r * sides(h, n * d, n * d, m), "as wide as q"),
            (
                lambda h, n, kv, d, m, L, r: 2 * L * r * sides(h, n * d, kv * d, m),
                "without another factor of 2",
            ),
            (lambda h, n, kv, d, m, L, r: r * sides(h, n * d, kv * d, m), "number of layers"),
            (
                lambda h, n, kv, d, m, L, r: L * r * (sides(h, n * d, kv * d, m) - 3 * (h + m)),
                "gate, up and down are missing",
            ),
            (lambda h, n, kv, d, m, L, r: L * r * 3 * (h + m), "q, k, v and o are missing"),
            (lambda h, n, kv, d, m, L, r: L * r * (sides(h, n * d, kv * d, m) - (h + m)), "yours has two"),
            (lambda h, n, kv, d, m, L, r: L * r * sides(h, h, kv * d, m), "which here is not hidden"),
            (
                lambda h, n, kv, d, m, L, r: L * (2 * h * n * d + 2 * h * kv * d + 3 * h * m),
                "which LoRA freezes",
            ),
            (lambda h, n, kv, d, m, L, r: L * sides(h, n * d, kv * d, m), "rank is missing"),
        ],
    )
    yield (
        check.lora_gradients,
        autograd,
        [
            (lambda x, g, A, B, s: autograd(x, g, A, B, 1), "scaling is missing"),
            (lambda *i: autograd(*i)[::-1], "swapped"),
            (lambda *i: tuple(part.T for part in autograd(*i)), "both are transposed"),
            (lambda *i: (autograd(*i)[0].T, autograd(*i)[1]), "A's gradient is transposed"),
            (lambda *i: (autograd(*i)[0], autograd(*i)[1].T), "B's gradient is transposed"),
            (lambda x, g, A, B, s: (autograd(x, g, A, B, 1)[0], autograd(x, g, A, B, s)[1]), "A's .* lacks"),
            (lambda x, g, A, B, s: (autograd(x, g, A, B, s)[0], autograd(x, g, A, B, 1)[1]), "B's .* lacks"),
            (lambda x, *i: tuple(part / len(x) for part in autograd(x, *i)), "means over the tokens"),
            (lambda *i: tuple(-part for part in autograd(*i)), "points uphill"),
        ],
    )
    yield (
        check.merged_weight,
        lambda W, A, B, alpha, r: W + alpha / r * (B @ A),
        [
            (in_place, "W itself was changed"),
            (lambda W, A, B, alpha, r: alpha / r * (B @ A), "correction alone"),
            (lambda W, A, B, alpha, r: W + alpha * (B @ A), "looks like alpha"),
            (lambda W, A, B, alpha, r: W + B @ A, "alpha / r is missing"),
            (lambda W, A, B, alpha, r: W + alpha / r * (B @ A).T, "transposed"),
            (lambda W, A, B, alpha, r: alpha / r * (W + B @ A), "multiplies W too"),
            (lambda W, A, B, alpha, r: W - alpha / r * (B @ A), "merging adds"),
        ],
    )
    yield (
        check.break_even_rank,
        lambda d, k: d * k / (3 * (d + k)),
        [
            (lambda d, k: d * k / (d + k), "as many \\*parameters\\*"),
            (lambda d, k: 2 * d * k / (3 * (d + k)), "lets W cost 2"),
            (lambda d, k: d * k / (2 * (d + k)), "6 and not 4"),
            (lambda d, k: d * k / (6 * (d + k)), "twice as many"),
            (lambda d, k: d * k // (3 * (d + k)), "rounded down"),
        ],
    )


(
    test_a_check_accepts_the_solution_and_names_each_mistake,
    test_a_check_survives_stubs_exceptions_and_nonsense,
) = exercise_checks.tests_of(list(right_and_wrong()))


def test_the_check_of_lora_forward_does_not_depend_on_luck(capsys):
    exercise_checks.accepts_the_solution_and_names_each_mistake(*next(right_and_wrong()), capsys, times=80)


def test_one_gradient_instead_of_two_is_not_accepted():
    with pytest.raises(NotYet, match="expected"):
        check.lora_gradients(lambda *inputs: autograd(*inputs)[0])


def test_the_break_even_rank_is_where_pytorch_counts_the_same():
    from torch.utils.flop_counter import FlopCounterMode

    d, k, r = 96, 48, 96 * 48 // (3 * (96 + 48))  # 10.67, rounded down
    counts = {}
    x = torch.randn(5, d, requires_grad=True)
    for rank in (r, r + 1):
        layer = labkit.lora.layer.LoRALinear(
            torch.nn.Linear(d, k, bias=False).requires_grad_(False), labkit.LoRAConfig(r=rank)
        )
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        counts[rank] = counter.get_total_flops()
    full = 6 * d * k * len(x)
    assert counts[r] < full < counts[r + 1]


# The stub that injects


class Wrapped(torch.nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), alpha / r
        self.A = torch.nn.Parameter(torch.randn(r, base.in_features))
        self.B = torch.nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x):
        return self.base(x) + self.scaling * (x @ self.A.T @ self.B.T)


def injected(model, r, alpha, freeze=True, left_out=("lm_head",), depth=None, wrap=Wrapped):
    if freeze:
        model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name not in left_out and depth in (None, name.count(".")):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, wrap(module, r, alpha))
    return model


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, r, a: None, "stub been filled in"),
        (lambda m, r, a: 1 / 0, "raised ZeroDivisionError"),
        (lambda m, r, a: "a string", "expected the model"),
        (lambda m, r, a: m, "no layer was replaced"),
        (lambda m, r, a: injected(m, r, a, left_out=()), "lm_head"),
        (lambda m, r, a: injected(m, r, a, depth=2), "have no adapter"),
        (
            lambda m, r, a: injected(m, r, a, wrap=lambda b, r, a: Wrapped(copy.deepcopy(b), r, a)),
            "made anew",
        ),
        (lambda m, r, a: injected(m, r, a).requires_grad_(False), "A and B are frozen"),
        (lambda m, r, a: injected(m, r, a, freeze=False), "still trains"),
        (lambda m, r, a: injected(m, 8, a), "`r` passed on"),
        (lambda m, r, a: injected(m, r, 16.0), "`alpha` passed on"),
    ],
)
def test_the_check_of_the_injection_names_the_mistake(function, message):
    with pytest.raises(NotYet, match=message):
        inject(function)


def test_the_check_of_the_injection_accepts_a_right_one(capsys):
    inject(injected)
    assert "correct" in capsys.readouterr().out


# The explorer


@pytest.fixture(scope="module")
def adapted(tiny):
    """tiny-llama with an adapter that does something, its tokenizer, and two passages."""
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    torch.manual_seed(0)
    labkit.add_lora(model, labkit.LoRAConfig(r=4, alpha=8, targets=["q_proj", "down_proj"]))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    texts = ("And it", "In the")
    return model, tokenizer, [{"prompt": "<|endoftext|>", "completion": text} for text in texts]


@pytest.fixture(scope="module")
def explorer(adapted):
    """Its losses are measured once, for all tests of this file."""
    return explorers.Explorer(explore, lambda: explore.strength_explorer(*adapted))


def test_headless_the_curve_of_the_explorer_is_the_loss_at_each_strength(adapted):
    model, tokenizer, records = adapted
    (figure,) = explorers.shown(explore, lambda: explore.strength_explorer(*adapted))
    _, trained, now = figure.axes[0].lines
    for strength, loss in zip(*trained.get_data()):
        with adapter_strength(model, strength):
            assert loss == pytest.approx(evaluate.text_loss(model, tokenizer, records)[0], rel=1e-5)
    assert list(now.get_xdata()) == [1.0] and now.get_ydata()[0] == trained.get_ydata()[4]


def test_one_layer_alone_is_turned_and_nothing_else(adapted, explorer):
    model, tokenizer, records = adapted
    name = "model.layers.1.mlp.down_proj"
    scalings = [layer.scaling for layer in lora_layers(model).values()]
    figure = explorer.figure(layer="1 · down_proj", strength=0.0)
    without = copy.deepcopy(model)
    without.get_submodule(name).lora_B.data.zero_()
    expected = evaluate.text_loss(without, tokenizer, records)[0]
    assert figure.axes[0].lines[2].get_ydata()[0] == pytest.approx(expected, rel=1e-5)
    assert "1 · down_proj" in explorers.title(figure, axes=1)
    assert scalings == [layer.scaling for layer in lora_layers(model).values()], (
        "the model must be left as it was"
    )


def test_the_singular_values_shown_are_those_of_the_correction(adapted, explorer):
    figure = explorer.figure(layer="2 · q_proj", strength=1.5)
    layer = adapted[0].get_submodule("model.layers.2.self_attn.q_proj")
    expected = 1.5 * torch.linalg.svdvals(layer.delta())[:4]
    assert torch.allclose(torch.as_tensor(figure.axes[1].lines[1].get_ydata()), expected, rtol=1e-4)


def test_the_control_has_the_same_singular_values_and_another_direction(adapted):
    model = adapted[0]
    for mine, other in zip(
        lora_layers(model).values(), lora_layers(explore.shuffled_adapter(model)).values()
    ):
        ours, theirs = mine.delta(), other.delta()
        assert torch.allclose(torch.linalg.svdvals(ours), torch.linalg.svdvals(theirs), atol=1e-5)
        cosine = (ours * theirs).sum() / ours.norm() / theirs.norm()
        assert abs(cosine) < 0.3


@pytest.mark.parametrize("strength", [0.0, 0.35, 2.0])
def test_the_explorer_draws_at_every_strength(explorer, strength):
    assert explorers.title(explorer.figure(strength=strength)) == f"Loss, all layers × {strength:g}"


def test_the_explorer_has_a_control_for_each_argument(adapted):
    explorer = explorers.Explorer(explore, lambda: explore.strength_explorer(*adapted), interactive=True)
    assert set(explorer.controls) == {"layer", "strength"}
    assert len(explorer.controls["layer"].options) == 1 + len(lora_layers(adapted[0]))


def test_the_explorer_refuses_what_it_cannot_turn(adapted):
    model, tokenizer, records = adapted
    with pytest.raises(ValueError, match="records is empty"):
        explore.strength_explorer(model, tokenizer, [])
    with pytest.raises(ValueError, match="not merged"):
        explore.strength_explorer(labkit.merge(copy.deepcopy(model)), tokenizer, records)
    with pytest.raises(ValueError, match="not merged"):
        explore.strength_explorer(torch.nn.Linear(2, 2), tokenizer, records)
