"""The OpenAPI document is true: what it allows is answered as it says, and what it forbids is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from tests.serve.in_process import live

PROMISES = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]


@pytest.fixture(scope="module")
def schema() -> Iterator[Any]:
    with live(queue=256) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        schema.config.generation.with_security_parameters = False  # this server asks for no key, so none is missed
        yield schema


def check(schema: Any, path: str, examples: int) -> None:
    operation = next(iter(schema[path].values()))
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    cases = st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes])

    @given(case=cases)
    @settings(
        max_examples=examples,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    def answered(case: Any) -> None:
        if isinstance(case.body, dict) and case.body.get("model") and case.method == "POST":
            case.body["model"] = "tiny"  # the one that there is: else every answer is a 404
        case.call_and_validate(checks=PROMISES)

    answered()


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/classify", "/v1/models/{name}", "/health"]
)
def test_requests_of_the_document_are_answered_as_it_says(schema: Any, path: str) -> None:
    check(schema, path, 40)


@pytest.mark.soak
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/classify"])
def test_so_are_many_more(schema: Any, path: str) -> None:
    check(schema, path, 1000)


def test_the_document_names_every_route_and_its_key(schema: Any) -> None:
    document = schema.raw_schema
    assert set(document["paths"]) == {
        "/health", "/metrics", "/v1/models", "/v1/models/{name}", "/v1/completions", "/v1/chat/completions",
        "/v1/classify",
    }  # fmt: skip
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert bool(operation.get("security")) == path.startswith("/v1/")
    assert "text/event-stream" in document["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]
