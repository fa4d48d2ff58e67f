"""An object store that answers 503, says nothing or hangs up for a while, and then is well: a real proxy's faults."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitdistill_ray.errors import StorageError
from bitdistill_ray.storage import Storage
from bitdistill_ray.storage_retry import LONGEST_PAUSE_S, is_transient, patiently
from tests.fault_proxy import Fault, FaultProxy, fault_proxy


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[FaultProxy]:
    with fault_proxy(s3_endpoint) as running:
        yield running


def storage_behind(proxy: FaultProxy, bucket: str, *, patience_s: float = 60) -> Storage:
    return Storage(f"{bucket}/run", endpoint_url=proxy.url, patience_s=patience_s, timeout_s=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds",
    [
        *(pytest.param((kind,), marks=pytest.mark.soak) for kind in ("503", "silence", "hang up")),
        ("503", "silence", "hang up"),
    ],
    ids="+".join,
)
def test_a_store_that_fails_for_some_seconds_and_then_is_well(
    proxy: FaultProxy, s3_bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], kinds: tuple[Fault, ...]
) -> None:
    """Every kind of operation survives an outage longer than the S3 clients' own retries, and each wait is told."""
    storage, folder = storage_behind(proxy, s3_bucket), tmp_path / "folder"
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(range(256)) * 64)
    storage.write_bytes("a", b"before")
    proxy.fail_for(8, *kinds)
    storage.upload_folder(folder, "up")
    assert proxy.faults > 3
    proxy.fail_for(2, *kinds)
    assert storage.is_complete("up")
    proxy.fail_for(2, *kinds)
    storage.download_folder("up", tmp_path / "down", complete=True)
    assert (tmp_path / "down/weights").read_bytes() == (folder / "weights").read_bytes()
    assert storage.read_bytes("a") == b"before"
    assert "again in" in capsys.readouterr().err


def test_a_store_that_stays_away_is_given_up_after_the_patience_and_says_why(proxy: FaultProxy, s3_bucket: str) -> None:
    proxy.fail_for(600, "503")
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"(?i)run/x.*(reduce your request rate|slow|503)"):
        storage_behind(proxy, s3_bucket, patience_s=2).write_bytes("x", b"1")
    assert time.monotonic() - began < 120  # a bound, no figure: without one this would be ten minutes


def test_pauses_grow_to_a_bound_and_end_with_the_patience() -> None:
    pauses: list[float] = []

    def fails() -> None:
        raise TimeoutError("read timeout")

    def pause(seconds: float) -> None:
        pauses.append(seconds)

    calls: list[str] = []
    with pytest.raises(TimeoutError):
        patiently(fails, "s3://b/x", patience_s=0.4, say=calls.append, pause=pause)
    assert pauses == []
    attempts = iter([TimeoutError("read timeout")] * 7 + [None])

    def recovers() -> str:
        error = next(attempts)
        if error is not None:
            raise error
        return "well"

    assert patiently(recovers, "s3://b/x", patience_s=100, say=calls.append, pause=pause) == "well"
    assert pauses == [0.5, 1, 2, 4, 8, LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    assert all(line.startswith("s3://b/x: read timeout; again in") for line in calls)


@pytest.mark.parametrize("error", [PermissionError("Access Denied"), FileNotFoundError("no such bucket"),
                                   OSError("No space left on device")])  # fmt: skip
def test_what_waiting_cannot_mend_is_not_waited_for(error: OSError) -> None:
    assert not is_transient(error)


@pytest.mark.parametrize("said", ["AWS Error SERVICE_UNAVAILABLE during GetObject operation:",
                                  "AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate",
                                  "AWS Error UNKNOWN (HTTP status 503) during HeadObject operation",
                                  "AWS Error INTERNAL_FAILURE during GetObject operation"])  # fmt: skip
def test_what_a_store_says_when_it_is_away_for_a_while_is_waited_for(said: str) -> None:
    assert is_transient(OSError(said))
