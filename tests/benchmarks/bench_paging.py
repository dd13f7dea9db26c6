"""What paging costs: training steps with the optimizer's state under budgets of 100, 50, 25 and 10 %, against the unpaged step.

Two runs: LoRA (r=16 on all linears) on SmolLM2-135M with 8 × 80 tokens, and full fine-tuning of tiny-llama on the same batch.
Each budget has a model of its own, and all alternate in one run, so that a busy machine slows all of them. The medians and
their ratios to the unpaged step are printed; so are page faults, bytes moved and time waited in a step, and whether the
losses are those of the unpaged run, bit for bit. A budget below the state of the largest parameter is raised to that: tiny-llama's
embedding takes a quarter of all.

    python tests/benchmarks/bench_paging.py [--only lora|full] [--rounds 7] [--policy lru|mru]
"""

import argparse
import copy
import statistics
import time

import torch

from labkit import models
from labkit.data.batches import Batch
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.optim.paging import attach_paging
from labkit.training.loss import supervised_loss

BATCH, TOKENS, SUPERVISED, RANK = 8, 80, 40, 16
SHARES = (None, 1.0, 0.5, 0.25, 0.1)


def make_batch(vocabulary: int) -> Batch:
    """8 × 80 random tokens, of which the last 40 are supervised."""
    ids = torch.randint(100, vocabulary, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    targets = ids.clone()
    targets[:, :-SUPERVISED] = -100
    return Batch(ids, targets)


def base(kind: str):
    if kind == "full":
        return models.load("tiny-llama")[0].train()
    model, _ = models.load("smollm2-135m")
    torch.manual_seed(0)
    return add_lora(model, LoRAConfig(r=RANK, alpha=32)).train()


def state_bytes(parameters) -> tuple[int, int]:
    """All of AdamW's state, and that of the largest parameter, as the pager counts it."""
    optimizer = torch.optim.AdamW(parameters)
    with attach_paging(optimizer, 2**50) as pager:
        return pager.table.total_bytes, max(page.nbytes for page in pager.table.pages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("lora", "full"))
    parser.add_argument("--policy", choices=("lru", "mru"), default="lru")
    arguments = parser.parse_args()
    for kind in ("lora", "full"):
        if arguments.only in (None, kind):
            measure(kind, arguments.rounds, arguments.policy)


def measure(kind: str, rounds: int, policy: str) -> None:
    """Print the table of one of the two runs."""
    first = base(kind)
    batch = make_batch(first.config.vocab_size)
    total, largest = state_bytes([p for p in first.parameters() if p.requires_grad])
    runs = {}
    for share in SHARES:
        model = copy.deepcopy(first)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        if share is not None:
            attach_paging(optimizer, max(largest, int(share * total)), policy=policy)
        runs[share] = model, optimizer, [], [], []  # seconds of the step, of the optimizer alone, losses
    for i in range(rounds + 2):  # the first makes the state, the second pages it in; they are not counted
        for model, optimizer, seconds, stepping, losses in runs.values():
            started = time.perf_counter()
            loss = supervised_loss(model, batch) / batch.n_supervised
            loss.backward()
            backward = time.perf_counter()
            optimizer.step()
            ended = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            if i > 1:
                seconds.append(ended - started)
                stepping.append(ended - backward)
    name = "LoRA r=16, SmolLM2-135M" if kind == "lora" else "full fine-tuning, tiny-llama"
    threads = torch.get_num_threads()
    print(
        f"{name}: {total / 1e6:.1f} MB of state, the largest parameter's {largest / 1e6:.1f} MB; {policy}, {threads} threads"
    )
    unpaged = [statistics.median(values) for values in runs[None][2:4]]
    for share, (_, optimizer, seconds, stepping, losses) in runs.items():
        step, alone = statistics.median(seconds), statistics.median(stepping)
        line = f"  {'unpaged' if share is None else f'{optimizer.pager.table.budget / total:.0%}':8} step {step:6.3f} s ({step / unpaged[0]:.2f}×), optimizer {alone:6.3f} s ({alone / unpaged[1]:.2f}×)"
        if share is not None:
            table, steps = optimizer.pager.table, rounds + 1  # without the step that made the state
            moved = (table.bytes_in + table.bytes_out) / 1e6 / steps
            line += (
                f"   {(table.counts['fault'] + table.counts['prefetch']) / steps:5.0f} pages in, {moved:6.1f} MB moved, "
                f"{table.seconds_waiting / steps:.3f} s waited a step; peak {table.peak_bytes / 1e6:.1f} MB; "
                f"losses {'the same' if losses == runs[None][4] else 'DIFFER'}"
            )
        print(line, flush=True)


if __name__ == "__main__":
    main()
