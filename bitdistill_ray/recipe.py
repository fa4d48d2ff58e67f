"""From a recipe's name, a YAML file and `key=value` overrides to one checked `Config`.

A recipe is a shipped name (`demo`, `bitdistiller-nf3`, …) or a YAML path, local or of any URL that fsspec knows.
Overrides are dotted paths whose values are read as YAML: `stages.distill.tokens=2e6`, `data=s3://bucket/corpus`,
`stages.clip=false`.  Whatever is wrong becomes one `ConfigError` line that names the key, the value and the remedy.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from bitdistill_ray.config import Config
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.shipped import read_shipped, read_yaml, shipped
from bitdistill_ray.stage_config import StageConfig

DEFAULT, RECIPES = "demo", "recipes"


def names() -> tuple[str, ...]:
    """Of the recipes that ship."""
    return shipped(RECIPES)


def load(recipe: str = DEFAULT, overrides: Sequence[str] = ()) -> Config:
    """Read `recipe`, apply `overrides` in order, check everything."""
    tree = read_tree(recipe, folder=RECIPES, noun="recipe")
    for override in overrides:
        _apply(tree, override)
    return check(tree)


def check(tree: dict[str, Any]) -> Config:
    """Validate a plain tree; a finding of pydantic's becomes one line with the nearest known key."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise _one_line(error) from None


def dump(config: Config) -> str:
    """The resolved config as YAML; `load` of it gives the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_tree(name: str, *, folder: str, noun: str) -> dict[str, Any]:
    """The mapping in a YAML file: one that ships in `folder` of the package, by its name, or one at a path or URL.

    Raises:
        ConfigError: there is no such `noun`, or it is no mapping.
    """
    known = shipped(folder)
    if name in known:
        text = read_shipped(folder, name)
    elif name.endswith((".yaml", ".yml")):
        from bitdistill_ray.storage import Storage

        place, _, file = name.rpartition("/")
        text = Storage(place or ".").read_bytes(file).decode()
    else:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Shipped: {', '.join(known)}; or give a .yaml path"
        raise ConfigError(noun, f"there is none called {name!r}", hint)
    try:
        tree = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(name, f"not YAML: {' '.join(str(error).split())}", "Mend the file") from None
    if not isinstance(tree, dict):
        raise ConfigError(name, "not a mapping of keys to values", f"See the shipped {folder} for the form")
    return tree


_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # YAML 1.1 reads 1e-4 as text


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(override, "not an override", "Write KEY=VALUE, such as stages.distill.tokens=2e6")
    try:
        value = float(text) if _EXPONENT.fullmatch(text) else read_yaml(text)
    except yaml.YAMLError:
        raise ConfigError(path, f"{text!r} is not a YAML value", "Quote it") from None
    *parents, leaf = path.split(".")
    node: Any = tree
    for depth, key in enumerate(parents):
        child = node.get(key)
        if isinstance(child, str | list) and key == "data":
            child = {"sources": child}
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise ConfigError(".".join(parents[: depth + 1]), f"{child!r} has no keys of its own", "Set it as a whole")
        node[key] = child
        node = child
    if path == "data" and isinstance(value, str | list):
        value = {"sources": value}  # the shorthand changes the sources, not how they are cut
    if isinstance(node.get(leaf), dict) and isinstance(value, dict):
        node[leaf] = {**node[leaf], **value}
    else:
        node[leaf] = value


def _one_line(error: ValidationError) -> ConfigError:
    found = error.errors()
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])  # explains a missing key beside it
    path = _as_typed(first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _known_keys(path[:-1], error)
        near = difflib.get_close_matches(path[-1], known, 1, cutoff=0.5)
        remedy = f"Did you mean {'.'.join([*path[:-1], near[0]])!r}?" if near else f"Known: {', '.join(known)}"
        return ConfigError(where, f"unknown key (value {first['input']!r}){more}", remedy)
    if first["type"] == "union_tag_invalid":
        kind, kinds = str(first["ctx"]["tag"]), [_kind(s) for s in _sections(StageConfig)]
        near = difflib.get_close_matches(kind, kinds, 1)
        remedy = f"Did you mean {near[0]!r}?" if near else f"Set its kind to one of {', '.join(kinds)}"
        return ConfigError(where, f"there is no stage of kind {kind!r}{more}", remedy)
    what = f"{first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}{more}"
    return ConfigError(where or "recipe", what, "Set a value that fits")


def _as_typed(loc: tuple[int | str, ...]) -> list[str]:
    """pydantic's location without the union tag it puts behind a stage's name, and without field-type markers."""
    path = [str(part) for part in loc if not re.fullmatch(r"(function|tuple|literal|list|dict)-?.*\[.*", str(part))]
    if len(path) > 2 and path[0] == "stages":
        del path[2]
    return path


def _known_keys(parents: list[str], error: ValidationError) -> list[str]:
    """Field names of the section that `parents` leads to."""
    section: type[BaseModel] = Config
    kind = next((str(e["loc"][2]) for e in error.errors() if e["loc"][0] == "stages" and len(e["loc"]) > 2), "")
    for depth, key in enumerate(parents):
        if parents[0] == "stages" and depth == 1:
            section = next(s for s in _sections(Config.model_fields["stages"].annotation) if _kind(s) == kind)
        elif key != "stages" and key in section.model_fields:
            nested = _sections(section.model_fields[key].annotation)
            section = nested[0] if nested else section
    return sorted(section.model_fields)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _sections(argument)]


def _kind(section: type[BaseModel]) -> str:
    return str(section.model_fields["kind"].default) if "kind" in section.model_fields else ""
