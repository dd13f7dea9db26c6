"""Is anybody there to click? Notebooks also run headless: as tests, and for the pages on GitHub."""

import os
import sys


def is_interactive() -> bool:
    """True in JupyterLab, VS Code and Colab; False under nbval, nbconvert or plain Python.

    A Jupyter server sets the name of the session in the environment of the kernels that it starts; a headless
    run starts its kernel itself. LABKIT_STATIC=1 or =0 overrides this.
    """
    forced = os.environ.get("LABKIT_STATIC")
    if forced in ("0", "1"):
        return forced == "0"
    return "JPY_SESSION_NAME" in os.environ or "VSCODE_PID" in os.environ or "google.colab" in sys.modules
