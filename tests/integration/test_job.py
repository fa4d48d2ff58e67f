"""`ray job submit -- python -m bitdistill_ray.train …` to a running head with token authentication, data in S3."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from bitdistill_ray.packed.model import load_packed_model
from bitdistill_ray.storage import Storage
from tests.cluster.ray_head import ray_head
from tests.road import tiny_overrides

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_EC2_METADATA_DISABLED")


def test_a_submitted_job_distils_from_s3(tmp_path: Path, s3_bucket: str, s3_endpoint: str) -> None:
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
    head_environment = {name: os.environ[name] for name in CREDENTIALS} | {"AWS_ENDPOINT_URL": s3_endpoint}
    with ray_head(num_cpus=4, environment=head_environment) as head:
        done = head.submit("train", "python", "-m", "bitdistill_ray.train", "demo", *overrides, timeout_s=500)
        assert done.returncode == 0, done.stdout
        assert "joined the Ray cluster" in done.stdout
        mistake = head.submit("typo", "python", "-m", "bitdistill_ray.train", "demo", *overrides, "quant.group=3")
        assert mistake.returncode == 1
        assert "Did you mean 'quant.group_size'?" in mistake.stdout
    summary = json.loads(bucket.read_bytes("run/summary.json"))
    assert summary["stages"]["distill"]["steps"] == 2
    bucket.download_folder("run/stages/export/packed", tmp_path / "packed", complete=True)
    model, _ = load_packed_model(tmp_path / "packed")
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
