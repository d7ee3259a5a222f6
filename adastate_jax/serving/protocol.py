"""What is said on a session's socket: JSON both ways, each message a model here; and pictures in binary, to clients.

Every control has a number, which ascends, and gets two answers with that number: `received`, with the chunk that it is
meant for, and `applied`, with the chunk that it took effect with; or `refused` with the reason. The same number again
does nothing, and gets the same answer again. `asyncapi.py` publishes the models.
"""

import struct
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from adastate_jax.errors import UserError, one_line
from adastate_jax.streaming.names import STREAM_NAMES, TRANSITIONS

MOST_BYTES = 16 * 1024  # of a message from a client
MOST_CHARACTERS = 2000  # of a prompt
MOST_NUMBER = 2**31 - 1

Text = Annotated[str, StringConstraints(min_length=1, max_length=MOST_CHARACTERS, strip_whitespace=True)]
Number = Annotated[int, Field(ge=0, le=MOST_NUMBER, strict=True)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1, strict=True)]
Anchor = Literal["", *STREAM_NAMES]  # "" is the model's own
Anchors = Annotated[list[Anchor], Field(min_length=1, max_length=2)]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# --- from a client ----------------------------------------------------------------------------------------------------


class Control(Message):
    """What changes a session. `at` is the chunk that it waits for; none is the next one."""

    number: Number
    at: Number | None = None


class Prompt(Control):
    """Show this from a chunk on; no text goes on with the prompt that there is, so that a transition stands alone."""

    type: Literal["prompt"] = "prompt"
    text: Text | None = None
    transition: Literal[*TRANSITIONS] = "switch"
    chunks: Annotated[int, Field(ge=1, le=1000, strict=True)] = 4


class Restart(Control):
    """A new take: another seed, other anchors, another picture to start from, and what is not named stays as it is."""

    type: Literal["restart"] = "restart"
    text: Text | None = None
    seed: Seed | None = None
    anchors: Anchors | None = None
    picture: Annotated[str, StringConstraints(pattern="^([0-9a-f]{16})?$")] | None = Field(
        None, description="what POST …/picture answered; empty for none"
    )


class Pause(Control):
    type: Literal["pause"] = "pause"


class Resume(Control):
    type: Literal["resume"] = "resume"


class Stop(Control):
    type: Literal["stop"] = "stop"


class Withdraw(Control):
    """Takes back a control that has not been applied."""

    type: Literal["withdraw"] = "withdraw"
    target: Number


class Shown(Message):
    """The viewer has begun to show a chunk.

    Generation waits for the one who steers; nobody is sent many chunks that he has not shown.
    """

    type: Literal["shown"] = "shown"
    chunk: Number


class Ping(Message):
    type: Literal["ping"] = "ping"
    number: Number = 0


Incoming = Annotated[
    Prompt | Restart | Pause | Resume | Stop | Withdraw | Shown | Ping,
    Field(discriminator="type"),
]
_INCOMING = TypeAdapter(Incoming)


def parse(text: str) -> Message:
    """A client's message; raises UserError, one line, for anything else."""
    if len(text) > MOST_BYTES:
        raise UserError(f"message: has more than {MOST_BYTES} characters")
    try:
        return _INCOMING.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "message"
        raise UserError(one_line(f"{where}: {first['msg'].lower()}", 300)) from None
    except (ValueError, RecursionError):
        raise UserError("message: is no JSON") from None


# --- to a client ------------------------------------------------------------------------------------------------------


class Welcome(Message):
    """The first message on every socket."""

    type: Literal["welcome"] = "welcome"
    session: str
    role: Literal["steer", "watch"]
    prompt: str
    seed: int
    anchors: list[str]
    fps: int
    height: int
    width: int
    chunk_frames: int
    transitions: list[str]
    limit_seconds: float
    last_number: int = Field(description="the highest number of a control so far, -1 before the first")


class Queued(Message):
    type: Literal["queued"] = "queued"
    position: int = Field(description="sessions before this one, those that run included")
    waiting: int
    seconds: float = Field(description="estimated until it is this one's turn")


