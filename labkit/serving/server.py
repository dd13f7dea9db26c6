"""The server: OpenAI's routes over an engine, so that any client that speaks to OpenAI speaks to many adapters.

    /v1/models, /v1/completions, /v1/chat/completions      `model` is an adapter, an alias, a version, or the base
    /v1/load_lora_adapter, /v1/unload_lora_adapter         as vLLM has them
    /v1/feedback, /v1/rollouts                             of trials of new versions
    /metrics, /health                                      for Prometheus, and for what restarts servers
    /dashboard, /v1/state                                  for people

The engine steps in a thread of its own, and hands texts to the event loop, so that a slow reader holds up nobody. A
client that hangs up has its request cancelled. At the end no request is taken any more, and those there are finished.
"""

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from labkit.checks import check_positive, check_whole
from labkit.files.writing import InUse
from labkit.serving.answers import DONE, Answer, failure
from labkit.serving.dashboard import add_dashboard
from labkit.serving.feedback import add_feedback
from labkit.serving.guards import Guards
from labkit.serving.metrics import UNKNOWN
from labkit.serving.protocol import ChatBody, CompletionBody, LoadBody, Refused, UnloadBody, invalid
from labkit.serving.requests import Completion, Draining, Full, Stream
from labkit.serving.service import Service

Body = CompletionBody | ChatBody
Events = asyncio.Queue[tuple[int, str | Completion]]


def make_app(service: Service, token: str, largest: int = 2**20, body_seconds: float = 10.0) -> Guards:
    """The ASGI application that serves `service`; its engine runs as long as the application does.

    Args:
        service: what is served.
        token: that every request must bring.
        largest: bytes of a request's body.
        body_seconds: until a body has come.

    Raises:
        ValueError: an empty token, or a limit out of its range.
    """
    if not token.strip():
        raise ValueError("the token is empty; give one, such as what secrets.token_urlsafe() makes")
    check_whole("largest", largest)
    check_positive("body_seconds", body_seconds)
    app = FastAPI(lifespan=lifespan_of(service), docs_url=None, redoc_url=None, openapi_url=None)
    add_errors(app)
    add_answers(app, service)
    add_adapters(app, service)
    add_state(app, service)
    add_feedback(app, service.rollouts)
    add_dashboard(app, service)
    return Guards(app, token, largest, body_seconds)


def lifespan_of(service: Service) -> Callable[[FastAPI], Any]:
    """The engine's thread, for as long as the application runs; at the end it finishes what it has."""

    def run() -> None:
        try:
            service.engine.run()
        finally:  # also when it fails: requests are 503 then, and so is /health, rather than left without an answer
            service.engine.drain()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        thread = threading.Thread(target=run, name="engine", daemon=True)
        thread.start()
        yield
        service.engine.drain()
        await run_in_threadpool(thread.join)

    return lifespan


def add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form; what is not expected says nothing of the server's inside."""

    def refused(request: Request, error: Any) -> JSONResponse:
        return respond(error)

    def unexpected(request: Request, error: Exception) -> JSONResponse:
        return respond(Refused(500, "the server failed; its log says how", "internal_error"))

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, lambda _, error: respond(invalid(error.errors())))
    app.add_exception_handler(
        HTTPException,
        lambda _, error: respond(Refused(error.status_code, str(error.detail), "no_such_route")),
    )
    app.add_exception_handler(Exception, unexpected)


def respond(refused: Refused) -> JSONResponse:
    headers = {"retry-after": "1"} if refused.status in (429, 503) else None
    return JSONResponse(refused.as_json(), refused.status, headers)


def add_answers(app: FastAPI, service: Service) -> None:
    """The routes that write texts."""

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await answered(service, body, request, "cmpl")

    @app.post("/v1/chat/completions")
    async def chats(body: ChatBody, request: Request) -> Response:
        return await answered(service, body, request, "chatcmpl")


