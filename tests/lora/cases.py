"""Small models of several families, adapters on them as if trained, and PEFT's model of the same."""

import bitsandbytes as bnb
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from labkit.lora.inject import lora_layers
from labkit.models.surgery import is_output_layer, replace_module

IDS = torch.arange(24).view(2, 12)


# widths of whole blocks of 64: bitsandbytes 0.50 dequantizes others wrongly on a CPU (see test_quant.py)
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_model(kind=LlamaForCausalLM, config=LlamaConfig, seed=0, **changes):
    torch.manual_seed(seed)
    return kind(config(**SIZES | changes)).eval()


def make_gpt2(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()


FAMILIES = {
    "gpt2": make_gpt2,
    "bert": lambda: make_model(BertModel, BertConfig),
    "qwen2": lambda: make_model(Qwen2ForCausalLM, Qwen2Config),
    "qwen3": lambda: make_model(Qwen3ForCausalLM, Qwen3Config, head_dim=16),
    "gemma": lambda: make_model(GemmaForCausalLM, GemmaConfig, head_dim=16),
    "gemma2": lambda: make_model(Gemma2ForCausalLM, Gemma2Config, head_dim=16),
    "mistral": lambda: make_model(MistralForCausalLM, MistralConfig),
}


def with_bitsandbytes(model):
    """Every linear layer but the output in bitsandbytes' NF4, as transformers' load_in_4bit leaves it."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and not is_output_layer(model, linear):
            theirs = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=torch.float32,
                quant_type="nf4",
            )
            theirs.load_state_dict(linear.state_dict())
            replace_module(model, name, theirs.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def peft_model(model, variant="lora", **settings):
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | settings
    kinds = {"use_rslora": variant.startswith("rs"), "use_dora": variant.endswith("dora")}
    return get_peft_model(model, PeftConfig(**settings, **kinds)).train()


def randomize(model, seed=1):
    """An adapter as after training: no B is zero, no magnitude is a norm."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for parameter in layer.parameters(recurse=False):
            if parameter.dim() == 1:
                parameter.data *= 1 + 0.2 * torch.randn(parameter.shape, generator=generator)
            else:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def their_parameters(layer):
    parts = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
    if layer.lora_magnitude_vector:
        parts["lora_magnitude"] = layer.lora_magnitude_vector["default"].weight
    return parts


def give(ours, theirs):
    """Copy our adapter into PEFT's."""
    modules = dict(theirs.get_base_model().named_modules())
    for name, layer in lora_layers(ours).items():
        for part, tensor in their_parameters(modules[name]).items():
            tensor.data.copy_(getattr(layer, part).data)


def assert_same_logits_loss_and_gradients(ours, theirs):
    results = []
    for model in (ours, theirs):
        out = model(input_ids=IDS)
        if hasattr(out, "logits"):
            loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
            results.append((out.logits, loss))
        else:
            results.append(
                (out.last_hidden_state, out.last_hidden_state.pow(3).mean() + out.pooler_output.mean())
            )
        results[-1][1].backward()
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)
    modules = dict(theirs.get_base_model().named_modules())
    layers = lora_layers(ours)
    assert layers and any(layer.lora_B.grad.abs().max() > 1e-5 for layer in layers.values())
    for name, layer in layers.items():
        for part, tensor in their_parameters(modules[name]).items():
            gradient = getattr(layer, part).grad
            assert (gradient - tensor.grad).norm() <= 1e-5 * max(1, tensor.grad.norm()), f"{name}.{part}"
            torch.testing.assert_close(gradient, tensor.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits
