"""Continuous batching: every text as if alone, in the order of the prompts, with its slot given back."""

from __future__ import annotations

import pytest

from bitdistill_ray.decode.base import CapacityError
from bitdistill_ray.decode.generation import FinishReason, generate
from bitdistill_ray.decode.sampling import Sampling
from bitdistill_ray.decode.torch_decoder import TorchDecoder
from tests.tiny_models import tiny_model

PROMPTS = [[i + 3, *range(40, 40 + (7 * i) % 23)] for i in range(9)]
GREEDY = Sampling(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def decoder() -> TorchDecoder:
    return TorchDecoder(tiny_model("qwen3"), slots=3, slot_tokens=48)


def test_many_prompts_through_few_slots(decoder: TorchDecoder) -> None:
    samplings = [
        Sampling(temperature=i % 2, top_p=0.9, seed=5 * i, max_tokens=3 + i % 4, frequency_penalty=0.1 * i)
        for i in range(len(PROMPTS))
    ]
    together = generate(decoder, PROMPTS, samplings, stop_ids=())
    assert decoder.free_slots == 3
    alone = [generate(decoder, [p], [s], stop_ids=(), max_batch=1)[0] for p, s in zip(PROMPTS, samplings, strict=True)]
    assert together == alone
    assert [len(text.ids) for text in together] == [s.max_tokens for s in samplings]
    assert {text.finish_reason for text in together} == {FinishReason.LENGTH}


def test_stops_at_a_stop_token_and_leaves_it_out(decoder: TorchDecoder) -> None:
    (free,) = generate(decoder, PROMPTS[:1], GREEDY, stop_ids=())
    stop = free.ids[-1]
    (stopped,) = generate(decoder, PROMPTS[:1], GREEDY, stop_ids={stop})
    assert stopped.ids == free.ids[: free.ids.index(stop)]
    assert stopped.finish_reason is FinishReason.STOP


def test_a_full_slot_ends_a_text(decoder: TorchDecoder) -> None:
    (text,) = generate(decoder, [[5] * 45], Sampling(temperature=0, max_tokens=99), stop_ids=())
    assert (len(text.ids), text.finish_reason) == (4, FinishReason.LENGTH)  # 45 + 3 fill the slot; the 4th is free


def test_one_sampling_gives_equal_prompts_different_texts(decoder: TorchDecoder) -> None:
    texts = generate(decoder, [PROMPTS[0]] * 4, Sampling(temperature=1.5, max_tokens=8, seed=3), stop_ids=())
    assert len({text.ids for text in texts}) == 4
    (again,) = generate(decoder, [PROMPTS[0]], Sampling(temperature=1.5, max_tokens=8, seed=5), stop_ids=())
    assert again == texts[2]


def test_on_token_streams_every_text_in_order(decoder: TorchDecoder) -> None:
    streamed: dict[int, list[int]] = {}
    texts = generate(
        decoder, PROMPTS, GREEDY, stop_ids=(), on_token=lambda i, token: streamed.setdefault(i, []).append(token)
    )
    assert [tuple(streamed[i]) for i in range(len(PROMPTS))] == [text.ids for text in texts]


def test_slots_come_back_when_the_caller_gives_up(decoder: TorchDecoder) -> None:
    def give_up(index: int, token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(decoder, PROMPTS, GREEDY, stop_ids=(), on_token=give_up)
    assert decoder.free_slots == 3


def test_a_prompt_that_does_not_fit_is_named_before_anything_runs(decoder: TorchDecoder) -> None:
    with pytest.raises(CapacityError, match="prompt 1: 48 tokens"):
        generate(decoder, [[1], [2] * 48], GREEDY, stop_ids=(), on_token=lambda *_: pytest.fail("ran"))
    assert generate(decoder, [], GREEDY, stop_ids=()) == []
