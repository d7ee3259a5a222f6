"""Prompts → text embeddings: by UMT5 on the host, with what it has encoded kept on disk; or at random, for dry runs."""

import functools
import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.errors import UserError, one_line
from adastate_jax.files import is_file, whole_file
from adastate_jax.models.text import ByteTokenizer, PieceTokenizer, TextConfig, TextEncoder, clean_prompt, encode_tokens
from adastate_jax.sharding import make_mesh
from adastate_jax.weights import parts
from adastate_jax.weights.safetensors_file import SafeTensors, write_safetensors

# B texts → embeddings [B, T, text_dim], zero past each text.
Embed = Callable[[Sequence[str]], jax.Array]

# Nothing attends to padding, so a prompt is padded to a multiple of this only: most of 512 tokens would be for nothing.
_GRANULE = 64


class StoredTextEncoder:
    """UMT5 from a converted folder, and its tokenizer; an `Embed`.

    The encoder is loaded when the first prompt comes that is not on disk: eleven gigabytes in bfloat16. It runs on
    the host's processor unless it is given devices, so that the accelerator's memory and time are the video's.

    Args:
        folder: the model's, with `text_encoder` and `tokenizer.json`.
        config: sizes to expect and the dtype to compute in.
        cache: folder that keeps embeddings, made when needed; None keeps nothing. A prompt's file is named by the hash
            of all that its embedding depends on: prompt, weights, tokenizer, dtype and length.
        mesh: devices that the weights are split over.
        keep: whether the encoder stays in memory for the next prompt; else it is loaded for each call that needs it.

    Raises:
        UserError: a file is missing, damaged, or does not belong to the others.
    """

    def __init__(
        self,
        folder: Path,
        config: TextConfig,
        cache: Path | None,
        mesh: jax.sharding.Mesh | None = None,
        keep: bool = True,
    ):
        file = folder / "tokenizer.json"
        self._tokenizer = PieceTokenizer(file, config.text_length)
        if self._tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"{file}: has {self._tokenizer.vocab_size} pieces, which is more than config.text.vocab_size "
                f"{config.vocab_size}; copy the one that belongs to the text encoder"
            )
        self._folder, self._config, self._cache, self._mesh, self._keep = folder, config, cache, mesh, keep
        self._identity = [
            parts.fingerprint(folder, "text_encoder"),
            self._tokenizer.digest,
            (config.param_dtype, config.dtype, config.text_length),
        ]

    def fits(self, prompt: str) -> bool:
        """Whether nothing of a prompt is cut off."""
        return self._tokenizer.fits(prompt)

    def __call__(self, prompts: Sequence[str]) -> jax.Array:
        """B texts → embeddings [B, T, text_dim] in the config's dtype."""
        config = self._config
        embeddings = np.zeros((len(prompts), config.text_length, config.dim), jnp.dtype(config.dtype))
        for row, prompt in zip(embeddings, prompts, strict=True):
            found = self._embedding(clean_prompt(prompt))
            row[: len(found)] = found
        if not self._keep:
            self.__dict__.pop("_encoder", None)
        return jnp.asarray(embeddings)

    def _embedding(self, prompt: str) -> np.ndarray:
        """Of a cleaned prompt, [tokens, text_dim]; from disk if it is there."""
        key = hashlib.sha256(json.dumps([*self._identity, prompt]).encode()).hexdigest()
        path = self._cache and self._cache / f"{key}.safetensors"
        if path and is_file(path):
            try:
                return self._kept(path)
            except UserError as error:
                print(one_line(f"note: {error}; encoding the prompt again"), file=sys.stderr)
        embedding = self._encode(prompt)
        if path:
            _save(path, embedding, prompt)
        return embedding

    def _kept(self, path: Path) -> np.ndarray:
        """An embedding from disk, [tokens, text_dim]; raises UserError if it is not what `_save` wrote."""
        opened = SafeTensors(path)
        tensor = opened.stored().get("embedding")
        config = self._config
        if tensor is None or tensor.dtype != jnp.dtype(config.dtype) or len(tensor.shape) != 2:
            raise UserError(f"{path}: holds no embedding")
        if not 0 < tensor.shape[0] <= config.text_length or tensor.shape[1] != config.dim:
            raise UserError(f"{path}: holds an embedding of shape {list(tensor.shape)}")
        embedding = np.array(tensor.read())
        if not np.isfinite(embedding).all() or opened.metadata.get("crc32") != str(_checksum(embedding)):
            raise UserError(f"{path}: damaged: its numbers are not those that were kept")
        return embedding

    def _encode(self, prompt: str) -> np.ndarray:
        token_ids, is_token = self._tokenizer.tokenize([prompt])
        tokens = int(is_token.sum())
        length = min(-(-tokens // _GRANULE) * _GRANULE, self._config.text_length)
        mesh, encoder = self._encoder
        with jax.set_mesh(mesh):  # not the caller's, whose devices may be others
            embeddings = encode_tokens(encoder, token_ids[:, :length], is_token[:, :length])
        return np.asarray(embeddings)[0, :tokens]

    @functools.cached_property
    def _encoder(self) -> tuple[jax.sharding.Mesh, TextEncoder]:
        mesh = self._mesh or _host_mesh()
        return mesh, parts.load_part(self._folder, "text_encoder", self._config, mesh)


def encode_prompts(
    encoder: TextEncoder, tokenizer: PieceTokenizer, prompts: Sequence[str], batch_size: int
) -> dict[str, np.ndarray]:
    """Embeddings of prompts [tokens, text_dim], without padding, in the encoder's dtype; each prompt is encoded once.

    Prompts go in batches of equal size, each padded to a multiple of 64 tokens: at most `text_length` / 64 programs are
    compiled. It runs under the mesh that the caller sets.
    """
    distinct = list(dict.fromkeys(prompts))
    token_ids, is_token = tokenizer.tokenize(distinct)
    tokens = is_token.sum(axis=1)
    lengths = np.minimum(-(-tokens // _GRANULE) * _GRANULE, tokenizer.text_length)
    found = {}
    for length in np.unique(lengths):
        (rows,) = np.nonzero(lengths == length)
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            padded = np.resize(chosen, batch_size)  # a last batch repeats its prompts
            embeddings = encode_tokens(encoder, token_ids[padded, :length], is_token[padded, :length])
            for row, embedding in zip(chosen, np.asarray(embeddings), strict=False):
                found[distinct[row]] = embedding[: tokens[row]]
    return found


def _host_mesh() -> jax.sharding.Mesh:
    try:
        return make_mesh(devices=jax.devices("cpu"))
    except RuntimeError:
        raise UserError("JAX_PLATFORMS: leaves out the host, which encodes prompts; append ,cpu to it") from None


def _checksum(embedding: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(embedding).view(np.uint8))


def _save(path: Path, embedding: np.ndarray, prompt: str) -> None:
    layout = {"embedding": (embedding.dtype, embedding.shape)}
    metadata = {"prompt": prompt.encode(errors="replace").decode(), "crc32": str(_checksum(embedding))}
    try:
        with whole_file(path) as temporary:
            write_safetensors(temporary, layout, [embedding], metadata)
    except OSError as error:  # it saves time, no more: a folder that is read-only stops nothing
        print(f"note: {path.parent}: embeddings are not kept ({error.strerror or error})", file=sys.stderr)


def random_embed(config: TextConfig) -> Embed:
    """Embeddings of no encoder: normal numbers drawn from a prompt's hash, one row per byte of it, zero past it."""
    tokenizer = ByteTokenizer(config.text_length)

    def embed(prompts: Sequence[str]) -> jax.Array:
        _, mask = tokenizer.tokenize(prompts)
        seeds = [int.from_bytes(hashlib.sha256(prompt.encode(errors="replace")).digest()) for prompt in prompts]
        rows = [np.random.default_rng(seed).standard_normal((config.text_length, config.dim)) for seed in seeds]
        return jnp.asarray(np.where(mask[..., None], np.stack(rows), 0), config.dtype)

    return embed
