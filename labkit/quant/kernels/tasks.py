"""What the compiled loops of the CPU kernels have in common.

numba compiles the loops on first use, and `kept.py` keeps them. The functions with `_task` in their
name are tasks for `threads.py`: they take addresses, cut the work, and call the loop. `cpu.py` puts their
arguments together, in the order in which the tasks read them.
"""

from numba.core import types

# weights whose codes, 16 bytes, are handled at once; every block size of `labkit.quant` is a multiple
STEP = 32
TASK = types.void(types.CPointer(types.int64))
