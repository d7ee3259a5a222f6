"""Which arms are trained: a screening with one seed, and the rule by which others follow. Written before the runs."""

from collections.abc import Mapping

from studies.changing_world import STARTS

_CAUSAL = STARTS[:3]  # initialised in full
_ANCHORS = ("none", "none_long", "static", "ema", "memory", "ping_pong", "adaptive")

# Every anchor and every gradient across chunks, from every start; then, from the starts that know a state, gradients
# through it over 1, 2 and 4 chunks, longer rollouts, and starts through the recurrence of a tenth of the cost.
SCREENING = (
    *(f"{start}/{anchor}" for start in _CAUSAL for anchor in _ANCHORS),
    *(f"{start}/adaptive/{gradient}" for start in _CAUSAL for gradient in ("window", "straight_through")),
    *(f"{start}/adaptive/state_{chunks}" for start in ("anchored", "recurrent") for chunks in (1, 2, 4)),
    *(f"{start}/adaptive/rollout_{length}" for start in ("anchored", "recurrent") for length in (2, 4)),
    *("recurrent/static/rollout_4", "recurrent/adaptive/state_2/rollout_4"),
    *(f"{start}/{arm}" for start in STARTS[3:] for arm in ("adaptive", "adaptive/state_2")),
)

# What the paper compares, from the start that it takes: these decide claims, whatever the screening says of them.
CLAIMED = ("anchored/none", "anchored/static", "anchored/adaptive")
LEAST = {"pan": 0.8, "hue": 0.8}  # of the truth at 6×; who moves less has lost the scene
MOST_COLLAPSE = 0.2  # of the truth's brightness, saturation or contrast at 1×


def is_adaptive(arm: str) -> bool:
    """Whether the arm has a hidden state."""
    return arm.split("/")[1] == "adaptive"


def kept(memory: Mapping[str, float], motion: Mapping[str, Mapping[str, float]]) -> tuple[str, ...]:
    """The arms that are trained with all seeds, given what the screening found.

    The arms of `CLAIMED`; and of those that neither collapsed nor stand still, the one that remembers best of each of
    three kinds: with a state, with another anchor, and without any (the long window). Who remembers best is who most
    often shows a ball that comes back between 2.5 and 6 training lengths as it was seen last, chance taken off.

    Args:
        memory: by arm, what decides; NaN where no ball came back.
        motion: by arm, `pan` and `hue` at 6×, and `brightness`, `saturation` and `contrast` at 1×, of the truth.
    """
    alive = [arm for arm in SCREENING if arm in memory and memory[arm] == memory[arm] and _is_sound(motion[arm])]
    kinds = {
        "state": [arm for arm in alive if is_adaptive(arm)],
        "anchor": [arm for arm in alive if not is_adaptive(arm) and not arm.split("/")[1].startswith("none")],
        "none": [arm for arm in alive if arm.split("/")[1].startswith("none")],
    }
    best = [max(arms, key=memory.__getitem__) for arms in kinds.values() if arms]
    return tuple(dict.fromkeys([*CLAIMED, *best]))


def _is_sound(of_truth: Mapping[str, float]) -> bool:
    moves = all(of_truth[name] >= least for name, least in LEAST.items())
    return moves and all(abs(of_truth[x] - 1) <= MOST_COLLAPSE for x in ("brightness", "saturation", "contrast"))


def longer(final: tuple[str, ...]) -> tuple[str, ...]:
    """What is trained longer, with one seed, of the arms that are `kept`.

    With 1,000 updates of the student the paper's static and adaptive anchor, and the best recipe with a state; with
    3,000 the paper's adaptive one, of which a claim is.
    """
    best = [arm for arm in final if is_adaptive(arm)][-1]
    thousand = dict.fromkeys(f"{arm}/updates_1000" for arm in (CLAIMED[1], CLAIMED[2], best))
    return (*thousand, f"{CLAIMED[2]}/updates_3000")


def shorter(arm: str) -> str | None:
    """The arm that one which is trained longer goes on from: the same with fewer updates."""
    name, _, updates = arm.rpartition("/")
    return {"updates_1000": name, "updates_3000": f"{name}/updates_1000"}.get(updates)
