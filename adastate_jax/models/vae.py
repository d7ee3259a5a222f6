"""The Wan2.1 causal video autoencoder: whole clips and streams through one implementation.

A causal convolution sees the current frames and the two before them. Those two travel from call to call in a
`FeatureCache`, which starts as zeros and never changes shape, so that a stream needs two compiled functions: the call
that holds the first frame, which has no past and is not resampled in time, and every other call. A whole clip is a
single call. Source: Wan-Video/Wan2.1 wan/modules/vae.py.

`decode`, `decoder_cache` and their tiled forms also drive `models/tiny_vae.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adastate_jax.models.attention import attention
from adastate_jax.sharding import constrain

PARTS = ("encoder", "decoder")


def check_tile(tile: int) -> None:
    """Raises ValueError unless `tile` is a side that `tiled_decode` can be asked for, or 0."""
    if tile < 0:
        raise ValueError(f"tile must be a number of latents, or 0 for whole frames, got {tile}")


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

    def __post_init__(self):
        check_tile(self.tile)
        if len(self.temporal_downsample) != len(self.dim_multipliers) - 1:
            raise ValueError(
                f"temporal_downsample needs one flag per step between {len(self.dim_multipliers)} levels, "
                f"got {self.temporal_downsample}"
            )
        if not len(self.latents_mean) == len(self.latents_std) == self.latent_channels:
            raise ValueError(f"latents_mean and latents_std need {self.latent_channels} values, one per channel")

    @property
    def space_factor(self) -> int:
        """Pixels per latent, along height and along width."""
        return 2 ** (len(self.dim_multipliers) - 1)

    @property
    def time_factor(self) -> int:
        """Frames per latent frame after the first, which is one frame."""
        return 2 ** sum(self.temporal_downsample)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FeatureCache:
    """What a network remembers of the frames before a call.

    Attributes:
        frames: the newest input frames of each layer that looks back, in calling order, each [B, 1 or 2, h, w, c].
    """

    frames: tuple[jax.Array, ...]


class Memory:
    """Hands the layers of one pass their past frames, in calling order, and collects what the next pass will need.

    Without a cache every past is zeros, in the shape that the layer asks for.
    """

    def __init__(self, cache: FeatureCache | None):
        self._past = None if cache is None else iter(cache.frames)
        self._newest: list[jax.Array] = []

    def _next(self, x: jax.Array, frames: int) -> jax.Array:
        if self._past is None:
            return jnp.zeros((x.shape[0], frames, *x.shape[2:]), x.dtype)
        return next(self._past)

    def extend(self, x: jax.Array, frames: int) -> jax.Array:
        """The layer's input [B, F, h, w, c] with the `frames` before it in front: [B, frames + F, h, w, c]."""
        joined = jnp.concatenate([self._next(x, frames), x], axis=1)
        self._newest.append(joined[:, -frames:])
        return joined

    def keep(self, x: jax.Array, frames: int) -> None:
        """Leaves the past of a layer, which would see x, as it is: the layer does not run in this pass."""
        self._newest.append(self._next(x, frames))

    def cache(self) -> FeatureCache:
        """What was collected."""
        return FeatureCache(tuple(self._newest))


class Blocks(nnx.Module):
    """Modules one after the other, under the names 0, 1, …"""

    def __init__(self, modules: Sequence[nnx.Module]):
        self.size = len(modules)
        for index, module in enumerate(modules):
            setattr(self, str(index), module)

    def __iter__(self) -> Iterator[nnx.Module]:
        return (getattr(self, str(index)) for index in range(self.size))


def kernel_init(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    """Uniform weights of variance one over the number of inputs, all axes but the last.

    Drawn flat: compiling a draw of a five-dimensional array takes the CPU backend ten times as long.
    """
    bound = math.sqrt(3 / math.prod(shape[:-1]))
    return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)


