"""What stands in for a layer answers as the layer does, to questions, casts and copies."""

import copy
import pickle

import pytest
import torch
from torch import nn

from labkit.models.stand_in import StandIn


class Doubled(StandIn):
    @property
    def weight(self):
        return 2 * self.base.weight

    @property
    def broken(self):
        return self.base.nothing

    def forward(self, x):
        return 2 * self.base(x)


def test_what_it_does_not_have_it_asks_of_its_base():
    base = nn.Embedding(10, 4, padding_idx=3)
    layer = Doubled(base)
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (10, 4, 3)
    assert torch.equal(layer.weight, 2 * base.weight), "what it has itself is its own"
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing
    with pytest.raises(AttributeError):
        _ = layer.broken
    assert not hasattr(layer, "broken")
    assert [name for name, _ in layer.named_parameters()] == ["base.weight"]


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_is_whole_and_its_own(make_copy):
    layer = Doubled(nn.Linear(3, 2))
    layer.aside = (nn.Linear(3, 2),)
    other = make_copy(layer)
    assert other.base is not layer.base and torch.equal(other.weight, layer.weight)
    assert torch.equal(other.aside[0].weight, layer.aside[0].weight) and other.aside[0] is not layer.aside[0]


def test_what_is_aside_is_moved_and_cast_and_never_counted_or_saved():
    model = nn.Sequential(Doubled(nn.Linear(3, 2)))
    kept = nn.Linear(3, 2)
    model[0].aside = (kept,)
    assert len(list(model.parameters())) == 2 and list(model.state_dict()) == ["0.base.weight", "0.base.bias"]
    assert kept.weight.dtype == torch.float32
    model.bfloat16()
    assert kept.weight.dtype == torch.bfloat16
    model.to("meta")
    assert kept.weight.is_meta
