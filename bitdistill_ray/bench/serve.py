"""Serving: what HTTP and the engine cost beside the decoder alone, and what happens beyond capacity and under faults.

The server is `bitdistill serve` in processes of its own.  The decoder of the same options is driven in this process
while the server idles, in turn with the measurements over HTTP, so that what slows one slows the other.  Prompts are
random token ids, so that none finds its beginning in the cache, and texts go on to their limit whatever the model says.

    stream     one client: tokens/s beside the decoder's steps, time to the first token beside its prefill
    streams    several at once: tokens/s beside the engine driven without HTTP (and beside another server), pauses
    overload   four times what it can take: what still is answered, how fast the rest is refused, memory
    soak       clients that come, hang up and compare every text with its reference, while replicas are killed
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bitdistill_ray.bench.http_load import Reply, arrivals, ask, crowd
from bitdistill_ray.bench.models import Size, save_random_packed
from bitdistill_ray.bench.report import Row, Unit
from bitdistill_ray.bench.server import Server, serving, wait_until_idle
from bitdistill_ray.bench.subject import format_of
from bitdistill_ray.core import QuantSpec
from bitdistill_ray.decode.base import Decoder
from bitdistill_ray.decode.sampling import Sampling, likeliest
from bitdistill_ray.model.sources import resolve
from bitdistill_ray.packed.folder import PackedFolder
from bitdistill_serve.batch import Batch
from bitdistill_serve.generation import Generation, Text
from bitdistill_serve.options import ServeOptions
from bitdistill_serve.service import open_decoder

PARTS = ("stream", "streams", "overload", "soak")
ROUNDS, STREAM_ROUNDS = 5, 21
OVERLOAD = 4  # times the places of the server
LEAST_MARGIN = 1e-2  # between the likeliest two tokens of a reference: rounding never decides
REFERENCES = 8
TRIES, PAUSE_S = 3, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`streams` clients, prompts and texts of so many tokens, seconds of the long parts."""

    streams: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 64
    overload_s: float = 10.0
    soak_s: float = 20.0
    kill_every_s: float = 10.0


