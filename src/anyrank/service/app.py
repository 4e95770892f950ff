"""The web service: a page for all runs and one for each, the same as JSON and for Prometheus, events, and files."""

from __future__ import annotations

import contextlib
import gzip
import re
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from anyrank.errors import in_a_line, printable
from anyrank.service import downloads, objects, prometheus, rendering, views
from anyrank.service.guarding import Guard
from anyrank.service.run import Run
from anyrank.service.streaming import Follower, Overview, Streams
from anyrank.service.watch import Watch

_EVERY_S, _FRESH_S = 1.0, 0.5  # between two turns of reading; how old the state of a page may be
_EVENTS, _HTML = "text/event-stream", "text/html; charset=utf-8"
_LEAST_COMPRESSED = 1000  # bytes
_UNPLAIN = re.compile(r"[^A-Za-z0-9._-]")


def build(watch: Watch, names: Sequence[str] = (), token: str = "", most_streams: int | None = None) -> ASGIApp:
    """The service over `watch`. `names`, `token`: as `guarding.Guard` has them."""
    service = _Service(watch, Streams(most_streams) if most_streams is not None else Streams())
    routes = [
        Route("/", service.first),
        Route("/events", service.events),
        Route("/run/{key}", service.run),
        Route("/run/{key}/events", service.run_events),
        Route("/run/{key}/state.json", service.run_state),
        Route("/run/{key}/files/{name}", service.file),
        Route("/runs.json", service.runs),
        Route("/metrics", service.metrics),
        Route("/health", service.health),
        Route("/style.css", partial(_static, rendering.static("style.css"), "text/css; charset=utf-8")),
        Route("/page.js", partial(_static, rendering.static("page.js"), "text/javascript; charset=utf-8")),
    ]
    app = Starlette(routes=routes, lifespan=service.reading, exception_handlers={404: _lost, 500: _failed})
    app.router.redirect_slashes = False
    return Guard(_told(app), names, token)


def _told(app: ASGIApp) -> ASGIApp:
    """The app, whose unexpected errors are a line on stderr: the answer has been sent, and the service goes on."""

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except Exception as error:
            if scope["type"] != "http":
                raise
            sys.stderr.write(f"anyrank: {printable(scope['path'])}: {in_a_line(error)}\n")

    return answering


async def _static(body: bytes, kind: str, request: Request) -> Response:
    return _answer(request, body, kind)


async def _lost(request: Request, error: Exception) -> Response:
    return PlainTextResponse("404: nothing is here\n", status_code=404)


async def _failed(request: Request, error: Exception) -> Response:
    return PlainTextResponse("500: this page could not be made; the other pages go on\n", status_code=500)


