"""A driver that leaves while Ray Train runs takes it along."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray._raylet import PlacementGroupID
from ray.exceptions import ActorDiedError
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group

from bitdistill_ray.stages.fitting import NamesItself, fitting
from bitdistill_ray.storage import Storage
from bitdistill_ray.student.monitor import Monitor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def for_ever() -> None:
    while True:
        time.sleep(1)


def for_a_moment() -> None:
    time.sleep(2)


def trainer_of(monitor: object, folder: Path, work: Callable[[], None] = for_ever) -> TorchTrainer:
    return TorchTrainer(
        work,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.1}),
        run_config=RunConfig(name="for-ever", storage_path=str(folder), callbacks=[NamesItself(monitor)]),
    )


def rooms() -> set[str]:
    """The placement groups that hold or wait for resources."""
    groups = ray.util.placement_group_table().items()
    return {id_ for id_, group in groups if group["state"] in ("PENDING", "CREATED", "RESCHEDULING")}


def trainer_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("trainer")]


@pytest.mark.parametrize("late", [False, True])
def test_nothing_waits_for_ray_when_the_driver_leaves(tmp_path: Path, late: bool) -> None:
    """Left as soon as it began, and left when its workers have room."""
    monitor = ray.remote(Monitor).options(num_cpus=0).remote(Storage(tmp_path), "distill")  # type: ignore[attr-defined]
    before = rooms()
    with pytest.raises(KeyboardInterrupt), fitting(trainer_of(monitor, tmp_path), monitor) as outcome:  # noqa: PT012
        deadline = time.monotonic() + 120
        while late and (ray.get(monitor.controller.remote()) is None or not rooms() - before):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert trainer_threads()
        assert not outcome.done()
        raise KeyboardInterrupt
    assert not trainer_threads()
    assert isinstance(outcome.exception(), ActorDiedError)
    for id_ in rooms() - before:  # a driver that leaves takes them along; this one stays
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(id_)))
    ray.kill(monitor)


def test_after_an_error_ray_train_ends_by_itself_and_gives_back_its_room(tmp_path: Path) -> None:
    monitor = ray.remote(Monitor).options(num_cpus=0).remote(Storage(tmp_path), "distill")  # type: ignore[attr-defined]
    before, trainer = rooms(), trainer_of(monitor, tmp_path, for_a_moment)
    with pytest.raises(ZeroDivisionError), fitting(trainer, monitor) as outcome:
        _ = 1 / 0
    assert not trainer_threads()
    assert outcome.exception() is None
    assert rooms() == before
    ray.kill(monitor)
