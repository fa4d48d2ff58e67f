"""`ray job submit` to a real head with token authentication."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from tests.cluster.ray_head import RayHead, ray_head

pytestmark = pytest.mark.slow

SUM_ON_THE_CLUSTER = """
import ray
ray.init()
total = sum(ray.get([ray.remote(lambda i: i * i).remote(i) for i in range(10)]))
print("the cluster says", total)
"""


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head() as running:
        yield running


def test_a_job_runs_with_the_right_token(head: RayHead) -> None:
    job = head.submit("sum", "python", "-c", SUM_ON_THE_CLUSTER)
    assert job.returncode == 0, job.stdout
    assert "the cluster says 285" in job.stdout


def test_a_job_that_fails_is_told(head: RayHead) -> None:
    job = head.submit("fails", "python", "-c", "raise SystemExit(3)")
    assert job.returncode == 1
    assert "exit code 3" in job.stdout


def test_a_wrong_token_is_refused_and_nothing_runs(head: RayHead) -> None:
    refused = head.submit("intruder", "python", "-c", "print('inside')", token="0" * 64)
    assert refused.returncode != 0
    assert "Invalid authentication token" in refused.stdout
    # Had the refused submission left anything, its id would be taken.
    assert head.submit("intruder", "python", "-c", "print('inside')").returncode == 0


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("0" * 64, 403)])
def test_the_job_server_answers_nobody_without_the_token(head: RayHead, token: str | None, status: int) -> None:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{head.dashboard_url}/api/jobs/", headers=headers)
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=30)
    assert refusal.value.code == status


def test_a_submission_id_runs_once(head: RayHead) -> None:
    assert head.submit("once", "python", "-c", "print('first')").returncode == 0
    again = head.submit("once", "python", "-c", "print('second')")
    assert again.returncode != 0
    assert "already exists" in again.stdout
