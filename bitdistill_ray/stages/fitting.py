"""Ray Train beside the driver's other work, and its end when the driver leaves first.

`trainer.fit` runs in a thread: on the main one it would replace the handler of SIGINT by one that ends the process with
status 1 and no word.  A thread that still waits for Ray when this process lets go of Ray takes the process down (an
exit without a word, or a segmentation fault: ray-project/ray#31145), so a driver that leaves early waits for it.  After
an error the students have been refused, and Ray Train ends by itself and gives back their room.  After Ctrl-C or
SIGTERM, or where that takes too long, the driver ends what the thread waits for: the controller, which tells the
monitor who it is as soon as it runs; its placement group then stays until the driver leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback

LOOK_EVERY_S, PATIENCE_S = 0.1, 30.0


class NamesItself(ControllerCallback):  # type: ignore[misc]
    """A controller with this callback tells the monitor who it is."""

    def __init__(self, monitor: Any) -> None:
        self.monitor = monitor

    def after_controller_start(self, train_run_context: object) -> None:
        """Called by the controller, in its process."""
        self.monitor.controlled_by.remote(ray.get_runtime_context().current_actor)


@contextmanager
def fitting(trainer: TorchTrainer, monitor: Any) -> Iterator[Future[Any]]:
    """What `trainer`, whose controller `NamesItself` to `monitor`, will return; nothing of it outlives an error."""
    pool = ThreadPoolExecutor(1, "trainer")
    outcome = pool.submit(trainer.fit)
    pool.shutdown(wait=False)
    try:
        yield outcome
    except BaseException as error:
        patience_s = LOOK_EVERY_S if isinstance(error, KeyboardInterrupt) else PATIENCE_S
        while not wait([outcome], timeout=patience_s).done:
            _end_controller(monitor)
            patience_s = LOOK_EVERY_S
        raise


def _end_controller(monitor: Any) -> None:
    """End it, if it has told who it is."""
    try:
        controller = ray.get(monitor.controller.remote())
    except RayError:  # nobody to ask: the controller is gone with the rest, and the thread hears of it
        return
    if controller is not None:
        ray.kill(controller)
