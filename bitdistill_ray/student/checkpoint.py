"""Checkpoints of a training stage: DeepSpeed's shards of every rank, and where the run stood.

Every rank saves its shards into a folder of its own and reports it; Ray Train merges them in storage and takes the
result for a checkpoint only when all ranks are through, so that a half-written one is never resumed from.  The step and
the data ledger travel in DeepSpeed's client state: they are as old as the weights beside them, never older or newer.
"""

from __future__ import annotations

import errno
import json
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import ray.train

from bitdistill_ray.errors import StorageError
from bitdistill_ray.storage import Storage

TAG = "state"
FOLDER = "checkpoints"
LATEST = "latest.json"
RAY_RECORD = "checkpoint_manager_snapshot.json"
MORE_SPACE = "Free some space; the same command continues from the checkpoint before"


@dataclass(frozen=True, slots=True)
class Position:
    """Optimiser steps that are done, and the data ledger after them."""

    step: int
    ledger: dict[str, Any] | None


def save(engine: Any, position: Position, *, run: Storage, stage: str) -> None:
    """Save and report a checkpoint; all ranks call it together.

    Raises:
        StorageError: there is no space for it.  The checkpoint before it stays.
    """
    name = f"step-{position.step:08}"
    with tempfile.TemporaryDirectory(dir=run.url if run.is_local else None) as folder:
        try:
            engine.save_checkpoint(folder, tag=TAG, client_state={"position": asdict(position)})
            ray.train.report(
                {"step": position.step},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=name,
            )
        except (OSError, RuntimeError) as error:  # torch's zip writer turns ENOSPC into a RuntimeError
            if not _is_full(error, folder):
                raise
            raise StorageError(
                folder, f"no space left for the checkpoint of step {position.step}", MORE_SPACE
            ) from error
    if ray.train.get_context().get_world_rank() == 0:
        run.write_bytes(f"{FOLDER}/{stage}/{LATEST}", json.dumps({"folder": name}).encode())


def resume(engine: Any, *, run: Storage, stage: str) -> Position:
    """Load the newest checkpoint of this stage, if there is one, and return where it stood."""
    checkpoint = ray.train.get_checkpoint() or _own_record(run, stage)
    if checkpoint is None:
        return Position(0, None)
    with checkpoint.as_directory() as folder:
        _, client_state = engine.load_checkpoint(folder, tag=TAG)
    return Position(**client_state["position"])


def _own_record(run: Storage, stage: str) -> ray.train.Checkpoint | None:
    """The checkpoint that `save` finished last, for when Ray Train's own record was lost."""
    path = f"{FOLDER}/{stage}/{LATEST}"
    if not run.exists(path):
        return None
    folder = run.child(f"{FOLDER}/{stage}/{json.loads(run.read_bytes(path))['folder']}")
    filesystem, place = folder.arrow_filesystem()
    return ray.train.Checkpoint(place, filesystem) if folder.exists() else None


def drop_damaged_record(run: Storage, stage: str) -> bool:
    """Remove Ray Train's record of this stage's checkpoints where a full disk cut it short; True if it did.

    Ray writes it in place and refuses to start on half of it; `resume` then goes by the record that `save` made.
    """
    path = f"{FOLDER}/{stage}/{RAY_RECORD}"
    if not run.exists(path):
        return False
    try:
        json.loads(run.read_bytes(path))
    except ValueError:
        run.delete(path)
        return True
    return False


def full_disk(error: Exception, run: Storage) -> StorageError | None:
    """The StorageError of a failure that says the disk is full, else None."""
    if "No space left on device" not in str(error):
        return None
    return StorageError(run.url, "no space left", MORE_SPACE)


def _is_full(error: Exception, folder: str) -> bool:
    import shutil

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return isinstance(error, RuntimeError) and (
        "PytorchStreamWriter" in str(error) or "No space" in str(error) or shutil.disk_usage(folder).free < 1 << 20
    )
