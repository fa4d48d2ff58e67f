"""Tasks in the configuration: those that ship, by name, and what labels are called.

A shipped task (`tasks/NAME.yaml`) says how a row becomes a prompt and its answer, and where the hub has its rows.  The
sections that read or measure a task take those keys by `task: NAME`, beneath what they say themselves; its name alone
stands for all of it.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from bitdistill_ray.errors import ConfigError
from bitdistill_ray.shipped import read_shipped, read_yaml, shipped

TASKS = "tasks"  # folder of the package


def with_task(value: Any, *, split: Literal["train", "test"]) -> Any:
    """A section with the keys of the task that it names; other values come back as they are.

    Raises:
        ConfigError: no task of that name ships.
    """
    section = {"task": value} if isinstance(value, str) else value
    if not isinstance(section, dict) or not isinstance(section.get("task"), str):
        return value
    name, own = section["task"], {key: own for key, own in section.items() if key != "task"}
    if name not in shipped(TASKS):
        near = difflib.get_close_matches(name, shipped(TASKS), 1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Shipped: {', '.join(shipped(TASKS))}; or give a template"
        raise ConfigError("task", f"there is none called {name!r}", hint)
    task: dict[str, Any] = read_yaml(read_shipped(TASKS, name))
    path = {"train": task.pop("train"), "test": task.pop("test")}[split]
    return {"name": name, "path": path, **task, **own}


def _words(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return dict(zip(map(str, range(len(value))), value, strict=True))
    return {str(key): words for key, words in value.items()} if isinstance(value, dict) else value


Labels = Annotated[dict[str, str], BeforeValidator(_words)]
"""The words of each value of the label column; a list has those of 0, 1, …"""
