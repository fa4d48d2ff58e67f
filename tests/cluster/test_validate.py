"""Shipped cluster files are good, and each mistake that costs a launch or a leak is found offline."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitdistill_ray.errors import ConfigError
from cluster.validate import SHIPPED, check, main

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")]
RAY_UP, RAY_JOB, RAY_SERVICE = SHIPPED
Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_good(path: Path) -> None:
    check(path)


def _node(document: dict[str, Any], name: str = "student") -> dict[str, Any]:
    node: dict[str, Any] = document["available_node_types"][name]
    return node


def _workers(document: dict[str, Any]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = document["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return groups


MISTAKES: dict[str, tuple[Path, Change, str]] = {
    "unknown key": (RAY_UP, lambda d: d.update(max_worker=3), "max_worker"),
    "fractional resource": (RAY_UP, lambda d: _node(d)["resources"].update(GPU=0.5), "0.5"),
    "bad head type": (RAY_UP, lambda d: d.update(head_node_type="boss"), "head"),
    "unknown node key": (RAY_UP, lambda d: _node(d).update(spot=True), "spot"),
    "unknown EC2 parameter": (RAY_UP, lambda d: _node(d)["node_config"].update(InstanceKind="x"), "InstanceKind"),
    "wrong EC2 type": (RAY_UP, lambda d: _node(d)["node_config"].update(InstanceType=4), "InstanceType"),
    "tasks on the head": (RAY_UP, lambda d: _node(d, "head").update(resources={"CPU": 4}), "head"),
    "nodes are kept": (RAY_UP, lambda d: d["provider"].update(cache_stopped_nodes=True), "stopped"),
    "floating image": (RAY_UP, lambda d: d["docker"].update(image="rayproject/ray:latest"), "not pinned"),
    "image without tag": (RAY_UP, lambda d: d["docker"].update(image="localhost:5000/ray"), "not pinned"),
    "no token": (RAY_UP, lambda d: d["docker"].update(run_options=[]), "token"),
    "open dashboard": (RAY_UP, lambda d: d.pop("head_start_ray_commands"), "every interface"),
    "a key written down": (RAY_UP, lambda d: d.update(metadata={"k": "AKIA" + "A" * 16}), "credential"),
    "unknown job field": (RAY_JOB, lambda d: d["spec"].update(entryPoint="x"), "entryPoint"),
    "wrong replicas": (RAY_JOB, lambda d: _workers(d)[0].update(maxReplicas="four"), "maxReplicas"),
    "group without name": (RAY_JOB, lambda d: _workers(d)[1].pop("groupName"), "groupName"),
    "unknown pod field": (RAY_JOB, lambda d: _workers(d)[0]["template"]["spec"].update(image="x"), "image"),
    "unknown auth mode": (RAY_JOB, lambda d: d["spec"]["rayClusterSpec"]["authOptions"].update(mode="on"), "mode"),
    "job without token": (RAY_JOB, lambda d: d["spec"]["rayClusterSpec"].pop("authOptions"), "token"),
    "cluster outlives job": (RAY_JOB, lambda d: d["spec"].update(shutdownAfterJobFinishes=False), "outlives"),
    "no cluster": (RAY_JOB, lambda d: d["spec"].pop("rayClusterSpec"), "missing"),
    "another kind": (RAY_JOB, lambda d: d.update(kind="RayTask"), "RayTask"),
    "service without token": (RAY_SERVICE, lambda d: d["spec"]["rayClusterConfig"].pop("authOptions"), "token"),
    "bad Serve config": (RAY_SERVICE, lambda d: d["spec"].update(serveConfigV2="apps: []"), "serveConfigV2"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str, tmp_path: Path) -> None:
    source, change, named = MISTAKES[name]
    document = copy.deepcopy(yaml.safe_load(source.read_text(encoding="utf-8")))  # aliases become copies
    change(document)
    broken = tmp_path / source.name
    broken.write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(named)) as error:
        check(broken)
    assert str(broken) in error.value.where


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00"])
def test_a_file_that_is_no_cluster_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        check(path)


def test_the_command_reports_every_file(tmp_path: Path) -> None:
    lines: list[str] = []
    assert main([str(RAY_JOB), str(tmp_path / "absent.yaml"), str(RAY_UP)], lines.append) == 2
    assert [line.endswith("good") for line in lines] == [True, False, True]


def _versions(path: Path, pattern: str) -> set[str]:
    return set(re.findall(pattern, path.read_text(encoding="utf-8")))


def test_one_ray_version_everywhere() -> None:
    constraints = RAY_UP.parent / "constraints.txt"
    tested = _versions(constraints, r"(?m)^ray==(\S+)")
    assert len(tested) == 1
    assert _versions(RAY_UP, r"rayproject/ray:([\d.]+)-") == tested
    assert _versions(RAY_JOB.parent / "Dockerfile", r"rayproject/ray:([\d.]+)-") == tested
    assert _versions(RAY_JOB, r'rayVersion: "([\d.]+)"') == tested
    assert _versions(RAY_SERVICE, r'rayVersion: "([\d.]+)"') == tested


def test_the_job_uses_keys_that_exist() -> None:
    """The entrypoint's overrides are resolved by the real recipe loader, so a renamed key is found here."""
    from bitdistill_ray.recipe import load

    spec = yaml.safe_load(RAY_JOB.read_text(encoding="utf-8"))["spec"]
    _python, _m, module, recipe, *overrides = spec["entrypoint"].split()
    assert module == "bitdistill_ray.train"
    load(recipe, overrides)


def test_the_service_uses_options_that_exist() -> None:
    from bitdistill_serve.options import ServeOptions

    spec = yaml.safe_load(RAY_SERVICE.read_text(encoding="utf-8"))["spec"]
    [application] = yaml.safe_load(spec["serveConfigV2"])["applications"]
    options = ServeOptions.parse(application["args"])
    [group] = spec["rayClusterConfig"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    assert options.threads is not None
    assert options.threads <= int(container["resources"]["limits"]["cpu"])
