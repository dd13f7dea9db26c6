"""How fast does a 4-bit model write? SmolLM2-135M, greedy, 64 tokens, in fp32 and in 4 bits, with and without adapters.

All take turns in one run; a turn is one `generate` with a cache, and tokens per second count the prompt's pass too.
"4-bit, W' made" is the same model without the kernel that multiplies without dequantizing (`FEW_ROWS = 0`).

    python tests/benchmarks/bench_generate.py [--batch 1] [--rounds 5] [--tokens 64]
"""

import argparse
import copy
import statistics
import time

import torch
from bench_train_step import bitsandbytes_model

from labkit import models
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.quant import direct
from labkit.quant.model import quantize_model

PROMPT = "The three things to know about low-rank adaptation are"


def contenders() -> tuple:
    """The tokenizer, and models by name; all from the same base."""
    base, tokenizer = models.load("smollm2-135m")
    four_bit = copy.deepcopy(base)
    quantize_model(four_bit, progress=False)
    config = LoRAConfig(r=16, alpha=32)
    return tokenizer, {
        "fp32": base,
        "fp32 + LoRA": add_lora(copy.deepcopy(base), config),
        "4-bit": four_bit,
        "4-bit + LoRA (QLoRA)": add_lora(copy.deepcopy(four_bit), config),
        "4-bit + LoRA, W' made": add_lora(copy.deepcopy(four_bit), config),
        "4-bit, bitsandbytes": bitsandbytes_model(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    tokenizer, turns = contenders()
    inputs = tokenizer([PROMPT] * arguments.batch, return_tensors="pt", add_special_tokens=False)
    length = {"min_new_tokens": arguments.tokens, "max_new_tokens": arguments.tokens}
    options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id or 0, **length}
    few_rows = direct.FEW_ROWS
    speeds: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(arguments.rounds + 1):  # the first round warms up and is not counted
        for name, model in turns.items():
            direct.FEW_ROWS = 0 if name.endswith("made") else few_rows
            started = time.perf_counter()
            model.generate(**inputs, **options)
            if i:
                speeds[name].append(arguments.batch * arguments.tokens / (time.perf_counter() - started))
    direct.FEW_ROWS = few_rows
    print(f"batch {arguments.batch}, {arguments.tokens} tokens, {torch.get_num_threads()} threads")
    for name, speed in speeds.items():
        median = statistics.median(speed)
        print(
            f"{name:22} {median:6.1f} tokens/s, {median / statistics.median(speeds['fp32']):.2f} × fp32, "
            f"{median / statistics.median(speeds['fp32 + LoRA']):.2f} × fp32 + LoRA   (best {max(speed):.1f})"
        )


if __name__ == "__main__":
    main()
