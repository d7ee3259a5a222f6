"""The Wan2.1 causal video autoencoder, one pass at a time; `models/video_coding.py` has clips and streams.

A causal convolution sees the current frames and the two before them. Those two travel from call to call in a
`FeatureCache`, which starts as zeros and never changes shape. Source: Wan-Video/Wan2.1 wan/modules/vae.py.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adastate_jax.checks import require_at_least_one, require_dtypes
from adastate_jax.models.attention import attention
from adastate_jax.models.convolution import causal_convolution, doubling_convolution
from adastate_jax.models.video_layers import (
    PARTS,
    Blocks,
    FeatureCache,
    Memory,
    check_tile,
    kernel_init,
    pointwise,
    spatial_conv,
)
from adastate_jax.sharding import constrain

_MAX_LEVELS, _MAX_BLOCKS = 8, 64


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes and numerics of the autoencoder; the defaults are Wan2.1's.

    Attributes:
        dim, dim_multipliers: channels at full resolution, and of each level in multiples of it; levels are a factor
            two apart in space.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        temporal_downsample: which steps from a level to the next also halve the frame rate.
        latents_mean, latents_std: per channel, of the encoder's raw output; latents outside this file are normalised.
        param_dtype, dtype: of the weights, and of convolutions and the features between them. Norms, the last
            convolution and the latents' scaling run in float32 whatever `dtype` is.
        tile: streams are decoded in square tiles of so many latents a side, which share a quarter of it with their
            neighbours, for less memory; 0 decodes whole frames. See `tiled_decode`.
        latents_per_call: how many latent frames go through the decoder at once. The video is the same; more of them
            take more memory, and a TPU about half the time (docs/optimisations.md).
    """

    dim: int = 96
    latent_channels: int = 16
    dim_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    latents_std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )
    param_dtype: str = "float32"
    dtype: str = "float32"
    tile: int = 0
    latents_per_call: int = 1

    def __post_init__(self):
        require_at_least_one(self, "dim", "latent_channels", "dim_multipliers", "num_res_blocks", "latents_per_call")
        require_dtypes(self)
        check_tile(self.tile)
        # Levels and blocks are layers of their own, not stacked: a number from a file must not make billions of them.
        if not 1 <= len(self.dim_multipliers) <= _MAX_LEVELS or self.num_res_blocks > _MAX_BLOCKS:
            raise ValueError(
                f"at most {_MAX_LEVELS} levels of {_MAX_BLOCKS} blocks are possible, got {len(self.dim_multipliers)} "
                f"dim_multipliers and num_res_blocks {self.num_res_blocks}"
            )
        if len(self.temporal_downsample) != len(self.dim_multipliers) - 1:
            raise ValueError(
                f"temporal_downsample needs one flag per step between {len(self.dim_multipliers)} levels, "
                f"got {self.temporal_downsample}"
            )
        if not len(self.latents_mean) == len(self.latents_std) == self.latent_channels:
            raise ValueError(f"latents_mean and latents_std need {self.latent_channels} values, one per channel")
        if not all(0 < deviation < math.inf for deviation in self.latents_std):
            raise ValueError(f"latents_std must be positive, got {self.latents_std}")

    @property
    def space_factor(self) -> int:
        """Pixels per latent, along height and along width."""
        return 2 ** (len(self.dim_multipliers) - 1)

    @property
    def time_factor(self) -> int:
        """Frames per latent frame after the first, which is one frame."""
        return 2 ** sum(self.temporal_downsample)


class CausalConv(nnx.Module):
    """Convolution over three frames, the newest being the current one, and `space` × `space` pixels around each."""

    def __init__(self, inputs: int, outputs: int, config: VAEConfig, *, space=3, stride=1, dtype=None, rngs: nnx.Rngs):
        shape = (3, space, space, inputs, outputs)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, config.param_dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), config.param_dtype))
        self.stride = stride
        self.dtype = dtype or config.dtype

    def __call__(self, x: jax.Array, memory: Memory) -> jax.Array:
        """[B, F, H, W, inputs] → [B, F / stride, H, W, outputs]; F is a multiple of the stride."""
        seen, kernel = memory.extend(x, 3 - self.stride), self.kernel[...]
        if memory.empty and x.shape[1] == self.stride == 1:  # the two frames before it are zeros, and add none
            seen, kernel = x, kernel[2:]
        return causal_convolution(seen, kernel, self.bias[...], self.stride, self.dtype)


