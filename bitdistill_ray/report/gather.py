"""Everything that a run's folder says about the run, whole or cut in the middle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bitdistill_ray.config import Config
from bitdistill_ray.errors import BitdistillError
from bitdistill_ray.machine import commit, describe_machine, versions
from bitdistill_ray.recipe import dump
from bitdistill_ray.runs import DONE, ROWS, RunFolder
from bitdistill_ray.storage import Storage

if TYPE_CHECKING:
    from bitdistill_ray.report.weights import Histogram

MACHINE = "machine.json"
TRAINS = ("pretrain", "distill")  # stages whose student is "after", against the one of `refine`


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What the page is made of.  `notes` say what is missing or could not be read."""

    url: str
    config: Config
    recipe: str
    rows: dict[str, list[dict[str, Any]]]
    done: dict[str, dict[str, Any]]
    evaluation: list[dict[str, Any]]
    row_scores: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    histograms: list[Histogram] = field(default_factory=list)
    machine: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The last part of its folder."""
        return self.url.rstrip("/").rpartition("/")[2] or self.url

    @property
    def finished(self) -> bool:
        """True where every stage is."""
        return all(name in self.done for name in self.config.stages)


def record_machine(run: RunFolder) -> None:
    """Write which code the run's driver is, and which machine it is on, for the report."""
    about = {"commit": commit(), "versions": versions(), "machine": describe_machine()}
    run.storage.write_bytes(MACHINE, json.dumps(about, indent=1).encode())


def gather(run: RunFolder, *, weights: bool = True) -> RunFacts:
    """Read a run's folder; without `weights` no model is opened, and no torch imported.

    Raises:
        StorageError: a store that refuses; what is merely not there yet is left out.
    """
    storage, notes = run.storage, list[str]()
    done = {
        name: json.loads(storage.read_bytes(path))
        for name in run.config.stages
        if storage.exists(path := f"stages/{name}/{DONE}")
    }
    missing = [name for name in run.config.stages if name not in done]
    if missing:
        notes.append(
            f"The run is not finished: {', '.join(missing)} {'has' if len(missing) == 1 else 'have'} not ended."
        )
    rows = _rows(storage, notes)
    return RunFacts(
        url=storage.url,
        config=run.config,
        recipe=dump(run.config),
        rows=rows,
        done=done,
        evaluation=_json(storage, "evaluation.json").get("models", []),
        row_scores=_json(storage, ROWS),
        histograms=_histograms(run, done, notes) if weights else [],
        machine=_json(storage, MACHINE),
        notes=tuple(notes),
    )


def _json(storage: Storage, path: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(storage.read_bytes(path)) if storage.exists(path) else {}
    return content


def _rows(storage: Storage, notes: list[str]) -> dict[str, list[dict[str, Any]]]:
    """`metrics.jsonl` by stage; a line that a dying process cut short is counted and left out."""
    lines = (
        storage.read_bytes("metrics.jsonl").decode(errors="replace").splitlines()
        if storage.exists("metrics.jsonl")
        else []
    )
    rows: dict[str, list[dict[str, Any]]] = {}
    broken = 0
    for line in lines:
        try:
            row = json.loads(line)
            rows.setdefault(row["stage"], []).append(row)
        except (ValueError, KeyError, TypeError):
            broken += 1
    if broken:
        notes.append(f"{broken} of {len(lines)} lines of metrics.jsonl cannot be read and are left out.")
    if not rows:
        notes.append("No step was trained yet.")
    return rows


def _histograms(run: RunFolder, done: dict[str, dict[str, Any]], notes: list[str]) -> list[Histogram]:
    from bitdistill_ray.report.weights import weight_histograms

    before = after = None
    for record in done.values():
        student = record["artefacts"].get("student")
        before = student if record["kind"] == "refine" else before
        after = student if record["kind"] in TRAINS else after
    if before is None:
        return []
    if after is None:
        notes.append("The weights are those before training: no stage has trained a student to its end yet.")
    try:
        return weight_histograms(run.fetch(before), run.fetch(after) if after else None)
    except BitdistillError as error:
        notes.append(f"No weight histograms: {error}")
        return []
