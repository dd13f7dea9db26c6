"""The same run twice: by labkit, and by TRL over PEFT (and bitsandbytes), from the same adapter on the same batches.

Each function makes one of the two sides, or compares them; the rungs themselves are the tests. Where TRL or datasets
is not installed, the tests of this folder are skipped, and the report of pytest says why.
"""

import contextlib
import copy
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
)

import labkit
from labkit import models
from labkit.data.batches import IGNORE, Batch, endless_batches, make_batch_of
from labkit.data.encoding import encode
from labkit.data.tickets import load_tickets
from labkit.formats.trl_settings import bitsandbytes_settings, peft_settings, sft_settings
from labkit.lora.inject import lora_layers
from labkit.paths import data_folder
from labkit.training.limits import padding_id
from labkit.training.loss import supervised_loss

MISSING = "TRL is not installed here, so nothing is held against it: pip install trl datasets"
pytest.importorskip("datasets", reason=MISSING)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    trl = pytest.importorskip("trl", reason=MISSING)

FP32 = labkit.QuantConfig(scale_rounding="lookup", compute_dtype=torch.float32)
LORA = labkit.LoRAConfig(r=4, alpha=8, targets=["q_proj", "v_proj", "down_proj"])
TRAIN = labkit.TrainConfig(
    lr=5e-3, steps=6, batch_size=2, batching="shuffled", warmup=0.0, max_length=1024, progress=False
)


@dataclass
class Case:
    """A base on disk, as both sides load it, and where its adapters go."""

    folder: Path
    tokenizer: PreTrainedTokenizerFast
    lora: labkit.LoRAConfig

    def model(self) -> nn.Module:
        """The base in fp32, of our loading."""
        return models.load(self.folder, torch.float32)[0]

    def four_bit(self) -> nn.Module:
        """The base in NF4 with double quantization, as transformers and bitsandbytes load it, never packed."""
        return never_packed(self.four_bit_as_loaded())

    def four_bit_as_loaded(self) -> nn.Module:
        settings = BitsAndBytesConfig(**bitsandbytes_settings(FP32))
        return AutoModelForCausalLM.from_pretrained(
            self.folder, quantization_config=settings, dtype=torch.float32, device_map="cpu"
        )


