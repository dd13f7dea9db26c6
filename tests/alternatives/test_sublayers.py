"""Where a method may take hold: layers by name, and what is said of models that do not have them."""

import pytest
import torch
from transformers import BertConfig, BertModel

from labkit.alternatives.bottleneck import BottleneckConfig, add_bottleneck
from labkit.alternatives.ia3 import IA3Config, add_ia3
from labkit.lora.count import trainable
from tests.alternatives.cases import llama


def test_layers_that_are_not_there_are_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"'k_porj' matches no linear layer.*did you mean 'k_proj'\?"):
        add_ia3(llama(), IA3Config(outputs=["k_porj"], inputs=[]))
    bert = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    with pytest.raises(ValueError, match="none of the names that .IA..3 knows"):
        add_ia3(bert)
    assert all(p.requires_grad for p in bert.parameters())
    with pytest.raises(ValueError, match="a block of it has: attention, intermediate, output"):
        add_bottleneck(bert, BottleneckConfig(4, where=("mlp",)))
    with pytest.raises(ValueError, match="does not say how wide"):
        add_bottleneck(torch.nn.Linear(2, 2), BottleneckConfig(4))
    with pytest.raises(ValueError, match="size=64 is not a bottleneck in a model of width 64"):
        add_bottleneck(llama(), BottleneckConfig(64))


def test_layers_with_other_names_can_be_named():
    bert = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    )
    add_ia3(bert, IA3Config(outputs=["key", "value"], inputs=["0.output.dense"]))
    assert trainable(bert).trainable == 32 + 32 + 48
