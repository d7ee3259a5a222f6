"""What determines a video, beside the model and the frames that it starts from; wrong calls are refused here."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from adastate_jax.checks import MOST_SECONDS, is_number, is_whole
from adastate_jax.errors import UserError, shown
from adastate_jax.generation.loading import Model
from adastate_jax.media import FPS
from adastate_jax.streaming.cues import Cue, check_schedule
from adastate_jax.texts import is_text


@dataclasses.dataclass(frozen=True)
class Settings:
    """What determines a video, beside the model and the frames that it starts from.

    Attributes:
        cues: when prompts change, and how.
        prompts: of each cue, a text per sample.
        seed: of the first sample.
        num_frames: video frames in all; None is without end.
        anchor: a preset or strategy instead of the model's; None keeps it.

    Raises:
        UserError: one of them is of a wrong type, or out of range.
    """

    cues: tuple[Cue, ...]
    prompts: tuple[tuple[str, ...], ...]
    seed: int
    num_frames: int | None
    anchor: str | None

    def __post_init__(self):
        check_schedule(self.cues)
        if len(self.prompts) != len(self.cues) or len({len(texts) for texts in self.prompts}) != 1 or not self.batch:
            raise UserError("prompts: give at least one text, and as many of each entry")
        for text in (text for texts in self.prompts for text in texts):
            if not is_text(text):
                raise UserError(f"prompt: must be a text, got {shown(text)}")
        object.__setattr__(self, "seed", _whole(self.seed, "seed"))
        if not 0 <= self.seed <= 2**32 - self.batch:
            samples = f" for {self.batch} samples" if self.batch > 1 else ""
            raise UserError(f"seed must lie in 0 … {2**32 - self.batch}{samples}, got {shown(self.seed)}")
        if self.num_frames is not None:
            object.__setattr__(self, "num_frames", _whole(self.num_frames, "num_frames"))
            if not 1 <= self.num_frames <= MOST_SECONDS * FPS:
                most = MOST_SECONDS * FPS
                raise UserError(f"num_frames must lie in 1 … {most:,}, or be None, got {shown(self.num_frames)}")
        if self.anchor is not None and not isinstance(self.anchor, str):
            raise UserError(f"anchor must be a name, or None, got {shown(self.anchor)}")

    @property
    def batch(self) -> int:
        return len(self.prompts[0])


def frames_of(seconds: Any) -> int | None:
    """Video frames of a length in seconds, None of None.

    Raises:
        UserError: it is no number, not positive, or absurd.
    """
    if seconds is None:
        return None
    if not is_number(seconds):
        raise UserError(f"seconds must be a number, or None, got {shown(seconds)}")
    if not 0 < seconds < MOST_SECONDS:  # nor is NaN
        raise UserError(f"seconds must be positive and below {MOST_SECONDS:,}, got {shown(seconds)}")
    return math.ceil(seconds * FPS)


def texts_of(prompts: Any) -> tuple[str, ...]:
    """The texts of a list of them; raises UserError for what is none. That they are texts, `Settings` checks."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise UserError(f"prompts must be a list of texts, got {shown(prompts)}")
    return tuple(prompts)


def cues_of(prompts: Any) -> tuple[Cue, ...]:
    """The entries of a schedule; raises UserError for what is none. What is in them, `Settings` checks."""
    if not isinstance(prompts, Sequence):
        raise UserError(f"prompts must be a schedule, a list of Cue, or the file of one, got {shown(prompts)}")
    return tuple(prompts)


def check_model(model: Any) -> None:
    """Raises UserError for what is no model."""
    if not isinstance(model, Model):
        raise UserError(f"model must be what load returns, got {shown(model)}")


def check_start(model: Model, start: Any) -> None:
    """Raises UserError for what is no frames of the model's size, uint8 [n, height, width, 3]."""
    wanted = f"start must be frames uint8 [n, {', '.join(map(str, model.config.data.size))}, 3]"
    if not isinstance(start, np.ndarray | jax.Array):
        raise UserError(f"{wanted}, got {type(start).__name__}")
    if start.dtype != np.uint8 or start.ndim != 4 or not len(start) or start.shape[1:] != (*model.config.data.size, 3):
        raise UserError(f"{wanted}, got {start.dtype} {list(start.shape)}")


def _whole(value: Any, name: str) -> int:
    if not is_whole(value):
        raise UserError(f"{name} must be a whole number, got {shown(value)}")
    return int(value)
