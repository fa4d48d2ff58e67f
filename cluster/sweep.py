"""Find and end instances that a cluster left behind: `python -m cluster.sweep NAME --region REGION [--terminate]`.

`ray down` can leave instances when a launch was still under way or the head died first, and they cost money until
someone notices.  Ray tags every instance of a cluster with `ray-cluster-name`; this lists the ones of NAME that still
exist, oldest first, and with `--terminate` ends them, the head included.  Credentials are those of the AWS CLI.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

CLUSTER_TAG = "ray-cluster-name"
NODE_TYPE_TAG = "ray-user-node-type"
ALIVE = ("pending", "running", "stopping", "stopped")  # all that can still cost: a stopped one keeps its disk


@dataclass(frozen=True, slots=True, order=True)
class Leftover:
    """One instance of the cluster that still exists."""

    launched: datetime
    instance_id: str
    instance_type: str
    node_type: str
    state: str

    def __str__(self) -> str:
        return (
            f"{self.instance_id}  {self.state:<8}  {self.instance_type:<14}  {self.node_type:<8}  {self.launched:%F %R}"
        )


def leftovers(ec2: Any, cluster: str) -> list[Leftover]:
    """Instances tagged as `cluster`'s that are not terminated, oldest first (`ec2`: a boto3 EC2 client)."""
    found = []
    filters = [{"Name": f"tag:{CLUSTER_TAG}", "Values": [cluster]}, {"Name": "instance-state-name", "Values": ALIVE}]
    for page in ec2.get_paginator("describe_instances").paginate(Filters=filters):
        for reservation in page["Reservations"]:
            for instance in reservation["Instances"]:
                tags = {tag["Key"]: tag["Value"] for tag in instance.get("Tags", ())}
                found.append(
                    Leftover(
                        launched=instance["LaunchTime"],
                        instance_id=instance["InstanceId"],
                        instance_type=instance["InstanceType"],
                        node_type=tags.get(NODE_TYPE_TAG, "?"),
                        state=instance["State"]["Name"],
                    )
                )
    return sorted(found)


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """0 if nothing is left (any more); 1 if something is and `--terminate` was not given."""
    import boto3  # type: ignore[import-untyped]

    parser = argparse.ArgumentParser(prog="python -m cluster.sweep", description="List or end a cluster's instances.")
    parser.add_argument("cluster", help="cluster_name of the cluster file")
    parser.add_argument("--region", required=True)
    parser.add_argument("--terminate", action="store_true", help="end them, the head included")
    options = parser.parse_args(arguments)
    ec2 = boto3.client("ec2", region_name=options.region)
    found = leftovers(ec2, options.cluster)
    for leftover in found:
        say(str(leftover))
    if found and options.terminate:
        ec2.terminate_instances(InstanceIds=[leftover.instance_id for leftover in found])
        say(f"Terminating {len(found)}")
    elif found:
        say(f"{len(found)} left; run again with --terminate to end them")
    else:
        say(f"Nothing of {options.cluster} is left in {options.region}")
    return 1 if found and not options.terminate else 0


if __name__ == "__main__":
    sys.exit(main())
