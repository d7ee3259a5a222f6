"""The true videos that a run is compared with, and the colours of their balls."""

import dataclasses

import numpy as np

from adastate_jax.config.files import parse_config
from adastate_jax.data.worlds import World, WorldConfig, captions, render_world
from adastate_jax.evaluation import small_world
from studies.changing_world import CONFIG, PER_CAPTION
from studies.rollouts import WORLD_SEED


def worlds_of_each_caption(config: WorldConfig, frames: int, count: int = PER_CAPTION) -> list[World]:
    """True videos, `count` of each caption, withheld ones too, in the order of the captions."""
    config = dataclasses.replace(config, num_frames=frames, withheld=())
    short = dataclasses.replace(config, num_frames=1)
    wanted, index = {caption: [] for caption in captions(config)}, 0
    while any(len(numbers) < count for numbers in wanted.values()):
        numbers = wanted[render_world(short, WORLD_SEED, index).caption]
        if len(numbers) < count:
            numbers.append(index)
        index += 1
    return [render_world(config, WORLD_SEED, number) for numbers in wanted.values() for number in numbers]


def colours_of(videos: np.ndarray, config: WorldConfig) -> np.ndarray:
    """The colour of the ball in each frame of videos [V, F, H, W, 3]: [V, F], −1 for none."""
    return small_world.subject_colours(videos, config.colours, config.subject_radius[0])


def with_withheld(videos: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns of videos with one more: whether the caption is in no training video."""
    config = parse_config([f"--config={CONFIG}:teacher"]).data.worlds
    withheld = np.isin(captions(config), config.withheld)
    return {**videos, "withheld": withheld[(videos["video"] // PER_CAPTION).astype(int)]}