async def answered(service: Service, body: Body, request: Request, kind: str) -> Response:
    """The answer to a request, streamed or whole."""
    events: Events = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def send(index: int, event: str | Completion) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

    id = f"{kind}-{uuid.uuid4().hex}"
    streams = await submitted(service, body, send, id)
    answer = Answer(body, id, int(time.time()))
    texts = read(streams, events)
    if body.stream:
        chunks = streamed(answer, len(streams), texts)
        return StreamingResponse(
            chunks, media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )
    return await unless_gone(request, whole(answer, len(streams), texts))


async def submitted(
    service: Service, body: Body, send: Callable[[int, str | Completion], None], id: str
) -> list[Stream]:
    """Ask the engine; each reason why it does not take a request has its status."""
    try:
        return await run_in_threadpool(service.submit, body, send, id)
    except Refused as error:
        refused = error
    except LookupError as error:
        refused = Refused(404, str(error), "model_not_found", "model")
    except Full as error:
        refused = Refused(429, str(error), "queue_full")
    except (Draining, InUse) as error:
        refused = Refused(503, str(error), "unavailable")
    except ValueError as error:
        refused = Refused(400, str(error), "invalid_value")
    service.metrics.refuse(UNKNOWN, refused.code)
    raise refused


async def read(streams: list[Stream], events: Events) -> AsyncGenerator[tuple[int, str | Completion], None]:
    """Pieces of texts and their ends, until all have ended. If nobody reads them any more, they are cancelled."""
    left = len(streams)
    try:
        while left:
            index, event = await events.get()
            left -= isinstance(event, Completion)
            yield index, event
    finally:
        for stream in streams:
            stream.cancel()


async def streamed(
    answer: Answer, number: int, events: AsyncGenerator[tuple[int, str | Completion], None]
) -> AsyncGenerator[str, None]:
    """An answer as server-sent events. An error in the middle is an event too, and the last one."""
    ends: dict[int, Completion] = {}
    async with aclosing(events):
        for chunk in map(answer.first, range(number)):
            if chunk is not None:
                yield chunk
        async for index, event in events:
            if isinstance(event, str):
                yield answer.piece(index, event)
            elif refused := failure(event):
                yield f"data: {json.dumps(refused.as_json())}\n\n"
                return
            else:
                ends[index] = event
                yield answer.last(index, event)
    if answer.body.include_usage:
        yield answer.counted(ends[index] for index in range(number))
    yield DONE


async def whole(
    answer: Answer, number: int, events: AsyncGenerator[tuple[int, str | Completion], None]
) -> Response:
    """An answer in one piece."""
    texts, ends = [""] * number, {}
    async with aclosing(events):
        async for index, event in events:
            if isinstance(event, str):
                texts[index] += event
            elif refused := failure(event):
                raise refused
            else:
                ends[index] = event
    return JSONResponse(answer.whole(texts, [ends[index] for index in range(number)]))


async def unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """What `work` makes; it is cancelled when the client hangs up, to whom an answer makes no difference."""
    working, gone = asyncio.create_task(work), asyncio.create_task(hung_up(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return Response(status_code=499)
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def add_adapters(app: FastAPI, service: Service) -> None:
    """The routes that list, load and unload."""

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [card.as_json() for card in service.cards()]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        card = next((card for card in service.cards() if card.name == name), None)
        if card is None:
            raise Refused(404, f"there is no model {name[:100]!r}", "model_not_found", "model")
        return card.as_json()

    @app.post("/v1/load_lora_adapter")
    def load(body: LoadBody) -> PlainTextResponse:
        service.load(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    def unload(body: UnloadBody) -> PlainTextResponse:
        service.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def add_state(app: FastAPI, service: Service) -> None:
    """The routes that say how the server is."""

    @app.get("/health")
    def health() -> JSONResponse:
        draining = service.engine.is_draining
        return JSONResponse({"status": "draining" if draining else "ok"}, 503 if draining else 200)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
