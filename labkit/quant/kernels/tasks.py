"""What the compiled loops of the CPU kernels have in common.

The loops are compiled by numba on first use and cached beside the package. The functions with `_task` in their name
are tasks for `threads.py`: they take addresses, cut the work, and call the loop. `cpu.py` puts their arguments
together, in the order in which the tasks read them.
"""

from pathlib import Path

from numba.core import types

from labkit.quant.kernels.outdated import forget_outdated

STEP = 32  # weights: 16 bytes, the two codes of each in a vector; every block size of `labkit.quant` is a multiple
TASK = types.void(types.CPointer(types.int64))

forget_outdated(Path(__file__).parent)  # before the first task is compiled: all of them need `TASK`
