"""The loss in chunks: the same number and gradients as over all logits, and none of these kept."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from labkit.data.batches import IGNORE, Batch
from labkit.hardware import set_fast
from labkit.training import chunked_loss, loss
from labkit.training.loss import supervised_loss
from tests.conftest import make_small_llama
from tests.training.small_runs import with_random_adapter


def make_batch(supervised: int = 40) -> Batch:
    """4 × 50 random tokens, of which the last are supervised in each row: with 40, more than one chunk."""
    ids = torch.randint(100, 900, (4, 50), generator=torch.Generator().manual_seed(0))
    targets = ids.clone()
    targets[:, : 50 - supervised] = IGNORE
    return Batch(ids, targets)


def loss_and_gradients(model, batch, logits):
    model.zero_grad()
    value = supervised_loss(model, batch, logits) / batch.n_supervised
    value.backward()
    return value.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def chunks(monkeypatch):
    """Calls of the chunked loss, as numbers of rows."""
    seen = []
    original = chunked_loss.ChunkedCrossEntropy.apply
    monkeypatch.setattr(
        chunked_loss.ChunkedCrossEntropy, "apply", lambda h, w, t: seen.append(len(t)) or original(h, w, t)
    )
    return seen


@pytest.mark.parametrize("rows", [1, 7, 160, 1000])
def test_in_chunks_it_has_the_loss_and_gradients_of_all_logits(monkeypatch, rows):
    seen = chunks(monkeypatch)
    monkeypatch.setattr(chunked_loss, "ROWS", rows)
    model, batch = with_random_adapter(make_small_llama()), make_batch()
    ours, theirs = loss_and_gradients(model, batch, "supervised"), loss_and_gradients(model, batch, "all")
    assert seen == [160]
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
    assert (ours[1] - theirs[1]).norm() < 1e-5 * theirs[1].norm()


def test_capped_logits_are_noticed_and_taken_as_they_are(monkeypatch):
    seen = chunks(monkeypatch)
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16
    )
    config = Gemma2Config(vocab_size=1000, num_key_value_heads=1, final_logit_softcapping=0.5, **sizes)
    model, batch = with_random_adapter(Gemma2ForCausalLM(config)), make_batch()
    for _ in range(2):  # the first call looks, the second remembers
        ours, theirs = loss_and_gradients(model, batch, "supervised"), loss_and_gradients(model, batch, "all")
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
        assert (ours[1] - theirs[1]).norm() < 1e-5 * theirs[1].norm()
    assert seen == []


def test_a_trained_output_layer_gets_its_gradient(monkeypatch):
    seen = chunks(monkeypatch)
    model = make_small_llama().requires_grad_(True)
    ours, theirs = (loss_and_gradients(model, make_batch(), logits) for logits in loss.LOGITS)
    assert seen == [] and (ours[1] - theirs[1]).norm() < 1e-5 * theirs[1].norm()


def test_autograd_keeps_no_logits():
    model, saved = with_random_adapter(make_small_llama()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        supervised_loss(model, make_batch())
        chunked = list(saved)
        supervised_loss(model, make_batch(), "all")
    assert (160, 49152) in saved
    assert (160, 49152) not in chunked


def test_without_gradients_and_without_supervised_tokens():
    model = with_random_adapter(make_small_llama())
    with torch.no_grad():
        value = supervised_loss(model, make_batch())
        torch.testing.assert_close(value, supervised_loss(model, make_batch(), "all"), rtol=1e-6, atol=0)
    nothing = supervised_loss(model, make_batch(supervised=0))
    assert nothing.item() == 0
    nothing.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_under_autocast_the_loss_is_that_of_all_logits(monkeypatch):
    seen = chunks(monkeypatch)
    model = with_random_adapter(make_small_llama())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (supervised_loss(model, make_batch(), logits) for logits in loss.LOGITS)
    assert seen == []
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)


def test_with_fast_paths_off_nothing_is_chunked(monkeypatch):
    seen, model = chunks(monkeypatch), with_random_adapter(make_small_llama())
    set_fast(False)
    try:
        supervised_loss(model, make_batch())
    finally:
        set_fast(True)
    assert seen == []
    supervised_loss(model, make_batch())
    assert seen == [160]


@pytest.mark.parametrize("looked", [False, True])
def test_an_assumption_about_the_logits_ends_with_its_block(monkeypatch, looked):
    seen, model, rows = chunks(monkeypatch), with_random_adapter(make_small_llama()), []
    if looked:
        supervised_loss(model, make_batch())
    model.lm_head.register_forward_hook(lambda _, __, out: rows.append(out.shape[1]))
    with chunked_loss.assume_unchanged(model.lm_head, True):
        supervised_loss(model, make_batch())
    with chunked_loss.assume_unchanged(model.lm_head, False):
        supervised_loss(model, make_batch())
    assert seen == (2 if looked else 1) * [160]
    assert rows == [0, 160]  # in chunks, the output layer itself scores nothing; otherwise everything
    supervised_loss(model, make_batch())
    assert rows[2:] == ([0] if looked else [1, 1])  # one row to look, and the same row again to compare


@pytest.mark.parametrize("wrong", [-1, 49152])
def test_a_target_that_is_no_id_is_an_error_and_never_another_row_of_the_scores(wrong):
    """Python counts from the end at -1; torch's cross-entropy refuses it, and so must the fast path."""
    model, batch = with_random_adapter(make_small_llama()), make_batch()
    batch.targets[0, -1] = wrong
    for logits in loss.LOGITS:
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            supervised_loss(model, batch, logits)


def test_in_a_wrapper_the_loss_is_that_of_the_model(monkeypatch):
    seen, model = chunks(monkeypatch), with_random_adapter(make_small_llama())
    for wrapped in (torch.nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert torch.equal(supervised_loss(wrapped, make_batch()), supervised_loss(model, make_batch()))
    assert seen == 4 * [160]
