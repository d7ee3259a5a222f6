"""Experiments, a package each: what it trains, what it measures, and its tables. What they share lies beside them."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
