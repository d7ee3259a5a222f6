"""A picture of what the attention probe found."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from adastate_jax.evaluation.attention_probe import ChunkShares
from adastate_jax.evaluation.plots import as_png, group_colours, new_figure

# What the frames are, told by the shape of their points. Those that are being denoised stand together, at the end.
_MARKERS = {"anchor": "s", "window": "o", "state": "D", "siblings": "*"}
_NAMES = {"siblings": "live (the chunk's other frames together)"}


def attention_shares(streams: Mapping[tuple[str, int], Sequence[ChunkShares]]) -> bytes:
    """Share of a chunk's attention by frame, a panel per anchor and a line per window size and chunk: PNG.

    Args:
        streams: (anchor, window frames) → what was probed; shares are averaged over denoising steps and layers.
    """
    anchors = list(dict.fromkeys(anchor for anchor, _ in streams))
    figure = new_figure(1.5 + 4.5 * len(anchors), 3.9)
    panels = dict(zip(anchors, figure.subplots(1, len(anchors), squeeze=False, sharey=True)[0], strict=True))
    colours = group_colours([str(window) for window in dict.fromkeys(window for _, window in streams)])
    for (anchor, window), chunks in streams.items():
        for number, found in enumerate(chunks):
            shares = found.shares.mean(axis=(0, 1))
            style = {"color": colours[str(window)], "alpha": 1 / (1 + number)}
            label = f"window of {window}" + (f", chunk {found.chunk}" if len(chunks) > 1 else "")
            panels[anchor].plot(np.arange(len(shares) - 1), shares[:-1], label=label, **style)
            for place, (role, share) in enumerate(zip(found.roles, shares, strict=True)):
                panels[anchor].plot(place, share, _MARKERS[role], markersize=8 if role == "siblings" else 5, **style)
    for anchor, axis in panels.items():
        axis.set_title(anchor, fontsize=10, loc="left")
        axis.set_xlabel("position in time")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylim(bottom=0)
        shown = dict.fromkeys(
            role for (name, _), chunks in streams.items() if name == anchor for found in chunks for role in found.roles
        )
        names = [
            Line2D([], [], color="#444444", linestyle="", marker=_MARKERS[role], label=_NAMES.get(role, role))
            for role in shown
        ]
        axis.legend(handles=names, fontsize=7, frameon=False, loc="best")
    figure.axes[0].set_ylabel("share of attention")
    return as_png(figure)
