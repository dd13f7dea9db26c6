"""Packed examples: no padding, the same loss and the same training as padded ones, and no example sees another."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from labkit.data.batches import IGNORE, collate, pack
from labkit.data.encoding import Encoded
from labkit.training.config import TrainConfig
from labkit.training.loop import train
from labkit.training.loss import supervised_loss
from labkit.training.readiness import check_packs
from tests.training.small_runs import SHORT, tiny_adapted, tiny_llama, weights

TEXTS = [Encoded([5, 6, 7], [8, 9]), Encoded([], [10, 11, 12]), Encoded([13], [14])]


def test_a_packed_row_holds_each_token_once_and_predicts_no_first_token_from_another_example():
    batch = pack(TEXTS)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1]]
    _ = IGNORE
    assert batch.targets.tolist() == [[_, _, _, 8, 9, _, 11, 12, _, 14]]
    assert batch.n_supervised == sum(one.n_supervised for one in TEXTS) == 5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_loss_of_a_packed_row_is_that_of_its_examples_one_by_one(attention):
    model = tiny_llama(attn_implementation=attention)
    packed = supervised_loss(model, pack(TEXTS))
    alone = sum(supervised_loss(model, collate([one], 0)) for one in TEXTS)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    unmasked = supervised_loss(model, pack(TEXTS, masked=False))
    assert abs(unmasked - alone) > 1e-3  # and without the mask it is another number


def test_training_packed_is_training_shuffled_without_the_padding(tiny):
    def trained(batching):
        model = tiny_adapted()
        config = TrainConfig(steps=6, batch_size=4, lr=1e-2, batching=batching, progress=False)
        return train(model, tiny[1], SHORT, config).losses, weights(model)

    (losses, packed), (expected, shuffled) = trained("packed"), trained("shuffled")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed, shuffled, rtol=1e-3, atol=1e-5)
    assert trained("packed, unmasked")[0] != pytest.approx(expected, rel=1e-4)


class OwnAttention(nn.Module):
    """A causal model with an attention of its own, which does not look at positions: a running mean."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(32, 8)

    def forward(self, input_ids, position_ids=None, use_cache=False):
        x = self.embedding(input_ids)
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return type("Output", (), {"logits": F.linear(mean, self.embedding.weight)})


def test_a_model_that_does_not_mask_by_positions_is_refused(tiny):
    with pytest.raises(ValueError, match="reads from one example of a packed row into the next"):
        check_packs(OwnAttention(), TEXTS)
    check_packs(tiny_llama(), TEXTS)