@dataclass(slots=True)
class Bench:
    """One model, its decoder here and its server there."""

    options: ServeOptions
    load: Load
    format: str | None
    against: str | None
    rows: list[Row] = field(default_factory=list)
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def measure(self, parts: Sequence[str]) -> list[Row]:
        """The rows of these parts."""
        began_s = time.perf_counter()
        decoder, tokenizer, _ = open_decoder(self.options)
        self._row("replica", "model loaded", Unit.MILLISECONDS, 1e3 * (time.perf_counter() - began_s))
        if {"stream", "streams", "overload"} & set(parts):
            with serving(self.options.model, self._arguments()) as server:
                if "stream" in parts:
                    self._stream(server, decoder)
                peak = self._streams(server, decoder, tokenizer) if {"streams", "overload"} & set(parts) else 0.0
                if "overload" in parts:
                    self._overload(server, peak)
        if "soak" in parts:
            two = [*self._arguments(), "--min-replicas", "2", "--max-replicas", "2"]
            with serving(self.options.model, two) as server:
                self._soak(server, decoder, tokenizer)
        return self.rows

    def _arguments(self) -> list[str]:
        keys = {"name", "device", "threads", "slots", "slot_tokens", "queue", "activation_bits"}
        given = self.options.model_dump(include=keys, exclude_none=True)
        return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]

    def _body(self, prompt: list[int], tokens: int | None = None) -> dict[str, Any]:
        return {"model": self.options.served_name, "prompt": prompt, "max_tokens": tokens or self.load.new_tokens,
                "temperature": 0, "ignore_eos": True}  # fmt: skip

    def _prompt(self, decoder: Decoder | None = None) -> list[int]:
        most = decoder.vocab_size if decoder else 250  # a byte's token is in every vocabulary
        return [self.rng.randrange(3, most) for _ in range(self.load.prompt_tokens)]

    def _row(self, case: str, metric: str, unit: Unit, value: float, **beside: Any) -> None:
        self.rows.append(Row(case=case, format=self.format, threads=self.options.threads, metric=metric, unit=unit,
                             value=value, **beside))  # fmt: skip

    def _stream(self, server: Server, decoder: Decoder) -> None:
        """One client and the decoder alone, in turn."""
        alone, served = [], []
        for turn in range(STREAM_ROUNDS + 1):
            own, reply = self._alone(decoder), asyncio.run(ask(server.url, self._body(self._prompt())))
            if turn:  # the first warms both up
                alone.append(own)
                served.append(reply)
        tokens = self.load.new_tokens
        pace = median(tokens / (reply.ended_s - reply.began_s) for reply in served)
        first = median(reply.first_s for reply in served)
        own_pace = median(tokens / (read_s + written_s) for read_s, written_s in alone)
        own_first = median(read_s for read_s, _ in alone)
        self._row("one stream", "tokens/s", Unit.TOKENS_S, pace, limit=own_pace,
                  limit_is="the decoder alone, its prefill included")  # fmt: skip
        self._row("one stream", "time to first token", Unit.MILLISECONDS, 1e3 * first, limit=1e3 * own_first,
                  limit_is="the decoder's prefill alone")  # fmt: skip

    def _alone(self, decoder: Decoder) -> tuple[float, float]:
        """Seconds to read a prompt, and to write the tokens that follow."""
        slot = decoder.admit(self._prompt(decoder))
        began_s = time.perf_counter()
        (logits,) = decoder.prefill([slot], self.load.prompt_tokens)
        assert logits is not None
        (token, *_), read_s = likeliest(logits[None])[0], time.perf_counter()
        for _ in range(self.load.new_tokens - 1):
            (token,) = likeliest(decoder.step([slot], [token]))[0]
        written_s = time.perf_counter()
        decoder.free(slot)
        return read_s - began_s, written_s - read_s

    def _streams(self, server: Server, decoder: Decoder, tokenizer: Any) -> float:
        """Several at once; returns their tokens/s."""
        offline, served, against, gaps = [], [], [], []
        for turn in range(ROUNDS + 1):
            own = self._offline(decoder, tokenizer)
            speed, replies = self._burst(server.url)
            other = self._burst(self.against)[0] if self.against else None
            if turn:
                offline.append(own)
                served.append(speed)
                against += [other] if other else []
                gaps += [gap for reply in replies for gap in reply.gaps_s]
        case = f"{self.load.streams} streams"
        self._row(case, "tokens/s", Unit.TOKENS_S, median(served), limit=median(offline),
                  limit_is="the engine driven without HTTP", baseline=median(against) if against else None,
                  baseline_is=self.against)  # fmt: skip
        self._row(case, "p99 time per token", Unit.MILLISECONDS, 1e3 * _percentile(gaps, 99), limit=1e3 * median(gaps),
                  limit_is="the median")  # fmt: skip
        return median(served)

    def _burst(self, url: str) -> tuple[float, list[Reply]]:
        """`streams` requests at the same time: tokens/s, and the replies."""

        async def together() -> list[Reply]:
            bodies = [self._body(self._prompt()) for _ in range(self.load.streams)]
            return await asyncio.gather(*(ask(url, body) for body in bodies))

        began_s = time.perf_counter()
        replies = asyncio.run(together())
        return sum(reply.tokens for reply in replies) / (time.perf_counter() - began_s), replies

    def _offline(self, decoder: Decoder, tokenizer: Any) -> float:
        """The same load on the engine's batch in this process: tokens/s."""
        batch: Batch[int] = Batch(decoder, stop_ids=frozenset(), prefill_tokens=self.options.prefill_tokens)
        sampling = Sampling(temperature=0, max_tokens=self.load.new_tokens)
        began_s = time.perf_counter()
        asked = [Generation(prompt=tuple(self._prompt(decoder)), sampling=sampling) for _ in range(self.load.streams)]
        texts = [Text(generation, tokenizer) for generation in asked]
        for key, generation in enumerate(asked):
            batch.add(key, generation)
        while not batch.idle:
            for key, growth in batch.advance():
                texts[key].piece(growth)
        return self.load.streams * self.load.new_tokens / (time.perf_counter() - began_s)

    def _overload(self, server: Server, peak: float) -> None:
        """More than it can take: as many requests by chance, and as many clients that stay, all there at once."""
        rate, seconds = OVERLOAD * peak / self.load.new_tokens, self.load.overload_s
        clients = OVERLOAD * self.options.limit
        by_chance = arrivals(rate, seconds, lambda: ask(server.url, self._body(self._prompt())), self.rng)
        self._overloaded(f"overload, {OVERLOAD} times the rate of the peak", server, peak, by_chance)
        all_at_once = crowd(clients, seconds, lambda: ask(server.url, self._body(self._prompt())))
        self._overloaded(f"overload, {clients} clients for {self.options.limit} places", server, peak, all_at_once)

    def _overloaded(self, case: str, server: Server, peak: float, load: Coroutine[Any, Any, list[Reply]]) -> None:
        before, began_s = server.memory(), time.perf_counter()
        replies = asyncio.run(load)
        seconds, grown = time.perf_counter() - began_s, server.memory() - before
        done = [reply for reply in replies if reply.status == 200 and reply.whole]
        refused = [reply.ended_s - reply.began_s for reply in replies if reply.status == 429]
        self._row(case, "goodput", Unit.TOKENS_S, sum(reply.tokens for reply in done) / seconds, limit=peak,
                  limit_is=f"{self.load.streams} streams")  # fmt: skip
        self._row(case, "refused", Unit.COUNT, len(refused))
        if refused:
            self._row(case, "p99 time to a 429", Unit.MILLISECONDS, 1e3 * _percentile(refused, 99))
        lost = sum(not (reply.whole and reply.status == 200) and reply.status != 429 for reply in replies)
        self._row(case, "errors", Unit.COUNT, lost)
        self._row(case, "memory grown", Unit.MIB, grown / 2**20)
        began_s = time.perf_counter()
        asyncio.run(ask(server.url, self._body(self._prompt(), 1)))
        self._row(case, "first answer afterwards", Unit.MILLISECONDS, 1e3 * (time.perf_counter() - began_s))

    def _soak(self, server: Server, decoder: Decoder, tokenizer: Any) -> None:
        """Mixed load against references, with hang-ups and killed replicas."""
        references = self._references(decoder, tokenizer)
        wrong = kills = again = 0

        async def send() -> Reply:
            nonlocal wrong, again
            prompt, text = self.rng.choice(references)
            hang_up = self.rng.randrange(1, 8) if self.rng.random() < 0.25 else None
            reply = await ask(server.url, self._body(prompt), hang_up_after=hang_up)
            for _ in range(TRIES - 1):  # as OpenAI's client does
                if reply.chunks_s or reply.status in (200, 429):
                    break
                again += 1
                await asyncio.sleep(PAUSE_S)
                reply = await ask(server.url, self._body(prompt), hang_up_after=hang_up)
            if reply.status == 200:
                wrong += not text.startswith(reply.text) or (reply.whole and reply.text != text)
            return reply

        async def kill() -> None:
            nonlocal kills
            while True:
                await asyncio.sleep(self.load.kill_every_s)
                kills += await asyncio.to_thread(server.kill_one)

        async def soak() -> list[Reply]:
            killer = asyncio.create_task(kill())
            try:
                return await crowd(self.load.streams, self.load.soak_s, send)
            finally:
                killer.cancel()

        replies = asyncio.run(soak())
        ended = [reply for reply in replies if not reply.cancelled]
        cut = sum(reply.status != 429 and not (reply.whole and reply.status == 200) for reply in ended)
        idle = wait_until_idle(server, 30)
        case = f"soak of {self.load.soak_s:g} s, {kills} replicas killed"
        self._row(case, "answers compared", Unit.COUNT, sum(reply.status == 200 for reply in replies))
        self._row(case, "wrong answers", Unit.COUNT, wrong)
        self._row(case, "hang-ups", Unit.COUNT, sum(reply.cancelled for reply in replies))
        self._row(case, "sent again, for nothing had come", Unit.COUNT, again)
        self._row(case, "requests lost", Unit.COUNT, cut)
        self._row(case, "requests lost for each kill", Unit.COUNT, cut / max(1, kills), limit=float(self.load.streams),
                  limit_is="all that may have been on the replica")  # fmt: skip
        self._row(case, "leaked slots", Unit.COUNT, 0 if idle else server.get("/health")["running"])

    def _references(self, decoder: Decoder, tokenizer: Any) -> list[tuple[list[int], str]]:
        """Prompts and what follows them greedily, where no two tokens were close."""
        found: list[tuple[list[int], str]] = []
        for _ in range(20 * REFERENCES):
            prompt, ids, sure = self._prompt(), list[int](), True
            slot = decoder.admit(prompt)
            (logits_V,) = decoder.prefill([slot], self.load.prompt_tokens)
            while sure and logits_V is not None:
                best = logits_V.topk(2)
                sure = bool(best.values[0] - best.values[1] > LEAST_MARGIN)
                ids.append(int(best.indices[0]))
                if len(ids) == self.load.new_tokens:
                    break
                logits_V = decoder.step([slot], [ids[-1]])[0]
            decoder.free(slot)
            if sure:
                text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                found.append((prompt, text))
            if len(found) == REFERENCES:
                break
        return found


def measure(options: ServeOptions, load: Load, parts: Sequence[str], *, against: str | None) -> list[Row]:
    """Rows of one model; `against` is the address of another server."""
    place = resolve(options.model)
    format = format_of(PackedFolder.open(place)) if PackedFolder.is_packed(place) else None
    return Bench(options, load, format, against).measure(parts)


def measure_random(
    specs: Sequence[QuantSpec], options: ServeOptions, load: Load, parts: Sequence[str], *, against: str | None
) -> list[Row]:
    """Rows of a random packed student in each format."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for i, spec in enumerate(specs):
            packed = save_random_packed(Path(folder) / f"packed-{i}", Size(), spec)
            own = options.model_copy(update={"model": packed, "name": "random"})
            rows += measure(own, load, parts, against=against)
    return rows


def _percentile(values: Sequence[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]
