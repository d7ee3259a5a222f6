"""Which arms are trained: a screening with one seed, and the rule by which others follow. Written before the runs."""

from collections.abc import Mapping

from studies.changing_world import STARTS, start_of

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
    # Added before any student was measured, as the teacher does not know most windows of the arms above, see `windows`.
    *("anchored/adaptive/aligned_4", "recurrent/adaptive/aligned_4", "recurrent/static/aligned_4"),
    *(f"{start}/{arm}" for start in STARTS[3:] for arm in ("adaptive", "adaptive/state_2")),
)

# What the paper compares, from the start that it takes: these decide claims, whatever the screening says of them.
CLAIMED = {"none": "anchored/none", "static": "anchored/static", "adaptive": "anchored/adaptive"}
LEAST = {"pan": 0.8, "hue": 0.8, "seen": 0.5}  # of the truth at 6×; who has less has lost the scene
MOST_COLLAPSE = 0.2  # of the truth's brightness, saturation or contrast at 1×
_CROSSING = {"window", "straight_through", "state_1", "state_2", "state_4"}  # gradients that cross chunks


def is_adaptive(arm: str) -> bool:
    """Whether the arm has a hidden state."""
    return arm.split("/")[1] == "adaptive"


def kept(memory: Mapping[str, float], shown: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """The arms that are trained with all seeds, given what the screening found, by what they are kept for.

    The arms of `CLAIMED`; and of those that neither collapsed nor lost the scene, the one that remembers best of each
    kind: with a state, with another anchor, and without any (the long window); further, of those whose gradient crosses
    chunks, and what is that one but for its gradient (`stopped`). Who remembers best is who has the highest
    `memory.held` between 2.5 and 6 training lengths.

    Args:
        memory: by arm, what decides; NaN where it is not told.
        shown: by arm, `pan`, `hue` and `seen` at 6×, and `brightness`, `saturation` and `contrast` at 1×, of the truth.
    """
    alive = [arm for arm in SCREENING if arm in memory and memory[arm] == memory[arm] and _is_sound(shown[arm])]
    kinds = {
        "best state": [arm for arm in alive if is_adaptive(arm)],
        "best anchor": [arm for arm in alive if not is_adaptive(arm) and not arm.split("/")[1].startswith("none")],
        "best without": [arm for arm in alive if arm.split("/")[1].startswith("none")],
        "crossing": [arm for arm in alive if _CROSSING & set(arm.split("/"))],
    }
    found = {**CLAIMED, **{kind: max(arms, key=memory.__getitem__) for kind, arms in kinds.items() if arms}}
    if "crossing" in found:
        found["stopped"] = "/".join(part for part in found["crossing"].split("/") if part not in _CROSSING)
    return found


def _is_sound(of_truth: Mapping[str, float]) -> bool:
    moves = all(of_truth[name] >= least for name, least in LEAST.items())
    return moves and all(abs(of_truth[x] - 1) <= MOST_COLLAPSE for x in ("brightness", "saturation", "contrast"))


def longer(roles: Mapping[str, str]) -> tuple[str, ...]:
    """What is trained longer, with one seed, of the arms that are `kept`.

    With 1,000 updates of the student the paper's static and adaptive anchor, and the best recipe with a state; with
    3,000 the paper's adaptive one, of which a claim is.
    """
    thousand = dict.fromkeys(f"{roles[x]}/updates_1000" for x in ("static", "adaptive", "best state") if x in roles)
    return (*thousand, f"{roles['adaptive']}/updates_3000")


def shorter(arm: str) -> str | None:
    """The arm that one which is trained longer goes on from: the same with fewer updates."""
    name, _, updates = arm.rpartition("/")
    return {"updates_1000": name, "updates_3000": f"{name}/updates_1000"}.get(updates)


def needed(arm: str) -> list[str]:
    """What is trained before an arm, each behind what it needs itself."""
    if arm == "teacher":
        return []
    before = ["anchored"] if arm == "anchored_tenth" else []
    return [*before, start_of(arm), *filter(None, [shorter(arm)])]


def recipe(arm: str) -> set[str]:
    """All that is trained for an arm, itself too; but the teacher, which all have."""
    return {arm}.union(*(recipe(x) for x in needed(arm))) - {"teacher"}
