"""The UMT5 text encoder that Wan2.1 is conditioned on, its tokenizer, and a byte tokenizer for small models.

Source: Wan-Video/Wan2.1 wan/modules/t5.py and wan/modules/tokenizers.py.
"""

import dataclasses
import functools
import hashlib
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import einops
import ftfy
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from adastate_jax.checks import require_at_least_one, require_dtypes, require_positive
from adastate_jax.diffusion import draw_normal
from adastate_jax.errors import UserError
from adastate_jax.models.linear import stated_precision
from adastate_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes and numerics of the text encoder; the defaults are UMT5-XXL as Wan2.1 uses it.

    Attributes:
        num_buckets, max_distance: relative positions fall into so many buckets, half of them per direction; distances
            from `max_distance` on share the last one.
        text_length: tokens that a prompt is padded or cut to.
        param_dtype, dtype: of the weights, and of matrix products and the residual stream. Norms and the softmax run
            in float32 whatever `dtype` is.
    """

    vocab_size: int = 256384
    dim: int = 4096
    dim_attention: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    text_length: int = 512
    param_dtype: str = "float32"
    dtype: str = "float32"

    def __post_init__(self):
        require_at_least_one(
            self,
            "vocab_size",
            "dim",
            "dim_attention",
            "ffn_dim",
            "num_heads",
            "num_layers",
            "num_buckets",
            "max_distance",
            "text_length",
        )
        require_positive(self, "eps")
        require_dtypes(self)
        if self.dim_attention % self.num_heads:
            raise ValueError(f"dim_attention {self.dim_attention} must be a multiple of num_heads {self.num_heads}")
        if self.num_buckets % 4 or self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"num_buckets {self.num_buckets} must be a multiple of 4, and max_distance {self.max_distance} more "
                "than a quarter of it"
            )


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of the distance from every query to every key of a text.

    Half of the buckets are for keys after the query. Within a direction the first half of the distances have a bucket
    each, the rest share buckets of equal width in log distance. Bucket edges are compared as integers: a floating
    logarithm is one ulp off at 16, 32, 64 and misplaces them.

    Returns:
        int32 [length (query), length (key)]. Source: wan/modules/t5.py T5RelativeEmbedding.
    """
    direction = num_buckets // 2
    exact = direction // 2
    shared = direction - exact

    def bucket(distance: int) -> int:
        if distance < exact:
            return distance
        # floor(shared · log(distance / exact) / log(max_distance / exact)), by the edges it has passed
        passed = sum(
            distance**shared * exact**edge >= max_distance**edge * exact**shared for edge in range(1, shared + 1)
        )
        return min(exact + passed, direction - 1)

    near = np.array([bucket(min(distance, max_distance)) for distance in range(length)], np.int32)
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    return near[np.abs(offset)] + np.where(offset > 0, direction, 0).astype(np.int32)


