"""Streaming video generation with an adaptive state, in JAX.

>>> import adastate_jax as ada
>>> model = ada.load(config="configs/tiny.py", random_weights=True)  # or ada.load("runs/tiny"), a trained one
>>> for frames in ada.stream(model, "a camera pans left", seconds=0.25):
...     print(frames.dtype, frames.shape)
uint8 (3, 32, 32, 3)
uint8 (1, 32, 32, 3)
"""

import importlib

TYPE_CHECKING = False  # true to type checkers; `typing` itself is slow to import
if TYPE_CHECKING:
    from adastate_jax.errors import UserError
    from adastate_jax.generation.loading import Model, load, make_sampler
    from adastate_jax.generation.saved_streams import load_stream, save_stream
    from adastate_jax.generation.video_stream import stream
    from adastate_jax.streaming.cues import Cue

__version__ = "0.1.0"

__all__ = ["Cue", "Model", "UserError", "load", "load_stream", "make_sampler", "save_stream", "stream"]

# Imported when they are first asked for: every command imports this package first, and JAX takes seconds, in which a
# wrong argument would go without an answer and a signal would not be caught.
_HOMES = {
    "Cue": "streaming.cues",
    "Model": "generation.loading",
    "UserError": "errors",
    "load": "generation.loading",
    "load_stream": "generation.saved_streams",
    "make_sampler": "generation.loading",
    "save_stream": "generation.saved_streams",
    "stream": "generation.video_stream",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
