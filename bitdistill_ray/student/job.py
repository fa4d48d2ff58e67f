"""Everything a student worker is told: plain data and actor handles, sent to Ray Train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitdistill_ray.config import Config
from bitdistill_ray.model.identity import ModelIdentity
from bitdistill_ray.runs import RunFolder
from bitdistill_ray.stage_config import LossConfig, TrainStage
from bitdistill_ray.teacher.roster import Roster


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """One training stage of one run.

    source         the weights to start from: an artefact of the run (a student folder), or None: `model_source`
    model_source   a model to train as it is, without quantisation (the `finetune` stage)
    output         where the trained weights are published, relative to the run
    teachers       the pool (or plain actor handles); empty where the loss needs none
    gamma          CAKLD's scalar
    relation_layer the teacher's layer that relations are taken from
    teacher_identity who the teachers are: the key of their cached answers
    """

    config: Config
    stage_name: str
    run: RunFolder
    loss: LossConfig
    steps: int
    source: str | None
    model_source: str | None
    output: str
    feeder: Any
    monitor: Any
    teachers: Roster | tuple[Any, ...] = ()
    gamma: float | None = None
    relation_layer: int | None = None
    teacher_identity: ModelIdentity | None = None

    @property
    def stage(self) -> TrainStage:
        """The stage's section of the configuration."""
        stage = self.config.stages[self.stage_name]
        assert isinstance(stage, TrainStage)
        return stage
