"""Checkpoints of a training stage: DeepSpeed's shards of every rank, and where the run stood.

    checkpoints/STAGE/step-N-ATTEMPT/rank-K/   what rank K saved; its manifest is written last
    checkpoints/STAGE/latest.json              the good ones, oldest first; written when every rank is through

A save closes a snapshot on the rank's own disk and returns; a thread carries it to storage while training goes on, and
the next save waits for it.  A checkpoint counts from the moment that `latest.json` names it, which one small write
brings about, so that a half-written one is never taken for a good one; one that was damaged later is passed over for
the one before.  The step and the data ledger travel in DeepSpeed's client state: they are as old as the weights beside
them.  A folder belongs to one attempt, so that what a killed attempt left can never complete another's.
"""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bitdistill_ray.errors import StorageError
from bitdistill_ray.storage import Storage
from bitdistill_ray.student.retention import Saved, kept

TAG = "state"
FOLDER = "checkpoints"
LATEST = "latest.json"
SCRATCH = ".checkpoint-"
POLL_S = 0.2
MORE_SPACE = "Free some space; the same command continues from the checkpoint before"


@dataclass(frozen=True, slots=True)
class Position:
    """Optimiser steps that are done, the data ledger after them, what is averaged so far (`averaging.py`), and what the
    steps have set by themselves (`course.py`)."""

    step: int
    ledger: dict[str, Any] | None
    average: dict[str, Any] | None = None
    course: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For DeepSpeed's client state; the tensors are not copied."""
        return {"step": self.step, "ledger": self.ledger, "average": self.average, "course": self.course}


