"""How fast are our kernels? Ours, bitsandbytes and torchao in turns, on the same tensors, in one run.

    python tests/benchmarks/bench_quant.py [--sizes 576 4096] [--threads 1 2] [--repeats 9] [--dtype float32]

For every size, number of threads and kind of scales: the median of `repeats` rounds, in ms, of five times as many up to
2048; in a round everyone takes one turn, so that a slow moment of the machine hits all. Ratios above 1 mean that ours is
faster.

The two sides of a dequantization do not do the same: bitsandbytes returns new memory every time, and 64 MB of it cost
more in page faults than the work. So ours is measured twice: into memory that exists (`out=`), beside `copy_` into
the same memory, the usual yardstick (which reads as much as it writes), and `fill_`, which only writes: about the least
that any kernel could take (stores past the caches may beat it), so "bnb/fill" is about the most that "bnb/out=" could become. And into new memory, beside `clone` and
bitsandbytes. torchao's columns need its package: `make bench` installs it.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from labkit.quant import tensor

SIZES = (576, 1536, 2048, 4096, 8192)


def median_ms(turns: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Milliseconds of each, taken in turns; the first round, which compiles and warms up, does not count."""
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(repeats + 1):
        for name, turn in turns.items():
            start = time.perf_counter()
            result = turn()
            seconds = time.perf_counter() - start
            del result  # freeing is not part of the time, but must happen before the next turn
            if i:
                taken[name].append(1e3 * seconds)
    return {name: statistics.median(ms) for name, ms in taken.items()}


def peers() -> tuple:
    """bitsandbytes.functional and torchao's `to_nf4`, or None for what is not installed."""
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        bnb = None
    try:
        from torchao.dtypes.nf4tensor import to_nf4
    except ImportError:
        try:
            from torchao.quantization import to_nf4
        except ImportError:
            to_nf4 = None
    return bnb, to_nf4


def bench(size: int, double_quant: bool, dtype: torch.dtype, repeats: int, bnb, to_nf4) -> dict[str, float]:
    """Times in ms for one square weight."""
    torch.manual_seed(0)
    weight = torch.randn(size, size).to(dtype)
    ours = tensor.quantize(weight, double_quant=double_quant)
    out = torch.zeros_like(weight)
    quantize = {"quantize ours": lambda: tensor.quantize(weight, double_quant=double_quant)}
    dequantize = {
        "fill_": lambda: out.fill_(1.0),
        "copy_": lambda: out.copy_(weight),
        "ours out=": lambda: ours.dequantize(out=out),
        "clone": lambda: weight.clone(),
        "ours new": lambda: ours.dequantize(),
    }
    if bnb is not None:
        settings = {"quant_type": "nf4", "compress_statistics": double_quant}
        packed, state = bnb.quantize_4bit(weight, **settings)
        quantize["quantize bnb"] = lambda: bnb.quantize_4bit(weight, **settings)
        dequantize["bnb"] = lambda: bnb.dequantize_4bit(packed, state)
    if to_nf4 is not None and double_quant and size * size // 64 % 256 == 0:
        # torchao always quantizes its scales, and wants whole blocks of them
        theirs = to_nf4(weight)
        quantize["quantize torchao"] = lambda: to_nf4(weight)
        dequantize["torchao"] = lambda: theirs.get_original_weight()
    if size <= 2048:  # below a millisecond a median of few says little
        repeats *= 5
    return median_ms(dequantize, repeats) | median_ms(quantize, max(2, repeats // 3))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    arguments = parser.parse_args()
    bnb, to_nf4 = peers()
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {platform.processor() or 'CPU'}"
    )
    print(
        f"bitsandbytes {'present' if bnb else 'NOT INSTALLED'}, torchao {'present' if to_nf4 else 'NOT INSTALLED'}"
    )
    print(f"NF4, block 64, {arguments.dtype}; DQ: with double quantization; ms, and ours against …\n")
    print(
        f"{'size':>5} {'thr':>3} {'DQ':>3} | {'fill_':>7} {'copy_':>7} {'out=':>7} {'x copy':>6} | {'clone':>7} {'new':>7} {'bnb':>7} "
        f"{'torchao':>8} {'bnb/fill':>8} {'bnb/out=':>8} {'bnb/new':>7} | {'quant':>7} {'bnb':>8} {'torchao':>8} {'bnb/ours':>8}"
    )
    for size in arguments.sizes:
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for double_quant in (False, True):
                ms = bench(
                    size, double_quant, getattr(torch, arguments.dtype), arguments.repeats, bnb, to_nf4
                )
                get = lambda name, ms=ms: ms.get(name, float("nan"))  # noqa: E731
                print(
                    f"{size:5} {threads:3} {'yes' if double_quant else 'no':>3} | {ms['fill_']:7.2f} {ms['copy_']:7.2f}"
                    f" {ms['ours out=']:7.2f}"
                    f" {ms['ours out='] / ms['copy_']:6.2f} | {ms['clone']:7.2f} {ms['ours new']:7.2f} {get('bnb'):7.2f}"
                    f" {get('torchao'):8.1f} {get('bnb') / ms['fill_']:8.2f} {get('bnb') / ms['ours out=']:8.2f} {get('bnb') / ms['ours new']:7.2f}"
                    f" | {ms['quantize ours']:7.2f} {get('quantize bnb'):8.1f} {get('quantize torchao'):8.1f}"
                    f" {get('quantize bnb') / ms['quantize ours']:8.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
