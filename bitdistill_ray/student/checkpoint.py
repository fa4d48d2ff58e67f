"""Checkpoints of a training stage: DeepSpeed's shards of every rank, and where the run stood.

Every rank saves its shards into a folder of its own and reports it; Ray Train merges them in storage and takes the
result for a checkpoint only when all ranks are through, so that a half-written one is never resumed from.  The step and
the data ledger travel in DeepSpeed's client state: they are as old as the weights beside them, never older or newer.
"""

from __future__ import annotations

import errno
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import ray.train

from bitdistill_ray.errors import StorageError

TAG = "state"


@dataclass(frozen=True, slots=True)
class Position:
    """Optimiser steps that are done, and the data ledger after them."""

    step: int
    ledger: dict[str, Any] | None


def save(engine: Any, position: Position, metrics: dict[str, Any], scratch: str | None) -> None:
    """Save and report a checkpoint; all ranks call it together.

    Raises:
        StorageError: there is no space for it.  The checkpoint before it stays.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        try:
            engine.save_checkpoint(folder, tag=TAG, client_state={"position": asdict(position)})
        except (OSError, RuntimeError) as error:  # torch's zip writer turns ENOSPC into a RuntimeError
            if not _is_full(error, folder):
                raise
            raise StorageError(folder, f"no space left for the checkpoint of step {position.step}",
                               "Free some; the same command continues from the one before") from error  # fmt: skip
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def resume(engine: Any) -> Position:
    """Load the newest checkpoint of this stage, if there is one, and return where it stood."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Position(0, None)
    with checkpoint.as_directory() as folder:
        _, client_state = engine.load_checkpoint(folder, tag=TAG)
    return Position(**client_state["position"])


def _is_full(error: Exception, folder: str) -> bool:
    import shutil

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return isinstance(error, RuntimeError) and (
        "PytorchStreamWriter" in str(error) or "No space" in str(error) or shutil.disk_usage(folder).free < 1 << 20
    )
