"""A server in this process: the routes, the engine and a real tiny decoder."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import uvicorn
from transformers import PreTrainedTokenizerFast

from bitdistill_ray.decode.torch_decoder import TorchDecoder
from bitdistill_serve.api import create_api
from bitdistill_serve.options import ServeOptions
from bitdistill_serve.service import Service
from tests.serve.references import EOS_ID, free_port, shared_model
from tests.tiny_models import tiny_tokenizer

Json = dict[str, Any]
GREEDY: Json = {"model": "tiny", "temperature": 0, "max_tokens": 8}
CHAT: Json = {"model": "tiny", "temperature": 0, "max_tokens": 8, "messages": [{"role": "user", "content": "The dog."}]}
CHAT_PROMPT = "<|im_start|>user\nThe dog.<|im_end|>\n<|im_start|>assistant\n"


@asynccontextmanager
async def serving(
    *,
    slots: int = 4,
    queue: int = 8,
    slot_tokens: int = 128,
    tokenizer: PreTrainedTokenizerFast | None = None,
    decoder: TorchDecoder | None = None,
    **options: Any,
) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    decoder = decoder or TorchDecoder(shared_model(), slots=slots, slot_tokens=slot_tokens)
    settings = ServeOptions.parse({"model": "tiny", "slots": slots, "queue": queue, "prefill_tokens": 16} | options)
    service = Service.over(decoder, tokenizer or tiny_tokenizer(), settings, stop_ids=[EOS_ID])
    service.start()
    transport = httpx.ASGITransport(create_api(lambda: service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client, service
    await service.stop()


def ask(path: str, body: Any, **options: Any) -> httpx.Response:
    """One request to a server of its own."""

    async def scenario() -> httpx.Response:
        async with serving(**options) as (client, _):
            return await client.post(path, json=body)

    return asyncio.run(scenario())


def events(response: httpx.Response) -> list[Json]:
    """The chunks of a stream, which must end with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(chunk.startswith("data: ") for chunk in chunks)
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def error(response: httpx.Response, status: int) -> Json:
    assert response.status_code == status, response.text
    body: Json = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: Json = body["error"]
    return error


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@contextmanager
def live(**options: Any) -> Iterator[str]:
    """The same behind a real HTTP server in a thread; its URL."""
    started, stop, port = threading.Event(), threading.Event(), free_port()

    async def serve() -> None:
        async with serving(**options) as (client, _):
            transport: Any = client._transport
            server = uvicorn.Server(uvicorn.Config(transport.app, port=port, log_level="error"))
            running = asyncio.create_task(server.serve())
            await until(lambda: server.started)
            started.set()
            await asyncio.to_thread(stop.wait)
            server.should_exit = True
            await running

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert started.wait(60)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop.set()
        thread.join()