def never_packed(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes 0.50 from packing its weights for a processor with AVX512-BF16 when it first evaluates.

    Packed, their scales are rounded to bf16, and no gradient passes through them, in training mode either.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def tiny_llama() -> Case:
    folder = data_folder() / "tiny-llama"
    return Case(folder, PreTrainedTokenizerFast.from_pretrained(folder), LORA)


def small_neox(folder: Path) -> Case:
    """Another architecture: fused query, key and value, biases, layers in parallel, LayerNorm, an output of its own."""
    case = tiny_llama()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = GPTNeoXConfig(vocab_size=len(case.tokenizer), **sizes, initializer_range=0.1)
    model = GPTNeoXForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    case.tokenizer.save_pretrained(folder)
    lora = labkit.LoRAConfig(r=4, alpha=8, targets=["query_key_value", "dense_4h_to_h"])
    return Case(folder, case.tokenizer, lora)


def records() -> list[dict]:
    """Tickets as prompt and completion: to name the product."""
    tickets = [ticket for ticket in load_tickets("train") if ticket["label"]["product"]][:24]
    return [
        {"prompt": f"{ticket['message']}\nProduct:", "completion": f" {ticket['label']['product']}"}
        for ticket in tickets
    ]


def in_our_order(rows: Sequence[dict], tokenizer, config: labkit.TrainConfig) -> list[dict]:
    """The records in the order in which `labkit.train` takes them, one batch after the other, for all its steps."""
    lengths = [len(encode(row, tokenizer)) for row in rows]
    batches = endless_batches(lengths, config.batch_size, config.seed, config.batching)
    taken = list(islice(batches, config.total_steps(len(rows)) * config.accumulation))
    return [rows[i] for batch in taken for i in batch]


def first_batch(case: Case, model: nn.Module, config: labkit.TrainConfig = TRAIN) -> Batch:
    """The first batch of a run of ours."""
    rows = in_our_order(records(), case.tokenizer, config)[: config.batch_size]
    return make_batch_of([encode(row, case.tokenizer) for row in rows], padding_id(case.tokenizer, model))


def ours(case: Case, four_bit: bool = False) -> nn.Module:
    """The base with an adapter of ours, whose B is not zero, so that every matrix has a gradient."""
    model = case.model()
    if four_bit:
        labkit.quantize_model(model, FP32, progress=False)
    torch.manual_seed(1)
    labkit.add_lora(model, case.lora)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(std=0.02)
    return model


def pairs(mine: nn.Module, theirs: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Each matrix of our adapter and the same one of PEFT's."""
    found = {}
    for name, layer in lora_layers(mine).items():
        other = theirs.base_model.model.get_submodule(name)
        found[f"{name} A"] = (layer.lora_A, other.lora_A["default"].weight)
        found[f"{name} B"] = (layer.lora_B, other.lora_B["default"].weight)
    return found


class Recording(trl.SFTTrainer):
    """TRL's trainer, which also keeps the loss of each step as it is, without rounding."""

    def training_step(self, *arguments, **named):
        loss = super().training_step(*arguments, **named)
        vars(self).setdefault("parts", []).append(loss.item())
        return loss

    def losses(self) -> list[float]:
        n = self.args.gradient_accumulation_steps
        return [sum(self.parts[i : i + n]) for i in range(0, len(self.parts), n)]


@contextlib.contextmanager
def quiet():
    """Without bars and warnings of the libraries."""
    import datasets

    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def their_trainer(
    case: Case,
    mine: nn.Module,
    folder: Path,
    config: labkit.TrainConfig = TRAIN,
    four_bit: bool = False,
    undo_cast: bool = True,
    rows: list[dict] | None = None,
    **settings,
) -> Recording:
    """TRL's trainer for the run that `labkit.train(mine, …, config)` is; its adapter starts as that of `mine`.

    Args:
        undo_cast: TRL puts the adapter of a quantized base in bf16; put it back in fp32.
        rows: to train on; default: `records()`. They come in our order.
        settings: of SFTConfig, besides those that `config` means.
    """
    from datasets import Dataset
    from peft import LoraConfig

    rows = in_our_order(records() if rows is None else rows, case.tokenizer, config)
    arguments = sft_settings(config) | {"train_sampling_strategy": "sequential", "use_cpu": True} | settings
    with quiet():
        trainer = Recording(
            model=case.four_bit() if four_bit else case.model(),
            args=trl.SFTConfig(output_dir=str(folder), **arguments),
            train_dataset=Dataset.from_list(rows),
            processing_class=copy.deepcopy(case.tokenizer),
            peft_config=LoraConfig(**peft_settings(case.lora)),
        )
    with torch.no_grad():
        for my, their in pairs(mine, trainer.model).values():
            if undo_cast:
                their.data = their.data.float()
            their.copy_(my)
    trainer.remove_callback(PrinterCallback)
    return trainer


def their_loss(trainer: Recording) -> torch.Tensor:
    """The loss of the trainer's first batch, in training mode, as its first step would take it."""
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    supervised = (inputs["labels"][:, 1:] != IGNORE).sum()
    return trainer.compute_loss(trainer.model.train(), inputs, num_items_in_batch=supervised)


def first_losses(case: Case, mine: nn.Module, trainer: Recording) -> tuple[torch.Tensor, torch.Tensor]:
    """Our loss of the first batch, and theirs, after the backward pass of both."""
    batch = first_batch(case, mine)
    loss = supervised_loss(mine, batch) / batch.n_supervised
    theirs = their_loss(trainer)
    loss.backward()
    theirs.backward()
    return loss, theirs


@dataclass
class Gap:
    """The largest differences of two runs: of a loss, and of a matrix of the adapter, relative to its norm."""

    loss: float
    weight: float
    rates: list[float]  # of our steps


def train_both(
    case: Case,
    mine: nn.Module,
    trainer: Recording,
    config: labkit.TrainConfig = TRAIN,
    rows: list[dict] | None = None,
) -> Gap:
    """Take all steps on both sides, on these rows; default: `records()`."""
    history = labkit.train(mine, case.tokenizer, records() if rows is None else rows, config)
    with quiet():
        trainer.train()
    losses = [abs(a - b) for a, b in zip(history.losses, trainer.losses(), strict=True)]
    weights = [((a - b.float()).norm() / a.norm()).item() for a, b in pairs(mine, trainer.model).values()]
    return Gap(max(losses), max(weights), [step["lr"] for step in history.steps])


@torch.no_grad()
def loss_of_first(case: Case, model: nn.Module) -> float:
    """The loss of the first batch, by transformers' own loss, of either side."""
    batch = first_batch(case, model)
    return model(input_ids=batch.ids, labels=batch.targets, use_cache=False).loss.item()


@torch.no_grad()
def their_answer(model: nn.Module, tokenizer, prompt: str, most: int) -> str:
    """What transformers' `generate` writes after one prompt, greedily."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    model.eval()
    written = model.generate(
        input_ids=ids["input_ids"],
        attention_mask=ids["attention_mask"],
        do_sample=False,
        max_new_tokens=most,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = written[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def with_settings(config: labkit.TrainConfig = TRAIN, **changes) -> labkit.TrainConfig:
    return replace(config, **changes)
