"""The serve command: a page where the stream runs and a person steers it."""

if __name__ == "__main__":  # before all other imports: a signal that comes during them ends the command, too
    from adastate_jax import interrupts

    interrupts.install()

import argparse
import contextlib
import importlib.util
import logging
import secrets
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adastate_jax.console import CommandParser, run_command, starting
from adastate_jax.errors import UserError, reason
from adastate_jax.generation.placement import add_arguments, placement_of
from adastate_jax.generation.shipped import find_model
from adastate_jax.interrupts import deferred
from adastate_jax.serving.limits import is_loopback
from adastate_jax.streaming.names import STREAM_NAMES

if TYPE_CHECKING:
    from adastate_jax.generation.loading import Model

_EXAMPLE = """examples:
  python -m adastate_jax.serve --checkpoint=tiny
  python -m adastate_jax.serve --checkpoint=weights --decoder=tiny --anchors adastate --prompt="a red fox runs in snow"
  python -m adastate_jax.serve --checkpoint=tiny --host=0.0.0.0 --token=SECRET"""

_NEEDED = ("fastapi", "uvicorn", "websockets", "prometheus_client")


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m adastate_jax.serve",
        description="Serves a page where a stream runs, and a person steers it; docs/serving.md says more.",
        epilog=_EXAMPLE,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR|tiny", help="as of the sample command")
    parser.add_argument("--decoder", choices=("wan", "tiny"), help="of converted networks")
    parser.add_argument("--text-cache", type=Path, metavar="DIR", help="keeps prompts' embeddings")
    parser.add_argument("--prompt", help="what the page shows before anybody types")
    parser.add_argument(
        "--anchors",
        nargs="+",
        choices=STREAM_NAMES,
        metavar="NAME",
        help="one, or two side by side, that the page begins with, and that are compiled at the start (default: static "
        "beside adastate for tiny, else the model's own)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    parser.add_argument("--token", help="what clients must know; needed, and made if it is not given, beyond loopback")
    parser.add_argument(
        "--recordings", type=Path, default=Path("live"), metavar="DIR", help="what sessions leave (default live)"
    )
    parser.add_argument("--keep", type=int, default=50, metavar="N", help="recordings that are kept (default 50)")
    parser.add_argument(
        "--session-seconds", type=float, default=600.0, metavar="S", help="length of a session at most (default 600)"
    )
    parser.add_argument("--queue", type=int, default=32, metavar="N", help="sessions that may wait (default 32)")
    add_arguments(parser)
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuses what can be refused before JAX is imported."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {', '.join(missing)}: pip install -r requirements.txt")
    find_model(options.checkpoint)
    placement_of(options)
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port={options.port}: must lie in 0 … 65535")
    for name, value in (("keep", options.keep), ("queue", options.queue), ("session-seconds", options.session_seconds)):
        if not 1 <= value <= 10**6:  # neither is NaN
            raise UserError(f"--{name}={value:g}: must lie in 1 … 1,000,000")
    if options.prompt is not None and not options.prompt.strip():
        raise UserError("--prompt: is empty; say what to show")
    if options.anchors and len(options.anchors) > 2:
        raise UserError("--anchors: name one, or two")
    if options.token is not None and len(options.token) < 8:
        raise UserError("--token: has fewer than 8 characters")


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens, before any work."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host={host}: {error.strerror or error}") from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(128)
        except OSError as error:
            raise UserError(f"--port={port}: cannot listen there ({reason(error)}); name another") from None
        yield listener


def _offer(model: "Model", options: argparse.Namespace):
    """What the page shows before anybody types."""
    from adastate_jax.data.worlds import caption_pattern, captions
    from adastate_jax.serving.app import Offer

    worlds = model.config.data.kind == "worlds"
    vocabulary = caption_pattern(model.config.data.worlds) if worlds else ""
    examples = captions(model.config.data.worlds) if worlds else ("a red fox runs through fresh snow at dawn",)
    anchors = tuple(options.anchors or (("static", "adastate") if worlds else ("",)))
    return Offer(model.name, options.prompt or examples[0], anchors, STREAM_NAMES, examples, vocabulary)


def _serve(options: argparse.Namespace, listener: socket.socket, announce: str) -> None:
    """Loads the model, and serves it until a signal comes."""
    import asyncio

    import cv2
    import uvicorn

    from adastate_jax.generation.loading import load
    from adastate_jax.generation.takes import check_anchors
    from adastate_jax.serving import protocol
    from adastate_jax.serving.app import MOST_PICTURE_BYTES, make_app
    from adastate_jax.serving.generator import Generator, facts_of
    from adastate_jax.serving.guard import Guard
    from adastate_jax.serving.limits import Door
    from adastate_jax.serving.live import Live
    from adastate_jax.serving.queue import Queue
    from adastate_jax.serving.recording import Store

    cv2.setNumThreads(1)  # the cores are the model's; pictures are small work
    store = Store(options.recordings, options.keep)
    store.check()
    model = load(
        options.checkpoint,
        decoder=options.decoder,
        text_cache=options.text_cache,
        **vars(placement_of(options)),
    )
    offer = _offer(model, options)
    check_anchors(model, [anchor or None for anchor in offer.anchors])
    live = Live(facts_of(model, offer.anchors), Queue(options.session_seconds, options.queue))
    generator = Generator(model, live, store, offer.anchors, offer.prompt)
    app = make_app(live, generator, store, offer, Guard(Door(options.host, options.token), MOST_PICTURE_BYTES))
    config = uvicorn.Config(
        app,
        log_level="warning",
        ws="websockets-sansio",
        ws_max_size=4 * protocol.MOST_BYTES,
        ws_per_message_deflate=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )

    logging.getLogger("uvicorn.error").addFilter(_without_trace_of_a_client)

    class Server(uvicorn.Server):
        """Leaves signals to `interrupts`."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    server = Server(config)
    with deferred("ending the sessions") as stop:

        async def run() -> None:
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            print(announce, flush=True)
            while not serving.done():
                server.should_exit = server.should_exit or stop.requested
                await asyncio.wait((serving,), timeout=0.1)
            await serving

        asyncio.run(run())


def _without_trace_of_a_client(record: logging.LogRecord) -> bool:
    """Takes the traceback off what a client sent: text that is no UTF-8 has the socket closed, and that is all."""
    if record.exc_info and isinstance(record.exc_info[1], UnicodeDecodeError):
        record.exc_info = record.exc_text = None
    return True


def main(arguments: Sequence[str]) -> int:
    """Parses the command line and serves."""
    options = _parser().parse_args(arguments)
    _check(options)
    if not is_loopback(options.host) and options.token is None:
        options.token = secrets.token_urlsafe(12)
    with _listening(options.host, options.port) as listener:
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"http://{host}:{listener.getsockname()[1]}/"
        starting()
        from adastate_jax.generation.programs import programs_kept

        with programs_kept(options.cache):
            _serve(options, listener, f"{address}#token={options.token}" if options.token else address)
    return 0


if __name__ == "__main__":
    run_command(main)
