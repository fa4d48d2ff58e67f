"""What `logprobs` and `echo` tell, against a log-softmax of the plain model's logits over the whole text."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitdistill_serve.token_texts import TokenTexts
from tests.serve.in_process import CHAT, CHAT_PROMPT, GREEDY, Json, ask, events, serving
from tests.serve.references import greedy, prompt_ids, shared_model
from tests.serve.test_detokenize import byte_fallback
from tests.tiny_models import VOCAB_SIZE, tiny_tokenizer

PROMPT = "Numbers such as 1, 2, 3 and 雨が 4096 are words too."


def logprobs(ids: list[int]) -> torch.Tensor:
    """Row t: of the token after the first t + 1."""
    with torch.inference_mode():
        return shared_model()(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def check_lists(told: Json, ids: list[int], scored_from: int, top: int) -> None:
    """`told` is of ids[scored_from:]."""
    expected_TV = logprobs(ids)
    assert {len(values) for values in told.values()} == {len(ids) - scored_from}
    for i, token in enumerate(ids[scored_from:], start=scored_from):
        own, best = told["token_logprobs"][i - scored_from], told["top_logprobs"][i - scored_from]
        if i == 0:
            assert (own, best) == (None, None)
            continue
        assert own == pytest.approx(float(expected_TV[i - 1, token]), abs=1e-4)
        assert max(best.values()) == pytest.approx(max(own, float(expected_TV[i - 1].max()) if top else own), abs=1e-4)
        assert len(best) <= top + 1


def test_echo_scores_the_prompt_and_what_follows() -> None:
    ids = list(prompt_ids(PROMPT))
    body = GREEDY | {"prompt": [ids, ids[:9]], "echo": True, "logprobs": 3}
    choices = ask("/v1/completions", body | {"max_tokens": 4}).json()["choices"]
    for choice, prompt in zip(choices, (ids, ids[:9]), strict=True):
        text = prompt + greedy(shared_model(), prompt, 4)
        check_lists(choice["logprobs"], text, 0, 3)
        assert choice["text"] == tiny_tokenizer().decode(text)
    only_scored = ask("/v1/completions", body | {"max_tokens": 0}).json()
    check_lists(only_scored["choices"][0]["logprobs"], ids, 0, 3)
    assert (only_scored["choices"][0]["text"], only_scored["usage"]["completion_tokens"]) == (PROMPT, 0)
    single = ask("/v1/completions", body | {"prompt": ids[:1], "max_tokens": 1}).json()["choices"][0]
    check_lists(single["logprobs"], [ids[0], *greedy(shared_model(), ids[:1], 1)], 0, 3)


def test_offsets_are_places_in_the_text() -> None:
    choice = ask("/v1/completions", GREEDY | {"prompt": PROMPT, "echo": True, "logprobs": 0}).json()["choices"][0]
    told, text = choice["logprobs"], choice["text"]
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert text[offset : offset + len(token)] == token
    assert any(token.startswith("bytes:\\x") for token in told["tokens"])  # 雨 is three tokens
    assert [len(top) for top in told["top_logprobs"][1:]] == [1] * (len(told["tokens"]) - 1)


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_tells_the_same(echo: bool) -> None:
    body = GREEDY | {"prompt": PROMPT, "echo": echo, "logprobs": 2}
    whole = ask("/v1/completions", body).json()["choices"][0]
    streamed = [chunk["choices"][0] for chunk in events(ask("/v1/completions", body | {"stream": True}))]
    assert "".join(choice["text"] for choice in streamed) == whole["text"]
    lists = {name: [v for choice in streamed for v in choice["logprobs"][name]] for name in whole["logprobs"]}
    assert lists["tokens"] == whole["logprobs"]["tokens"]
    assert lists["text_offset"] == whole["logprobs"]["text_offset"]
    for got, wanted in zip(lists["token_logprobs"], whole["logprobs"]["token_logprobs"], strict=True):
        assert got == wanted if wanted is None else got == pytest.approx(wanted, abs=1e-5)
    assert list(map(bool, lists["top_logprobs"])) == list(map(bool, whole["logprobs"]["top_logprobs"]))


def test_a_chat_tells_its_tokens() -> None:
    body = CHAT | {"logprobs": True, "top_logprobs": 2}
    told = ask("/v1/chat/completions", body).json()["choices"][0]
    prompt = list(prompt_ids(CHAT_PROMPT))
    text = greedy(shared_model(), prompt, 8)
    expected_TV = logprobs(prompt + text)[len(prompt) - 1 :]
    content: list[dict[str, Any]] = told["logprobs"]["content"]
    assert b"".join(bytes(of["bytes"]) for of in content).decode(errors="replace") == tiny_tokenizer().decode(text)
    for t, of in enumerate(content):
        assert of["logprob"] == pytest.approx(float(expected_TV[t].max()), abs=1e-4)
        assert [a["logprob"] for a in of["top_logprobs"]] == pytest.approx(
            expected_TV[t].topk(2).values.tolist(), abs=1e-4
        )
    streamed = events(ask("/v1/chat/completions", body | {"stream": True}))
    pieces = [t["token"] for c in streamed for t in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert pieces == [of["token"] for of in content]


def test_logprobs_are_the_models_whatever_steers_the_choice() -> None:
    body = GREEDY | {"prompt": PROMPT, "logprobs": 1, "max_tokens": 1, "logit_bias": {"17": 100}}
    told = ask("/v1/completions", body).json()["choices"][0]["logprobs"]
    assert told["token_logprobs"][0] == pytest.approx(float(logprobs(list(prompt_ids(PROMPT)))[-1, 17]), abs=1e-4)


def test_a_prompt_that_is_scored_is_read_though_it_is_in_the_cache() -> None:
    async def scenario() -> None:
        async with serving() as (client, _):
            body = GREEDY | {"prompt": PROMPT, "max_tokens": 4}
            for cached in (0, len(prompt_ids(PROMPT)) - 1):
                usage = (await client.post("/v1/completions", json=body)).json()["usage"]
                assert usage["prompt_tokens_details"]["cached_tokens"] == cached
            scored = (await client.post("/v1/completions", json=body | {"echo": True, "logprobs": 1})).json()
            assert scored["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            ids = list(prompt_ids(PROMPT))
            check_lists(scored["choices"][0]["logprobs"], ids + greedy(shared_model(), ids, 4), 0, 1)

    asyncio.run(scenario())


@given(ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40))
def test_the_bytes_of_tokens_are_those_of_their_text(ids: list[int]) -> None:
    tokenizer = tiny_tokenizer()
    texts = TokenTexts(tokenizer)
    joined = b"".join(map(texts.bytes_of, ids)).decode(errors="replace")
    assert joined == tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert texts.bytes_of(10**6) == b""


def test_bytes_of_a_tokenizer_with_byte_fallback() -> None:
    texts = TokenTexts(byte_fallback())
    ids = byte_fallback().convert_tokens_to_ids(["▁Hello", "▁wor", "ld", "<0xC3>", "<0xA9>"])
    assert b"".join(map(texts.bytes_of, ids)).decode() == " Hello worldé"
    assert texts.text(ids[3]) == "bytes:\\xc3"
