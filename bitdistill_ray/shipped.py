"""The YAML files inside the package: recipes, tables, tasks."""

from __future__ import annotations

from importlib import resources


def shipped(folder: str) -> tuple[str, ...]:
    """Names of what `folder` of the package holds."""
    files = (resources.files("bitdistill_ray") / folder).iterdir()
    return tuple(sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml")))


def read_shipped(folder: str, name: str) -> str:
    """The text of one of them."""
    return (resources.files("bitdistill_ray") / folder / f"{name}.yaml").read_text(encoding="utf-8")
