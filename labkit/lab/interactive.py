"""Is somebody there to click? Notebooks also run headless: as tests, and to make the pages that people read on GitHub."""

import os
import sys


def is_interactive() -> bool:
    """True in JupyterLab, VS Code and Colab; False under nbval, nbconvert or plain Python.

    A Jupyter server names the session in the environment of the kernels that it starts; a headless run starts its
    kernel itself. LABKIT_STATIC=1 or =0 overrules.
    """
    forced = os.environ.get("LABKIT_STATIC")
    if forced in ("0", "1"):
        return forced == "0"
    return "JPY_SESSION_NAME" in os.environ or "VSCODE_PID" in os.environ or "google.colab" in sys.modules
