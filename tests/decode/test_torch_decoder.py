"""TorchDecoder against transformers' own `generate` and full forward passes, for every family."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from bitdistill_ray.decode import step_graphs
from bitdistill_ray.decode.base import CapacityError, Decoder
from bitdistill_ray.decode.generation import generate
from bitdistill_ray.decode.sampling import Sampling
from bitdistill_ray.decode.torch_decoder import TorchDecoder
from bitdistill_ray.errors import ModelError
from tests.tiny_models import CASES, VOCAB_SIZE, tiny_model

PROMPTS = [[5, 6, 7], list(range(20, 43)), [9], [100, 4, 100, 4, 100, 4, 77, 200]]


def greedy_by_transformers(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, eos_token_id=-1
    )
    return out[0, len(prompt) :].tolist()


def prefill(decoder: Decoder, slot: int, chunk: int) -> torch.Tensor:
    while True:
        (logits_V,) = decoder.prefill([slot], chunk)
        if logits_V is not None:
            return logits_V


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_greedy_batch_equals_transformers_one_by_one(graphs: bool, case: str) -> None:
    model = tiny_model(case)
    decoder = TorchDecoder(model, slots=len(PROMPTS), slot_tokens=64, graphs=graphs)
    slots = [decoder.admit(prompt) for prompt in PROMPTS]
    logits = decoder.prefill(slots, 64)
    texts = [[int(row.argmax())] for row in logits if row is not None]
    for _ in range(11):
        for text, token in zip(
            texts, decoder.step(slots, [text[-1] for text in texts]).argmax(-1).tolist(), strict=True
        ):
            text.append(token)
    assert texts == [greedy_by_transformers(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("case", ["llama", "gemma3"])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_logits_equal_a_full_forward_whatever_the_chunk(graphs: bool, case: str, chunk: int) -> None:
    model = tiny_model(case)
    decoder = TorchDecoder(model, slots=2, slot_tokens=64, graphs=graphs)
    ids = list(range(30, 53))
    slot = decoder.admit(ids[:20])
    seen = [prefill(decoder, slot, chunk), *(decoder.step([slot], [token])[0] for token in ids[20:])]
    with torch.inference_mode():
        expected_TV = model(torch.tensor([ids])).logits[0, 19:]
    torch.testing.assert_close(torch.stack(seen), expected_TV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("case", ["qwen3", "gemma3"])
def test_prefill_interleaves_with_steps_and_slots_are_reused(graphs: bool, case: str) -> None:
    """One sequence leaves, a longer one is read in chunks while the others step; nobody's text changes."""
    model = tiny_model(case)
    decoder = TorchDecoder(model, slots=3, slot_tokens=64, graphs=graphs)
    slots = {i: decoder.admit(PROMPTS[i]) for i in (0, 1, 2)}
    texts = {i: [int(prefill(decoder, slots[i], 5).argmax())] for i in slots}

    def step_all() -> None:
        order = sorted(texts, reverse=True)  # rows must follow the caller's order, not the cache's
        tokens = decoder.step([slots[i] for i in order], [texts[i][-1] for i in order]).argmax(-1).tolist()
        for i, token in zip(order, tokens, strict=True):
            texts[i].append(token)

    step_all()
    first = texts.pop(0)
    decoder.free(slots[0])
    slots[3] = decoder.admit(PROMPTS[3])
    while (logits_V := decoder.prefill([slots[3]], 3)[0]) is None:
        step_all()
    texts[3] = [int(logits_V.argmax())]
    for _ in range(4):
        step_all()
    assert first == greedy_by_transformers(model, PROMPTS[0], 2)
    for i, text in texts.items():
        assert text == greedy_by_transformers(model, PROMPTS[i], len(text))


def test_stepping_a_changing_subset_moves_rows_without_mixing_them() -> None:
    model = tiny_model("llama")
    decoder = TorchDecoder(model, slots=4, slot_tokens=64)
    slots = [decoder.admit(prompt) for prompt in PROMPTS]
    texts = [[int(prefill(decoder, slot, 64).argmax())] for slot in slots]
    for subset in ([3], [1, 3], [0, 2], [2, 0, 3], [1], [0, 1, 2, 3], [3, 0]):
        tokens = decoder.step([slots[i] for i in subset], [texts[i][-1] for i in subset]).argmax(-1).tolist()
        for i, token in zip(subset, tokens, strict=True):
            texts[i].append(token)
    assert texts == [greedy_by_transformers(model, p, len(t)) for p, t in zip(PROMPTS, texts, strict=True)]


