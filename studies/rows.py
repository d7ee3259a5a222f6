"""Rows of measurements in files: gzipped CSV, the same bytes for the same rows."""

import csv
import gzip
import io
from pathlib import Path

import numpy as np

from adastate_jax.errors import UserError

_TEXT = ("arm", "swap", "part")  # columns that are no numbers


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Writes rows of one set of columns; numbers with a fraction have four digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()})
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    partial.replace(path)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a file of `write_rows`; none if there is no file."""
    if not path.exists():
        return []
    with gzip.open(path, "rt") as file:
        return list(csv.DictReader(file))


def require_rows(path: Path) -> None:
    """Raises UserError if nothing was measured yet."""
    if not path.exists():
        raise UserError(f"{path}: no such file; run `measure` first, or name another --results")


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """Columns of a file of `write_rows`: those of `_TEXT` as they are, else float64; none if there is no file."""
    return columns_of(read_rows(path))


def columns_of(rows: list[dict[str, str]]) -> dict[str, np.ndarray]:
    """Columns of rows, see `read_columns`."""
    columns = {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    return {name: x if name in _TEXT else x.astype(float) for name, x in columns.items()}


def rows_where(columns: dict[str, np.ndarray], **where) -> np.ndarray:
    """Which rows' columns are as told, bool [N]."""
    return np.all([columns[name] == value for name, value in where.items()], axis=0)
