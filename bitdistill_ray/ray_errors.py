"""What a user did wrong, found inside what Ray wraps around it."""

from __future__ import annotations

from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError

from bitdistill_ray.errors import BitdistillError, StorageError

STORE_FULL = (OutOfDiskError, ObjectStoreFullError)
MORE_STORE = ("Lower teacher.in_flight or student.micro_batch, give Ray more object_store_memory, or free the disk "
              "that it spills to")  # fmt: skip


def user_error(error: BaseException) -> BitdistillError | None:
    """The BitdistillError inside what Ray raised, or one that says its store is full; None if there is neither."""
    full: StorageError | None = None
    seen: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        found = pending.pop()
        if found is None or any(found is known for known in seen):
            continue
        if isinstance(found, BitdistillError) and not isinstance(found, RayError):
            return found
        if isinstance(found, STORE_FULL):
            full = StorageError("Ray's object store", "full, and so is the disk that it spills to", MORE_STORE)
        seen.append(found)
        pending += [found.__cause__, found.__context__, getattr(found, "cause", None)]
        pending += getattr(found, "worker_failures", {}).values()  # of Ray Train
    return full
