"""The embed command: a file of prompts into a data set of their embeddings, which training reads in their place."""

if __name__ == "__main__":  # before all other imports: a signal that comes during them ends the command, too
    from adastate_jax import interrupts

    interrupts.install()

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from adastate_jax.config.run import WAN_NEGATIVE_PROMPT
from adastate_jax.console import CommandParser, Progress, progress, run_command, starting
from adastate_jax.data.encoded import embedding_features, list_digest
from adastate_jax.data.prompts import read_prompts
from adastate_jax.data.shards import Plan, shard_lengths, write_data_set
from adastate_jax.errors import UserError, shown
from adastate_jax.generation.data_sets import add_options, check_options, devices_mesh, shard_bytes
from adastate_jax.generation.embeddings import encode_prompts
from adastate_jax.interrupts import if_stopped
from adastate_jax.models.text import PieceTokenizer, TextEncoder
from adastate_jax.texts import is_text
from adastate_jax.weights.converted import load_converted
from adastate_jax.weights.parts import fingerprint, part_config

_DESCRIPTION = """Encodes the prompts of a file with a converted text encoder, once, into a data set for training.
Stopped or killed, the same command goes on with the shard it was at, and ends with the same bytes."""
_EXAMPLE = """example:
  python -m adastate_jax.embed --checkpoint=weights --prompts=prompts.txt --output=data/prompts

--checkpoint is a folder with text_encoder, which convert wrote, and tokenizer.json. A file of prompts has one per line,
or is JSON lines with a field "prompt", as encode writes the captions of its clips. The empty prompt and the negative
ones are always encoded, too."""

_TOKENIZED = 4096  # prompts whose tokens are counted at a time
_BATCHES = 32  # that prompts are sorted by length within


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m adastate_jax.embed", description=_DESCRIPTION, epilog=_EXAMPLE)
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="text file, or .jsonl")
    parser.add_argument(
        "--negative-prompt",
        action="append",
        metavar="TEXT",
        help="what a teacher is guided away from; may be given several times (default: Wan2.1's)",
    )
    parser.add_argument("--text-length", type=int, default=512, metavar="N", help="tokens at most (default 512)")
    add_options(parser, "prompts", batch_size=8)
    return parser


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


def embed(options: argparse.Namespace) -> None:
    """Makes the data set that the options name.

    Raises:
        UserError: bad input, or a disk that is full.
    """
    check_options(options, "text_length")
    prompts = read_prompts(options.prompts, blank_lines=False)
    repeated = len(prompts) - len(set(prompts))
    if repeated:
        print(f"note: {options.prompts}: {repeated} prompts repeat earlier ones, and are kept", file=sys.stderr)
    negative = options.negative_prompt or [WAN_NEGATIVE_PROMPT]
    if not all(map(is_text, negative)):
        raise UserError("--negative-prompt: is not UTF-8 text")
    config = dataclasses.replace(part_config(options.checkpoint, "text_encoder"), text_length=options.text_length)
    tokenizer = PieceTokenizer(options.checkpoint / "tokenizer.json", options.text_length)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{options.checkpoint / 'tokenizer.json'}: has {tokenizer.vocab_size} pieces, more than the text encoder's "
            f"{config.vocab_size}; copy the one that belongs to it"
        )
    mesh = devices_mesh(options)
    tokens = _count_tokens(tokenizer, prompts)
    row_bytes = config.dim * np.dtype(config.dtype).itemsize
    guidance = ["", *negative]
    plan = Plan(
        "embeddings",
        embedding_features(config.dim, config.dtype),
        {
            "encoder": fingerprint(options.checkpoint, "text_encoder"),
            "tokenizer": tokenizer.digest,
            "text_length": options.text_length,
            "dim": config.dim,
            "dtype": config.dtype,
            "prompts": {"count": len(prompts), "sha256": list_digest(prompts)},
            "negative_prompts": negative,
        },
        {
            "train": shard_lengths((int(count) * row_bytes for count in tokens), shard_bytes(options)),
            "guidance": [len(guidance)],
        },
    )
    nbytes = int(tokens.sum()) * row_bytes
    print(
        f"{len(prompts)} prompts, {tokens.mean():.0f} tokens each: {nbytes / 1e9:.3g} GB in "
        f"{len(plan.shards['train'])} shards",
        file=sys.stderr,
    )
    texts = {"train": prompts, "guidance": guidance}
    with progress("embed", len(prompts) + len(guidance), unit="prompt", compiles=True) as bar:
        make = _Encoder(options, tokenizer, texts, mesh, bar).make
        made = write_data_set(options.output, plan, make, nbytes, bar.update)
    print(f"{options.output}" + ("" if made else " is complete; nothing is left to do"), file=sys.stderr)


class _Encoder:
    """Prompts through the text encoder, which is loaded when the first shard is to be made."""

    def __init__(
        self,
        options: argparse.Namespace,
        tokenizer: PieceTokenizer,
        texts: Mapping[str, Sequence[str]],
        mesh: jax.sharding.Mesh,
        bar: Progress,
    ):
        self._options, self._tokenizer, self._texts, self._mesh, self._bar = options, tokenizer, texts, mesh, bar

    def make(self, split: str, first: int, count: int) -> Iterator[dict]:
        """The examples of a shard."""
        chosen = self._texts[split][first : first + count]
        # In pieces of some batches, so that the bar moves; where a piece ends depends on the shard alone.
        size = self._options.batch_size
        for start in range(0, count, _BATCHES * size):
            piece = chosen[start : start + _BATCHES * size]
            with jax.set_mesh(self._mesh):
                found = encode_prompts(self._network, self._tokenizer, piece, size)
            for prompt in piece:
                if not np.isfinite(found[prompt]).all():
                    raise UserError(
                        f"{self._options.checkpoint / 'text_encoder'}: gives numbers that are not finite for the "
                        f"prompt {shown(prompt)}; convert it again, with --dtype=bfloat16 or float32"
                    )
                yield {"prompt": prompt, "embedding": found[prompt]}
            self._bar.update(len(piece))

    @functools.cached_property
    def _network(self) -> TextEncoder:
        options = self._options
        folder = options.checkpoint / "text_encoder"
        network = load_converted(folder, "text_encoder", self._mesh, text_length=options.text_length)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(network)) / options.devices / 1e9
        self._bar.write(f"text encoder: {held:.3g} GB on each device", file=sys.stderr)
        return network


def main(arguments: Sequence[str]) -> int:
    """Parses the command line and embeds."""
    options = _parser().parse_args(arguments)
    starting()
    with if_stopped("the same command goes on"):
        embed(options)
    return 0


if __name__ == "__main__":
    run_command(main)
