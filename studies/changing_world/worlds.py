"""The true videos that a run is compared with, and what is read of a video given what its caption says."""

import dataclasses

import numpy as np

from adastate_jax.data.worlds import World, WorldConfig, captions, render_world
from adastate_jax.evaluation import small_world
from studies.changing_world import PER_CAPTION
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


def laid_sideways(videos: np.ndarray, worlds: list[World]) -> np.ndarray:
    """The videos with those whose caption pans up or down on their side, see `small_world.sideways`."""
    return small_world.sideways(videos, np.array([bool(world.pan_y) for world in worlds]))


def colours_of(videos: np.ndarray, worlds: list[World], config: WorldConfig) -> np.ndarray:
    """The colour of the ball in each frame [V, F], −1 for none."""
    return small_world.subject_colours(laid_sideways(videos, worlds), config.colours, config.subject_radius[0])
