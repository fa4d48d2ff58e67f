"""A table of comparisons as it is written down: which recipe, what every row sets, what each row sets by itself."""

from __future__ import annotations

from importlib import resources
from typing import Annotated

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from bitdistill_ray.errors import ConfigError
from bitdistill_ray.section import Strict
from bitdistill_ray.storage import Storage

Overrides = tuple[str, ...]


class RowConfig(Strict):
    """One row; a list is short for its `set`."""

    set: Overrides = ()
    """`key=value` overrides of this row; `{run}` in them is the table's folder."""
    branch: str | None = None
    """The row whose finished stages this one takes over."""
    after: str | None = None
    """The row that must be finished before, since this one reads what it made (`model.student={run}/ROW/…`)."""
    recipe: str | None = None
    """In place of the table's."""

    @property
    def waits_for(self) -> tuple[str, ...]:
        """The rows that come before this one."""
        return tuple(row for row in (self.branch, self.after) if row is not None)


def _row(value: object) -> object:
    return {"set": value} if isinstance(value, list) else value or {}


def _names(rows: dict[str, RowConfig]) -> dict[str, RowConfig]:
    for name in rows:
        if not name or "/" in name or name in (".", "..", "logs"):
            raise ConfigError(f"rows.{name}", "cannot be a folder's name here", "Name the row otherwise")
    return rows


class TableConfig(Strict):
    """The whole table."""

    recipe: str
    run: str
    """Folder or `s3://…` that holds every row's run."""
    set: Overrides = ()
    """`key=value` overrides of every row."""
    rows: Annotated[dict[str, Annotated[RowConfig, BeforeValidator(_row)]], AfterValidator(_names)] = Field(
        min_length=1
    )


def shipped_tables() -> tuple[str, ...]:
    """Names of the tables inside the package."""
    folder = resources.files("bitdistill_ray") / "tables"
    return tuple(sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")))


def load_table(table: str) -> TableConfig:
    """Read a shipped table, or one at a path.

    Raises:
        ConfigError: there is none, or it is no table.
    """
    if table in shipped_tables():
        text = (resources.files("bitdistill_ray") / "tables" / f"{table}.yaml").read_text(encoding="utf-8")
    elif table.endswith((".yaml", ".yml")):
        folder, _, name = table.rpartition("/")
        text = Storage(folder or ".").read_bytes(name).decode()
    else:
        raise ConfigError("table", f"there is none called {table!r}",
                          f"Shipped: {', '.join(shipped_tables())}; or give a .yaml path")  # fmt: skip
    try:
        return TableConfig.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(table, f"not YAML: {' '.join(str(error).split())}", "Mend the file") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or table
        raise ConfigError(where, f"{first['input']!r}: {first['msg']}", "See `bitdistill sweep --help`") from None
