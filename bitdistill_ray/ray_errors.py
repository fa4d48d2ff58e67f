"""What a user did wrong, found inside what Ray wraps around it."""

from __future__ import annotations

from ray.exceptions import RayError

from bitdistill_ray.errors import BitdistillError


def user_error(error: BaseException) -> BitdistillError | None:
    """The BitdistillError inside what Ray raised, or None if there is none."""
    seen: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        found = pending.pop()
        if found is None or any(found is known for known in seen):
            continue
        if isinstance(found, BitdistillError) and not isinstance(found, RayError):
            return found
        seen.append(found)
        pending += [found.__cause__, found.__context__, getattr(found, "cause", None)]
        pending += getattr(found, "worker_failures", {}).values()  # of Ray Train
    return None
