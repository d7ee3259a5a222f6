"""Streaming video generation with an adaptive state, in JAX.

>>> import adastate_jax as ada                                          # doctest: +SKIP
>>> model = ada.load("runs/tiny")                                       # doctest: +SKIP
>>> for frames in ada.stream(model, "a camera pans left", seconds=30):  # doctest: +SKIP
...     ...                                                             # uint8 [F, H, W, 3]
"""

from adastate_jax.errors import UserError
from adastate_jax.generate import Model, load, make_sampler, stream

__all__ = ["Model", "UserError", "load", "make_sampler", "stream"]
