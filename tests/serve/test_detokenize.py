"""Streamed text equals text decoded at once, for any tokens of two kinds of tokenizer, and stops where it must."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from bitdistill_serve.detokenize import REPLACEMENT, Detokenizer, StopMatcher
from tests.tiny_models import VOCAB_SIZE, tiny_tokenizer

BYTE_FALLBACK_WORDS = ("▁", "▁Hello", "Hello", "▁wor", "ld", "é", "雨", ".", "\n")


@cache
def byte_level() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """Built as Llama 2's: `▁` for spaces, unknown characters as bytes, one leading space stripped."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *BYTE_FALLBACK_WORDS]
    bpe = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def stream(tokenizer: PreTrainedTokenizerFast, ids: list[int], context: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer, context or [])
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


@given(ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=60))
def test_byte_level_stream_is_the_full_text(ids: list[int]) -> None:
    assert "".join(stream(byte_level(), ids)) == decode(byte_level(), ids)


@given(ids=st.lists(st.integers(0, 2 + 256 + len(BYTE_FALLBACK_WORDS)), max_size=60))
def test_byte_fallback_stream_is_the_full_text(ids: list[int]) -> None:
    assert "".join(stream(byte_fallback(), ids)) == decode(byte_fallback(), ids)


@given(text=st.text(max_size=40))
def test_only_whole_characters_are_emitted(text: str) -> None:
    for tokenizer in (byte_level(), byte_fallback()):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = stream(tokenizer, ids)
        assert "".join(pieces) == decode(tokenizer, ids)
        if REPLACEMENT not in text and REPLACEMENT not in decode(tokenizer, ids):
            assert all(REPLACEMENT not in piece for piece in pieces)


def test_a_character_of_four_tokens_comes_in_one_piece() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a🦊b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6  # nothing merges these bytes
    assert stream(tokenizer, ids) == ["a", "", "", "", "🦊", "b", ""]


def test_invalid_bytes_do_not_hold_back_text_for_ever() -> None:
    tokenizer = byte_level()
    stray = tokenizer.convert_tokens_to_ids("Ń")  # byte 0x80, which starts no character
    detokenizer = Detokenizer(tokenizer)
    emitted = "".join(detokenizer.push(stray) for _ in range(500))
    assert len(emitted) > 450
    assert emitted + detokenizer.finish() == REPLACEMENT * 500


@pytest.mark.parametrize("context", [["<s>", "▁Hello"], ["▁Hello", "</s>"]])
def test_the_prompt_decides_on_the_leading_space(context: list[str]) -> None:
    tokenizer = byte_fallback()
    continued = tokenizer.convert_tokens_to_ids(["▁wor", "ld"])
    assert "".join(stream(tokenizer, continued)) == "world"
    assert "".join(stream(tokenizer, continued, tokenizer.convert_tokens_to_ids(context))) == " world"


@given(
    text=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=10),
)
@example(text="abc", stops=["abc", "b"], cuts=[])
def test_stop_strings_do_not_depend_on_where_tokens_end(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    emitted = "".join(matcher.push(text[a:b]) for a, b in itertools.pairwise(edges)) + matcher.finish()

    ends = (end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops))
    end = next(ends, None)
    if end is None:
        assert (emitted, matcher.stopped) == (text, False)
    else:
        longest = max(len(stop) for stop in stops if text[:end].endswith(stop))
        assert (emitted, matcher.stopped) == (text[: end - longest], True)


def test_text_that_cannot_be_a_stop_string_is_not_held() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert [matcher.push(t) for t in ("Hi", ".\n", "\nUs", "e it", "\n\nUser: no")] == ["Hi", ".", "", "\n\nUse it", ""]
    assert matcher.stopped
    assert matcher.push("more") == ""
