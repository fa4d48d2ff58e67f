"""The engine on a real tiny decoder: whoever shares its batch, a request gets its own text, and its slot back."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import torch
from torch import Tensor

from bitdistill_ray.decode.sampling import Sampling
from bitdistill_ray.decode.torch_decoder import TorchDecoder
from bitdistill_ray.errors import ModelError, ServeError
from bitdistill_serve.batch import Batch
from bitdistill_serve.detokenize import Tokenizer
from bitdistill_serve.engine import Engine, Status, Stream
from bitdistill_serve.errors import EngineStoppedError, QueueFullError
from bitdistill_serve.generation import End, Generation, Piece
from bitdistill_serve.metrics import Metrics
from bitdistill_serve.options import ServeOptions
from tests.serve.references import EOS_ID, greedy_text, prompt_ids, shared_model
from tests.tiny_models import tiny_tokenizer

PROMPTS = ("The quick", "A", "Numbers such as 1, 2, 3 and 4096 are words too. " * 3, "Le café est", "雨が降る", "dog.")


class FaultyDecoder(TorchDecoder):
    """The real decoder, with faults as hardware has them: a call that raises, or logits that are not numbers."""

    step_faults = 0
    spoiled_slot: int | None = None
    free_breaks = False

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        if self.step_faults:
            self.step_faults -= 1
            raise RuntimeError("out of memory")
        logits_BV = super().step(slots, tokens)
        if self.spoiled_slot in slots:
            logits_BV = logits_BV.clone()
            logits_BV[list(slots).index(self.spoiled_slot)] = torch.nan
            self.spoiled_slot = None
        return logits_BV

    def free(self, slot: int) -> None:
        if self.free_breaks:
            raise RuntimeError("the cache is gone")
        super().free(slot)


def decoder(slots: int, *, slot_tokens: int = 256) -> FaultyDecoder:
    return FaultyDecoder(shared_model(), slots=slots, slot_tokens=slot_tokens)


@asynccontextmanager
async def running(
    decoder: TorchDecoder,
    *,
    queue: int = 16,
    prefill_tokens: int = 8,
    event_ms: float = 0,
    tokenizer: Tokenizer | None = None,
) -> AsyncIterator[Engine]:
    options = ServeOptions(model="tiny", queue=queue, prefill_tokens=prefill_tokens, event_ms=event_ms)
    engine = Engine(
        decoder,
        tokenizer or tiny_tokenizer(),
        options,
        stop_ids=frozenset({EOS_ID}),
        metrics=Metrics("tiny", {"decoder": "torch"}),
    )
    engine.start()
    yield engine
    await engine.stop()


def ask(
    text: str, *, tokens: int = 12, temperature: float = 0.0, seed: int = 0, stops: tuple[str, ...] = ()
) -> Generation:
    sampling = Sampling(max_tokens=tokens, temperature=temperature, seed=seed)
    return Generation(prompt=prompt_ids(text), sampling=sampling, stops=stops)


async def read(stream: Stream) -> Piece:
    """The whole of a stream of one generation."""
    pieces = [piece async for _, piece in stream]
    return Piece("".join(p.text for p in pieces), tokens=sum(p.tokens for p in pieces), end=pieces[-1].end)


async def until_idle(engine: Engine) -> None:
    while (health := engine.health()).running or health.waiting:  # of one moment
        await asyncio.sleep(0.001)


def test_requests_that_come_and_go_get_their_own_greedy_text() -> None:
    async def scenario() -> list[Piece]:
        async with running(decoder(slots=3)) as engine:
            readers = []
            for text in PROMPTS:
                readers.append(asyncio.create_task(read(engine.submit([ask(text)]))))
                await asyncio.sleep(0.005)
            return await asyncio.gather(*readers)

    pieces = asyncio.run(scenario())
    assert [p.text for p in pieces] == [greedy_text(prompt_ids(text), 12) for text in PROMPTS]
    assert all(p.end in (End.STOP, End.LENGTH) and p.tokens <= 12 for p in pieces)


def test_a_long_prompt_is_read_between_the_steps_of_a_running_sequence() -> None:
    batch: Batch[str] = Batch(decoder(slots=2), stop_ids=frozenset(), prefill_tokens=4)
    batch.add("short", ask("A", tokens=200))
    assert [sum(growth.tokens for _, growth in batch.advance()) for _ in range(2)] == [1, 1]  # at once, then its step
    long = ask(PROMPTS[2], tokens=2)
    batch.add("long", long)
    rounds = 0
    while True:
        rounds += 1
        grown = batch.advance()
        if any(key == "long" for key, _ in grown):
            break  # told at once, before the step
        assert sum(growth.tokens for key, growth in grown if key == "short") == 1
    assert [key for key, _ in batch.advance()] == ["short", "long"]
    assert rounds == -(-len(long.prompt) // 4)


def test_a_round_reads_no_more_than_its_share_of_all_prompts_together() -> None:
    tiny = decoder(slots=3)
    batch: Batch[int] = Batch(tiny, stop_ids=frozenset(), prefill_tokens=16)
    for key, text in enumerate((PROMPTS[2], PROMPTS[2], "A")):
        batch.add(key, ask(text))
    unread = sum(len(prompt_ids(text)) for text in (PROMPTS[2], PROMPTS[2], "A"))
    while unread:
        told = {key for key, growth in batch.advance() if growth.first}
        before, unread = unread, sum(tiny.pending(slot) for slot in range(3))
        assert 0 < before - unread <= 16
        if told:
            batch.advance()  # the step of that round


def test_short_prompts_are_read_together() -> None:
    batch: Batch[int] = Batch(decoder(slots=4), stop_ids=frozenset(), prefill_tokens=64)
    for key in range(4):
        batch.add(key, ask("The quick"))
    assert {key for key, _ in batch.advance()} == {0, 1, 2, 3}


def test_cancelling_frees_the_slot_for_the_next() -> None:
    plan = (("A", 200), ("dog.", 200), ("The quick", 12))

    async def scenario() -> tuple[Piece, int]:
        tiny = decoder(slots=1)
        async with running(tiny) as engine:
            first, waiting, last = (engine.submit([ask(text, tokens=n)]) for text, n in plan)
            await anext(first)
            waiting.cancel()
            first.cancel()
            first.cancel()
            piece = await read(last)
            await until_idle(engine)
            assert [end async for _, (*_, end) in ended(first)] == [End.CANCELLED]
            assert (await read(waiting)).end is End.CANCELLED
            return piece, tiny.free_slots

    async def ended(stream: Stream) -> AsyncIterator[tuple[int, tuple[int, End | None]]]:
        async for index, piece in stream:
            yield index, (piece.tokens, piece.end)

    piece, free = asyncio.run(scenario())
    assert piece.text == greedy_text(prompt_ids("The quick"), 12)
    assert free == 1


def test_a_full_queue_refuses_at_once_and_takes_all_choices_or_none() -> None:
    async def scenario() -> None:
        async with running(decoder(slots=1), queue=2) as engine:
            first = engine.submit([ask("A", tokens=200)])
            with pytest.raises(QueueFullError) as refused:
                engine.submit([ask("A")] * 3)
            assert refused.value.retry_after_s >= 1
            second = engine.submit([ask("dog.")] * 2)
            with pytest.raises(QueueFullError):
                engine.submit([ask("A")])
            first.cancel()
            assert {index async for index, _ in second} == {0, 1}
            assert (await read(engine.submit([ask("A")]))).tokens > 0

    asyncio.run(scenario())


def test_those_who_are_refused_are_told_to_come_back_one_after_the_other() -> None:
    """Not all at once; and one that asks without end puts nobody off for longer than a few turns of all places."""

    async def scenario() -> list[int]:
        async with running(decoder(slots=1), queue=3) as engine:
            await read(engine.submit([ask("A", tokens=2)]))
            engine._mean_s = 4.0  # of a generation: four places, so one is free every second
            waiting = [engine.submit([ask("A", tokens=200)], client=str(number)) for number in range(4)]
            told = [engine.refusal("late") for _ in range(40)]
            for stream in waiting:
                stream.cancel()
            return [error.retry_after_s for error in told if error]

    times = asyncio.run(scenario())
    assert len(times) == 40
    assert times[:6] == [1, 2, 3, 4, 5, 6]
    assert times[15:] == [16] * 25


def test_a_client_cannot_shut_another_out() -> None:
    async def scenario() -> None:
        async with running(decoder(slots=1), queue=8) as engine:
            crowd = [engine.submit([ask("A", tokens=20)], client="many") for _ in range(8)]
            with pytest.raises(QueueFullError):
                engine.submit([ask("A")], client="many")
            other = engine.submit([ask("dog.")], client="one")
            assert (await read(other)).text == greedy_text(prompt_ids("dog."), 12)
            assert sum(bool(stream.live) for stream in crowd) >= 6  # it did not wait for all of them
            for stream in crowd:
                stream.cancel()

    asyncio.run(scenario())


def test_a_stop_string_across_tokens_ends_the_text_before_it() -> None:
    whole = greedy_text(prompt_ids("The quick"), 24)
    tokens = [tiny_tokenizer().decode([i]) for i in tiny_tokenizer()(whole)["input_ids"]]
    stop = next(a[-1] + b[0] for a, b in itertools.pairwise(tokens[3:]) if whole.count(a[-1] + b[0]) == 1)

    async def scenario() -> Piece:
        async with running(decoder(slots=2)) as engine:
            return await read(engine.submit([ask("The quick", tokens=24, stops=(stop, "never"))]))

    piece = asyncio.run(scenario())
    assert piece.text == whole.split(stop)[0]
    assert piece.end is End.STOP
    assert piece.tokens < 24


def test_a_seed_fixes_the_text_whatever_shares_the_batch() -> None:
    async def scenario() -> list[str]:
        async with running(decoder(slots=4)) as engine:
            alone = await read(engine.submit([ask("dog.", temperature=1.0, seed=7)]))
            crowd = [engine.submit([ask(text, temperature=1.0, seed=s)]) for s, text in enumerate(PROMPTS)]
            same, other = (engine.submit([ask("dog.", temperature=1.0, seed=seed)]) for seed in (7, 8))
            texts = [(await read(stream)).text for stream in (same, other, *crowd)]
            return [alone.text, *texts[:2]]

    alone, same, other = asyncio.run(scenario())
    assert alone == same != other


def test_a_full_slot_ends_the_text() -> None:
    async def scenario() -> Piece:
        async with running(decoder(slots=1, slot_tokens=12)) as engine:
            return await read(engine.submit([ask("A", tokens=1000)]))

    piece = asyncio.run(scenario())
    assert piece.end is End.LENGTH
    assert piece.tokens == 12 - len(prompt_ids("A")) + 1  # the last one needs no place in the cache
    assert piece.text == greedy_text(prompt_ids("A"), piece.tokens)


def test_what_a_slow_consumer_missed_comes_in_one_piece() -> None:
    async def scenario() -> list[Piece]:
        async with running(decoder(slots=1)) as engine:
            stream = engine.submit([ask("The quick")])
            await until_idle(engine)
            return [piece async for _, piece in stream]

    (piece,) = asyncio.run(scenario())
    assert piece.text == greedy_text(prompt_ids("The quick"), 12)


def test_tokens_that_come_fast_go_together_but_for_the_first_and_the_last() -> None:
    async def scenario() -> list[int]:
        async with running(decoder(slots=1), event_ms=60_000) as engine:
            return [piece.tokens async for _, piece in engine.submit([ask("A", tokens=9)])]

    assert asyncio.run(scenario()) == [1, 8]


def test_what_a_tokenizer_cannot_read_ends_its_own_request() -> None:
    """Text is made on the event loop: the others go on, and the slot is free again."""
    whole = tiny_tokenizer()
    unreadable = prompt_ids("雨")[0]

    class Picky:
        all_special_ids = whole.all_special_ids

        def decode(self, token_ids: list[int], **options: bool) -> str:
            if unreadable in token_ids:
                raise OverflowError("no such token")
            return str(whole.decode(token_ids, **options))

        def convert_ids_to_tokens(self, ids: int) -> str | None:
            return whole.convert_ids_to_tokens(ids)

    async def scenario() -> Piece:
        async with running(decoder(slots=2), tokenizer=Picky()) as engine:
            spared = engine.submit([ask("dog.", tokens=60)])
            sampling = Sampling(temperature=0, max_tokens=60, logit_bias=((unreadable, 100.0),))
            struck = engine.submit([Generation(prompt=prompt_ids("A"), sampling=sampling)])
            with pytest.raises(ServeError, match="no such token"):
                await read(struck)
            text = await read(spared)
            await until_idle(engine)
            assert engine.health().status is Status.OK
            return text

    assert asyncio.run(scenario()).text == greedy_text(prompt_ids("dog."), 60)


def test_a_failed_step_ends_the_requests_in_it_and_no_others() -> None:
    async def scenario() -> None:
        tiny = decoder(slots=1)
        async with running(tiny) as engine:
            tiny.step_faults = 1
            hit, spared = engine.submit([ask("A")]), engine.submit([ask("dog.")])
            with pytest.raises(ServeError, match="out of memory"):
                await read(hit)
            assert (await read(spared)).text == greedy_text(prompt_ids("dog."), 12)
            assert engine.health().status is Status.OK
            assert "out of memory" in (engine.health().last_failure or "")

            tiny.step_faults = 3
            for status in (Status.DEGRADED, Status.DEGRADED, Status.FAILING):
                with pytest.raises(ServeError, match="out of memory"):
                    await read(engine.submit([ask("A")]))
                assert engine.health().status is status

    asyncio.run(scenario())


def test_logits_that_are_no_numbers_end_their_own_request() -> None:
    async def scenario() -> None:
        tiny = decoder(slots=2)
        async with running(tiny) as engine:
            tiny.spoiled_slot = 0
            spoiled, spared = engine.submit([ask("A")]), engine.submit([ask("dog.")])
            with pytest.raises(ServeError, match="not finite"):
                await read(spoiled)
            assert (await read(spared)).text == greedy_text(prompt_ids("dog."), 12)

    asyncio.run(scenario())


def test_a_prompt_that_the_decoder_refuses_ends_alone() -> None:
    async def scenario() -> None:
        async with running(decoder(slots=1)) as engine:
            refused = engine.submit([Generation(prompt=(99_999,), sampling=Sampling())])
            with pytest.raises(ModelError, match="vocabulary"):
                await read(refused)
            assert (await read(engine.submit([ask("A")]))).text == greedy_text(prompt_ids("A"), 12)

    asyncio.run(scenario())


def test_when_the_loop_ends_every_request_is_told() -> None:
    async def scenario() -> None:
        tiny = decoder(slots=1)
        async with running(tiny) as engine:
            tiny.free_breaks = True
            streams = [engine.submit([ask("A")]), engine.submit([ask("dog.")])]
            for stream in streams:
                with pytest.raises(EngineStoppedError, match="the cache is gone"):
                    await read(stream)
            assert engine.health().status is Status.FAILING
            with pytest.raises(EngineStoppedError, match="the cache is gone"):
                engine.submit([ask("A")])

        async with running(decoder(slots=1)) as engine:
            stream = engine.submit([ask("A", tokens=200)])
            await anext(stream)
            await engine.stop()
            with pytest.raises(EngineStoppedError, match="stopped"):
                await read(stream)

    asyncio.run(scenario())
