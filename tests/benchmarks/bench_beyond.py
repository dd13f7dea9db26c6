"""What does each method cost when it is used? Table 1 of the LoRA paper, with more rows: latency beside that of the base.

Every method sits on the same base, whose weights all of them share, and takes turns with the others in one run, so that a busy
machine slows all of them. Two things are timed: reading, one forward pass over (batch, tokens) as in the paper, and writing, `generate`
from a short prompt. Medians, and the median of the ratios to the base *of the same round*, are printed, beside the exact counts
of `labkit.alternatives.cost.cost`. "again" is the base a second time: what it differs by is noise.

    python tests/benchmarks/bench_beyond.py [--model smollm2-135m] [--rounds 5] [--only read|write] [--tokens 32]
"""

import argparse
import copy
import statistics
import time

import torch

from labkit import models
from labkit.alternatives.bottleneck import BottleneckConfig, add_bottleneck
from labkit.alternatives.cost import cost, prefill_flops
from labkit.alternatives.ia3 import add_ia3, merge_ia3
from labkit.alternatives.methods import method_of
from labkit.alternatives.prefixes import PrefixConfig, add_prefix
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.lora.config import LoRAConfig
from labkit.lora.count import trainable
from labkit.lora.inject import add_lora
from labkit.lora.merging import merge

# (batch, tokens): the paper's (32, 512), (16, 256), (1, 128), in proportion
SHAPES = (
    (8, 128),
    (4, 64),
    (1, 32),
)
PROMPT = 16  # tokens before the writing begins


def contenders(name: str) -> tuple[dict, dict]:
    """Models by name, sharing all weights that none of them changed, and their costs."""
    base, _ = models.load(name)
    base.eval().requires_grad_(False)

    def fresh():
        return copy.deepcopy(base, {id(p): p for p in base.parameters()})

    both = ("attention", "mlp")
    turns = {
        "base": base,
        "base, again": fresh(),
        "LoRA r=16": add_lora(fresh(), LoRAConfig(r=16)),
        "LoRA r=16, merged": merge(add_lora(fresh(), LoRAConfig(r=16))),
        "(IA)^3": add_ia3(fresh()),
        "(IA)^3, merged": merge_ia3(add_ia3(fresh())),
        "bottleneck, serial, 32": add_bottleneck(fresh(), BottleneckConfig(32, where=both)),
        "bottleneck, parallel, 32": add_bottleneck(fresh(), BottleneckConfig(32, "parallel", where=both)),
        "prompt, 20": add_prompt(fresh(), PromptConfig(20)),
        "prefix, 20": add_prefix(fresh(), PrefixConfig(20)),
    }
    costs = {n: cost(m) for n, m in turns.items() if method_of(m) is not None}
    return {n: m.eval() for n, m in turns.items()}, costs


def alternate(turns: dict, run, rounds: int) -> dict[str, list[float]]:
    """Seconds of `run(model)`, in turns; the first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(rounds + 1):
        for name, model in turns.items():
            started = time.perf_counter()
            run(model)
            if i:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def report(title: str, seconds: dict[str, list[float]], unit: float = 1.0) -> None:
    print(f"\n{title}")
    for name, taken in seconds.items():
        ratio = statistics.median(t / b for t, b in zip(taken, seconds["base"]))
        print(f"  {name:26} {1000 * statistics.median(taken) / unit:9.2f} ms  {ratio - 1:+7.1%}", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="to write")
    parser.add_argument("--only", choices=("read", "write"))
    arguments = parser.parse_args()
    turns, costs = contenders(arguments.model)
    print(f"{arguments.model}, fp32, {torch.get_num_threads()} threads, {arguments.rounds} rounds")
    for name, model in turns.items():
        if name in costs:
            read = prefill_flops(model, SHAPES[-1][1])
            print(f"  {name:26} {costs[name]}; reading {SHAPES[-1][1]} tokens {read:,} FLOPs")
        elif name.startswith("LoRA"):
            print(f"  {name:26} {trainable(model).trainable:,} parameters train")
    ids = torch.randint(
        0, turns["base"].config.vocab_size, (8, 128), generator=torch.Generator().manual_seed(0)
    )
    if arguments.only != "write":
        for batch, tokens in SHAPES:
            one = ids[:batch, :tokens]
            # the scores of the last token only, as when a text is read to be continued
            seconds = alternate(
                turns, lambda m, x=one: m(x, use_cache=False, logits_to_keep=1), arguments.rounds
            )
            report(f"reading, batch {batch} × {tokens} tokens", seconds)
    if arguments.only != "read":
        one, n = ids[:1, :PROMPT], arguments.tokens
        options = dict(max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
        options["attention_mask"] = torch.ones_like(one)
        seconds = alternate(turns, lambda m: m.generate(input_ids=one, **options), arguments.rounds)
        report(f"writing {n} tokens after {PROMPT}, batch 1, per token", seconds, unit=n)


if __name__ == "__main__":
    main()
