"""What stands before every route: who asks, and how much is sent.

401   no token, or a wrong one; compared in a time that does not depend on where they differ
408   a body that does not come
413   a body that is too large, whether its length is announced or not
"""

import asyncio
import hmac
import json
from typing import Any

from labkit.serving.protocol import Refused

OPEN = ("/health", "/dashboard")  # what needs no token: it says nothing of what is served


class Guards:
    """An ASGI application around another.

    Args:
        inner: the application.
        token: that a request must bring as `Authorization: Bearer …`.
        largest: bytes of a body.
        seconds: until a body has come.
    """

    def __init__(self, inner: Any, token: str, largest: int, seconds: float):
        self.inner, self.token, self.largest, self.seconds = inner, token.encode(), largest, seconds

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return
        try:
            self.check_token(scope)
            body = await asyncio.wait_for(self.read(receive), self.seconds)
        except TimeoutError:
            await refuse(
                send, Refused(408, f"the body did not come within {self.seconds:g} s", "body_timeout")
            )
        except Refused as refused:
            await refuse(send, refused)
        except ConnectionError:
            return
        else:
            given = False

            async def replay() -> dict:
                nonlocal given
                if given:
                    return await receive()
                given = True
                return {"type": "http.request", "body": body, "more_body": False}

            await self.inner(scope, replay, send)

    def check_token(self, scope: dict) -> None:
        """Raise a `Refused` unless the request has the token, or needs none."""
        if scope["path"] in OPEN:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, token = given.partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self.token):
            raise Refused(401, "a token is needed: Authorization: Bearer TOKEN", "invalid_api_key")

    async def read(self, receive: Any) -> bytes:
        """The body, as long as it is not too large."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            body += message.get("body", b"")
            if len(body) > self.largest:
                raise Refused(413, f"the body has more than {self.largest:,} bytes", "body_too_large")
            more = message.get("more_body", False)
        return bytes(body)


async def refuse(send: Any, refused: Refused) -> None:
    """Answer in OpenAI's form. The connection is closed: a part of the body may still be on its way."""
    body = json.dumps(refused.as_json()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] + [(b"www-authenticate", b"Bearer")] * (refused.status == 401)
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
