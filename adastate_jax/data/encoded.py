"""What the commands embed and encode make for training: prompts as embeddings, and clips as latents."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds

from adastate_jax.data.batches import read_batch, read_examples
from adastate_jax.data.shards import DataSet, open_data_set
from adastate_jax.errors import UserError, shortlist, shown

CAPTIONS = "captions.jsonl"


def list_digest(texts: Sequence[str]) -> str:
    """Stands for a list of texts, order and repetitions included."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


# --- prompts ----------------------------------------------------------------------------------------------------------


_NAMES = {"encoder": "text encoder", "tokenizer": "tokenizer", "dtype": "dtype"}  # in a manifest, and in messages


def embedding_features(dim: int, dtype: str) -> tfds.features.FeaturesDict:
    """Of a prompt: the text, and the embeddings of its tokens [tokens, dim], without padding."""
    return tfds.features.FeaturesDict(
        {
            "prompt": tfds.features.Text(),
            "embedding": tfds.features.Tensor(shape=(None, dim), dtype=jnp.dtype(dtype), encoding="bytes"),
        }
    )


@dataclasses.dataclass(frozen=True)
class EmbeddedPrompts(Sequence):
    """The prompts of a data set that `embed` wrote, with their embeddings; as a sequence, the texts.

    Attributes:
        text_length: tokens T that embeddings are padded to with zeros.
    """

    data_set: DataSet
    text_length: int

    def __len__(self) -> int:
        return len(self.data_set.splits["train"])

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return read_examples(self.data_set.splits["train"], [index])[0]["prompt"].decode()

    def embeddings(self, numbers: Sequence[int]) -> np.ndarray:
        """Of the prompts with these numbers [B, T, dim], zero past each; of number −1, the empty prompt's."""
        train, guidance = self.data_set.splits["train"], self.data_set.splits["guidance"]
        numbers = np.asarray(numbers)
        found = iter(read_examples(train, numbers[numbers >= 0])) if (numbers >= 0).any() else iter(())
        empty = read_examples(guidance, [0])[0] if (numbers < 0).any() else None
        return self._padded([empty if number < 0 else next(found) for number in numbers])

    def guidance(self, prompt: str) -> np.ndarray:
        """Embeddings [1, T, dim] of the empty or a negative prompt; raises UserError for one that is not there."""
        kept = ["", *self.data_set.manifest["negative_prompts"]]
        if prompt not in kept:
            raise UserError(
                f"{self.data_set.folder}: holds no embedding of the negative prompt {shown(prompt)}, but of "
                f"{shortlist([shown(text, 40) for text in kept], 3)}; set config.negative_prompt to one of these, or "
                "embed anew with --negative-prompt"
            )
        return self._padded(read_examples(self.data_set.splits["guidance"], [kept.index(prompt)]))

    def _padded(self, examples: Sequence[dict[str, Any]]) -> np.ndarray:
        first = examples[0]["embedding"]
        padded = np.zeros((len(examples), self.text_length, first.shape[1]), first.dtype)
        for row, example in zip(padded, examples, strict=True):
            row[: len(example["embedding"])] = example["embedding"]
        return padded


def _opened(folder: str, kind: str, fields: Sequence[str]) -> DataSet:
    data_set = open_data_set(Path(folder), kind)
    missing = [name for name in fields if name not in data_set.manifest]
    if missing:
        raise UserError(f"{folder}: its manifest does not say {missing[0]}; make it anew with this version")
    return data_set


