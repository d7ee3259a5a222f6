"""Streaming video generation with an adaptive state, in JAX.

>>> import adastate_jax as ada
>>> model = ada.load(config="configs/tiny.py", random_weights=True)  # or ada.load("runs/tiny"), a trained one
>>> for frames in ada.stream(model, "a camera pans left", seconds=0.25):
...     print(frames.dtype, frames.shape)
uint8 (3, 32, 32, 3)
uint8 (1, 32, 32, 3)
"""

from adastate_jax.errors import UserError
from adastate_jax.generation.loading import Model, load, make_sampler
from adastate_jax.generation.saved_streams import load_stream, save_stream
from adastate_jax.generation.video_stream import stream
from adastate_jax.streaming.prompts import Cue

__all__ = ["Cue", "Model", "UserError", "load", "load_stream", "make_sampler", "save_stream", "stream"]
