"""TeacherSignals (and the batches they are about) as flat dicts of numpy arrays: what Ray's object store carries.

numpy because the object store maps arrays into the reader without a copy (1.6-2.2 GiB/s from actor to actor; torch
tensors reach 0.4).  numpy has no bfloat16, so such a tensor travels as its int16 bits under a key that says so.
Nothing is cast on the way: a float16 teacher's states arrive as float16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitdistill_ray.core import AttentionStates, LayerStates, Sampled, TeacherSignals, TokenBatch, TopK
from bitdistill_ray.data.batch import BatchArrays
from bitdistill_ray.errors import TeacherError

Message = dict[str, Any]
_BF16 = ":bf16"


def put(message: Message, key: str, tensor: Tensor) -> None:
    """Add `tensor` (any device) to `message`; the copy to the host happens here, on a GPU into pinned memory."""
    tensor = tensor.detach().contiguous()
    if tensor.is_cuda:
        tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)
    if tensor.dtype == torch.bfloat16:
        message[key + _BF16] = tensor.view(torch.int16).numpy()
    else:
        message[key] = tensor.numpy()


def get(message: Message, key: str) -> Tensor:
    """The tensor that `put` stored, bit for bit."""
    array, dtype = array_of(message, key)
    if not array.flags.writeable:
        array = array.copy()  # what lies in the object store is read-only, which torch cannot express
    return torch.from_numpy(array).view(dtype)


def array_of(message: Message, key: str) -> tuple[np.ndarray[Any, Any], torch.dtype]:
    """The array that `put` stored, as it lies in the object store, and the dtype of the tensor whose bits it holds."""
    if key + _BF16 in message:
        return message[key + _BF16], torch.bfloat16
    return message[key], torch.from_numpy(np.empty(0, message[key].dtype)).dtype


def has(message: Message, key: str) -> bool:
    """True where `put` stored `key`."""
    return key in message or key + _BF16 in message


def payload_bytes(message: Message) -> int:
    """Bytes of all arrays in a message."""
    return sum(v.nbytes for v in message.values() if isinstance(v, np.ndarray))


def encode_batch(batch: TokenBatch) -> BatchArrays:
    """A TokenBatch in the form in which the feeder hands batches out; `data.batch.token_batch` is the inverse."""
    return {
        "ids": batch.ids_BT.to(torch.int32).cpu().numpy(),
        "target": batch.target_BT.cpu().numpy(),
        "segment": batch.segment_BT.to(torch.int32).cpu().numpy(),
        "sequence_ids": np.array(batch.sequence_ids, dtype=np.str_),
    }


def batch_digest(arrays: BatchArrays) -> str:
    """What a request is about: sha256 over ids and segments.  An answer must carry the digest of its question."""
    digest = hashlib.sha256(np.ascontiguousarray(arrays["ids"], dtype=np.int32).tobytes())
    digest.update(np.ascontiguousarray(arrays["segment"], dtype=np.int32).tobytes())
    return digest.hexdigest()


def encode_signals(signals: TeacherSignals) -> Message:
    """TeacherSignals for the wire."""
    message: Message = {"sequence_ids": tuple(signals.sequence_ids)}
    if signals.hidden_BTD is not None:
        put(message, "hidden", signals.hidden_BTD)
    if signals.logits_BTV is not None:
        put(message, "logits", signals.logits_BTV)
    if signals.topk is not None:
        put(message, "topk_ids", signals.topk.ids_BTS.to(torch.int32))
        put(message, "topk_logprobs", signals.topk.logprobs_BTS)
    if signals.sampled is not None:
        put(message, "sampled_ids", signals.sampled.ids_BTS.to(torch.int32))
        put(message, "sampled_logprobs", signals.sampled.logprobs_BTS)
    if signals.attention is not None:
        message["attention_layer"] = signals.attention.layer
        put(message, "q", signals.attention.q_BHTC)
        put(message, "k", signals.attention.k_BJTC)
        put(message, "v", signals.attention.v_BJTC)
    if signals.states is not None:
        message["states_layers"] = signals.states.layers
        put(message, "states", signals.states.hidden_BLTD)
    return message


def decode_signals(message: Message, place: Callable[[Message, str], Tensor] = get) -> TeacherSignals:
    """The inverse of `encode_signals`; `place` makes the tensors, on the CPU if nothing else is said."""

    def tensor(key: str) -> Tensor | None:
        return place(message, key) if has(message, key) else None

    ids, logprobs = tensor("topk_ids"), tensor("topk_logprobs")
    drawn, drawn_logprobs = tensor("sampled_ids"), tensor("sampled_logprobs")
    q, k, v, states = tensor("q"), tensor("k"), tensor("v"), tensor("states")
    return TeacherSignals(
        sequence_ids=tuple(message["sequence_ids"]),
        hidden_BTD=tensor("hidden"),
        logits_BTV=tensor("logits"),
        topk=None if ids is None or logprobs is None else TopK(ids_BTS=ids, logprobs_BTS=logprobs),
        sampled=None
        if drawn is None or drawn_logprobs is None
        else Sampled(ids_BTS=drawn, logprobs_BTS=drawn_logprobs),
        attention=None
        if q is None or k is None or v is None
        else AttentionStates(layer=message["attention_layer"], q_BHTC=q, k_BJTC=k, v_BJTC=v),
        states=None if states is None else LayerStates(layers=tuple(message["states_layers"]), hidden_BLTD=states),
    )


def check_answer(answer: Message, arrays: BatchArrays) -> None:
    """Refuse an answer to another question than `arrays`.

    Raises:
        TeacherError: digest, sequence ids or the [B, T] of the payload differ from what was asked.
    """
    asked = tuple(arrays["sequence_ids"].tolist())
    if answer.get("digest") != batch_digest(arrays) or tuple(answer["sequence_ids"]) != asked:
        raise TeacherError("teacher answer", f"is about {answer['sequence_ids'][:2]}, asked was {asked[:2]}",
                           "Report this as a bug: a request was mixed up")  # fmt: skip
    for key in ("hidden", "logits", "topk_ids", "sampled_ids"):
        if has(answer, key) and (shape := array_of(answer, key)[0].shape[:2]) != arrays["ids"].shape:
            raise TeacherError("teacher answer", f"{key} covers {shape} positions of {arrays['ids'].shape}",
                               "Run one version of bitdistill-ray on all nodes")  # fmt: skip
