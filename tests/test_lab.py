"""The furniture: checks that name mistakes, predictions, claims, preflight, explorers in their static form."""

import json
import math

import pytest
import torch

from labkit import lab
from labkit.lab import check, claims, explore, interactive, machine
from labkit.lab.predictions import Prediction
from tests import exercise_checks


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
        ],
    )
    yield (
        check.lora_parameters,
        lambda shapes, r: sum(r * (a + b) for a, b in shapes),
        [
            (lambda shapes, r: sum(2 * r * (a + b) for a, b in shapes), "twice too many"),
            (lambda shapes, r: sum(a * b for a, b in shapes), "which LoRA freezes"),
        ],
    )
    yield (
        check.supervise,
        lambda p, c: [-100] * len(p) + c,
        [
            (lambda p, c: p + c, "prompt is supervised too"),
            (lambda p, c: c, "prompt is missing"),
            (lambda p, c: [-100] * (len(p) - 1) + c + [-100], "shifted by one already"),
        ],
    )
    yield (
        check.bits_per_weight,
        lambda b, n: 4 + 8 / b + 32 / (b * n),
        [
            (lambda b, n: 4 + 32 / b, "without double quantization"),
            (lambda b, n: 4 + 8 / b, "scales of the scales are missing"),
        ],
    )
    yield check.weight_bytes, lambda p, b: p * b / 8, [(lambda p, b: p * b, "that is bits")]
    yield (
        check.training_flops,
        lambda w, t, f: (4 if f else 6) * w * t,
        [
            (lambda w, t, f: 2 * w * t, "forward pass alone"),
            (lambda w, t, f: 6 * w * t, "frozen weight needs no gradient"),
        ],
    )
    yield (
        check.greedy_token,
        lambda x: int(x[-1].argmax()),
        [(lambda x: int(x[0].argmax()), "first position")],
    )


CASES = list(right_and_wrong())


