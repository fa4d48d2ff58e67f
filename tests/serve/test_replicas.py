"""Several replicas of one model on a real Ray Serve: one that is killed, and rates that hold over all of them."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from bitdistill_serve.keys import KeyFile, make_key
from bitdistill_serve.shares import LOAN_S
from tests.serve.references import free_port, greedy_text, prompt_ids
from tests.serve.test_on_ray import until
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.slow

APPLICATION = "replicas"
RATES: dict[str, tuple[int | None, int | None]] = {  # of requests and of tokens
    "free": (None, None), "asks": (6, None), "reads": (None, 60), "once": (1, None), "often": (6000, None),
}  # fmt: skip
BODY: dict[str, Any] = {"model": "tiny", "prompt": "A", "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    """A file of keys, and what a client sends for each."""
    made = {name: make_key(name, requests_per_minute=asks, tokens_per_minute=reads) for name, (asks, reads) in
            RATES.items()}  # fmt: skip
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    path.write_text(KeyFile(keys=tuple(key for _, key in made.values())).model_dump_json())
    return path, {name: {"Authorization": f"Bearer {secret}"} for name, (secret, _) in made.items()}


@pytest.fixture(scope="module")
def client(
    ray_session: None, tmp_path_factory: pytest.TempPathFactory, keys: tuple[Path, dict[str, dict[str, str]]]
) -> Iterator[httpx.Client]:
    from ray import serve

    from bitdistill_serve.app import build

    folder, port = save_tiny(tmp_path_factory.mktemp("two") / "tiny", max_position_embeddings=8192), free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    args = {"model": str(folder), "slots": 2, "slot_tokens": 4096, "threads": 1, "keys": str(keys[0]), "drain_s": 1}
    serve.run(build(args | {"min_replicas": 2, "max_replicas": 2}), name=APPLICATION, route_prefix="/")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        yield client
    serve.shutdown()


def replicas(deployment: str) -> list[dict[str, Any]]:
    """What Serve knows of the running replicas of a deployment: their actors and processes."""
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()
    running: list[dict[str, Any]] = details["applications"][APPLICATION]["deployments"][deployment]["replicas"]
    return [replica for replica in running if replica["state"] == "RUNNING"]


def busy(deployment: str) -> list[dict[str, Any]]:
    """Those that a request is at; one that was killed may be listed for a while."""
    import ray

    found = []
    for replica in replicas(deployment):
        with suppress(ray.exceptions.RayActorError, ValueError):
            actor = ray.get_actor(replica["actor_name"], namespace="serve")
            if ray.get(actor.get_num_ongoing_requests.remote()):
                found.append(replica)
    return found


def resent(client: httpx.Client) -> float:
    line = next(line for line in client.get("/metrics").text.splitlines()
                if line.startswith('bitdistill_serve_resent_total{model="tiny"}'))  # fmt: skip
    return float(line.rpartition(" ")[2])


def test_the_rate_of_a_key_holds_over_both_replicas(
    client: httpx.Client, keys: tuple[Path, dict[str, dict[str, str]]]
) -> None:
    began_s = time.monotonic()
    answers = [client.get("/v1/models/tiny", headers=keys[1]["asks"]) for _ in range(48)]
    passed = sum(answer.status_code == 200 for answer in answers)
    assert {answer.status_code for answer in answers} == {200, 429}
    assert 6 <= passed <= 6 + math.ceil(6 * (time.monotonic() - began_s + LOAN_S) / 60)
    assert all(0 < int(answer.headers["retry-after"]) <= 10 for answer in answers if answer.status_code == 429)
    assert all(client.get("/v1/models/tiny", headers=keys[1]["often"]).status_code == 200 for _ in range(48))


def test_the_tokens_of_an_answer_are_owed_to_both_replicas(
    client: httpx.Client, keys: tuple[Path, dict[str, dict[str, str]]]
) -> None:
    def ask(max_tokens: int) -> httpx.Response:
        return client.post("/v1/completions", json=BODY | {"max_tokens": max_tokens}, headers=keys[1]["reads"])

    assert ask(100).status_code == 200
    until(lambda: ask(1).status_code == 429)  # the replica that wrote it knows at once, the other one soon
    answers = [ask(1) for _ in range(24)]
    assert {answer.status_code for answer in answers} == {429}
    assert all(answer.json()["error"]["code"] == "rate_limit_exceeded" for answer in answers)


def test_a_request_whose_replica_is_killed_is_answered_by_another(
    client: httpx.Client, keys: tuple[Path, dict[str, dict[str, str]]]
) -> None:
    until(lambda: len(replicas("decoder")) == 2)
    with ThreadPoolExecutor(1) as thread:
        body, before = BODY | {"max_tokens": 3000}, resent(client)
        answer = thread.submit(client.post, "/v1/completions", json=body, headers=keys[1]["free"])
        until(lambda: len(busy("decoder")) == 1)
        [holder] = busy("decoder")
        os.kill(holder["pid"], signal.SIGKILL)
        whole = answer.result()
    assert whole.status_code == 200, whole.text
    [choice] = whole.json()["choices"]
    assert choice["text"].startswith(greedy_text(prompt_ids("A"), 64))
    assert whole.json()["usage"]["completion_tokens"] == 3000
    assert resent(client) == before + 1


def test_a_stream_that_has_begun_is_cut_and_not_sent_again(
    client: httpx.Client, keys: tuple[Path, dict[str, dict[str, str]]]
) -> None:
    body, before, lines = BODY | {"max_tokens": 3000, "stream": True}, resent(client), []
    cut = suppress(httpx.RemoteProtocolError)
    with cut, client.stream("POST", "/v1/completions", json=body, headers=keys[1]["free"]) as stream:
        for line in stream.iter_lines():
            if not lines:
                [holder] = busy("decoder")
                os.kill(holder["pid"], signal.SIGKILL)
            lines.append(line)
    assert lines[0].startswith("data: ")
    assert "data: [DONE]" not in lines
    assert resent(client) == before


def test_without_its_ledger_each_replica_counts_for_itself(
    client: httpx.Client, keys: tuple[Path, dict[str, dict[str, str]]]
) -> None:
    until(lambda: len(replicas("decoder")) == 2)
    [ledger] = replicas("rates")
    os.kill(ledger["pid"], signal.SIGKILL)
    statuses = [client.get("/v1/models/tiny", headers=keys[1]["once"]).status_code for _ in range(24)]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) <= 3  # one of each replica, and one of a ledger that is back
