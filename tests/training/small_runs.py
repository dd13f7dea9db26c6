"""Small models with adapters, and the settings of a short run."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from labkit.data.batches import collate
from labkit.data.encoding import encode_all
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.quant.model import quantize_model
from tests.conftest import make_small_llama

QUIET = {"progress": False, "batch_size": 2, "steps": 6, "lr": 1e-2}
# eight records for a model that takes milliseconds a step, with the tokenizer of tiny-llama
SHORT = [
    {"prompt": f"{a} and", "completion": f" {b}"}
    for a in ("sun", "tea")
    for b in ("moon", "milk", "so on", "rain")
]


def tiny_llama(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes | changes)).eval()


def tiny_adapted(model_changes=None, **config):
    model = tiny_llama(**model_changes or {})
    torch.manual_seed(3)
    return add_lora(model, LoRAConfig(**{"r": 2, "targets": ["q_proj", "v_proj"]} | config))


def adapted(quantized=False, **config):
    model = make_small_llama()
    if quantized:
        quantize_model(model, progress=False)
    torch.manual_seed(3)
    return add_lora(model, LoRAConfig(r=4, **config))


def with_random_adapter(model):
    """`model` with an adapter that changes its output: B is not zero."""
    torch.manual_seed(0)
    add_lora(model, LoRAConfig(r=4, alpha=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def batch_of(records, tokenizer):
    return collate(encode_all(records[:4], tokenizer, 512)[0], tokenizer.pad_token_id)
