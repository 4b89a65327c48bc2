"""An engine behind OpenAI's HTTP interface: completions, chat, streams, health and metrics.

    app = create_app(engine, served)  # any ASGI server runs it; `saw-int4 serve` takes uvicorn

One thread steps the engine; handlers hand requests to it and are told what is new. A full queue is
answered with 429, an engine that has died with 503, bad input with 400 and a reason. A client that
goes away frees its pages. Needs the extra `serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, StreamingResponse
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from saw_int4_jax.serving import protocol
from saw_int4_jax.serving.engine import Engine
from saw_int4_jax.serving.metrics import Timing
from saw_int4_jax.serving.protocol import Ask, Refused, Served
from saw_int4_jax.serving.request import Response
from saw_int4_jax.serving.scheduler import Overloaded

LOG = logging.getLogger(__name__)

# How often a handler that waits for tokens looks whether its client is still there.
POLL_S = 0.25

# A choice, its new text, and why it has ended if it has. `None`: the engine died.
Event = tuple[int, str, str | None] | None


class Runner:
    """The thread that steps an engine.

    Attributes:
      failure: what ended it unasked.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._watchers: dict[int, Callable[[], None]] = {}
        self._lock = threading.Lock()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    @contextlib.contextmanager
    def watched(self, on_failure: Callable[[], None]) -> Iterator[None]:
        """Calls back if the engine dies in the meantime, or has.

        Raises:
          Refused: it has.
        """
        with self._lock:
            if self.failure is not None or not self.alive:
                raise Refused("The engine is not running", status=503)
            self._watchers[id(on_failure)] = on_failure
        try:
            yield
        finally:
            self._watchers.pop(id(on_failure), None)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if not self.engine.step():
                    self.engine.wait(0.1)
        except BaseException as error:
            LOG.exception("the engine died")
            self.failure = error
        with self._lock:
            watchers = list(self._watchers.values())
            self.failure = self.failure or RuntimeError("stopped")
        for watcher in watchers:
            watcher()


class Collector:
    """The engine's figures for Prometheus, read when asked."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        status = self._engine.status()
        for name, about in (("waiting", "wait for admission"), ("running", "hold pages")):
            yield GaugeMetricFamily(
                f"saw_requests_{name}", f"Requests that {about}", value=status[name]
            )
        pages = GaugeMetricFamily("saw_pages", "Pages of the pool", labels=["state"])
        held, idle = status["pages_held"], status["pages_idle"]
        for state, count in (
            ("held", held),
            ("idle", idle),
            ("free", status["pages"] - held - idle),
        ):
            pages.add_metric([state], count)
        yield pages
        for name, key, about in (
            ("saw_prompt_tokens", "prompt_tokens", "Prompt tokens of ended requests"),
            ("saw_reused_tokens", "reused_tokens", "Prompt tokens that were found in the pool"),
            ("saw_new_tokens", "new_tokens", "Tokens generated"),
            ("saw_preemptions", "preemptions", "Requests that lost their pages to older ones"),
            ("saw_engine_steps", "steps", "Iterations of the engine"),
        ):
            yield CounterMetricFamily(name, about, value=status[key])
        ended = CounterMetricFamily("saw_requests", "Ended requests", labels=["finish"])
        for finish, count in status["finished"].items():
            ended.add_metric([finish], count)
        yield ended


def make_registry(engine: Engine) -> prometheus_client.CollectorRegistry:
    """The engine's figures, and histograms of its requests' times."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector(engine))
    histograms = {
        name: prometheus_client.Histogram(f"saw_{name}", about, buckets=buckets, registry=registry)
        for name, about, buckets in (
            ("ttft_seconds", "Time to the first token", (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)),
            ("tpot_seconds", "Time per token after it", (0.003, 0.01, 0.03, 0.1, 0.3, 1)),
            ("e2e_seconds", "Time from arrival to end", (0.1, 0.3, 1, 3, 10, 30, 100, 300)),
        )
    }

    def record(timing: Timing) -> None:
        values = timing.ttft_s, timing.tpot_s, timing.e2e_s
        for histogram, value in zip(histograms.values(), values):
            if value is not None:
                histogram.observe(value)

    engine.metrics.on_finish = record
    return registry


