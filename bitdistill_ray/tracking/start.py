"""From the `monitor` section to its trackers; a library is imported only where its tracker is asked for."""

from __future__ import annotations

from collections.abc import Callable

from bitdistill_ray.errors import ConfigError
from bitdistill_ray.monitor_config import MonitorConfig
from bitdistill_ray.storage import Storage
from bitdistill_ray.tracking.base import Tracker


def start_trackers(config: MonitorConfig, run: Storage, stage: str) -> list[Tracker]:
    """The trackers of one training stage of the run at `run`.

    Raises:
        ConfigError: a service that was asked for cannot be reached, or refuses.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        from bitdistill_ray.tracking.tensorboard import TensorBoard

        trackers.append(TensorBoard(run, stage))
    if config.prometheus:
        from bitdistill_ray.tracking.prometheus import Prometheus

        trackers.append(Prometheus(run.url, stage))
    if config.wandb is not None:
        from bitdistill_ray.tracking.weights_and_biases import WeightsAndBiases

        wandb = config.wandb
        trackers.append(_reached("wandb", lambda: WeightsAndBiases(wandb, run, stage), WeightsAndBiases.errors))
    if config.mlflow is not None:
        from bitdistill_ray.tracking.mlflow_run import MlflowRun

        mlflow = config.mlflow
        trackers.append(_reached("mlflow", lambda: MlflowRun(mlflow, run, stage), MlflowRun.errors))
    return trackers


def _reached(key: str, start: Callable[[], Tracker], errors: tuple[type[Exception], ...]) -> Tracker:
    try:
        return start()
    except errors as error:
        said = str(error).strip().splitlines()
        raise ConfigError(f"monitor.{key}", f"cannot be started ({said[0] if said else type(error).__name__})",
                          f"Check its address and credentials, or leave monitor.{key} out") from None  # fmt: skip
