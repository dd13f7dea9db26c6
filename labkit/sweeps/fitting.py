"""The model of a run: prepared as its config says, and trained."""

from dataclasses import replace

import torch
from torch import nn

from labkit import models
from labkit.alternatives.ia3 import add_ia3
from labkit.alternatives.sized import SIZED_METHODS
from labkit.analysis.subspace import add_subspace, matching_lr
from labkit.hardware import best_device, product_dtype
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.qlora import add_qlora
from labkit.sweeps.config import RunConfig
from labkit.training.history import History
from labkit.training.loop import train


def prepare(config: RunConfig) -> tuple[nn.Module, object]:
    """The model of a run, ready to train, and its tokenizer.

    Raises:
        ValueError: the adapter does not fit the model, for instance r above a layer's width.
        labkit.models.ModelUnavailable: the model is neither here nor to be downloaded.
    """
    device = best_device()
    model, tokenizer = models.load(config.model, torch.float32, device)
    torch.manual_seed(config.seed)
    if config.method == "qlora":
        products = getattr(torch, config.products) if config.products else product_dtype(device)
        add_qlora(model, config.lora_config(), compute_dtype=products)
    elif config.method == "lora":
        add_lora(model, config.lora_config())
    elif config.method == "subspace":
        add_subspace(model, config.d, config.seed)
    elif config.method == "ia3":
        add_ia3(model)
    elif config.method in SIZED_METHODS:
        SIZED_METHODS[config.method].add_to(model, config.size)
    else:
        model.requires_grad_(config.method == "full")
    if config.adapter_dtype != "float32":
        for layer in lora_layers(model).values():
            for matrix in (layer.lora_A, layer.lora_B):
                matrix.data = matrix.data.to(getattr(torch, config.adapter_dtype))
    if config.embeddings is not None:
        model.get_input_embeddings().weight.requires_grad_(config.embeddings)
    return model, tokenizer


def fit(config: RunConfig, records: list[dict]) -> tuple[nn.Module, object, History | None]:
    """Prepare and train; the model, its tokenizer, and the history (None for method "none").

    Args:
        config: of the run.
        records: of its task, all of them; `config.examples` of them are trained on.

    Raises:
        ValueError, labkit.models.ModelUnavailable, labkit.TrainingDiverged: see `labkit.sweeps.runs.run`.
    """
    model, tokenizer = prepare(config)
    if config.method == "none":
        return model, tokenizer, None
    training = config.train_config()
    if config.method == "subspace":  # a rate then means the same step of a weight as in full fine-tuning
        training = replace(training, lr=matching_lr(model, config.lr))
    history = train(model, tokenizer, records[: config.examples], training)
    if history.stopped == "interrupted":
        raise KeyboardInterrupt  # half a run is not a result
    return model, tokenizer, history
