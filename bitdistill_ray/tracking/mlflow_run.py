"""MLflow: one MLflow run for each training stage, found again by its tags when the stage is resumed.

Rows are sent in batches when the monitor writes its file.  Metrics of MLflow are append-only: a repeated step is there
twice, with the same figures.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import mlflow
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from bitdistill_ray.monitor_config import MlflowConfig
from bitdistill_ray.storage import Storage
from bitdistill_ray.tracking.base import figures

BATCH = 1000  # MLflow's limit of metrics in a request


class MlflowRun:
    """Where MLflow is and who one is come from `monitor.mlflow.uri` and MLflow's own environment."""

    name = "MLflow"
    errors: tuple[type[Exception], ...] = (MlflowException, OSError)

    def __init__(self, config: MlflowConfig, run: Storage, stage: str) -> None:
        self.client = mlflow.MlflowClient(tracking_uri=config.uri)
        found = self.client.get_experiment_by_name(config.experiment)
        experiment = found.experiment_id if found else self.client.create_experiment(config.experiment)
        tags = {"bitdistill.run": run.url, "bitdistill.stage": stage}
        wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        earlier = self.client.search_runs([experiment], filter_string=wanted, max_results=1)
        name = f"{run.url.rpartition('/')[2]}/{stage}"
        new = earlier[0] if earlier else self.client.create_run(experiment, tags=tags, run_name=name)
        self.run_id = new.info.run_id
        self.metrics: list[Any] = []

    def step(self, row: Mapping[str, Any]) -> None:
        now = int(time.time() * 1000)
        for name, value in figures(row).items():
            self.metrics.append(Metric(re.sub(r"[^\w./ -]", "_", name), value, now, row["step"]))

    def rewind(self, step: int) -> None:
        self.metrics = [metric for metric in self.metrics if metric.step < step]

    def flush(self) -> None:
        while self.metrics:
            self.client.log_batch(self.run_id, metrics=self.metrics[:BATCH])
            self.metrics = self.metrics[BATCH:]

    def close(self) -> None:
        self.flush()
        self.client.set_terminated(self.run_id)