def open_embeddings(
    folder: str, field: str, text_length: int, dim: int, encoder: Sequence[str] | None = None
) -> EmbeddedPrompts:
    """Opens what `embed` wrote, and checks it against the run that reads it.

    Args:
        field: of the configuration that names the folder, for messages.
        text_length, dim: of the run's text.
        encoder: fingerprint of the run's text encoder and digest of its tokenizer; None leaves them unchecked.

    Raises:
        UserError: it is missing, incomplete or damaged, or made for another text length or by another encoder.
    """
    data_set = _opened(folder, "embeddings", ("text_length", "dim", "prompts", "negative_prompts", *_NAMES))
    manifest = data_set.manifest
    for name, beside, wanted in (("text_length", "text_length", text_length), ("dim", "text_dim", dim)):
        if manifest[name] != wanted:
            raise UserError(
                f"{field}={folder}: its {name} is {manifest[name]}, but config.text.{name} is {wanted}; embed the "
                f"prompts anew, or set config.text.{name} and config.model.{beside}"
            )
    for name, wanted in zip(("encoder", "tokenizer"), encoder or (None, None), strict=True):
        if wanted is not None and manifest[name] != wanted:
            raise UserError(
                f"{field}={folder}: was made with another {_NAMES[name]} than "
                "config.data.encoders holds; embed the prompts anew, or name the folder that they were made with"
            )
    return EmbeddedPrompts(data_set, text_length)


def refuse_unlike(found: dict[str, EmbeddedPrompts]) -> None:
    """Raises UserError where two of a run's data sets, by their fields, are of different text encoders."""
    named = list(found.items())
    for field, other in named[1:]:
        for name, title in _NAMES.items():
            first = named[0][1].data_set.manifest
            if other.data_set.manifest[name] != first[name]:
                raise UserError(
                    f"{field}={other.data_set.folder}: was made with another {title} than {named[0][0]}="
                    f"{named[0][1].data_set.folder}; embed both with the same text encoder"
                )


# --- clips ------------------------------------------------------------------------------------------------------------


def latent_features(shape: Sequence[int], dtype: str) -> tfds.features.FeaturesDict:
    """Of a clip: latents [N, H, W, C], its caption and the number of that among all captions, −1 for none; the file
    that it was cut from, and where in seconds."""
    return tfds.features.FeaturesDict(
        {
            "latents": tfds.features.Tensor(shape=tuple(shape), dtype=jnp.dtype(dtype), encoding="bytes"),
            "caption": tfds.features.Text(),
            "caption_number": np.int64,
            "source": tfds.features.Text(),
            "start": np.float32,
        }
    )


@dataclasses.dataclass(frozen=True)
class LatentClips:
    """The clips of a data set that `encode` wrote."""

    data_set: DataSet

    def __len__(self) -> int:
        return len(self.data_set.splits["train"])

    def read(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Latents [B, N, H, W, C] of the clips with these numbers, and the numbers of their captions int64 [B]."""
        batch = read_batch(self.data_set.splits["train"], numbers)
        return batch["latents"], np.asarray(batch["caption_number"], np.int64)


def open_latents(folder: str, shape: Sequence[int], codec: str | None = None) -> LatentClips:
    """Opens what `encode` wrote, and checks it against the run that reads it.

    Args:
        shape: (N, H, W, C) of the run's clips.
        codec: fingerprint of the run's autoencoder; None leaves it unchecked.

    Raises:
        UserError: it is missing, incomplete or damaged, of clips of another size or by another autoencoder.
    """
    data_set = _opened(folder, "latents", ("shape", "codec", "captions"))
    if list(data_set.manifest["shape"]) != list(shape):
        raise UserError(
            f"config.data.latents={folder}: its latents are {data_set.manifest['shape']} (frames, height, width, "
            f"channels), this configuration's {list(shape)}; set config.data.clips to what encode was given, or encode "
            "anew"
        )
    if codec is not None and data_set.manifest["codec"] != codec:
        raise UserError(
            f"config.data.latents={folder}: was made with another autoencoder than config.data.encoders holds; encode "
            "the videos anew, or name the folder that they were made with"
        )
    return LatentClips(data_set)


def refuse_other_captions(captions: EmbeddedPrompts, clips: LatentClips) -> None:
    """Raises UserError where embeddings are not those of the clips' captions."""
    wanted = clips.data_set.manifest["captions"]
    if wanted["count"] and captions.data_set.manifest["prompts"] != wanted:
        folder = clips.data_set.folder
        raise UserError(
            f"config.data.captions={captions.data_set.folder}: holds other prompts than the captions of {folder}; make "
            f"it with python -m adastate_jax.embed --prompts={folder / CAPTIONS}"
        )
