"""The server's routes: HTTP and the sessions' socket. What they mean: `live.py`, `session.py` and `protocol.py`."""

import asyncio
import contextlib
import dataclasses
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request, WebSocket
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.websockets import WebSocketDisconnect, WebSocketState

from adastate_jax import __version__
from adastate_jax.errors import UserError
from adastate_jax.media import read_image
from adastate_jax.serving import protocol
from adastate_jax.serving.asyncapi import asyncapi
from adastate_jax.serving.generator import Generator
from adastate_jax.serving.guard import Guard
from adastate_jax.serving.limits import Rate, Rates
from adastate_jax.serving.live import Live
from adastate_jax.serving.protocol import Anchors, Message, Seed, Text
from adastate_jax.serving.recording import SESSION, VIDEO, Store
from adastate_jax.serving.session import Session, State, Wish
from adastate_jax.serving.viewer import Viewer

_PAGE = Path(__file__).parent / "page"
MOST_PICTURE_BYTES = 8 << 20
_MOST_PICTURE_PIXELS = 16_000_000
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")  # 8 bits a channel
_MOST_PICTURES = 8  # of a session
_MOST_REFUSALS = 100  # messages that make no sense, or are too many, until the socket is closed
_PART = 1 << 16  # bytes of a file that are read at once
_PATIENCE = 5.0  # seconds that closing a socket may take
_POLICY = 1008  # a WebSocket's close code: against the rules
_TRY_LATER = 1013

Key = Annotated[str, Query(max_length=64)]


class SessionRequest(Message):
    """What a session begins with; what is left out is what the landing view shows."""

    prompt: Text | None = None
    seed: Seed = 0
    anchors: Anchors | None = None


class SessionAnswer(Message):
    """A new session. `key` steers it and reads its recording; `watch_key` watches, and reads it, too."""

    id: str
    key: str
    watch_key: str
    socket: str = Field(description="path of its socket; add ?key=…")
    position: int = Field(description="sessions before it")


@dataclasses.dataclass(frozen=True)
class Offer:
    """What the page shows before anybody types: `GET /v1/model`."""

    name: str
    prompt: str
    anchors: tuple[str, ...]
    all_anchors: tuple[str, ...]
    prompts: tuple[str, ...]
    vocabulary: str


@dataclasses.dataclass(frozen=True)
class Allowed:
    """How much of what a client may do: (per second, at once)."""

    sessions: tuple[float, float] = (0.2, 12)
    sockets: tuple[float, float] = (5, 100)
    messages: tuple[float, float] = (40, 80)
    pictures: tuple[float, float] = (0.5, 8)