class CausalConv(nnx.Module):
    """Convolution over three frames, the newest being the current one, and `space` × `space` pixels around each.

    It runs as one spatial convolution per frame of the window, each rounded to `dtype`, and adds these up in float32:
    on CPU two to three times as fast as a convolution over all three axes, and faster than one of the stacked frames.
    """

    def __init__(self, inputs: int, outputs: int, config: VAEConfig, *, space=3, stride=1, dtype=None, rngs: nnx.Rngs):
        shape = (3, space, space, inputs, outputs)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, config.param_dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), config.param_dtype))
        self.stride = stride
        self.dtype = dtype or config.dtype

    def __call__(self, x: jax.Array, memory: Memory) -> jax.Array:
        """[B, F, H, W, inputs] → [B, F / stride, H, W, outputs]; F is a multiple of the stride."""
        batch, frames = x.shape[:2]
        joined = memory.extend(x, 3 - self.stride).astype(self.dtype)
        kernel = self.kernel[...].astype(self.dtype)
        y = self.bias[...].astype(jnp.float32)
        for offset in range(3):
            seen = joined[:, offset : offset + frames - self.stride + 1 : self.stride]
            y = y + jax.lax.conv_general_dilated(
                einops.rearrange(seen, "b f h w c -> (b f) h w c"),
                kernel[offset],
                window_strides=(1, 1),
                padding="SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            ).astype(jnp.float32)
        return einops.rearrange(y.astype(self.dtype), "(b f) h w c -> b f h w c", b=batch)


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


def spatial_conv(inputs: int, outputs: int, config: Any, *, rngs: nnx.Rngs, **options) -> nnx.Conv:
    """3×3 convolution of every frame by itself."""
    return nnx.Conv(
        inputs,
        outputs,
        (3, 3),
        kernel_init=kernel_init,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
        **options,
    )


def pointwise(inputs: int, outputs: int, config: Any, *, rngs: nnx.Rngs, dtype=None, **options) -> nnx.Linear:
    """1×1×1 convolution."""
    return nnx.Linear(
        inputs,
        outputs,
        kernel_init=kernel_init,
        dtype=dtype or config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
        **options,
    )


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
        return self.conv(einops.repeat(x, "b f h w c -> b f (h down) (w across) c", down=2, across=2))


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
        """One pass of the decoder: `decode` of a single latent frame."""
        config, memory = self.config, Memory(cache)
        mean, std = (np.asarray(x, np.float32) for x in (config.latents_mean, config.latents_std))
        raw = (latents.astype(jnp.float32) * std + mean).astype(config.dtype)
        return self.decoder(constrain(raw, "batch"), memory, first), memory.cache()

    def encode_step(
        self, video: jax.Array, cache: FeatureCache | None, first: bool
    ) -> tuple[tuple[jax.Array, jax.Array], FeatureCache]:
        """One pass of the encoder: `encode_moments` of one latent frame's worth of frames."""
        config, memory = self.config, Memory(cache)
        moments = self.encoder(constrain(video.astype(config.dtype), "batch"), memory, first)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        center, std = (np.asarray(x, np.float32) for x in (config.latents_mean, config.latents_std))
        return ((mean - center) / std, log_variance), memory.cache()


def _run(step: Callable, x: jax.Array, cache: FeatureCache, first: bool, group: int) -> tuple[Any, FeatureCache]:
    """Runs `step` over a clip: on the first frame if it is the first call, then on every `group` frames.

    Memory use is that of one step, however long the clip.

    Returns:
        The outputs, joined along the frame axis, and the cache.
    """
    outputs = []
    if first:
        y, cache = step(x[:, :1], cache, True)
        outputs.append(y)
        x = x[:, 1:]
    if x.shape[1]:
        groups = einops.rearrange(x, "b (n group) h w c -> n b group h w c", group=group)

        def scan_step(cache, frames):
            y, cache = step(frames, cache, False)
            return cache, y

        cache, y = jax.lax.scan(scan_step, cache, groups)
        outputs.append(jax.tree.map(lambda z: einops.rearrange(z, "n b f h w c -> b (n f) h w c"), y))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *outputs), cache


