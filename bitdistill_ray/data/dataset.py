"""Reading units on a Ray cluster: Ray Data runs `read_unit` for many units at once and keeps their order.

    from_items(tasks) ► map_batches(read, tokenise, pack; one task per unit, a generator) ► blocks, order preserved

Tasks are cut into plans (passes follow each other in one), the first of FIRST_TASKS and each twice as long as the one
before, up to MOST_TASKS: so a plan stays small for a corpus of a million units and has enough to do in parallel for one
of three, and a short run does not read passes of a small corpus that it will never see.  Memory is bounded by small
blocks: Ray Data lets a task run ahead of its reader by a few blocks only, and `concurrency` bounds how many tasks there
are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import ray
import ray.data
from ray.exceptions import RayError

from bitdistill_ray.data.blocks import Block, UnitTask, read_unit_patiently
from bitdistill_ray.data.encoder import Encoder
from bitdistill_ray.data.sources import CorpusSpec
from bitdistill_ray.data.units import Unit
from bitdistill_ray.ray_errors import user_error

FIRST_TASKS, MOST_TASKS = 16, 1024
TARGET_BLOCK_BYTES = 8 << 20
STORE_FRACTION = 0.25  # of the object store, for what several streams read ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class RayReading:
    """What the readers may use: `concurrency` units at a time (None: as many as there are free CPUs), and per unit
    `cpus` and `memory` bytes (None: not accounted for).  `store` is this stream's part of what is held ready."""

    concurrency: int | None = None
    cpus: float = 1
    memory: int | None = None
    store: float = 1


def free_cpus() -> float:
    """CPUs that nobody has taken now; at least 1."""
    return max(1.0, float(ray.available_resources().get("CPU", 0)))


def divide(reading: RayReading, shares: Sequence[Fraction], *, free: float) -> list[RayReading]:
    """What each of several streams that are read side by side may use, where `free` CPUs are free.

    A reader that is ahead of its stream stands still without giving its CPU back, so the readers of all streams must
    fit on the cluster at once, or one stream's could wait for ever behind another's: units at a time are divided by the
    shares, at least one each, and where that is more than there are CPUs a reader takes a fraction of one.
    """
    if len(shares) == 1:
        return [reading]
    slots = free / reading.cpus if reading.cpus else float(reading.concurrency or len(shares))
    slots = min(slots, reading.concurrency) if reading.concurrency else slots
    units = [max(1, int(share * int(max(slots, 1)))) for share in shares]
    cpus = min(reading.cpus, math.floor(1000 * free / sum(units)) / 1000)
    return [replace(reading, concurrency=count, cpus=cpus, store=reading.store / len(units)) for count in units]


def read_here(tasks: Iterator[UnitTask], corpus: CorpusSpec, encoder: Encoder) -> Iterator[Block]:
    """Read tasks one after the other in this process."""
    for task in tasks:
        yield from read_unit_patiently(task, corpus, encoder)


def read_on_ray(
    tasks: Iterator[UnitTask], corpus: CorpusSpec, encoder: Encoder, reading: RayReading
) -> Iterator[Block]:
    """Read tasks with Ray Data; the blocks come in the order of the tasks, and those of `read_here` put together.

    Raises the workers' own DataError and StorageError, not Ray's wrapping.
    """
    count = FIRST_TASKS
    while chunk := list(islice(tasks, count)):
        count = min(2 * count, MOST_TASKS)
        blocks = _dataset(chunk, corpus, encoder, reading).iter_batches(batch_size=None, batch_format="numpy")
        try:
            yield from blocks
        except RayError as error:
            mendable = user_error(error)
            if mendable is None:
                raise
            raise mendable from error


def _dataset(tasks: list[UnitTask], corpus: CorpusSpec, encoder: Encoder, reading: RayReading) -> ray.data.Dataset:
    dataset = ray.data.from_items([_to_row(task) for task in tasks], override_num_blocks=len(tasks))
    context = dataset.context  # this dataset's own copy
    context.execution_options = copy.copy(context.execution_options)
    context.execution_options.preserve_order = True
    if reading.store < 1:
        context.override_object_store_memory_limit_fraction = STORE_FRACTION * reading.store
    context.target_max_block_size = TARGET_BLOCK_BYTES
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return dataset.map_batches(
        partial(_read_row, corpus=corpus, encoder=encoder),
        batch_size=1,
        batch_format="numpy",
        num_cpus=reading.cpus,
        memory=reading.memory,
        concurrency=reading.concurrency,
    )


def _read_row(row: dict[str, np.ndarray], corpus: CorpusSpec, encoder: Encoder) -> Iterator[Block]:
    values = {name: array[0].item() if isinstance(array[0], np.generic) else array[0] for name, array in row.items()}
    yield from read_unit_patiently(_from_row(values), corpus, encoder)


def _to_row(task: UnitTask) -> dict[str, Any]:
    return {"epoch": task.epoch, "ordinal": task.ordinal, "skip": task.skip, **asdict(task.unit)}


def _from_row(row: dict[str, Any]) -> UnitTask:
    task = {name: row.pop(name) for name in ("epoch", "ordinal", "skip")}
    return UnitTask(**task, unit=Unit(**row))
