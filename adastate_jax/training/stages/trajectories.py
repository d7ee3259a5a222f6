"""The teacher's ODE trajectories, drawn once per work directory."""

import functools
import io
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from adastate_jax import distributed, seals
from adastate_jax.config.stages import ode_sigmas
from adastate_jax.console import progress
from adastate_jax.diffusion import draw_normal
from adastate_jax.errors import UserError, reading, writing
from adastate_jax.files import whole_file
from adastate_jax.sharding import batch_sharding, fetch, local_rows, shard_batch
from adastate_jax.training.frozen import batch_text
from adastate_jax.training.initialize import sample_trajectory
from adastate_jax.training.stages.inputs import read_texts
from adastate_jax.training.stages.run import Run


def make_trajectories(run: Run) -> Callable[[np.ndarray], np.ndarray]:
    """Draws the teacher's trajectories into files, each whole or absent, and returns how to read them.

    Trajectory i is for caption i of the run's (modulo their number), from noise of key i: a missing file is made again,
    the same. One that the folder's seal does not list counts as missing, so those of versions without a seal are drawn
    again.

    Returns:
        Trajectory numbers [B] → kept states [B, T + 1, N, H, W, C] float32; a file is checked against the seal when it
        is first read.

    Raises:
        UserError: the disk has no room for all of them, they are not finite, or a file is damaged or cannot be written;
            the function that reads, too.
    """
    config, stream = run.config.initialize, run.config.stream
    try:
        sigmas = ode_sigmas(stream, config.ode_steps)
    except ValueError as error:
        raise UserError(f"config.initialize: {error}") from None
    keep_every = config.ode_steps // len(stream.sigmas)
    shape = (run.config.trajectory_frames, *run.latent_shape)
    kept = (len(stream.sigmas) + 1, *shape)
    key = run.key("trajectories")
    folder = run.workdir / "trajectories"
    per_file = config.batch_size
    num_files = -(-config.trajectories // per_file)

    @functools.partial(jax.jit, out_shardings=batch_sharding(run.mesh))
    def draw(teacher, frozen, null_text, numbers, batch):
        noise = jax.vmap(lambda i: draw_normal(jax.random.fold_in(key, i), shape))(numbers)
        text = batch_text(frozen, batch)
        return sample_trajectory(teacher, noise, text, null_text, sigmas, config.guidance_scale, keep_every)

    def file(index: int) -> Path:
        return folder / _name(index)

    sealed: dict[str, seals.Fingerprint] = {}  # of the first process, which writes

    def look() -> list[int]:
        """The numbers of files that are missing."""
        with writing(folder):
            folder.mkdir(exist_ok=True)
        if seals.is_sealed(folder):
            sealed.update(seals.read_seal(folder, _fix(folder)))
        found = [i for i in range(num_files) if file(i).name not in sealed or not file(i).exists()]
        needed = len(found) * per_file * math.prod(kept) * np.dtype(np.float32).itemsize
        if (free := shutil.disk_usage(folder).free) < needed:  # rather now than after hours
            raise UserError(
                f"{folder}: trajectories take {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free there; make room, or "
                "set config.initialize.trajectories to fewer"
            )
        return found

    if missing := distributed.from_first(look):
        teacher = run.network("teacher")
        with progress("trajectories (compiling)", num_files * per_file, (num_files - len(missing)) * per_file) as bar:
            for index in missing:
                run.refuse_removed()
                numbers = index * per_file + local_rows(per_file, run.mesh)
                texts = read_texts(run, run.captions, numbers)
                batch = shard_batch((numbers.astype(np.int32), texts), run.mesh)
                drawn = fetch(draw(teacher, run.frozen, run.negative_text, *batch))
                if not np.isfinite(drawn).all():
                    raise UserError(
                        f"{folder}: the teacher's trajectories are not finite; pretrain longer or lower "
                        "config.initialize.guidance_scale"
                    )
                distributed.from_first(functools.partial(write_trajectories, file(index), drawn, sealed))
                bar.set_description("trajectories")
                bar.update(per_file)
    run.metrics.spans.lap("data")
    return read_trajectories(folder, per_file, kept)


def write_trajectories(file: Path, drawn: np.ndarray, sealed: dict[str, seals.Fingerprint]) -> None:
    """Writes trajectories into a file, and adds it to what its folder's seal lists; raises UserError if it cannot."""
    content = io.BytesIO()
    np.save(content, drawn)  # into a file, it would not say why it could not
    with writing(file):
        with whole_file(file) as temporary:
            temporary.write_bytes(content.getbuffer())
            sealed[file.name] = seals.fingerprint(temporary)
        seals.write_seal(file.parent, sealed)


def read_trajectories(folder: Path, per_file: int, shape: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    """How to read the trajectories of a folder, `per_file` of them in each of its files, each of a shape.

    Raises:
        UserError: the seal or (from the function that reads) a file is missing or damaged.
    """
    sealed = seals.read_seal(folder, _fix(folder))

    @functools.cache
    def checked(index: int) -> Path:
        file = folder / _name(index)
        if file.name not in sealed:
            raise UserError(f"{file}: missing; {_fix(folder)}")
        seals.verify_file(file, sealed[file.name], _fix(file))
        return file

    def read(numbers: np.ndarray) -> np.ndarray:
        rows = []
        for number in numbers:
            index, row = divmod(int(number), per_file)
            file = checked(index)
            with reading(file, _fix(file), ValueError, IndexError):
                rows.append(np.load(file, mmap_mode="r")[row])
            if rows[-1].shape != shape:
                raise UserError(f"{file}: holds trajectories of another shape; {_fix(file)}")
        return np.stack(rows)

    return read


def _name(index: int) -> str:
    return f"{index:06d}.npy"


def _fix(path: Path) -> str:
    return f"remove {path} and run again, to draw anew"
