"""Which implementation runs."""

import os
import subprocess
import sys


def test_the_fast_path_can_be_turned_off_by_the_environment():
    code = "import torch; from labkit.quant.kernels.dispatch import fast_for; print(fast_for(torch.empty(1)))"
    for value, expected in [("0", "False"), ("1", "True")]:
        environment = os.environ | {"LABKIT_FAST": value}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert result.stdout.strip() == expected, result.stderr
