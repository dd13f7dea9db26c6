"""Costs are what torch counts, what the cache holds, and what the papers' closed forms say."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from labkit.alternatives.bottleneck import BottleneckConfig, add_bottleneck
from labkit.alternatives.cost import cost, prefill_flops
from labkit.alternatives.ia3 import add_ia3, merge_ia3
from labkit.alternatives.prefixes import PrefixConfig, add_prefix, fold_prefix
from labkit.alternatives.prompts import PromptConfig, add_prompt
from tests.alternatives.cases import ALL, MAKERS, N, llama, randomize, text


def flops(model, ids, **inputs):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = model(ids, **inputs)
    return counter.get_total_flops(), out


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_costs_are_what_torch_counts_and_the_cache_holds(make, name):
    base, model = (
        make(attn_implementation="eager"),
        randomize(ALL[name][0](make(attn_implementation="eager"), ALL[name][1])),
    )
    if name == "prefix, MLP":
        fold_prefix(model)  # the MLP belongs to training
    counted, ids = cost(model), text(1, 11)
    (read, start), (base_read, base_start) = flops(model, ids), flops(base, ids)
    assert read - base_read == prefill_flops(model, 11)
    extra = start.past_key_values.layers[1], base_start.past_key_values.layers[1]
    held, base_held = (layer.keys.nbytes + layer.values.nbytes for layer in extra)
    assert held - base_held == counted.cache_bytes_per_layer
    written, _ = flops(model, ids[:, :1], past_key_values=start.past_key_values)
    base_written, _ = flops(base, ids[:, :1], past_key_values=base_start.past_key_values)
    assert written - base_written == counted.flops_per_token
    assert counted.kept == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_counts_of_the_papers():
    s = llama().config
    kv, inner, d = s.num_key_value_heads * 16, s.intermediate_size, s.hidden_size
    assert cost(add_ia3(llama())).trained == 2 * (kv + kv + inner)
    assert cost(add_prompt(llama(), PromptConfig(N))).trained == N * d
    prefix = cost(add_prefix(llama(), PrefixConfig(N)))
    assert prefix.trained == N * 2 * 2 * kv and prefix.lost_positions == N
    m = 8  # Houlsby et al.: 2 m d + d + m for each adapter, two in a block
    assert cost(add_bottleneck(llama(), BottleneckConfig(m))).trained == 2 * 2 * (2 * m * d + d + m)
    only = add_bottleneck(llama(), BottleneckConfig(m, where=("mlp",)))
    assert cost(only).trained == 2 * (2 * m * d + d + m)
    model = add_ia3(llama())
    assert cost(model).elementwise_per_token == cost(model).trained
    merged = cost(merge_ia3(model))
    assert merged.elementwise_per_token == merged.kept == 0 and merged.merges


def test_counts_for_llama_2_7b_from_its_shapes_alone():
    """By the closed forms of the papers, for 32 blocks of width 4096 with an MLP of 11008."""

    def trained(add, *config):
        with torch.device("meta"):
            return cost(add(LlamaForCausalLM(LlamaConfig()), *config)).trained

    assert trained(add_ia3) == 32 * (4096 + 4096 + 11008) == 614_400
    assert trained(add_bottleneck, BottleneckConfig(64)) == 64 * (2 * 64 * 4096 + 4096 + 64) == 33_820_672
    assert trained(add_prompt, PromptConfig(20)) == 20 * 4096
    assert trained(add_prefix, PrefixConfig(20)) == 20 * 32 * 2 * 4096 == 5_242_880
