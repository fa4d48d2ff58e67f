"""The application as users run it: Ray Serve, real HTTP, clients that hang up."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.references import free_port, greedy, greedy_text, prompt_ids
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow

SLOTS, QUEUE = 2, 2
JSON = {"content-type": "application/json"}
LONG = {"model": "tiny", "prompt": "A", "temperature": 0, "max_tokens": 8000}  # about ten seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("serve") / "tiny", max_position_embeddings=16384)


@pytest.fixture(scope="module")
def client(ray_session: None, folder: Path) -> Iterator[httpx.Client]:
    from ray import serve

    from bitdistill_serve.app import build

    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    args = {"model": str(folder), "slots": str(SLOTS), "queue": str(QUEUE), "slot_tokens": "8192", "threads": "1"}
    serve.run(build(args), name="under-test", route_prefix="/")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        yield client
    serve.shutdown()


def until(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def running(client: httpx.Client) -> int:
    return int(client.get("/health").json()["running"])


def test_a_completion_over_http(client: httpx.Client) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": "The quick", "temperature": 0, "max_tokens": 12}
    answer = client.post("/v1/completions", json=body)
    assert answer.json()["choices"][0]["text"] == greedy_text(prompt_ids("The quick"), 12)
    assert answer.headers.get_list("x-request-id") == [answer.json()["id"].removeprefix("cmpl-")]
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


def test_rays_agents_export_the_metrics(client: httpx.Client) -> None:
    import ray

    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    until(lambda: "ray_bitdistill_serve_slots{" in httpx.get(url).text)
    assert 'model="tiny"' in next(line for line in httpx.get(url).text.splitlines()
                                  if line.startswith("ray_bitdistill_serve_generated_tokens_total{"))  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_slot(client: httpx.Client, stream: bool) -> None:
    until(lambda: running(client) == 0)
    body = LONG | {"stream": stream}
    with httpx.Client(base_url=client.base_url) as impatient:
        if stream:
            with impatient.stream("POST", "/v1/completions", json=body, timeout=60) as response:
                lines = response.iter_lines()  # kept: httpx hangs up when it is collected
                assert next(lines).startswith("data: ")
                assert running(client) == 1
        else:
            with ThreadPoolExecutor(1) as thread:
                answer = thread.submit(impatient.post, "/v1/completions", json=body, timeout=2)
                until(lambda: running(client) == 1)
            assert isinstance(answer.exception(), httpx.ReadTimeout)
    until(lambda: running(client) == 0)


def test_more_than_the_queue_holds_is_refused(client: httpx.Client) -> None:
    until(lambda: running(client) == 0)
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: client.post("/v1/completions", json=LONG | {"max_tokens": 500}), range(8)))
    assert {answer.status_code for answer in answers} == {200, 429}
    assert sum(answer.status_code == 200 for answer in answers) >= SLOTS + QUEUE
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)


def test_a_new_version_takes_over_without_dropping_a_stream(client: httpx.Client, folder: Path) -> None:
    from ray import serve

    from bitdistill_serve.app import build

    until(lambda: running(client) == 0)
    body = LONG | {"stream": True, "max_tokens": 3000, "logit_bias": {"0": -100}}
    with client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        with ThreadPoolExecutor(1) as thread:
            args = {"model": str(folder), "name": "new", "slots": "1", "queue": "0", "threads": "1"}
            update = thread.submit(serve.run, build(args), name="under-test", route_prefix="/")
            rest = [line for line in lines if line]
            update.result()
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]
    until(lambda: client.get("/v1/models").json()["data"][0]["id"] == "new")


def test_several_models_by_name(client: httpx.Client, folder: Path, tmp_path: Path) -> None:
    """Last of those that share the server: it replaces the application."""
    from ray import serve

    from bitdistill_serve.app import build

    other = save_tiny(tmp_path / "other", "qwen3")
    models = [{"model": str(folder), "name": "tiny"}, {"model": str(other), "name": "other"}]
    serve.run(build({"models": models, "threads": 1, "slots": 2, "slot_tokens": 4096, "drain_s": 1}),
              name="under-test", route_prefix="/")  # fmt: skip
    until(lambda: len(client.get("/v1/models").json()["data"]) == 2)
    expected = {"tiny": greedy_text(prompt_ids("The quick"), 12)}
    wanted = greedy(tiny_model("qwen3"), prompt_ids("The quick"), 12)
    expected["other"] = str(tiny_tokenizer().decode(wanted, skip_special_tokens=True))
    for name, text in expected.items():
        body: dict[str, Any] = {"model": name, "prompt": "The quick", "temperature": 0, "max_tokens": 12}
        answer = client.post("/v1/completions", json=body)
        assert answer.json()["choices"][0]["text"] == text
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
            chunks = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
        assert client.get(f"/v1/models/{name}").json()["id"] == name
    assert client.post("/v1/completions", json={"model": "none", "prompt": "A"}).status_code == 404
    assert client.post("/v1/completions", json={"prompt": "A"}).json()["error"]["param"] == "model"
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/metrics").text.count('bitdistill_serve_slots{model="') == 2
    with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        until(lambda: client.get("/health").json()["models"]["tiny"]["running"] == 1)
    until(lambda: client.get("/health").json()["models"]["tiny"]["running"] == 0)


def test_the_command_serves_until_it_is_interrupted(folder: Path) -> None:
    """By HAProxy, where Ray Serve brings it: hang-ups and refusals come through it as they should."""
    port = free_port()
    command = [sys.executable, "-m", "bitdistill_serve.cli", str(folder), "--port", str(port), "--slots", "2"]
    command += ["--queue", "2", "--slot-tokens", "8192", "--threads", "1", "--body-bytes", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ready = next(line for line in server.stdout if "is ready" in line)
        assert f"http://127.0.0.1:{port}/v1" in ready
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
            test_a_completion_over_http(client)
            for stream in (False, True):
                test_a_client_that_hangs_up_frees_its_slot(client, stream)
            test_more_than_the_queue_holds_is_refused(client)
            assert client.post("/v1/completions", content=b"[" * 99_999, headers=JSON).status_code == 400
            assert client.post("/v1/completions", content=b"x" * 10_000_000, headers=JSON).status_code == 413
            assert client.get("/v1/models", headers={f"x-{i}": "y" for i in range(120)}).status_code in (400, 431)
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=120)
    assert server.returncode == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")
