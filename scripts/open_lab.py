"""Open JupyterLab on a notebook: on localhost, with a token, in a browser if there is a display.

Before that, it puts the course's settings (scripts/jupyter/overrides.json) where JupyterLab looks for the defaults of an
environment: no question about news, a theme that follows the system's, contents without numbers of their own. Whatever a
person chooses in the settings of JupyterLab still wins.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

SETTINGS = Path(__file__).resolve().parent / "jupyter" / "overrides.json"
PLACE = Path("share", "jupyter", "lab", "settings", "overrides.json")  # in the environment


def place_settings(environment: Path) -> None:
    """Merge the course's settings into the defaults of a Python environment; those that stand there stay.

    JupyterLab opens without them too, so an environment that may not be written to is left as it is.
    """
    path = environment / PLACE
    try:
        there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        ours = json.loads(SETTINGS.read_text(encoding="utf-8"))
        merged = there | {plugin: values | there.get(plugin, {}) for plugin, values in ours.items()}
        if merged != there:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(merged, indent=2), encoding="utf-8")
            os.replace(part, path)
    except (OSError, ValueError) as problem:
        print(f"JupyterLab opens with its own settings: {problem}", flush=True)


def has_display() -> bool:
    """Can a browser open here? On macOS and Windows yes; on Linux when an X or Wayland display is set."""
    return sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )


def command(notebook: str) -> list[str]:
    """The command line that starts JupyterLab in this folder, with `notebook` as the page that its URL leads to."""
    options = [
        f"--ServerApp.ip={os.environ.get('LAB_ADDRESS', '127.0.0.1')}",  # a container must listen to its outside
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
    place_settings(Path(sys.prefix))
    line = command(sys.argv[1])
    if os.name == "nt":  # where execv would let go of the terminal
        sys.exit(subprocess.call(line))
    os.execv(line[0], line)
