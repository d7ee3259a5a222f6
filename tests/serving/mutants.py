"""Valid messages of the socket, and what becomes of them on bad lines and in bad hands."""

import json
import random

VALID = tuple(
    json.dumps(message)
    for message in (
        {"type": "prompt", "number": 0, "text": "a camera pans left", "transition": "blend", "chunks": 3, "at": 9},
        {"type": "restart", "number": 1, "seed": 7, "anchors": ["static", "adastate"], "picture": "", "text": "x"},
        {"type": "pause", "number": 2},
        {"type": "resume", "number": 3},
        {"type": "stop", "number": 4, "at": 2000000},
        {"type": "withdraw", "number": 5, "target": 0},
        {"type": "shown", "chunk": 12},
        {"type": "ping", "number": 6},
    )
)
_VALUES = (None, True, -1, 2**40, 1e308, "", "x" * 3000, "\x00", "💥", [], {}, [[[]]], {"a": 1}, "../..", "%s%n", "NaN")


def mutate(rng: random.Random) -> str:
    """A mutated message."""
    text = rng.choice(VALID)
    kind = rng.randrange(6)
    if kind < 3:  # a field is another, missing, or one too many
        message = json.loads(text)
        name = rng.choice(list(message))
        if kind == 0:
            message[name] = rng.choice(_VALUES)
        elif kind == 1:
            del message[name]
        else:
            message[rng.choice(("extra", "__class__", "type ", "number"))] = rng.choice(_VALUES)
        return json.dumps(message)
    characters = list(text)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(characters))
        if kind == 3:
            characters[at] = chr(rng.randrange(1, 0x250))
        elif kind == 4:
            del characters[at:]
            break
        else:
            characters[at:at] = rng.choices('{}[]",:\\0123456789eE+-.', k=rng.randrange(1, 30))
    return "".join(characters)
