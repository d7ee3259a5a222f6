"""Clips and streams through a video autoencoder: encoding, decoding, decoding in tiles.

A stream needs two compiled functions: the call that holds the first frame, which has no past and is not resampled in
time, and every other call. A whole clip is a single call. `decode`, `decoder_cache` and their tiled forms drive both
`models/vae.py` and `models/tiny_vae.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.models.vae import VAE
from adastate_jax.models.video_layers import FeatureCache


def _run(step: Callable, x: jax.Array, cache: FeatureCache, first: bool, group: int) -> tuple[Any, FeatureCache]:
    """Runs `step` over a clip: on the first frame if it is the first call, then on every `group` frames and the rest.

    Memory use is that of one step, however long the clip.

    Returns:
        The outputs, joined along the frame axis, and the cache.
    """
    outputs = []
    if first:
        y, cache = step(x[:, :1], cache, True)
        outputs.append(y)
        x = x[:, 1:]
    whole = x.shape[1] - x.shape[1] % group
    if whole:
        groups = einops.rearrange(x[:, :whole], "b (n group) h w c -> n b group h w c", group=group)

        def scan_step(cache, frames):
            y, cache = step(frames, cache, False)
            return cache, y

        cache, y = jax.lax.scan(scan_step, cache, groups)
        outputs.append(jax.tree.map(lambda z: einops.rearrange(z, "n b f h w c -> b (n f) h w c"), y))
    if whole < x.shape[1]:
        y, cache = step(x[:, whole:], cache, False)
        outputs.append(y)
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
    return _run(model.decode_step, latents, cache, first, group=model.config.latents_per_call)


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


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
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
    tiles = len(tile_starts(height, tile, overlap)) * len(tile_starts(width, tile, overlap))
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
    corners = [(top, left) for top in tile_starts(height, tile, overlap) for left in tile_starts(width, tile, overlap)]
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
