"""`ray job submit` to a real head with token authentication: small jobs, and a run whose data is in S3."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bitdistill_ray.packed.model import load_packed_model
from bitdistill_ray.storage import Storage
from tests.cluster.ray_head import RayHead, ray_head
from tests.road import tiny_overrides

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_EC2_METADATA_DISABLED")
TRAIN = ("python", "-m", "bitdistill_ray.train", "demo")


@pytest.fixture(scope="module")
def head(s3_endpoint: str) -> Iterator[RayHead]:
    """Its jobs know the S3 server."""
    environment = {name: os.environ[name] for name in CREDENTIALS} | {"AWS_ENDPOINT_URL": s3_endpoint}
    with ray_head(num_cpus=4, environment=environment) as running:
        yield running


def test_a_submitted_run_distils_from_s3(head: RayHead, tmp_path: Path, s3_bucket: str, s3_endpoint: str) -> None:
    bucket = Storage(s3_bucket, endpoint_url=s3_endpoint)
    lines = [json.dumps({"text": f"the cat number {i} sat on the mat and looked at the rain"}) for i in range(200)]
    bucket.write_bytes("corpus/part-0.jsonl", "\n".join(lines).encode())
    overrides = tiny_overrides(
        tmp_path,
        f"data={s3_bucket}/corpus",
        "stages.write=false",
        "stages.clip=false",
        "stages.distill.tokens=256",
        "stages.distill.checkpoint_every=1",
        "quant.format=int2",
        "stages.evaluate.written=false",
        run=f"{s3_bucket}/run",
    )
    done = head.submit("train", *TRAIN, *overrides, timeout_s=500)
    assert done.returncode == 0, done.stdout
    assert "joined the Ray cluster" in done.stdout
    summary = json.loads(bucket.read_bytes("run/summary.json"))
    assert summary["stages"]["distill"]["steps"] == 2
    bucket.download_folder("run/stages/export/packed", tmp_path / "packed", complete=True)
    model, _ = load_packed_model(tmp_path / "packed")
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_a_run_that_is_refused_is_a_job_that_failed_and_says_why(head: RayHead) -> None:
    mistake = head.submit("typo", *TRAIN, "quant.group=3")
    assert mistake.returncode == 1
    assert "exit code 2" in mistake.stdout
    assert "Did you mean 'quant.group_size'?" in mistake.stdout


def test_a_wrong_token_is_refused_and_nothing_runs_and_a_submission_id_runs_once(head: RayHead) -> None:
    refused = head.submit("intruder", "python", "-c", "print('inside')", token="0" * 64)
    assert refused.returncode != 0
    assert "Invalid authentication token" in refused.stdout
    # Had the refused submission left anything, its id would be taken.
    assert head.submit("intruder", "python", "-c", "print('inside')").returncode == 0
    again = head.submit("intruder", "python", "-c", "print('again')")
    assert again.returncode != 0
    assert "already exists" in again.stdout


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("0" * 64, 403)])
def test_the_job_server_answers_nobody_without_the_token(head: RayHead, token: str | None, status: int) -> None:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{head.dashboard_url}/api/jobs/", headers=headers)
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=30)
    assert refusal.value.code == status
