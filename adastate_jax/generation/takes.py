"""Takes: one seed, seen through one anchor or several side by side, directed while it runs; and files that replay them.

A session is a list of takes. Each panel of a take is what `stream` makes of its seed, its anchor and its schedule; so a
take that was directed chunk by chunk is replayed to the same latents by the schedule that it left behind.
"""

import dataclasses
import io
import time
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from adastate_jax.errors import UserError, shown
from adastate_jax.generation.loading import Model, stream_config
from adastate_jax.generation.provenance import made_with
from adastate_jax.generation.saved_streams import fingerprint
from adastate_jax.generation.video_stream import VideoStream, stream
from adastate_jax.media import FPS
from adastate_jax.media.pictures import encode_png
from adastate_jax.streaming.cues import Cue, check_schedule
from adastate_jax.streaming.prompts import obstacle
from adastate_jax.texts import read_json

MOST_PANELS = 2
_FORMAT = "adastate session 1"
_FIX = "name a session.json of serve or watch"


@dataclasses.dataclass(frozen=True)
class Panel:
    """One video of a take: its anchor (None is the model's own), and the schedule that it followed."""

    anchor: str | None
    cues: tuple[Cue, ...]


@dataclasses.dataclass(frozen=True)
class Take:
    """What a take was made of, and how far it went.

    Attributes:
        seed: of the noise, the same in all panels.
        panels: from left to right.
        chunks: how many were generated.
        checksums: CRC-32 of each chunk's latents, float32 in the order panel, frame, row, column, channel.
        picture: the PNG that all panels start from, of the model's size, if any.
    """

    seed: int
    panels: tuple[Panel, ...]
    chunks: int
    checksums: tuple[int, ...] = ()
    picture: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """One chunk of a take: frames uint8 [F, H, panels · W, 3], the latents' checksum, and how long it took in seconds.

    `network` is until the latents were there, `decoded` until the frames were, too.
    """

    frames: np.ndarray
    checksum: int
    network: float
    decoded: float


class RunningTake:
    """A take in the making. One thread uses it; nothing is dispatched ahead, so that a direction waits for no chunk."""

    def __init__(
        self,
        model: Model,
        prompt: str,
        seed: int,
        anchors: Sequence[str | None],
        picture: np.ndarray | None = None,
        schedules: Sequence[Sequence[Cue]] | None = None,
    ):
        """Begins a take.

        Args:
            prompt: what to show at first.
            anchors: of the panels, 1 … `MOST_PANELS`.
            picture: uint8 [1, height, width, 3] that all panels start from.
            schedules: of each panel, instead of `prompt`.

        Raises:
            UserError: as `stream`; or the panels' chunks have different lengths.
        """
        check_anchors(model, anchors)
        self.model, self.seed, self.anchors = model, seed, tuple(anchors)
        self._picture = None if picture is None else encode_png(picture[0])
        self._videos: list[VideoStream] = []
        for number, anchor in enumerate(self.anchors):
            what = {"prompt": prompt} if schedules is None else {"prompts": schedules[number]}
            video = stream(model, seed=seed, anchor=anchor, start=picture, **what).video
            video.dispatches_ahead = False
            self._videos.append(video)
        self._checksums: list[int] = []

    @property
    def next_chunk(self) -> int:
        """Number of the chunk, counted in this take, that `step` makes next."""
        return self._videos[0].next_chunk

    @property
    def prompt(self) -> str:
        """What is shown, or being blended to."""
        return self._videos[0].settings.cues[-1].prompt

    def direct(self, prompt: str | None, transition: str = "switch", chunks: int = 4) -> None:
        """`VideoStream.direct` of every panel; one whose anchor has no such transition switches instead.

        Raises:
            UserError: as that; or no panel can do the transition. Then nothing was changed.
        """
        if prompt is not None:
            check_prompt(self.model, prompt)
        reasons = [obstacle(transition, stream_config(self.model.config.stream, anchor)) for anchor in self.anchors]
        if all(reasons):
            raise UserError(f"{transition} {reasons[0]}")
        for video, reason in zip(self._videos, reasons, strict=True):
            video.direct(prompt, "switch" if reason else transition, chunks)

    def step(self) -> Step:
        """Generates the next chunk of all panels.

        Raises:
            UserError: frames are not finite.
        """
        begun = time.perf_counter()
        for video in self._videos:
            video.dispatch()
        latents = [jax.block_until_ready(video.latents()) for video in self._videos]
        network = time.perf_counter() - begun
        frames = np.concatenate([next(video)[0] for video in self._videos], axis=2)
        decoded = time.perf_counter() - begun
        checksum = 0
        for one in latents:
            checksum = zlib.crc32(np.ascontiguousarray(np.asarray(one, np.float32)), checksum)
        self._checksums.append(checksum)
        return Step(frames, checksum, network, decoded)

    def take(self) -> Take:
        """What it takes to make it again, up to here."""
        panels = tuple(
            Panel(anchor, video.settings.cues) for anchor, video in zip(self.anchors, self._videos, strict=True)
        )
        return Take(self.seed, panels, len(self._checksums), tuple(self._checksums), self._picture)


