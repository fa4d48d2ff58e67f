"""The YAML files inside the package, recipes, tables and tasks; and how YAML is read, theirs and the user's."""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a table reads hundreds of texts; in C it takes a tenth


def shipped(folder: str) -> tuple[str, ...]:
    """Names of what `folder` of the package holds."""
    files = (resources.files("bitdistill_ray") / folder).iterdir()
    return tuple(sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml")))


def read_shipped(folder: str, name: str) -> str:
    """The text of one of them."""
    return (resources.files("bitdistill_ray") / folder / f"{name}.yaml").read_text(encoding="utf-8")


def read_yaml(text: str) -> Any:
    """Plain values only; raises yaml.YAMLError."""
    return yaml.load(text, Loader=_LOADER)
