"""What the stages read: clips, texts and the frozen parts, each made once per work directory or beforehand."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adastate_jax import distributed
from adastate_jax.checkpoint import is_finished, load_tree, save_tree
from adastate_jax.config.run import Config
from adastate_jax.data.batches import open_source, read_batch
from adastate_jax.data.encoded import (
    EmbeddedPrompts,
    LatentClips,
    open_embeddings,
    open_latents,
    refuse_other_captions,
    refuse_unlike,
)
from adastate_jax.data.prompts import prompts as prompts_dataset
from adastate_jax.data.videos import videos as videos_dataset
from adastate_jax.data.worlds import worlds as worlds_dataset
from adastate_jax.errors import UserError
from adastate_jax.models.patch_codec import PatchCodec, fit_patch_codec
from adastate_jax.models.text import PieceTokenizer, TextEncoder
from adastate_jax.sharding import init_sharded
from adastate_jax.training.frozen import Frozen, abstract_frozen, embed_prompts, with_shardings
from adastate_jax.training.long_rollout import place_of
from adastate_jax.training.networks import start_of
from adastate_jax.training.stages.run import Run, key_of
from adastate_jax.weights.parts import fingerprint, refuse_other_sizes

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


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The data sets of a run; attributes are as `Run` has them.

    Attributes:
        names: what each data set is called, with a hash of all that it was made from.
    """

    clips: Any
    captions: Sequence[str]
    prompts: Sequence[str]
    critic_prompts: Sequence[str] | None
    names: dict[str, str]


def open_inputs(config: Config, workdir: Path) -> Inputs:
    """Opens all that the stages read, and makes in the work directory what is to be made there.

    Raises:
        UserError: something is missing or damaged, or does not belong to this run.
    """
    return _open_encoded(config) if config.data.encoded else _open_plain(config, workdir)


def _open_plain(config: Config, workdir: Path) -> Inputs:
    """Clips of pixels, and texts as texts."""
    clips = open_clips(config, workdir)
    captions = Texts(clips, "caption")

    def texts(path: str) -> "Texts":
        return Texts(open_source(prompts_dataset(path), workdir / "data", "train"), "prompt")

    prompts = texts(config.data.prompts) if config.data.prompts else captions
    critic_prompts = texts(config.data.critic_prompts) if config.data.critic_prompts else None
    sources = {"clips": clips, "prompts": prompts.source}
    if critic_prompts:
        sources["critic_prompts"] = critic_prompts.source
    names = {name: source.dataset_info.full_name for name, source in sources.items()}
    return Inputs(clips, captions, prompts, critic_prompts, names)


def _open_encoded(config: Config) -> Inputs:
    """Clips of latents, and texts as embeddings, all of the same networks."""
    data, text = config.data, config.text
    encoder = codec = None
    if data.encoders:
        folder = Path(data.encoders)
        refuse_other_sizes(folder, "text_encoder", text)
        refuse_other_sizes(folder, "vae", config.vae)
        tokenizer = PieceTokenizer(folder / "tokenizer.json", text.text_length)
        encoder, codec = (fingerprint(folder, "text_encoder"), tokenizer.digest), fingerprint(folder, "vae")
    fields = [name for name in ("embeddings", "critic_embeddings", "captions") if getattr(data, name)]
    opened = {
        name: open_embeddings(getattr(data, name), f"config.data.{name}", text.text_length, text.dim, encoder)
        for name in fields
    }
    refuse_unlike({f"config.data.{name}": prompts for name, prompts in opened.items()})
    names = {name: prompts.data_set.identity for name, prompts in opened.items()}
    clips = None
    if data.kind == "latents":
        clips = open_latents(data.latents, (config.clip_frames, *config.latent_shape), codec)
        names["latents"] = clips.data_set.identity
        if "captions" in opened:
            refuse_other_captions(opened["captions"], clips)
    captions = opened.get("captions") or opened["embeddings"]
    prompts = opened.get("embeddings") or captions
    for texts in opened.values():
        texts.guidance(config.negative_prompt)  # refused here if it is not there
    return Inputs(clips, captions, prompts, opened.get("critic_embeddings"), names)