def decode(model: Any, latents: jax.Array, cache: FeatureCache, first: bool) -> tuple[jax.Array, FeatureCache]:
    """Video of the next latent frames of a stream.

    Args:
        model: a `VAE` or a `TinyVAE` with a decoder.
        latents: normalised latents [B, F, h, w, C], F ≥ 1, any number of frames per call.
        cache: `decoder_cache` at the start of the stream, then what the last call returned.
        first: whether these are the stream's first frames; static under `jit`.

    Returns:
        Frames [B, 1 + t (F − 1), H, W, 3] if first, else [B, t F, H, W, 3], float32, nominally in −1..1 but not
        clamped, with t = 4 and H, W = 8 h, 8 w for Wan2.1; and the cache.

    Raises:
        ValueError: no latent frames, or the wrong number of channels.

    Source: wan/modules/vae.py WanVAE_.decode.
    """
    if latents.ndim != 5 or not latents.shape[1] or latents.shape[-1] != model.config.latent_channels:
        raise ValueError(
            f"latents must be [batch, frames, height, width, {model.config.latent_channels}] with at least one frame, "
            f"got {list(latents.shape)}"
        )
    return _run(model.decode_step, latents, cache, first, group=1)


def encode_moments(
    model: VAE, video: jax.Array, cache: FeatureCache, first: bool
) -> tuple[jax.Array, jax.Array, FeatureCache]:
    """Distribution of the latents of a stream's next frames.

    Args:
        model: a `VAE` with an encoder.
        video: frames in −1..1, [B, 1 + t k, H, W, 3] if first, else [B, t k, H, W, 3]; t = 4 for Wan2.1.
        cache, first: as for `decode`, with `encoder_cache`.

    Returns:
        Normalised mean and raw (not normalised) log-variance, both [B, 1 + k or k, h, w, C] float32; and the cache.

    Raises:
        ValueError: a number of frames, or a frame size, that latents cannot tile.

    Source: wan/modules/vae.py WanVAE_.encode.
    """
    time, space = model.config.time_factor, model.config.space_factor
    frames, height, width = video.shape[1:4]
    if frames < 1 or (frames - first) % time:
        expected = f"1 + {time} k" if first else f"{time} k"
        raise ValueError(f"video must have {expected} frames {'first' if first else 'after the first'}, got {frames}")
    if height % space or width % space:
        raise ValueError(f"frames of {height}x{width} are not tiled by latents of {space}x{space} pixels")
    (mean, log_variance), cache = _run(model.encode_step, video, cache, first, group=time)
    return mean, log_variance, cache


def encode(model: VAE, video: jax.Array, cache: FeatureCache, first: bool) -> tuple[jax.Array, FeatureCache]:
    """Latents of a stream's next frames: `encode_moments` without the log-variance."""
    mean, _, cache = encode_moments(model, video, cache, first)
    return mean, cache


def _empty(step: Callable, model: Any, shape: tuple[int, ...], leading: tuple[int, ...] = ()) -> FeatureCache:
    """The zeros that a stream starts from, in the shapes, after `leading`, that a first call leaves behind."""
    leaves, structure = jax.tree.flatten(model)
    leaves = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    return _zeros(step, structure, leaves, shape, leading)


@functools.partial(jax.jit, static_argnums=range(5))
def _zeros(step: Callable, structure: Any, leaves: tuple, shape: tuple[int, ...], leading: tuple[int, ...]):
    # Compiled, so that the network is traced for its first stream only.
    model = jax.tree.unflatten(structure, leaves)
    _, cache = jax.eval_shape(lambda model: step(model, jnp.zeros(shape), None, True), model)
    return jax.tree.map(lambda x: jnp.zeros((*leading, *x.shape), x.dtype), cache)


def decoder_cache(model: Any, batch: int, height: int, width: int) -> FeatureCache:
    """The decoder's cache at the start of `batch` streams of `height` × `width` latents."""
    return _empty(type(model).decode_step, model, (batch, 1, height, width, model.config.latent_channels))


def encoder_cache(model: VAE, batch: int, height: int, width: int) -> FeatureCache:
    """The encoder's cache at the start of `batch` streams of `height` × `width` latents (not pixels)."""
    space = model.config.space_factor
    return _empty(type(model).encode_step, model, (batch, 1, height * space, width * space, 3))


