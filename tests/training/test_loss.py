"""The loss of a step: the number that transformers computes, from scores at supervised positions alone."""

import pytest
import torch

from labkit.data.batches import collate
from labkit.data.encoding import encode_all
from labkit.hardware import set_fast
from labkit.training.loss import supervised_loss
from tests.conftest import make_small_llama
from tests.training.small_runs import batch_of, with_random_adapter


@pytest.mark.parametrize("logits", ["supervised", "all"])
def test_loss_equals_transformers_own_with_labels(small_llama, records, tokenizer, logits):
    batch = batch_of(records, tokenizer)
    reference = small_llama(
        input_ids=batch.ids, attention_mask=(batch.ids != -1).long(), labels=batch.targets
    ).loss
    ours = supervised_loss(small_llama, batch, logits) / batch.n_supervised
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_padding_changes_no_supervised_loss(small_llama, records, tokenizer):
    examples = encode_all(records[:4], tokenizer, 512)[0]
    together = supervised_loss(small_llama, collate(examples, 2))
    alone = sum(supervised_loss(small_llama, collate([e], 2)) for e in examples)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_logits_are_made_at_supervised_positions_only(small_llama, records, tokenizer):
    batch, shapes = batch_of(records, tokenizer), []
    hook = small_llama.lm_head.register_forward_hook(lambda _, __, out: shapes.append(out.shape))
    supervised_loss(small_llama, batch)
    hook.remove()
    assert shapes == [(1, batch.n_supervised, 49152)]
    assert batch.n_supervised < batch.ids.numel() / 2


def test_without_fast_paths_it_is_cross_entropy_of_the_scores_that_the_output_layer_makes(records, tokenizer):
    """The reference and the loss in chunks: the same number to 1e-6, the same gradients to 1e-5."""
    model, batch, shapes = with_random_adapter(make_small_llama()), batch_of(records, tokenizer), []
    fast, fast_gradients = loss_and_gradients(model, batch)
    model.lm_head.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    set_fast(False)
    try:
        reference, gradients = loss_and_gradients(model, batch)
    finally:
        set_fast(True)
    assert shapes == [(1, batch.n_supervised, 49152)]
    torch.testing.assert_close(fast, reference, rtol=1e-6, atol=0)
    assert (fast_gradients - gradients).norm() < 1e-5 * gradients.norm()


def loss_and_gradients(model, batch):
    model.zero_grad()
    value = supervised_loss(model, batch) / batch.n_supervised
    value.backward()
    return value.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_the_model_has_no_hooks_left_also_after_an_error(small_llama, records, tokenizer):
    def stop(*_):
        raise RuntimeError("stop")

    handle = small_llama.model.norm.register_forward_hook(stop)
    for model in (small_llama, small_llama.requires_grad_(False)):
        with pytest.raises(RuntimeError, match="stop"):
            supervised_loss(model, batch_of(records, tokenizer))
        assert not small_llama.lm_head._forward_pre_hooks
    handle.remove()
