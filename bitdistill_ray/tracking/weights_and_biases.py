"""Weights & Biases: one W&B run for each training stage, found again by its id when the stage is resumed.

W&B takes a step once: after a restart it ignores the rows of the steps that it has, which are the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import wandb

from bitdistill_ray import env
from bitdistill_ray.monitor_config import WandbConfig
from bitdistill_ray.storage import Storage
from bitdistill_ray.tracking.base import figures


class WeightsAndBiases:
    """Credentials are W&B's own (WANDB_API_KEY, `wandb login`); its folder lies in the run where that is local."""

    name = "Weights & Biases"
    errors: tuple[type[Exception], ...] = (wandb.errors.Error, OSError)

    def __init__(self, config: WandbConfig, run: Storage, stage: str) -> None:
        folder = run.url if run.is_local else str(env.cache_folder())
        self.run = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            dir=folder,
            id=hashlib.sha256(f"{run.url} {stage}".encode()).hexdigest()[:16],
            name=f"{run.url.rpartition('/')[2]}/{stage}",
            config={"run": run.url, "stage": stage},
            resume="allow" if config.mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def step(self, row: Mapping[str, Any]) -> None:
        self.run.log(figures(row), step=row["step"])

    def rewind(self, step: int) -> None:
        """See the module."""

    def flush(self) -> None:
        """W&B's own process sends as rows come."""

    def close(self) -> None:
        self.run.finish()
        wandb.teardown()  # `finish` returns before W&B's process has written its offline file
