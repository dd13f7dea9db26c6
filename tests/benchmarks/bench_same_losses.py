"""Do the losses of the first steps of the course's fine-tuning depend on whose 4-bit layers are below the adapters?

SmolLM2-135M, the tickets, r=16 on all linear layers, 2 examples a step at lr 2e-3, as in the notebook on QLoRA, with the same
adapters, seed and batches: once over our QuantLinear and once over bitsandbytes' Linear4bit. The weights are the same
bits (with bitsandbytes' own rounding of the scales), so only the rounding of fp32 sums can differ.

    python tests/benchmarks/bench_same_losses.py [--steps 20]
"""

import argparse

import torch
from bench_train_step import bitsandbytes_model

from labkit import models
from labkit.data.tickets import load_tickets, ticket_chat
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.quant.model import quantize_model
from labkit.training.config import TrainConfig
from labkit.training.loop import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    ours, tokenizer = models.load("smollm2-135m")
    quantize_model(ours, progress=False, scale_rounding="lookup")
    chats = [ticket_chat(ticket) for ticket in load_tickets("train")]
    config = TrainConfig(lr=2e-3, steps=steps, batch_size=2, schedule="constant", progress=False)
    losses = []
    for model in (ours, bitsandbytes_model()):
        torch.manual_seed(0)
        add_lora(model, LoRAConfig(r=16, alpha=32))
        losses.append(train(model, tokenizer, chats, config).losses)
    print("step   labkit        bitsandbytes  relative difference")
    for step, (a, b) in enumerate(zip(*losses), 1):
        print(f"{step:4}   {a:.8f}    {b:.8f}    {abs(a - b) / b:.1e}")
    print(f"largest relative difference: {max(abs(a - b) / b for a, b in zip(*losses)):.1e}")


if __name__ == "__main__":
    main()