class ChannelNorm(nnx.Module):
    """Scales every pixel's channel vector to length √C, in float32, then each channel by a gain."""

    def __init__(self, channels: int, config: VAEConfig):
        self.gain = nnx.Param(jnp.ones((channels,), config.param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] → [..., C]."""
        y = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.square(y).sum(axis=-1, keepdims=True))
        y = y / jnp.maximum(length, 1e-12) * math.sqrt(x.shape[-1]) * self.gain[...].astype(jnp.float32)
        return y.astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Two normed causal convolutions and a skip."""

    def __init__(self, inputs: int, outputs: int, config: VAEConfig, *, rngs: nnx.Rngs):
        self.norm_in, self.norm_out = ChannelNorm(inputs, config), ChannelNorm(outputs, config)
        self.conv_in = CausalConv(inputs, outputs, config, rngs=rngs)
        self.conv_out = CausalConv(outputs, outputs, config, rngs=rngs)
        self.changes_channels = inputs != outputs
        if self.changes_channels:
            self.shortcut = pointwise(inputs, outputs, config, rngs=rngs)

    def __call__(self, x: jax.Array, memory: Memory, first: bool) -> jax.Array:
        """[B, F, H, W, inputs] → [B, F, H, W, outputs]."""
        y = self.conv_in(jax.nn.silu(self.norm_in(x)), memory)
        y = self.conv_out(jax.nn.silu(self.norm_out(y)), memory)
        return y + (self.shortcut(x) if self.changes_channels else x)


class SpatialAttention(nnx.Module):
    """Single-head attention among the pixels of one frame, and a skip."""

    def __init__(self, channels: int, config: VAEConfig, *, rngs: nnx.Rngs):
        self.norm = ChannelNorm(channels, config)
        self.attention_in = pointwise(channels, 3 * channels, config, rngs=rngs)
        self.attention_out = pointwise(channels, channels, config, rngs=rngs)

    def __call__(self, x: jax.Array, memory: Memory, first: bool) -> jax.Array:
        """[B, F, H, W, C] → [B, F, H, W, C]."""
        batch, _, height, _, _ = x.shape
        pixels = einops.rearrange(self.norm(x), "b f h w c -> (b f) (h w) 1 c")
        query, key, value = jnp.split(self.attention_in(pixels), 3, axis=-1)
        y = self.attention_out(attention(query, key, value, "xla"))
        return x + einops.rearrange(y, "(b f) (h w) 1 c -> b f h w c", b=batch, h=height)


class Upsample(nnx.Module):
    """Doubles height and width, and the frames after a clip's first latent if `temporal`."""

    def __init__(self, inputs: int, outputs: int, temporal: bool, config: VAEConfig, *, rngs: nnx.Rngs):
        self.temporal = temporal
        if temporal:
            self.time_conv = CausalConv(inputs, 2 * inputs, config, space=1, rngs=rngs)
        self.conv = spatial_conv(inputs, outputs, config, rngs=rngs)

    def __call__(self, x: jax.Array, memory: Memory, first: bool) -> jax.Array:
        """[B, F, H, W, inputs] → [B, F or 2F, 2H, 2W, outputs]."""
        if self.temporal and first:
            # The clip's second latent is to see zeros here, not the first: official checkpoints are trained so.
            memory.keep(x, 2)
        elif self.temporal:
            x = einops.rearrange(self.time_conv(x, memory), "b f h w (two c) -> b (f two) h w c", two=2)
        return doubling_convolution(x, self.conv.kernel[...], self.conv.bias[...], self.conv.dtype)


class Downsample(nnx.Module):
    """Halves height and width, and the frames after a clip's first if `temporal`."""

    def __init__(self, inputs: int, outputs: int, temporal: bool, config: VAEConfig, *, rngs: nnx.Rngs):
        self.temporal = temporal
        # Official padding is to the right and at the bottom only.
        self.conv = spatial_conv(inputs, outputs, config, strides=2, padding=((0, 1), (0, 1)), rngs=rngs)
        if temporal:
            self.time_conv = CausalConv(outputs, outputs, config, space=1, stride=2, rngs=rngs)

    def __call__(self, x: jax.Array, memory: Memory, first: bool) -> jax.Array:
        """[B, F, H, W, inputs] → [B, F or F/2, H/2, W/2, outputs]."""
        x = self.conv(x)
        if self.temporal and first:
            memory.extend(x, 1)
        elif self.temporal:
            x = self.time_conv(x, memory)
        return x


class Level(NamedTuple):
    """One block of a network's stack: a residual block, or (`resample`) the step to the next resolution."""

    resample: bool
    inputs: int
    outputs: int
    temporal: bool = False


def encoder_levels(config: VAEConfig) -> list[Level]:
    """The encoder's blocks, from full resolution down."""
    levels, width = [], config.dim
    for index, multiplier in enumerate(config.dim_multipliers):
        for _ in range(config.num_res_blocks):
            levels.append(Level(False, width, config.dim * multiplier))
            width = config.dim * multiplier
        if index < len(config.temporal_downsample):
            levels.append(Level(True, width, width, config.temporal_downsample[index]))
    return levels


def decoder_levels(config: VAEConfig) -> list[Level]:
    """The decoder's blocks, from the latents' resolution up; every upsampling halves the channels."""
    levels, width = [], config.dim * config.dim_multipliers[-1]
    temporal = config.temporal_downsample[::-1]
    for index, multiplier in enumerate(config.dim_multipliers[::-1]):
        for _ in range(config.num_res_blocks + 1):
            levels.append(Level(False, width, config.dim * multiplier))
            width = config.dim * multiplier
        if index < len(temporal):
            levels.append(Level(True, width, width // 2, temporal[index]))
            width //= 2
    return levels


def _blocks(levels: Sequence[Level], resample: Callable, config: VAEConfig, *, rngs: nnx.Rngs) -> Blocks:
    return Blocks(
        [
            resample(level.inputs, level.outputs, level.temporal, config, rngs=rngs)
            if level.resample
            else ResidualBlock(level.inputs, level.outputs, config, rngs=rngs)
            for level in levels
        ]
    )


def _middle(width: int, config: VAEConfig, *, rngs: nnx.Rngs) -> Blocks:
    return Blocks(
        [
            ResidualBlock(width, width, config, rngs=rngs),
            SpatialAttention(width, config, rngs=rngs),
            ResidualBlock(width, width, config, rngs=rngs),
        ]
    )


class Encoder(nnx.Module):
    """Video → raw mean and log-variance of the latents."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        levels = encoder_levels(config)
        width, moments = levels[-1].outputs, 2 * config.latent_channels
        self.conv_in = CausalConv(3, config.dim, config, rngs=rngs)
        self.blocks = _blocks(levels, Downsample, config, rngs=rngs)
        self.middle = _middle(width, config, rngs=rngs)
        self.norm_out = ChannelNorm(width, config)
        self.conv_out = CausalConv(width, moments, config, dtype="float32", rngs=rngs)
        self.to_moments = pointwise(moments, moments, config, dtype="float32", rngs=rngs)

    def __call__(self, x: jax.Array, memory: Memory, first: bool) -> jax.Array:
        """[B, 1, H, W, 3] if first, else [B, time factor · k, H, W, 3] → [B, 1 or k, h, w, 2 · latent channels]."""
        x = self.conv_in(x, memory)
        for block in (*self.blocks, *self.middle):
            x = block(x, memory, first)
        return self.to_moments(self.conv_out(jax.nn.silu(self.norm_out(x)), memory))


class Decoder(nnx.Module):
    """Raw latents → video."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        levels = decoder_levels(config)
        self.from_latents = pointwise(config.latent_channels, config.latent_channels, config, rngs=rngs)
        self.conv_in = CausalConv(config.latent_channels, levels[0].inputs, config, rngs=rngs)
        self.middle = _middle(levels[0].inputs, config, rngs=rngs)
        self.blocks = _blocks(levels, Upsample, config, rngs=rngs)
        self.norm_out = ChannelNorm(config.dim, config)
        self.conv_out = CausalConv(config.dim, 3, config, dtype="float32", rngs=rngs)

    def __call__(self, x: jax.Array, memory: Memory, first: bool) -> jax.Array:
        """[B, 1, h, w, latent channels] if first, else [B, F, h, w, …] → [B, 1 or time factor · F, H, W, 3]."""
        x = self.conv_in(self.from_latents(x), memory)
        for block in (*self.middle, *self.blocks):
            x = block(x, memory, first)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), memory)


class VAE(nnx.Module):
    """The autoencoder, or one of its two halves. A plain pytree of weights.

    Args:
        parts: which halves to hold; streaming needs the decoder alone.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs, parts: Sequence[str] = PARTS):
        if not parts or set(parts) - set(PARTS):
            raise ValueError(f"parts must be some of {', '.join(PARTS)}, got {tuple(parts)}")
        self.config = config
        if "encoder" in parts:
            self.encoder = Encoder(config, rngs=rngs)
        if "decoder" in parts:
            self.decoder = Decoder(config, rngs=rngs)

    def decode_step(
        self, latents: jax.Array, cache: FeatureCache | None, first: bool
    ) -> tuple[jax.Array, FeatureCache]:
        """One pass of the decoder: `decode` of a single latent frame, or, if not the first, of several at once."""
        config, memory = self.config, Memory(cache, empty=first)
        mean, std = (np.asarray(x, np.float32) for x in (config.latents_mean, config.latents_std))
        raw = (latents.astype(jnp.float32) * std + mean).astype(config.dtype)
        return self.decoder(constrain(raw, "batch"), memory, first), memory.cache()

    def encode_step(
        self, video: jax.Array, cache: FeatureCache | None, first: bool
    ) -> tuple[tuple[jax.Array, jax.Array], FeatureCache]:
        """One pass of the encoder: `encode_moments` of one latent frame's worth of frames."""
        config, memory = self.config, Memory(cache, empty=first)
        moments = self.encoder(constrain(video.astype(config.dtype), "batch"), memory, first)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        center, std = (np.asarray(x, np.float32) for x in (config.latents_mean, config.latents_std))
        return ((mean - center) / std, log_variance), memory.cache()
