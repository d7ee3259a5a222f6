"""Lines of tables in Markdown."""

import numpy as np


def row(*cells: str) -> str:
    """One line of a table."""
    return "| " + " | ".join(cells) + " |"


def head(*cells: str) -> list[str]:
    """A table's first two lines."""
    return [row(*cells), row(*["---"] * len(cells))]


def cell(mean: float, error: float, low: float = np.nan, high: float = np.nan, signed: bool = False) -> str:
    """A mean with its standard error and interval; what is NaN is left out."""
    if not np.isfinite(mean):
        return ""
    sign = "+" if signed else ""
    text = f"{mean:{sign}.2f}"
    if np.isfinite(error):
        text += f" ± {error:.2f}"
    if np.isfinite(low):
        text += f" [{low:{sign}.2f}, {high:{sign}.2f}]"
    return text
