"""JupyterHub for one room: people sign up with a name and a password, a teacher lets them in, each has a folder.

    LORA_HUB=/srv/lora-lab jupyterhub --config docs/teach/jupyterhub/jupyterhub_config.py

LORA_HUB is the folder of the hub: its database, its secret, and home folders. docs/teach/jupyterhub.md says what this keeps
apart and what it does not: with the local spawner below, every server runs as the account that started the hub.
"""

import os
import shutil
import sys
from pathlib import Path

c = get_config()  # noqa: F821  (JupyterHub defines it)

COURSE = Path(__file__).resolve().parents[3]
PLACE = Path(os.environ.get("LORA_HUB", "/srv/lora-lab"))
SEATS = int(os.environ.get("LORA_HUB_SEATS", "30"))
PORT = os.environ.get("LORA_HUB_PORT", "8000")

PLACE.mkdir(mode=0o700, parents=True, exist_ok=True)

# All addresses of the machine, so that a room can reach it. Put a proxy with TLS before it, or passwords travel in the clear.
c.JupyterHub.bind_url = f"http://{os.environ.get('LORA_HUB_ADDRESS', '0.0.0.0')}:{PORT}"
c.JupyterHub.hub_bind_url = f"http://127.0.0.1:{int(PORT) + 81}"
c.ConfigurableHTTPProxy.api_url = f"http://127.0.0.1:{int(PORT) + 1}"
c.JupyterHub.cookie_secret_file = str(PLACE / "cookie_secret")
c.JupyterHub.db_url = f"sqlite:///{PLACE / 'jupyterhub.sqlite'}"
c.ConfigurableHTTPProxy.pid_file = str(PLACE / "proxy.pid")

# Names and passwords of the hub's own; the first to sign up as a name below needs nobody to let them in.
c.JupyterHub.authenticator_class = "native"
c.Authenticator.admin_users = set(os.environ.get("LORA_HUB_TEACHERS", "teacher").split(","))
c.Authenticator.allow_all = True  # whoever has an account that a teacher has authorized
c.NativeAuthenticator.open_signup = False
c.NativeAuthenticator.minimum_password_length = 8
c.NativeAuthenticator.check_common_password = True
c.NativeAuthenticator.allowed_failed_logins = 5
c.NativeAuthenticator.seconds_before_next_try = 60

# One process each, on this machine and without accounts of the system. For a class that must be kept apart, put
# SystemdSpawner or DockerSpawner here: only they limit memory and processors.
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = str(PLACE / "home" / "{username}")
c.Spawner.cmd = [sys.executable, "-m", "jupyterhub.singleuser"]
c.Spawner.args = [] if os.geteuid() else ["--allow-root"]
c.Spawner.default_url = "/lab/tree/lora-lab/notebooks/00_start_here.ipynb"
# The usual 30 s for an answer are too short when a room starts at once
c.Spawner.start_timeout = c.Spawner.http_timeout = 180
c.Spawner.environment = {
    "PYTHONPATH": str(COURSE),
    "LABKIT_CACHE": str(PLACE / "models"),  # one model of 0.5 GB for all, fetched by the teacher
    "OMP_NUM_THREADS": os.environ.get("LORA_HUB_THREADS", "2"),
    "JUPYTER_PATH": os.environ.get("JUPYTER_PATH", ""),
}
c.JupyterHub.active_server_limit = SEATS
c.JupyterHub.concurrent_spawn_limit = 4  # thirty starts at once would take a small machine minutes


def give_course(spawner):
    """Before a server starts: a copy of the notebooks in its owner's home, unless there is one with work in it."""
    home = PLACE / "home" / spawner.user.name
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (home / "lora-lab").exists():
        part = home / ".lora-lab.part"
        shutil.rmtree(part, ignore_errors=True)
        for name in ("notebooks", "data", "docs"):
            shutil.copytree(COURSE / name, part / name)
        part.rename(home / "lora-lab")


c.Spawner.pre_spawn_hook = give_course
