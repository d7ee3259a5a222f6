"""The socket's messages: what is read, what is refused, what is published."""

import json
import random

import pytest
from serving.mutants import VALID, mutate

from adastate_jax.errors import UserError, one_line
from adastate_jax.serving.asyncapi import asyncapi
from adastate_jax.serving.protocol import MOST_BYTES, OUTGOING, Applied, Pictures, Prompt, Refused, pack, parse, unpack


@pytest.mark.parametrize("text", VALID)
def test_valid_messages_are_read(text):
    assert parse(text).type == json.loads(text)["type"]


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("", "message"),
        ("[]", "message"),
        ('{"type": "prompt"}', "number"),
        ('{"type": "prompt", "number": true, "text": "x"}', "number"),
        ('{"type": "prompt", "number": -1, "text": "x"}', "number"),
        ('{"type": "prompt", "number": 0, "text": "x", "transition": "fade"}', "transition"),
        ('{"type": "prompt", "number": 0, "text": "x", "chunks": 0}', "chunks"),
        ('{"type": "prompt", "number": 0, "text": "x", "path": "/etc/passwd"}', "path"),
        ('{"type": "restart", "number": 0, "anchors": ["a", "b", "c"]}', "anchors"),
        ('{"type": "restart", "number": 0, "picture": "../../x"}', "picture"),
        ('{"type": "restart", "number": 0, "seed": 4294967296}', "seed"),
        ('{"type": "open", "number": 0}', "message"),
        ("[" * 5000, "message"),
        (json.dumps({"type": "ping", "number": 0, "x": "y" * MOST_BYTES}), "message"),
    ],
)
def test_others_are_refused_in_a_line_that_names_the_culprit(text, culprit):
    with pytest.raises(UserError) as error:
        parse(text)
    assert culprit in str(error.value)
    assert one_line(str(error.value)) == str(error.value)


def test_two_thousand_mutants_are_read_or_refused():
    rng, read, refused = random.Random(0), 0, []
    for _ in range(2000):
        try:
            read += parse(mutate(rng)) is not None
        except UserError as error:
            refused.append(str(error))
    assert read > 100
    assert read + len(refused) == 2000
    assert [reason for reason in refused if one_line(reason, 400) != reason] == []


def test_pictures_are_unpacked_as_they_were_packed_and_not_cut_off():
    pictures = Pictures(70_000, 3, 2, 12, (b"", b"abc", b"x" * 70_000))
    message = pack(pictures)
    assert unpack(message) == pictures
    for end in (0, 5, 13, len(message) - 1):
        with pytest.raises(UserError):
            unpack(message[:end])
    with pytest.raises(UserError):
        unpack(message + b"x")


def test_a_prompt_of_half_a_character_is_no_message():
    with pytest.raises(UserError):
        parse('{"type": "prompt", "number": 0, "text": "\\ud800"}')


def test_the_published_document_has_every_message_and_every_field():
    document = asyncapi()
    schemas, messages = document["components"]["schemas"], document["components"]["messages"]
    said = {reference["$ref"].rsplit("/")[-1] for reference in document["operations"]["say"]["messages"]}
    assert said == {"Prompt", "Restart", "Pause", "Resume", "Stop", "Withdraw", "Shown", "Ping"}
    assert {json.loads(text)["type"] for text in VALID} == {name.lower() for name in said}
    for name, message in messages.items():
        if name != "Pictures":
            assert schemas[message["payload"]["$ref"].rsplit("/")[-1]]["properties"]
    assert set(schemas["Prompt"]["properties"]) == set(Prompt.model_fields)
    for answer in (Applied(number=1, chunk=2), Refused(reason="no")):
        assert OUTGOING.validate_json(answer.model_dump_json()) == answer
