"""What is compared: of each case our side and PyTorch's, and how many operations it takes where they are counted."""

import dataclasses
import math
from collections.abc import Callable

from adastate_jax.benchmarking import flops
from adastate_jax.models.dit import DiTConfig
from adastate_jax.models.tiny_vae import TinyVAEConfig
from adastate_jax.models.vae import VAEConfig
from adastate_jax.streaming.schedule import StreamConfig
from benchmarks.peers import ours, theirs
from benchmarks.peers.settings import CACHED_FRAMES, DECODED, LIVE_FRAMES, PRODUCTS, SIDES, TRANSFORMER, Steps, attended


@dataclasses.dataclass(frozen=True)
class Case:
    """Two sides, and the operations of one run at a size: an upper bound where a trial's networks are narrower."""

    theirs: Steps
    ours: Steps
    flops: Callable[[str], int] | None = None


_WIDE = DiTConfig(num_layers=TRANSFORMER["num_layers"])


def _tokens(size: str) -> int:
    return _WIDE.frame_tokens(*SIDES[size])


CASES = {
    # What the machine reaches: a product of square matrices.
    "product": Case(theirs.their_product, ours.our_product, lambda size: 2 * PRODUCTS[size] ** 3),
    # Attention of a steady chunk of AdaState, of Wan2.1 1.3B's width.
    "attention": Case(
        theirs.their_attention,
        ours.our_attention,
        lambda size: 4 * math.prod(attended(size)) * _WIDE.dim,
    ),
    # A pass of Wan2.1 1.3B's transformer, two layers of it, the text's part included.
    "transformer": Case(
        theirs.their_pass, ours.our_pass, lambda size: flops.clip_flops(_WIDE, LIVE_FRAMES, _tokens(size)).total
    ),
    # The same against nine cached frames, the text's keys and values given.
    "cached": Case(
        theirs.their_cached_pass,
        ours.our_cached_pass,
        lambda size: flops.pass_flops(_WIDE, LIVE_FRAMES, LIVE_FRAMES + CACHED_FRAMES, _tokens(size)).total,
    ),
    # An AdaState chunk of it: four steps and the clean pass, against the cache.
    "chunk": Case(
        theirs.their_chunk,
        ours.our_chunk,
        lambda size: flops.chunk_flops(_WIDE, StreamConfig(), StreamConfig().num_fill_chunks, _tokens(size)),
    ),
    # Wan2.1's decoder, four latents.
    "decoder": Case(
        theirs.their_decoder,
        ours.our_decoder,
        lambda size: flops.decoder_flops(VAEConfig(), *DECODED[size], frames=4, first=True),
    ),
    # TAEW2.1's decoder, four latents.
    "tiny": Case(
        theirs.their_tiny_decoder,
        ours.our_tiny_decoder,
        lambda size: flops.decoder_flops(TinyVAEConfig(), *DECODED[size], frames=4, first=True),
    ),
    # Two layers of UMT5-XXL.
    "text": Case(theirs.their_text, ours.our_text),
    # A step of flow matching with the transformer: forward, backward, AdamW.
    "training": Case(
        theirs.their_training,
        ours.our_training,
        lambda size: 3 * flops.clip_flops(_WIDE, LIVE_FRAMES, _tokens(size)).total,
    ),
}