class Checkpoints:
    """The saving side, one object in each rank.

    run        the run's storage
    stage      the stage's name
    attempt    a word that all ranks of this attempt share, and no other attempt
    zero       ZeRO stage of the engine
    long       whether the engine has two long parameters in place of the model's own
    last, best how many are kept: the newest, and those of the lowest loss
    timeout_s  how long an upload may take, and how long it waits for the other ranks' ones
    say        prints a line where people see it
    """

    def __init__(
        self,
        run: Storage,
        stage: str,
        *,
        rank: int,
        ranks: int,
        attempt: str,
        zero: int,
        long: bool = False,
        last: int,
        best: int,
        timeout_s: float,
        say: Callable[[str], None],
    ) -> None:
        self.run, self.place = run, f"{FOLDER}/{stage}"
        self.rank, self.ranks, self.attempt, self.zero = rank, ranks, attempt, zero
        self.last, self.best, self.timeout_s, self.say, self.long = last, best, timeout_s, say, long
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, engine: Any, position: Position, *, loss: float | None = None) -> None:
        """Save a snapshot here and begin to upload it; all ranks call it together.

        `loss` (of rank 0) is what the policy of the best goes by.

        Raises:
            StorageError: there is no space for it, or the upload before it failed.  The last good one stays.
        """
        self.wait()
        dist.barrier()
        scratch = tempfile.mkdtemp(prefix=SCRATCH, dir=self.run.url if self.run.is_local else None)
        try:
            engine.save_checkpoint(scratch, tag=TAG, client_state={"position": position.to_dict()}, save_latest=False)
            (Path(scratch) / "rank.json").write_text(json.dumps({"rank": self.rank, "ranks": self.ranks}))
        except (OSError, RuntimeError) as error:  # torch's zip writer turns ENOSPC into a RuntimeError
            full = _is_full(error, scratch)
            shutil.rmtree(scratch, ignore_errors=True)
            if not full:
                raise
            words = f"no space left for the checkpoint of step {position.step}"
            raise StorageError(scratch, words, MORE_SPACE) from error
        name = f"step-{position.step:08}-{self.attempt}"
        saved = Saved(folder=name, step=position.step, ranks=self.ranks, zero=self.zero, loss=loss,
                      long=self.long)  # fmt: skip
        self._pending = self._thread.submit(self._upload, scratch, saved)

    def wait(self) -> None:
        """Wait until the upload under way is through; raises what it raised."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result(timeout=2 * self.timeout_s)
        except TimeoutError:
            raise self._late("its upload has not ended") from None

    def close(self) -> None:
        """The end of training: what is under way may end; a failure no longer matters and is only told."""
        with suppress(StorageError):  # `_upload` has said it
            self.wait()
        self._thread.shutdown(wait=False)

    def _upload(self, scratch: str, saved: Saved) -> None:
        try:
            self.run.upload_folder(scratch, f"{self.place}/{saved.folder}/rank-{self.rank}")
            if self.rank == 0:
                self._commit(saved)
        except StorageError as error:
            self.say(f"the checkpoint of step {saved.step} was not stored: {error}")
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _commit(self, saved: Saved) -> None:
        """Name the checkpoint in `latest.json` as soon as every rank has stored its part, then drop old ones."""
        deadline = time.monotonic() + self.timeout_s
        for rank in range(self.ranks):
            while not self.run.is_complete(f"{self.place}/{saved.folder}/rank-{rank}"):
                if time.monotonic() > deadline:
                    raise self._late(f"rank {rank} has not stored its part of step {saved.step}")
                time.sleep(POLL_S)
        keep = kept([*(s for s in recorded(self.run, self.place) if s.step < saved.step), saved],
                    last=self.last, best=self.best)  # fmt: skip
        self.run.write_bytes(f"{self.place}/{LATEST}", json.dumps([asdict(s) for s in keep], indent=1).encode())
        names = {s.folder for s in keep} | {LATEST}
        found = {path.removeprefix(f"{self.place}/").split("/")[0] for path in self.run.list(self.place)}
        for name in sorted(found - names):
            self.run.delete(f"{self.place}/{name}")

    def _late(self, what: str) -> StorageError:
        return StorageError(self.run.url_of(self.place), f"{what} after {self.timeout_s:.0f} s",
                            "Look at the store's health, or raise student.checkpoint_timeout_s")  # fmt: skip


def recorded(run: Storage, place: str) -> list[Saved]:
    """What `latest.json` names, oldest first."""
    path = f"{place}/{LATEST}"
    return [Saved(**saved) for saved in json.loads(run.read_bytes(path))] if run.exists(path) else []


def newest_good(run: Storage, stage: str, say: Callable[[str], None]) -> Saved | None:
    """The newest checkpoint of this stage whose files are all there in full, None if there is none."""
    place = f"{FOLDER}/{stage}"
    for saved in sorted(recorded(run, place), key=lambda s: s.step, reverse=True):
        if all(run.is_complete(f"{place}/{saved.folder}/rank-{rank}") for rank in range(saved.ranks)):
            return saved
        say(f"the checkpoint of step {saved.step} is damaged: going by the one before")
    return None


def sweep(run: Storage) -> None:
    """Remove the snapshots that killed attempts left beside a local run; call it before this attempt makes any."""
    for folder in Path(run.url).glob(f"{SCRATCH}*") if run.is_local else ():
        shutil.rmtree(folder, ignore_errors=True)


def gather(run: Storage, stage: str, saved: Saved, folder: Path) -> Path:
    """All ranks' files in one folder, as DeepSpeed wants to load them; links where the run is local."""
    merged = folder / "native" / TAG
    merged.mkdir(parents=True)
    for rank in range(saved.ranks):
        source = f"{FOLDER}/{stage}/{saved.folder}/rank-{rank}"
        if run.is_local:
            part = Path(run.url_of(source))
        else:
            part = folder / f"rank-{rank}"
            run.download_folder(source, part, complete=True)
        for file in (part / TAG).glob("*"):
            (merged / file.name).symlink_to(file)
    return merged.parent


def forget(run: Storage, stage: str, *, best: int) -> None:
    """The stage is finished: remove its checkpoints, except the `best`."""
    place = f"{FOLDER}/{stage}"
    keep = {s.folder for s in kept(recorded(run, place), last=0, best=best)}
    if not keep:
        run.delete(place)
        return
    for name in {path.removeprefix(f"{place}/").split("/")[0] for path in run.list(place)} - keep - {LATEST}:
        run.delete(f"{place}/{name}")


def full_disk(error: Exception, run: Storage) -> StorageError | None:
    """The StorageError of a failure that says the disk is full, else None."""
    if "No space left on device" not in str(error):
        return None
    return StorageError(run.url, "no space left", MORE_SPACE)


def _is_full(error: Exception, folder: str) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return isinstance(error, RuntimeError) and (
        "PytorchStreamWriter" in str(error) or "No space" in str(error) or shutil.disk_usage(folder).free < 1 << 20
    )
