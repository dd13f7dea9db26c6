"""The furniture of `08_qlora_finetune`: checks that name mistakes, and the explorer of its tickets."""

import json
from types import SimpleNamespace

import pytest
import torch
from IPython.display import HTML

from labkit.data.batches import collate
from labkit.data.encoding import encode
from labkit.data.tickets import load_tickets
from labkit.lab.check import tickets as check
from labkit.lab.diagnosis import make_run, sick_runs, tiny_llama
from labkit.lab.explore import tickets as explore
from labkit.lab.explore.supervision import KINDS, kinds_of_tokens, show_supervision
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.quant.linear import _QuantizedLinear
from labkit.training.config import TrainConfig
from labkit.training.evaluate import held_out_loss
from labkit.training.loop import train
from labkit.training.metrics import score_json
from tests.lab import explorers


class Backward(torch.autograd.Function):
    """The solution of the first exercise; its mistakes below change one line."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x @ weight.dequantize(x.dtype).T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight.dequantize(grad.dtype), None


def backward_with(forward=None, backward=None):
    """The solution with another method in its place."""
    changed = {"forward": forward, "backward": backward}
    return type("Theirs", (Backward,), {k: staticmethod(v) for k, v in changed.items() if v})


def keep_dense(ctx, x, weight):
    ctx.save_for_backward(weight.dequantize(x.dtype))
    return x @ ctx.saved_tensors[0].T if ctx.saved_tensors else x @ weight.dequantize(x.dtype).T


def keep_dense_as_attribute(ctx, x, weight):
    ctx.weight, ctx.dense = weight, weight.dequantize(x.dtype)
    return x @ ctx.dense.T


def keep_x(ctx, x, weight):
    ctx.weight, ctx.x = weight, x
    return x @ weight.dequantize(x.dtype).T


def flat(tensor):
    return tensor.reshape(-1, tensor.shape[-1])


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (lambda x, w: x, "expected the class, a torch.autograd.Function"),
        (backward_with(lambda ctx, x, w: None), "stub been filled in"),
        (backward_with(lambda ctx, x, w: 1 / 0), "raised ZeroDivisionError"),
        (backward_with(lambda ctx, x, w: x), "forward pass is x W'"),
        (backward_with(keep_dense), "dense weight is kept .* bytes instead of the"),
        (backward_with(keep_dense_as_attribute), "dense weight is kept"),
        (backward_with(None, lambda ctx, g: None), "stub been filled in"),
        (backward_with(None, lambda ctx, g: 1 / 0), "raised ZeroDivisionError"),
        (backward_with(None, lambda ctx, g: "nonsense"), "one gradient for each input"),
        (
            backward_with(None, lambda ctx, g: (g @ ctx.weight.dequantize(g.dtype).T, None)),
            "weight is transposed",
        ),
        (backward_with(None, lambda ctx, g: g @ ctx.weight.dequantize(g.dtype)), "returns two values; got 1"),
        (backward_with(None, lambda ctx, g: (g @ ctx.weight.dequantize(g.dtype), g)), "second value is None"),
        (backward_with(None, lambda ctx, g: (g, None)), "passed on as it came"),
        (backward_with(None, lambda ctx, g: (0 * g, None)), "expected a gradient of shape"),
        (
            backward_with(None, lambda ctx, g: (g.float() @ ctx.weight.dequantize(torch.float32), None)),
            "gradient must be too",
        ),
        (
            backward_with(keep_x, lambda ctx, g: (flat(g).T @ flat(ctx.x), None)),
            "gradient of the weight, which is frozen",
        ),
    ],
)
def test_the_check_of_the_backward_pass_names_each_mistake(theirs, message):
    for _ in range(5):
        with pytest.raises(check.NotYet, match=message):
            check.quant_backward(theirs)


def test_the_check_of_the_backward_pass_accepts_the_solution_and_labkits_own(capsys):
    class Own(torch.autograd.Function):
        """That of `labkit.quant.linear`, which takes a bias and a dtype besides."""

        @staticmethod
        def forward(ctx, x, weight):
            return _QuantizedLinear.forward(ctx, x, weight, None, x.dtype)

        @staticmethod
        def backward(ctx, grad):
            ctx_like = SimpleNamespace(
                weight=ctx.weight, dtype=ctx.dtype, needs_input_grad=(True,) * 2 + (False,) * 2
            )
            return _QuantizedLinear.backward(ctx_like, grad)[:2]

    for _ in range(5):
        check.quant_backward(Backward)
        check.quant_backward(Own)
    assert capsys.readouterr().out.count("correct") == 10


def no_pair_twice(pairs):
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError("a key twice")
    return dict(pairs)


def strict(answer, gold):
    try:
        given = json.loads(answer, object_pairs_hook=no_pair_twice)
    except ValueError:
        return False
    return isinstance(given, dict) and json.dumps(given, sort_keys=True) == json.dumps(gold, sort_keys=True)


def loaded(compare):
    """A scorer that reads the answer and then asks `compare`; what cannot be read is wrong."""

    def score(answer, gold):
        try:
            given = json.loads(answer)
        except ValueError:
            return False
        return isinstance(given, dict) and bool(compare(given, gold))

    return score


def text_of(value):
    return json.dumps(value, sort_keys=True)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (lambda a, g: None, "stub been filled in"),
        (lambda a, g: json.loads(a) == g, "raised JSONDecodeError"),
        (lambda a, g: "a string", "expected True or False"),
        (lambda a, g: True, "a wrong value counted"),
        (lambda a, g: a.strip() == json.dumps(g), "keys of a JSON object have no order"),
        (lambda a, g: strict(a[: a.rfind("}") + 1], g), "text after the object counted"),
        (lambda a, g: strict(a.strip("`json\n "), g) or strict(a, g), "a fence around the object"),
        (loaded(lambda p, g: p == g), "1 counted for true"),
        (loaded(lambda p, g: all(str(p.get(k)) == str(g[k]) for k in g)), "counted where"),
        (
            loaded(lambda p, g: all(text_of(p.get(k)) == text_of(g[k]) for k in g)),
            "a missing field counted as null",
        ),
        (
            loaded(lambda p, g: all(k in p and text_of(p[k]) == text_of(g[k]) for k in g)),
            "a field too many counted",
        ),
        (loaded(lambda p, g: text_of(p) == text_of(g)), "a key twice, first with a wrong value"),
        (lambda a, g: strict(a.lower(), json.loads(json.dumps(g).lower())), "another case counted"),
    ],
)
def test_the_check_of_the_strict_scorer_names_each_mistake(theirs, message):
    for _ in range(20):
        with pytest.raises(check.NotYet, match=message):
            check.strict_match(theirs)


def test_the_check_of_the_strict_scorer_accepts_it_and_labkits_own_agrees(capsys):
    check.strict_match(strict)
    check.strict_match(lambda answer, gold: score_json([answer], [gold]).exact == 1)
    assert capsys.readouterr().out.count("correct") == 2


def adapters(run, which="lora_"):
    return [p for name, p in run.model.named_parameters() if which in name]


def doctor(run):
    if all(p.grad is None for p in adapters(run)):
        return "frozen"
    if (run.batch.targets == -100).all():
        return "nothing supervised"
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    return "healthy" if all(id(p) in held for p in adapters(run)) else "not in the optimizer"


def moved(run):
    return any(p.any() for p in adapters(run, "lora_B"))


def test_the_check_of_the_diagnosis_accepts_a_doctor(capsys):
    for _ in range(3):
        check.diagnose(doctor)
    assert capsys.readouterr().out.count("correct, on 4 fresh runs") == 3


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (lambda run: None, "stub been filled in"),
        (lambda run: 1 / 0, "raised ZeroDivisionError"),
        (lambda run: "lr too low", "expected one of 'healthy', 'frozen'"),
        (lambda run: "frozen", "whose losses fall"),
        (lambda run: "healthy" if moved(run) else "nothing supervised", "no gradient at all"),
        (lambda run: "healthy" if moved(run) else "not in the optimizer", "no gradient at all"),
        (
            lambda run: "not in the optimizer" if doctor(run) == "nothing supervised" else doctor(run),
            "loss is exactly 0",
        ),
        (lambda run: "frozen" if doctor(run) == "not in the optimizer" else doctor(run), "who moves them"),
    ],
)
def test_the_check_of_the_diagnosis_says_what_was_overlooked(theirs, message):
    with pytest.raises(check.NotYet, match=message):
        check.diagnose(theirs)


def test_a_sick_run_takes_its_steps_without_an_error_and_leaves_every_adapter_at_its_start():
    for run in sick_runs().values():
        assert len(run.losses) == 3 and len(set(run.losses)) == 1 and not moved(run)
        start = {name: p.clone() for name, p in run.model.named_parameters()}
        run.step()
        assert all(torch.equal(p, start[name]) for name, p in run.model.named_parameters())
    healthy = make_run("healthy", seed=5)
    assert moved(healthy) and healthy.losses[-1] < healthy.losses[0]


def test_labkits_own_loop_refuses_what_is_frozen_and_its_encoder_what_has_no_answer():
    frozen = make_run("frozen", seed=1)
    with pytest.raises(ValueError, match="requires a gradient|no parameter"):
        train(
            frozen.model,
            tiny_llama()[1],
            [{"prompt": "a", "completion": "b"}],
            TrainConfig(steps=1, progress=False),
        )
    with pytest.raises(ValueError, match="would be learned"):
        encode({"prompt": "", "completion": ""}, tiny_llama()[1])


def test_each_token_is_of_one_kind_and_the_supervised_ones_are_the_targets_of_a_batch(tokenizer, records):
    record = records[0]
    tokens = kinds_of_tokens(record, tokenizer)
    example = encode(record, tokenizer)
    assert [target for *_, target in tokens] == collate([example], 0).targets[0].tolist()
    joined = {kind: "".join(t for t, k, _ in tokens if k == kind) for kind in KINDS}
    system, user, assistant = (m["content"] for m in record["messages"])
    assert joined["supervised"] == assistant + "<|im_end|>"
    assert joined["prompt"] == system + user
    assert joined["template"].startswith("<|im_start|>system")


def test_a_picture_of_the_supervision_names_the_kinds_counts_them_and_shows_the_end_mark(tokenizer, records):
    page = show_supervision(records[0], tokenizer).data
    tokens = kinds_of_tokens(records[0], tokenizer)
    n = sum(kind == "supervised" for _, kind, _ in tokens)
    assert "template, no loss" in page and "prompt, no loss" in page and "SUPERVISED" in page
    assert f"{len(tokens)} tokens" in page and f"{n} supervised" in page
    assert "&lt;|im_end|&gt;" in page and "<|im_end|>" not in page
    plain = show_supervision({"prompt": "2 + 2 =", "completion": " <b>4</b>"}, tokenizer).data
    assert "&lt;" in plain and "<b>" not in plain and "template" in plain


def test_token_probabilities_multiply_to_the_loss(small_llama, tokenizer, records):
    chances = explore.token_probabilities(small_llama, encode(records[0], tokenizer))
    loss, tokens = held_out_loss(small_llama, tokenizer, records[:1])
    assert len(chances) == tokens and -chances.log().mean().item() == pytest.approx(loss, rel=1e-4)


def test_answer_table_marks_wrong_fields_and_escapes_html():
    page = explore.answer_table(
        "<b>hi</b>", {"base": "no json", "adapted": '{"a": "x", "b": 1}'}, {"a": "x", "b": 2}
    ).data
    assert "&lt;b&gt;hi" in page and "not JSON" in page
    assert page.count("underline wavy") == 1


def test_the_explorer_shows_a_table_and_the_probabilities_of_the_gold_answer(small_llama, tokenizer):
    torch.manual_seed(0)
    model = add_lora(small_llama, LoRAConfig(r=2))
    tickets = load_tickets("test")[:2]
    given = model, tokenizer, tickets, ["no json", "no json"], ["nor here", "nor here"]
    table, figure = explorers.shown(explore, lambda: explore.ticket_explorer(*given))
    assert isinstance(table, HTML) and tickets[0]["message"][:20] in table.data
    before, after = figure.axes[0].lines  # B = 0: the adapter changes nothing yet
    assert list(before.get_ydata()) == list(after.get_ydata())
    explorer = explorers.Explorer(explore, lambda: explore.ticket_explorer(*given), interactive=True)
    assert set(explorer.controls) == {"ticket", "strength"} and explorer.controls["ticket"].max == 1


def test_explorer_needs_an_answer_for_each_ticket(small_llama, tokenizer):
    with pytest.raises(ValueError, match="1 tickets with 0 and 1 answers"):
        explore.ticket_explorer(small_llama, tokenizer, [{}], [], ["x"])
