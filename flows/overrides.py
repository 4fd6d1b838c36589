"""`key=value` on the command line: to a field of `PipelineConfig`, or to the trainer's own config."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, is_dataclass
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from wan_core.config import PipelineConfig, Size, check
from wan_core.trainer_keys import check_trainer_key, sections


def pipeline_keys(kind: type = PipelineConfig, prefix: str = "") -> dict[str, Any]:
    """Every key of the config, dotted -> its type. `train` is left out: its keys are the trainer's."""
    keys: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for field in fields(kind):
        hint = hints[field.name]
        if is_dataclass(hint) and hint is not Size:
            if prefix or field.name != "train":
                keys |= pipeline_keys(hint, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            keys[prefix + field.name] = hint
    return keys


def described_keys(config: PipelineConfig) -> Iterator[tuple[str, str, str]]:
    """Key, value as YAML, and description of every field of ours."""
    for key in pipeline_keys():
        *path, last = key.split(".")
        owner: Any = config
        for part in path:
            owner = getattr(owner, part)
        value = getattr(owner, last)
        properties = TypeAdapter(type(owner)).json_schema()["properties"]
        if isinstance(value, Size) or (isinstance(value, tuple) and value and isinstance(value[0], Size)):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        else:
            text = json.dumps(value, ensure_ascii=False)
        yield key, text, properties[last]["description"]


def nearest(word: str, known: Iterable[str]) -> str:
    """` did you mean ...?` or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _value(key: str, hint: Any, text: str) -> Any:
    """A value of the command line as the field's type wants it; pydantic checks the rest."""
    try:
        value = yaml.safe_load(text) if text.strip() else ""
    except yaml.YAMLError as error:
        raise ValueError(f"{key}={text} is not YAML: {str(error).splitlines()[0]}") from error
    several = get_args(hint)[:1] in ((Size,), (str,)) and get_args(hint)[-1] is ...
    if hint is str:
        return text
    if several and not isinstance(value, list):
        value = text.split(",") if get_args(hint)[0] is Size else [text]
    if get_args(hint) == (int, ...) and not isinstance(value, list):
        return [part.strip() for part in text.split(",")]
    if hint is Size:
        return asdict(Size.parse(str(value)))
    if several and get_args(hint)[0] is Size:
        return [asdict(Size.parse(str(item).strip())) for item in value]
    return value


def sentence(error: ValidationError) -> str:
    """A pydantic error in one line: where, what, which value."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}={first['input']!r}: {message[0].lower()}{message[1:]}"


def apply_overrides(config: PipelineConfig, overrides: Iterable[str]) -> PipelineConfig:
    """The config with `key=value` texts applied, validated as a whole.

    Raises:
        ValueError: no `=`, an unknown key, or a value that cannot work.
    """
    keys, values, for_trainer = pipeline_keys(), asdict(config), list(config.train.overrides)
    known = [*keys, *(section + "." for section in sections())]
    for text in overrides:
        key, equals, value = text.partition("=")
        check(bool(equals), f"{text!r} is not key=value; write for example encode.max_frames=81")
        section = key.partition(".")[0]
        if key in keys:
            *path, last = key.split(".")
            place = values
            for part in path:
                place = place[part]
            place[last] = _value(key, keys[key], value)
        elif section in sections() and "." in key:
            check_trainer_key(key)
            for_trainer.append(text)
        else:
            ours = [name for name in keys if name.startswith(section + ".")]
            raise ValueError(f"{key} is no key of the config{nearest(key, ours or known) or nearest(section, known)}")
    values["train"]["overrides"] = tuple(for_trainer)
    try:
        return TypeAdapter(PipelineConfig).validate_python(values)
    except ValidationError as error:
        raise ValueError(sentence(error)) from error
