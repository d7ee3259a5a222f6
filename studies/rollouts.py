"""Videos of what is trained, and true ones to compare them with."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from adastate_jax.checkpoint import latest_step, load_tree
from adastate_jax.config.files import load_config
from adastate_jax.config.stages import ode_sigmas
from adastate_jax.data.worlds import World, WorldConfig, render_world
from adastate_jax.diffusion import draw_normal
from adastate_jax.generation.loading import Model, decode_frames
from adastate_jax.generation.video_stream import stream_batch
from adastate_jax.sharding import make_mesh
from adastate_jax.streaming.carry import seed_keys
from adastate_jax.training.frozen import Frozen, abstract_dit, abstract_frozen, embed_prompts, with_shardings
from adastate_jax.training.initialize import sample_trajectory

WORLD_SEED = 10_000  # of the worlds whose captions are the prompts; no world of the training data


def worlds_for(config: WorldConfig, frames: int, count: int) -> list[World]:
    """The `count` true videos, ordered by caption."""
    config = dataclasses.replace(config, num_frames=frames)
    return sorted((render_world(config, WORLD_SEED, i) for i in range(count)), key=lambda world: world.caption)


def roll_out(model: Model, prompts: list[str], seed: int, frames: int) -> np.ndarray:
    """Videos uint8 [V, F, H, W, 3]; sample i's noise is of seed · V + i."""
    chunks = stream_batch(model, prompts, seed * len(prompts), frames)
    return np.concatenate(list(chunks), axis=1)


def roll_out_teacher(folder: Path, prompts: list[str], seed: int) -> np.ndarray:
    """The bidirectional teacher's own videos of one training length, by the ODE that the student learned from."""
    config, mesh = load_config(folder / "config.json"), make_mesh()
    step = latest_step(folder / "pretrain")
    teacher = load_tree(folder / "pretrain" / str(step), with_shardings(abstract_dit(config), mesh), "ema")
    frozen: Frozen = load_tree(folder / "frozen", with_shardings(abstract_frozen(config), mesh))
    keys = seed_keys(seed * len(prompts), len(prompts))
    shape = (config.data.num_frames, *config.latent_shape)
    sigmas = ode_sigmas(config.stream, config.initialize.ode_steps)

    @jax.jit
    def draw(teacher, text, null_text):
        noise = jax.vmap(lambda key: draw_normal(key, shape))(keys)
        guidance = config.initialize.guidance_scale
        return sample_trajectory(teacher, noise, text, null_text, sigmas, guidance, config.initialize.ode_steps)[:, -1]

    latents = draw(teacher, embed_prompts(frozen, prompts), embed_prompts(frozen, [config.negative_prompt]))
    return np.asarray(decode_frames(frozen.codec, latents, (), True)[0])


def glimpses(video: np.ndarray, length: int) -> np.ndarray:
    """Every third frame of the first training length and, after a white one, of the video's last: [F, H, W, 3]."""
    last = video[-length:] if len(video) > length else np.full_like(video, 255)
    return np.concatenate([video[:length:3], np.full_like(video[:1], 255), last[::3]])
