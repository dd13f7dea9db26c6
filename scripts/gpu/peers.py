"""The same models in the hands of PEFT and bitsandbytes, set up as their documentation says."""

from typing import Any

import torch
from torch import nn

from labkit.memory.random_weights import random_model
from labkit.memory.setup import DTYPES, Setup
from labkit.models.surgery import is_output_layer, replace_module


def peft_lora(config, setup: Setup, device: torch.device) -> nn.Module:
    """PEFT's LoRA over a model in 16 bits."""
    return adapted(dense(config, setup, device), setup)


def peft_qlora(config, setup: Setup, device: torch.device) -> nn.Module:
    """PEFT's LoRA over the 4-bit layers of bitsandbytes: NF4, double-quantized."""
    model = in_four_bits(dense(config, setup, device), DTYPES[setup.dtype], device)
    return adapted(model, setup)


def dense(config, setup: Setup, device: torch.device) -> nn.Module:
    """The model without adapters and in full precision, frozen."""
    return random_model(config, Setup(**vars(setup) | {"method": "full"}), device).requires_grad_(False)


def in_four_bits(model: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Every linear layer but the output as bitsandbytes' Linear4bit; one dense weight after the other is let go."""
    import bitsandbytes as bnb

    options: dict[str, Any] = {"compute_dtype": dtype, "quant_type": "nf4", "compress_statistics": True}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and not is_output_layer(model, layer):
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, device="meta", **options
            )
            new.weight = bnb.nn.Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
            )
            replace_module(model, name, new.to(device))
    model.is_loaded_in_4bit = True  # by which PEFT knows that its own layers for bitsandbytes are wanted
    return model


def adapted(model: nn.Module, setup: Setup) -> nn.Module:
    """PEFT's LoRA of the rank of `setup` on every linear layer."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=setup.r, lora_alpha=2 * setup.r, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).train()
