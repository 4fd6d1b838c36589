"""The docstring below a dataclass's field becomes its description in pydantic's JSON schema.

pydantic's own `use_attribute_docstrings` parses the source anew for every class and every use of it, which took more
than half of the time of deploying and of starting a flow. Here each file is parsed once.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field


@cache
def _docstrings(file: str) -> dict[str, dict[str, str]]:
    """Class -> field -> docstring, of the classes at the top of a file."""
    found: dict[str, dict[str, str]] = {}
    for kind in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if isinstance(kind, ast.ClassDef):
            texts = found[kind.name] = {}
            for node, after in zip(kind.body, kind.body[1:], strict=False):
                text = (
                    after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
                )
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(text, str):
                    texts[node.target.id] = " ".join(text.split())
    return found


def described[T](kind: type[T]) -> type[T]:
    """Class decorator, above `@dataclass`."""
    texts = _docstrings(inspect.getfile(kind))[kind.__name__]
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in texts:
            described_type: Any = Annotated[field.type, Field(description=texts[field.name])]  # type: ignore[valid-type]
            field.type = described_type
    return kind
