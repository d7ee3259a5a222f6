"""Wan2.1's autoencoders behind the calls of `PatchCodec`, for streams that do not know which codec they decode with."""

import dataclasses

import jax

from adastate_jax.models.tiny_vae import TinyVAE
from adastate_jax.models.vae import VAE
from adastate_jax.models.video_coding import decode, decoder_cache, encode_clip, tiled_decode, tiled_decoder_cache
from adastate_jax.models.video_layers import FeatureCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WanCodec:
    """A decoder, and an encoder into the same latent space.

    Attributes:
        decoder: Wan2.1's autoencoder or TAEW2.1, its fast stand-in; decodes in tiles if its configuration says so.
        encoder: Wan2.1's autoencoder; None if nothing will be encoded.
    """

    decoder: VAE | TinyVAE
    encoder: VAE | None

    def encode(self, video: jax.Array) -> jax.Array:
        """Video [B, 1 + t k, H, W, 3] in −1..1 → latents [B, 1 + k, h, w, C]; t = 4 for Wan2.1."""
        return encode_clip(self.encoder, video)

    def decode_start(self, batch: int, height: int, width: int) -> FeatureCache:
        """The feature cache before the first latents, of height × width each."""
        if self._tiling:
            return tiled_decoder_cache(self.decoder, batch, height, width, **self._tiling)
        return decoder_cache(self.decoder, batch, height, width)

    def decode(self, latents: jax.Array, cache: FeatureCache, first: bool) -> tuple[jax.Array, FeatureCache]:
        """Latents [B, F, h, w, C] → video [B, 1 + t (F − 1) if first, else t F, H, W, 3], unclipped, and the cache."""
        if self._tiling:
            return tiled_decode(self.decoder, latents, cache, first, **self._tiling)
        return decode(self.decoder, latents, cache, first)

    @property
    def _tiling(self) -> dict[str, int]:
        tile = self.decoder.config.tile
        return {"tile": tile, "overlap": tile // 4} if tile else {}
