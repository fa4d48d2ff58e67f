"""TensorBoard's event files, under `tensorboard/STAGE` of the run.

Written by tensorboardX, which Ray Train brings along, so that nothing is to be installed for writing; reading them
takes `tensorboard --logdir RUN/tensorboard`.  In object storage a file is written again as a whole, once a minute.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from bitdistill_ray.errors import StorageError
from bitdistill_ray.storage import Storage
from bitdistill_ray.tracking.base import figures

FOLDER = "tensorboard"
UPLOAD_EVERY_S = 60.0


class TensorBoard:
    """One writer for each attempt: a restart opens a new file that takes back the steps that it repeats."""

    name = "TensorBoard"
    errors: tuple[type[Exception], ...] = (OSError, StorageError)

    def __init__(self, run: Storage, stage: str) -> None:
        self.run, self.path = run, f"{FOLDER}/{stage}"
        self.scratch = None if run.is_local else tempfile.TemporaryDirectory()
        self.folder = Path(self.scratch.name if self.scratch else run.url_of(self.path))
        self.writer: Any = None
        self.purge_step: int | None = None
        self.attempts, self.uploaded_at = 0, time.monotonic()

    def step(self, row: Mapping[str, Any]) -> None:
        if self.writer is None:
            self.attempts += 1
            suffix = f".{time.time_ns()}.{self.attempts}"
            self.writer = SummaryWriter(str(self.folder), purge_step=self.purge_step, filename_suffix=suffix)
        for name, value in figures(row).items():
            self.writer.add_scalar(name.replace("@", "_at_"), value, row["step"])

    def rewind(self, step: int) -> None:
        self._close_writer()
        self.purge_step = step or None

    def flush(self) -> None:
        if self.writer is None:
            return
        self.writer.flush()
        if time.monotonic() - self.uploaded_at > UPLOAD_EVERY_S:
            self._upload()

    def close(self) -> None:
        self._close_writer()
        self._upload()
        if self.scratch:
            self.scratch.cleanup()

    def _close_writer(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def _upload(self) -> None:
        if self.scratch:
            for file in self.folder.iterdir():
                self.run.write_bytes(f"{self.path}/{file.name}", file.read_bytes())
        self.uploaded_at = time.monotonic()
