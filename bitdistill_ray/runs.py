"""A run is a folder, local or in object storage; running the same command again continues it.

    config.yaml         the resolved configuration
    metrics.jsonl       one line for every optimiser step of every training stage
    stages/NAME/        what a stage made; `done.json`, written last, says that it is finished
    checkpoints/        Ray Train's, of the stage that is under way
    summary.json        tables of the `evaluate` stage and where everything lies
    evaluation-rows.json   of tasks, what every model scored on every row: runs are compared row by row
    machine.json        the driver's commit, versions and machine
    report.html         curves, weights and tables of all that, readable without a network
    tensorboard/NAME/   event files of each training stage

A finished stage is not repeated, and `branch` takes those of another run over: the runs of a table of comparisons share
what they begin with.  `done.json` carries the part of the configuration that the stage depends on: when
that changed, the run is refused with the name of the key, since its folder would otherwise mix two experiments.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bitdistill_ray import env
from bitdistill_ray.config import Config, StorageConfig
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.stage_config import CalibratedStage, SearchStage
from bitdistill_ray.storage import Storage

DONE = "done.json"
ROWS = "evaluation-rows.json"
RESOURCES = ("teacher", "student", "storage", "run", "branch", "stages", "monitor")  # how a run computes, not what


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What a finished stage left: `artefacts` are folders by role, relative to the run; `facts` are for people."""

    name: str
    kind: str
    artefacts: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def said(self) -> str:
        """The short facts on one line."""
        return ", ".join(f"{k} {v}" for k, v in self.facts.items() if isinstance(v, int | float | str))


def storage_opener(config: StorageConfig) -> Callable[[str], Storage]:
    """What opens a URL with the configured endpoint."""
    return partial(Storage, endpoint_url=config.endpoint_url, anonymous=config.anonymous, region=config.region,
                   patience_s=config.patience_s, timeout_s=config.timeout_s)  # fmt: skip


class RunFolder:
    """The folder of one run.  Picklable; every node that uses it must see the same storage."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.storage = storage_opener(config.storage)(config.run)

    def begin(self) -> None:
        """Write `config.yaml`."""
        from bitdistill_ray.recipe import dump

        self.storage.write_bytes("config.yaml", dump(self.config).encode())

    def finished(self, name: str) -> StageRecord | None:
        """The record of stage `name` if it is finished.

        Raises:
            ConfigError: it is finished, but under another configuration.
        """
        path = f"stages/{name}/{DONE}"
        if not self.storage.exists(path):
            return None
        done = json.loads(self.storage.read_bytes(path))
        changed = _first_difference(done.pop("depends_on"), self.depends_on(name))
        if changed:
            raise ConfigError(changed, f"was changed since stage {name!r} of {self.storage.url} finished",
                              "Name another folder with run=…, or set it back")  # fmt: skip
        return StageRecord(**done)

    def finish(self, record: StageRecord) -> None:
        """Mark a stage as finished; everything that it published must be complete by now."""
        content = {
            "name": record.name,
            "kind": record.kind,
            "artefacts": record.artefacts,
            "facts": record.facts,
            "depends_on": self.depends_on(record.name),
        }
        self.storage.write_bytes(f"stages/{record.name}/{DONE}", json.dumps(content, indent=1).encode())

    def depends_on(self, name: str) -> dict[str, Any]:
        """The configuration that decides what stage `name` makes: everything but resources, and the stages so far (of a
        `search`, also the stage that it looks for)."""
        tree, names = self.config.model_dump(mode="json"), list(self.config.stages)
        wanted = names[: names.index(name) + 1]
        if isinstance(self.config.stages[name], SearchStage) and (asking := self.config.searching(name)):
            wanted.append(asking)
        stages = {stage: tree["stages"][stage] for stage in wanted}
        for stage in wanted:
            if isinstance(self.config.stages[stage], CalibratedStage):
                del stages[stage]["tasks"]  # how many work at it
        return {**{k: v for k, v in tree.items() if k not in RESOURCES}, "stages": stages}

    def take_over(self, name: str) -> StageRecord | None:
        """Copy stage `name` of the run that this one branches from; None where that has it not, or another.

        Raises:
            ConfigError: there is no such run.
        """
        if self.config.branch is None:
            return None
        source, path = storage_opener(self.config.storage)(self.config.branch), f"stages/{name}"
        if not source.exists("config.yaml"):
            raise ConfigError("branch", f"there is no run at {self.config.branch}",
                              "Name a run's folder, or leave it out")  # fmt: skip
        if not source.exists(f"{path}/{DONE}"):
            return None
        done = json.loads(source.read_bytes(f"{path}/{DONE}"))
        changed = _first_difference(done.pop("depends_on"), self.depends_on(name))
        if changed:
            print(f"[{name}] not taken over from {self.config.branch}, whose {changed} is another", flush=True)
            return None
        for place in sorted(set(done["artefacts"].values())):
            with self.publish(place) as folder:
                # `write` publishes a file at a time, and no folder as a whole
                source.download_folder(place, folder, complete=source.is_complete(place))
        record = StageRecord(**done)
        self.finish(record)
        print(f"[{name}] taken over from {self.config.branch}", flush=True)
        return record

    def latest(self, role: str, before: str | None = None) -> str | None:
        """The newest artefact of `role` (`student`, `teacher`, `text`, `packed`, …) of a finished stage.

        `before` looks only at stages in front of the one of that name.
        """
        found = None
        for name in self.config.stages:
            if name == before:
                break
            record = self.finished(name)
            found = record.artefacts.get(role, found) if record else found
        return found

    @contextmanager
    def publish(self, path: str) -> Iterator[Path]:
        """A new local folder whose content appears at `path` of the run when the block ends well, and not before."""
        with tempfile.TemporaryDirectory(dir=self._scratch()) as scratch:
            folder = Path(scratch) / "new"
            folder.mkdir()
            yield folder
            self.storage.delete(path)
            self.storage.upload_folder(folder, path)

    def fetch(self, path: str) -> Path:
        """A local folder with the content of `path`: itself where the run is local, else a copy in the cache."""
        if self.storage.is_local:
            return Path(self.storage.url_of(path))
        stamp = "".join(c if c.isalnum() else "-" for c in self.storage.url_of(path))
        local = env.cache_folder() / "runs" / stamp
        self.storage.download_folder(path, local, complete=True)
        return local

    def _scratch(self) -> str | None:
        """Beside the run where it is local, so that a full disk is found where it matters."""
        if not self.storage.is_local:
            return None
        Path(self.storage.url).mkdir(parents=True, exist_ok=True)
        return self.storage.url


def provenance(config: Config, **more: Any) -> dict[str, Any]:
    """What `provenance.json` says of a student: teacher, recipe, data and versions."""
    import platform
    from importlib.metadata import version

    from bitdistill_ray import __version__

    packages = ("torch", "ray", "deepspeed", "transformers")
    return {
        "teacher": config.model.teacher,
        "recipe": yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))),
        "data": [source.path for source in config.data.sources],
        "versions": {
            "bitdistill-ray": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        **more,
    }


def _first_difference(old: Any, new: Any, path: str = "") -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            if key not in old and not new[key]:
                continue  # a key that an older version did not have, and that is not set
            found = _first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    return None if old == new else path
