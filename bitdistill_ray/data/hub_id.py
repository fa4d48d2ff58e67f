"""The name of a Hugging Face data set in a path: `hub:ORG/NAME[:CONFIG[:SPLIT[:COLUMN]]]`."""

from __future__ import annotations

from dataclasses import dataclass

from bitdistill_ray.errors import ConfigError

PREFIX = "hub:"


@dataclass(frozen=True, slots=True)
class HubId:
    """A data set, and which part of it.

    Where a part is empty: the only config or `default`, the split `train`, the source's text column.
    """

    name: str
    config: str = ""
    split: str = ""
    column: str = ""

    @classmethod
    def parse(cls, path: str) -> HubId | None:
        """None for a path that is no `hub:` one; ConfigError for one that cannot be read."""
        if not path.startswith(PREFIX):
            return None
        parts = path[len(PREFIX) :].split(":")
        organisation, _, name = parts[0].partition("/")
        if not (organisation and name) or "/" in name or len(parts) > 4:
            raise ConfigError(f"data: {path}", "not a data set's name", "Write hub:ORG/NAME[:CONFIG[:SPLIT[:COLUMN]]]")
        return cls(*parts)
