"""Open JupyterLab on a notebook: on localhost, with a token, in a browser if there is a display."""

import os
import sys


def has_display() -> bool:
    """Can a browser open here? On macOS yes; on Linux when an X or Wayland display is set."""
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def command(notebook: str) -> list[str]:
    """The command line that starts JupyterLab in this folder, with `notebook` as the page that its URL leads to."""
    options = [
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.root_dir={os.getcwd()}",  # else the notebook's folder is the root, and the modules are out of sight
        f"--LabApp.default_url=/lab/tree/{notebook}",
    ]
    if not has_display():
        print("No display here: open the URL with the token that JupyterLab prints below.", flush=True)
        options.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--allow-root")  # in a container one often is root, and Jupyter would refuse
    return [sys.executable, "-m", "jupyterlab", *options]


if __name__ == "__main__":
    line = command(sys.argv[1])
    os.execv(line[0], line)
