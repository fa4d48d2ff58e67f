"""gamma, and each way in which the authors' estimate goes wrong."""

from __future__ import annotations

import pytest
import torch

from bitdistill_ray.core import TeacherSignals
from bitdistill_ray.errors import ConfigError, DataError
from bitdistill_ray.losses.gamma import GammaEstimate, estimate_gamma
from bitdistill_ray.losses.objective import GammaMode
from tests.losses.cases import Reference, heads, hidden, signals_of, token_batch

MODES = [GammaMode.LABEL, GammaMode.MAX]


def confident_on_padding() -> tuple[TeacherSignals, torch.Tensor]:
    """Logits whose padding is certain (probability 1) and whose other rows are not."""
    batch = token_batch()
    _, teacher_head = heads()
    logits_BTV = teacher_head(hidden(1))
    logits_BTV[batch.segment_BT < 0] = torch.nn.functional.one_hot(torch.tensor(0), 29) * 100.0
    return TeacherSignals(sequence_ids=batch.sequence_ids, logits_BTV=logits_BTV), batch.labels_BT


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("payload", ["hidden", "logits"])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
def test_is_the_mean_over_valid_tokens(mode: GammaMode, payload: str, chunk_tokens: int) -> None:
    _, teacher_head = heads()
    labels_BT = token_batch().labels_BT
    logits_nV = teacher_head(hidden(1)).flatten(0, 1)
    reference = Reference(logits_nV, logits_nV, labels_BT.flatten())
    confidence_n = reference.label_probability() if mode is GammaMode.LABEL else reference.probabilities()[1].amax(-1)
    estimate = estimate_gamma(
        [(signals_of(payload, hidden(1), teacher_head), labels_BT)],
        mode, teacher_head=teacher_head, chunk_tokens=chunk_tokens,
    )  # fmt: skip
    valid_n = labels_BT.flatten() >= 0
    assert estimate.tokens == int(valid_n.sum())
    assert estimate.value == pytest.approx(float(confidence_n[valid_n].mean()), rel=1e-5)


def test_trap_label_and_largest_probability_differ() -> None:
    signals, labels_BT = confident_on_padding()
    label, largest = (estimate_gamma([(signals, labels_BT)], mode).value for mode in MODES)
    assert label < largest


@pytest.mark.parametrize("mode", MODES)
def test_trap_padding_is_not_looked_at(mode: GammaMode) -> None:
    """Certain padding would lift the mean, and NaN in it would spoil the mean."""
    signals, labels_BT = confident_on_padding()
    before = estimate_gamma([(signals, labels_BT)], mode)
    assert signals.logits_BTV is not None
    signals.logits_BTV[1, 7:] = torch.nan
    assert estimate_gamma([(signals, labels_BT)], mode) == before
    assert before.value < 0.9


@pytest.mark.parametrize("mode", MODES)
def test_trap_batches_are_weighted_by_their_tokens(mode: GammaMode) -> None:
    """A batch of 1 token and one of 12: the pooled mean, neither the mean of means nor 11 sums over 10."""
    signals, labels_BT = confident_on_padding()
    one = torch.full_like(labels_BT, -100)
    one[0, 1] = labels_BT[0, 1]
    both = estimate_gamma([(signals, labels_BT), (signals, one)], mode)
    apart = [estimate_gamma([(signals, labels)], mode) for labels in (labels_BT, one)]
    assert both == apart[0] + apart[1]
    pooled = (apart[0].value * apart[0].tokens + apart[1].value) / (apart[0].tokens + 1)
    assert both.value == pytest.approx(pooled)
    assert abs(both.value - (apart[0].value + apart[1].value) / 2) > 1e-3


def test_trap_never_above_one() -> None:
    logits_BTV = torch.zeros(1, 4, 29)
    logits_BTV[..., 3] = 200.0
    batch = (TeacherSignals(sequence_ids=("a",), logits_BTV=logits_BTV), torch.full((1, 4), 3))
    assert estimate_gamma([batch] * 11, GammaMode.LABEL).value == 1.0
    assert GammaEstimate(confidence_sum=11.0, tokens=10).value == 1.0


def test_topk_payload() -> None:
    """The largest probability is exact; the label's is, wherever the label is among the top-k, and else 0."""
    _, teacher_head = heads()
    labels_BT = token_batch().labels_BT
    full, coarse = (signals_of(payload, hidden(1), teacher_head, k=6) for payload in ("logits", "topk"))
    assert coarse.topk is not None
    most = estimate_gamma([(coarse, labels_BT)], GammaMode.MAX).value
    assert most == pytest.approx(estimate_gamma([(full, labels_BT)], GammaMode.MAX).value, rel=1e-5)
    inside_BT = torch.where((coarse.topk.ids_BTS == labels_BT.unsqueeze(-1)).any(-1), labels_BT, -100)
    found, exact = (estimate_gamma([(s, inside_BT)], GammaMode.LABEL) for s in (coarse, full))
    assert found.tokens > 0
    assert found.value == pytest.approx(exact.value, rel=1e-5)
    assert estimate_gamma([(coarse, labels_BT)], GammaMode.LABEL).confidence_sum == pytest.approx(
        found.confidence_sum, rel=1e-5
    )


def test_refuses_what_cannot_be_measured() -> None:
    signals, labels_BT = confident_on_padding()
    with pytest.raises(ConfigError, match="per-token"):
        estimate_gamma([(signals, labels_BT)], GammaMode.PER_TOKEN)
    with pytest.raises(DataError, match="no token with a label"):
        _ = estimate_gamma([(signals, torch.full_like(labels_BT, -100))], GammaMode.LABEL).value
