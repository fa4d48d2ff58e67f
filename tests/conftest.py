"""Fixtures for every test: a real S3 server (moto's, over HTTP) on this machine, and an interpreter for GPU kernels."""

from __future__ import annotations

import gc
import logging
import os
import uuid
from collections.abc import Iterator

import pytest
import torch

gc.disable()  # until the imports are done: see `pytest_collection_finish`
torch.set_num_threads(2)
if not torch.cuda.is_available():  # Triton reads it when it is first imported: without a GPU kernels are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """What torch, transformers and Ray left behind by being imported stays: no collection need look at it again.

    A full one takes half a second with it, and tests that measure memory ask for many.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of an S3 server for the whole session; credentials and region are in the environment meanwhile."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "testing")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        environment.delenv("AWS_PROFILE", raising=False)
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_endpoint: str) -> str:
    """`s3://NAME` of a new, empty bucket on `s3_endpoint`."""
    import boto3

    name = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def ray_session(s3_endpoint: str) -> Iterator[None]:
    """A Ray of this test session alone: 4 CPUs of one node, no dashboard; its workers know the S3 credentials.

    Ray Train looks at its workers every quarter of a second instead of every two: no test waits for its next look.
    """
    import ray

    options = {"include_dashboard": False, "object_store_memory": 256 << 20, "log_to_driver": False}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
        ray.init(address="local", num_cpus=4, **options)  # "local": never another Ray of this machine
        yield
        ray.shutdown()