class Block(nnx.Module):
    """Self-attention with its own relative-position table, and a gated feed-forward; pre-norm, no biases."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        def linear(inputs, outputs, scale):
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=False,
                kernel_init=lambda key, shape, dtype: (scale * draw_normal(key, shape)).astype(dtype),
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                precision=stated_precision(config.dtype),
                rngs=rngs,
            )

        norm = functools.partial(
            nnx.RMSNorm, config.dim, epsilon=config.eps, dtype=jnp.float32, param_dtype=config.param_dtype, rngs=rngs
        )
        dim, inner = config.dim, config.dim_attention
        self.norm_attention, self.norm_ffn = norm(), norm()
        # The logits are not divided by √head_dim: the queries start that much smaller instead.
        self.query = linear(dim, inner, 1 / math.sqrt(dim * inner / config.num_heads))
        self.key = linear(dim, inner, 1 / math.sqrt(dim))
        self.value = linear(dim, inner, 1 / math.sqrt(dim))
        self.output = linear(inner, dim, 1 / math.sqrt(inner))
        self.ffn_gate = linear(dim, config.ffn_dim, 1 / math.sqrt(dim))
        self.ffn_in = linear(dim, config.ffn_dim, 1 / math.sqrt(dim))
        self.ffn_out = linear(config.ffn_dim, dim, 1 / math.sqrt(config.ffn_dim))
        shape = (config.num_buckets, config.num_heads)
        self.position_bias = nnx.Param(
            draw_normal(rngs.params(), shape).astype(config.param_dtype) / math.sqrt(2 * math.prod(shape))
        )
        self.num_heads = config.num_heads

    def __call__(self, x: jax.Array, visible: jax.Array, buckets: np.ndarray) -> jax.Array:
        """Args:
            x: residual stream [B, T, D].
            visible: which keys may be attended to, [B, T] bool.
            buckets: `relative_buckets` of T tokens, [T, T].

        Returns:
            The stream.
        """
        dtype = x.dtype
        product = functools.partial(jnp.einsum, precision=stated_precision(dtype))
        y = self.norm_attention(x).astype(dtype)
        query, key, value = (
            einops.rearrange(project(y), "b t (heads d) -> b t heads d", heads=self.num_heads)
            for project in (self.query, self.key, self.value)
        )
        logits = product("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        bias = einops.rearrange(self.position_bias[...].astype(jnp.float32)[buckets], "q k heads -> heads q k")
        # A finite lowest value, so that a row without any visible key gives numbers and not NaN.
        logits = jnp.where(visible[:, None, None], logits + bias, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(dtype)
        y = einops.rearrange(product("bhqk,bkhd->bqhd", weights, value), "b t heads d -> b t (heads d)")
        x = x + self.output(y)

        y = self.norm_ffn(x).astype(dtype)
        return x + self.ffn_out(self.ffn_in(y) * jax.nn.gelu(self.ffn_gate(y), approximate=True))


class TextEncoder(nnx.Module):
    """The encoder. A plain pytree of weights; every block's leaf is stacked along a leading layer axis."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = nnx.Param(
            draw_normal(rngs.params(), (config.vocab_size, config.dim)).astype(config.param_dtype)
        )
        layer_keys = jax.random.split(rngs.params(), config.num_layers)
        self.blocks = jax.lax.map(lambda key: Block(config, rngs=nnx.Rngs(key)), layer_keys)
        self.norm_out = nnx.RMSNorm(
            config.dim, epsilon=config.eps, dtype=jnp.float32, param_dtype=config.param_dtype, rngs=rngs
        )

    def __call__(self, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Embeddings of all positions; those of padding are computed, but nothing attends to padding.

        Args:
            token_ids: [B, T] int32.
            mask: [B, T], true or 1 for tokens of the text, false or 0 for padding.

        Returns:
            [B, T, dim] in the config's `dtype`. Source: wan/modules/t5.py T5Encoder.
        """
        config = self.config
        buckets = relative_buckets(token_ids.shape[1], config.num_buckets, config.max_distance)
        visible = mask > 0
        x = constrain(self.token_embedding[...][token_ids].astype(config.dtype), "batch")

        def run_block(x, block):
            return constrain(block(x, visible, buckets), "batch"), None

        x, _ = jax.lax.scan(run_block, x, self.blocks)
        return self.norm_out(x).astype(config.dtype)

    def encode(self, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
        """What the transformer is conditioned on: the embeddings, zero past the text.

        Args:
            token_ids, mask: as in `__call__`, [B, T].

        Returns:
            [B, T, dim]. Source: wan/modules/t5.py T5EncoderModel.
        """
        return jnp.where((mask > 0)[..., None], self(token_ids, mask), 0)


class Tokenizer(Protocol):
    """What turns prompts into the encoder's input, whatever the vocabulary."""

    text_length: int

    @property
    def vocab_size(self) -> int:
        """Number of token ids; all are below it."""

    def tokenize(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """B texts → token ids [B, text_length] int32 and mask [B, text_length] bool, true for tokens of the text."""


PAD, END = 0, 1
_NUM_SPECIAL = 3  # padding, end of text, and the unknown token that other vocabularies have at 2


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """The UTF-8 bytes of a text, each shifted by 3, and an end token: 259 ids, and nothing to download.

    Ids: padding 0, end 1, unknown 2 (never produced), byte b at 3 + b. The layout is UMT5's.
    """

    text_length: int

    def __post_init__(self):
        if self.text_length < 1:
            raise ValueError(f"text_length must be at least 1, for the end token; got {self.text_length}")

    @property
    def vocab_size(self) -> int:
        return _NUM_SPECIAL + 256

    def fits(self, text: str) -> bool:
        """Whether nothing of a text is cut off."""
        return len(text.encode("utf-8", errors="replace")) < self.text_length

    def tokenize(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Args:
            texts: B strings. One that does not fit loses its last bytes, never the end token; an empty one is the end
                token alone.

        Returns:
            Token ids [B, text_length] int32 and mask [B, text_length] bool, true up to and with the end token.

        Raises:
            TypeError: a single string instead of a list of them.
        """
        if isinstance(texts, str):
            raise TypeError("tokenize takes a list of texts, got one string")
        token_ids = np.full((len(texts), self.text_length), PAD, np.int32)
        mask = np.zeros(token_ids.shape, np.bool_)
        for row, text in enumerate(texts):
            # Lone surrogates, which JSON and terminals can carry, have no UTF-8 form: keep them as question marks.
            content = text.encode("utf-8", errors="replace")[: self.text_length - 1]
            token_ids[row, : len(content)] = np.frombuffer(content, np.uint8).astype(np.int32) + _NUM_SPECIAL
            token_ids[row, len(content)] = END
            mask[row, : len(content) + 1] = True
        return token_ids, mask


def clean_prompt(text: str) -> str:
    """A prompt as Wan2.1 reads it: broken encodings and HTML entities mended, runs of whitespace one space.

    Source: wan/modules/tokenizers.py, `clean="whitespace"`.
    """
    # Twice, because text from the web may have been escaped twice.
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class PieceTokenizer:
    """The tokenizer of a `tokenizer.json`: cleaned prompts into the pieces of its vocabulary, and an end token.

    `google/umt5-xxl/tokenizer.json` of a Wan2.1 download is the one that Wan2.1 was trained with.

    Attributes:
        text_length: tokens that a prompt is padded or cut to.
        digest: SHA-256 of the file.

    Raises:
        UserError: the file is missing, no tokenizer, or one without UMT5's padding and end tokens.
    """

    def __init__(self, path: str | Path, text_length: int):
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); copy google/umt5-xxl/tokenizer.json") from None
        try:
            pieces = tokenizers.Tokenizer.from_buffer(content)
        except ValueError as error:
            raise UserError(f"{path}: not a tokenizer.json ({error}); download it again") from None
        pieces.no_padding()  # the file may hold settings of its own
        if pieces.token_to_id("<pad>") != PAD or pieces.encode("").ids != [END]:
            raise UserError(f"{path}: does not pad with <pad> = {PAD} and end with </s> = {END}, as UMT5's does")
        pieces.enable_truncation(text_length)
        pieces.enable_padding(length=text_length, pad_id=PAD, pad_token="<pad>")
        self._pieces = pieces
        self.text_length = text_length
        self.digest = hashlib.sha256(content).hexdigest()

    @property
    def vocab_size(self) -> int:
        return self._pieces.get_vocab_size()

    def fits(self, text: str) -> bool:
        """Whether nothing of a text is cut off."""
        return not self._pieces.encode(clean_prompt(text)).overflowing

    def tokenize(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """B texts → token ids [B, text_length] int32 and mask [B, text_length] bool, true up to and with the end token.

        A text that does not fit loses its last tokens, never the end token.
        """
        if isinstance(texts, str):
            raise TypeError("tokenize takes a list of texts, got one string")
        encoded = self._pieces.encode_batch([clean_prompt(text) for text in texts])
        token_ids = np.array([text.ids for text in encoded], np.int32).reshape(-1, self.text_length)
        mask = np.array([text.attention_mask for text in encoded], np.bool_).reshape(-1, self.text_length)
        return token_ids, mask


@jax.jit
def encode_tokens(encoder: TextEncoder, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
    """`TextEncoder.encode`, compiled."""
    return encoder.encode(token_ids, mask)
