"""The sweep finds and ends this cluster's instances, and no other's (against moto's EC2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from moto import mock_aws

from cluster.sweep import CLUSTER_TAG, NODE_TYPE_TAG, leftovers, main

REGION = "us-west-2"


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    with mock_aws():
        yield boto3.client("ec2", region_name=REGION)


def _launch(ec2: Any, cluster: str, node_type: str) -> str:
    tags = [{"Key": CLUSTER_TAG, "Value": cluster}, {"Key": NODE_TYPE_TAG, "Value": node_type}]
    launched = ec2.run_instances(
        ImageId="ami-12c6146b", MinCount=1, MaxCount=1, TagSpecifications=[{"ResourceType": "instance", "Tags": tags}]
    )
    instance_id: str = launched["Instances"][0]["InstanceId"]
    return instance_id


@pytest.mark.slow
def test_lists_what_still_costs(ec2: Any) -> None:
    head, student, gone = (_launch(ec2, "mine", kind) for kind in ("head", "student", "student"))
    _launch(ec2, "theirs", "head")
    ec2.stop_instances(InstanceIds=[student])
    ec2.terminate_instances(InstanceIds=[gone])
    found = {leftover.instance_id: leftover for leftover in leftovers(ec2, "mine")}
    assert set(found) == {head, student}
    assert found[student].state == "stopped"
    assert found[student].node_type == "student"


def test_nothing_is_ended_unless_asked(ec2: Any) -> None:
    instance_id = _launch(ec2, "mine", "teacher")
    lines: list[str] = []
    assert main(["mine", "--region", REGION], lines.append) == 1
    assert instance_id in lines[0]
    assert len(leftovers(ec2, "mine")) == 1


@pytest.mark.slow
def test_ends_this_cluster_and_no_other(ec2: Any) -> None:
    for node_type in ("head", "teacher"):
        _launch(ec2, "mine", node_type)
    other = _launch(ec2, "theirs", "head")
    assert main(["mine", "--region", REGION, "--terminate"], lambda line: None) == 0
    assert leftovers(ec2, "mine") == []
    assert [leftover.instance_id for leftover in leftovers(ec2, "theirs")] == [other]
    assert main(["mine", "--region", REGION], lambda line: None) == 0
