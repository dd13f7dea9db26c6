"""A server on a free port of this machine, and raw requests to it."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import uvicorn

from labkit.serving.guards import Guards

TOKEN = "sesame"
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}


class Reply(NamedTuple):
    status: int
    body: Any
    headers: dict[str, str]


class Running:
    """A server that runs on `port`."""

    def __init__(self, port: int):
        self.port, self.url = port, f"http://127.0.0.1:{port}/v1"

    def ask(self, method: str, path: str, body: Any = None, headers: dict | None = None) -> Reply:
        """One request; a body that is no bytes is sent as JSON, and an answer that is JSON is read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body)
        try:
            connection.request(method, path, sent, HEADERS if headers is None else headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            said = {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()
        is_json = said.get("content-type", "").startswith("application/json")
        return Reply(answer.status, json.loads(text) if is_json else text, said)

    def post(self, path: str, **body: Any) -> Reply:
        return self.ask("POST", path, body)

    def open(self, **body: Any) -> socket.socket:
        """A connection on which a completion was asked for, and nothing has been read."""
        text = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        made = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        made.sendall(head.encode() + text)
        return made


@contextmanager
def running(app: Guards) -> Iterator[Running]:
    """`app` on a free port, for as long as the block."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=20))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started or not thread.is_alive())
    assert thread.is_alive(), "the server ended before it answered"
    try:
        yield Running(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server does not end"


def until(condition) -> None:
    """Wait for a condition that another thread brings about."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about")
