"""The furniture of the lab: what a notebook needs around its subject, one call each; nothing of the subject.

`profile`: sizes for this machine · `predict`, then reveal · `check`: exercises · `plots` · `explore`: widgets
· `preflight` · `progress` · `catch_up` · `claim` · `sick_runs`. In `check`, `explore` and `figures` one word names a lesson.
"""

import logging

from labkit.lab import cells, check, diary, explore, plots
from labkit.lab.catching_up import catch_up
from labkit.lab.check.compare import yours_or_ours
from labkit.lab.claims import claim
from labkit.lab.diagnosis import sick_runs
from labkit.lab.machine import gflops, preflight
from labkit.lab.predictions import predict
from labkit.lab.profiles import profile
from labkit.lab.standing import forget_progress, progress

__all__ = [
    "catch_up",
    "check",
    "claim",
    "explore",
    "forget_progress",
    "gflops",
    "plots",
    "predict",
    "preflight",
    "profile",
    "progress",
    "sick_runs",
    "yours_or_ours",
]

# PEFT imports bitsandbytes, which then reports a missing optional kernel: nothing that a student can act on
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

cells.watch()  # in a notebook, a cell that needs another says which
diary.keep_time()
