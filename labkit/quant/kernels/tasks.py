"""What the compiled loops of the CPU kernels have in common.

numba compiles the loops on first use and caches them beside the package. The functions with `_task` in their
name are tasks for `threads.py`: they take addresses, cut the work, and call the loop. `cpu.py` puts their
arguments together, in the order in which the tasks read them.
"""

from pathlib import Path

from numba.core import types

from labkit.quant.kernels.outdated import forget_outdated

# weights whose codes, 16 bytes, are handled at once; every block size of `labkit.quant` is a multiple
STEP = 32
TASK = types.void(types.CPointer(types.int64))

forget_outdated(Path(__file__).parent)  # before the first task is compiled: all of them need `TASK`
