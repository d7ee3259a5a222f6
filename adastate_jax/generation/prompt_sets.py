"""A file of prompts → a data set of their embeddings; for the embed command."""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from adastate_jax.config.run import WAN_NEGATIVE_PROMPT
from adastate_jax.console import Progress, progress
from adastate_jax.data.encoded import embedding_features, list_digest
from adastate_jax.data.prompts import read_prompts
from adastate_jax.data.shards import Plan, shard_lengths, write_data_set
from adastate_jax.errors import UserError, one_line, shown
from adastate_jax.generation.data_sets import Job
from adastate_jax.generation.embeddings import encode_prompts
from adastate_jax.models.text import PieceTokenizer, TextEncoder
from adastate_jax.weights.converted import load_converted
from adastate_jax.weights.parts import fingerprint, part_config

_TOKENIZED = 4096  # prompts whose tokens are counted at a time
_BATCHES = 32  # that prompts are sorted by length within


def _count_tokens(tokenizer: PieceTokenizer, prompts: Sequence[str]) -> np.ndarray:
    """Tokens of each prompt, int [n], of which none is beyond the text length; says how many prompts were cut."""
    counts = [
        tokenizer.tokenize(prompts[start : start + _TOKENIZED])[1].sum(axis=1)
        for start in range(0, len(prompts), _TOKENIZED)
    ]
    tokens = np.concatenate(counts)
    full = [prompt for prompt, count in zip(prompts, tokens, strict=True) if count == tokenizer.text_length]
    cut = sum(not tokenizer.fits(prompt) for prompt in full)
    if cut:
        print(f"note: {cut} prompts are longer than {tokenizer.text_length} tokens, and are cut there", file=sys.stderr)
    return tokens


def write_prompt_set(job: Job, file: Path, negative: Sequence[str] | None, text_length: int) -> None:
    """Encodes the prompts of a file, the empty prompt and the negative ones.

    Args:
        negative: None is Wan2.1's.
        text_length: tokens at most.

    Raises:
        UserError: bad input, or a disk that is full.
    """
    prompts = read_prompts(file, blank_lines=False)
    repeated = len(prompts) - len(set(prompts))
    if repeated:
        print(one_line(f"note: {file}: {repeated} prompts repeat earlier ones, and are kept"), file=sys.stderr)
    negative = list(negative or [WAN_NEGATIVE_PROMPT])
    config = dataclasses.replace(part_config(job.checkpoint, "text_encoder"), text_length=text_length)
    tokenizer = PieceTokenizer(job.checkpoint / "tokenizer.json", text_length)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{job.checkpoint / 'tokenizer.json'}: has {tokenizer.vocab_size} pieces, more than the text encoder's "
            f"{config.vocab_size}; copy the one that belongs to it"
        )
    mesh, tokens = job.mesh(), _count_tokens(tokenizer, prompts)
    row_bytes = config.dim * np.dtype(config.dtype).itemsize
    texts = {"train": prompts, "guidance": ["", *negative]}
    origin = {
        "encoder": fingerprint(job.checkpoint, "text_encoder"),
        "tokenizer": tokenizer.digest,
        "text_length": text_length,
        "dim": config.dim,
        "dtype": config.dtype,
        "prompts": {"count": len(prompts), "sha256": list_digest(prompts)},
        "negative_prompts": negative,
    }
    train = shard_lengths((int(count) * row_bytes for count in tokens), job.shard_bytes)
    shards = {"train": train, "guidance": [len(texts["guidance"])]}
    plan = Plan("embeddings", embedding_features(config.dim, config.dtype), origin, shards)
    nbytes = int(tokens.sum()) * row_bytes
    print(
        f"{len(prompts)} prompts, {tokens.mean():.0f} tokens each: {nbytes / 1e9:.3g} GB in {len(train)} shards",
        file=sys.stderr,
    )
    with progress("embed", sum(map(len, texts.values())), unit="prompt", compiles=True) as bar:
        made = write_data_set(job.output, plan, _Encoder(job, tokenizer, texts, mesh, bar).make, nbytes, bar.update)
    if not made:
        print(f"{job.output} is complete; nothing is left to do", file=sys.stderr)
    print(job.output)


class _Encoder:
    """Prompts through the text encoder, which is loaded when the first shard is to be made."""

    def __init__(
        self,
        job: Job,
        tokenizer: PieceTokenizer,
        texts: Mapping[str, Sequence[str]],
        mesh: jax.sharding.Mesh,
        bar: Progress,
    ):
        self._job, self._tokenizer, self._texts, self._mesh, self._bar = job, tokenizer, texts, mesh, bar

    def make(self, split: str, first: int, count: int) -> Iterator[dict]:
        """The examples of a shard."""
        chosen = self._texts[split][first : first + count]
        # In pieces of some batches, so that the bar moves; where a piece ends depends on the shard alone.
        size = self._job.batch_size
        for start in range(0, count, _BATCHES * size):
            piece = chosen[start : start + _BATCHES * size]
            with jax.set_mesh(self._mesh):
                found = encode_prompts(self._network, self._tokenizer, piece, size)
            for prompt in piece:
                if not np.isfinite(found[prompt]).all():
                    raise UserError(
                        f"{self._job.checkpoint / 'text_encoder'}: gives numbers that are not finite for the "
                        f"prompt {shown(prompt)}; convert it again, with --dtype=bfloat16 or float32"
                    )
                yield {"prompt": prompt, "embedding": found[prompt]}
            self._bar.update(len(piece))

    @functools.cached_property
    def _network(self) -> TextEncoder:
        folder = self._job.checkpoint / "text_encoder"
        network = load_converted(folder, "text_encoder", self._mesh, text_length=self._tokenizer.text_length)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(network)) / self._job.devices / 1e9
        self._bar.write(f"text encoder: {held:.3g} GB on each device", file=sys.stderr)
        return network
