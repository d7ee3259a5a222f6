"""All anchor strategies by name.

Their contract is in `contract.py`. A new strategy needs a file here with its class, and a name below (and in
`streaming/names.py`) if configurations are to name it.
"""

import dataclasses
from typing import Any

from adastate_jax.streaming.anchors.adaptive import AdaptiveAnchor
from adastate_jax.streaming.anchors.averages import EMAAnchor, MemoryAnchor
from adastate_jax.streaming.anchors.contract import NoAnchor
from adastate_jax.streaming.anchors.ping_pong import PingPongAnchor
from adastate_jax.streaming.anchors.restart import RestartAnchor
from adastate_jax.streaming.anchors.static import AbsoluteAnchor, RollingAnchor, StaticAnchor

ANCHORS = {
    "none": NoAnchor,
    "static": StaticAnchor,
    "adaptive": AdaptiveAnchor,
    "absolute": AbsoluteAnchor,
    "ema": EMAAnchor,
    "memory": MemoryAnchor,
    "ping_pong": PingPongAnchor,
    "restart": RestartAnchor,
    "rolling": RollingAnchor,
}


def make_anchor(name: str, frames: int | None = None, **settings: Any) -> NoAnchor:
    """The strategy of this name.

    Args:
        frames: anchor (and, for `adaptive`, state) frames; None is the strategy's own number. A strategy whose number
            does not vary ignores it.
        settings: the strategy's other fields.

    Raises:
        ValueError: unknown name or setting, or no frames for a strategy that needs some.
    """
    if name not in ANCHORS:
        raise ValueError(f"anchor must be one of {', '.join(ANCHORS)}, got {name!r}")
    kind = ANCHORS[name]
    fields = [field.name for field in dataclasses.fields(kind)]
    for setting in settings:
        if setting not in fields:
            raise ValueError(f"anchor {name!r} has no setting {setting!r}; known are {', '.join(fields) or 'none'}")
    if frames is not None and "frames" in fields:
        if frames < 1:
            raise ValueError(f"anchor {name!r} needs at least one frame, got {frames}")
        settings["frames"] = frames
    return kind(**settings)