def create_app(
    engine: Engine,
    served: Served,
    *,
    api_key: str | None = None,
    max_body_bytes: int = 4 << 20,
) -> Starlette:
    """The ASGI application. It starts stepping the engine when the server starts.

    Args:
      engine: with the served model's tokenizer; nothing else may step it.
      served: the model.
      api_key: what clients must send as bearer token to `/v1`; `None`: nothing.
      max_body_bytes: larger requests are refused with 413.
    """
    runner = Runner(engine)
    registry = make_registry(engine)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        runner.start()
        yield
        await asyncio.to_thread(runner.stop)

    def check_key(request: HttpRequest) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise Refused("Expected the API key as bearer token", status=401)

    async def complete(request: HttpRequest) -> HttpResponse:
        check_key(request)
        body = await read_json(request, max_body_bytes)
        chat = request.url.path.endswith("chat/completions")
        ask = await asyncio.to_thread(protocol.parse, body, served, chat=chat)
        if not ask.stream:
            return JSONResponse(await whole_answer(runner, ask, served, request))
        events = stream_answer(runner, ask, served, request)
        await anext(events)  # submits, or refuses while there is a status to say so
        return StreamingResponse(events, media_type="text/event-stream")

    async def models(request: HttpRequest) -> HttpResponse:
        check_key(request)
        model = {
            "id": served.name,
            "object": "model",
            "created": 0,
            "owned_by": "saw-int4-jax",
            "max_model_len": served.max_length,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def health(request: HttpRequest) -> HttpResponse:
        ok = runner.alive and runner.failure is None
        return JSONResponse({"status": "ok" if ok else "failed"}, 200 if ok else 503)

    async def metrics(request: HttpRequest) -> HttpResponse:
        text = prometheus_client.generate_latest(registry)
        return HttpResponse(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return Starlette(
        routes=[
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/chat/completions", complete, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
            Route("/metrics", metrics),
        ],
        exception_handlers={Refused: refuse, ClientDisconnect: no_answer},
        lifespan=lifespan,
    )


# --- Requests and answers -----------------------------------------------------------------------


@contextlib.contextmanager
def submitted(runner: Runner, ask: Ask) -> Iterator[tuple[list[Response], asyncio.Queue[Event]]]:
    """The responses of an ask and what is new of them. Leaving cancels what goes on.

    Raises:
      Refused: the engine does not take it.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def put(event: Event) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, event)

    def listener(index: int):
        return lambda response, tokens, text: put((index, text, response.finish))

    responses: list[Response] = []
    with runner.watched(lambda: put(None)):
        try:
            try:
                for index, request in enumerate(ask.requests):
                    responses.append(runner.engine.submit(request, listener(index)))
            except Overloaded as error:
                raise Refused(f"{error}; try again later", status=429) from error
            except ValueError as error:
                raise Refused(str(error)) from error
            yield responses, queue
        finally:
            for response in responses:
                runner.engine.cancel(response)


async def next_event(request: HttpRequest, queue: asyncio.Queue[Event]) -> tuple[int, str, Any]:
    """The next event.

    Raises:
      ClientDisconnect: nobody waits for it.
      Refused: the engine died.
    """
    while True:
        with contextlib.suppress(TimeoutError):
            event = await asyncio.wait_for(queue.get(), POLL_S)
            if event is None:
                raise Refused("The engine stopped", status=503)
            return event
        if await request.is_disconnected():
            raise ClientDisconnect


async def whole_answer(
    runner: Runner, ask: Ask, served: Served, request: HttpRequest
) -> dict[str, Any]:
    with submitted(runner, ask) as (responses, queue):
        left = len(responses)
        while left:
            _, _, finish = await next_event(request, queue)
            left -= finish is not None
            if left and await request.is_disconnected():
                raise ClientDisconnect
        return protocol.answer(ask, served, responses)


async def stream_answer(
    runner: Runner, ask: Ask, served: Served, request: HttpRequest
) -> AsyncGenerator[bytes, None]:
    """Server-sent events, after an empty beginning that says that the ask was taken."""
    with submitted(runner, ask) as (responses, queue):
        yield b""
        if ask.chat:
            for index in range(len(responses)):
                yield event_bytes(protocol.piece(ask, served, index, "", role=True))
        left = len(responses)
        while left:
            index, text, finish = await next_event(request, queue)
            left -= finish is not None
            reason = protocol.finish_reason(finish)
            if text or reason:
                yield event_bytes(protocol.piece(ask, served, index, text, finish=reason))
        if ask.usage:
            yield event_bytes(protocol.last_piece(ask, served, responses))
        yield b"data: [DONE]\n\n"


def event_bytes(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


async def refuse(request: HttpRequest, error: Exception) -> HttpResponse:
    assert isinstance(error, Refused)
    headers = {"Retry-After": "1"} if error.status == 429 else {}
    return JSONResponse(error.body(), error.status, headers=headers)


async def no_answer(request: HttpRequest, error: Exception) -> HttpResponse:
    return HttpResponse(status_code=499)  # nobody reads it


async def read_json(request: HttpRequest, limit: int) -> Any:
    """The body, not read further than the limit.

    Raises:
      Refused: it is larger, or no JSON.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise Refused(f"Expected a body of at most {limit} bytes", status=413)
    try:
        return json.loads(body)
    except ValueError as error:
        raise Refused(f"Expected the body to be JSON: {error}") from error
