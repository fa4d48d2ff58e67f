"""A Teacher says what its model computes, document by document, in every payload and family."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitdistill_ray.config import Dtype
from bitdistill_ray.core import Payload, TokenBatch
from bitdistill_ray.decode.sampling import Sampling
from bitdistill_ray.errors import ModelError
from bitdistill_ray.losses.objective import GammaMode
from bitdistill_ray.model.heads import FrozenHead
from bitdistill_ray.model.taps import attention_taps
from bitdistill_ray.teacher import wire
from bitdistill_ray.teacher.actor import Teacher, likeliest
from bitdistill_ray.teacher.request import SignalRequest
from tests.tiny_models import EVERY_CASE, packed_batch, save_tiny, tiny_model

BATCH = packed_batch([[9, 5, 3], [14]], 20)


@pytest.fixture(scope="module")
def teacher_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def load(case: str) -> Teacher:
        folder = save_tiny(tmp_path_factory.mktemp(case), case)
        return Teacher(str(folder), dtype=Dtype.FP32, threads=1)

    return load


def documents(batch: TokenBatch) -> list[tuple[int, slice]]:
    """(row, columns) of every document of a batch."""
    found = []
    for row, segment_T in enumerate(batch.segment_BT):
        for segment in range(int(segment_T.max()) + 1):
            columns = (segment_T == segment).nonzero().flatten()
            found.append((row, slice(int(columns[0]), int(columns[-1]) + 1)))
    return found


def hidden_alone(case: str, ids_T: Tensor) -> Tensor:
    """The state that the LM head consumes, of one document by itself, from transformers."""
    with torch.no_grad():
        return tiny_model(case).model(input_ids=ids_T[None]).last_hidden_state[0]


def logits_alone(case: str, ids_T: Tensor) -> Tensor:
    with torch.no_grad():
        return tiny_model(case)(input_ids=ids_T[None]).logits[0]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def nearly(found: Tensor, expected: Tensor) -> None:
    """To within fp16."""
    assert found.dtype is torch.float16
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", EVERY_CASE)
def test_hidden_states_are_the_models_own(case: str, teacher_of: Any) -> None:
    said = teacher_of(case).signals(BATCH, SignalRequest())
    for row, columns in documents(BATCH):
        close(said.hidden_BTD[row, columns], hidden_alone(case, BATCH.ids_BT[row, columns]))
    assert said.logits_BTV is said.topk is said.attention is None


@pytest.mark.parametrize("case", EVERY_CASE)
def test_logits_are_the_models_own(case: str, teacher_of: Any) -> None:
    said = teacher_of(case).signals(BATCH, SignalRequest(payload=Payload.LOGITS))
    for row, columns in documents(BATCH):
        close(said.logits_BTV[row, columns], logits_alone(case, BATCH.ids_BT[row, columns]))
    assert said.hidden_BTD is None


@pytest.mark.parametrize("case", EVERY_CASE)
def test_topk_are_the_likeliest_tokens_of_the_whole_vocabulary(case: str, teacher_of: Any) -> None:
    said = teacher_of(case).signals(BATCH, SignalRequest(payload=Payload.TOPK, topk=7))
    assert said.topk.ids_BTS.dtype is torch.int32
    for row, columns in documents(BATCH):
        log_TV = logits_alone(case, BATCH.ids_BT[row, columns]).log_softmax(-1)
        nearly(said.topk.logprobs_BTS[row, columns], log_TV.sort(-1, descending=True).values[:, :7])
        nearly(said.topk.logprobs_BTS[row, columns], log_TV.gather(-1, said.topk.ids_BTS[row, columns].long()))


def test_topk_entries_have_an_order_that_ids_and_values_decide() -> None:
    """Equal values, which fp16 makes, stand by rising id, whatever the device's top-k does with ties."""
    log_V = torch.tensor([0.1, 0.2, 0.2, 0.05, 0.2, 0.25]).log()
    said = likeliest(log_V[None, None], torch.nn.Identity(), 5)
    assert said.ids_BTS[0, 0].tolist() == [5, 1, 2, 4, 0]


@pytest.mark.parametrize("case", EVERY_CASE)
@pytest.mark.parametrize(("layer", "real"), [(0, 0), (1, 1), (-1, 1), (-2, 0)])
def test_relations_come_from_the_layer_that_was_asked_for(case: str, layer: int, real: int, teacher_of: Any) -> None:
    said = teacher_of(case).signals(BATCH, SignalRequest(attention_layer=layer))
    assert said.attention.layer == real
    for row, columns in documents(BATCH):
        model = tiny_model(case)
        with torch.no_grad(), attention_taps(model, (real,)) as taps:
            model(input_ids=BATCH.ids_BT[row, columns][None])
        for name in ("q_BHTC", "k_BJTC", "v_BJTC"):
            close(getattr(said.attention, name)[row, :, columns], getattr(taps[real], name)[0])


@pytest.mark.parametrize("case", EVERY_CASE)
def test_the_frozen_head_makes_the_teachers_logits_elsewhere(case: str, teacher_of: Any) -> None:
    teacher = teacher_of(case)
    message = teacher.frozen_head()
    head = FrozenHead({name: wire.get(message, name) for name in message})
    hidden = teacher.signals(BATCH, SignalRequest()).hidden_BTD
    for row, columns in documents(BATCH):
        close(head(hidden[row, columns]), logits_alone(case, BATCH.ids_BT[row, columns]))


