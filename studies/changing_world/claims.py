"""What decides about the paper's claims: for each a number, a bound, and a verdict by rule. Written before the runs.

A number is of one arm, or of one minus another that was trained with the same seed. It says yes of a claim if it is on
the claimed side of the bound with every seed, no if it is with none, and else nothing. An arm that the screening chose
is judged by the seeds that had no part in choosing it. p is of Student's t against the bound, two-sided, corrected for
as many claims as have one (Holm); with two or three seeds hardly any can be small, so that it decides nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from studies.changing_world import HORIZONS, SCREENING_SEED
from studies.changing_world.memory import first_returns, held, mean_memory, until
from studies.rows import rows_where
from studies.statistics import holm, mean_of_told, significance
from studies.tables import cell, head, row

Columns = dict[str, np.ndarray]
MOST_REPLACED = 3  # and more
FOLLOWED = 3  # chunks after a replacement; by then contents should have followed


@dataclasses.dataclass(frozen=True)
class Measured:
    """All rows, by kind; `contents` may be empty."""

    videos: Columns
    back: Columns
    contents: Columns


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim, what decides it, and of which arms, by their role in `plan.kept` or by their name.

    Attributes:
        number: of the measured, an arm and a training seed; NaN where nothing tells.
        bound: beyond which the claim holds: above it, or below it if `below`.
        minus: the arm whose number is taken off.
    """

    claim: str
    says: str
    number: Callable[[Measured, str, int], float]
    bound: float
    arm: str
    minus: str = ""
    below: bool = False


def stale(measured: Measured, arm: str, seed: int) -> float:
    """Of first returns after a replacement, the share in the video's first colour minus that in the one seen last."""
    here = _renewals(measured, arm, seed)
    return float((measured.back["was_first"] - measured.back["was_last"])[here].mean()) if here.any() else float("nan")


def renewed(measured: Measured, arm: str, seed: int) -> float:
    """Memory of the colour seen last, of first returns after a replacement."""
    return mean_memory(measured.back, "last", _renewals(measured, arm, seed))


def _renewals(measured: Measured, arm: str, seed: int) -> np.ndarray:
    return rows_where(measured.back, arm=arm, seed=seed) & first_returns(measured.back, 1, most=1)


def held_until(horizon: float) -> Callable[[Measured, str, int], float]:
    """`memory.held` of balls that come back between the horizon before and this one."""

    def number(measured: Measured, arm: str, seed: int) -> float:
        return held(measured.back, rows_where(measured.back, arm=arm, seed=seed) & until(measured.back, horizon))

    return number


def moves(measured: Measured, arm: str, seed: int) -> float:
    """The smaller of pan and turn of the hue, of the truth's, at the last horizon."""
    return min(_look(measured, arm, seed, name) for name in ("pan", "hue"))


def drift(measured: Measured, arm: str, seed: int) -> float:
    """How far saturation or contrast, whichever is farther, is from the truth's at the last horizon, in parts of it."""
    return max(abs(_look(measured, arm, seed, name) - 1) for name in ("saturation", "contrast"))


def _look(measured: Measured, arm: str, seed: int, name: str) -> float:
    here = rows_where(measured.videos, arm=arm, seed=seed, horizon=HORIZONS[-1], withheld=False)
    return mean_of_told(measured.videos[name][here])


def follows(measured: Measured, arm: str, seed: int) -> float:
    """By how much more often than the replaced colour the new one is read from the anchor, `FOLLOWED` chunks on.

    Less the same of what only knows the caption: where replacements favour a colour, that says the new one more often.
    """
    columns, found = measured.contents, []
    for part in ("anchor", "caption") if columns else ():
        here = rows_where(columns, arm=arm, seed=seed, part=part, since=FOLLOWED)
        if here.any():
            apart = columns["last"][here] - columns["before"][here]
            found.append(np.average(apart, weights=columns["answers"][here]))
    return float(found[0] - found[1]) if len(found) == 2 else float("nan")


