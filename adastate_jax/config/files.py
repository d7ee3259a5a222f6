"""The configuration from files and command lines, and kept beside what was made with it.

A file under `configs/` starts from `default_config()` and sets fields; `--config.a.b=value` overrides one on the
command line.
"""

import ast
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from adastate_jax.config.run import Config
from adastate_jax.errors import UserError
from adastate_jax.fields import build, refuse_unknown, to_dict
from adastate_jax.files import is_file, what_lies_near, write_text
from adastate_jax.texts import parse_json, read_text


def default_config() -> ml_collections.ConfigDict:
    """Every field with its default, to be changed by a file under `configs/`."""
    return ml_collections.ConfigDict(to_dict(Config()))


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
    """Builds and checks the configuration.

    Raises:
        UserError: a field is unknown, of a wrong type, or out of range; the message names it.
    """
    return build(Config, config.to_dict(), "config")


def parse_config(arguments: Sequence[str]) -> Config:
    """The configuration of `--config=FILE` and the overrides `--config.a.b=value` after it.

    Raises:
        UserError: the file or a field is missing, unknown, or of a wrong type.
    """
    files = [argument for argument in arguments if argument.startswith("--config=")]
    if not files:
        raise UserError("--config is not set; name a file, for example --config=configs/tiny.py")
    if not os.path.isfile(file := files[-1].removeprefix("--config=").partition(":")[0]):
        raise UserError(f"{files[-1]}: no such file{what_lies_near(file)}")
    config = _parse_flags(files[-1:])
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--config."):
            _find_field(config, name)
        elif name.startswith("--") and name != "--config":
            raise UserError(f"{argument}: unknown argument; --help lists what there is")
    return from_config_dict(_parse_flags(arguments))


def _parse_flags(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    # The file is imported under a name of ml_collections'; of one that was before, what this one lacks would remain.
    sys.modules.pop("config_config", None)
    values = flags.FlagValues()
    command_line = ["train", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command_line)
    try:
        rest = values(command_line)[1:]
    except flags.Error as error:
        message = _last_line(str(error)).removeprefix("flag ")
        raise UserError(message if "--config." in message else f"{arguments[0]}: {message}") from None
    # The file is a program of the user's, and values are literals of any depth: what they raise can be anything.
    except Exception as error:
        raise UserError(f"{arguments[0]}: not a configuration file ({_last_line(str(error) or repr(error))})") from None
    if rest:
        raise UserError(f"{rest[0]}: unknown argument; --help lists what there is")
    if not isinstance(values.config, ml_collections.ConfigDict):
        raise UserError(f"{arguments[0]}: get_config must return a ConfigDict, see default_config")
    return values.config


def _find_field(config: ml_collections.ConfigDict, flag: str) -> None:
    group, where = config, "config"
    for name in flag.removeprefix("--config.").split("."):
        if not isinstance(group, Mapping | ml_collections.ConfigDict):
            raise UserError(f"{flag}: {where} is no group of fields")
        refuse_unknown([name], list(group.keys()), f"--{where}")
        group, where = group[name], f"{where}.{name}"


def _last_line(text: str) -> str:
    """What a failure was: a configuration file's comes with a whole traceback, an unknown field's in nested quotes."""
    text = (text.strip().splitlines() or ["no reason given"])[-1]
    while len(text) > 1 and text[0] in ("'", '"') and text[0] == text[-1]:
        try:
            text = " ".join(str(ast.literal_eval(text)).split())
        except (ValueError, SyntaxError):
            break
    return text


def save_config(config: Config, path: Path) -> None:
    """Writes a configuration as JSON, whole or not at all; raises OSError if it cannot be written."""
    write_text(path, json.dumps(to_dict(config), indent=2) + "\n")


def load_config(path: Path) -> Config:
    """Reads a configuration that `save_config` wrote.

    Raises:
        UserError: the file is missing or not a configuration of this version.
    """
    if not is_file(path) and not os.path.isdir(path):  # a folder in its place is named as what it is
        raise UserError(f"{path}: no such file; is this a folder that train or convert wrote?")
    return build(Config, parse_json(read_text(path), str(path)), str(path))