def test_an_answer_is_about_its_question_and_needs_no_gradient(teacher_of: Any) -> None:
    arrays = wire.encode_batch(BATCH)
    teacher = teacher_of("llama")
    message = teacher.score(arrays, SignalRequest(attention_layer=1))
    wire.check_answer(message, arrays)
    said = wire.decode_signals(message)
    direct = teacher.signals(BATCH, SignalRequest(attention_layer=1))
    assert torch.equal(said.hidden_BTD, direct.hidden_BTD)
    assert torch.equal(said.attention.q_BHTC, direct.attention.q_BHTC)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_asking_again_gives_the_same_bits(teacher_of: Any) -> None:
    arrays = wire.encode_batch(BATCH)
    first, second = (teacher_of("qwen3").score(arrays, SignalRequest()) for _ in range(2))
    assert first["hidden"].tobytes() == second["hidden"].tobytes()


@pytest.mark.parametrize("mode", [GammaMode.LABEL, GammaMode.MAX])
def test_confidence_is_the_mean_probability_over_labels(mode: GammaMode, teacher_of: Any) -> None:
    """BitDistiller's gamma, summed by hand over the documents."""
    total, tokens = 0.0, 0
    for row, columns in documents(BATCH):
        ids_T = BATCH.ids_BT[row, columns]
        p_TV = logits_alone("llama", ids_T).double().softmax(-1)[:-1]
        picked = p_TV.gather(-1, ids_T[1:, None]) if mode is GammaMode.LABEL else p_TV.amax(-1)
        total, tokens = total + float(picked.sum()), tokens + len(p_TV)
    estimate = teacher_of("llama").confidence(wire.encode_batch(BATCH), mode)
    assert estimate.tokens == tokens
    assert math.isclose(estimate.value, total / tokens, rel_tol=1e-5)


def greedy_alone(teacher: Teacher, prompt: str, tokens: int) -> list[int]:
    """Greedy continuation by recomputing everything for every token."""
    ids = teacher.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    written: list[int] = []
    while len(written) < tokens:
        with torch.no_grad():
            token = int(teacher.model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax())
        if token == teacher.tokenizer.eos_token_id:
            break
        written.append(token)
    return written


def test_what_it_writes_is_its_own_greedy_text(teacher_of: Any) -> None:
    teacher = teacher_of("llama")
    prompts = ["The quick fox", "Numbers", "A teacher answers, a student listens"]
    samplings = [Sampling(temperature=0, max_tokens=n) for n in (6, 9, 4)]
    texts = teacher.write(prompts, samplings, batch=2)
    for prompt, sampling, text in zip(prompts, samplings, texts, strict=True):
        expected = greedy_alone(teacher, prompt, sampling.max_tokens)
        assert list(text.response_ids) == expected
        assert text.prompt == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        assert text.response == teacher.tokenizer.decode(list(text.response_ids))


def test_a_text_depends_on_its_seed_and_not_on_its_neighbours(teacher_of: Any) -> None:
    teacher = teacher_of("llama")
    sampling = Sampling(temperature=1.0, max_tokens=12, seed=5)
    [alone] = teacher.write(["Numbers"], [sampling], batch=1)
    crowd = teacher.write(["The fox", "Numbers", "Le café"], [Sampling(max_tokens=9), sampling, sampling], batch=3)
    assert crowd[1] == alone
    [elsewhere] = teacher.write(["Numbers"], [Sampling(temperature=1.0, max_tokens=12, seed=6)], batch=1)
    assert elsewhere.response_ids != alone.response_ids


def test_a_model_that_does_not_load_is_named_at_the_handshake(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        Teacher(str(tmp_path / "nothing"), threads=1).handshake()


def test_a_handshake_tells_models_apart(teacher_of: Any, tmp_path: Path) -> None:
    again = Teacher(str(save_tiny(tmp_path / "a", "llama")), dtype=Dtype.FP32, threads=1).handshake()
    other = Teacher(str(save_tiny(tmp_path / "b", "llama", seed=1)), dtype=Dtype.FP32, threads=1).handshake()
    mine = teacher_of("llama").handshake()
    assert (mine.weights, mine.tokenizer, mine.config) == (again.weights, again.tokenizer, again.config)
    assert mine.weights != other.weights


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("case", EVERY_CASE)
def test_a_teacher_on_two_gpus_says_what_one_on_one_says(case: str, tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path, case))
    spread, here = (Teacher(folder, dtype=Dtype.FP32, spread=spread) for spread in (True, False))
    assert {parameter.device.index for parameter in spread.model.parameters()} == {0, 1}
    for payload in (Payload.HIDDEN, Payload.LOGITS):
        request = SignalRequest(payload=payload, attention_layer=-1)
        found = wire.encode_signals(spread.signals(BATCH.to(spread.device), request))
        expected = wire.encode_signals(here.signals(BATCH.to(here.device), request))
        for key in expected.keys() - {"sequence_ids", "attention_layer"}:
            torch.testing.assert_close(wire.get(found, key), wire.get(expected, key), rtol=1e-4, atol=1e-4)
    sampling = Sampling(temperature=0, max_tokens=8, seed=0)
    assert spread.write(["The dog"], [sampling], batch=1) == here.write(["The dog"], [sampling], batch=1)
