"""Dataclasses from mappings and back: how a configuration is read from a file, a header or a command line.

What is unknown, of a wrong type or out of range is refused by name.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adastate_jax.errors import UserError


class Named:
    """A dataclass that is one of several kinds; a mapping tells which by the entry `name`.

    `default_kind`, of a class and no field, is the kind of a mapping without that entry.
    """

    default_kind = ""

    @classmethod
    def kinds(cls) -> Mapping[str, type]:
        """The kinds by name."""
        raise NotImplementedError

    @classmethod
    def from_settings(cls, name: str, **settings: Any) -> "Named":
        """One of the kind `name`; raises ValueError where the name or a setting is unknown or out of range."""
        raise NotImplementedError


def to_dict(config: Any) -> Any:
    """A configuration as plain dicts, lists and numbers, as `build` reads it."""
    if isinstance(config, Named):
        name = next(name for name, kind in config.kinds().items() if type(config) is kind)
        return {"name": name, **dataclasses.asdict(config)}
    if dataclasses.is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    return tuple(to_dict(x) for x in config) if isinstance(config, tuple) else config


def build(kind: type, values: Any, where: str) -> Any:
    """An instance of the dataclass `kind` from a mapping, field by field.

    Raises:
        UserError: a field is unknown, of a wrong type, or out of range; the message names it, after `where`.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: must be a group of fields, got {values!r}")
    try:
        if issubclass(kind, Named):
            settings = dict(values)
            name = str(settings.pop("name", kind.default_kind))
            types_ = typing.get_type_hints(kind.kinds()[name]) if name in kind.kinds() else {}
            for field in types_.keys() & settings.keys():
                settings[field] = _convert(types_[field], settings[field], f"{where}.{field}")
            return kind.from_settings(name, **settings)
        types_ = typing.get_type_hints(kind)
        refuse_unknown(values, [field.name for field in dataclasses.fields(kind)], where)
        return kind(**{name: _convert(types_[name], value, f"{where}.{name}") for name, value in values.items()})
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def refuse_unknown(values: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raises UserError for the first of the values that is none of the known ones, with the nearest of them."""
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise UserError(f"{where}.{name}: unknown field{hint}")


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where)
    if typing.get_origin(kind) in (tuple, types.GenericAlias):
        if not isinstance(value, (tuple, list)):
            raise UserError(f"{where}: must be a list, got {value!r}")
        inner = typing.get_args(kind)
        if inner[-1] is Ellipsis:
            return tuple(_convert(inner[0], x, where) for x in value)
        if len(value) != len(inner):
            raise UserError(f"{where}: must have {len(inner)} entries, got {value!r}")
        return tuple(_convert(k, x, where) for k, x in zip(inner, value, strict=True))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{where}: must be of type {kind.__name__}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{where}: must be a finite number, got {value}")
    return value
