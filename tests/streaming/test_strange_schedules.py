"""Schedules as people and strangers write them: read as meant, or refused in one line; nothing else."""

import codecs
import dataclasses
import json
import math
import random

import pytest

from adastate_jax.errors import UserError, one_line
from adastate_jax.streaming.cues import Cue, parse_schedule, read_schedule
from adastate_jax.streaming.names import TRANSITIONS

WELL_FORMED = 200
MUTATIONS = 400
WORDS = (
    "a red fox",
    "schnee fällt",
    "雪が降る",
    "a | b",
    "# not a comment",
    '"quoted" \\ text',
    "10 | switch",
    "🦊 runs",
)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le with its mark")
STRANGE = ["1e308", "-1e308", "1e-320", "NaN", "Infinity", "-0.0", "9" * 400, "9" * 5000, "0x10", "1_0", "٣", "true"]
STRANGE += [
    "null",
    "[]",
    "{}",
    '"\\ud800"',
    "[" * 100_000,
    '{"a":' * 10_000,
    "\0",
    "\x1b[31m",
    "\u2028",
    "|",
    "\ufeff",
    "inf",
]


def random_cues(rng: random.Random) -> tuple[Cue, ...]:
    seconds = [0.0, *sorted({round(rng.uniform(0.1, 500.0), rng.randrange(4)) for _ in range(rng.randrange(5))})]
    return tuple(
        Cue(second, rng.choice(WORDS), rng.choice(TRANSITIONS), rng.choice((1, 4, 6, 10**6))) for second in seconds
    )


def as_lines(cues, rng: random.Random) -> str:
    lines = ["# a story", ""] * rng.randrange(2)
    for cue in cues:
        gap = rng.choice([" ", "\t", "   "])
        transition = f"{cue.transition}:{cue.chunks}" if rng.random() < 0.8 or cue.chunks != 4 else cue.transition
        lines.append(f"{gap * rng.randrange(2)}{cue.second}{gap}{transition}{gap}|{gap}{cue.prompt}{gap}")
    return rng.choice(["\n", "\r\n", "\r"]).join(lines) + rng.choice(["", "\n"])


def as_json(cues, rng: random.Random) -> str:
    entries = [dataclasses.asdict(cue) for cue in cues]
    return rng.choice(["", "\n", "  "]) + json.dumps(
        entries, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5
    )


def encoded(text: str, encoding: str) -> bytes:
    return codecs.BOM_UTF16_LE + text.encode("utf-16-le") if "mark" in encoding else text.encode(encoding)


def test_schedules_of_every_editor_are_read(tmp_path):
    rng, file = random.Random(0), tmp_path / "story"
    for _ in range(WELL_FORMED):
        cues = random_cues(rng)
        text, encoding = rng.choice((as_lines, as_json))(cues, rng), rng.choice(ENCODINGS)
        file.write_bytes(encoded(text, encoding))
        assert read_schedule(file) == cues, (text, encoding)


def mutated(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content) + 1)
    kind = rng.randrange(6)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
    if kind == 2:
        return content[:place] + rng.choice(STRANGE).encode("utf-8", "surrogatepass") + content[place:]
    if kind == 3:
        return content[place:] + content[:place]
    # Most often where a number stands.
    digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    place = rng.choice(digits) if digits else 0
    return content[:place] + rng.choice(STRANGE).encode("utf-8", "surrogatepass") + content[place + 1 :]


def test_a_strange_schedule_is_refused_in_one_line_or_makes_sense(tmp_path):
    rng, file, refused = random.Random(1), tmp_path / "story", 0
    for number in range(MUTATIONS):
        content = rng.choice((as_lines, as_json))(random_cues(rng), rng).encode()
        for _ in range(rng.randrange(1, 4)):
            content = mutated(content, rng)
        file.write_bytes(content)
        try:
            cues = read_schedule(file)
        except UserError as error:
            message = str(error)
        else:
            assert cues[0].second == 0, number
            assert all(math.isfinite(cue.second) and 1 <= cue.chunks <= 10**6 for cue in cues), number
            assert sorted({cue.second for cue in cues}) == [cue.second for cue in cues], number
            assert all(cue.prompt.strip() and cue.prompt.encode() for cue in cues), number
            assert {cue.transition for cue in cues} <= set(TRANSITIONS), number
            continue
        refused += 1
        assert message.startswith(str(file)), message
        assert len(one_line(message)) < 500, message
    assert MUTATIONS // 2 < refused < MUTATIONS


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0 | a\n1e308 | b", "entry 2 has second 1e+308; give a number below 1,000,000,000"),
        ("0 | a\n1 blend:" + "9" * 5000 + " | b", "entry 2 blends over '999"),
        ("0 | a\n1 blend:1000001 | b", "entry 2 blends over 1000001 chunks; give 1 to 1,000,000"),
        ('[{"second": 0, "prompt": "a"}, {"second": NaN, "prompt": "b"}]', "entry 2 has second nan"),
        ('[{"second": ' + "9" * 5000 + "}]", "is not JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ('[{"second": 0, "second": 1, "prompt": "a"}]', "is not JSON (it names 'second' twice in one object)"),
        ('{"second": 0, "prompt": "a"}', "must be a list of entries"),
        ('[{"second": 0, "prompt": "a \\ud800"}]', "entry 1 has a prompt with half a character"),
    ],
)
def test_absurd_values_are_named(text, complaint):
    with pytest.raises(UserError) as error:
        parse_schedule(text, "file")
    assert str(error.value).startswith(f"file: {complaint}")
    assert len(str(error.value)) < 300
