"""Plan and simulate a QLoRA step of a large model: seconds, the most memory that it took here, and how well the two agree.

python tests/benchmarks/bench_simulate.py [llama-3-70b] [--max-length 1024]
"""

import argparse
import time

from labkit.memory.formulas import plan
from labkit.memory.ledger import size
from labkit.memory.resident import status
from labkit.memory.simulation import simulate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="llama-3-70b")
    parser.add_argument("--max-length", type=int, default=1024)
    arguments = parser.parse_args()
    how = dict(checkpointing=True, max_length=arguments.max_length)
    ledgers = []
    for name, predict in (("plan", plan), ("simulate", simulate)):
        started, cpu = time.perf_counter(), time.process_time()
        ledgers.append(predict(arguments.model, "qlora", **how))
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        print(
            f"{name:9} peak {size(ledgers[-1].peak)}   {seconds:6.1f} s ({cpu:.1f} s of CPU), "
            f"at most {size(status('VmHWM'))} resident",
            flush=True,
        )
    print(f"plan / simulate: {ledgers[0].peak / ledgers[1].peak:.4f}")


if __name__ == "__main__":
    main()