def test_batched_prefill_of_scattered_slots() -> None:
    model = tiny_model("qwen2")
    decoder = TorchDecoder(model, slots=4, slot_tokens=64)
    slots = [decoder.admit(prompt) for prompt in PROMPTS]
    scattered = decoder.prefill([slots[3], slots[0]], 64)  # rows 3 and 0: no view of the cache holds just these
    alone = TorchDecoder(model, slots=1, slot_tokens=64)
    for logits_V, prompt in zip(scattered, (PROMPTS[3], PROMPTS[0]), strict=True):
        slot = alone.admit(prompt)
        torch.testing.assert_close(logits_V, prefill(alone, slot, 64), rtol=1e-4, atol=1e-4)
        alone.free(slot)


def test_a_freed_slot_forgets() -> None:
    decoder = TorchDecoder(tiny_model("gemma3"), slots=1, slot_tokens=64)
    slot = decoder.admit(PROMPTS[0])
    before = prefill(decoder, slot, 64)
    decoder.free(slot)
    slot = decoder.admit(PROMPTS[1])
    decoder.prefill([slot], 7)  # hangs up in the middle of its prompt
    decoder.free(slot)
    assert decoder.free_slots == 1
    torch.testing.assert_close(prefill(decoder, decoder.admit(PROMPTS[0]), 64), before, rtol=0, atol=0)


def test_a_prompt_is_scored_in_chunks_while_others_run() -> None:
    model = tiny_model("gemma3")
    decoder = TorchDecoder(model, slots=3, slot_tokens=64)
    other = decoder.admit(PROMPTS[1])
    prefill(decoder, other, 64)
    ids = list(range(30, 53))
    slot = decoder.admit(ids)
    read = []
    while decoder.pending(slot):
        read.append(decoder.read(slot, 5))
        decoder.step([other], [7])
    assert [len(logits_TV) for logits_TV in read] == [5, 5, 5, 5, 3]
    with torch.inference_mode():
        expected_TV = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(torch.cat(read), expected_TV, rtol=1e-4, atol=1e-4)


def test_a_common_beginning_is_not_read_again() -> None:
    model = tiny_model("gemma3")
    decoder = TorchDecoder(model, slots=3, slot_tokens=64)
    system = list(range(40, 60))
    first = decoder.admit([*system, 5, 6], reuse=64)
    assert decoder.length(first) == 0
    text = [int(prefill(decoder, first, 64).argmax())]
    text.append(int(decoder.step([first], text).argmax()))

    beside = decoder.admit([*system, 9, 9, 9], reuse=64)  # a copy of what still runs
    assert decoder.length(beside) == len(system)
    limited = decoder.admit([*system, 5], reuse=7)
    assert decoder.length(limited) == 7
    texts = {slot: [int(prefill(decoder, slot, 64).argmax())] for slot in (beside, limited)}
    texts[first] = text
    for _ in range(4):
        order = list(texts)
        for slot, token in zip(
            order, decoder.step(order, [texts[s][-1] for s in order]).argmax(-1).tolist(), strict=True
        ):
            texts[slot].append(token)
    prompts = {first: [*system, 5, 6], beside: [*system, 9, 9, 9], limited: [*system, 5]}
    assert texts == {s: greedy_by_transformers(model, prompts[s], len(texts[s])) for s in texts}

    decoder.free(first)
    again = [*prompts[first], *texts[first][:3], 77]  # the next turn of the same chat
    slot = decoder.admit(again, reuse=64)
    assert (slot, decoder.length(slot)) == (first, len(again) - 1)
    assert int(prefill(decoder, slot, 64).argmax()) == greedy_by_transformers(model, again, 1)[0]
    decoder.free(slot)
    slot = decoder.admit(again, reuse=64)
    assert decoder.pending(slot) == 1  # the last token is read, for its logits


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_reuse_never_changes_a_text(data: st.DataObject) -> None:
    """Sequences over two tokens, so that beginnings are often common, come, step and go."""
    decoder = TorchDecoder(shared_llama(), slots=3, slot_tokens=24)
    live: dict[int, list[int]] = {}
    for _ in range(data.draw(st.integers(3, 12))):
        action = data.draw(st.sampled_from(["admit", "read", "step", "free"]))
        ready = [slot for slot in live if not decoder.pending(slot)]
        if action == "admit" and decoder.free_slots:
            ids = data.draw(st.lists(st.sampled_from([5, 6]), min_size=1, max_size=12))
            live[decoder.admit(ids, reuse=data.draw(st.integers(0, 12)))] = ids
        elif action == "free" and live:
            slot = data.draw(st.sampled_from(sorted(live)))
            decoder.free(slot)
            del live[slot]
        elif action == "step" and ready:
            token = data.draw(st.sampled_from([5, 6]))
            for slot, logits_V in zip(ready, decoder.step(ready, [token] * len(ready)), strict=True):
                live[slot] = [*live[slot], token]
                check(live[slot], logits_V)
        elif unread := [slot for slot in live if decoder.pending(slot)]:
            for slot, logits in zip(unread, decoder.prefill(unread, data.draw(st.integers(1, 6))), strict=True):
                if logits is not None:
                    check(live[slot], logits)


