"""Check cluster files without a cluster: `python -m cluster.validate [FILE …]` from the root of a checkout.

`ray up` has no dry run, and an unknown key of a KubeRay manifest shows only when the API server refuses it.  So a file
is held against what its reader will hold it against, offline: Ray's own schema after Ray's own defaults
(`validate_config(prepare_config(…))`; the bare call refuses good files), EC2's `RunInstances` parameters as botocore
knows them, KubeRay's field names and types (`kuberay.schema.json`), and Ray Serve's schema.  Then come this project's
rules: token authentication is on, images are pinned, no credential is written down, the head runs no tasks, and nothing
is left behind that costs money.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from bitdistill_ray.errors import BitdistillError, ConfigError

HERE = Path(__file__).resolve().parent
SHIPPED = (HERE.parent / "ray_cluster.yaml", HERE / "rayjob.yaml", HERE / "rayservice.yaml")
CLUSTER_SPEC = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
ACCESS_KEY = re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|aws_secret_access_key|aws_access_key_id", re.IGNORECASE)


def check(path: Path) -> None:
    """Check one file, a Ray cluster file or a KubeRay manifest; ConfigError names the first mistake."""
    try:
        text = path.read_text(encoding="utf-8")
        document = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(str(path), f"cannot be read ({error})", "Give a YAML file") from error
    if not isinstance(document, dict):
        raise ConfigError(str(path), "is not a mapping", "Give a Ray cluster file, a RayJob or a RayService")
    if key := ACCESS_KEY.search(text):
        raise ConfigError(str(path), f"holds a credential ({key.group()[:8]}…)", "Use an instance profile or a role")
    _kuberay(path, document) if "kind" in document else _ray_up(path, document)


def _ray_up(path: Path, document: dict[str, Any]) -> None:
    from jsonschema import ValidationError  # type: ignore[import-untyped]
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        prepared = prepare_config(document)
        validate_config(prepared)
    except (ValidationError, ValueError, KeyError) as error:
        message = error.message if isinstance(error, ValidationError) else str(error)
        raise ConfigError(str(path), message, "See the cluster YAML reference of Ray") from error
    if prepared["provider"]["type"] == "aws":
        for name, node_type in prepared["available_node_types"].items():
            _ec2_parameters(f"{path}: {name}", node_type["node_config"])
        _require(path, prepared["provider"].get("cache_stopped_nodes") is False, "stopped nodes are kept",
                 "Set provider.cache_stopped_nodes to false: a stopped node still pays for its disk")  # fmt: skip
    head = prepared["available_node_types"][prepared["head_node_type"]]
    _require(path, head["resources"].get("CPU") == 0, "tasks may run on the head", "Set its resources to {CPU: 0}")
    _pinned(path, prepared["docker"].get("image", ""))
    options = " ".join(prepared["docker"].get("run_options", ()))
    _require(path, "RAY_AUTH_MODE=token" in options, "token authentication is not on",
             "Add `--env RAY_AUTH_MODE=token` to docker.run_options")  # fmt: skip
    starts = " ".join(prepared["head_start_ray_commands"])
    _require(path, "--dashboard-host=127.0.0.1" in starts, "the dashboard listens on every interface",
             "Start the head with --dashboard-host=127.0.0.1 and use `ray dashboard`")  # fmt: skip


def _ec2_parameters(where: str, node_config: dict[str, Any]) -> None:
    from botocore.session import get_session  # type: ignore[import-untyped]
    from botocore.validate import ParamValidator  # type: ignore[import-untyped]

    run_instances = get_session().get_service_model("ec2").operation_model("RunInstances")
    # Ray spells the list of subnets so, and adds the counts itself.
    parameters = {k: v for k, v in node_config.items() if k != "SubnetIds"} | {"MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(parameters, run_instances.input_shape)
    if report.has_errors():
        raise ConfigError(where, report.generate_report(), "Use the parameters of EC2's RunInstances")


def _kuberay(path: Path, document: dict[str, Any]) -> None:
    from jsonschema import Draft202012Validator

    kind = document["kind"]
    if kind not in CLUSTER_SPEC or document.get("apiVersion") != "ray.io/v1":
        raise ConfigError(str(path), f"{document.get('apiVersion')} {kind}", "Give a RayJob or RayService of ray.io/v1")
    schema = json.loads((HERE / "kuberay.schema.json").read_text(encoding="utf-8"))
    validator = Draft202012Validator({"$ref": f"#/$defs/{kind}", **schema})
    for error in validator.iter_errors(document.get("spec", {})):
        where = ".".join(["spec", *map(str, error.absolute_path)])
        raise ConfigError(f"{path}: {where}", error.message, f"See KubeRay's reference of {kind}")
    cluster = document["spec"].get(CLUSTER_SPEC[kind])
    if cluster is None:
        raise ConfigError(str(path), f"{CLUSTER_SPEC[kind]} is missing", "Describe the cluster there")
    _require(path, cluster.get("authOptions", {}).get("mode") == "token", "token authentication is not on",
             f"Set {CLUSTER_SPEC[kind]}.authOptions.mode to token")  # fmt: skip
    _require(path, cluster["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") == "0",
             "tasks may run on the head", 'Set headGroupSpec.rayStartParams.num-cpus to "0"')  # fmt: skip
    if kind == "RayJob":
        _require(path, document["spec"].get("shutdownAfterJobFinishes") is True, "the cluster outlives its job",
                 "Set shutdownAfterJobFinishes to true")  # fmt: skip
    else:
        _serve_config(path, document["spec"].get("serveConfigV2", ""))
    for image in _images(document):
        _pinned(path, image)


def _serve_config(path: Path, text: str) -> None:
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    try:
        ServeDeploySchema.model_validate(yaml.safe_load(text))
    except (ValidationError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: spec.serveConfigV2", str(error), "See Ray Serve's config file reference") from error


def _images(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("image"), str):
            yield node["image"]
        node = list(node.values())
    for child in node if isinstance(node, list) else ():
        yield from _images(child)


def _pinned(path: Path, image: str) -> None:
    tag = image.rsplit("/", 1)[-1].partition(":")[2]
    _require(path, "@sha256:" in image or tag not in ("", "latest", "nightly"), f"image {image!r} is not pinned",
             "Name a version or a digest")  # fmt: skip


def _require(path: Path, holds: bool, what: str, remedy: str) -> None:
    if not holds:
        raise ConfigError(str(path), what, remedy)


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Check the files named, or those that ship; 0 if all are good, else 2 with a line for each that is not."""
    parser = argparse.ArgumentParser(prog="python -m cluster.validate", description="Check cluster files offline.")
    parser.add_argument("files", nargs="*", type=Path, default=SHIPPED, metavar="FILE")
    status = 0
    for path in parser.parse_args(arguments).files:
        try:
            check(path)
            say(f"{path}: good")
        except BitdistillError as error:
            say(str(error))
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