def decode_clip(model: Any, latents: jax.Array) -> jax.Array:
    """Video [B, 1 + t (F − 1), H, W, 3] of a whole clip's latents [B, F, h, w, C]; see `decode`."""
    batch, _, height, width, _ = latents.shape
    return decode(model, latents, decoder_cache(model, batch, height, width), first=True)[0]


def encode_clip(model: VAE, video: jax.Array) -> jax.Array:
    """Latents [B, 1 + k, h, w, C] of a whole clip [B, 1 + t k, H, W, 3]; see `encode_moments`."""
    space = model.config.space_factor
    batch, _, height, width, _ = video.shape
    return encode(model, video, encoder_cache(model, batch, height // space, width // space), first=True)[0]


def _tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles start along an axis, each sharing at least `overlap` with the next; the last ends at the border."""
    if tile >= size:
        return [0]
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap must be at least 0 and less than tile {tile}, got {overlap}")
    starts = list(range(0, size - tile, tile - overlap))
    return [*starts, size - tile]


def tiled_decoder_cache(
    model: Any, batch: int, height: int, width: int, tile: int = 32, overlap: int = 8
) -> FeatureCache:
    """The cache that `tiled_decode` starts from: one decoder cache per tile, [tiles, B, …]."""
    tiles = len(_tile_starts(height, tile, overlap)) * len(_tile_starts(width, tile, overlap))
    shape = (batch, 1, min(tile, height), min(tile, width), model.config.latent_channels)
    return _empty(type(model).decode_step, model, shape, leading=(tiles,))


def tiled_decode(
    model: Any, latents: jax.Array, cache: FeatureCache, first: bool, tile: int = 32, overlap: int = 8
) -> tuple[jax.Array, FeatureCache]:
    """`decode` for little memory: square tiles one after the other, blended linearly where they overlap.

    An approximation: the attention in the middle of the network sees a tile instead of the frame, and convolutions
    see zeros beyond a tile's edge. It is exact when one tile covers the frame. The features between layers take
    less memory, and the cache takes more, by what tiles share.

    Args:
        model, latents, first: as for `decode`.
        cache: `tiled_decoder_cache` at the start of the stream, then what the last call returned.
        tile, overlap: side of a tile, and how much neighbours share at least, in latents; static under `jit`.

    Returns:
        As `decode`.

    Raises:
        ValueError: as `decode`, or an overlap that is not less than the tile.
    """
    height, width = latents.shape[2:4]
    tile_height, tile_width = min(tile, height), min(tile, width)
    corners = [
        (top, left) for top in _tile_starts(height, tile, overlap) for left in _tile_starts(width, tile, overlap)
    ]
    tiles = jnp.stack([latents[:, :, top : top + tile_height, left : left + tile_width] for top, left in corners])

    # The caches are carried from tile to tile, which updates them in place; `map` would hold them twice.
    def decode_tile(caches, indexed):
        index, tile = indexed
        part, cache = decode(model, tile, jax.tree.map(lambda x: x[index], caches), first)
        update = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
        return jax.tree.map(update, caches, cache), part

    cache, decoded = jax.lax.scan(decode_tile, cache, (np.arange(len(corners)), tiles))

    space = decoded.shape[3] // tile_height
    ramps = [_ramp(side * space, overlap * space) for side in (tile_height, tile_width)]
    weight = np.multiply.outer(*ramps)[..., None]
    total = np.zeros((height * space, width * space, 1), np.float32)
    video = jnp.zeros((*decoded.shape[1:3], *total.shape[:2], 3), decoded.dtype)
    for part, (top, left) in zip(decoded, corners, strict=True):
        rows, columns = (
            slice(start * space, (start + side) * space) for start, side in ((top, tile_height), (left, tile_width))
        )
        total[rows, columns] += weight
        video = video.at[:, :, rows, columns].add(weight * part)
    return video / total, cache


def _ramp(size: int, overlap: int) -> np.ndarray:
    """A tile's weight along an axis, [size] float32: rises over the first `overlap` pixels, falls over the last."""
    from_edge = np.minimum(np.arange(size), np.arange(size)[::-1]) + 1.0
    return np.minimum(from_edge / (overlap + 1), 1.0).astype(np.float32)
