"""`/v1/classify` against the sums of log-probabilities that the plain model gives."""

from __future__ import annotations

import math

import pytest
import torch

from tests.serve.in_process import CHAT, CHAT_PROMPT, ask, error
from tests.serve.references import prompt_ids, shared_model

LABELS = [" yes", " no", " perhaps not", " 雨"]
INPUTS = ["The quick brown fox", "Numbers such as 1, 2, 3"]


def scores(prompt: tuple[int, ...], label: tuple[int, ...]) -> list[float]:
    with torch.inference_mode():
        logprobs_TV = shared_model()(torch.tensor([prompt + label])).logits[0].double().log_softmax(-1)
    return [float(logprobs_TV[len(prompt) - 1 + i, token]) for i, token in enumerate(label)]


@pytest.mark.parametrize("normalize", ["sum", "mean"])
def test_scores_equal_the_models_own(normalize: str) -> None:
    body = {"model": "tiny", "input": INPUTS, "labels": LABELS, "normalize": normalize}
    answer = ask("/v1/classify", body).json()
    for row, text in zip(answer["data"], INPUTS, strict=True):
        every = [scores(prompt_ids(text), prompt_ids(label)) for label in LABELS]
        expected = [math.fsum(of) / (len(of) if normalize == "mean" else 1) for of in every]
        assert [score["label"] for score in row["scores"]] == LABELS
        assert [score["logprob"] for score in row["scores"]] == pytest.approx(expected, abs=1e-3)
        shares = torch.tensor(expected).softmax(0).tolist()
        assert [score["probability"] for score in row["scores"]] == pytest.approx(shares, abs=1e-3)
        assert row["label"] == LABELS[expected.index(max(expected))]


def test_an_input_is_read_once_for_all_its_labels() -> None:
    usage = ask("/v1/classify", {"model": "tiny", "input": INPUTS[0], "labels": LABELS}).json()["usage"]
    prompt, labels = len(prompt_ids(INPUTS[0])), sum(len(prompt_ids(label)) for label in LABELS)
    assert usage["prompt_tokens"] == usage["total_tokens"] == prompt + labels
    assert usage["completion_tokens"] == 0
    assert usage["prompt_tokens_details"]["cached_tokens"] == prompt  # taken over by three labels, counted once


def test_a_chat_is_classified_by_its_template() -> None:
    answer = ask("/v1/classify", {"model": "tiny", "messages": CHAT["messages"], "labels": LABELS}).json()
    expected = [math.fsum(scores(prompt_ids(CHAT_PROMPT), prompt_ids(label))) for label in LABELS]
    assert [score["logprob"] for score in answer["data"][0]["scores"]] == pytest.approx(expected, abs=1e-3)


def test_a_question_without_an_answer_is_refused() -> None:
    body = {"model": "tiny", "input": "A", "labels": LABELS}
    assert error(ask("/v1/classify", body | {"labels": ["a"]}), 400)["param"] == "labels"
    assert error(ask("/v1/classify", body | {"labels": ["a", "a"]}), 400)["param"] == "labels"
    assert error(ask("/v1/classify", body | {"messages": CHAT["messages"]}), 400)["param"] == "input"
    assert error(ask("/v1/classify", {"model": "tiny", "labels": LABELS}), 400)["param"] == "input"
    assert error(ask("/v1/classify", body | {"input": ""}), 400)["param"] == "input"
    assert error(ask("/v1/classify", body | {"input": "x" * 200}), 400)["code"] == "context_length_exceeded"
