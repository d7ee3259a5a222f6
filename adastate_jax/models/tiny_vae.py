"""TAEW2.1, the tiny distilled video autoencoder of Wan2.1's latent space: much faster than `models/vae.py`, less sharp.

Its decoder is driven by the functions of `models/vae.py` (`decode`, `decode_clip`, `decoder_cache` and the tiled ones),
with the same latents, frame counts and −1..1 range, so that a caller swaps one model for the other. Official frames are
in 0..1; they are mapped here. The encoder groups frames differently and has its own functions below.
Source: madebyollin/taehv taehv.py.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from adastate_jax.checks import require_at_least_one, require_dtypes
from adastate_jax.models.convolution import doubling_convolution, folds_upsampling
from adastate_jax.models.video_layers import PARTS, Blocks, FeatureCache, Memory, check_tile, pointwise, spatial_conv
from adastate_jax.sharding import constrain

_BLOCKS_PER_LEVEL = 3


@dataclasses.dataclass(frozen=True)
class TinyVAEConfig:
    """Sizes and numerics of the tiny autoencoder; the defaults are TAEW2.1's.

    Attributes:
        widths: channels of the decoder's three levels, from the latents' resolution up; the encoder has the last
            everywhere.
        temporal_upsample, temporal_downsample: which of the decoder's and the encoder's three steps, each a factor
            two in space, also change the frame rate by two.
        param_dtype, dtype: of the weights, and of convolutions and the features between them.
        tile, latents_per_call: as of `VAEConfig`.
    """

    latent_channels: int = 16
    widths: tuple[int, int, int] = (256, 128, 64)
    temporal_upsample: tuple[bool, bool, bool] = (False, True, True)
    temporal_downsample: tuple[bool, bool, bool] = (True, True, False)
    param_dtype: str = "float32"
    dtype: str = "float32"
    tile: int = 0
    latents_per_call: int = 1

    def __post_init__(self):
        require_at_least_one(self, "latent_channels", "widths", "latents_per_call")
        require_dtypes(self)
        check_tile(self.tile)
        if not len(self.widths) == len(self.temporal_upsample) == len(self.temporal_downsample) == 3:
            raise ValueError("widths, temporal_upsample and temporal_downsample need three entries, one per level")
        if sum(self.temporal_upsample) != sum(self.temporal_downsample):
            raise ValueError("temporal_upsample and temporal_downsample must change the frame rate by the same factor")

    @property
    def space_factor(self) -> int:
        """Pixels per latent, along height and along width."""
        return 2**3

    @property
    def time_factor(self) -> int:
        """Frames per latent frame after the first, which is one frame."""
        return 2 ** sum(self.temporal_upsample)


class MemoryBlock(nnx.Module):
    """Three convolutions over a frame and the one before it, and a skip."""

    def __init__(self, width: int, config: TinyVAEConfig, *, rngs: nnx.Rngs):
        self.conv_in = spatial_conv(2 * width, width, config, rngs=rngs)
        self.conv_middle = spatial_conv(width, width, config, rngs=rngs)
        self.conv_out = spatial_conv(width, width, config, rngs=rngs)

    def __call__(self, x: jax.Array, memory: Memory) -> jax.Array:
        """[B, F, H, W, C] → [B, F, H, W, C]."""
        before = memory.extend(x, 1)[:, :-1]
        y = jax.nn.relu(self.conv_in(jnp.concatenate([x, before], axis=-1)))
        y = self.conv_out(jax.nn.relu(self.conv_middle(y)))
        return jax.nn.relu(y + x)


def _memory_blocks(width: int, config: TinyVAEConfig, *, rngs: nnx.Rngs) -> Blocks:
    return Blocks([MemoryBlock(width, config, rngs=rngs) for _ in range(_BLOCKS_PER_LEVEL)])


class UpLevel(nnx.Module):
    """Memory blocks, then twice the height and width, and twice the frames if `temporal`."""

    def __init__(self, inputs: int, outputs: int, temporal: bool, config: TinyVAEConfig, *, rngs: nnx.Rngs):
        self.frames = 1 + temporal
        self.blocks = _memory_blocks(inputs, config, rngs=rngs)
        self.grow = pointwise(inputs, self.frames * inputs, config, use_bias=False, rngs=rngs)
        self.conv = spatial_conv(inputs, outputs, config, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, memory: Memory) -> jax.Array:
        """[B, F, H, W, inputs] → [B, F or 2F, 2H, 2W, outputs]."""
        for block in self.blocks:
            x = block(x, memory)
        # Growing commutes with the nearest-neighbour upsampling that precedes it officially, and is cheaper before it.
        x = einops.rearrange(self.grow(x), "b f h w (grown c) -> b (f grown) h w c", grown=self.frames)
        if folds_upsampling():
            return doubling_convolution(x, self.conv.kernel[...], None, self.conv.dtype)
        return self.conv(einops.repeat(x, "b f h w c -> b f (h down) (w across) c", down=2, across=2))


class DownLevel(nnx.Module):
    """Half the frames if `temporal`, half the height and width, then memory blocks."""

    def __init__(self, width: int, temporal: bool, config: TinyVAEConfig, *, rngs: nnx.Rngs):
        self.frames = 1 + temporal
        self.pool = pointwise(self.frames * width, width, config, use_bias=False, rngs=rngs)
        self.conv = spatial_conv(width, width, config, strides=2, padding=((1, 1), (1, 1)), use_bias=False, rngs=rngs)
        self.blocks = _memory_blocks(width, config, rngs=rngs)

    def __call__(self, x: jax.Array, memory: Memory) -> jax.Array:
        """[B, F, H, W, width] → [B, F or F/2, H/2, W/2, width]."""
        x = einops.rearrange(x, "b (f pooled) h w c -> b f h w (pooled c)", pooled=self.frames)
        x = self.conv(self.pool(x))
        for block in self.blocks:
            x = block(x, memory)
        return x


class TinyEncoder(nnx.Module):
    """Video in 0..1 → normalised latents."""

    def __init__(self, config: TinyVAEConfig, *, rngs: nnx.Rngs):
        width = config.widths[-1]
        self.conv_in = spatial_conv(3, width, config, rngs=rngs)
        self.levels = Blocks([DownLevel(width, temporal, config, rngs=rngs) for temporal in config.temporal_downsample])
        self.conv_out = spatial_conv(width, config.latent_channels, config, rngs=rngs)

    def __call__(self, x: jax.Array, memory: Memory) -> jax.Array:
        """[B, time factor · F, H, W, 3] → [B, F, h, w, latent channels]."""
        x = jax.nn.relu(self.conv_in(x))
        for level in self.levels:
            x = level(x, memory)
        return self.conv_out(x)


class TinyDecoder(nnx.Module):
    """Normalised latents → video in 0..1."""

    def __init__(self, config: TinyVAEConfig, *, rngs: nnx.Rngs):
        widths = (*config.widths, config.widths[-1])
        self.conv_in = spatial_conv(config.latent_channels, widths[0], config, rngs=rngs)
        self.levels = Blocks(
            [
                UpLevel(inputs, outputs, temporal, config, rngs=rngs)
                for inputs, outputs, temporal in zip(widths, widths[1:], config.temporal_upsample, strict=False)
            ]
        )
        self.conv_out = spatial_conv(widths[-1], 3, config, rngs=rngs)

    def __call__(self, x: jax.Array, memory: Memory) -> jax.Array:
        """[B, F, h, w, latent channels] → [B, time factor · F, H, W, 3]."""
        # Latents are squashed softly to −3..3, the range seen in training.
        x = jax.nn.relu(self.conv_in(3 * jnp.tanh(x / 3)))
        for level in self.levels:
            x = level(x, memory)
        return self.conv_out(jax.nn.relu(x))


class TinyVAE(nnx.Module):
    """The tiny autoencoder, or one of its two halves. A plain pytree of weights.

    Args:
        parts: which halves to hold; streaming needs the decoder alone.
    """

    def __init__(self, config: TinyVAEConfig, *, rngs: nnx.Rngs, parts: Sequence[str] = PARTS):
        if not parts or set(parts) - set(PARTS):
            raise ValueError(f"parts must be some of {', '.join(PARTS)}, got {tuple(parts)}")
        self.config = config
        if "encoder" in parts:
            self.encoder = TinyEncoder(config, rngs=rngs)
        if "decoder" in parts:
            self.decoder = TinyDecoder(config, rngs=rngs)

    def decode_step(
        self, latents: jax.Array, cache: FeatureCache | None, first: bool
    ) -> tuple[jax.Array, FeatureCache]:
        """One pass of the decoder: `video_coding.decode` of a single latent frame, or of several at once."""
        config, memory = self.config, Memory(cache)
        video = self.decoder(constrain(latents.astype(config.dtype), "batch"), memory)
        if first:
            # The frames that lead up to a clip's first one do not exist.
            video = video[:, config.time_factor - 1 :]
        return 2 * video.astype(jnp.float32) - 1, memory.cache()

    def encode_step(self, video: jax.Array, cache: FeatureCache | None) -> tuple[jax.Array, FeatureCache]:
        """One pass of the encoder: `encode` without its checks, all frames at once."""
        config, memory = self.config, Memory(cache)
        latents = self.encoder(constrain(((video + 1) / 2).astype(config.dtype), "batch"), memory)
        return latents.astype(jnp.float32), memory.cache()


def encoder_cache(model: Any, batch: int, height: int, width: int) -> FeatureCache:
    """The encoder's cache at the start of `batch` streams of `height` × `width` latents (not pixels)."""
    config = model.config
    video = jnp.zeros((batch, config.time_factor, height * config.space_factor, width * config.space_factor, 3))
    shapes = jax.eval_shape(lambda model: model.encode_step(video, None)[1], model)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def encode(model: TinyVAE, video: jax.Array, cache: FeatureCache) -> tuple[jax.Array, FeatureCache]:
    """Latents of the next frames of a stream.

    Unlike the full encoder, latent k is made when frames 4 k … 4 k + 3 are there, three frames late: the frames it
    stands for are 4 k − 3 … 4 k. There is no special first call.

    Args:
        model: with an encoder.
        video: frames in −1..1, [B, t k, H, W, 3] with k ≥ 1; t = 4 for TAEW2.1.
        cache: `encoder_cache` at the start of the stream, then what the last call returned.

    Returns:
        Normalised latents [B, k, h, w, C] float32, and the cache.

    Raises:
        ValueError: a number of frames, or a frame size, that latents cannot tile.

    Source: taehv.py TAEHV.encode_video.
    """
    time, space = model.config.time_factor, model.config.space_factor
    frames, height, width = video.shape[1:4]
    if frames < 1 or frames % time:
        raise ValueError(f"video must have {time} k frames, got {frames}")
    if height % space or width % space:
        raise ValueError(f"frames of {height}x{width} are not tiled by latents of {space}x{space} pixels")
    groups = einops.rearrange(video, "b (n group) h w c -> n b group h w c", group=time)

    def scan_step(cache, group):
        latents, cache = model.encode_step(group, cache)
        return cache, latents

    cache, latents = jax.lax.scan(scan_step, cache, groups)
    return einops.rearrange(latents, "n b f h w c -> b (n f) h w c"), cache


def encode_clip(model: TinyVAE, video: jax.Array) -> jax.Array:
    """Latents [B, 1 + k, h, w, C] of a whole clip [B, 1 + t k, H, W, 3] in −1..1, as `vae.encode_clip` counts them.

    The last frame is repeated until the number of frames is a multiple of t, as the official encoder does.
    """
    time, space = model.config.time_factor, model.config.space_factor
    batch, frames, height, width, _ = video.shape
    video = jnp.concatenate([video, jnp.repeat(video[:, -1:], -frames % time, axis=1)], axis=1)
    return encode(model, video, encoder_cache(model, batch, height // space, width // space))[0]
