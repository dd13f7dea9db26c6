"""Is anybody there to click? Notebooks also run headless: as tests, and for the pages on GitHub."""

import os
import sys

from labkit.hardware import switch

FRONT_ENDS = ("JPY_SESSION_NAME", "VSCODE_PID")  # set for the kernels of a Jupyter server, and of VS Code
STATIC = (
    "labkit draws static figures here: it sees no notebook that could show widgets. If you are in one, set "
    "LABKIT_STATIC=0 before the kernel starts; LABKIT_STATIC=1 keeps the figures and leaves out this line."
)
_told = False


def is_interactive() -> bool:
    """True in JupyterLab, VS Code, Colab, Kaggle and PyCharm; False under nbval, nbconvert or plain Python.

    A headless run starts its kernel itself. A front end leaves a trace: in the environment of the kernels that
    it starts, or (VS Code in WSL or a container, a kernel on another machine) by saying with every cell which
    cell it is. LABKIT_STATIC=1 or =0 overrides this. A notebook that is taken for headless is told so, once.

    Raises:
        ValueError: LABKIT_STATIC is neither yes nor no.
    """
    there = has_reader()
    said_by_variable = switch("LABKIT_STATIC", None) is not None or "KAGGLE_KERNEL_RUN_TYPE" in os.environ
    if not there and not said_by_variable and running_kernel() is not None:
        tell()
    return there


def has_reader() -> bool:
    """As `is_interactive`, and says nothing."""
    static = switch("LABKIT_STATIC", None)
    if static is not None:
        return not static
    on_kaggle = os.environ.get("KAGGLE_KERNEL_RUN_TYPE")
    if on_kaggle:
        return on_kaggle == "Interactive"  # the other is "Batch"
    if any(name in os.environ for name in FRONT_ENDS) or "google.colab" in sys.modules:
        return True
    kernel = running_kernel()
    return kernel is not None and ("PYCHARM_HOSTED" in os.environ or names_its_cells(kernel))


def running_kernel() -> object | None:
    """The IPython kernel that this process is; None for plain Python, or IPython in a terminal."""
    if "IPython" not in sys.modules:
        return None
    return getattr(sys.modules["IPython"].get_ipython(), "kernel", None)


def names_its_cells(kernel: object) -> bool:
    """Did the request that runs now say which cell it is? JupyterLab and VS Code do; nbclient does not."""
    try:
        return "cellId" in kernel.get_parent("shell")["metadata"]  # type: ignore[attr-defined]
    except (AttributeError, KeyError, TypeError):
        return False


def tell() -> None:
    """Say once that figures are static, and what to do about it."""
    global _told
    if not _told:
        _told = True
        print(STATIC)
