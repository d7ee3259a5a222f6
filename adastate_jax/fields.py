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


_CHOICE = "choice"  # key of a field's metadata


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a field that holds one of several dataclasses is read: a mapping tells which by the entry `name`.

    Attributes:
        kinds: the dataclasses by name.
        make: (name, its settings) → one of them; raises ValueError where a name or setting is unknown or out of range.
        default: the name where the mapping has none.
    """

    kinds: Mapping[str, type]
    make: Callable[..., Any]
    default: str


def one_of(kinds: Mapping[str, type], make: Callable[..., Any], default: str) -> Any:
    """A dataclass field that holds one of several kinds, by default that of the name `default`; see `Choice`."""
    metadata = {_CHOICE: Choice(kinds, make, default)}
    return dataclasses.field(default_factory=kinds[default], metadata=metadata)


def to_dict(config: Any) -> Any:
    """A configuration as plain dicts, lists and numbers, as `build` reads it."""
    if dataclasses.is_dataclass(config):
        return {field.name: _field_to_dict(field, getattr(config, field.name)) for field in dataclasses.fields(config)}
    return tuple(to_dict(x) for x in config) if isinstance(config, tuple) else config


def _field_to_dict(field: dataclasses.Field, value: Any) -> Any:
    if _CHOICE not in field.metadata:
        return to_dict(value)
    name = next(name for name, kind in field.metadata[_CHOICE].kinds.items() if type(value) is kind)
    return {"name": name, **to_dict(value)}


def build(kind: type, values: Any, where: str) -> Any:
    """An instance of the dataclass `kind` from a mapping, field by field.

    Raises:
        UserError: a field is unknown, of a wrong type, or out of range; the message names it, after `where`.
    """
    settings = fields_of(kind, values, where)
    _refuse_missing(kind, settings, where)
    return _made(kind, settings, where)


def _made(make: Callable[..., Any], settings: Mapping[str, Any], where: str) -> Any:
    try:
        return make(**settings)
    except (ValueError, ArithmeticError, UserError) as error:
        raise UserError(f"{where}: {error}") from None


def fields_of(kind: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Some fields of the dataclass `kind`, each of its type; raises UserError as `build` does, but for their ranges."""
    types_, fields = typing.get_type_hints(kind), {field.name: field for field in dataclasses.fields(kind)}
    refuse_unknown(_group(values, where), list(fields), where)

    def converted(name: str) -> Any:
        choice = fields[name].metadata.get(_CHOICE)
        if choice is not None:
            return _chosen(choice, values[name], f"{where}.{name}")
        return _convert(types_[name], values[name], f"{where}.{name}")

    return {name: converted(name) for name in values}


def _group(values: Any, where: str) -> Mapping[str, Any]:
    """The values themselves, if they are named."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: must be a group of fields, got {shown(values)}")
    for name in values:
        if not isinstance(name, str):
            raise UserError(f"{where}: a field's name must be a word, got {shown(name)}")
    return values


def _refuse_missing(kind: type, settings: Mapping[str, Any], where: str) -> None:
    missing = dataclasses.MISSING
    for field in dataclasses.fields(kind):
        if field.name not in settings and field.default is missing and field.default_factory is missing:
            raise UserError(f"{where}.{field.name}: is missing")


def _chosen(choice: Choice, values: Any, where: str) -> Any:
    """One of several kinds; those of its settings that it has are each of its type."""
    settings = dict(_group(values, where))
    name = settings.pop("name", choice.default)
    if not isinstance(name, str):
        raise UserError(f"{where}.name: must be of type str, got {shown(name)}")
    types_ = typing.get_type_hints(choice.kinds[name]) if name in choice.kinds else {}
    for field in types_.keys() & settings.keys():
        settings[field] = _convert(types_[field], settings[field], f"{where}.{field}")
    return _made(functools.partial(choice.make, name), settings, where)


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