CLAIMS = (
    Claim("a static anchor keeps what is stale", "first minus last", stale, 0.2, "static"),
    Claim("an adaptive state is renewed", "memory of renewals", renewed, 0.2, "adaptive", "static"),
    Claim("an adaptive state holds", "held until 20×", held_until(20.0), 0.5, "adaptive"),
    Claim("the best recipe with a state holds", "held until 20×", held_until(20.0), 0.5, "best state"),
    Claim("an adaptive state moves", "pan or hue at 20×", moves, 0.8, "adaptive"),
    Claim("without an anchor, the look drifts", "drift at 20×", drift, 0.1, "none", "adaptive"),
    Claim("no gradient needs to cross chunks", "held until 6×", held_until(6.0), 0.1, "crossing", "stopped", True),
    Claim(
        "200 updates, 600 iterations, are enough",
        *("held until 6×", held_until(6.0), 0.1, "adaptive/updates_1000", "adaptive", True),
    ),
    Claim(
        "1,000 updates are enough",
        *("held until 6×", held_until(6.0), 0.1, "adaptive/updates_3000", "adaptive/updates_1000", True),
    ),
    Claim("the state's content follows the scene", "new minus replaced", follows, 0.1, "adaptive"),
)


def claims_table(measured: Measured, roles: Mapping[str, str]) -> list[str]:
    """A row for each claim of whose arms something is measured: its number with each seed, and the verdict.

    roles: the arm of each role.
    """
    found = [(claim, values) for claim in CLAIMS if (values := _values(measured, claim, roles))]
    judged = [_judged(claim, values) for claim, values in found]
    p = holm(np.array([significance(x - claim.bound) for (claim, _), x in zip(found, judged, strict=True)]))
    seeds = sorted({seed for _, values in found for seed in values})
    lines = [
        "**What decides: a number for each claim, by training seed; in brackets, what had a part in choosing the arm**",
        "",
        *head("claim", "number", "of", *(f"seed {seed}" for seed in seeds), "mean", "holds if", "p", "holds"),
    ]
    for (claim, values), judging, corrected in zip(found, judged, p, strict=True):
        shown = {seed: cell(x, np.nan) for seed, x in values.items()}
        if _is_chosen(claim) and shown.get(SCREENING_SEED):
            shown[SCREENING_SEED] = f"({shown[SCREENING_SEED]})"
        cells = [shown.get(seed, "") for seed in seeds]
        of = " minus ".join(f"`{_arm(name, roles)}`" for name in (claim.arm, claim.minus) if name)
        mean, bound = mean_of_told(judging), f"{'below' if claim.below else 'above'} {claim.bound:g}"
        told = (cell(mean, np.nan), bound, cell(corrected, np.nan), verdict(claim, judging))
        lines.append(row(claim.claim, claim.says, of, *cells, *told))
    return lines


def verdict(claim: Claim, values: np.ndarray) -> str:
    """Whether a claim holds, by its number with each seed [N]."""
    beyond = values < claim.bound if claim.below else values > claim.bound
    if not len(values) or np.isnan(values).any():
        return "not told"
    said = "yes" if beyond.all() else "undecided" if beyond.any() else "no"
    return f"{said}, of one seed" if len(values) == 1 else said


def _values(measured: Measured, claim: Claim, roles: Mapping[str, str]) -> dict[int, float]:
    """The number by training seed, of those that all its arms have."""
    arms = [_arm(name, roles) for name in (claim.arm, claim.minus) if name]
    if None in arms:
        return {}
    trained = [set(measured.videos["seed"][measured.videos["arm"] == arm].astype(int)) for arm in arms]
    numbers = {seed: [claim.number(measured, arm, seed) for arm in arms] for seed in sorted(set.intersection(*trained))}
    return {seed: values[0] - sum(values[1:]) for seed, values in numbers.items()}


def _arm(name: str, roles: Mapping[str, str]) -> str | None:
    """The arm of a role, or of one with a factor behind it; None if the screening left none."""
    role, slash, factor = name.partition("/")
    return f"{roles[role]}{slash}{factor}" if role in roles else None


def _is_chosen(claim: Claim) -> bool:
    return claim.arm in ("best state", "crossing")


def _judged(claim: Claim, values: Mapping[int, float]) -> np.ndarray:
    return np.array([x for seed, x in values.items() if not (_is_chosen(claim) and seed == SCREENING_SEED)])
