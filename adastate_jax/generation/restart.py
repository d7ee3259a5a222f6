"""Videos of streams that start afresh (CausVid): every rollout is decoded by itself, from a picture on.

The last chunk of a rollout is also the first of the next. Its first latent, which stood for several video frames, there
stands for one: it becomes the image latent of the last of them, the first frame that both rollouts show. From that
frame on, what is shown is the new rollout's decoding. Source: CausVid, arXiv 2412.07772.
"""

from typing import Any

import jax
import jax.numpy as jnp

from adastate_jax.models.wan_codec import WanCodec


def shared_frame(codec: WanCodec, decoder: Any, overlap: jax.Array) -> jax.Array:
    """The first video frame that both rollouts show, [B, 1, height, width, 3] in −1..1.

    Args:
        decoder: the codec's cache behind the latents before the overlap.
        overlap: the old rollout's last latents [B, F, H, W, C].
    """
    frames, _ = codec.decode(overlap[:, :1], decoder, False)
    return jnp.clip(frames[:, -1:], -1.0, 1.0)


def reencode(codec: WanCodec, holder: dict[str, Any], overlap: jax.Array) -> jax.Array:
    """The overlap [B, F, H, W, C] as the new rollout begins with it: its first latent made anew, as a picture's.

    holder: the entry `cache` is the codec's, behind the latents before the overlap.
    """
    return overlap.at[:, :1].set(codec.encode(shared_frame(codec, holder["cache"], overlap)))


def join_rollouts(old: jax.Array, new: jax.Array, time_factor: int) -> jax.Array:
    """The frames of a rollout's last chunk, shown from the new decoding as soon as there is one.

    Args:
        old: the chunk as the old rollout's decoder gives it, [B, t F, height, width, 3].
        new: the overlap as the beginning of a video, [B, 1 + t (F − 1), height, width, 3].
        time_factor: t, video frames per latent.

    Returns:
        [B, t F, height, width, 3]: the old decoding's frames before the shared one, and all of the new one's.
    """
    return jnp.concatenate([old[:, : time_factor - 1], new], axis=1)