def make_app(
    live: Live, generator: Generator, store: Store, offer: Offer, guard: Guard, allowed: Allowed = Allowed()
) -> FastAPI:
    """The application; its lifespan starts and ends the generator."""
    uploads: dict[str, list[Path]] = {}  # of each session

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        clock = asyncio.create_task(live.watch_the_clock())
        await asyncio.sleep(0)
        generator.start()
        with tempfile.TemporaryDirectory(prefix="adastate-pictures-") as folder:
            app.state.pictures = Path(folder)
            yield
            live.stop()
            await run_in_threadpool(generator.join)
        clock.cancel()

    app = FastAPI(title="adastate live", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(guard.middleware)
    new_sessions, new_sockets, new_pictures = (
        Rates(*rate) for rate in (allowed.sessions, allowed.sockets, allowed.pictures)
    )
    one_picture = asyncio.Semaphore(1)  # is decoded at a time: each may take many bytes

    def find(name: str, key: str, steer: bool) -> Session:
        found = live.find(name, key)
        if found is None:
            raise HTTPException(404, "no session has this id and key")
        if steer and found[1] != "steer":
            raise HTTPException(403, "this link watches; it does not steer")
        return found[0]

    def forget_uploads() -> None:
        """Removes the pictures of sessions that are no more."""
        for name in [name for name in uploads if name not in live.sessions]:
            for path in uploads.pop(name):
                generator.pictures.pop(path.name, None)
                path.unlink(missing_ok=True)

    @app.exception_handler(UserError)
    async def refuse(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.get("/v1/model")
    async def model() -> dict[str, Any]:
        """What there is to choose from, and how far the programs are compiled."""
        facts = dataclasses.asdict(live.facts)
        return {**dataclasses.asdict(offer), **facts, "percent": live.percent, "limit_seconds": live.queue.limit}

    @app.post("/v1/sessions", status_code=201)
    async def create(request: Request, wanted: SessionRequest) -> SessionAnswer:
        """Begins a session, or queues it: connect to its socket within a minute."""
        if not new_sessions.take(_client(request), live.clock()):
            raise HTTPException(429, "too many sessions from this client; try again in a few seconds")
        wish = Wish(
            wanted.prompt or offer.prompt,
            wanted.seed,
            tuple(wanted.anchors) if wanted.anchors is not None else offer.anchors,
        )
        await run_in_threadpool(generator.check, wish)
        try:
            session = live.create(wish)
        except UserError as error:
            raise HTTPException(503, str(error)) from None
        position = live.queue.position(session) if session.state == State.QUEUED else 0
        return SessionAnswer(
            id=session.name,
            key=session.key,
            watch_key=session.watch_key,
            socket=f"/v1/sessions/{session.name}",
            position=position,
        )

    @app.delete("/v1/sessions/{name}")
    async def delete(name: str, key: Key) -> dict[str, str]:
        """Ends a session; what it recorded stays."""
        session = find(name, key, steer=True)
        live.end(session, "it was stopped by who steers it")
        return {"state": session.state.value}

    @app.post("/v1/sessions/{name}/picture")
    async def picture(name: str, key: Key, request: Request) -> dict[str, str]:
        """Takes a picture (PNG, JPEG or WebP, the body) for a restart to begin from."""
        session = find(name, key, steer=True)
        forget_uploads()
        kept = uploads.setdefault(session.name, [])
        if not new_pictures.take(_client(request), live.clock()):
            raise HTTPException(429, "too many pictures from this client; wait a little")
        if len(kept) >= _MOST_PICTURES:
            raise HTTPException(429, f"a session takes {_MOST_PICTURES} pictures")
        label = secrets.token_hex(8)
        path = request.app.state.pictures / label
        kept.append(path)
        try:
            path.write_bytes(await request.body())  # the guard has seen its length
            async with one_picture:
                await run_in_threadpool(_check_picture, path, live.facts.height, live.facts.width)
        except BaseException as error:  # a client that goes away in the middle, too
            kept.remove(path)
            path.unlink(missing_ok=True)
            if isinstance(error, UserError):
                raise HTTPException(422, str(error).replace(str(path), "picture")) from None
            raise
        generator.pictures[label] = path
        return {"picture": label}

    @app.get("/v1/sessions/{name}/video.mp4", response_class=StreamingResponse)
    async def video(name: str, key: Key) -> StreamingResponse:
        """The recording: complete up to the last chunk, also while the session runs."""
        return await _file(store, name, key, VIDEO, "video/mp4")

    @app.get("/v1/sessions/{name}/session.json", response_class=StreamingResponse)
    async def session_file(name: str, key: Key) -> StreamingResponse:
        """What replays it: `python -m adastate_jax.sample --session=session.json`."""
        return await _file(store, name, key, SESSION, "application/json")

    @app.websocket("/v1/sessions/{name}")
    async def socket(websocket: WebSocket, name: str, key: str = "") -> None:
        await websocket.accept()
        found = live.find(name, key)
        if not new_sockets.take(_client(websocket), live.clock()):
            await _turn_away(websocket, "too many sockets from this client", _TRY_LATER)
            return
        if found is None:
            await _turn_away(websocket, "no session has this id and key", _POLICY)
            return
        session, role = found
        try:
            viewer = live.connect(session, role, _client(websocket))
        except UserError as error:
            await _turn_away(websocket, str(error), _TRY_LATER)
            return
        try:
            await _serve(websocket, live, session, viewer, Rate(*allowed.messages))
        finally:
            live.disconnect(session, viewer)

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """Whether the process answers."""
        return "ok\n"

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """200 once every program is compiled; 503 and the percent before that."""
        ready = live.percent == 100 and not live.trouble
        return JSONResponse({"ready": ready, "percent": live.percent, "trouble": live.trouble}, 200 if ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Counters in Prometheus' text format."""
        return PlainTextResponse(live.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/asyncapi.json")
    async def describe_socket() -> dict[str, Any]:
        """The socket's messages, of AsyncAPI 3.0."""
        return asyncapi()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(_PAGE / "docs.html")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=_PAGE))
    return app


async def _serve(websocket: WebSocket, live: Live, session: Session, viewer: Viewer, rate: Rate) -> None:
    """Both directions of a socket, until one of them ends."""
    sending = asyncio.create_task(viewer.send(websocket.send_text, websocket.send_bytes))
    hearing = asyncio.create_task(_hear(websocket, live, session, viewer, rate))
    done, _ = await asyncio.wait((sending, hearing), return_when=asyncio.FIRST_COMPLETED)
    if hearing in done and not viewer.overflow:  # what is to be said last
        viewer.close()
        await asyncio.wait((sending,), timeout=1.0)
    for task in (sending, hearing):
        task.cancel()
    for result in await asyncio.gather(sending, hearing, return_exceptions=True):
        if isinstance(result, Exception) and not isinstance(result, WebSocketDisconnect | RuntimeError | OSError):
            raise result
    if websocket.client_state == websocket.application_state == WebSocketState.CONNECTED:
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, TimeoutError):  # it may go at this moment
            closing = websocket.close(_TRY_LATER if viewer.overflow else _POLICY)
            await asyncio.wait_for(closing, _PATIENCE)


async def _hear(websocket: WebSocket, live: Live, session: Session, viewer: Viewer, rate: Rate) -> None:
    """Takes a viewer's messages; returns where he says too much that is not understood."""
    refusals = 0
    while refusals < _MOST_REFUSALS:
        received = await websocket.receive()
        if received["type"] == "websocket.disconnect":
            return
        try:
            if not rate.take(live.clock()):
                raise UserError("too many messages; this one was not read")
            if received.get("text") is None:
                raise UserError("message: must be text")
            message = protocol.parse(received["text"])
        except UserError as error:
            refusals += 1
            viewer.say(protocol.Refused(reason=str(error)))
        else:
            live.hear(session, viewer, message)
    viewer.say(protocol.Refused(reason=f"{_MOST_REFUSALS} messages were refused: the socket is closed"))


async def _turn_away(websocket: WebSocket, reason: str, code: int) -> None:
    await websocket.send_text(protocol.Refused(reason=reason).model_dump_json())
    await websocket.close(code)


async def _file(store: Store, name: str, key: str, file: str, kind: str) -> StreamingResponse:
    """A recording's file as long as it is now: that of a running session grows while it is read."""
    path = await run_in_threadpool(store.find, name, key, file)
    if path is None:
        raise HTTPException(404, "no recording has this id and key")
    opened = await run_in_threadpool(path.open, "rb")
    length = os.fstat(opened.fileno()).st_size

    def parts() -> Iterator[bytes]:
        left = length
        with opened:
            while left and (part := opened.read(min(left, _PART))):
                left -= len(part)
                yield part

    headers = {
        "content-length": str(length),
        "content-disposition": f'attachment; filename="adastate-{name}{path.suffix}"',
    }
    return StreamingResponse(parts(), media_type=kind, headers=headers)


def _check_picture(path: Path, height: int, width: int) -> None:
    """Raises UserError for what is no picture of a kind and size that is taken."""
    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
            pixels, mode = image.width * image.height, image.mode
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(f"{path}: is no PNG, JPEG or WebP") from None
    if pixels > _MOST_PICTURE_PIXELS:
        raise UserError(f"{path}: has more than {_MOST_PICTURE_PIXELS // 10**6} million pixels")
    if mode not in _MODES:
        raise UserError(f"{path}: has pixels of the kind {mode}; send one of 8 bits a channel")
    read_image(path, height, width)


def _client(connection: Request | WebSocket) -> str:
    return connection.client.host if connection.client else ""
