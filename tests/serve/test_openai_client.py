"""OpenAI's own Python client, unchanged, against the routes in-process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.serve.in_process import CHAT, CHAT_PROMPT, serving
from tests.serve.references import greedy_text, prompt_ids

MESSAGES: Any = CHAT["messages"]


@asynccontextmanager
async def client(**options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with serving(**options) as (http, _):
        yield openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http, max_retries=0)


def test_texts_chats_streams_and_models() -> None:
    async def scenario() -> None:
        async with client() as ai:
            assert [model.id async for model in ai.models.list()] == ["tiny"]
            assert (await ai.models.retrieve("tiny")).id == "tiny"
            text = await ai.completions.create(
                model="tiny", prompt="The quick", temperature=0, max_tokens=8, logprobs=2
            )
            assert text.choices[0].text == greedy_text(prompt_ids("The quick"), 8)
            assert text.choices[0].logprobs is not None
            assert len(text.choices[0].logprobs.tokens or []) == 8

            chat = await ai.chat.completions.create(
                model="tiny", messages=MESSAGES, temperature=0, max_completion_tokens=8, logprobs=True, top_logprobs=3
            )
            assert chat.choices[0].message.content == greedy_text(prompt_ids(CHAT_PROMPT), 8)
            assert chat.choices[0].logprobs is not None
            assert len((chat.choices[0].logprobs.content or [])[0].top_logprobs) == 3
            assert chat.usage is not None
            assert chat.usage.prompt_tokens_details is not None

            stream = await ai.chat.completions.create(
                model="tiny", messages=MESSAGES, temperature=0, max_tokens=8, stream=True,
                stream_options={"include_usage": True},
            )  # fmt: skip
            chunks = [chunk async for chunk in stream]
            words = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
            assert "".join(words) == greedy_text(prompt_ids(CHAT_PROMPT), 8)
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.total_tokens == chat.usage.total_tokens

    asyncio.run(scenario())


class Person(BaseModel):
    model_config = {"extra": "forbid"}
    age: int
    kind: bool


def test_a_pydantic_model_is_a_response_format() -> None:
    async def scenario() -> None:
        async with client() as ai:
            answer = await ai.chat.completions.parse(
                model="tiny", messages=MESSAGES, response_format=Person, max_tokens=100, seed=3,
                logit_bias={str(prompt_ids("}")[0]): 20, str(prompt_ids(",")[0]): 20},
            )  # fmt: skip
            assert isinstance(answer.choices[0].message.parsed, Person)

    asyncio.run(scenario())


def test_refusals_are_the_clients_own_exceptions() -> None:
    async def scenario() -> None:
        async with client(slots=1, queue=0) as ai:
            with pytest.raises(openai.NotFoundError) as missing:
                await ai.completions.create(model="gpt-4", prompt="A")
            assert missing.value.code == "model_not_found"
            assert missing.value.request_id
            with pytest.raises(openai.BadRequestError) as wrong:
                await ai.completions.create(model="tiny", prompt="A", temperature=7)
            assert wrong.value.param == "temperature"
            with pytest.raises(openai.BadRequestError):
                await ai.completions.create(model="tiny", prompt=["A", "B"])

    asyncio.run(scenario())
