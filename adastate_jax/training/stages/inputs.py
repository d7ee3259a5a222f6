"""What the stages read: clips, prompts and the frozen parts, each made once per work directory."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from adastate_jax import distributed
from adastate_jax.checkpoint import is_finished, load_tree, save_tree
from adastate_jax.config.run import Config
from adastate_jax.data.batches import open_source, read_batch
from adastate_jax.data.prompts import prompts as prompts_dataset
from adastate_jax.data.videos import videos as videos_dataset
from adastate_jax.data.worlds import worlds as worlds_dataset
from adastate_jax.errors import UserError
from adastate_jax.models.patch_codec import PatchCodec, fit_patch_codec
from adastate_jax.models.text import TextEncoder
from adastate_jax.sharding import init_sharded
from adastate_jax.training.frozen import Frozen, abstract_frozen, with_shardings
from adastate_jax.training.stages.run import Run, key_of, start_of

CODEC_CLIPS = 256


def open_clips(config: Config, workdir: Path):
    """The source of clips, built in the work directory where it is not there yet; or else of the run started from."""
    if config.start_from:
        return open_clips(*start_of(config))
    data = config.data
    if data.kind == "worlds":
        builder = worlds_dataset(data.worlds, data.num_worlds, 1, config.seed)
    else:
        builder = videos_dataset(data.folder, data.clips)
    return open_source(builder, workdir / "data", "train")


def open_prompts(config: Config, workdir: Path, clips) -> "Texts":
    """The prompts that distillation draws from: of a file, or else the captions of the clips."""
    if config.data.prompts:
        source = open_source(prompts_dataset(config.data.prompts), workdir / "data", "train")
        return Texts(source, "prompt")
    return Texts(clips, "caption")


@dataclasses.dataclass(frozen=True)
class Texts(Sequence):
    """One text feature of a source."""

    source: Any
    feature: str

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return read_batch(self.source, [index])[self.feature][0]


def make_frozen(config: Config, workdir: Path, clips, mesh) -> Frozen:
    """The codec, fitted to some clips, and the text encoder; both are made or taken over once per work directory."""
    folder = workdir / "frozen"
    if not is_finished(folder) and config.start_from:
        save_tree(folder, make_frozen(*start_of(config), clips, mesh))
    elif not is_finished(folder):
        codec = _fit_codec(config, clips)
        encoder = init_sharded(lambda key: TextEncoder(config.text, rngs=nnx.Rngs(key)), mesh, key_of(config, "frozen"))
        save_tree(folder, Frozen(codec, encoder))
    return load_tree(folder, with_shardings(abstract_frozen(config), mesh))


def _fit_codec(config: Config, clips) -> PatchCodec:
    """The codec, fitted to some clips by the first process; of several, the others have zeros in its place.

    `save_tree` writes what the first one has, and all load that. On the host: JAX takes an array that is made under a
    mesh of several processes for the same on all of them.
    """
    fitted: list[PatchCodec] = []

    def fit() -> None:
        chosen = np.linspace(0, len(clips) - 1, min(CODEC_CLIPS, len(clips))).astype(int)
        try:
            codec = fit_patch_codec(config.codec, read_batch(clips, chosen)["video"])
        except ValueError as error:
            raise UserError(f"config.codec: {error}") from None
        fitted.append(jax.tree.map(np.asarray, codec))

    distributed.from_first(fit)
    return fitted[0] if fitted else jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_frozen(config).codec)


def read_clips(run: Run, stage: str, batch_size: int, step: int) -> dict[str, np.ndarray]:
    """A step's clips uint8 [B, F, H, W, 3], with token ids and mask [B, T] of their captions."""
    batch = read_batch(run.clips, run.indices(stage, step, batch_size, len(run.clips)))
    token_ids, mask = run.tokens(batch["caption"])
    return {"video": batch["video"], "token_ids": token_ids, "mask": mask}


def read_prompts(run: Run, stage: str, batch_size: int, step: int) -> dict[str, np.ndarray]:
    """Token ids and mask [B, T] of the prompts of batch number `step`."""
    texts = [run.prompts[int(i)] for i in run.indices(stage, step, batch_size, len(run.prompts))]
    token_ids, mask = run.tokens(texts)
    return {"token_ids": token_ids, "mask": mask}
