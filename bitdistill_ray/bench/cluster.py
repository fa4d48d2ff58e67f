"""The Ray on which the teacher and the training step are measured: RAY_ADDRESS's, or one of this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bitdistill_ray.config import Config, StudentConfig, TeacherConfig
from bitdistill_ray.train import cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """`device` is "cpu" or "cuda"; `threads` are those of the teacher and of the student, each."""

    device: str
    threads: int

    @property
    def gpus(self) -> float:
        """GPUs of one role: where there is only one, teacher and student share it."""
        if self.device == "cpu":
            return 0
        import torch

        return 1 if torch.cuda.device_count() > 1 else 0.5

    @property
    def config(self) -> Config:
        """One teacher and one student on this machine."""
        return Config(
            teacher=TeacherConfig(gpus=self.gpus, threads=self.threads),
            student=StudentConfig(gpus=self.gpus, threads=self.threads),
        )


@contextmanager
def local_ray(machine: Machine) -> Iterator[None]:
    """Inside, Ray is there.  Enter it before anything imports ray."""
    with cluster(machine.config):
        yield
