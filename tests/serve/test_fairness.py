"""Who is served when there is no room for all: clients in turn, short prompts beside a long one, nobody for ever."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdistill_ray.decode.sampling import Sampling
from bitdistill_ray.decode.torch_decoder import TorchDecoder
from bitdistill_serve.batch import Batch, Deadlines
from bitdistill_serve.errors import DeadlineError, QueueTimeoutError
from bitdistill_serve.generation import End, Generation, Text
from bitdistill_serve.rhythm import Rhythm
from bitdistill_serve.waiting import Waiting
from tests.serve.references import greedy_text, prompt_ids, shared_model
from tests.tiny_models import tiny_tokenizer

Key = tuple[str, int]


class Person:
    def __init__(self, client: str, number: int) -> None:
        self.client, self.number = client, number


@given(st.lists(st.sampled_from("aab")), st.data())
def test_clients_take_turns(arrivals: list[str], data: st.DataObject) -> None:
    """Between two turns of a client that waits, no other one has two."""
    waiting: Waiting[Person] = Waiting()
    for number, client in enumerate(arrivals):
        waiting.add(Person(client, number))
    served: list[Person] = []
    while len(waiting):
        order = list(waiting)
        assert len(order) == len(waiting)
        if data.draw(st.booleans()):
            waiting.remove(data.draw(st.sampled_from(order)))
            continue
        waiting.serve(order[0])
        served.append(order[0])
        others = {person.client for person in waiting} - {order[0].client}
        if others:
            assert next(iter(waiting)).client in others
    for client in "ab":
        own = [person.number for person in served if person.client == client]
        assert own == sorted(own)


def batch(slots: int, *, prefill_tokens: int = 64, deadlines: Deadlines | None = None) -> Batch[Key]:
    decoder = TorchDecoder(shared_model(), slots=slots, slot_tokens=256)
    return Batch(decoder, stop_ids=frozenset(), prefill_tokens=prefill_tokens, deadlines=deadlines or Deadlines())


def ask(text: str, tokens: int = 3, common: int = 0) -> Generation:
    return Generation(prompt=prompt_ids(text), sampling=Sampling(temperature=0, max_tokens=tokens), common=common)


def test_a_client_with_many_requests_does_not_starve_another() -> None:
    crowded = batch(slots=1)
    for number in range(20):
        crowded.add(("many", number), ask("A"), "many")
    crowded.advance()
    crowded.add(("one", 0), ask("dog."), "one")
    ended: list[Key] = []
    while not crowded.idle:
        ended += [key for key, growth in crowded.advance() if growth.end]
    assert ended.index(("one", 0)) <= 2
    assert Counter(client for client, _ in ended) == {"many": 20, "one": 1}


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    crowded = batch(slots=2, prefill_tokens=16)
    long = ask("Numbers such as 1, 2, 3 and 4096 are words too. " * 4)
    crowded.add(("long", 0), long)
    crowded.advance()
    crowded.add(("short", 0), ask("A"))
    assert {key for key, _ in crowded.advance()} == {("short", 0)}
    rounds = 2
    while not any(key == ("long", 0) for key, _ in crowded.advance()):
        rounds += 1
    assert rounds <= 2 * len(long.prompt) / 16 + 1  # the other prompt was no long delay for it


def test_what_is_read_beside_a_step_takes_its_time_and_a_quarter() -> None:
    rhythm = Rhythm()
    assert rhythm.tokens_beside_a_step(256) == 256  # nothing is known yet
    for _ in range(50):
        rhythm.stepped(0.040)
        rhythm.read(100, 0.100)
    assert rhythm.tokens_beside_a_step(256) == 50
    assert rhythm.tokens_beside_a_step(16) == 16
    for _ in range(50):
        rhythm.read(100, 10.0)
    assert rhythm.tokens_beside_a_step(256) == 32  # a pass over the weights, whatever it takes
    for _ in range(50):
        rhythm.read(100, 0.001)
    assert rhythm.tokens_beside_a_step(256) == 256


def test_a_common_prompt_is_read_once() -> None:
    prompt = "Numbers such as 1, 2, 3 and 4096 are words too. "
    common = len(prompt_ids(prompt))
    crowded = batch(slots=4, prefill_tokens=8)
    asked = ask(prompt, tokens=6, common=common)
    texts = {("same", number): Text(asked, tiny_tokenizer()) for number in range(3)}
    for key in texts:
        crowded.add(key, asked)
    cached = Counter[Key]()
    words: dict[Key, str] = {}
    while not crowded.idle:
        for key, growth in crowded.advance():
            cached[key] += growth.cached
            words[key] = words.get(key, "") + texts[key].piece(growth).text
    assert sorted(cached.values()) == [0, common - 1, common - 1]
    assert set(words.values()) == {greedy_text(prompt_ids(prompt), 6)}


@pytest.mark.parametrize(
    ("deadlines", "error"), [(Deadlines(queue_s=0), QueueTimeoutError), (Deadlines(total_s=0), DeadlineError)]
)
def test_nobody_waits_or_runs_for_ever(deadlines: Deadlines, error: type[Exception]) -> None:
    late = batch(slots=1, deadlines=deadlines)
    late.add(("a", 0), ask("A", tokens=200))
    told = [growth for _ in range(3) for _, growth in late.advance()]
    assert told[-1].end is End.FAILED
    assert isinstance(told[-1].error, error)
    assert late.idle
    assert late.running == 0
