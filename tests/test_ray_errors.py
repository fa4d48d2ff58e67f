"""What is found inside Ray's errors."""

from __future__ import annotations

import pytest
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from bitdistill_ray.errors import BitdistillError, DataError, StorageError
from bitdistill_ray.ray_errors import user_error

EMPTY = DataError("corpus", "an empty corpus", "Check the path")


def wrapped(cause: Exception) -> RayTaskError:
    return RayTaskError("score", "traceback", cause).as_instanceof_cause()


@pytest.mark.parametrize("full", [OutOfDiskError(), ObjectStoreFullError(), wrapped(OutOfDiskError())])
def test_a_full_object_store_is_named_with_its_remedy(full: Exception) -> None:
    found = user_error(full)
    assert isinstance(found, StorageError)
    assert str(found).startswith("Ray's object store: full, and so is the disk that it spills to. Lower teacher.in_fli")


def test_a_user_error_is_preferred_to_what_it_was_met_with() -> None:
    error = wrapped(EMPTY)
    error.__context__ = OutOfDiskError()
    found = user_error(error)
    assert isinstance(found, BitdistillError)
    assert str(found) == str(EMPTY)


def test_other_errors_of_ray_are_nobodys_fault() -> None:
    assert user_error(RayError("lost")) is None
