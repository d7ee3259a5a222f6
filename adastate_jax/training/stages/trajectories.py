"""The teacher's ODE trajectories, drawn once per work directory."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from adastate_jax.config.stages import ode_sigmas
from adastate_jax.console import progress
from adastate_jax.diffusion import draw_normal
from adastate_jax.errors import UserError
from adastate_jax.sharding import batch_sharding, shard_batch
from adastate_jax.training.initialize import sample_trajectory
from adastate_jax.training.stages.run import Run, trained


def make_trajectories(run: Run, captions: Sequence[str]) -> Callable[[np.ndarray], np.ndarray]:
    """Draws the teacher's trajectories into files, each whole or absent, and returns how to read them.

    Trajectory i is for caption i (modulo their number), from noise of key i: a missing file is made again, the same.

    Returns:
        Trajectory numbers [B] → kept states [B, T + 1, N, H, W, C] float32.
    """
    config, stream = run.config.initialize, run.config.stream
    try:
        sigmas = ode_sigmas(stream, config.ode_steps)
    except ValueError as error:
        raise UserError(f"config.initialize: {error}") from None
    keep_every = config.ode_steps // len(stream.sigmas)
    shape = (run.config.data.num_frames, *run.latent_shape)
    key = run.key("trajectories")
    folder = run.workdir / "trajectories"
    folder.mkdir(exist_ok=True)
    per_file = config.batch_size
    num_files = -(-config.trajectories // per_file)

    @functools.partial(jax.jit, out_shardings=batch_sharding(run.mesh))
    def draw(teacher, frozen, null_text, numbers, token_ids, mask):
        noise = jax.vmap(lambda i: draw_normal(jax.random.fold_in(key, i), shape))(numbers)
        text = frozen.text_encoder.encode(token_ids, mask)
        return sample_trajectory(teacher, noise, text, null_text, sigmas, config.guidance_scale, keep_every)

    def file(index: int) -> Path:
        return folder / f"{index:06d}.npy"

    missing = [i for i in range(num_files) if not file(i).is_file()]
    if missing:
        teacher = trained(run, "pretrain", "ema")
        with progress("trajectories (compiling)", num_files * per_file, (num_files - len(missing)) * per_file) as bar:
            for index in missing:
                numbers = np.arange(index * per_file, (index + 1) * per_file)
                token_ids, mask = run.tokens([captions[int(i) % len(captions)] for i in numbers])
                batch = shard_batch((numbers.astype(np.int32), token_ids, mask), run.mesh)
                drawn = np.asarray(draw(teacher, run.frozen, run.negative_text, *batch))
                if not np.isfinite(drawn).all():
                    raise UserError(
                        f"{folder}: the teacher's trajectories are not finite; pretrain longer or lower "
                        "config.initialize.guidance_scale"
                    )
                partial = folder / ".partial.npy"
                np.save(partial, drawn)
                partial.replace(file(index))
                bar.set_description("trajectories")
                bar.update(per_file)

    def read(numbers: np.ndarray) -> np.ndarray:
        rows = []
        for number in numbers:
            index, row = divmod(int(number), per_file)
            try:
                rows.append(np.load(file(index), mmap_mode="r")[row])
            except (OSError, ValueError) as error:
                raise UserError(f"{file(index)}: damaged ({error}); remove it and run again") from None
        return np.stack(rows)

    return read