def check_prompt(model: Model, prompt: str) -> None:
    """Raises UserError for a prompt that says nothing, or that the text encoder would cut."""
    check_schedule((Cue(0, prompt),), "prompt")
    if not model.fits(prompt):
        raise UserError(f"the prompt is longer than {model.config.text.text_length} tokens: shorten it")


def check_anchors(model: Model, anchors: Sequence[str | None]) -> None:
    """Raises UserError for anchors that cannot stand side by side."""
    if not 1 <= len(anchors) <= MOST_PANELS:
        raise UserError(f"anchors: name 1 to {MOST_PANELS}, got {len(anchors)}")
    lengths = {stream_config(model.config.stream, anchor).chunk_frames for anchor in anchors}
    if len(lengths) > 1:
        raise UserError(f"anchors: {' and '.join(map(str, anchors))} have chunks of different lengths")


def replay(model: Model, takes: Sequence[Take]) -> Iterator[Step]:
    """The chunks of a session again, to the same latents.

    Raises:
        UserError: as `stream`.
    """
    for take in takes:
        picture = None if take.picture is None else _decode(take.picture, *model.config.data.size)
        anchors = [panel.anchor for panel in take.panels]
        running = RunningTake(model, "", take.seed, anchors, picture, [panel.cues for panel in take.panels])
        for _ in range(take.chunks):
            yield running.step()


def _decode(png: bytes, height: int, width: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
            if picture.size != (width, height):
                raise ValueError(f"of {picture.size} pixels")
            return np.array(picture.convert("RGB"))[None]
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"session: its picture is damaged ({error}); save the session again") from None


# --- session files ----------------------------------------------------------------------------------------------------


def session_head(model: Model) -> dict[str, Any]:
    """What a session's file says of the model."""
    return {
        "format": _FORMAT,
        "model": fingerprint(model),
        "made_with": made_with(),
        "fps": FPS,
        "size": list(model.config.data.size),
        "checkpoint": model.name,
    }


def take_to_dict(take: Take) -> dict[str, Any]:
    """A take as an entry of a session's file."""
    found = dataclasses.asdict(take)
    return found | {"picture": take.picture and b64encode(take.picture).decode()}


def read_session(path: str | Path, model: Model) -> tuple[Take, ...]:
    """The takes of a session's file.

    Raises:
        UserError: it cannot be read, or as `session_takes`.
    """
    return session_takes(read_json(path, _FIX), path, model)


def session_takes(found: Any, path: str | Path, model: Model) -> tuple[Take, ...]:
    """The takes in what a session's file holds, or what its video says of itself.

    Raises:
        UserError: it is of no session, damaged, or was made with another model.
    """
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise UserError(f"{path}: is no session; {_FIX}")
    if found.get("model") != fingerprint(model):
        raise UserError(f"{path}: was made with another model; name that with --checkpoint")
    try:
        takes = tuple(_take_of(entry) for entry in found["takes"])
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(f"{path}: is damaged ({shown(error)}); {_FIX}") from None
    if not any(take.chunks for take in takes):
        raise UserError(f"{path}: nothing was generated in this session")
    return tuple(take for take in takes if take.chunks)


def _take_of(entry: dict[str, Any]) -> Take:
    panels = []
    for panel in entry["panels"]:
        cues = tuple(Cue(**cue) for cue in panel["cues"])
        check_schedule(cues)
        panels.append(Panel(panel["anchor"], cues))
    checksums, chunks = tuple(entry["checksums"]), entry["chunks"]
    if type(chunks) is not int or not 0 <= chunks == len(checksums) or not all(type(sum) is int for sum in checksums):
        raise ValueError("its chunks are not those that its checksums are of")
    picture = entry.get("picture")
    picture = b64decode(picture, validate=True) if picture is not None else None
    return Take(entry["seed"], tuple(panels), chunks, checksums, picture)
