"""Reading calls: what a template writes is read back, however it is chopped, and whatever is no call stays text."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdistill_serve.grammar import Grammar, Grammars
from bitdistill_serve.messages import Function
from bitdistill_serve.tool_calls import Call, CallReader, Read, Tag
from bitdistill_serve.tool_forms import HERMES, ToolForm
from tests.serve.references import EOS_ID, prompt_ids
from tests.serve.tool_templates import FAMILIES, LLAMA3, QWEN3, SMOLLM2, TOLD_ONLY, XML, tokenizer_with, written
from tests.tiny_models import VOCAB_SIZE, tiny_tokenizer

NAMES = ("get_weather", "add-2")
TAG = Tag("<tool_call>", "</tool_call>")
TEXTS = st.text(st.sampled_from('a \n<>/_tool_call{}[]"\\,:;1é雨\ud800'), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from([0.5, "</tool_call>", '"<tool_call>', "\\", "雨"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "</tool_call>"]), inner),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(st.sampled_from(["city", "n"]), JSON)), min_size=1, max_size=3
)


def read(reader: CallReader, text: str, cuts: list[int] | None = None) -> tuple[str, list[Call]]:
    """The whole text and all calls; the text comes in pieces that end at `cuts`."""
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts or [])})
    reads = [reader.push(text[a:b]) for a, b in pairwise(edges)] + [reader.finish()]
    return "".join(of.text for of in reads), [call for of in reads for call in of.calls]


def reader_of(tag: Tag | None = TAG, most: int | None = None) -> CallReader:
    return CallReader(frozenset(NAMES), tag, most=most)


@pytest.mark.parametrize("family", FAMILIES)
@given(calls=CALLS, cuts=st.lists(st.integers(0, 300), max_size=20), before=st.sampled_from(["", "Well, <tool>.\n\n"]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_a_template_writes_is_read_back(
    family: str, calls: list[tuple[str, dict[str, Any]]], cuts: list[int], before: str
) -> None:
    template = FAMILIES[family]
    if family == "llama3":  # one call, and no text beside it
        calls, before = calls[:1], ""
    form = form_of(template)
    assert form is not None
    reader = form.reader([Function(name=name) for name in NAMES], most=None)
    text, found = read(reader, before + written(template, calls) + "\n", cuts)
    assert text == before.rstrip()
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls
    assert reader.called


FRAGMENTS = st.one_of(
    TEXTS,
    st.sampled_from(["<tool_call>", "</tool_call>", " ", '{"name": "add-2", "arguments": {}}', '{"name": "x"}', '"']),
)


@pytest.mark.parametrize("tag", [TAG, None])
@given(fragments=st.lists(FRAGMENTS, max_size=8), cuts=st.lists(st.integers(0, 120), max_size=30))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_how_a_text_is_chopped_changes_nothing(tag: Tag | None, fragments: list[str], cuts: list[int]) -> None:
    text = "".join(fragments)
    assert read(reader_of(tag), text, cuts) == read(reader_of(tag), text)


@pytest.mark.parametrize("tag", [TAG, None])
@given(fragments=st.lists(FRAGMENTS, max_size=8))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_text_without_a_call_is_told_to_the_letter(tag: Tag | None, fragments: list[str]) -> None:
    text = "".join(fragments)
    reader = reader_of(tag)
    told, calls = read(reader, text)
    assert reader.called == bool(calls)
    if not calls and not (tag and "[]" in text):  # an empty list of calls, in tags, is no text
        assert told == text
    assert len(told) <= len(text)


@pytest.mark.parametrize(
    "inside",
    [
        '{"name": "other", "arguments": {}}', '{"name": "add-2", "arguments": [1]}', '{"name": "add-2"',
        '{"name": "add-2", "arguments": {"x": NaN}}', '{"name": "add-2", "arguments": {"x": 1e999}}', '"add-2"', "",
        '[{"name": "add-2", "arguments": {}}, 1]', "[" * 100_000, '{"name": ["add-2"], "arguments": {}}',
    ],
)  # fmt: skip
def test_what_is_no_call_stays_text(inside: str) -> None:
    text = f"See: <tool_call>{inside}</tool_call> done"
    assert read(reader_of(), text) == (text, [])
    assert read(reader_of(None), inside) == (inside, [])


def test_text_is_told_as_soon_as_it_can_be_no_tag() -> None:
    reader = reader_of()
    assert reader.push("It is 3 < 4.") == Read("It is 3 < 4.")
    assert reader.push(" <tool") == Read()
    assert reader.push("s>") == Read(" <tools>")
    assert reader.push('\n<tool_call>{"name": "add-2", "arguments": {"a": "</tool_call>') == Read()
    assert reader.push('"}}</tool_call> ') == Read(calls=(Call("add-2", '{"a": "</tool_call>"}'),))
    assert reader.finish() == Read()


def test_an_end_stands_for_the_closing_tag_and_an_empty_list_is_no_call() -> None:
    assert read(reader_of(), '<tool_call>{"name": "add-2"}') == ("", [Call("add-2", "{}")])
    assert read(reader_of(), "<tool_call>[]</tool_call>") == ("", [])
    assert read(reader_of(None), "[]") == ("[]", [])
    assert read(reader_of(None), '{"name": "add-2"}; {"name": "get_weather", "parameters": {"city": "\\ud800é"}}') == (
        "",
        [Call("add-2", "{}"), Call("get_weather", '{"city": "\\ud800é"}')],
    )


def test_calls_beyond_the_most_are_dropped() -> None:
    one = '<tool_call>{"name": "add-2"}</tool_call>'
    assert read(reader_of(most=1), one + one) == ("", [Call("add-2", "{}")])


def form_of(template: str) -> ToolForm | None:
    tokenizer = tokenizer_with(template)
    return ToolForm.of(lambda turns: str(tokenizer.apply_chat_template(turns, tokenize=False)))


WEATHER = Function(
    name="get_weather",
    strict=True,
    parameters={"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
                "additionalProperties": False},
)  # fmt: skip
FREE = ["", "3 < 4", "<tool_cal", "Well {", " \n", "雨が <tools>", "[1] says", "["]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_strict_function_is_called_by_its_schema_or_not_at_all(family: str) -> None:
    form = form_of(FAMILIES[family])
    assert form is not None
    grammars = Grammars(tiny_tokenizer(), vocab_size=VOCAB_SIZE, stop_ids=[EOS_ID])
    loose = Function(name="add-2", parameters=WEATHER.parameters)
    for several in (True, False):
        grammar = grammars.of_calls(form.may([WEATHER, loose], several=several))

        def takes(text: str, grammar: Grammar = grammar) -> bool:
            matcher, ids = grammar.matcher.deep_copy(), list(prompt_ids(text))
            return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

        def calls(*cities: str, name: str = "get_weather") -> str:
            return written(FAMILIES[family], [(name, {"city": city}) for city in cities])

        said = "" if family == "llama3" else "Let me see.\n"
        assert [text for text in FREE if not takes(text)] == []
        assert takes(said + calls("Rome"))
        assert takes(said + calls("Bonn", name="add-2"))
        assert not takes(said + calls("Bonn"))
        assert not takes(said + calls("Rome", name="other"))
        if family != "llama3":
            assert takes(calls("Rome", "Oslo")) == several
            assert takes(calls("Rome") + " Done.") == several
            assert not takes(calls("Rome", "Bonn"))


def test_the_form_is_what_the_template_writes() -> None:
    assert form_of(QWEN3) == HERMES
    assert form_of(LLAMA3) == ToolForm('{"name": "', '", "parameters": ', None, "}", None)
    listed = ToolForm('<tool_call>[\n{"name": "', '", "arguments": ', '},\n{"name": "', "}\n]</tool_call>", TAG)
    assert form_of(SMOLLM2) == listed
    assert form_of(QWEN3.replace("arguments | tojson", "arguments | tojson(separators=(',', ':'))")) == ToolForm(
        HERMES.opening, HERMES.middle, HERMES.between, HERMES.closing, TAG, colon=":", comma=","
    )
    assert form_of(TOLD_ONLY) is None
    assert form_of(XML) is None
