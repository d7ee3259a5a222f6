"""Pictures and videos in and out: what a stream starts from, what it is written to, panels, contact sheets, curves."""

from adastate_jax.media.clips import read_last_frames
from adastate_jax.media.curves import loss_curves
from adastate_jax.media.metadata import read_metadata
from adastate_jax.media.panels import contact_sheet, enlarge, fitted, side_by_side
from adastate_jax.media.pictures import read_image, write_image
from adastate_jax.media.writers import FPS, VideoWriter, open_writer

__all__ = [
    "FPS",
    "VideoWriter",
    "contact_sheet",
    "enlarge",
    "fitted",
    "loss_curves",
    "open_writer",
    "read_image",
    "read_last_frames",
    "read_metadata",
    "side_by_side",
    "write_image",
]
