"""The server's parts put together around a small model."""

from pathlib import Path

from fastapi import FastAPI

from adastate_jax.generation.loading import Model
from adastate_jax.serving.app import MOST_PICTURE_BYTES, Allowed, Offer, make_app
from adastate_jax.serving.generator import Generator, facts_of
from adastate_jax.serving.guard import Guard
from adastate_jax.serving.limits import Door
from adastate_jax.serving.live import Live
from adastate_jax.serving.queue import Queue
from adastate_jax.serving.recording import Store

ANCHORS = ("static", "adastate")
PROMPT = "a camera pans left"
LOOPBACK = Door("127.0.0.1", None)
MANY = Allowed(sessions=(1e6, 1e6), sockets=(1e6, 1e6), messages=(1e6, 1e6), pictures=(1e6, 1e6))


def assemble(
    model: Model, folder: Path, door: Door = LOOPBACK, allowed: Allowed | None = None, limit: float = 600.0
) -> tuple[FastAPI, Live, Store]:
    """The application, its desk and its recordings; `limit` is a session's length in seconds."""
    live = Live(facts_of(model, ANCHORS), Queue(limit, 2))
    store = Store(folder, 20)
    store.check()
    generator = Generator(model, live, store, ANCHORS, PROMPT)
    offer = Offer("small", PROMPT, ANCHORS, ("static", "adastate", "longlive"), (PROMPT,), "")
    return make_app(live, generator, store, offer, Guard(door, MOST_PICTURE_BYTES), allowed or MANY), live, store
