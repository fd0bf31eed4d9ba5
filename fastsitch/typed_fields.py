"""Dataclasses that were made from files: every field has the type that it is declared to have."""

import types
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fastsitch.checked_files import DamagedFile
from fastsitch.errors import plain

T = TypeVar("T")


def typed(instance: T) -> T:
    """The dataclass itself; raises DamagedFile for the first field, also of a dataclass in it, of another type."""
    wrong = _wrong_field(instance)
    if wrong is not None:
        raise DamagedFile(wrong)
    return instance


def _wrong_field(instance: Any) -> str | None:
    hints = get_type_hints(type(instance))
    for field in fields(instance):
        value = getattr(instance, field.name)
        if not _is_of(value, hints[field.name]):
            return f"{field.name} is {plain(repr(value))}"
        wrong = next((found for inner in _dataclasses(value) if (found := _wrong_field(inner)) is not None), None)
        if wrong is not None:
            return wrong
    return None


def _dataclasses(value: Any) -> list[Any]:
    """The dataclasses that a value is, or contains."""
    if is_dataclass(value) and not isinstance(value, type):
        return [value]
    if isinstance(value, Mapping):
        return [inner for each in value.values() for inner in _dataclasses(each)]
    if isinstance(value, list | tuple):
        return [inner for each in value for inner in _dataclasses(each)]
    return []


def _is_of(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_is_of(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
        return len(kinds) == len(value) and all(map(_is_of, value, kinds))
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and _all(value, arguments[0]) and _all(value.values(), arguments[1])
    if origin is not None:
        return isinstance(value, origin) and _all(value, arguments[0])
    # a truth value is a whole number to Python, and a whole number is a number to everybody
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, int | float) if hint is float else isinstance(value, hint or type(None))


def _all(values: Iterable[Any], hint: Any) -> bool:
    return all(_is_of(value, hint) for value in values)
