"""Two small models, every method with a configuration, and what moves a method away from its start."""

import peft
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from labkit.alternatives.bottleneck import BottleneckConfig, add_bottleneck
from labkit.alternatives.ia3 import IA3Config, add_ia3
from labkit.alternatives.prefixes import PrefixConfig, add_prefix
from labkit.alternatives.prompts import PromptConfig, add_prompt

VOCAB, N = 199, 5


def llama(**changes):
    """Grouped-query attention, and weights large enough that what a method does is seen in the logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes | changes)).eval()


def gpt2(**changes):
    torch.manual_seed(0)
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.1} | changes
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **sizes)).eval()


MAKERS = {"llama": llama, "gpt2": gpt2}
METHODS = {
    "ia3": (add_ia3, IA3Config(), lambda: peft.IA3Config(task_type="CAUSAL_LM")),
    "prompt": (
        add_prompt,
        PromptConfig(N, init="random"),
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N),
    ),
    "prefix": (
        add_prefix,
        PrefixConfig(N),
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N),
    ),
    "prefix, MLP": (
        add_prefix,
        PrefixConfig(N, projection=24),
        lambda: peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=24
        ),
    ),
}
BOTTLENECKS = {
    form: (add_bottleneck, BottleneckConfig(size=8, form=form, scale=1.5)) for form in ("serial", "parallel")
}
ALL = {name: method[:2] for name, method in METHODS.items()} | BOTTLENECKS


def randomize(model, std=0.3):
    """Move what trains away from where it starts, which for most methods is the base model."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += std * torch.randn(parameter.shape, generator=generator)
    return model


def with_method(make, name):
    add, config = ALL[name]
    return randomize(add(make(), config))


def text(batch=3, time=9):
    return torch.randint(0, VOCAB, (batch, time), generator=torch.Generator().manual_seed(2))
