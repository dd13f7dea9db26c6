"""Models with adapters to save, their outputs, and folders with altered tensors."""

import torch
from safetensors.torch import load_file, save_file

from labkit.formats import peft_folder
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.quant.model import quantize_model
from tests.conftest import make_small_llama
from tests.lora.cases import IDS as SHORT
from tests.lora.cases import make_model

IDS = torch.arange(40).view(2, 20)


def adapted(seed=0, quantized=False, **config):
    model = make_small_llama(seed)
    if quantized:
        quantize_model(model, progress=False)
    add_lora(model, LoRAConfig(**{"r": 4, "alpha": 8} | config))
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def change_tensors(folder, change):
    tensors = load_file(folder / peft_folder.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / peft_folder.WEIGHTS)


def untied():
    return make_model(tie_word_embeddings=False)


@torch.no_grad()
def outputs(model):
    return model.eval()(input_ids=SHORT)[0]
