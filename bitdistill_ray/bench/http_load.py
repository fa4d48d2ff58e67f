"""A client of `/v1/completions` that costs little beside a server on the same cores: one socket a request, a line at a
time, and no HTTP library.

A `Reply` has the moment of every chunk.  Clients come all at once and stay (`crowd`), each sending its next request
when the last was answered; what is refused is sent again after the time that the server named, as good clients do.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

Body = Mapping[str, Any]


@dataclass(slots=True)
class Reply:
    """What came back.  `status` 0: the connection ended early."""

    began_s: float = field(default_factory=time.perf_counter)
    status: int = 0
    retry_after_s: float = 0.0
    chunks_s: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0
    ended_s: float = 0.0
    whole: bool = False
    cancelled: bool = False

    @property
    def first_s(self) -> float:
        """Seconds to the first chunk."""
        return self.chunks_s[0] - self.began_s

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between chunks."""
        return [later - sooner for sooner, later in zip(self.chunks_s, self.chunks_s[1:], strict=False)]


async def ask(url: str, body: Body, *, hang_up_after: int | None = None) -> Reply:
    """One streamed completion; `hang_up_after` chunks the client goes away."""
    place, reply = urlsplit(url), Reply()
    content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    try:
        reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1 << 24)
    except OSError:
        reply.ended_s = time.perf_counter()
        return reply
    try:
        writer.write(head.encode() + content)
        await _read(reader, reply, hang_up_after)
    except (OSError, asyncio.IncompleteReadError, ValueError):
        reply.whole = False
    finally:
        reply.ended_s = time.perf_counter()
        writer.close()
    return reply


async def _read(reader: asyncio.StreamReader, reply: Reply, hang_up_after: int | None) -> None:
    reply.status = int((await reader.readline()).split()[1])
    while (line := await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        if name.lower() == "retry-after":
            reply.retry_after_s = float(value)
    while line := await reader.readline():  # the sizes of HTTP's chunks are lines of their own, and no events
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            reply.whole = True
            return
        event = json.loads(line[6:])
        if "error" in event:
            reply.status = 500
        elif event["choices"]:
            reply.chunks_s.append(time.perf_counter())
            reply.text += event["choices"][0]["text"]
        else:
            reply.tokens = event["usage"]["completion_tokens"]
        if hang_up_after is not None and len(reply.chunks_s) >= hang_up_after:
            reply.cancelled = True
            return


Next = Callable[[], Awaitable[Reply]]
"""Sends one request, to its end."""


async def crowd(clients: int, seconds: float, send: Next) -> list[Reply]:
    """`clients` that send one request after the other for a time; every reply, refusals too."""
    replies: list[Reply] = []
    end_s = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end_s:
            reply = await send()
            replies.append(reply)
            if reply.status != 200:
                await asyncio.sleep(min(reply.retry_after_s or 0.2, max(0.0, end_s - time.perf_counter())))

    await asyncio.gather(*(client() for _ in range(clients)))
    return replies
