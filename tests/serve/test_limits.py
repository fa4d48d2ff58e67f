"""Limits, keys and hostile input: every refusal is a 4xx in OpenAI's schema, and whoever is served does not notice."""

from __future__ import annotations

import asyncio
import json
import logging
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bitdistill_ray.errors import ServeError
from bitdistill_serve.cli import main
from bitdistill_serve.errors import ApiError
from bitdistill_serve.keys import KeyFile, make_key
from bitdistill_serve.rates import Bucket, Client, Own
from tests.serve.in_process import CHAT, GREEDY, ask, error, serving, until
from tests.serve.references import greedy_text, prompt_ids

JSON = {"Content-Type": "application/json"}
BODY = GREEDY | {"prompt": "A"}

HOSTILE: dict[str, tuple[bytes, dict[str, str], int]] = {
    "deep lists": (b'{"model": "tiny", "prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", JSON, 400),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, JSON, 400),
    "deep schema": (
        json.dumps(BODY).encode()[:-1] + b', "guided_json": ' + b'{"items":' * 900 + b"{}" + b"}" * 901,
        JSON,
        400,
    ),
    "a long number": (b'{"model": "tiny", "prompt": "A", "seed": ' + b"9" * 100_000 + b"}", JSON, 400),
    "an infinite number": (b'{"model": "tiny", "prompt": "A", "temperature": 1e999}', JSON, 400),
    "no number": (b'{"model": "tiny", "prompt": "A", "logit_bias": {"1": NaN}}', JSON, 400),
    "a huge count": (b'{"model": "tiny", "prompt": "A", "n": 1' + b"0" * 300 + b"}", JSON, 400),
    "half a character": (b'{"model": "tiny", "prompt": "\xf0\x9f"}', JSON, 400),
    "ten megabytes": (b'{"model": "tiny", "prompt": "' + b"a" * 10_000_000 + b'"}', JSON, 413),
    "three megabytes": (b'{"model": "tiny", "prompt": "' + b"a " * 1_500_000 + b'"}', JSON, 400),
    "a million tokens": (b'{"model": "tiny", "prompt": [' + b"1," * 1_000_000 + b"1]}", JSON, 400),
    "another type": (b"model=tiny", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    "no type": (b"{}", {}, 415),
    "many headers": (b"{}", JSON | {f"x-{i}": "1" for i in range(200)}, 431),
    "long headers": (b"{}", JSON | {"x-long": "a" * 40_000}, 431),
    "a length of its own": (json.dumps(BODY).encode(), JSON | {"Content-Length": "9" * 30}, 413),
}


def test_hostile_input_is_refused_and_a_running_stream_does_not_notice() -> None:
    async def scenario() -> None:
        async with serving(slots=2, slot_tokens=256) as (client, service):
            body = BODY | {"max_tokens": 250}
            running = asyncio.create_task(client.post("/v1/completions", json=body))
            for name, (content, headers, status) in HOSTILE.items():
                refused = await client.post("/v1/completions", content=content, headers=headers)
                assert (name, refused.status_code) == (name, status)
                error(refused, status)
                assert len(refused.content) < 2000
            answer = (await running).json()["choices"][0]
            assert answer["text"] == greedy_text(prompt_ids("A"), 250)
            assert service.engine.health().waiting == 0

    asyncio.run(scenario())


def test_a_slow_body_is_given_up() -> None:
    async def drip() -> AsyncIterator[bytes]:
        yield b'{"model"'
        await asyncio.sleep(30)

    async def scenario() -> None:
        async with serving(body_s=0.05) as (client, _):
            error(await client.post("/v1/completions", content=drip(), headers=JSON), 408)
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200

    asyncio.run(scenario())


def test_what_no_route_answers_is_refused_in_the_same_schema() -> None:
    async def scenario() -> None:
        async with serving() as (client, _):
            refused = await client.get("/v1/completions")
            error(refused, 405)
            assert refused.headers["allow"] == "POST"
            error(await client.post("/v1/nothing", json={}), 404)
            for answer in (refused, await client.get("/v1/models")):
                assert len(answer.headers["x-request-id"]) == 32
            own = await client.post("/v1/completions", json=BODY, headers={"x-request-id": "mine-1"})
            assert own.json()["id"] == "cmpl-mine-1"

    asyncio.run(scenario())


def test_prompts_and_answers_have_limits_of_their_own() -> None:
    long = BODY | {"prompt": "The quick brown fox"}
    assert error(ask("/v1/completions", long, max_prompt_tokens=3), 400)["code"] == "context_length_exceeded"
    assert ask("/v1/chat/completions", CHAT | {"max_tokens": 50}, max_output_tokens=5).json()["usage"][
        "completion_tokens"
    ] == 5  # fmt: skip


def test_one_client_may_have_only_so_much_at_a_time() -> None:
    async def scenario() -> None:
        async with serving(concurrency=2) as (client, service):
            first = asyncio.create_task(client.post("/v1/completions", json=BODY | {"n": 2, "max_tokens": 100}))
            await until(lambda: service.engine.health().running > 0)
            assert "2 of your 2" in error(await client.post("/v1/completions", json=BODY), 429)["message"]
            await first
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200

    asyncio.run(scenario())


def test_deadlines_are_told_by_status() -> None:
    assert error(ask("/v1/completions", BODY, queue_s=1e-9), 503)["code"] == "queue_timeout"
    assert error(ask("/v1/completions", BODY, timeout_s=1e-9), 504)["code"] == "timeout"


def key_file(folder: Path, capsys: pytest.CaptureFixture[str], *rates: str) -> tuple[Path, str]:
    path = folder / "keys.json"
    assert main(["key", "--file", str(path), "--name", "me", *rates]) == 0
    return path, capsys.readouterr().out.strip()


def test_keys_are_asked_for_and_never_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path, secret = key_file(tmp_path, capsys)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret not in path.read_text()
    caplog.set_level(logging.DEBUG)

    async def scenario() -> None:
        async with serving(keys=str(path)) as (client, _):
            known = {"Authorization": f"Bearer {secret}"}
            for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": f"Basic {secret}"}):
                refused = await client.post("/v1/completions", json=BODY, headers=headers)
                assert error(refused, 401)["code"] == "invalid_api_key"
                assert refused.headers["www-authenticate"] == "Bearer"
                assert (await client.get("/v1/models", headers=headers)).status_code == 401
            assert (await client.post("/v1/completions", json=BODY, headers=known)).status_code == 200
            assert (await client.post("/v1/completions", json={"a": secret}, headers=known)).status_code == 400
            assert (await client.get("/health")).status_code == 200
            assert secret not in (await client.get("/metrics")).text

    asyncio.run(scenario())
    assert secret not in caplog.text
    assert secret not in capsys.readouterr().err


def test_where_no_place_is_left_a_request_is_refused_unread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But for the key: nobody without one hears how busy the server is."""
    path, secret = key_file(tmp_path, capsys)

    async def scenario() -> None:
        async with serving(keys=str(path), slots=1, queue=0) as (client, service):
            known = {"Authorization": f"Bearer {secret}"}
            long = BODY | {"max_tokens": 100}
            first = asyncio.create_task(client.post("/v1/completions", json=long, headers=known))
            await until(lambda: service.engine.health().running > 0)
            for place in ("/v1/completions", "/v1/chat/completions", "/v1/classify"):
                refused = await client.post(place, content=b"{", headers=JSON | known)
                assert error(refused, 429)["code"] == "queue_full"
                assert int(refused.headers["retry-after"]) >= 1
                assert (await client.post(place, json=BODY)).status_code in (400, 401)
                counted = f'route="{place}",status="429"'
                assert counted in (await client.get("/metrics", headers=known)).text
            assert (await client.get("/v1/models", headers=known)).status_code == 200
            assert (await first).status_code == 200
            assert (await client.post("/v1/completions", content=b"{", headers=JSON | known)).status_code == 400

    asyncio.run(scenario())


def test_a_key_has_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, secret = key_file(tmp_path, capsys, "--requests-per-minute", "2", "--tokens-per-minute", "20")

    async def scenario() -> None:
        async with serving(keys=str(path)) as (client, _):
            client.headers["Authorization"] = f"Bearer {secret}"
            assert (await client.post("/v1/completions", json=BODY | {"max_tokens": 100})).status_code == 200
            refused = await client.post("/v1/completions", json=BODY)  # in debt by its answer
            assert error(refused, 429)["code"] == "rate_limit_exceeded"
            assert int(refused.headers["retry-after"]) > 200
            refused = await client.get("/v1/models")
            assert 20 < int(refused.headers["retry-after"]) <= 30

    asyncio.run(scenario())


def test_a_bucket_fills_with_time() -> None:
    now = 0.0
    bucket = Bucket(60, lambda: now)
    bucket.take(60)
    assert bucket.wait_s(30) == 30
    now = 20.0
    assert bucket.wait_s(30) == 10
    assert bucket.wait_s(10**9) == 40  # more than it ever holds: when it is full
    now = 1000.0
    assert bucket.wait_s(60) == 0
    bucket.take(90)
    assert bucket.wait_s(1) == 31
    assert Bucket(None).wait_s(10**9) == 0
    client = Client("c", Own(Bucket(1)))
    asyncio.run(client.ask())
    with pytest.raises(ApiError):
        asyncio.run(client.ask())


def test_a_file_that_is_no_key_file_is_refused_without_its_contents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.json"
    path.write_text('{"keys": [{"name": "me", "sha256": "my-secret"}]}')
    with pytest.raises(ServeError, match=r"keys\.0\.sha256") as refused:
        KeyFile.read(str(path))
    assert "my-secret" not in str(refused.value)
    assert main(["key", "--file", str(path), "--name", "you"]) == 2
    secret, key = make_key("a", requests_per_minute=None, tokens_per_minute=None)
    assert KeyFile(keys=(key,)).find(secret) is key
    assert KeyFile(keys=(key,)).find(secret + "x") is None
