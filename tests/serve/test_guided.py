"""Constrained output: whatever the model would write, the text is of the grammar, and only texts of it are likely."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from bitdistill_ray.decode.sampling import Sampling
from bitdistill_ray.decode.torch_decoder import TorchDecoder
from bitdistill_serve.batch import Batch
from bitdistill_serve.errors import GrammarError
from bitdistill_serve.generation import Generation, Piece, Text
from bitdistill_serve.grammar import Grammars
from bitdistill_serve.requests import CompletionRequest
from tests.serve.in_process import CHAT, GREEDY, ask, error, events
from tests.serve.references import EOS_ID, greedy_text, prompt_ids, shared_model
from tests.tiny_models import VOCAB_SIZE, tiny_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_choice_is_one_of_the_choices(temperature: float) -> None:
    choices = ["yes", "no", "perhaps (a-b)", "雨が降る"]
    body = GREEDY | {"prompt": ["A", "dog."], "n": 2, "seed": 1, "max_tokens": 40, "temperature": temperature}
    answer = ask("/v1/completions", body | {"guided_choice": choices}).json()
    assert {choice["text"] for choice in answer["choices"]} <= set(choices)
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}


def test_a_regular_expression_holds_and_streams() -> None:
    body = GREEDY | {"prompt": "A", "temperature": 1, "max_tokens": 40, "guided_regex": "[0-9]{3}-[a-z]{2}"}
    whole = ask("/v1/completions", body | {"seed": 5}).json()["choices"][0]["text"]
    assert re.fullmatch("[0-9]{3}-[a-z]{2}", whole)
    streamed = events(ask("/v1/completions", body | {"seed": 5, "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == whole


@pytest.mark.parametrize(
    "constraint",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}},
        {"guided_json": SCHEMA},
    ],
)
def test_json_of_a_schema(constraint: dict[str, Any]) -> None:
    for seed in range(3):
        body = CHAT | {"temperature": 1.2, "seed": seed, "max_tokens": 100} | constraint
        choice = ask("/v1/chat/completions", body).json()["choices"][0]
        person = json.loads(choice["message"]["content"])
        assert choice["finish_reason"] == "stop"
        assert set(person) == {"name", "age"}
        assert len(person["name"]) <= 8
        assert 0 <= person["age"] <= 99


def test_any_json_object_as_far_as_it_goes() -> None:
    content = ask("/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}}).json()
    assert content["choices"][0]["message"]["content"].startswith("{")


def test_a_grammar_that_cannot_go_on_ends_its_own_text_only() -> None:
    grammars = Grammars(tiny_tokenizer(), vocab_size=VOCAB_SIZE, stop_ids=[EOS_ID])
    broken = grammars.compile(CompletionRequest(model="tiny", prompt="A", guided_regex="[0-9]+"))
    assert broken is not None
    broken.matcher.consume_token(prompt_ids("A")[0])  # no digit: from here on the matcher is in error
    decoder = TorchDecoder(shared_model(), slots=2, slot_tokens=64)
    batch: Batch[str] = Batch(decoder, stop_ids=frozenset({EOS_ID}), prefill_tokens=64)
    greedy = Sampling(temperature=0, max_tokens=6)
    asked = {
        "broken": Generation(prompt=prompt_ids("A"), sampling=greedy, grammar=broken),
        "spared": Generation(prompt=prompt_ids("dog."), sampling=greedy),
    }
    texts = {key: Text(generation, tiny_tokenizer()) for key, generation in asked.items()}
    pieces: dict[str, list[Piece]] = {key: [] for key in asked}
    for key, generation in asked.items():
        batch.add(key, generation)
    while not batch.idle:
        for key, growth in batch.advance():
            pieces[key].append(texts[key].piece(growth))
    assert isinstance(pieces["broken"][-1].error, GrammarError)
    assert "".join(piece.text for piece in pieces["spared"]) == greedy_text(prompt_ids("dog."), 6)
    assert (batch.failures, decoder.free_slots) == (0, 2)  # it is not the decoder's failure


def test_a_grammar_that_grows_without_bound_is_the_clients_mistake() -> None:
    body = GREEDY | {"prompt": "A", "guided_regex": "((a{999}){999}){999}|" + "(b|c)*" * 200}
    assert "too many expressions" in error(ask("/v1/completions", body), 400)["message"]
    assert error(ask("/v1/completions", GREEDY | {"prompt": "A", "guided_regex": "a" * 70_000}), 400)