class Compiling(Message):
    """Programs are being compiled: how many of all are done."""

    type: Literal["compiling"] = "compiling"
    percent: int


class StateChange(Message):
    type: Literal["state"] = "state"
    state: Literal["queued", "starting", "running", "paused", "ended"]
    reason: str = ""
    chunk: int = 0
    seconds_left: float = 0


class Received(Message):
    type: Literal["received"] = "received"
    number: int
    chunk: int = Field(description="the chunk that it is meant for")


class Applied(Message):
    type: Literal["applied"] = "applied"
    number: int
    chunk: int = Field(description="the first chunk that it took effect with")


class Refused(Message):
    type: Literal["refused"] = "refused"
    number: int | None = None
    reason: str


class Withdrawn(Message):
    """Control `target` will not be applied; all viewers hear it."""

    type: Literal["withdrawn"] = "withdrawn"
    number: int
    target: int


class Entry(Message):
    """Another viewer, or the same after a reconnection, learns from these what was asked for, and what is coming."""

    type: Literal["entry"] = "entry"
    number: int
    kind: str
    text: str
    transition: str = ""
    chunk: int
    applied: bool


class ChunkDone(Message):
    """A chunk was generated. Milliseconds: the network's part, with the decoder's, and with encoding for the socket."""

    type: Literal["chunk"] = "chunk"
    chunk: int
    take: int
    frames: int
    lead: int = Field(description="chunks that are generated and not shown yet")
    network_ms: float
    decoded_ms: float
    total_ms: float


class Dropped(Message):
    """This viewer was too slow: frames that it did not get, in all."""

    type: Literal["dropped"] = "dropped"
    frames: int


class Meters(Message):
    """Measured by the evaluation package, for each panel."""

    type: Literal["meters"] = "meters"
    chunk: int
    motion: list[float] = Field(description="mean optical flow, % of the height per second")
    lock: list[float] = Field(description="structural similarity to the take's first frame, at most 1")
    drift: list[float] = Field(description="1 - similarity of colour histograms to the take's first frame, 0 … 1")
    hue: list[float] = Field(description="mean hue, degrees")


class Pong(Message):
    type: Literal["pong"] = "pong"
    number: int


Outgoing = Annotated[
    Welcome
    | Queued
    | Compiling
    | StateChange
    | Received
    | Applied
    | Refused
    | Withdrawn
    | Entry
    | ChunkDone
    | Dropped
    | Meters
    | Pong,
    Field(discriminator="type"),
]
OUTGOING = TypeAdapter(Outgoing)


# --- pictures ---------------------------------------------------------------------------------------------------------


class Pictures(NamedTuple):
    """Encoded frames of a chunk, from frame number `first` of its `count` on."""

    chunk: int
    take: int
    first: int
    count: int
    frames: tuple[bytes, ...]


_HEAD = struct.Struct("<IHHHH")  # chunk, take, first, count, frames in this message
_LENGTH = struct.Struct("<I")


def pack(pictures: Pictures) -> bytes:
    """A binary message: little-endian uint32 chunk, uint16 take, first, count and n; n × (uint32 length, picture)."""
    head = _HEAD.pack(pictures.chunk, pictures.take & 0xFFFF, pictures.first, pictures.count, len(pictures.frames))
    return head + b"".join(_LENGTH.pack(len(frame)) + frame for frame in pictures.frames)


def unpack(message: bytes) -> Pictures:
    """What `pack` packed; raises UserError for anything else."""
    try:
        chunk, take, first, count, number = _HEAD.unpack_from(message)
        at, frames = _HEAD.size, []
        for _ in range(number):
            (length,) = _LENGTH.unpack_from(message, at)
            at += _LENGTH.size
            frames.append(message[at : at + length])
            at += length
    except struct.error:
        at = -1
    if at != len(message):
        raise UserError("pictures: the message is cut off")
    return Pictures(chunk, take, first, count, tuple(frames))
