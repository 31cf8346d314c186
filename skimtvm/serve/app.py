"""The ASGI application: Open Inference Protocol over HTTP, metrics, one log line a request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from ..errors import InvalidRequest, Overloaded, RequestTooLarge, ServingError, TimedOut
from .batching import Scheduler
from .logs import log
from .metrics import Metrics
from .protocol import HEADER_LENGTH, InferRequest, encode_response, parse_header_length, parse_infer

_CHUNK = 1 << 16
_LINGER = 2.0  # seconds for which the rest of a refused body is read, so that its sender gets to see the refusal
_CLIENT_GONE = 499  # status in logs and metrics only


class App:
    """Everything that the HTTP side of a server does. ``timeout``: seconds for a request, from its headers to the last
    byte of its answer; ``max_bytes``: of a request body; ``stopping()``: whether the server drains."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        timeout: float,
        max_bytes: int,
        access_log: bool = True,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.scheduler, self.signature = scheduler, scheduler.signature
        self.timeout, self.max_bytes, self.access_log, self.stopping = timeout, max_bytes, access_log, stopping
        self.metrics = Metrics(scheduler)

    def asgi(self) -> ASGIApp:
        model, version = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
        routes = [
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
            Route("/v2", self.server_metadata),
            Route("/metrics", self.prometheus),
            *(Route(f"{prefix}/infer", self.infer, methods=["POST"]) for prefix in (model, version)),
            *(Route(f"{prefix}/ready", self.model_ready) for prefix in (model, version)),
            *(Route(prefix, self.model_metadata) for prefix in (model, version)),
        ]
        handlers = {HTTPException: _http_error, ServingError: _serving_error, Exception: _internal_error}
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return _Observed(app, self)

    # ---- small answers -------------------------------------------------------------------------------------------

    async def live(self, request: Request) -> Response:
        return _json({"live": True})

    async def ready(self, request: Request) -> Response:
        ready = self._is_ready()
        return _json({"ready": ready}, 200 if ready else 503)

    async def model_ready(self, request: Request) -> Response:
        self._check_model(request)
        ready = self._is_ready()
        return _json({"name": self.signature.name, "ready": ready}, 200 if ready else 503)

    async def server_metadata(self, request: Request) -> Response:
        return _json({"name": "skimtvm", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def model_metadata(self, request: Request) -> Response:
        self._check_model(request)
        return _json(self.signature.metadata())

    async def prometheus(self, request: Request) -> Response:
        return Response(self.metrics.page(), headers={"content-type": CONTENT_TYPE_LATEST})

    def _is_ready(self) -> bool:
        return bool(self.scheduler.pool.workers) and not self.stopping()

    def _check_model(self, request: Request) -> None:
        name, version = request.path_params["model"], request.path_params.get("version", "1")
        if name != self.signature.name:
            raise InvalidRequest(
                f"model '{name[:100]}' is unknown; this server has '{self.signature.name}'", status=404
            )
        if version != "1":
            raise InvalidRequest(f"version '{version[:100]}' is unknown; the model has version 1", status=404)

    # ---- inference -----------------------------------------------------------------------------------------------

    async def infer(self, request: Request) -> Response:
        deadline = asyncio.get_running_loop().time() + self.timeout
        self._check_model(request)
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise InvalidRequest("compressed requests are not supported; send the body as it is", status=415)
        stack = contextlib.ExitStack()
        stack.enter_context(self.scheduler.admission())
        try:
            body = await self._body(request, deadline)
            parsed = parse_infer(
                body, parse_header_length(request.headers.get(HEADER_LENGTH), len(body)), self.signature
            )
            request.scope["skimtvm.id"] = parsed.id
            headers, content = encode_response(self.signature, parsed, await self._run(request, parsed, deadline))
        except BaseException:
            stack.close()
            raise
        return _Answer(content, headers, deadline, stack)

    async def _body(self, request: Request, deadline: float) -> bytes:
        """The whole body, if it is within the limit and comes in time."""
        announced = request.headers.get("content-length", "")
        size = int(announced) if announced.isdecimal() else 0
        chunks: list[bytes] = []
        more, received = True, 0
        try:
            async with asyncio.timeout_at(deadline):
                while more and max(size, received) <= self.max_bytes:
                    more, chunk = await _receive(request)
                    received += len(chunk)
                    chunks.append(chunk)
        except TimeoutError:
            raise TimedOut(f"the body did not arrive within {self.timeout:g} s", status=408) from None
        if max(size, received) <= self.max_bytes:
            return b"".join(chunks)
        chunks.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while more:
                    more, _ = await _receive(request)
        raise RequestTooLarge(f"the body is larger than the limit of {self.max_bytes} bytes")

    async def _run(self, request: Request, parsed: InferRequest, deadline: float) -> list[np.ndarray]:
        """The outputs; the request leaves the queue when its time is over or its client goes away."""
        work = asyncio.ensure_future(self.scheduler.run(parsed))
        gone = asyncio.ensure_future(_disconnected(request.receive))
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return work.result()
        except TimeoutError:
            if self.scheduler.is_queued(parsed):  # nothing has been done for it: it may be sent again
                raise Overloaded(f"no worker was free for {self.timeout:g} s; try again") from None
            raise TimedOut(f"the request was not answered within {self.timeout:g} s") from None
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


async def _receive(request: Request) -> tuple[bool, bytes]:
    """Whether there is more of the body, and the next piece of it."""
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("more_body", False), message.get("body", b"")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Answer(Response):
    """An inference result, which holds the request's place until it is sent, piece by piece as the client reads."""

    def __init__(self, content: bytes, headers: dict[str, str], deadline: float, place: contextlib.ExitStack) -> None:
        super().__init__(content, headers=headers)
        self._deadline, self._place = deadline, place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place, contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(max(self._deadline, asyncio.get_running_loop().time() + _LINGER)):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                view = memoryview(self.body)
                for at in range(0, len(view), _CHUNK):
                    await send({"type": "http.response.body", "body": view[at : at + _CHUNK], "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Observed:
    """Counts and logs each request, and answers what nobody expected with 500."""

    def __init__(self, app: ASGIApp, owner: App) -> None:
        self.app, self.owner = app, owner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status, size = time.monotonic(), 0, 0

        async def observe(message: Message) -> None:
            nonlocal status, size
            status = message.get("status", status)
            size += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, observe)
        except ClientDisconnect:
            status = _CLIENT_GONE
        except Exception as e:
            log("this is a bug in skimtvm, please report it", level=logging.ERROR, exc_info=e)
        seconds = time.monotonic() - start
        if scope["path"].endswith("/infer"):
            self.owner.metrics.request(status, seconds)
        if self.owner.access_log:
            log(
                "request",
                method=scope["method"],
                path=scope["path"][:200],
                status=status,
                ms=round(seconds * 1e3, 2),
                bytes=size,
                id=scope.get("skimtvm.id"),
            )
        return None


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


async def _serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    headers = {}
    if error.status == 503:
        headers["retry-after"] = "1"
    if error.status in (408, 413):  # the rest of the body may still be on its way
        headers["connection"] = "close"
    return _json({"error": str(error)}, error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json({"error": error.detail}, error.status_code, dict(error.headers or {}))


async def _internal_error(request: Request, error: Exception) -> Response:
    return _json({"error": "internal error; the server's log says more"}, 500)
