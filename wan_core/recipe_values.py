"""What a recipe's file sets, and what the user's file and overrides set over it: known without Megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from wan_core.config import TrainConfig, check

RECIPES = Path(__file__).parent / "conf"
ARCHITECTURE = "architecture"  # the one key of a file that belongs to no section: a size by name


def recipe_path(name: str) -> Path:
    """The YAML of a recipe.

    Raises:
        ValueError: there is no recipe of this name.
    """
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    check(name in known, f"recipe {name!r} does not exist; choose one of {', '.join(known)}, or give --config-file")
    return RECIPES / f"{name}.yaml"


def recipe_values(config: TrainConfig, config_file: Path | None = None) -> list[tuple[str, Any]]:
    """Keys (`section.field`, `architecture`) and values, in the order in which they are set: the last of a key wins.

    Args:
        config_file: the user's own YAML, over the recipe's.

    Raises:
        ValueError: there is no such recipe or file, or a file is not made of sections.
    """
    check(config_file is None or config_file.is_file(), f"--config-file {config_file} does not exist; give a YAML file")
    values: list[tuple[str, Any]] = []
    for path in (recipe_path(config.recipe), config_file):
        sections = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path else {}
        if ARCHITECTURE in sections:
            values.append((ARCHITECTURE, sections.pop(ARCHITECTURE)))
        for section, part in sections.items():
            check(isinstance(part, dict), f"{path}: {section}={part!r} is no section; write fields below it")
        values += [(f"{section}.{key}", value) for section, part in sections.items() for key, value in part.items()]
    for text in config.overrides:
        key, _, value = text.partition("=")
        values.append((key.strip(), yaml.safe_load(value)))
    return values
