"""Whether a teacher knows windows of long videos: what distillation on long rollouts asks of it."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.checkpoint import latest_step, load_tree
from adastate_jax.config.files import load_config
from adastate_jax.data.worlds import World
from adastate_jax.diffusion import MAX_TIMESTEP, add_noise, draw_normal, flow_to_clean
from adastate_jax.generation.loading import decode_frames, encode_frames
from adastate_jax.sharding import make_mesh
from adastate_jax.streaming.carry import seed_keys
from adastate_jax.training.frozen import Frozen, abstract_dit, abstract_frozen, embed_prompts, with_shardings
from studies.changing_world import CHUNK, LENGTH
from studies.changing_world.worlds import colours_of

STARTS_AT = range(0, 34, CHUNK)  # frames: any chunk of a long rollout may begin what is scored
SIGMAS = (0.7, 0.9)  # levels of noise that distillation scores much


def measure_windows(workdir: Path, worlds: list[World]) -> Iterator[dict[str, object]]:
    """What the teacher makes of true windows under noise: a row for each level of noise and window's first frame.

    `right`: of the frames that show a ball, the share in which its estimate of the clean window shows one of that
    colour. `error`: of its estimate, the mean square, in latents of unit variance.
    """
    config, mesh = load_config(workdir / "config.json"), make_mesh()
    step = latest_step(workdir / "pretrain")
    teacher = load_tree(workdir / "pretrain" / str(step), with_shardings(abstract_dit(config), mesh), "ema")
    frozen: Frozen = load_tree(workdir / "frozen", with_shardings(abstract_frozen(config), mesh))
    text = teacher.text_keys_values(embed_prompts(frozen, [world.caption for world in worlds]))
    keys = seed_keys(0, len(worlds))

    @jax.jit
    def estimate(teacher, clean, text, sigma):
        noisy = add_noise(clean, jax.vmap(lambda key: draw_normal(key, clean.shape[1:]))(keys), sigma)
        flow = teacher(noisy, MAX_TIMESTEP * sigma, text, np.arange(clean.shape[1]))[0]
        return flow_to_clean(flow, noisy, sigma)

    for start in STARTS_AT:
        videos = np.stack([world.video[start : start + LENGTH] for world in worlds])
        clean = encode_frames(frozen.codec, jnp.asarray(videos))
        true = colours_of(videos, config.data.worlds)
        for sigma in SIGMAS:
            found = estimate(teacher, clean, text, jnp.full(clean.shape[:2], sigma))
            shown = colours_of(np.asarray(decode_frames(frozen.codec, found, (), True)[0]), config.data.worlds)
            error = float(jnp.square(found - clean).mean())
            yield {"sigma": sigma, "start": start, "right": float((shown == true)[true >= 0].mean()), "error": error}
