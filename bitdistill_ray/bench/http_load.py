"""A client of `/v1/completions` that costs little beside a server on the same cores: one socket a request, a line at a
time, and no HTTP library.

A `Reply` has the moment of every chunk.  Clients come all at once and stay (`crowd`), each sending its next request
when the last was answered; what is refused is sent again after the time that the server named, as good clients do.
Or they come by chance, as many people do who know nothing of each other, and go when they are refused (`arrivals`).
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
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
    counts: list[int] = field(default_factory=list)  # tokens with each chunk, those before it too
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
        """Seconds for each token after the first chunk; those of one chunk share its time.

        A chunk has several where they come fast, or where the first ones were half a character.
        """
        told = zip(self.chunks_s, self.counts, strict=True)
        return [(later_s - sooner_s) / (most - least) for (sooner_s, least), (later_s, most) in pairwise(told)
                for _ in range(most - least)]  # fmt: skip


async def ask(url: str, body: Body, *, hang_up_after: int | None = None) -> Reply:
    """One streamed completion; `hang_up_after` chunks the client goes away."""
    place, reply = urlsplit(url), Reply()
    told = {"include_usage": True, "continuous_usage_stats": True}
    content = json.dumps({**body, "stream": True, "stream_options": told}).encode()
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
            continue
        usage = event.get("usage")  # other servers tell it once, and some with the last text
        reply.tokens = usage["completion_tokens"] if usage else reply.tokens + len(event["choices"])
        if event["choices"]:
            reply.chunks_s.append(time.perf_counter())
            reply.counts.append(reply.tokens)
            reply.text += event["choices"][0]["text"]
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


async def arrivals(rate: float, seconds: float, send: Next, rng: random.Random) -> list[Reply]:
    """`rate` requests a second in the mean, each by itself (a Poisson process), for a time; every reply."""
    sent: list[asyncio.Task[Reply]] = []
    at_s = time.perf_counter()
    end_s = at_s + seconds
    while (at_s := at_s + rng.expovariate(rate)) < end_s:
        await asyncio.sleep(max(0.0, at_s - time.perf_counter()))
        sent.append(asyncio.ensure_future(send()))
    return await asyncio.gather(*sent)
