"""A table of comparisons as it is written down: which recipe, what every row sets, what each row sets by itself."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from bitdistill_ray import recipe
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.section import Strict

TABLES = "tables"  # folder of the package
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
    seeds: tuple[int, ...] = ()
    """A run for each, ROW-seedN, in which the task is learned in another order (`seed` of `finetune` and `distill`)."""

    @property
    def before(self) -> tuple[str, ...]:
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
    against: str | None = None
    """The row that means over seeds are compared with; empty: each run's own teacher."""
    rows: Annotated[dict[str, Annotated[RowConfig, BeforeValidator(_row)]], AfterValidator(_names)] = Field(
        min_length=1
    )

    @model_validator(mode="after")
    def _known(self) -> TableConfig:
        if self.against is not None and self.against not in self.rows:
            raise ConfigError("against", f"no row is called {self.against!r}", f"Known: {', '.join(self.rows)}")
        return self


def load_table(name: str) -> TableConfig:
    """Read a shipped table, or one at a path; `like: NAME` takes over another's keys and rows, and adds to its `set`.

    Raises:
        ConfigError: there is none, or it is no table.
    """
    tree = recipe.read_tree(name, folder=TABLES, noun="table")
    if isinstance(like := tree.pop("like", None), str):
        base = recipe.read_tree(like, folder=TABLES, noun="table")
        merged = {"set": [*base.get("set", ()), *tree.get("set", ())], "rows": {**base["rows"], **tree.get("rows", {})}}
        tree = {**base, **tree, **merged}
    try:
        return TableConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or name
        raise ConfigError(where, f"{first['input']!r}: {first['msg']}", "See `bitdistill sweep --help`") from None
