"""`work.work` with all packages, and in forks of this process without one each: see `hiding/sitecustomize.py`.

What came out is in FOLDER/made.json, and in FOLDER/PACKAGE/made.json for each package that is asked for on the way.
"""

import json
import os
import sys
import warnings
from pathlib import Path

from tqdm import tqdm

if __name__ == "__main__":
    os.chdir(sys.argv[1])
    tqdm.monitor_interval = 0  # no thread beside the one that forks
    warnings.simplefilter("ignore")
    import sitecustomize  # that of `tests.gpu.hiding`

    from tests.gpu import work

    made = work.work(".")
    sitecustomize.NOT_ASKED_FOR.clear()
    Path("made.json").write_text(json.dumps(made))
