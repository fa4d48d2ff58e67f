"""What every stage is given, and how it is found.

A stage is a function `(StageContext) -> StageRecord` registered under its `kind`.  It reads the artefacts of earlier
stages, publishes its own under `stages/NAME/` of the run, and is called again from the start when it was interrupted
(training stages then continue from their own checkpoint).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdistill_ray.config import Config
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.runs import RunFolder, StageRecord
from bitdistill_ray.stage_config import StageConfig


@dataclass(frozen=True, slots=True)
class StageContext:
    """One stage of one run.  Picklable: remote stages take it as it is."""

    config: Config
    name: str
    run: RunFolder

    @property
    def stage(self) -> StageConfig:
        """This stage's section of the configuration."""
        return self.config.stages[self.name]

    def path(self, leaf: str) -> str:
        """Where this stage publishes `leaf`, relative to the run."""
        return f"stages/{self.name}/{leaf}"

    def earlier(self, role: str) -> str | None:
        """The newest artefact of `role` from a stage before this one."""
        return self.run.latest(role, before=self.name)

    def fetch(self, role: str) -> Path:
        """A local copy of the newest artefact of `role`.

        Raises:
            ConfigError: no stage before this one makes it.
        """
        path = self.earlier(role)
        if path is None:
            raise ConfigError(f"stages.{self.name}", f"needs a {role!r} that no stage before it makes",
                              f"Put a stage before it that makes one: {', '.join(MAKERS[role])}")  # fmt: skip
        return self.run.fetch(path)

    def fact(self, kind: str, name: str) -> Any:
        """What the newest stage of `kind` before this one said of `name`."""
        names = list(self.config.stages)
        before = [n for n in names[: names.index(self.name)] if self.config.stages[n].kind == kind]
        record = self.run.finished(before[-1])
        assert record is not None
        return record.facts[name]

    @property
    def teacher_source(self) -> str:
        """The teacher: the fine-tuned one if a `finetune` stage came before, else the configured one."""
        tuned = self.earlier("teacher")
        return self.config.model.teacher if tuned is None else self.run.storage.url_of(tuned)

    def record(self, artefacts: dict[str, str], **facts: Any) -> StageRecord:
        """What this stage leaves."""
        return StageRecord(self.name, self.stage.kind, artefacts, facts)


Stage = Callable[[StageContext], StageRecord]
STAGES: dict[str, Stage] = {}
MAKERS = {
    "student": ("refine", "awq", "clip", "gptq", "reconstruct", "pretrain", "distill"),
    "text": ("write",),
    "teacher": ("finetune",),
    "packed": ("export",),
}


def stage(kind: str) -> Callable[[Stage], Stage]:
    """Register a function as the stage of `kind`."""

    def register(function: Stage) -> Stage:
        STAGES[kind] = function
        return function

    return register
