"""The sampler against transformers' logits processors, against its own probabilities, and against its batch."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bitdistill_ray.decode.logprobs import token_logprobs
from bitdistill_ray.decode.sampling import (
    PREFIX,
    History,
    Sampling,
    kept_probabilities,
    likeliest,
    penalised,
    sample,
    uniform,
)
from bitdistill_ray.errors import ConfigError


def random_logits(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


@given(st.lists(st.lists(st.sampled_from([-1.0, 0.0, 2.0, math.inf, -math.inf, math.nan]), min_size=5, max_size=5),
                min_size=1, max_size=3))  # fmt: skip
def test_the_likeliest_token_is_torchs(rows: list[list[float]]) -> None:
    """The first of equals, and a NaN before everything: what a caller then finds is no number."""
    logits_BV = torch.tensor(rows)
    tokens, peaks = likeliest(logits_BV)
    assert tokens == logits_BV.argmax(dim=-1).tolist()
    assert [math.isfinite(peak) for peak in peaks] == logits_BV.amax(dim=-1).isfinite().tolist()


@pytest.mark.parametrize("vocabulary", [50, 3 * PREFIX])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(top_k=5),
        Sampling(top_p=0.8, temperature=1.3),
        Sampling(top_p=0.3, top_k=20),
        Sampling(top_p=0.999, temperature=4.0),  # a nucleus larger than PREFIX
        Sampling(top_k=PREFIX + 500, top_p=0.95, temperature=5.0),
        Sampling(min_p=0.1),
        Sampling(top_k=40, top_p=0.95, min_p=0.05, temperature=0.9),
    ],
    ids=str,
)
def test_kept_probabilities_equal_transformers(sampling: Sampling, vocabulary: int) -> None:
    logits_BV = random_logits(4, vocabulary)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    warpers.append(TopPLogitsWarper(sampling.top_p))
    warpers.append(MinPLogitsWarper(sampling.min_p))
    expected_BV = warpers(torch.zeros(4, 1, dtype=torch.int64), logits_BV.clone()).softmax(-1)
    kept_BV = kept_probabilities(logits_BV, [sampling] * 4)
    torch.testing.assert_close(kept_BV / kept_BV.sum(-1, keepdim=True), expected_BV, rtol=1e-4, atol=1e-7)


def test_repetition_penalty_equals_transformers_and_the_others_their_definition() -> None:
    logits_BV = random_logits(2, 20)
    prompt, generated = [1, 2], [5, 5, 5, 7]
    rows = [
        History(Sampling(repetition_penalty=1.7), prompt, generated),
        History(Sampling(presence_penalty=0.5, frequency_penalty=0.25), prompt, generated),
    ]
    out_BV = penalised(logits_BV, rows)
    by_transformers = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + generated]), logits_BV[:1].clone())
    torch.testing.assert_close(out_BV[:1], by_transformers)
    expected_V = logits_BV[1].clone()
    expected_V[5] -= 0.5 + 3 * 0.25
    expected_V[7] -= 0.5 + 0.25
    torch.testing.assert_close(out_BV[1], expected_V)


def test_temperature_zero_is_greedy_and_penalties_apply_to_it() -> None:
    logits_BV = torch.tensor([[0.0, 3.0, 2.0]])
    assert sample(logits_BV, [History(Sampling(temperature=0), [], [])]) == [1]
    assert sample(logits_BV, [History(Sampling(temperature=0, presence_penalty=2.0), [], [1])]) == [2]
    assert torch.equal(logits_BV, torch.tensor([[0.0, 3.0, 2.0]]))


def test_biases_and_what_is_allowed_come_before_everything_else() -> None:
    logits_BV = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).repeat(3, 1)
    allowed_V = torch.tensor([True, False, False, True])
    rows = [
        History(Sampling(temperature=0, logit_bias=((0, 5.0), (1, -100.0))), [], []),
        History(Sampling(temperature=0, logit_bias=((1, 50.0),)), [], [], allowed_V),
        History(Sampling(temperature=0), [], []),
    ]
    assert sample(logits_BV, rows) == [0, 3, 1]
    drawn = {sample(logits_BV[:1], [History(Sampling(seed=s, top_k=3), [3], [3], allowed_V)])[0] for s in range(60)}
    assert drawn == {0, 3}


def test_logprobs_equal_a_log_softmax() -> None:
    logits_TV = random_logits(3, 50)
    expected_TV = logits_TV.double().log_softmax(-1)
    for t, said in enumerate(token_logprobs(logits_TV, [4, 9, 0], top=5)):
        assert said.token == [4, 9, 0][t]
        assert said.logprob == pytest.approx(float(expected_TV[t, said.token]), abs=1e-5)
        values, ids = expected_TV[t].topk(5)
        assert [token for token, _ in said.top] == ids.tolist()
        assert [logprob for _, logprob in said.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert token_logprobs(logits_TV, [1, 2, 3])[0].top == ()


def test_frequencies_follow_the_probabilities() -> None:
    """4000 draws over the index of the token; chi-square of 5 kept tokens (4 degrees), far beyond its 1e-6 quantile."""
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -9.0])
    sampling = Sampling(top_k=5, seed=11)
    draws = Counter(sample(logits_V[None], [History(sampling, [], [0] * n)])[0] for n in range(4000))
    expected = torch.softmax(logits_V[:5], 0) * 4000
    chi_square = sum((draws[i] - float(e)) ** 2 / float(e) for i, e in enumerate(expected))
    assert set(draws) == set(range(5))
    assert chi_square < 35


def test_seeds_differ_and_repeat() -> None:
    logits_V = torch.zeros(1, 1000)

    def text(seed: int) -> list[int]:
        return [sample(logits_V, [History(Sampling(seed=seed), [], [0] * n)])[0] for n in range(8)]

    assert text(1) == text(1)
    assert len({tuple(text(seed)) for seed in (0, 1, 2, 3, -1, 2**63)}) == 6


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_row_is_chosen_as_if_it_were_alone(data: st.DataObject) -> None:
    vocabulary = data.draw(st.sampled_from([7, PREFIX + 700]))
    request = st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 1e-30, 0.5, 1.0, 30.0]),
        top_k=st.sampled_from([0, 1, 3, PREFIX + 100, 10**6]),
        top_p=st.sampled_from([1e-9, 0.5, 0.9, 0.999999, 1.0]),
        min_p=st.sampled_from([0.0, 0.2, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        frequency_penalty=st.sampled_from([0.0, 0.7]),
        seed=st.integers(0, 2**64),
    )
    samplings = data.draw(st.lists(request, min_size=1, max_size=5))
    logits_BV = random_logits(len(samplings), vocabulary, seed=data.draw(st.integers(0, 100)))
    if data.draw(st.booleans()):
        logits_BV = logits_BV.round()  # many ties
    rows = [History(sampling, [1, 2], [3] * data.draw(st.integers(0, 5))) for sampling in samplings]
    tokens = sample(logits_BV, rows)
    assert tokens == [sample(logits_BV[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    kept_BV = kept_probabilities(penalised(logits_BV, rows), [Sampling(temperature=1.0)] * len(rows))
    for i, (token, sampling) in enumerate(zip(tokens, samplings, strict=True)):
        if sampling.temperature == 0 or sampling.top_k == 1:
            assert kept_BV[i, token] == kept_BV[i].max()


def test_uniform_is_uniform() -> None:
    numbers = [uniform(seed, index) for seed in range(40) for index in range(100)]
    assert all(0 <= u < 1 for u in numbers)
    counts = Counter(int(u * 20) for u in numbers)
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 70  # chi-square, 19 degrees, about 1e-7


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("temperature", math.nan), ("top_p", 0), ("top_p", 1.1), ("top_k", -1), ("min_p", 2),
     ("repetition_penalty", 1e-30), ("max_tokens", 0), ("presence_penalty", math.inf), ("logit_bias", ((1, 101.0),))],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"sampling\.{field}: "):
        Sampling(**{field: value})