def guiding_texts(config: Config, inputs: Inputs, frozen: Frozen) -> tuple[jax.Array, jax.Array]:
    """Embeddings of the empty and the negative prompt [1, T, text_dim]."""
    if isinstance(inputs.prompts, EmbeddedPrompts):
        return tuple(jnp.asarray(inputs.prompts.guidance(text)) for text in ("", config.negative_prompt))
    return tuple(embed_prompts(frozen, [text]) for text in ("", config.negative_prompt))


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
    """The codec, fitted to some clips, and the text encoder; both are made or taken over once per work directory.

    There are none where all is encoded beforehand.
    """
    if config.data.encoded:
        return abstract_frozen(config)
    folder = workdir / "frozen"
    missing = distributed.from_first(lambda: not is_finished(folder))
    if missing and config.start_from:
        save_tree(folder, make_frozen(*start_of(config), clips, mesh))
    elif missing:
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


def read_texts(run: Run, texts: Sequence[str], numbers: Sequence[int]) -> dict[str, np.ndarray]:
    """What a batch says of the texts with these numbers (modulo their count), for `batch_text`.

    Embeddings `text` [B, T, text_dim] where they were made beforehand, else `token_ids` and `mask` [B, T].
    """
    numbers = [int(number) % len(texts) for number in numbers]
    if isinstance(texts, EmbeddedPrompts):
        return {"text": texts.embeddings(numbers)}
    token_ids, mask = run.tokens([texts[number] for number in numbers])
    return {"token_ids": token_ids, "mask": mask}


def read_clips(run: Run, stage: str, batch_size: int, step: int) -> dict[str, np.ndarray]:
    """A step's clips, for `batch_latents` and `batch_text`, with what `read_texts` gives of their captions.

    `latents` [B, N, H, W, C] where they were made beforehand, else `video` uint8 [B, F, H, W, 3].
    """
    chosen = run.indices(stage, step, batch_size, len(run.clips))
    if isinstance(run.clips, LatentClips):
        latents, numbers = run.clips.read(chosen)
        return {"latents": latents, "text": run.captions.embeddings(numbers)}
    batch = read_batch(run.clips, chosen)
    token_ids, mask = run.tokens(batch["caption"])
    return {"video": batch["video"], "token_ids": token_ids, "mask": mask}


def read_prompts(run: Run, texts: Sequence[str], batch_size: int, number: int) -> dict[str, np.ndarray]:
    """What `read_texts` gives of the prompts of batch `number` of distillation's updates."""
    return read_texts(run, texts, run.indices("distill", number, batch_size, len(texts)))


def update_prompts(run: Run, iteration: int) -> dict[str, tuple[Sequence[str], int]]:
    """Which texts the networks that an iteration updates draw from, and which batch of them.

    Updates that share their prompts take one batch after another; with prompts of its own, each network counts its own
    updates. Either way an epoch shows each prompt once. Updates that go on with one rollout share its prompts: the
    rollout takes a batch, or two where its prompt changes on the way.
    """
    config = run.config.distill
    if config.continue_rollout:
        found = {}
        for name, number in config.update_numbers(iteration).items():
            place = place_of(number, config, run.config.stream, run.config.seed)
            found[name] = run.prompts, 2 * place.rollout + place.changed if config.prompt_change else place.rollout
        return found
    if run.critic_prompts is None:
        return {name: (run.prompts, number) for name, number in config.update_numbers(iteration).items()}
    found = {"critic": (run.critic_prompts, iteration)}
    if config.updates_student(iteration):
        found["student"] = (run.prompts, iteration // config.critic_ratio)
    return found
