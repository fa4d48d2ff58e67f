"""Attention relations against the papers' definitions, and what padding and neighbours must not do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitdistill_ray.core import AttentionStates
from bitdistill_ray.errors import ConfigError, ModelError
from bitdistill_ray.losses.objective import RelationForm, RelationTerm
from bitdistill_ray.losses.relation import attention_relation_loss, relation_rows
from tests.losses.cases import Allocations, B, T, attention, token_batch

VALID = torch.ones(B, T, dtype=torch.bool)
STUDENT, TEACHER = attention(0), attention(10)
COSINE = RelationTerm(weight=1.0, relation_heads=4, heads_per_chunk=3)


def trainable(states: AttentionStates) -> AttentionStates:
    q, k, v = (t.clone().requires_grad_() for t in (states.q_BHTC, states.k_BJTC, states.v_BJTC))
    return AttentionStates(layer=states.layer, q_BHTC=q, k_BJTC=k, v_BJTC=v)


def changed(states: AttentionStates, rows: Tensor, by: float) -> AttentionStates:
    """`states` with the vectors of the tokens where rows_BT holds set to `by`."""
    mask = rows[:, None, :, None]
    q, k, v = (torch.where(mask, by, t) for t in (states.q_BHTC, states.k_BJTC, states.v_BJTC))
    return AttentionStates(layer=states.layer, q_BHTC=q, k_BJTC=k, v_BJTC=v)


def authors_relation(states: Tensor, split_heads: int) -> Tensor:
    """Algorithm 1, step by step: merge, split, normalise, product, softmax."""
    merged = states.transpose(1, 2).reshape(states.shape[0], states.shape[2], -1)
    heads = merged.reshape(*merged.shape[:2], split_heads, -1).transpose(1, 2)
    unit = heads / heads.norm(dim=-1, keepdim=True)
    return (unit @ unit.transpose(-1, -2)).softmax(-1)


def algorithm_1(student: AttentionStates, teacher: AttentionStates, split_heads: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for name in ("v_BJTC", "k_BJTC", "q_BHTC"):
        s, t = (authors_relation(getattr(x, name).double(), split_heads).flatten(0, 2) for x in (student, teacher))
        total = total + torch.nn.functional.kl_div(s.log(), t, reduction="batchmean")
    return total


def test_algorithm_1_and_the_authors_code() -> None:
    expected = algorithm_1(STUDENT, TEACHER, split_heads=4)
    found = attention_relation_loss(STUDENT, TEACHER, VALID, COSINE)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    by_heads = attention_relation_loss(STUDENT, TEACHER, VALID, replace(COSINE, divide_by_heads=True))
    torch.testing.assert_close(by_heads, found / 4)


def test_equation_12() -> None:
    """softmax(A A^T / sqrt(d_r)), native heads, mean over heads and tokens, sum over Q, K, V."""
    expected = torch.zeros((), dtype=torch.float64)
    for name in ("q_BHTC", "k_BJTC", "v_BJTC"):
        s, t = (getattr(x, name).double() for x in (STUDENT, TEACHER))
        s, t = ((x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5).softmax(-1) for x in (s, t))
        expected += (t * (t / s).log()).sum(-1).mean()
    term = RelationTerm(weight=1.0, form=RelationForm.SCALED_DOT)
    found = attention_relation_loss(STUDENT, TEACHER, VALID, term)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_temperature_divides_the_logits_of_both_forms() -> None:
    for form in RelationForm:
        term = replace(COSINE, form=form)
        cold, warm = (relation_rows(STUDENT.q_BHTC, VALID, replace(term, temperature=x)) for x in (1.0, 2.5))
        torch.testing.assert_close(
            warm @ warm.transpose(-1, -2), (cold @ cold.transpose(-1, -2)) / 2.5, rtol=1e-5, atol=1e-6
        )


def test_relation_heads_split_the_merged_width() -> None:
    """Relation head r holds features r*W .. (r+1)*W of the concatenated heads, also across native heads."""
    rows_BRTW = relation_rows(STUDENT.q_BHTC, VALID, replace(COSINE, form=RelationForm.SCALED_DOT, relation_heads=2))
    merged_BTD = STUDENT.q_BHTC.transpose(1, 2).flatten(2)
    torch.testing.assert_close(rows_BRTW[:, 1] * 8**0.25, merged_BTD[..., 8:])


def test_weights_choose_among_q_k_v() -> None:
    def loss(**weights: float) -> Tensor:
        term = RelationTerm(weight=1.0, **({"query": 0.0, "key": 0.0, "value": 0.0} | weights))
        return attention_relation_loss(STUDENT, TEACHER, VALID, term)

    apart = loss(query=2.0) + loss(key=0.5) + loss(value=1.0)
    torch.testing.assert_close(loss(query=2.0, key=0.5, value=1.0), apart)
    only_q = replace(STUDENT, k_BJTC=STUDENT.k_BJTC + 1, v_BJTC=STUDENT.v_BJTC + 1)
    term = RelationTerm(weight=1.0, key=0.0, value=0.0)
    torch.testing.assert_close(attention_relation_loss(only_q, TEACHER, VALID, term), loss(query=1.0))


def test_teacher_of_another_width() -> None:
    """relation_heads bridges widths; without it the head counts must match, and the error says what to set."""
    wide = attention(10, h=8, j=4, c=8)
    assert attention_relation_loss(STUDENT, wide, VALID, COSINE) > 0
    with pytest.raises(ModelError, match="relation_heads"):
        attention_relation_loss(STUDENT, wide, VALID, replace(COSINE, relation_heads=None))
    with pytest.raises(ConfigError, match="3 does not divide the width 16"):
        attention_relation_loss(STUDENT, TEACHER, VALID, replace(COSINE, relation_heads=3))
    with pytest.raises(ModelError, match="states of 5 tokens, a batch of 11"):
        attention_relation_loss(STUDENT, attention(10, t=5), VALID, COSINE)


@pytest.mark.parametrize("form", RelationForm)
@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_masked_out_of_rows_and_columns(form: RelationForm, causal: bool) -> None:
    """A padded row equals the unpadded one, whatever the padding holds: NaN and all."""
    term = replace(COSINE, form=form, causal=causal)
    valid_BT = torch.arange(T).expand(B, T) < 7
    student = trainable(changed(STUDENT, ~valid_BT, float("nan")))
    loss = attention_relation_loss(student, changed(TEACHER, ~valid_BT, float("nan")), valid_BT, term)

    def cut(states: AttentionStates) -> AttentionStates:
        q, k, v = (t[:, :, :7] for t in (states.q_BHTC, states.k_BJTC, states.v_BJTC))
        return AttentionStates(layer=1, q_BHTC=q, k_BJTC=k, v_BJTC=v)

    short = trainable(cut(STUDENT))
    expected = attention_relation_loss(short, cut(TEACHER), VALID[:, :7], term)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for name in ("q_BHTC", "k_BJTC", "v_BJTC"):
        found, short_grad = getattr(student, name).grad, getattr(short, name).grad
        torch.testing.assert_close(found[:, :, :7], short_grad)
        assert (found[:, :, 7:] == 0).all()


def test_documents_are_kept_apart() -> None:
    """Changing one document of a packed row leaves the gradient of the other alone."""
    segment_BT = token_batch().segment_BT
    valid_BT = segment_BT >= 0
    first_BT = (segment_BT == 0) & (torch.arange(B) == 0)[:, None]

    def gradient(teacher: AttentionStates, segments: Tensor | None) -> Tensor:
        student = trainable(STUDENT)
        attention_relation_loss(student, teacher, valid_BT, COSINE, segment_BT=segments).backward()
        assert student.q_BHTC.grad is not None
        return student.q_BHTC.grad[0, :, 5:]

    noise = torch.randn_like(TEACHER.q_BHTC) * first_BT[:, None, :, None]
    other = replace(TEACHER, q_BHTC=TEACHER.q_BHTC + noise)
    torch.testing.assert_close(gradient(TEACHER, segment_BT), gradient(other, segment_BT))
    assert (gradient(TEACHER, None) - gradient(other, None)).abs().max() > 1e-5


def test_causal_relations_are_those_of_the_lower_triangle() -> None:
    """Row t is a softmax over columns 0..t: the definition, row by row."""
    term = RelationTerm(weight=1.0, form=RelationForm.SCALED_DOT, key=0.0, value=0.0, causal=True)
    s, t = (x.q_BHTC.double() @ x.q_BHTC.double().transpose(-1, -2) / 2 for x in (STUDENT, TEACHER))
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(T):
        p, q = (x[:, :, row, : row + 1].softmax(-1) for x in (t, s))
        expected += (p * (p / q).log()).sum(-1).mean() / T
    found = attention_relation_loss(STUDENT, TEACHER, VALID, term)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert (found - attention_relation_loss(STUDENT, TEACHER, VALID, replace(term, causal=False))).abs() > 1e-3


@pytest.mark.parametrize("form", RelationForm)
def test_gradcheck(form: RelationForm) -> None:
    term = RelationTerm(weight=1.0, form=form, relation_heads=2, heads_per_chunk=1)
    segment_BT = torch.tensor([[0, 0, 1, 1, -1]])
    student, teacher = (attention(seed, b=1, t=5, h=2, j=2, c=2) for seed in (0, 10))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        states = AttentionStates(layer=1, q_BHTC=q, k_BJTC=k, v_BJTC=v)
        return attention_relation_loss(states, teacher, segment_BT >= 0, term, segment_BT=segment_BT)

    inputs = tuple(t.double().requires_grad_() for t in (student.q_BHTC, student.k_BJTC, student.v_BJTC))
    assert torch.autograd.gradcheck(loss, inputs)


def test_totals_make_the_mean_over_micro_batches_exact() -> None:
    """Rows 0 and 1 have different padding: two losses shared by the total equal one over both."""
    segment_BT = token_batch().segment_BT
    valid_BT = segment_BT >= 0
    both = attention_relation_loss(STUDENT, TEACHER, valid_BT, COSINE, segment_BT=segment_BT)

    def row(states: AttentionStates, i: int) -> AttentionStates:
        q, k, v = (t[i : i + 1] for t in (states.q_BHTC, states.k_BJTC, states.v_BJTC))
        return AttentionStates(layer=1, q_BHTC=q, k_BJTC=k, v_BJTC=v)

    apart = [
        attention_relation_loss(
            row(STUDENT, i), row(TEACHER, i), valid_BT[i : i + 1], COSINE,
            segment_BT=segment_BT[i : i + 1], total_rows=valid_BT.sum() / 2,
        )
        for i in range(B)
    ]  # fmt: skip
    torch.testing.assert_close((apart[0] + apart[1]) / 2, both)


def test_bf16_states_give_nearly_the_fp32_loss_and_no_gradient_to_the_teacher() -> None:
    narrow, teacher = trainable(STUDENT), trainable(TEACHER)
    q, k, v = (t.bfloat16() for t in (narrow.q_BHTC, narrow.k_BJTC, narrow.v_BJTC))
    loss = attention_relation_loss(AttentionStates(layer=1, q_BHTC=q, k_BJTC=k, v_BJTC=v), teacher, VALID, COSINE)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, attention_relation_loss(STUDENT, TEACHER, VALID, COSINE), rtol=2e-2, atol=1e-3)
    loss.backward()
    assert narrow.q_BHTC.grad is not None
    assert teacher.q_BHTC.grad is None


def test_never_holds_the_relations_of_all_heads() -> None:
    """Forward and backward with one head at a time touch no tensor beyond [B, 1, T, T]; eight at a time do."""
    shape = {"b": 2, "t": 64, "h": 8, "j": 8, "c": 2}
    valid_BT = torch.ones(2, 64, dtype=torch.bool)
    largest = {}
    for size in (1, 8):
        student = trainable(attention(0, **shape))
        term = replace(COSINE, relation_heads=8, heads_per_chunk=size)
        with Allocations() as mode:
            attention_relation_loss(student, attention(10, **shape), valid_BT, term).backward()
        largest[size] = mode.elements
    assert largest == {1: 2 * 64 * 64, 8: 2 * 8 * 64 * 64}


def test_sizes_measured_on_the_authors_code() -> None:
    """Random tensors of Qwen3-0.6B's shape with noise 0.5: the size of the loss under each of the three definitions,
    which differ by 70 x, so that the same weight means very different things."""
    shape = {"b": 1, "t": 128, "h": 16, "j": 8, "c": 128}
    teacher, noise = attention(0, **shape), attention(10, **shape)
    student = AttentionStates(
        layer=1,
        q_BHTC=teacher.q_BHTC + 0.5 * noise.q_BHTC,
        k_BJTC=teacher.k_BJTC + 0.5 * noise.k_BJTC,
        v_BJTC=teacher.v_BJTC + 0.5 * noise.v_BJTC,
    )
    valid_BT = torch.ones(1, 128, dtype=torch.bool)
    sizes = {
        1.55e-2: RelationTerm(weight=1.0, relation_heads=32),
        4.7e-4: RelationTerm(weight=1.0, relation_heads=1),
        4.85e-4: RelationTerm(weight=1.0, relation_heads=32, divide_by_heads=True),
        3.4e-2: RelationTerm(weight=1.0, form=RelationForm.SCALED_DOT),
    }
    for size, term in sizes.items():
        assert float(attention_relation_loss(student, teacher, valid_BT, term)) == pytest.approx(size, rel=0.05)
