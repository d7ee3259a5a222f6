"""Mutated configurations: refused with one line that names the field, or built as they say; nothing else."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from mutations import HOSTILE_VALUES, damaged_json, damaged_value, nested, tried

from adastate_jax.config.files import load_config, parse_config
from adastate_jax.config.run import Config
from adastate_jax.errors import UserError
from adastate_jax.fields import build, one_of, to_dict

CONFIGS = Path(__file__).parents[1] / "configs"
COUNTS = {"values": 200, "files": 200, "flags": 120}


def test_there_are_enough():
    assert sum(COUNTS.values()) >= 500


def leaves(config, path=()):
    """Paths of all fields of a configuration, groups included."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield (*path, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, (*path, field.name))


PATHS = sorted(set(leaves(Config())))


def plain(value):
    """As JSON has it: lists for tuples."""
    return json.loads(json.dumps(value))


def assert_built_as_said(config, values):
    """A configuration that was accepted is the one that was asked for, and stays so when it is written and read."""
    again = to_dict(config)
    assert build(Config, again, "again") == config
    for path in PATHS:
        said = values
        for name in path:
            said = said.get(name) if isinstance(said, dict) else None
        if said is None or isinstance(said, dict):
            continue
        found = config
        for name in path:
            found = getattr(found, name, None)
        assert plain(found) == said or found is None, path
    height, width, channels = config.latent_shape
    assert height * width * channels > 0
    assert config.time_factor >= 1
    sigmas = config.stream.sigmas
    assert all(0 < sigma <= 1 for sigma in sigmas)
    assert all(np.diff(sigmas) < 0)


def test_values():
    rng = np.random.default_rng(0)
    good = plain(to_dict(Config()))
    refused = 0
    for _ in range(COUNTS["values"]):
        values = damaged_value(good, rng)
        config, line = tried(lambda values=values: build(Config, values, "config"))
        if line is None:
            assert_built_as_said(config, values)
        else:
            assert line.startswith("config")
        refused += line is not None
    assert refused > COUNTS["values"] // 3


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_every_field_with_every_value(path):
    """Not drawn: each field of the configuration in turn with each value that no field should have."""
    for value in (*HOSTILE_VALUES, nested(100_000), nested(900, dict)):
        values = value
        for name in reversed(path):
            values = {name: values}
        config, line = tried(lambda values=values: build(Config, values, "config"))
        if line is None:
            assert_built_as_said(config, values)
        else:
            assert line.startswith("config")


def test_files(tmp_path):
    rng = np.random.default_rng(1)
    path = tmp_path / "config.json"
    good = json.dumps(to_dict(Config()))
    refused = 0
    for _ in range(COUNTS["files"]):
        content = damaged_json(good, rng)
        path.write_bytes(content)
        config, line = tried(lambda: load_config(path))
        if line is None:
            assert_built_as_said(config, json.loads(content))
        else:
            assert line.startswith(str(path))
        refused += line is not None
    assert refused > COUNTS["files"] // 3


def test_flags():
    rng = np.random.default_rng(2)
    texts = [
        "", "0", "-1", "1", "9" * 400, "9" * 5000, "1e400", "nan", "inf", "-inf", "100000000000", "float77", "None",
        "True", "()", "[]", "(1,)", "('x',)", "(" * 5000, "[" * 5000, "((((((((1,),),),),),),),)", "{'a': 1}", "1 + 1",
        "__import__('os').system('false')", "'", '"', "\\", "\x1b[2J", "a\nb", "0x10", "1_000", "é", "\udcff",
    ]  # fmt: skip
    refused = 0
    for _ in range(COUNTS["flags"]):
        path, text = PATHS[rng.integers(len(PATHS))], texts[rng.integers(len(texts))]
        flag = f"--config.{'.'.join(path)}={text}"
        config, line = tried(lambda flag=flag: parse_config([f"--config={CONFIGS / 'tiny.py'}", flag]))
        assert line is not None or build(Config, to_dict(config), "again") == config
        refused += line is not None
    assert refused > COUNTS["flags"] // 2


@pytest.mark.parametrize(
    "program",
    [
        "", "x", "get_config = 3", "def get_config(): pass", "def get_config(): return {}", "def get_config(): 1 / 0",
        "raise KeyError", "raise Exception", "assert False", "import nowhere", "def get_config(a, b, c): pass",
        "def get_config(): return get_config()", "\0", "def get_config():\n\treturn\n  x",
        "raise ValueError('\\x1b[2J')",
        "def get_config():\n  import ml_collections\n  return ml_collections.ConfigDict({1: 2})",
        "def get_config():\n  import ml_collections\n  return ml_collections.ConfigDict({'seed': object()})",
        "raise RuntimeError('a' * 10_000_000)", "x = " + "(" * 300 + ")" * 300,
    ],
)  # fmt: skip
def test_programs_that_are_no_configuration(tmp_path, program):
    path = tmp_path / "broken.py"
    path.write_text(program)
    _, line = tried(lambda: parse_config([f"--config={path}"]))
    assert line is not None
    assert line.startswith((f"--config={path}: ", "config"))


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\udcff", "/dev/null", "/proc/self/mem", "", "."])
def test_names_that_no_file_has(name):
    for read in (lambda: parse_config([f"--config={name}"]), lambda: load_config(Path(name))):
        with pytest.raises(UserError):
            read()


def test_a_field_of_several_kinds_says_which():
    @dataclasses.dataclass(frozen=True)
    class Round:
        size: int = 1

    def make(name, **settings):
        if name != "round" or settings.keys() - {"size"}:
            raise ValueError(f"unknown shape {name!r:.40} or setting")
        return Round(**settings)

    @dataclasses.dataclass(frozen=True)
    class Holder:
        shape: object = one_of({"round": Round}, make, "round")

    assert build(Holder, {}, "it") == Holder(Round(1))
    assert build(Holder, {"shape": {"size": 3}}, "it") == Holder(Round(3))
    assert to_dict(Holder(Round(3))) == {"shape": {"name": "round", "size": 3}}
    for value in HOSTILE_VALUES:
        for values in ({"name": value}, {"size": value}, value):
            found, line = tried(lambda values=values: build(Holder, {"shape": values}, "it"))
            assert line is not None or type(found.shape) is Round
