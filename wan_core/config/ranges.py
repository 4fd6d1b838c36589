"""Ranges of numbers, declared once beside their type: in the schema of Prefect's form, and in a refusal's sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """Annotation of a number. Prefect's server refuses what lies outside before a run exists; `check_ranges` does
    where there is no form."""

    low: float
    high: float | None = None
    above: bool = False  # the lowest value is not allowed itself
    step: int | None = None

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        json: dict[str, Any] = handler(schema)
        json["exclusiveMinimum" if self.above else "minimum"] = self.low
        return json | ({"maximum": self.high} if self.high else {}) | ({"multipleOf": self.step} if self.step else {})

    def fault(self, value: float) -> str | None:
        if not abs(value) < math.inf:  # nan passes every other comparison
            return "is not a finite number"
        if value < self.low or (self.above and value == self.low):
            return f"is not above {self.low}" if self.above else f"is below {self.low}"
        return f"is above {self.high}" if self.high is not None and value > self.high else None


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
PositiveOrZero = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, high=1)]


@cache
def _ranges(kind: Any) -> dict[str, Range]:
    hints = get_type_hints(kind, include_extras=True)
    return {name: found for name, hint in hints.items() if (found := next(_inside(hint), None))}


def _inside(hint: Any) -> Iterator[Range]:
    """Of a type, of one of its alternatives, or of what a tuple holds."""
    if get_origin(hint) is Annotated:
        yield from (each for each in hint.__metadata__ if isinstance(each, Range))
    for part in get_args(hint):
        yield from _inside(part)


def check_ranges(config: Any) -> None:
    """Of every field of a dataclass that has a range.

    Raises:
        ValueError: names field, value, bound and the field's default.
    """
    defaults = {field.name: field.default for field in fields(config)}
    kind: Any = type(config)
    for name, limits in _ranges(kind).items():
        given = getattr(config, name)
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and (fault := limits.fault(value)):
                default = defaults[name]
                raise ValueError(
                    f"{name}={given} {fault}; {'leave it empty' if default is None else f'choose {default}'}"
                )
