"""The HTTP routes, in-process, over the engine and a real tiny decoder."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from torch import Tensor

from bitdistill_ray import generate
from bitdistill_ray.decode.torch_decoder import TorchDecoder
from tests.serve.in_process import CHAT, CHAT_PROMPT, GREEDY, Json, ask, error, events, serving, until
from tests.serve.references import greedy_text, prompt_ids, shared_model
from tests.tiny_models import save_tiny, tiny_tokenizer


def test_a_completion_is_the_models_own_text() -> None:
    answer = ask("/v1/completions", GREEDY | {"prompt": "The quick"}).json()
    text = greedy_text(prompt_ids("The quick"), 8)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "tiny"
    assert answer["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}]
    prompt_tokens = len(prompt_ids("The quick"))
    assert answer["usage"] == {
        "prompt_tokens": prompt_tokens, "completion_tokens": 8, "total_tokens": prompt_tokens + 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip


def test_prompts_may_be_texts_or_token_ids() -> None:
    texts = ["The quick", "dog."]
    ids = [list(prompt_ids(text)) for text in texts]
    wanted = [greedy_text(prompt_ids(text), 8) for text in texts]
    for prompt in (texts, ids):
        answer = ask("/v1/completions", GREEDY | {"prompt": prompt}).json()
        assert [(c["index"], c["text"]) for c in answer["choices"]] == list(enumerate(wanted))
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert ask("/v1/completions", GREEDY | {"prompt": ids[1]}).json()["choices"][0]["text"] == wanted[1]


def test_n_choices_differ_and_a_seed_repeats_them() -> None:
    body = {"model": "tiny", "prompt": ["A", "dog."], "n": 2, "seed": 3, "max_tokens": 12}
    first, again = (ask("/v1/completions", body).json() for _ in range(2))
    texts = [choice["text"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2, 3]
    assert texts[0] != texts[1]
    assert texts == [choice["text"] for choice in again["choices"]]
    assert first["usage"]["prompt_tokens"] == len(prompt_ids("A")) + len(prompt_ids("dog."))


def test_a_sampled_answer_equals_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampling = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "min_p": 0.01, "frequency_penalty": 0.5,
                "repetition_penalty": 1.2, "presence_penalty": 0.25, "seed": 7, "max_tokens": 24}  # fmt: skip
    flags = [part for name, value in sampling.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert generate.main([str(save_tiny(tmp_path)), "--prompt", "The quick", *flags, "--logit-bias", "70=2"]) == 0
    body = {"model": "tiny", "prompt": "The quick", "logit_bias": {"70": 2}} | sampling
    assert capsys.readouterr().out.endswith(ask("/v1/completions", body).json()["choices"][0]["text"] + "\n")


def test_a_stream_adds_up_to_the_whole_answer() -> None:
    body = GREEDY | {"prompt": ["The quick", "雨が"], "max_tokens": 16}
    chunks = events(ask("/v1/completions", body | {"stream": True}))
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    for index, prompt in enumerate(body["prompt"]):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == greedy_text(prompt_ids(prompt), 16)
        assert [choice["finish_reason"] for choice in own][:-1] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] in ("stop", "length")


def test_a_stream_tells_its_usage_when_asked() -> None:
    body = GREEDY | {"prompt": "A", "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(ask("/v1/completions", body))
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = events(ask("/v1/completions", body, event_ms=0))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == last["usage"]["completion_tokens"] == 8


def test_a_chat_is_written_by_the_template() -> None:
    answer = ask("/v1/chat/completions", CHAT).json()
    text = greedy_text(prompt_ids(CHAT_PROMPT), 8)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": text}
    assert answer["usage"]["prompt_tokens"] == len(prompt_ids(CHAT_PROMPT))

    parts = CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": "The dog."}]}]}
    assert ask("/v1/chat/completions", parts).json()["choices"] == answer["choices"]


def test_a_chat_stream_begins_with_the_role_and_ends_with_the_reason() -> None:
    chunks = events(ask("/v1/chat/completions", CHAT | {"stream": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [delta.get("role") for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    assert "".join(delta.get("content", "") for delta in deltas) == greedy_text(prompt_ids(CHAT_PROMPT), 8)
    assert deltas[-1] == {}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [*[None] * (len(deltas) - 1), "length"]


def test_a_chat_without_a_limit_may_fill_its_slot() -> None:
    body = {k: v for k, v in CHAT.items() if k != "max_tokens"}
    answer = ask("/v1/chat/completions", body, slot_tokens=len(prompt_ids(CHAT_PROMPT)) + 20).json()
    assert answer["usage"]["completion_tokens"] > 16 or answer["choices"][0]["finish_reason"] == "stop"


def test_a_stop_string_is_not_part_of_the_answer() -> None:
    whole = greedy_text(prompt_ids("The quick"), 8)
    stop = whole[3:5]
    body = GREEDY | {"prompt": "The quick", "stop": stop}
    choice = ask("/v1/completions", body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    streamed = events(ask("/v1/completions", body | {"stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == whole[: whole.index(stop)]


def test_models_and_health() -> None:
    async def scenario() -> None:
        async with serving() as (client, _):
            listed = (await client.get("/v1/models")).json()
            assert listed["object"] == "list"
            assert [model["id"] for model in listed["data"]] == ["tiny"]
            assert (await client.get("/v1/models/tiny")).json() == listed["data"][0]
            assert error(await client.get("/v1/models/other"), 404)["code"] == "model_not_found"
            health = await client.get("/health")
            assert (health.status_code, health.json()["status"], health.json()["slots"]) == (200, "ok", 4)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        ("/v1/completions", {"temprature": 1}, "temprature"),
        ("/v1/completions", {"temperature": 3}, "temperature"),
        ("/v1/completions", {"temperature": float("nan")}, "temperature"),
        ("/v1/completions", {"max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"n": 0}, "n"),
        ("/v1/completions", {"n": 100}, None),
        ("/v1/completions", {"stop": ["a"] * 17}, "stop"),
        ("/v1/completions", {"logprobs": 21}, "logprobs"),
        ("/v1/completions", {"logprobs": True}, "logprobs"),
        ("/v1/completions", {"logit_bias": {"320": 1}}, "logit_bias"),
        ("/v1/completions", {"logit_bias": {"3": 101}}, "logit_bias"),
        ("/v1/completions", {"guided_regex": "("}, "guided_regex"),
        ("/v1/completions", {"guided_json": {"type": "nothing"}}, "guided_json"),
        ("/v1/completions", {"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice"),
        ("/v1/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": [1, -1]}, "prompt"),
        ("/v1/completions", {"prompt": [320]}, "prompt"),
        ("/v1/completions", {"prompt": [5] * 128}, "prompt"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "Hi"}]}, "messages.0.role"),
        ("/v1/chat/completions", {"tools": [{"type": "function"}]}, "tools"),
        ("/v1/chat/completions", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"response_format": {"type": "yaml"}}, "response_format"),
    ],
)
def test_a_bad_request_names_its_parameter(path: str, change: Json, param: str | None) -> None:
    body = (CHAT if "chat" in path else GREEDY | {"prompt": "A"}) | change

    async def scenario() -> httpx.Response:
        async with serving() as (client, _):
            return await client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})

    refused = error(asyncio.run(scenario()), 400)
    assert refused["type"] == "invalid_request_error"
    assert (refused["param"] or "").startswith(param or "")
    assert (param is None) == (refused["param"] is None)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b'"text"',
        b"[1]",
        b"\xff",
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "\\ud800", "prompt": ""}',
        b'{"model": "tiny", "prompt": "", "\\ud800": 1}',
    ],
)
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    async def scenario() -> httpx.Response:
        async with serving() as (client, _):
            return await client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})

    error(asyncio.run(scenario()), 400)


def test_parameters_at_their_defaults_and_labels_are_taken() -> None:
    harmless = {"user": "me", "logit_bias": {}, "best_of": 1, "echo": False, "suffix": None, "presence_penalty": 0}
    assert ask("/v1/completions", GREEDY | {"prompt": "A"} | harmless).status_code == 200


def test_another_models_name_is_not_found() -> None:
    assert error(ask("/v1/completions", GREEDY | {"model": "gpt-4", "prompt": "A"}), 404)["param"] == "model"
    assert error(ask("/v1/nothing", {}), 404)["type"] == "invalid_request_error"


def test_a_model_without_a_chat_template_says_so() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert "chat template" in error(ask("/v1/chat/completions", CHAT, tokenizer=tokenizer), 400)["message"]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert "must alternate" in error(ask("/v1/chat/completions", CHAT, tokenizer=tokenizer), 400)["message"]


def test_a_full_queue_is_429_with_a_time_to_wait() -> None:
    async def scenario() -> None:
        async with serving(slots=1, queue=0) as (client, service):
            first = asyncio.create_task(client.post("/v1/completions", json=GREEDY | {"prompt": "A", "max_tokens": 99}))
            await until(lambda: service.engine.health().running == 1)
            refused = await client.post("/v1/completions", json=GREEDY | {"prompt": "A"})
            assert error(refused, 429)["type"] == "rate_limit_error"
            assert int(refused.headers["retry-after"]) >= 1
            assert (await first).status_code == 200
            assert (await client.post("/v1/completions", json=GREEDY | {"prompt": "A"})).status_code == 200

    asyncio.run(scenario())


class PacedDecoder(TorchDecoder):
    """The real decoder, which waits for leave before each step."""

    def __init__(self, *, slots: int) -> None:
        super().__init__(shared_model(), slots=slots, slot_tokens=256)
        self.leave = threading.Semaphore(0)

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        self.leave.acquire()
        return super().step(slots, tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_given_up_frees_its_slot(stream: bool) -> None:
    async def scenario() -> None:
        decoder = PacedDecoder(slots=1)
        async with serving(decoder=decoder, queue=0) as (client, service):
            body = GREEDY | {"prompt": "A", "max_tokens": 250, "stream": stream}
            request = asyncio.create_task(client.post("/v1/completions", json=body))
            await until(lambda: service.engine.health().running == 1)
            request.cancel()  # what Serve does when a client hangs up
            await asyncio.wait([request])
            assert request.cancelled()
            decoder.leave.release()  # the step that was under way
            await until(lambda: service.engine.health().running == 0)
            decoder.leave.release(8)
            assert (await client.post("/v1/completions", json=GREEDY | {"prompt": "A"})).status_code == 200

    asyncio.run(asyncio.wait_for(scenario(), 60))
