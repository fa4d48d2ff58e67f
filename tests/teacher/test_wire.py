"""The wire: what a teacher said arrives bit for bit, and an answer to another question is refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitdistill_ray.core import AttentionStates, LayerStates, TeacherSignals, TopK
from bitdistill_ray.data.batch import token_batch
from bitdistill_ray.errors import TeacherError
from bitdistill_ray.teacher import wire
from tests.tiny_models import packed_batch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCH = packed_batch([[5, 4], [8]], 11)
ROWS, LENGTH = BATCH.ids_BT.shape


def values(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Ordinary numbers, and those that a careless conversion loses: signed zero, subnormals, infinity, NaN."""
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    tiny = torch.finfo(dtype).smallest_normal / 2
    tensor.view(-1)[:6] = torch.tensor([0.0, -0.0, tiny, torch.inf, -torch.inf, torch.nan], dtype=torch.float64).to(
        dtype
    )
    return tensor


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def read_only(message: dict[str, Any]) -> dict[str, Any]:
    """As it comes out of Ray's object store."""
    for value in message.values():
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    return message


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32, torch.int64])
@pytest.mark.parametrize("freeze", [False, True])
def test_a_tensor_arrives_bit_for_bit(dtype: torch.dtype, freeze: bool) -> None:
    tensor = values(dtype, 3, 4, 5) if dtype.is_floating_point else torch.arange(60, dtype=dtype).view(3, 4, 5) - 7
    message: wire.Message = {}
    wire.put(message, "x", tensor)
    if freeze:
        read_only(message)
    assert wire.has(message, "x")
    assert not wire.has(message, "y")
    assert wire.payload_bytes(message) == tensor.nbytes
    arrived = wire.get(message, "x")
    assert same_bits(arrived, tensor)
    arrived.zero_()  # a tensor of its own where the store's page may not be written


def test_what_arrived_from_the_store_does_not_write_into_it() -> None:
    message: wire.Message = {}
    wire.put(message, "x", torch.ones(4))
    read_only(message)
    wire.get(message, "x").zero_()
    assert torch.equal(wire.get(message, "x"), torch.ones(4))


def test_a_slice_of_a_larger_tensor_travels_alone() -> None:
    whole = values(torch.bfloat16, 6, 8)
    message: wire.Message = {}
    wire.put(message, "x", whole[:, 2:5].t())
    assert wire.payload_bytes(message) == 6 * 3 * 2
    assert same_bits(wire.get(message, "x"), whole[:, 2:5].t())


def signals(payload: str, dtype: torch.dtype, *, attention: bool) -> TeacherSignals:
    said = TeacherSignals(sequence_ids=BATCH.sequence_ids)
    if payload == "hidden":
        said.hidden_BTD = values(dtype, ROWS, LENGTH, 6)
    elif payload == "logits":
        said.logits_BTV = values(dtype, ROWS, LENGTH, 9)
    else:
        ids = torch.randint(0, 9, (ROWS, LENGTH, 3), dtype=torch.int32)
        said.topk = TopK(ids_BTS=ids, logprobs_BTS=values(dtype, ROWS, LENGTH, 3))
    if attention:
        q, k, v = (values(dtype, ROWS, heads, LENGTH, 4, seed=i) for i, heads in enumerate((4, 2, 2)))
        said.attention = AttentionStates(layer=5, q_BHTC=q, k_BJTC=k, v_BJTC=v)
        said.states = LayerStates(layers=(1, 4), hidden_BLTD=values(dtype, ROWS, 2, LENGTH, 6, seed=3))
    return said


def tensors(signals: TeacherSignals) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part in (signals, signals.topk, signals.attention, signals.states):
        if part is not None:
            found |= {f.name: v for f in fields(part) if isinstance(v := getattr(part, f.name), Tensor)}
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("payload", ["hidden", "logits", "topk"])
@pytest.mark.parametrize("attention", [False, True])
def test_signals_arrive_bit_for_bit(payload: str, dtype: torch.dtype, attention: bool) -> None:
    sent = signals(payload, dtype, attention=attention)
    message = read_only(wire.encode_signals(sent))
    assert not any(isinstance(value, Tensor) for value in message.values()), "the object store copies torch tensors"
    arrived = wire.decode_signals(message)
    expected, found = tensors(sent), tensors(arrived)
    assert expected.keys() == found.keys()
    assert all(same_bits(found[name], expected[name]) for name in expected)
    assert arrived.sequence_ids == BATCH.sequence_ids
    assert (arrived.attention.layer if arrived.attention else None) == (5 if attention else None)
    assert (arrived.states.layers if arrived.states else None) == ((1, 4) if attention else None)


def test_a_batch_arrives_as_it_was() -> None:
    arrays = read_only(wire.encode_batch(BATCH))
    arrived = token_batch(arrays)
    for name in ("ids_BT", "target_BT", "segment_BT"):
        assert same_bits(getattr(arrived, name).long(), getattr(BATCH, name).long())
    assert arrived.sequence_ids == BATCH.sequence_ids


def answer_to(batch_arrays: Any, **changes: Any) -> wire.Message:
    message = wire.encode_signals(signals("hidden", torch.float32, attention=True))
    return {**message, "digest": wire.batch_digest(batch_arrays), **changes}


def test_the_answer_to_the_question_is_accepted() -> None:
    arrays = wire.encode_batch(BATCH)
    wire.check_answer(answer_to(arrays), arrays)


def other(**changes: Any) -> dict[str, Any]:
    return {**wire.encode_batch(BATCH), **changes}


def with_one_changed(name: str, row: int, column: int) -> np.ndarray[Any, Any]:
    array = wire.encode_batch(BATCH)[name].copy()
    array[row, column] += 1
    return array


@pytest.mark.parametrize(
    "asked",
    [
        other(ids=with_one_changed("ids", 1, 2)),
        other(segment=with_one_changed("segment", 0, 6)),
        other(sequence_ids=np.array(["tiny#0#1", "tiny#0#0"])),
        {name: array[::-1].copy() for name, array in wire.encode_batch(BATCH).items()},
        {name: array[:1] for name, array in wire.encode_batch(BATCH).items()},
    ],
    ids=["ids", "segments", "names", "order", "fewer"],
)
def test_an_answer_to_another_question_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(TeacherError, match=r"teacher answer: is about .*a request was mixed up"):
        wire.check_answer(answer_to(wire.encode_batch(BATCH)), asked)


def test_an_answer_without_a_digest_is_refused() -> None:
    arrays = wire.encode_batch(BATCH)
    message = answer_to(arrays)
    del message["digest"]
    with pytest.raises(TeacherError, match="is about"):
        wire.check_answer(message, arrays)


@pytest.mark.parametrize("shape", [(ROWS, LENGTH - 1, 6), (ROWS - 1, LENGTH, 6)])
def test_an_answer_about_other_positions_is_refused(shape: tuple[int, ...]) -> None:
    arrays = wire.encode_batch(BATCH)
    message = answer_to(arrays, hidden=np.zeros(shape, dtype=np.float32))
    with pytest.raises(TeacherError, match=r"hidden covers .* positions of \(2, 11\)\. Run one version"):
        wire.check_answer(message, arrays)


def test_where_two_batches_differ_their_digests_do() -> None:
    """Moving a number from ids to segments must not go unnoticed either."""
    ids, segment = np.array([[1, 2]], np.int32), np.array([[3, 4]], np.int32)
    assert wire.batch_digest({"ids": ids, "segment": segment}) != wire.batch_digest({"ids": segment, "segment": ids})
