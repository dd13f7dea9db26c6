"""Batches: each example once per epoch, in an order that pads little and depends only on the seed."""

import torch

from labkit.data.batches import batch_order
from labkit.data.encoding import encode_all
from labkit.data.tickets import load_tickets, ticket_chat


def test_batches_cover_an_epoch_once_and_are_the_same_for_the_same_seed():
    lengths = [(7 * i) % 50 + 1 for i in range(103)]
    order = batch_order(lengths, 8, seed=1, epoch=0)
    assert sorted(i for batch in order for i in batch) == list(range(103))
    assert order == batch_order(lengths, 8, seed=1, epoch=0) != batch_order(lengths, 8, seed=1, epoch=1)


def test_batching_by_length_pads_less_than_a_plain_shuffle(tokenizer):
    examples, _ = encode_all([ticket_chat(t) for t in load_tickets("train")], tokenizer, 512)
    lengths = [len(e) for e in examples]

    def padded(batches):
        return sum(len(b) * max(lengths[i] for i in b) for b in batches) / sum(lengths)

    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [order[i : i + 8] for i in range(0, len(order), 8)]
    assert padded(batch_order(lengths, 8, 0, 0)) < 1.08 < padded(shuffled)
