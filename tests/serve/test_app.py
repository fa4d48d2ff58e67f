"""The application that Serve is given: one model alone, several behind a router, the shipped configuration file."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.schema import ServeDeploySchema

from bitdistill_ray.errors import ServeError
from bitdistill_serve.app import build
from bitdistill_serve.metrics import Metrics, merged
from tests.serve.in_process import GREEDY, serving

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "cluster" / "serve.yaml"


def label(sample: Any) -> str | None:
    return sample.labels.get("status") or sample.labels.get("end")


def deployments(application: Any) -> dict[str, Any]:
    """The deployments of a bound application by name."""
    found: dict[str, Any] = {}

    def visit(node: Any) -> None:
        if type(node).__name__ == "Application":
            bound = node._bound_deployment
            found[bound.name] = bound
            for argument in (*node._args, *node._kwargs.values()) if hasattr(node, "_args") else bound.init_args:
                visit(argument)
        elif isinstance(node, dict):
            for value in node.values():
                visit(value)

    visit(application)
    return found


def test_the_shipped_configuration_is_one_that_serve_takes() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(SHIPPED.read_text()))
    (application,) = config.applications
    assert application.import_path == "bitdistill_serve.app:build"
    made = deployments(build(application.args))
    assert set(made) == {"router", "rates", "decoder-student-int2", "decoder-student-int3"}
    autoscaling = made["decoder-student-int2"]._deployment_config.autoscaling_config
    assert (autoscaling.min_replicas, autoscaling.max_replicas, autoscaling.target_ongoing_requests) == (1, 8, 16)
    assert made["decoder-student-int3"].ray_actor_options["num_cpus"] == 14


def test_one_model_answers_without_a_router() -> None:
    made = deployments(build({"model": "m", "slots": 4, "queue": 2}))
    assert set(made) == {"decoder"}
    assert made["decoder"].max_ongoing_requests == 4 + 2 + 32


def test_a_model_with_several_replicas_is_behind_a_router_and_shares_the_rates_of_its_keys() -> None:
    given = {"model": "m", "slots": 40, "max_replicas": 8}
    made = deployments(build(given))
    assert set(made) == {"router", "decoder"}
    assert made["router"].num_replicas == 3  # 320 streams
    assert set(deployments(build(given | {"keys": "keys.json"}))) == {"router", "decoder", "rates"}
    assert set(deployments(build({"model": "m", "keys": "keys.json"}))) == {"decoder"}


@pytest.mark.parametrize("module", ["router", "ledger"])
def test_what_holds_no_engine_imports_no_torch(module: str) -> None:
    program = f"import sys, bitdistill_serve.{module}; print(sorted({{'torch', 'transformers'}} & {{*sys.modules}}))"
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "serve")))}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | paths, capture_output=True, check=True)
    assert done.stdout == b"[]\n"


def test_models_must_be_told_apart() -> None:
    with pytest.raises(ServeError, match="two are called 'a'"):
        build({"models": [{"model": "a"}, {"model": "x/a"}]})
    with pytest.raises(ServeError, match="models: is not a list"):
        build({"models": "a"})
    with pytest.raises(ServeError, match="min_replicas 3"):
        build({"model": "a", "min_replicas": 3})


def test_metrics_are_those_that_prometheus_reads() -> None:
    async def scenario() -> str:
        async with serving() as (client, _):
            await client.post("/v1/completions", json=GREEDY | {"prompt": "The quick"})
            await client.post("/v1/completions", json={})
            page = await client.get("/metrics")
            assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
            return page.text

    page = asyncio.run(scenario())
    values = {
        (
            sample.name.removeprefix("bitdistill_serve_"),
            label(sample),
        ): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }
    assert values["generated_tokens_total", None] == 8
    assert values["time_to_first_token_seconds_count", None] == 1
    assert values["time_per_token_seconds_count", None] >= 1
    assert values["requests_total", "200"] == 1
    assert values["requests_total", "400"] == 1
    assert values["generations_total", "length"] == 1
    assert values["kv_capacity_tokens", None] == 4 * 128
    assert values["running", None] == 0

    other = Metrics("other", {"decoder": "TorchDecoder", "instructions": "scalar"})
    other.tokens.inc(5)
    every = list(text_string_to_metric_families(merged([page.encode(), other.text({})]).decode()))
    assert len({family.name for family in every}) == len(every)
    tokens = next(family for family in every if family.name == "bitdistill_serve_generated_tokens")
    assert {s.labels["model"]: s.value for s in tokens.samples if s.name.endswith("_total")} == {"tiny": 8, "other": 5}
