"""Everything a student worker is told: plain data and actor handles, sent to Ray Train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bitdistill_ray.config import Config
from bitdistill_ray.loss_config import LossConfig
from bitdistill_ray.model.identity import ModelIdentity
from bitdistill_ray.runs import RunFolder
from bitdistill_ray.stage_config import TrainStage
from bitdistill_ray.teacher.roster import Roster


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What students can only be told when the teachers are there; through the monitor, since they start side by side.

    teachers  the pool (or plain actor handles); empty where the loss needs none
    identity  who the teachers are: the key of their cached answers
    gamma     CAKLD's scalar
    """

    teachers: Roster | tuple[Any, ...] = ()
    identity: ModelIdentity | None = None
    gamma: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """One training stage of one run.

    source         the weights to start from: an artefact of the run (a student folder), or None: `model_source`
    model_source   a model to train as it is, without quantisation (the `finetune` stage)
    output         where the trained weights are published, relative to the run
    monitor        keeps the rows, and has the Lesson
    relation_layer the teacher's layer that relations are taken from
    quality        windows of held-out texts to measure while it trains (`quality.Windows`)
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
    relation_layer: int | None = None
    quality: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def stage(self) -> TrainStage:
        """The stage's section of the configuration."""
        stage = self.config.stages[self.stage_name]
        assert isinstance(stage, TrainStage)
        return stage
