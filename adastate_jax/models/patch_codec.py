"""A linear codec for small worlds: principal components of square patches, fitted to the training clips.

It stands where Wan's VAE stands, with the same calls, but has one latent frame per video frame and no memory.
"""

import dataclasses

import einops
import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.checks import require_at_least_one
from adastate_jax.models.linear import stated_precision


@dataclasses.dataclass(frozen=True)
class PatchCodecConfig:
    """Sizes of the codec.

    Attributes:
        patch: height and width of a patch in pixels; a latent per patch.
        channels: principal components kept, at most 3 · patch².
        whitening: exponent of a component's deviation that it is divided by: 1 gives every latent channel unit
            variance, 0 leaves the natural spectrum, which spends the network's capacity where the energy is.
    """

    patch: int = 8
    channels: int = 16
    whitening: float = 0.5

    def __post_init__(self):
        require_at_least_one(self, "patch", "channels")
        if not 1 <= self.channels <= 3 * self.patch**2:
            raise ValueError(
                f"channels must lie in 1..{3 * self.patch**2} for patches of {self.patch}, got {self.channels}"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PatchCodec:
    """The fitted codec: `mean` [3 · patch²], `basis` [3 · patch², C] orthonormal, `scale` [C] of the latents."""

    mean: jax.Array
    basis: jax.Array
    scale: jax.Array

    @property
    def patch(self) -> int:
        return round((self.basis.shape[0] // 3) ** 0.5)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(H, W, C) of the latents of height × width video; raises ValueError if patches do not tile it."""
        if height % self.patch or width % self.patch:
            raise ValueError(f"video of {height}x{width} is not tiled by patches of {self.patch}")
        return height // self.patch, width // self.patch, self.basis.shape[1]

    def encode(self, video: jax.Array) -> jax.Array:
        """Video [B, N, H · patch, W · patch, 3] in −1..1 → latents [B, N, H, W, C]."""
        patches = einops.rearrange(
            video.astype(jnp.float32), "b n (h p) (w q) c -> b n h w (p q c)", p=self.patch, q=self.patch
        )
        return _product(patches - self.mean, self.basis) / self.scale

    def decode_start(self, batch: int, height: int, width: int) -> tuple[()]:
        """The feature cache before the first latents: there is none."""
        return ()

    def decode(self, latents: jax.Array, cache: tuple[()], first: bool) -> tuple[jax.Array, tuple[()]]:
        """Latents [B, N, H, W, C] → video [B, N, H · patch, W · patch, 3], not clipped to −1..1, and the cache."""
        patches = _product(latents * self.scale, self.basis.T) + self.mean
        video = einops.rearrange(patches, "b n h w (p q c) -> b n (h p) (w q) c", p=self.patch, q=self.patch)
        return video, cache


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=stated_precision("float32"))


def fit_patch_codec(config: PatchCodecConfig, videos: np.ndarray) -> PatchCodec:
    """Fits the codec to clips.

    Args:
        videos: [n, F, H, W, 3] uint8.

    Raises:
        ValueError: patches do not tile the frames, or the clips hold no variation.
    """
    if videos.shape[2] % config.patch or videos.shape[3] % config.patch:
        raise ValueError(f"video of {videos.shape[2]}x{videos.shape[3]} is not tiled by patches of {config.patch}")
    patches = einops.rearrange(
        videos.astype(np.float64) / 127.5 - 1, "n f (h p) (w q) c -> (n f h w) (p q c)", p=config.patch, q=config.patch
    )
    mean = patches.mean(axis=0)
    covariance = np.cov(patches - mean, rowvar=False)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1][: config.channels], vectors[:, ::-1][:, : config.channels]
    if values[0] <= 0:
        raise ValueError("the clips show one flat colour; there is nothing to fit the codec to")
    deviation = np.sqrt(np.maximum(values, 1e-8 * values[0]))
    scale = deviation**config.whitening
    scale *= np.sqrt(np.mean((deviation / scale) ** 2))  # latents of unit mean square over all channels
    basis = vectors * np.where(vectors.sum(axis=0) < 0, -1.0, 1.0)  # the sign of an eigenvector is arbitrary
    return PatchCodec(*(jnp.asarray(x, jnp.float32) for x in (mean, basis, scale)))
