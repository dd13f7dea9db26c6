"""The furniture of the lab: what a notebook needs around its subject, one call each; nothing of the subject.

`profile`: sizes for this machine · `predict`, then reveal · `check`: exercises · `plots` · `explore`: widgets
· `preflight` · `claim` · `sick_runs`. In `check`, `explore` and `figures` one word names a lesson.
"""

import logging

from labkit.lab import cells, check, explore, plots
from labkit.lab.claims import claim
from labkit.lab.diagnosis import sick_runs
from labkit.lab.machine import gflops, preflight
from labkit.lab.predictions import predict
from labkit.lab.profiles import profile

__all__ = ["check", "claim", "explore", "gflops", "plots", "predict", "preflight", "profile", "sick_runs"]

# PEFT imports bitsandbytes, which then reports a missing optional kernel: nothing that a student can act on
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

cells.watch()  # in a notebook, a cell that needs another says which