@cache
def shared_llama() -> PreTrainedModel:
    return tiny_model("llama")


def check(ids: list[int], logits_V: torch.Tensor) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(logits_V, shared_llama()(torch.tensor([ids])).logits[0, -1], rtol=1e-4, atol=1e-4)


def test_bf16_and_a_slot_filled_to_its_last_token() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    decoder = TorchDecoder(model, slots=2, slot_tokens=8)
    long, short = decoder.admit([3] * 7), decoder.admit([4])
    decoder.prefill([long, short], 8)
    assert decoder.step([long, short], [5, 5]).dtype is torch.float32
    assert decoder.length(long) == decoder.slot_tokens
    with pytest.raises(CapacityError, match="holds 8 tokens"):
        decoder.step([long], [5])
    decoder.step([short], [5])  # the full neighbour does not stop it


def test_capacity_is_cut_to_the_context_and_accounted() -> None:
    decoder = TorchDecoder(tiny_model("llama"), slots=3, slot_tokens=10_000)
    assert (decoder.slots, decoder.slot_tokens, decoder.capacity, decoder.free_slots) == (3, 256, 768, 3)
    assert decoder.vocab_size == VOCAB_SIZE
    slot = decoder.admit([1, 2, 3])
    assert (decoder.free_slots, decoder.pending(slot), decoder.length(slot)) == (2, 3, 0)
    decoder.prefill([slot], 2)
    assert (decoder.pending(slot), decoder.length(slot)) == (1, 2)


def test_refusals_name_what_is_wrong() -> None:
    decoder = TorchDecoder(tiny_model("llama"), slots=1, slot_tokens=16)
    with pytest.raises(ModelError, match="no tokens"):
        decoder.admit([])
    with pytest.raises(ModelError, match=f"token {VOCAB_SIZE} is not in a vocabulary"):
        decoder.admit([VOCAB_SIZE])
    with pytest.raises(CapacityError, match="16 tokens leave no room"):
        decoder.admit([1] * 16)
    slot = decoder.admit([1, 2])
    with pytest.raises(CapacityError, match="all 1 slots are taken"):
        decoder.admit([1])
    with pytest.raises(ValueError, match="not ready to step"):
        decoder.step([slot], [1])
    with pytest.raises(ValueError, match="named once"):
        decoder.prefill([slot, slot], 4)


def test_a_layer_kind_without_a_cache_is_refused() -> None:
    model = tiny_model("llama")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ModelError, match="linear_attention"):
        TorchDecoder(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are recorded on a GPU")
@pytest.mark.parametrize("case", CASES)
def test_a_replayed_step_is_the_step(case: str) -> None:
    """Sequences of 3 to 23 tokens grow past a leap of the graphs' and leave, one after the other."""
    model = tiny_model(case).to("cuda")
    texts = []
    for graphs in (False, True):
        decoder = TorchDecoder(model, slots=len(PROMPTS), slot_tokens=64, graphs=graphs)
        decoder_texts = generate(decoder, PROMPTS * 2, Sampling(max_tokens=30, temperature=0), stop_ids=())
        texts.append([text.ids for text in decoder_texts])
    assert texts[0] == texts[1]


def test_steps_come_in_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graphs, "LEAP", 16)
    decoder = TorchDecoder(tiny_model("llama"), slots=6, slot_tokens=64, graphs=True)
    texts = generate(decoder, PROMPTS * 3, Sampling(max_tokens=25, temperature=0), stop_ids=())
    assert {len(text.ids) for text in texts} == {25}
    assert decoder._graphs is not None
    assert set(decoder._graphs._steps) <= {(batch, live) for batch in (1, 2, 4, 6) for live in (16, 32, 48, 64)}
