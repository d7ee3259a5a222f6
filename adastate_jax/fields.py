"""Dataclasses from mappings and back: how a configuration is read from a file, a header or a command line.

What is unknown, of a wrong type or out of range is refused by name.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from adastate_jax.errors import UserError, shown

# The largest integer of a field: all below are exact in JSON wherever it is read, and their products stay printable.
_MAX_INTEGER = 1 << 53


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
        raise UserError(f"{where}: must be a group of fields, got {shown(values)}")
    for name in values:
        if not isinstance(name, str):
            raise UserError(f"{where}: a field's name must be a word, got {shown(name)}")
    if issubclass(kind, Named):
        make, settings = _named_fields(kind, dict(values), where)
    else:
        make, settings = kind, fields_of(kind, values, where)
        _refuse_missing(kind, settings, where)
    try:
        return make(**settings)
    except (ValueError, ArithmeticError, UserError) as error:
        raise UserError(f"{where}: {error}") from None


def fields_of(kind: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Some fields of the dataclass `kind`, each of its type; raises UserError as `build` does, but for their ranges."""
    types_ = typing.get_type_hints(kind)
    refuse_unknown(values, [field.name for field in dataclasses.fields(kind)], where)
    return {name: _convert(types_[name], value, f"{where}.{name}") for name, value in values.items()}


def _refuse_missing(kind: type, settings: Mapping[str, Any], where: str) -> None:
    missing = dataclasses.MISSING
    for field in dataclasses.fields(kind):
        if field.name not in settings and field.default is missing and field.default_factory is missing:
            raise UserError(f"{where}.{field.name}: is missing")


def _named_fields(
    kind: type[Named], settings: dict[str, Any], where: str
) -> tuple[Callable[..., Named], dict[str, Any]]:
    """What makes one of several kinds, and its settings, each of its type."""
    name = settings.pop("name", kind.default_kind)
    if not isinstance(name, str):
        raise UserError(f"{where}.name: must be of type str, got {shown(name)}")
    types_ = typing.get_type_hints(kind.kinds()[name]) if name in kind.kinds() else {}
    for field in types_.keys() & settings.keys():
        settings[field] = _convert(types_[field], settings[field], f"{where}.{field}")
    return functools.partial(kind.from_settings, name), settings


def refuse_unknown(values: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raises UserError for the first of the values that is none of the known ones, with the nearest of them."""
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name[:80], known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise UserError(f"{where}.{name[:80]}: unknown field{hint}")


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where)
    if typing.get_origin(kind) in (tuple, types.GenericAlias):
        if not isinstance(value, (tuple, list)):
            raise UserError(f"{where}: must be a list, got {shown(value)}")
        inner = typing.get_args(kind)
        if inner[-1] is Ellipsis:
            return tuple(_convert(inner[0], x, where) for x in value)
        if len(value) != len(inner):
            raise UserError(f"{where}: must have {len(inner)} entries, got {shown(value)}")
        return tuple(_convert(k, x, where) for k, x in zip(inner, value, strict=True))
    if type(value) is int and abs(value) > _MAX_INTEGER:
        raise UserError(f"{where}: {shown(value)} is beyond ±{_MAX_INTEGER}")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{where}: must be of type {kind.__name__}, got {shown(value)}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{where}: must be a finite number, got {value}")
    return value