class _Service:
    """The answers to requests."""

    def __init__(self, watch: Watch, streams: Streams) -> None:
        self._watch, self._streams = watch, streams
        self._templates = rendering.environment()

    @contextlib.asynccontextmanager
    async def reading(self, app: Starlette) -> AsyncIterator[None]:
        """While the service runs, the runs are read on, also when nobody looks."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._read)
            yield
            tasks.cancel_scope.cancel()

    async def _read(self) -> None:
        while True:
            behind = await run_in_threadpool(self._watch.refresh)
            await anyio.sleep(0.01 if behind else _EVERY_S)

    async def first(self, request: Request) -> Response:
        """All runs; where there is one run only, its page."""
        await self._fresh()
        if len(self._watch.runs) == 1:
            return await run_in_threadpool(self._page, request, next(iter(self._watch.runs.values())), "./")
        return await run_in_threadpool(self._overview, request)

    def _overview(self, request: Request) -> Response:
        now = self._watch.clock()
        with self._watch.still():
            found = views.overview(self._watch, now)
        html = self._templates.get_template("overview.html.j2").render(found, root="./", events="events", now=now)
        return _answer(request, html.encode(), _HTML)

    async def run(self, request: Request) -> Response:
        await self._fresh()
        run = self._found(request)
        if run is None:
            return await _lost(request, KeyError())
        return await run_in_threadpool(self._page, request, run, "../")

    def _page(self, request: Request, run: Run, root: str) -> Response:
        """`root`: the way from the page to the first one, which may not be at the root of its host."""
        now = self._watch.clock()
        others = len(self._watch.runs) > 1
        events = f"{root}run/{run.place.key}/events"
        template = self._templates.get_template("run.html.j2")
        with self._watch.still():
            found = views.page(run, now)
        html = template.render(found, root=root, events=events, now=now, others=others)
        return _answer(request, html.encode(), _HTML)

    async def events(self, request: Request) -> Response:
        overview = Overview(self._watch)
        return self._stream(request, lambda: self._still(overview.news))

    async def run_events(self, request: Request) -> Response:
        """The events of a run, after `Last-Event-ID`, or `?after=`, where that is given."""
        run = self._found(request)
        if run is None:
            return await _lost(request, KeyError())
        last = request.headers.get("last-event-id", request.query_params.get("after", ""))
        follower = Follower(run, last[:100])
        return self._stream(request, lambda: self._still(follower.news))

    def _stream(self, request: Request, news) -> Response:
        if request.method == "HEAD":
            return Response(headers={"content-type": _EVENTS})
        if self._streams.full:
            line = "503: too many listeners; ask for the page again and again instead\n"
            return PlainTextResponse(line, status_code=503, headers={"retry-after": "30"})
        return StreamingResponse(self._streams.follow(news), headers={"content-type": _EVENTS, "x-accel-buffering": "no"})

    async def run_state(self, request: Request) -> Response:
        """The run for machines, with its clients."""
        await self._fresh()
        run = self._found(request)
        if run is None:
            return await _lost(request, KeyError())
        return JSONResponse(await run_in_threadpool(self._still, partial(objects.of_run, run, with_clients=True)))

    async def runs(self, request: Request) -> Response:
        await self._fresh()
        return JSONResponse(await run_in_threadpool(self._still, partial(objects.overview, self._watch)))

    async def metrics(self, request: Request) -> Response:
        await self._fresh()
        body = await run_in_threadpool(self._still, partial(prometheus.text, self._watch))
        return _answer(request, body.encode(), prometheus.CONTENT_TYPE)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def file(self, request: Request) -> Response:
        run, name = self._found(request), request.path_params["name"]
        if run is None or run.place.problem:
            return await _lost(request, KeyError())
        try:
            found = await run_in_threadpool(downloads.take, run.place.folder, name)
        except (OSError, ValueError):
            return await _lost(request, KeyError())
        shown = f"{run.place.key}-{_UNPLAIN.sub('_', name)}"  # plain letters: the key has no others, a site's name may
        headers = {"content-type": "application/octet-stream", "content-disposition": f'attachment; filename="{shown}"'}
        if found.length is not None:
            headers["content-length"] = str(found.length)
        pieces = () if request.method == "HEAD" else (piece for piece in found.pieces if piece)
        return StreamingResponse(pieces, headers=headers)

    def _found(self, request: Request) -> Run | None:
        return self._watch.runs.get(request.path_params["key"])

    def _still(self, make: Callable[[float], Any]) -> Any:
        """What `make` makes of the runs as they are now."""
        with self._watch.still():
            return make(self._watch.clock())

    async def _fresh(self) -> None:
        await run_in_threadpool(self._watch.refresh, _FRESH_S)


def _answer(request: Request, body: bytes, kind: str) -> Response:
    """The body of a page, compressed where the browser takes that."""
    headers = {"content-type": kind, "vary": "accept-encoding"}
    if len(body) >= _LEAST_COMPRESSED and "gzip" in request.headers.get("accept-encoding", ""):
        body = gzip.compress(body, 4)
        headers["content-encoding"] = "gzip"
    return Response(body, headers=headers)
