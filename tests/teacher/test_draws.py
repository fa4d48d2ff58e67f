"""The `sampled` payload: an unbiased gradient of the forward KL, from draws that the question alone decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bitdistill_ray.config import Dtype
from bitdistill_ray.core import Payload, Sampled, TeacherSignals, TokenBatch, TopK
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.losses.chunked import chunked_loss
from bitdistill_ray.losses.objective import GammaMode, Objective, Term, TermKind
from bitdistill_ray.teacher import wire
from bitdistill_ray.teacher.actor import Teacher
from bitdistill_ray.teacher.draws import draw, uniforms
from bitdistill_ray.teacher.request import SignalRequest
from tests.tiny_models import packed_batch, save_tiny

V, DRAWS, SEEDS = 29, 4, 4000
FORWARD = Objective(terms=(Term(kind=TermKind.FORWARD_KL),))
REQUEST = SignalRequest(payload=Payload.SAMPLED, samples=16)


def gradients(student_V: Tensor, signals: TeacherSignals) -> Tensor:
    """The library's own forward-KL gradient at the student's logits, one row [V] per position of the signals."""
    rows = next(s.ids_BTS.shape[1] for s in (signals.topk, signals.sampled) if s is not None)
    logits_BTV = student_V.expand(1, rows, V).clone().requires_grad_()
    labels_BT = torch.zeros(1, rows, dtype=torch.int64)
    loss = chunked_loss(logits_BTV, torch.nn.Identity(), signals, None, labels_BT, FORWARD, chunk_tokens=1024)
    (gradient,) = torch.autograd.grad(loss.value * rows, logits_BTV)
    return gradient[0]


def test_the_mean_gradient_over_seeds_is_that_of_the_full_kl_and_top_k_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    student_V, teacher_V = (torch.randn(V, generator=generator) for _ in range(2))
    log_V = teacher_V.log_softmax(-1)
    full_V = student_V.softmax(-1) - log_V.exp()

    uniform = [uniforms(np.array([seed]), np.array([0]), DRAWS)[0] for seed in range(SEEDS)]
    ids_nS = draw(log_V.expand(SEEDS, V), torch.from_numpy(np.stack(uniform)))
    drawn = Sampled(ids_BTS=ids_nS[None], logprobs_BTS=log_V[ids_nS.long()][None])
    found_nV = gradients(student_V, TeacherSignals(sequence_ids=("a",), sampled=drawn)).double()
    error_V = (log_V.exp() / (SEEDS * DRAWS)).sqrt() + 1e-6  # of independent draws; stratified ones err less
    z_V = (found_nV.mean(0) - full_V) / error_V
    assert z_V.abs().max() < 5
    assert z_V.square().mean() < 2
    assert (found_nV[0] - full_V).norm() > 10 * error_V.norm(), "one draw alone is no proof of anything"

    top = log_V.topk(DRAWS)
    topk = TopK(ids_BTS=top.indices[None, None], logprobs_BTS=top.values[None, None])
    biased_V = gradients(student_V, TeacherSignals(sequence_ids=("a",), topk=topk))[0]
    assert ((biased_V - full_V) / error_V).abs().max() > 20


def test_the_mean_value_is_the_kl() -> None:
    generator = torch.Generator().manual_seed(1)
    student_log_V, log_V = (torch.randn(V, generator=generator).log_softmax(-1) for _ in range(2))
    uniform = np.stack([uniforms(np.array([seed]), np.array([0]), DRAWS)[0] for seed in range(SEEDS)])
    ids_nS = draw(log_V.expand(SEEDS, V), torch.from_numpy(uniform)).long()
    values_n = (log_V[ids_nS] - student_log_V[ids_nS]).mean(-1).double()
    exact = (log_V.exp() * (log_V - student_log_V)).sum()
    assert abs(values_n.mean() - exact) < 5 * values_n.std() / SEEDS**0.5


def test_tokens_without_probability_are_never_drawn() -> None:
    log_V = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).log()
    uniform_nS = np.array([[0.0, 0.4999], [0.5001, 0.9], [0.999999, 1 - 1e-12], [0.25, 0.75]])
    ids = draw(log_V.expand(4, 5), torch.from_numpy(uniform_nS))
    assert ids.tolist() == [[1, 1], [3, 3], [3, 3], [1, 3]]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return Teacher(str(save_tiny(tmp_path_factory.mktemp("teacher"), "llama")), dtype=Dtype.FP32, threads=1)


def rows_of(batch: TokenBatch, rows: list[int]) -> TokenBatch:
    return TokenBatch(
        ids_BT=batch.ids_BT[rows],
        target_BT=batch.target_BT[rows],
        segment_BT=batch.segment_BT[rows],
        sequence_ids=tuple(batch.sequence_ids[row] for row in rows),
    )


def test_draws_belong_to_the_sequence_not_to_the_teacher_or_the_batch(teacher: Teacher, tmp_path: Path) -> None:
    batch = packed_batch([[9, 5], [14], [6, 6]], 16)
    other = Teacher(str(save_tiny(tmp_path / "copy", "llama")), dtype=Dtype.FP32, threads=1)
    said, again = (t.signals(batch, REQUEST).sampled for t in (teacher, other))
    turned = teacher.signals(rows_of(batch, [2, 0]), REQUEST).sampled
    assert said is not None
    assert again is not None
    assert turned is not None
    assert torch.equal(said.ids_BTS, again.ids_BTS)
    assert torch.equal(said.ids_BTS[[2, 0]], turned.ids_BTS)
    moved = rows_of(batch, [0])
    moved.segment_BT = moved.segment_BT.clone()
    moved.segment_BT[0, 9] = 0  # the first document a token longer: another question
    changed = teacher.signals(moved, REQUEST).sampled
    assert changed is not None
    assert not torch.equal(changed.ids_BTS[0, :9], said.ids_BTS[0, :9])


def test_draws_arrive_over_the_wire_with_the_teachers_log_probabilities(teacher: Teacher) -> None:
    batch = packed_batch([[16], [10, 6]], 16)
    arrays = wire.encode_batch(batch)
    message = teacher.score(arrays, REQUEST)
    wire.check_answer(message, arrays)
    assert wire.payload_bytes(message) == 6 * 16 * batch.ids_BT.numel()
    drawn = wire.decode_signals(message).sampled
    logits_BTV = teacher.signals(batch, SignalRequest(payload=Payload.LOGITS)).logits_BTV
    assert drawn is not None
    assert logits_BTV is not None
    expected = logits_BTV.log_softmax(-1).gather(-1, drawn.ids_BTS.long())
    torch.testing.assert_close(drawn.logprobs_BTS.float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (Term(kind=TermKind.REVERSE_KL), "a divergence other than forward_kl"),
        (Term(kind=TermKind.JSD), "a divergence other than forward_kl"),
        (Term(kind=TermKind.CAKLD, gamma_mode=GammaMode.FIXED), "a divergence other than forward_kl"),
        (Term(kind=TermKind.FORWARD_KL, temperature=2.0), "2.0 with the sampled payload, drawn at 1"),
    ],
)
def test_what_draws_cannot_tell_is_refused(term: Term, message: str) -> None:
    drawn = Sampled(ids_BTS=torch.zeros(1, 2, 3, dtype=torch.int32), logprobs_BTS=torch.zeros(1, 2, 3))
    with pytest.raises(ConfigError, match=message):
        chunked_loss(torch.zeros(1, 2, V, requires_grad=True), torch.nn.Identity(),
                     TeacherSignals(sequence_ids=("a",), sampled=drawn), None, torch.zeros(1, 2, dtype=torch.int64),
                     Objective(terms=(term,)), chunk_tokens=8, gamma=0.5)  # fmt: skip
