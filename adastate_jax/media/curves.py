"""The metrics of a training run, read and drawn."""

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from adastate_jax import files
from adastate_jax.errors import writing


def loss_curves(records: Sequence[Mapping], path: str | Path) -> None:
    """Draws every metric whose name holds `loss` against the step, one panel per stage and metric, as a PNG.

    Raises `UserError` where the file cannot be written.
    """
    from matplotlib.figure import Figure  # here, as it takes long and only a run's end draws

    series: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for record in records:
        for name, value in record.items():
            if "loss" in name:
                series[record["stage"], name].append((record["step"], value))
    figure = Figure((4 * max(len(series), 1), 3))
    axes = figure.subplots(1, max(len(series), 1), squeeze=False)
    for axis, ((stage, name), points) in zip(axes[0], series.items(), strict=False):
        steps, values = np.array(points).T
        width = max(len(values) // 50, 1)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axis.plot(steps, values, alpha=0.25)
        axis.plot(steps[width - 1 :], smooth)
        axis.set(title=f"{stage}: {name}", xlabel="step", yscale="log" if values.min() > 0 else "linear")
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    with writing(path):
        files.write_bytes(path, drawn.getvalue())