@pytest.mark.parametrize(("checker", "right", "wrong"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_a_check_accepts_the_solution_and_names_each_mistake(checker, right, wrong, capsys):
    exercise_checks.accepts_the_solution_and_names_each_mistake(checker, right, wrong, capsys, times=100)


@pytest.mark.parametrize(("checker", "right", "wrong"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_a_check_survives_stubs_exceptions_and_nonsense(checker, right, wrong):
    exercise_checks.survives_stubs_exceptions_and_nonsense(checker)


def test_prediction_headless_shows_the_choices_then_the_answer(monkeypatch, capsys):
    monkeypatch.setenv("LABKIT_STATIC", "1")
    prediction = lab.predict("How many?", ["one", "two"])
    assert prediction.choice is None
    prediction.reveal("two", "Because.")
    with pytest.raises(ValueError, match="none of the choices"):
        prediction.reveal("three", "")
    with pytest.raises(ValueError, match="at least two different"):
        Prediction("?", ["same", "same"])


def test_prediction_with_widgets_tells_the_reader_what_they_said(monkeypatch):
    shown = []
    monkeypatch.setenv("LABKIT_STATIC", "0")
    monkeypatch.setattr(
        "labkit.lab.predictions.display", lambda item: shown.append(getattr(item, "data", item))
    )
    prediction = lab.predict("How many?", ["one", "two"])
    prediction.reveal("two", "Because.")
    assert "made no prediction" in shown[-1]
    prediction.buttons.value = "one"
    prediction.reveal("two", "Because.")
    assert "You said: one." in shown[-1]
    prediction.buttons.value = "two"
    prediction.reveal("two", "Because.")
    assert "You had it." in shown[-1]


def test_claims_are_recorded_in_the_output_and_gathered(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(claims, "display", lambda data, raw: shown.append(data))
    lab.claim("C10", "later", "refuted", "3 > 2")
    lab.claim("C2", "earlier", "confirmed", "0 == 0")
    cell = {
        "cell_type": "code",
        "outputs": [{"output_type": "display_data", "data": json.loads(json.dumps(d))} for d in shown],
    }
    (tmp_path / "02_x.ipynb").write_text(json.dumps({"cells": [cell]}))
    rows = claims.ledger(tmp_path)
    assert [(r["claim"], r["verdict"], r["notebook"]) for r in rows] == [
        ("C2", "confirmed", "02_x.ipynb"), ("C10", "refuted", "02_x.ipynb"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="choose one of"):
        lab.claim("C1", "x", "true", "y")
    with pytest.raises(ValueError, match="needs evidence"):
        lab.claim("C1", "x", "confirmed", " ")


@pytest.mark.parametrize(
    ("units", "dtype", "says"),
    [
        (True, torch.bfloat16, "multiply in bfloat16: this processor has matrix units"),
        (False, torch.float32, "multiply in float32: this processor has no matrix units"),
    ],
)
def test_products_in_four_bit_layers_take_the_dtype_of_the_matrix_units(
    monkeypatch, capsys, units, dtype, says
):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": units})
    chosen = lab.profile(name="cpu")
    assert (chosen.dtype, chosen.product_dtype) == (torch.float32, dtype)
    assert says in capsys.readouterr().out


def test_profile_is_cpu_without_a_gpu_and_says_why(monkeypatch, capsys):
    monkeypatch.setattr("labkit.lab.profiles.best_device", lambda: torch.device("cpu"))
    chosen = lab.profile()
    assert (chosen.name, chosen.dtype, chosen.model) == ("cpu", torch.float32, "smollm2-135m")
    assert "on cpu in float32 (" in capsys.readouterr().out
    monkeypatch.setenv("LABKIT_MODEL", "some/model")
    assert lab.profile().model == "some/model"
    with pytest.raises(ValueError, match="PyTorch sees no GPU"):
        lab.profile(name="gpu")
    with pytest.raises(ValueError, match="choose 'cpu' or 'gpu'"):
        lab.profile(name="tpu")


def test_profile_is_gpu_where_there_is_one(monkeypatch):
    module = "labkit.lab.profiles."
    monkeypatch.setattr(module + "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(module + "compute_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr(module + "memory_bytes", lambda *_: 24 * 2**30)
    chosen = lab.profile()
    assert (chosen.name, chosen.device.type, chosen.dtype) == ("gpu", "cuda", torch.bfloat16)
    assert lab.profile(name="cpu").dtype == torch.float32


def test_preflight_lines_say_what_to_do_when_something_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "gflops", lambda: 20.0)
    monkeypatch.setattr(machine, "gigabytes_per_second", lambda: 5.0)
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "nothing-yet"))
    monkeypatch.setattr(machine, "memory_bytes", lambda _: 2 * 2**30)
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    lines = {line.what: line for line in lab.preflight()}
    assert lines["packages"].state == "problem" and "no-such-package" in lines["packages"].found
    assert [lines[w].state for w in ("model", "memory", "speed")] == ["warning"] * 3
    assert all(line.advice for line in lines.values() if line.state != "OK")


def test_measured_speeds_are_plausible():
    assert 1 < machine.gflops(0.1) < 1e6 and 0.5 < machine.gigabytes_per_second(0.1) < 1e4


def test_interactive_only_where_somebody_can_click(monkeypatch):
    for name in ("LABKIT_STATIC", "JPY_SESSION_NAME", "VSCODE_PID"):
        monkeypatch.delenv(name, raising=False)
    assert not interactive.is_interactive()
    monkeypatch.setenv("JPY_SESSION_NAME", "x")
    assert interactive.is_interactive()
    monkeypatch.setenv("LABKIT_STATIC", "1")
    assert not interactive.is_interactive()


def test_token_probabilities_multiply_to_the_loss(small_llama, tokenizer, records):
    from labkit.data.encoding import encode
    from labkit.training.evaluate import held_out_loss

    chances = explore.token_probabilities(small_llama, encode(records[0], tokenizer))
    loss, tokens = held_out_loss(small_llama, tokenizer, records[:1])
    assert len(chances) == tokens and -chances.log().mean().item() == pytest.approx(loss, rel=1e-4)


def test_answer_table_marks_wrong_fields_and_escapes_html():
    page = explore.answer_table(
        "<b>hi</b>", {"base": "no json", "adapted": '{"a": "x", "b": 1}'}, {"a": "x", "b": 2}
    ).data
    assert "&lt;b&gt;hi" in page and "no JSON" in page
    assert page.count("underline wavy") == 1


def test_explorer_needs_an_answer_for_each_ticket(small_llama, tokenizer):
    with pytest.raises(ValueError, match="1 tickets with 0 and 1 answers"):
        explore.ticket_explorer(small_llama, tokenizer, [{}], [], ["x"])


@pytest.mark.parametrize(("dtype", "longer"), [(torch.bfloat16, False), (torch.float32, True)])
def test_preflight_expects_more_minutes_without_matrix_units(monkeypatch, dtype, longer):
    monkeypatch.setattr(machine, "product_dtype", lambda _: dtype)
    monkeypatch.setattr(machine, "gflops", lambda: machine.REFERENCE_GFLOPS)
    monkeypatch.setattr(machine, "gigabytes_per_second", lambda: 10.0)
    name = "08_qlora_finetune"
    minutes = (machine.WITHOUT_MATRIX_UNITS if longer else machine.COURSE_MINUTES)[name]
    assert f"{name} {minutes:.1f}" in machine.speed_line().found
