"""`key=value` on nested dataclasses: a key that is unknown or a value that does not fit is refused in a sentence."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any

import torch

from wan_core.config import check


def apply_override(container: Any, key: str, value: Any) -> None:
    """Set `section.field` (any depth) to a value that fits the field's type.

    Raises:
        ValueError: the key is unknown (the nearest one is named), or the value does not fit.
    """
    *path, name = key.split(".")
    owners = [container]
    for place, part in enumerate(path):
        _check_key(owners[-1], place, key)
        owners.append(getattr(owners[-1], part))
    _check_key(owners[-1], len(path), key)
    value = _fitting(owners[-1], name, key, value)
    for owner, attribute in zip(reversed(owners), reversed([*path, name]), strict=True):
        if not owner.__dataclass_params__.frozen:
            setattr(owner, attribute, value)
            return
        value = dataclasses.replace(owner, **{attribute: value})  # checks it again


def _check_key(owner: Any, place: int, key: str) -> None:
    """Raise ValueError unless `owner` has the field that stands at a place of a dotted key."""
    parts = key.split(".")
    name, known = parts[place], [f.name for f in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
    if name in known:
        return
    near = difflib.get_close_matches(name, known, 1)
    meant = ".".join([*parts[:place], *near, *parts[place + 1 :]])
    hint = f"did you mean {meant}?" if near else f"choose one of {', '.join(known[:12])} ..."
    raise ValueError(f"unknown key {key!r}: {type(owner).__name__} has no field {name!r}; {hint}")


def _fitting(owner: Any, name: str, key: str, value: Any) -> Any:
    """The value in the field's own type: int to float, list to tuple, "bf16" to torch.bfloat16."""
    current = getattr(owner, name)
    if isinstance(current, torch.dtype) and isinstance(value, str):
        dtype = getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}.get(value, value), None)
        check(isinstance(dtype, torch.dtype), f"{key}={value!r} is not a dtype; write bfloat16 or float32")
        return dtype
    if isinstance(value, list) and isinstance(current, tuple):
        value = tuple(value)
    if isinstance(value, str) and isinstance(current, float):  # YAML reads 1e-4 as text
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{key}={value!r} is not a number; the present value is {current}") from None
    if isinstance(value, int) and isinstance(current, float) and not isinstance(value, bool):
        value = float(value)
    hint = typing.get_type_hints(type(owner)).get(name, Any)
    choices = _choices(hint)
    check(
        not choices or value in choices,
        f"{key}={value!r} is none of {', '.join(map(str, choices))}; the present value is {current!r}",
    )
    plain = _plain_types(hint)
    fits = not plain or (type(value) in plain)
    names = ", ".join(sorted(t.__name__ for t in plain))
    check(
        fits,
        f"{key}={value!r} is {type(value).__name__}, but the field takes {names}; the present value is {current!r}",
    )
    return value


def _plain_types(hint: Any) -> set[type]:
    """The plain types that a field's annotation admits; empty where it names others, too."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [_plain_types(part) for part in typing.get_args(hint)]
        return set().union(*parts) if all(parts) else set()
    return {hint} if hint in (int, float, bool, str, type(None)) else set()


def _choices(hint: Any) -> list[Any]:
    """The values that a field's annotation admits; empty where it is not made of them alone."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [_choices(part) for part in typing.get_args(hint)]
        return [value for part in parts for value in part] if all(parts) else []
    if hint is type(None):
        return [None]
    return list(typing.get_args(hint)) if typing.get_origin(hint) is typing.Literal else []
