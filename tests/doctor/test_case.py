"""What the doctor hears of a record is the whole model's answer, whether it computes all logits or the last ones."""

import pytest
import torch
from torch.nn import functional as F

from labkit.data.encoding import encode
from labkit.doctor import case as case_of
from labkit.doctor.case import Case, heard_of, last_logits
from labkit.doctor.specimens import adapted, train_records


@pytest.fixture
def example(moved):
    return encode(train_records()[0], moved[1])


def without_the_option(model):
    """As a wrapper of a server does: a forward with fewer arguments."""
    forward = model.forward

    def plain(input_ids=None, use_cache=None):
        return forward(input_ids=input_ids, use_cache=use_cache)

    model.forward = plain
    return model


@pytest.mark.parametrize("wrap", [lambda model: model, without_the_option], ids=["last logits", "all logits"])
@torch.no_grad()
def test_what_is_heard_of_a_record_is_the_cross_entropy_of_its_answer(moved, example, wrap):
    model = moved[0].eval()
    ids = torch.tensor([example.prompt + example.completion])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    n = len(example.completion)
    wanted = F.cross_entropy(logits[-n - 1 : -1], ids[0, -n:], reduction="sum")
    heard = heard_of(wrap(model), example)
    assert heard.loss == pytest.approx(wanted.item(), rel=1e-5) and heard.tokens == n
    torch.testing.assert_close(heard.first, logits[-n - 1])
    assert heard.end == pytest.approx(
        logits[-example.end - 1].softmax(0)[ids[0, -example.end]].item(), rel=1e-4
    )


@torch.no_grad()
def test_a_model_that_can_computes_no_other_logits(moved, example):
    model, shapes = moved[0].eval(), []
    model.lm_head.register_forward_hook(lambda module, given, out: shapes.append(out.shape[1]))
    heard_of(model, example)
    assert shapes == [len(example.completion) + 1]
    assert last_logits(model, torch.tensor([example.prompt]), 2).shape[0] == 2 == shapes[-1]


def test_a_larger_model_reads_fewer_records_and_never_fewer_than_two(moved, monkeypatch):
    model, tokenizer = moved
    size = sum(p.numel() for p in model.parameters())
    patient = Case(model, tokenizer, train_records())
    longest = max(len(one) for one in patient.examples)
    read = []
    for tokens in (10**6, 5 * longest, 1):
        monkeypatch.setattr(case_of, "WORK", size * tokens)
        read.append(len(patient.chosen(patient.examples)))
    assert read[0] == case_of.PASSES and 5 <= read[1] < case_of.PASSES and read[2] == 2


def test_over_four_bits_as_many_records_are_read(moved, monkeypatch):
    patients = [Case(adapted(0, variant, r=2), moved[1], train_records()) for variant in ("lora", "qlora")]
    size = sum(p.numel() for p in patients[0].model.parameters())
    monkeypatch.setattr(case_of, "WORK", size * 300)
    plain, four_bits = (len(patient.chosen(patient.examples)) for patient in patients)
    assert plain == four_bits < case_of.PASSES
