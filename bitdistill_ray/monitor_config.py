"""The `monitor` section of the configuration: what is measured beside the loss, and who is told."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from pydantic import Field, model_validator

from bitdistill_ray.errors import ConfigError
from bitdistill_ray.evaluate_config import TextConfig
from bitdistill_ray.section import Strict


class WandbConfig(Strict):
    """Weights & Biases; it needs `pip install wandb`."""

    project: str = "bitdistill"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"
    """offline: files under `wandb/` of the folder that the run's monitor works in, for `wandb sync`."""


class MlflowConfig(Strict):
    """MLflow; it needs `pip install mlflow` (or mlflow-skinny)."""

    uri: str | None = None
    """Tracking server, database or `file:` folder; empty: where MLflow itself looks."""
    experiment: str = "bitdistill"


class MonitorConfig(Strict):
    """What people see of a run besides `metrics.jsonl`.  It may be changed when a run continues."""

    line_every_s: float = Field(1.0, gt=0)
    """At most one line (or redrawn bar) in the terminal in so many seconds."""
    codes_every: int = Field(100, ge=0)
    """Steps between measurements of the codes' flip rate and share of zeros; 0: never."""
    gradients_every: int = Field(0, ge=0)
    """Steps between measurements of each loss term's gradient norm, a pass of its own for every term; 0: never."""
    quality_every: int = Field(0, ge=0)
    """Steps between measurements of perplexity and, where there is a teacher, KL and agreement; 0: never."""
    quality_texts: tuple[TextConfig, ...] = ()
    """What they are measured on, in windows of `data.sequence_length`; empty: the texts of `evaluate`, else the excerpt
    that ships."""
    quality_tokens: int = Field(32_768, ge=8)
    """Of each text, at most so many."""
    report: bool = True
    """Write `report.html` when the run ends."""
    tensorboard: bool = True
    """Write event files under `tensorboard/STAGE` of the run."""
    prometheus: bool = True
    """Offer the latest figures to Prometheus through Ray's metrics agent of the monitor's node."""
    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None

    @model_validator(mode="after")
    def _measured(self) -> MonitorConfig:
        if self.quality_texts and not self.quality_every:
            raise ConfigError("monitor.quality_texts", "given, and monitor.quality_every is 0",
                              "Set monitor.quality_every=100, or leave the texts out")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _installed(self) -> MonitorConfig:
        for module in ("wandb", "mlflow"):
            if getattr(self, module) is not None and find_spec(module) is None:
                raise ConfigError(f"monitor.{module}", f"the package {module} is not installed",
                                  f"Run `pip install {module}`, or leave monitor.{module} out")  # fmt: skip
        return self
